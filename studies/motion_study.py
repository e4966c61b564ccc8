"""Does it pay to drop redundant tokens? Learning curves on clips that differ by motion alone (motion_clips.py).

    python studies/motion_study.py
    python studies/motion_study.py --questions initialisation tokens frames convergence --plot docs/motion-study.png
    python studies/motion_study.py --size gpu --device cuda

The --questions, each over --seeds seeds, which draw weights and batches:

initialisation  fine-tuning at keep ratio 0.6 after EVEREST's pre-training, VideoMAE's (tube mask over 0.9 of the
                tokens, all of those predicted), one on tokens chosen at random, and after none.
tokens          fine-tuning and inference at keep ratios 1, 0.6, 0.3 and 0.1, with the tokens chosen by motion, at random
                or as tubes. Also inference alone at these ratios of the models trained at 1 and 0.6.
frames          clips three times as long, of which the action takes a third: evenly spaced frames, beside frame
                selection among 1.5 and 3 times as many candidates.
convergence     (not by default) fine-tuning for four times as many steps: at keep ratios 1, 0.6 and 0.3 by motion, at
                0.3 at random, and at 0.6 by motion after each of the pre-trainings and after none.
crops           (not by default) fine-tuning on random crops: one, two or four of each clip in a step (`num_sample`).
                Also one, for as many steps as can be read in the time of two and of four, which are read faster.

Arms are compared after equal numbers of steps and, where the name says "equal time", after as many steps as take the
time of EVEREST's pre-training and of fine-tuning at keep ratio 0.6 by motion. How long a step takes is measured before,
for all kinds in turn; time for reading clips and for evaluation does not count.

--size cpu is a tiny model on 8 frames of 64 x 64 pixels, for two cores and half an hour (convergence: as much
again); gpu is ViT-S on 16 frames of 112 x 112, which nobody has run yet; smoke only shows that everything runs. On a CPU
each run has a core of its own. What has finished lies in --work, and the same command goes on from there.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # measure.py and steps.py

from motion_clips import SPLITS, Split, write_clips
from motion_report import draw, summary, tables
from motion_runs import (
    EQUAL_TIME,
    LONGER,
    NUM_SAMPLES,
    OVERSAMPLING,
    RATIOS,
    READ_FASTER,
    SELECTIONS,
    SIZES,
    TARGETS,
    TRAINED_FOR_SWEEP,
    Bench,
    Finetuning,
    Pretraining,
    Seconds,
    Size,
    clips_path,
    finetuning_kind,
    pretraining_kind,
    time_steps,
)
from processes import call, do_all, parse, parser_of, remembered, run_all, run_study, write_tables

from everest_hf.files import write_whole

# ------------------------------------------------------------------------------------------------------------- plan


Arms = dict[str, Finetuning]


def plan(size: Size, seconds: Seconds, seed: int, questions: Iterable[str]) -> dict[tuple[str, str], Finetuning]:
    """Return the runs of a seed by question and arm. The same run may answer several questions."""
    return {(name, arm): run for name in questions for arm, run in QUESTIONS[name](size, seconds, seed).items()}


def initialisation(size: Size, seconds: Seconds, seed: int) -> Arms:
    """Return fine-tuning after each pre-training and after none, also where they may take equal time."""
    first = _pretrainings(size, seed)
    steps, arms = size.finetuning_steps, {}
    for targets, name in TARGETS.items():
        sweep = targets == "everest"  # the same run as `motion 0.6` of the question of tokens
        arms[name] = Finetuning(first.get(targets), seed, steps, sweep=sweep)
    before = size.pretraining_steps * seconds[pretraining_kind("everest")]
    fewer = Pretraining("tube", seed, round(before / seconds[pretraining_kind("tube")]))
    arms[f"{TARGETS['tube']}, equal time"] = Finetuning(fewer, seed, steps)
    more = steps + round(before / seconds[finetuning_kind("motion", 0.6, 1.0)])
    arms[f"{TARGETS[None]}, equal time"] = Finetuning(None, seed, more)
    return arms


def _pretrainings(size: Size, seed: int) -> dict[str, Pretraining]:
    return {targets: Pretraining(targets, seed, size.pretraining_steps) for targets in TARGETS if targets}


def _after_pretraining(size: Size, seed: int) -> Callable[..., Finetuning]:
    return partial(Finetuning, _pretrainings(size, seed)["everest"], seed)


def tokens(size: Size, seconds: Seconds, seed: int) -> Arms:
    """Return fine-tuning at all ratios and selections, some of it in equal time too."""
    after, arms = _after_pretraining(size, seed), {}
    for selection in SELECTIONS:
        for ratio in RATIOS if selection == "motion" else RATIOS[1:]:
            sweep = selection == "motion" and ratio in TRAINED_FOR_SWEEP
            arms[f"{selection} {ratio:g}"] = after(size.finetuning_steps, selection, ratio, sweep=sweep)
    for selection, ratio in EQUAL_TIME:
        time = size.finetuning_steps * seconds[finetuning_kind("motion", 0.6, 1.0)]
        steps = round(time / seconds[finetuning_kind(selection, ratio, 1.0)])
        arms[f"{selection} {ratio:g}, equal time"] = after(steps, selection, ratio)
    return arms


def frames(size: Size, seconds: Seconds, seed: int) -> Arms:
    """Return fine-tuning on the long clips, with frame selection and without."""
    after, arms = _after_pretraining(size, seed), {}
    for factor in OVERSAMPLING:
        name = f"selected among {factor:g} times as many" if factor > 1 else "evenly spaced"
        arms[name] = after(size.finetuning_steps, clips="long_clips", oversampling=factor)
    return arms


def convergence(size: Size, seconds: Seconds, seed: int) -> Arms:
    """Return long fine-tuning."""
    after, steps = _after_pretraining(size, seed), LONGER * size.finetuning_steps
    arms = {f"motion {ratio:g}": after(steps, keep_ratio=ratio) for ratio in RATIOS[:-1]}
    arms["random 0.3"] = after(steps, "random", 0.3)
    for targets, name in TARGETS.items():
        if targets != "everest":  # after which all of the above are
            first = _pretrainings(size, seed).get(targets)
            arms[f"motion 0.6, pre-training: {name}"] = Finetuning(first, seed, steps)
    return arms


def crops(size: Size, seconds: Seconds, seed: int) -> Arms:
    """Return fine-tuning on several crops of each clip."""
    after, arms = _after_pretraining(size, seed), {}
    for number in NUM_SAMPLES:
        arms[_crops_of(number)] = after(size.finetuning_steps, num_sample=number)
    for number, factor in READ_FASTER.items():
        steps = round(size.finetuning_steps / factor)
        arms[f"{_crops_of(1)}, reading time of {number}"] = after(steps, num_sample=1)
    return arms


def _crops_of(number: int) -> str:
    return f"{number} crop{'s' if number > 1 else ''} of a clip"


QUESTIONS = {
    "initialisation": initialisation,
    "tokens": tokens,
    "frames": frames,
    "convergence": convergence,
    "crops": crops,
}


# ------------------------------------------------------------------------------------------------------------- runs


def draw_clips(bench: Bench, kind: str, split: str) -> None:
    path = clips_path(bench.work, kind, split)
    if not path.exists():
        spec, count = getattr(bench.size, kind), bench.size.counts[split]
        write_whole(path, lambda aside: write_clips(Split(spec, split).draw, count, aside))


def seconds_of_steps(bench: Bench) -> Seconds:
    return remembered(bench.work / "seconds.json", lambda: time_steps(bench))


def study(size: Size, seeds: int, questions: list[str], executor) -> dict:
    """Draw the clips, time the steps, do all runs, and return what came out."""
    do_all(executor, call, [(draw_clips, k, s) for k in ("clips", "long_clips") for s in SPLITS], "drawing")
    seconds = executor.submit(call, seconds_of_steps).result()
    plans = [plan(size, seconds, seed, questions) for seed in range(seeds)]
    runs = dict.fromkeys(run for arms in plans for run in arms.values())
    losses = run_all(executor, [run.pretraining for run in runs if run.pretraining], "pre-training")
    found = run_all(executor, runs, "fine-tuning")
    arms = [
        {
            "question": question,
            "arm": arm,
            **summary([(p[question, arm], found[p[question, arm]]) for p in plans], seconds),
        }
        for question, arm in plans[0]
    ]
    first = [{"name": run.name, **record} for run, record in losses.items()]
    return {"seconds_a_step": seconds, "arms": arms, "pretraining": first}


# ------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = parser_of(__doc__, SIZES)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS)[:3])
    parser.add_argument("--plot", type=Path, help="[beside --out]")
    args = parse(parser, "motion-study")
    plot, size = args.plot or args.out.with_suffix(".png"), SIZES[args.size]
    found = run_study(args, size, Bench, lambda executor: study(size, args.seeds, args.questions, executor))
    draw(found, plot)
    write_tables(args, tables(found), plot)


if __name__ == "__main__":
    main()
