"""Do tokens that follow the content pay? Two ideas, on the clips of the motion study (motion_clips.py).

    python studies/budget_study.py

budget      "clip" and "batch" are those of the configuration's token_budget. With "batch" each clip has at least LEAST
            and at most MOST of its tokens, and the threshold of evaluation is found on training clips.
scores      "plain" are those of token_selection="motion", "compensated" those of token_selection="compensated". Two
            arms tell what could be had at most: "true camera" shifts by where the camera really went, "true sprites"
            takes the tokens that moving sprites cover most.

Each arm is fine-tuned after the motion study's EVEREST pre-training, in equal steps, on two sets of clips: those of the
motion study, where four sprites move in each, and "varied" ones, where 1 to 8 do. Some follow a pre-training on varied
clips instead, by either budget. What an arm costs is the mean number of its tokens. What has finished lies in --work, and the same command goes on from there.
"""

import statistics
import sys
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # measure.py and steps.py

import measure
from budget_runs import Arm, TruthBench, prepare
from motion_clips import CONDITIONS
from motion_report import over_seeds, percent
from motion_runs import SIZES, Size, clips_path
from processes import call, do_all, parse, parser_of, run_all, run_study, write_tables

FEW = (64, 256)  # labelled clips with which pre-trainings are compared
FEWER = 0.2  # the ratio at which models are run that were fine-tuned at another
# Of the clips, each of two conditions, by how their names begin.
HALVES = {"still half": "still camera", "moving half": "moving camera"}


def plan(seed: int) -> list[Arm]:
    """Return the arms of a seed."""
    arms = []
    for clips in ("clips", "varied"):
        arm = partial(Arm, clips, seed)
        arms += [arm(0.6), arm(0.3, also=(FEWER,)), arm(0.225), arm(FEWER)]
        arms += [arm(0.3, "batch", also=(FEWER,)), arm(0.225, "batch")]
        for scores in ("compensated", "true camera", "true sprites"):
            arms += [arm(0.3, budget, scores, (FEWER,)) for budget in ("clip", "batch")]
        arms += [arm(0.6, scores="compensated"), arm(FEWER, scores="compensated")]
    for pretrained in ("clip", "batch"):
        arms += [Arm("varied", seed, 0.3, pretrained=pretrained, labelled=labelled) for labelled in FEW]
        arms += [Arm("varied", seed, 0.3, budget, pretrained=pretrained) for budget in ("clip", "batch")]
    return arms


def draw_clips(bench: TruthBench, kind: str, split: str) -> None:
    if not clips_path(bench.work, kind, split).exists():
        prepare(bench, kind, split)


def study(size: Size, seeds: int, executor) -> dict:
    """Draw the clips, do all runs, and return what came out, by arm."""
    do_all(executor, call, [(draw_clips, k, s) for k in ("clips", "varied") for s in ("train", "test")], "drawing")
    plans = [plan(seed) for seed in range(seeds)]
    run_all(executor, [arm.start(size) for arms in plans for arm in arms], "pre-training")
    found = run_all(executor, chain.from_iterable(plans), "fine-tuning")
    arms = [_summary(arms, [found[arm] for arm in arms]) for arms in zip(*plans, strict=True)]
    return {"arms": arms}


def _summary(arms: Iterable[Arm], records: list[dict]) -> dict:
    """Return the figures of an arm over the seeds, by the ratio at which it was evaluated."""
    arm = next(iter(arms))
    figures = {}
    for ratio in records[0]:
        own = [record[ratio] for record in records]
        values = {"all": [100 * statistics.fmean(each["top1"].values()) for each in own]}
        values |= {half: [100 * _mean_of(each["top1"], begin) for each in own] for half, begin in HALVES.items()}
        values |= {condition: [100 * each["top1"][condition] for each in own] for condition in CONDITIONS}
        tokens = {name: statistics.fmean(each["tokens"][name] for each in own) for name in CONDITIONS}
        figures[ratio] = {"top1": {name: over_seeds(v) for name, v in values.items()}, "tokens": tokens}
    return {"clips": arm.clips, "arm": arm.title, "figures": figures}


def _mean_of(figures: dict[str, float], begin: str) -> float:
    """Return the mean of the figures of the conditions that begin so."""
    return statistics.fmean(value for name, value in figures.items() if name.startswith(begin))


def tables(found: list[dict]) -> str:
    """Return a Markdown table of each set of clips."""
    header = [
        "tokens in evaluation",
        "top-1 %",
        "of each seed",
        *HALVES,
        "mean tokens",
        *(f"tokens, {half}" for half in HALVES),
    ]
    parts = []
    for clips in dict.fromkeys(arm["clips"] for arm in found):
        rows = [
            _row(arm["arm"], ratio, figures)
            for arm in found
            if arm["clips"] == clips
            for ratio, figures in arm["figures"].items()
        ]
        parts.append(measure.markdown_table([f"{clips}: fine-tuned at", *header], rows))
    return "\n\n".join(parts)


def _row(arm: str, ratio: str, figures: dict) -> list[str]:
    top1, tokens = figures["top1"], figures["tokens"]
    seeds = ", ".join(f"{value:.1f}" for value in top1["all"]["seeds"])
    accuracies = (percent(top1[name]) for name in ("all", *HALVES))
    means = [statistics.fmean(tokens.values()), *(_mean_of(tokens, begin) for begin in HALVES.values())]
    mean, *halves = accuracies
    return [arm, ratio, mean, seeds, *halves, *(f"{value:.0f}" for value in means)]


def main() -> None:
    args = parse(parser_of(__doc__, ("cpu", "smoke")), "budget-study")
    size = SIZES[args.size]
    found = run_study(args, size, TruthBench, lambda executor: study(size, args.seeds, executor))
    write_tables(args, tables(found["arms"]))


if __name__ == "__main__":
    main()
