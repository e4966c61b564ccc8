"""Run train_accelerate.py in processes of its own, as its users do."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_accelerate.py"
# Seconds after which a run that hangs is a failure; the runs themselves take a few.
PATIENCE = 240


@dataclass
class Result:
    """How a command ended: its exit code and what it wrote."""

    returncode: int
    stdout: str
    stderr: str

    def check(self) -> "Result":
        assert self.returncode == 0, self.stderr[-3000:]
        return self


def launch(*arguments, cwd, processes: int = 1) -> Result:
    """Run `accelerate launch train_accelerate.py ARGUMENTS` on the CPU, with one process or several."""
    how = ["--cpu", "--num_processes", "1"] if processes == 1 else ["--multi_gpu", "--num_processes", str(processes)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *how, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return Result(done.returncode, done.stdout, done.stderr)


class Run:
    """`python train_accelerate.py ARGUMENTS` in a process that is forked from one that has imported it already.

    It has all that a new process has, its own state, streams and exit code, without the seconds that imports take.
    """

    _context = None

    def __init__(self, *arguments, cwd):
        self.streams = [Path(cwd) / f".{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        self.process = self._started_context().Process(
            target=_main, args=([str(a) for a in arguments], str(cwd), [str(s) for s in self.streams])
        )
        self.process.start()

    @classmethod
    def _started_context(cls):
        if cls._context is None:
            os.environ |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
            cls._context = multiprocessing.get_context("forkserver")
            cls._context.set_forkserver_preload(["train_accelerate"])
        return cls._context

    def wait(self) -> Result:
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        return Result(self.process.exitcode, *(stream.read_text() for stream in self.streams))

    def kill_when(self, path: Path) -> Result:
        """Kill the process, without a warning, as soon as a path exists."""
        deadline = time.monotonic() + PATIENCE
        while not path.exists() and self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        self.process.kill()
        result = self.wait()
        assert result.returncode == -signal.SIGKILL, f"it ended before {path} was there: {result.stderr[-3000:]}"
        return result


def _main(arguments: list[str], cwd: str, streams: list[str]) -> None:
    os.chdir(cwd)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.argv = [str(SCRIPT), *arguments]
    os.environ.pop("OMP_NUM_THREADS", None)  # one thread already; where it is 1, the script takes all cores
    multiprocessing.set_start_method("fork", force=True)  # that of the data loader's workers, as in a plain process
    import train_accelerate

    train_accelerate.main()


def train(*arguments, cwd) -> Result:
    """Run train_accelerate.py with these arguments and wait for its end."""
    return Run(*arguments, cwd=cwd).wait()
