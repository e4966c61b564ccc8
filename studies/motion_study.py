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

Arms are compared after equal numbers of steps and, where the name says "equal time", after as many steps as take the
time of EVEREST's pre-training and of fine-tuning at keep ratio 0.6 by motion. How long a step takes is measured before,
for all kinds in turn; time for reading clips and for evaluation does not count.

--size cpu is a tiny model on 8 frames of 64 x 64 pixels, for two cores and half an hour (convergence: as much
again); gpu is ViT-S on 16 frames of 112 x 112, which nobody has run yet; smoke only shows that everything runs. On a CPU
each run has a core of its own. What has finished lies in --work, and the same command goes on from there.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # measure.py and steps.py

import measure
import torch
import transformers
from motion_clips import SPLITS, write_clips
from motion_report import draw, summary, tables
from motion_runs import (
    EQUAL_TIME,
    LONGER,
    OVERSAMPLING,
    RATIOS,
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
    finetune,
    finetuning_kind,
    pretrain,
    pretraining_kind,
    time_steps,
)
from tqdm import tqdm

from everest_hf.data.workers import keep_freed_memory
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


QUESTIONS = {"initialisation": initialisation, "tokens": tokens, "frames": frames, "convergence": convergence}


# ------------------------------------------------------------------------------------------------------- processes

_bench: Bench


def start_process(size: Size, work: Path, device: torch.device, threads: int) -> None:
    """Prepare a process for the runs that it will be given."""
    global _bench
    torch.set_num_threads(threads)
    keep_freed_memory()
    # Each run would name the head that it starts from nothing.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _bench = Bench(size, work, device)


def do_draw(kind: str, split: str) -> None:
    path = clips_path(_bench.work, kind, split)
    if not path.exists():
        spec, count = getattr(_bench.size, kind), _bench.size.counts[split]
        write_whole(path, lambda aside: write_clips(spec, split, count, aside))


def do_time() -> Seconds:
    return time_steps(_bench)


def do_run(run: Pretraining | Finetuning) -> dict:
    """Do a run, or read what it left."""
    path = _bench.work / f"{run.name}.json"
    if not path.exists():
        record = (pretrain if isinstance(run, Pretraining) else finetune)(_bench, run)
        write_whole(path, lambda aside: aside.write_text(json.dumps(record)))
    return json.loads(path.read_text())


def do_all(executor, function, jobs: list[tuple], description: str) -> list:
    """Call function(*job) for each job in the processes, and return the results in order."""
    futures = [executor.submit(function, *job) for job in jobs]
    for future in tqdm(as_completed(futures), total=len(futures), desc=description, unit="run"):
        future.result()
    return [future.result() for future in futures]


def study(size: Size, seeds: int, questions: list[str], executor, work: Path) -> dict:
    """Draw the clips, time the steps, do all runs, and return what came out."""
    do_all(executor, do_draw, [(k, s) for k in ("clips", "long_clips") for s in SPLITS], "drawing")
    times = work / "seconds.json"
    if not times.exists():
        seconds = executor.submit(do_time).result()
        write_whole(times, lambda aside: aside.write_text(json.dumps(seconds, indent=2)))
    seconds = json.loads(times.read_text())
    plans = [plan(size, seconds, seed, questions) for seed in range(seeds)]
    runs = dict.fromkeys(run for arms in plans for run in arms.values())
    firsts = list(dict.fromkeys(run.pretraining for run in runs if run.pretraining))
    losses = do_all(executor, do_run, [(run,) for run in firsts], "pre-training")
    longest_first = sorted(runs, key=lambda run: -run.steps)  # so that no process ends long after the others
    records = do_all(executor, do_run, [(run,) for run in longest_first], "fine-tuning")
    found = dict(zip(longest_first, records, strict=True))
    arms = [
        {
            "question": question,
            "arm": arm,
            **summary([(p[question, arm], found[p[question, arm]]) for p in plans], seconds),
        }
        for question, arm in plans[0]
    ]
    first = [{"name": run.name, **record} for run, record in zip(firsts, losses, strict=True)]
    return {"seconds_a_step": seconds, "arms": arms, "pretraining": first}


# ------------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS)[:3])
    parser.add_argument("--seeds", type=measure.positive_int, default=3)
    parser.add_argument("--device", type=measure.device_of, default="cpu")
    parser.add_argument(
        "--work", type=Path, help="folder for clips, models and finished runs [runs/motion-study-SIZE]"
    )
    parser.add_argument("--out", type=Path, help="[benchmarks/results/motion-study-SIZE.json]")
    parser.add_argument("--plot", type=Path, help="[beside --out]")
    args = parser.parse_args()
    args.work = args.work or Path("runs") / f"motion-study-{args.size}"
    args.out = args.out or measure.RESULTS / f"motion-study-{args.size}.json"
    args.plot = args.plot or args.out.with_suffix(".png")
    return args


def claim(work: Path, size: Size, facts: dict) -> None:
    """Take a folder for a study of this size on this machine, or refuse one that holds another."""
    about = {"size": dataclasses.asdict(size), "versions": facts["versions"], "hardware": facts["hardware"]}
    path, settings = work / "study.json", json.dumps(about, indent=1)
    if path.exists() and path.read_text() != settings:
        raise SystemExit(
            f"error: {work} holds a study of other settings, versions or hardware; remove it or choose another --work"
        )
    write_whole(path, lambda aside: aside.write_text(settings))


def main() -> None:
    args = parse_arguments()
    size, cores = SIZES[args.size], os.cpu_count() or 1
    processes, threads = (1, cores) if args.device.type == "cuda" else (cores, 1)
    facts = measure.facts_of_run(args.device)
    facts["hardware"] |= {"processes": processes, "threads": threads}  # those of each
    claim(args.work, size, facts)
    start = partial(start_process, size, args.work, args.device, threads)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=start) as executor:
        found = study(size, args.seeds, args.questions, executor, args.work)
    settings = {"settings": measure.settings_of(args), "size": dataclasses.asdict(size)}
    measure.write_json(args.out, facts | settings | found)
    text = tables(found)
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(found, args.plot)
    print(f"{text}\n\nresults: {args.out}, {args.out.with_suffix('.md')}, {args.plot}")


if __name__ == "__main__":
    main()
