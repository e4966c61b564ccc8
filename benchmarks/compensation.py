"""Time of a step with token_selection="compensated" beside "motion": what it costs to find the camera's motion.

    python benchmarks/compensation.py
    python benchmarks/compensation.py --sizes base --dtypes bf16 --batch 64 --device cuda --compile

Both keep as many tokens, so that the rest of a step costs the same. The steps are made in turn, by one model on the same
clips, which pan as a camera does. Prints a Markdown table and writes every repetition to a JSON file. The defaults take
about four minutes on two idle cores.
"""

import argparse
from functools import partial

import measure
import settings
import torch

SELECTIONS = ("motion", "compensated")


def panned(clips: torch.Tensor) -> torch.Tensor:
    """Shift the frames of clips (B, T, C, H, W), each by a pixel down and two to the right of the one before."""
    return torch.stack([frame.roll((i, 2 * i), (-2, -1)) for i, frame in enumerate(clips.unbind(1))], dim=1)


def measure_case(args: argparse.Namespace, size: str, task: str, dtype: str) -> list[dict]:
    """Time both selections in turn on one model."""
    step = settings.make_step(args, size, task, dtype)
    step.inputs["pixel_values"] = panned(step.inputs["pixel_values"])
    return [settings.compare(args, step, {name: {"token_selection": name} for name in SELECTIONS})]


def main() -> None:
    args = settings.parser_of(__doc__, "compensation.json").parse_args()
    run = partial(settings.over_cases, measure_case=measure_case)
    measure.run_and_report(args, args.device, run, partial(settings.table, settings=SELECTIONS))


if __name__ == "__main__":
    main()
