"""What the benchmarks share that time a step with two settings of the configuration, by turns and by one model."""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from steps import SIZES, TASKS, Case, Step, num_warmup_steps
from tqdm import tqdm

# By name, the fields of the configuration that a setting has.
Settings = dict[str, dict[str, Any]]


def make_step(args: argparse.Namespace, size: str, task: str, dtype: str) -> Step:
    return Step(
        Case("everest", task, size, dtype, args.batch, args.keep_ratio, str(args.device), "sdpa", args.compile)
    )


def call_with(step: Step, fields: dict[str, Any]) -> Callable[[], None]:
    """Return a function that makes a step of a model whose configuration has these fields."""

    def call() -> None:
        for name, value in fields.items():
            setattr(step.model.config, name, value)
        step()

    return call


def compare(args: argparse.Namespace, step: Step, settings: Settings) -> dict[str, Any]:
    """Time two settings in turn. `ratio` is the median over the rounds of the second's seconds to the first's."""
    calls = {name: call_with(step, fields) for name, fields in settings.items()}
    seconds = measure.interleave(calls, args.repeats, args.device, num_warmup_steps(step.case))
    first, second = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    about = {**{name: getattr(step.case, name) for name in ("size", "task", "dtype")}, "clips": step.case.batch}
    return {**about, **{name: measure.summary(values) for name, values in seconds.items()}, "ratio": ratio}


def over_cases(args: argparse.Namespace, measure_case: Callable[..., list[dict]]) -> list[dict]:
    """Return the results of measure_case(args, size, task, dtype) of all cases, and show the progress."""
    cases = [(size, task, dtype) for size in args.sizes for task in args.tasks for dtype in args.dtypes]
    return [result for case in tqdm(cases, desc="steps") for result in measure_case(args, *case)]


def table(results: list[dict], settings: tuple[str, str], *also: str) -> str:
    """Return the results as a Markdown table: seconds of a step of each setting, and how much longer the second takes.

    also: further columns, by the names under which results have them.
    """
    names = ["size", "task", "dtype", "clips", *also]
    rows = [
        [*(str(result[name]) for name in names)]
        + [f"{result[name]['seconds']:.3f}" for name in settings]
        + [f"{result['ratio']:.3f}"]
        for result in results
    ]
    header = [*names, *(f"{name}, s" for name in settings), f"{settings[1]} / {settings[0]}"]
    return measure.markdown_table(header, rows)


def parser_of(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser of the options that these benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", choices=measure.DTYPES, default=["fp32"], help="bf16: autocast")
    parser.add_argument("--batch", type=measure.positive_int, default=2, help="clips a step")
    parser.add_argument("--keep-ratio", type=measure.share, default=0.6, help="of fine-tuning and inference")
    parser.add_argument("--repeats", type=measure.positive_int, default=5)
    parser.add_argument("--device", type=measure.device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / out)
    return parser
