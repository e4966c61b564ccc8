"""What the studies share: their options, and processes that do runs, keep what comes of each, and end with the study."""

import argparse
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

import measure
import torch
import transformers
from tqdm import tqdm

from everest_hf.data.workers import keep_freed_memory
from everest_hf.files import write_whole


class Run(Protocol):
    """A run of a study, which can be sent to a process. Runs of one name are the same run."""

    @property
    def name(self) -> str: ...

    def do(self, bench) -> dict:
        """Do it with what the study's processes have, and return what is kept of it, for JSON."""
        ...


# ------------------------------------------------------------------------------------------------- in the processes

_bench: Any = None


def start_process(make_bench: Callable[[], Any], threads: int) -> None:
    """Prepare a process for the runs that it will be given; make_bench() returns what they work with."""
    global _bench
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    # Each run would name the head that it starts from nothing.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _bench = make_bench()


def _end_with_the_study() -> None:
    """End this process when the study has been killed; it would go on with the runs that were queued."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def call(function: Callable, *args):
    """Return function(bench, *args)."""
    return function(_bench, *args)


def do_run(run: Run) -> dict:
    """Do a run, or read what it left."""
    return remembered(_bench.work / f"{run.name}.json", lambda: run.do(_bench))


def remembered(path: Path, find: Callable[[], dict]) -> dict:
    """Return find(), from its file where it has been found before."""
    if not path.exists():
        found = find()
        write_whole(path, lambda aside: aside.write_text(json.dumps(found, indent=1)))
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------------------- in the study


def do_all(executor: Executor, function: Callable, jobs: list[tuple], description: str) -> list:
    """Call function(*job) for each job in the processes, and return the results in order."""
    futures = [executor.submit(function, *job) for job in jobs]
    for future in tqdm(as_completed(futures), total=len(futures), desc=description, unit="run"):
        future.result()
    return [future.result() for future in futures]


def run_all(executor: Executor, runs: Iterable[Run], description: str) -> dict[Run, dict]:
    """Do runs, each once, the longest first so that no process ends long after the others; return what they left."""
    longest_first = sorted(dict.fromkeys(runs), key=lambda run: -getattr(run, "steps", 0))
    records = do_all(executor, do_run, [(run,) for run in longest_first], description)
    return dict(zip(longest_first, records, strict=True))


def parser_of(description: str | None, sizes: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser of the options that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes, default="cpu")
    parser.add_argument("--seeds", type=measure.positive_int, default=3)
    parser.add_argument("--device", type=measure.device_of, default="cpu")
    parser.add_argument("--work", type=Path, help="folder for clips, models and finished runs [runs/STUDY-SIZE]")
    parser.add_argument("--out", type=Path, help="[benchmarks/results/STUDY-SIZE.json]")
    return parser


def parse(parser: argparse.ArgumentParser, study: str) -> argparse.Namespace:
    """Read the command line."""
    args = parser.parse_args()
    args.work = args.work or Path("runs") / f"{study}-{args.size}"
    args.out = args.out or measure.RESULTS / f"{study}-{args.size}.json"
    return args


def run_study(args: argparse.Namespace, size, make_bench: Callable, study: Callable[[Executor], dict]) -> dict:
    """Return what study(executor) finds, and write it to --out with the facts of the run.

    On a CPU each run has a core of its own; a GPU takes one run after the other. make_bench: called in each process as
    make_bench(size, work, device).
    """
    cores = os.cpu_count() or 1
    processes, threads = (1, cores) if args.device.type == "cuda" else (cores, 1)
    facts = measure.facts_of_run(args.device)
    facts["hardware"] |= {"processes": processes, "threads": threads}  # those of each
    args.work.mkdir(parents=True, exist_ok=True)
    claim(args.work, size, facts)
    start = partial(start_process, partial(make_bench, size, args.work, args.device), threads)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=start) as executor:
        found = study(executor)
    settings = {"settings": measure.settings_of(args), "size": dataclasses.asdict(size)}
    measure.write_json(args.out, facts | settings | found)
    return found


def claim(work: Path, size, facts: dict) -> None:
    """Take a folder for a study of this size on this machine, or refuse one that holds another."""
    about = {"size": dataclasses.asdict(size), "versions": facts["versions"], "hardware": facts["hardware"]}
    path, settings = work / "study.json", json.dumps(about, indent=1)
    if path.exists() and path.read_text() != settings:
        raise SystemExit(
            f"error: {work} holds a study of other settings, versions or hardware; remove it or choose another --work"
        )
    write_whole(path, lambda aside: aside.write_text(settings))


def write_tables(args: argparse.Namespace, text: str, *files: Path) -> None:
    """Write the tables beside --out, print them, and say where all results are."""
    path = args.out.with_suffix(".md")
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nresults: {', '.join(map(str, (args.out, path, *files)))}")
