"""Time of a step with token_budget="batch" beside "clip": what it costs to pack tokens, and what unequal clips cost.

    python benchmarks/packing.py
    python benchmarks/packing.py --sizes base --dtypes bf16 --batch 64 --device cuda --compile

content  "equal" clips are all the same one. Each then keeps as many tokens with either budget, and what differs is the
         packing alone. "unequal" ones move more and more from the first, which stands still, to the last. A batch keeps
         as many tokens as before, but a clip of twice the tokens costs four times the attention.

The steps are made in turn, by one model on the same clips. Inference goes by the threshold of these clips. Prints a
Markdown table and writes every repetition to a JSON file. The defaults take about seven minutes on two idle cores.
"""

import argparse
from functools import partial

import measure
import settings
import torch
from steps import Step

from everest_hf.evaluation.threshold import find_threshold, score_tokens

BUDGETS = ("clip", "batch")


def alike(clips: torch.Tensor) -> torch.Tensor:
    return clips[:1].repeat(len(clips), 1, 1, 1, 1)


def more_and_more(clips: torch.Tensor) -> torch.Tensor:
    """Let the first of clips (B, T, C, H, W) stand still, and each next one change more."""
    still, factors = clips[:, :1], torch.linspace(0, 1, len(clips), device=clips.device)
    return still + factors.view(-1, 1, 1, 1, 1) * (clips - still)


CONTENTS = {"equal": alike, "unequal": more_and_more}


def measure_case(args: argparse.Namespace, size: str, task: str, dtype: str) -> list[dict]:
    """Time both budgets in turn on one model, for each content."""
    step = settings.make_step(args, size, task, dtype)
    clips, results = step.inputs["pixel_values"], []
    for content, change in CONTENTS.items():
        step.inputs["pixel_values"] = change(clips)
        fields = {name: {"token_budget": name, "keep_threshold": None} for name in BUDGETS}
        fields["batch"]["keep_threshold"] = threshold_of(step)
        results.append({"content": content, **settings.compare(args, step, fields)})
    return results


def threshold_of(step: Step) -> dict[str, float] | None:
    """Return the threshold for a step's clips, which only inference goes by."""
    if step.trains:
        return None
    return find_threshold(step.model.config, score_tokens(step.model, step.inputs["pixel_values"]))


def main() -> None:
    parser = settings.parser_of(__doc__, "packing.json")
    parser.set_defaults(batch=4, tasks=["finetuning", "inference"])  # pre-training shares nothing
    args = parser.parse_args()
    run = partial(settings.over_cases, measure_case=measure_case)

    def table(results: list[dict]) -> str:
        return settings.table(results, BUDGETS, "content")

    measure.run_and_report(args, args.device, run, table)


if __name__ == "__main__":
    main()
