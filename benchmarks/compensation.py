"""Time of a step with token_selection="compensated" beside "motion": what it costs to find the camera's motion.

    python benchmarks/compensation.py
    python benchmarks/compensation.py --sizes base --dtypes bf16 --batch 64 --device cuda --compile

Both keep as many tokens, so that the rest of a step costs the same. The steps are made in turn, by one model on the same
clips, which pan as a camera does. Prints a Markdown table and writes every repetition to a JSON file. The defaults take
about four minutes on two idle cores.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from steps import SIZES, TASKS, Case, Step, num_warmup_steps
from tqdm import tqdm

SELECTIONS = ("motion", "compensated")


def call_with(step: Step, selection: str) -> Callable[[], None]:
    """Return a function that makes a step of which the tokens are selected so."""

    def call() -> None:
        step.model.config.token_selection = selection
        step()

    return call


def panned(clips: torch.Tensor) -> torch.Tensor:
    """Shift the frames of clips (B, T, C, H, W), each by a pixel down and two to the right of the one before."""
    return torch.stack([frame.roll((i, 2 * i), (-2, -1)) for i, frame in enumerate(clips.unbind(1))], dim=1)


def measure_case(args: argparse.Namespace, size: str, task: str, dtype: str) -> dict:
    """Time both selections in turn on one model."""
    case = Case("everest", task, size, dtype, args.batch, args.keep_ratio, str(args.device), "sdpa", args.compile)
    step = Step(case)
    step.inputs["pixel_values"] = panned(step.inputs["pixel_values"])
    calls = {selection: call_with(step, selection) for selection in SELECTIONS}
    seconds = measure.interleave(calls, args.repeats, args.device, num_warmup_steps(case))
    rounds = [b / a for a, b in zip(seconds["motion"], seconds["compensated"], strict=True)]
    figures = {name: measure.summary(values) for name, values in seconds.items()}
    return {
        "size": size,
        "task": task,
        "dtype": dtype,
        "batch": args.batch,
        **figures,
        "ratio": statistics.median(rounds),
    }


def run(args: argparse.Namespace) -> list[dict]:
    """Time all cases and show the progress."""
    cases = [(size, task, dtype) for size in args.sizes for task in args.tasks for dtype in args.dtypes]
    return [measure_case(args, *case) for case in tqdm(cases, desc="steps")]


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table: seconds of a step, and how much longer a compensated one takes."""
    rows = [
        [*(str(result[name]) for name in ("size", "task", "dtype", "batch"))]
        + [f"{result[selection]['seconds']:.3f}" for selection in SELECTIONS]
        + [f"{result['ratio']:.3f}"]
        for result in results
    ]
    header = ["size", "task", "dtype", "clips", *(f"{selection}, s" for selection in SELECTIONS)]
    return measure.markdown_table([*header, "compensated / motion"], rows)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", choices=measure.DTYPES, default=["fp32"], help="bf16: autocast")
    parser.add_argument("--batch", type=measure.positive_int, default=2, help="clips a step")
    parser.add_argument("--keep-ratio", type=measure.share, default=0.6, help="of fine-tuning and inference")
    parser.add_argument("--repeats", type=measure.positive_int, default=5)
    parser.add_argument("--device", type=measure.device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "compensation.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    measure.run_and_report(args, args.device, run, table)


if __name__ == "__main__":
    main()
