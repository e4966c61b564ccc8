"""Does pre-training pay where labels are few? Accuracy over the number of labelled clips of each class.

    python studies/few_labels.py --plot docs/few-labels.png
    python studies/few_labels.py --size cpu-clutter
    python studies/few_labels.py --size gpu --device cuda

A model is pre-trained on clips without labels, then fine-tuned, or its frozen features are probed, on 1 to 64 labelled
clips of each class. Arms:

none                            fine-tuning from random weights
none, equal time                the same for longer, by the time of EVEREST's pre-training
EVEREST                         pre-training that sees and predicts informative tokens
VideoMAE's tubes                pre-training that sees a tenth of all tokens and predicts all others
VideoMAE's tubes, equal time    the same in the time of EVEREST's
random tokens                   pre-training that sees and predicts as many tokens as EVEREST's, chosen at random
random tokens, equal time       the same in the time of EVEREST's, whose steps take longer

Every arm is fine-tuned on the same --draws draws of labels, each from --seeds seeds, which draw weights and batches.
Learning rates are chosen on validation clips, among as many for every arm: that of pre-training with 8 labels a class, that
of fine-tuning for each number of labels, both with the first draw and seed. "none, equal time" and "random tokens, equal
time" are fine-tuned on 8 labels a class only, at the rates of "none" and "random tokens". Of the former there are as many
draws as seeds, each with a seed of its own: each of its runs is as long as a pre-training.

How long a step takes is measured before, for all kinds in turn. --size cpu is the quickstart's model on the quickstart's
clips, for two cores and two hours; cpu-clutter has the motion study's clips and model; gpu is ViT-S on clips of
112 x 112, which nobody has run yet; smoke only shows that everything runs. On a CPU each run has a core of its own. What
has finished lies in --work, and the same command goes on from there.
"""

import sys
from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # measure.py and steps.py

import measure
from few_labels_report import (
    NONE,
    NONE_LONGER,
    RANDOM,
    RANDOM_LONGER,
    TUBES_SHORTER,
    draw,
    finetuning_figures,
    probe_figures,
    tables,
)
from few_labels_runs import (
    FINETUNING_KIND,
    SIZES,
    SPLITS,
    Bench,
    Finetuning,
    Pretraining,
    Probing,
    Seconds,
    Size,
    time_steps,
)
from motion_runs import TARGETS, pretraining_kind
from processes import call, do_all, parse, parser_of, remembered, run_all, run_study, write_tables

Arms = dict[str, Pretraining | None]
# Labels of each class on which the learning rate of a pre-training is chosen.
LABELS_OF_CHOICE = 8

# ------------------------------------------------------------------------------------------------------------- plan


def first_trials(size: Size) -> dict[tuple[str, float], Pretraining]:
    """Return pre-training from the first seed by its targets and learning rate."""
    return {
        (targets, lr): Pretraining(targets, 0, size.pretraining_steps, lr)
        for targets in filter(None, TARGETS)
        for lr in size.pretraining_rates
    }


def pretrainings(size: Size, seconds: Seconds, seed: int, lrs: dict[str, float]) -> Arms:
    """Return the pre-training of each arm; lrs: by targets."""
    arms: Arms = {
        name: Pretraining(targets, seed, size.pretraining_steps, lrs[targets]) if targets else None
        for targets, name in TARGETS.items()
    }
    return arms | {TUBES_SHORTER: in_equal_time("tube", size, seconds, seed, lrs)}


def in_equal_time(targets: str, size: Size, seconds: Seconds, seed: int, lrs: dict[str, float]) -> Pretraining:
    """Return pre-training that takes the time of EVEREST's."""
    factor = seconds[pretraining_kind("everest")] / seconds[pretraining_kind(targets)]
    return Pretraining(targets, seed, round(size.pretraining_steps * factor), lrs[targets])


def trials(size: Size, firsts: dict, labels: Iterable[int]) -> dict[tuple, Finetuning]:
    """Return fine-tuning on the first draw from the first seed, by key, number of labels and learning rate."""
    return {
        (key, number, lr): Finetuning(first, number, 0, 0, size.finetuning_steps, lr)
        for key, first in firsts.items()
        for number in labels
        for lr in size.finetuning_rates
    }


def finetunings(
    size: Size,
    seconds: Seconds,
    draws: int,
    firsts: list[Arms],
    longer: list[Pretraining],
    rates: dict[tuple[str, int], float],
) -> dict[tuple[str, int], list[Finetuning]]:
    """Return the runs by arm and number of labels.

    firsts: the pre-trainings of each seed. longer: of each seed, on random tokens in the time of EVEREST's.
    """
    runs: dict[tuple[str, int], list[Finetuning]] = {}
    for drawn, (seed, arms) in product(range(draws), enumerate(firsts)):
        for arm, first in arms.items():
            for labels in size.labels:
                run = Finetuning(first, labels, drawn, seed, size.finetuning_steps, rates[arm, labels])
                runs.setdefault((arm, labels), []).append(run)
    before = size.pretraining_steps * seconds[pretraining_kind("everest")]
    steps = size.finetuning_steps + round(before / seconds[FINETUNING_KIND])
    for labels in size.labels_of_long_runs:
        runs[NONE_LONGER, labels] = [
            Finetuning(None, labels, i, i, steps, rates[NONE, labels]) for i in range(min(draws, len(firsts)))
        ]
        runs[RANDOM_LONGER, labels] = [
            Finetuning(first, labels, drawn, seed, size.finetuning_steps, rates[RANDOM, labels])
            for drawn, (seed, first) in product(range(draws), enumerate(longer))
        ]
    return runs


def probings(draws: int, firsts: list[Arms]) -> dict[str, list[Probing]]:
    """Return the probes of each arm's encoders; firsts: the pre-trainings of each seed."""
    return {arm: [Probing(arms[arm], seed, draws) for seed, arms in enumerate(firsts)] for arm in firsts[0]}


# ------------------------------------------------------------------------------------------------------------- runs


def draw_clips(bench: Bench, split: str) -> None:
    bench.clips_of(split)


def seconds_of_steps(bench: Bench) -> Seconds:
    return remembered(bench.work / "seconds.json", lambda: time_steps(bench))


def choose_pretraining_rates(size: Size, executor) -> dict[str, float]:
    """Return the learning rate of each pre-training after which fine-tuning is best on validation clips."""
    firsts = first_trials(size)
    run_all(executor, firsts.values(), "rates of pre-training")
    number = min(LABELS_OF_CHOICE, max(size.labels))
    tried = trials(size, firsts, [number])
    found = run_all(executor, tried.values(), "rates of pre-training, fine-tuned")

    def reached(targets: str, lr: float) -> float:
        return max(found[tried[(targets, lr), number, rate]]["val"] for rate in size.finetuning_rates)

    return {
        targets: max(size.pretraining_rates, key=lambda lr: reached(targets, lr)) for targets in filter(None, TARGETS)
    }


def choose_finetuning_rates(size: Size, firsts: Arms, executor) -> dict[tuple[str, int], float]:
    """Return the learning rate that is best on validation clips by arm and number of labels."""
    tried = trials(size, firsts, size.labels)
    found = run_all(executor, tried.values(), "rates of fine-tuning")
    return {
        (arm, number): max(size.finetuning_rates, key=lambda lr: found[tried[arm, number, lr]]["val"])
        for arm in firsts
        for number in size.labels
    }


def study(size: Size, draws: int, seeds: int, executor) -> dict:
    """Draw the clips, time the steps, do all runs, and return what came out."""
    do_all(executor, call, [(draw_clips, split) for split in SPLITS], "drawing")
    seconds = executor.submit(call, seconds_of_steps).result()
    lrs = choose_pretraining_rates(size, executor)
    firsts = [pretrainings(size, seconds, seed, lrs) for seed in range(seeds)]
    longer = [in_equal_time("random", size, seconds, seed, lrs) for seed in range(seeds)]
    runs_before = [run for arms in firsts for run in arms.values() if run]
    losses = run_all(executor, runs_before + longer, "pre-training")
    rates = choose_finetuning_rates(size, firsts[0], executor)
    runs, probes = finetunings(size, seconds, draws, firsts, longer, rates), probings(draws, firsts)
    found = run_all(executor, chain.from_iterable(runs.values()), "fine-tuning")
    probed = run_all(executor, chain.from_iterable(probes.values()), "probes")
    return {
        "seconds_a_step": seconds,
        "pretraining_rates": lrs,
        "pretraining": [{"name": run.name, **record} for run, record in losses.items()],
        "finetuning": [
            {"arm": arm, "labels": labels, **finetuning_figures(runs[arm, labels], found, seconds)}
            for arm, labels in runs
        ],
        "probes": [{"arm": arm, **probe_figures([probed[run] for run in probes[arm]])} for arm in probes],
    }


# ------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = parser_of(__doc__, SIZES)
    parser.add_argument("--draws", type=measure.positive_int, default=5)
    parser.add_argument("--plot", type=Path, help="[beside --out]")
    args = parse(parser, "few-labels")
    plot, size = args.plot or args.out.with_suffix(".png"), SIZES[args.size]
    found = run_study(args, size, Bench, lambda executor: study(size, args.draws, args.seeds, executor))
    draw(found, plot)
    write_tables(args, tables(found), plot)


if __name__ == "__main__":
    main()
