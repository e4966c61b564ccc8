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

Every arm is fine-tuned on the same --draws draws of labels, each over --seeds seeds, which draw weights and batches. The
learning rate is chosen on validation clips among the same three for every arm and number of labels, with the first draw
and seed. "none, equal time" takes the rate of "none", fewer numbers of labels and as many draws as seeds, each with a seed
of its own, since each of its runs is as long as a pre-training.

How long a step takes is measured before, for all kinds in turn. --size cpu is the quickstart's model on the quickstart's
clips, for two cores and an hour and a half; cpu-clutter has the motion study's clips and model; gpu is ViT-S on clips of
112 x 112, which nobody has run yet; smoke only shows that everything runs. On a CPU each run has a core of its own. What
has finished lies in --work, and the same command goes on from there.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # measure.py and steps.py

import measure
import torch
import transformers
from few_labels_report import NONE, NONE_LONGER, TUBES_SHORTER, draw, finetuning_figures, probe_figures, tables
from few_labels_runs import (
    FINETUNING_KIND,
    SIZES,
    SPLITS,
    Bench,
    Finetuning,
    Probing,
    Seconds,
    Size,
    finetune,
    pretrain,
    pretraining_kind,
    probe,
    time_steps,
)
from motion_runs import TARGETS, Pretraining
from motion_study import claim, do_all

from everest_hf.data.workers import keep_freed_memory
from everest_hf.files import write_whole

Run = Pretraining | Finetuning | Probing
# The learning rate of fine-tuning by arm and number of labels.
Rates = dict[tuple[str, int], float]

# ------------------------------------------------------------------------------------------------------------- plan


def pretrainings(size: Size, seconds: Seconds, seed: int) -> dict[str, Pretraining | None]:
    """Return the pre-training of each arm."""
    arms = {name: Pretraining(key, seed, size.pretraining_steps) if key else None for key, name in TARGETS.items()}
    shorter = round(size.pretraining_steps * seconds[pretraining_kind("everest")] / seconds[pretraining_kind("tube")])
    return arms | {TUBES_SHORTER: Pretraining("tube", seed, shorter)}


def trials(size: Size, seconds: Seconds) -> dict[tuple[str, int, float], Finetuning]:
    """Return the runs of the first draw and seed by arm, number of labels and learning rate."""
    return {
        (arm, labels, lr): Finetuning(first, labels, 0, 0, size.finetuning_steps, lr)
        for arm, first in pretrainings(size, seconds, seed=0).items()
        for labels in size.labels
        for lr in size.learning_rates
    }


def finetunings(
    size: Size, seconds: Seconds, draws: int, seeds: int, rates: Rates
) -> dict[tuple[str, int], list[Finetuning]]:
    """Return the runs by arm and number of labels."""
    runs: dict[tuple[str, int], list[Finetuning]] = {}
    for drawn, seed in product(range(draws), range(seeds)):
        for arm, first in pretrainings(size, seconds, seed).items():
            for labels in size.labels:
                run = Finetuning(first, labels, drawn, seed, size.finetuning_steps, rates[arm, labels])
                runs.setdefault((arm, labels), []).append(run)
    before = size.pretraining_steps * seconds[pretraining_kind("everest")]
    longer = size.finetuning_steps + round(before / seconds[FINETUNING_KIND])
    for labels in size.labels_of_long_runs:
        runs[NONE_LONGER, labels] = [
            Finetuning(None, labels, i, i, longer, rates[NONE, labels]) for i in range(min(draws, seeds))
        ]
    return runs


def probings(size: Size, seconds: Seconds, draws: int, seeds: int) -> dict[str, list[Probing]]:
    """Return the probes of each arm's encoders."""
    runs: dict[str, list[Probing]] = {}
    for seed in range(seeds):
        for arm, first in pretrainings(size, seconds, seed).items():
            runs.setdefault(arm, []).append(Probing(first, seed, draws))
    return runs


# -------------------------------------------------------------------------------------------------------- processes

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


def do_draw(split: str) -> None:
    _bench.clips_of(split)


def do_time() -> Seconds:
    path = _bench.work / "seconds.json"
    if not path.exists():
        seconds = time_steps(_bench)
        write_whole(path, lambda aside: aside.write_text(json.dumps(seconds, indent=2)))
    return json.loads(path.read_text())


def do_run(run: Pretraining | Finetuning | Probing) -> dict:
    """Do a run, or read what it left."""
    path = _bench.work / f"{run.name}.json"
    if not path.exists():
        record = {Pretraining: pretrain, Finetuning: finetune, Probing: probe}[type(run)](_bench, run)
        write_whole(path, lambda aside: aside.write_text(json.dumps(record)))
    return json.loads(path.read_text())


def run_all(executor, runs: Iterable[Run], description: str) -> dict[Run, dict]:
    """Do runs, each once, the longest first so that no process ends long after the others; return their records."""
    longest_first = sorted(dict.fromkeys(runs), key=lambda run: -getattr(run, "steps", 0))
    records = do_all(executor, do_run, [(run,) for run in longest_first], description)
    return dict(zip(longest_first, records, strict=True))


def study(size: Size, draws: int, seeds: int, executor) -> dict:
    """Draw the clips, time the steps, do all runs, and return what came out."""
    do_all(executor, do_draw, [(split,) for split in SPLITS], "drawing")
    seconds = executor.submit(do_time).result()
    firsts = [first for seed in range(seeds) for first in pretrainings(size, seconds, seed).values() if first]
    losses = run_all(executor, firsts, "pre-training")
    tried = trials(size, seconds)
    found = run_all(executor, tried.values(), "learning rates")
    rates = {
        (arm, labels): max(size.learning_rates, key=lambda lr: found[tried[arm, labels, lr]]["val"])
        for arm, labels, _ in tried
    }
    runs, probes = finetunings(size, seconds, draws, seeds, rates), probings(size, seconds, draws, seeds)
    found = run_all(executor, chain.from_iterable(runs.values()), "fine-tuning")
    probed = run_all(executor, chain.from_iterable(probes.values()), "probes")
    return {
        "seconds_a_step": seconds,
        "pretraining": [{"name": run.name, **record} for run, record in losses.items()],
        "finetuning": [
            {"arm": arm, "labels": labels, **finetuning_figures(runs[arm, labels], found, seconds)}
            for arm, labels in runs
        ],
        "probes": [{"arm": arm, **probe_figures([probed[run] for run in probes[arm]])} for arm in probes],
    }


# ------------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--draws", type=measure.positive_int, default=5)
    parser.add_argument("--seeds", type=measure.positive_int, default=3)
    parser.add_argument("--device", type=measure.device_of, default="cpu")
    parser.add_argument("--work", type=Path, help="folder for clips, models and finished runs [runs/few-labels-SIZE]")
    parser.add_argument("--out", type=Path, help="[benchmarks/results/few-labels-SIZE.json]")
    parser.add_argument("--plot", type=Path, help="[beside --out]")
    args = parser.parse_args()
    args.work = args.work or Path("runs") / f"few-labels-{args.size}"
    args.out = args.out or measure.RESULTS / f"few-labels-{args.size}.json"
    args.plot = args.plot or args.out.with_suffix(".png")
    return args


def main() -> None:
    args = parse_arguments()
    size, cores = SIZES[args.size], os.cpu_count() or 1
    processes, threads = (1, cores) if args.device.type == "cuda" else (cores, 1)
    facts = measure.facts_of_run(args.device)
    facts["hardware"] |= {"processes": processes, "threads": threads}  # those of each
    args.work.mkdir(parents=True, exist_ok=True)
    claim(args.work, size, facts)
    start = partial(start_process, size, args.work, args.device, threads)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=start) as executor:
        found = study(size, args.draws, args.seeds, executor)
    settings = {"settings": measure.settings_of(args), "size": dataclasses.asdict(size)}
    measure.write_json(args.out, facts | settings | found)
    text = tables(found)
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(found, args.plot)
    print(f"{text}\n\nresults: {args.out}, {args.out.with_suffix('.md')}, {args.plot}")


if __name__ == "__main__":
    main()
