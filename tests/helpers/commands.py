"""Run train_accelerate.py in processes of its own, as its users do."""

import functools
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_accelerate.py"
# Seconds after which a run that hangs is a failure; the runs themselves take a few.
PATIENCE = 240
# What `accelerate launch` sets for shards by FSDP2.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


# Figures of a log that no run repeats.
TIMES = {"seconds", "clips_per_second", "data_wait", "eta_seconds"}


def log_of(folder: Path) -> list[dict]:
    """The lines of a run's log without the figures that no run repeats."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@functools.cache
def forkserver():
    """The context of processes that are forked from one that has imported what a run imports; see preload.py."""
    os.environ |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.preload"])
    return context


@dataclass
class Result:
    """How a command ended: its exit code and what it wrote."""

    returncode: int
    stdout: str
    stderr: str

    def check(self) -> "Result":
        assert self.returncode == 0, self.stderr[-3000:]
        return self


def free_port() -> int:
    """Return a port that nobody uses, so that runs beside each other do not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(*arguments, cwd, processes: int = 1, program: Sequence[str] = (str(SCRIPT),)) -> Result:
    """Run `accelerate launch train_accelerate.py ARGUMENTS` on the CPU, with one process or several.

    program: what stands before the arguments, for another one.
    """
    several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(free_port())]
    how = ["--cpu", "--num_processes", "1"] if processes == 1 else several
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *how, *program, *map(str, arguments)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return Result(done.returncode, done.stdout, done.stderr)


class Run:
    """`python train_accelerate.py ARGUMENTS` in a process that is forked from one that has imported it already.

    It has all that a new process has, its own state, streams, exit code and process group, without the seconds that
    imports take. environment: variables that it has. largest_file: bytes after which the system refuses to write on.
    script: another program to run, which imports much of the same.
    """

    def __init__(
        self,
        *arguments,
        cwd,
        environment: dict | None = None,
        largest_file: int | None = None,
        script: Path = SCRIPT,
    ):
        self.streams = [Path(cwd) / f".{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        command, streams = [str(part) for part in (script, *arguments)], [str(s) for s in self.streams]
        self.process = forkserver().Process(
            target=_main, args=(command, str(cwd), streams, environment or {}, largest_file)
        )
        self.process.start()

    def wait(self) -> Result:
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        return Result(self.process.exitcode, *(stream.read_text() for stream in self.streams))

    def kill_when(self, path: Path) -> Result:
        """Kill the process, without a warning, as soon as a path exists."""
        self.wait_until(path.exists)
        self.process.kill()
        result = self.wait()
        assert result.returncode == -signal.SIGKILL, f"it ended before {path} was there: {result.stderr[-3000:]}"
        return result

    def terminate_when(self, condition: Callable[[], bool], how: int = signal.SIGTERM) -> Result:
        """Send a signal to the process and those that it has started, as schedulers do, once a condition holds."""
        self.wait_until(condition)
        os.killpg(self.process.pid, how)
        return self.wait()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition() and self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)


def fork(function: Callable[[], int]) -> multiprocessing.Process:
    """Call a function in a fork of this process, which ends with the exit status that it returns.

    The fork gets a lock of its own for progress bars. If it were killed while it held that of this process, no bar
    could be drawn here any more.
    """

    def run() -> None:
        tqdm.set_lock(threading.RLock())
        sys.exit(function())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def _main(command: list[str], cwd: str, streams: list[str], environment: dict, largest_file: int | None) -> None:
    os.setsid()
    os.chdir(cwd)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.argv = command
    os.environ |= environment
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    multiprocessing.set_start_method("fork", force=True)  # that of the data loader's workers, as in a plain process
    import train_accelerate

    if command[0] == str(SCRIPT):
        train_accelerate.main(launcher=os.getppid())
    else:
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def start_ranks(processes: int, *arguments, cwd, environment: dict | None = None, **kwargs) -> list[Run]:
    """Start a `Run` on several processes that find each other as those of a launcher do."""
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{**shared, "RANK": i, "LOCAL_RANK": i, **(environment or {})} for i in range(processes)]
    values = [{name: str(value) for name, value in rank.items()} for rank in ranks]
    return [Run(*arguments, cwd=cwd, environment=rank, **kwargs) for rank in values]


def train_on(processes: int, *arguments, cwd, **kwargs) -> list[Result]:
    """Run train_accelerate.py on several processes and return how each ended, the main one first."""
    runs = start_ranks(processes, *arguments, cwd=cwd, **kwargs)
    return [run.wait() for run in runs]


def train(*arguments, cwd) -> Result:
    """Run train_accelerate.py with these arguments and wait for its end."""
    return Run(*arguments, cwd=cwd).wait()
