"""What came out of the study of few labels: figures over draws and seeds, tables and picture."""

import math
import statistics
from pathlib import Path

import measure
from few_labels_runs import FINETUNING_KIND, Finetuning, Seconds
from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter
from motion_report import deviation, over_seeds, percent
from motion_runs import TARGETS, pretraining_kind

from everest_hf.files import write_whole

EVEREST, TUBES, RANDOM, NONE = (TARGETS[key] for key in ("everest", "tube", "random", None))
TUBES_SHORTER, RANDOM_LONGER, NONE_LONGER = (f"{name}, equal time" for name in (TUBES, RANDOM, NONE))
PROBES = {"linear": "linear classifier", "knn": "nearest neighbours", "attentive": "attentive probe"}
STYLES = {
    EVEREST: ("C0", "-"),
    TUBES: ("C1", "-"),
    TUBES_SHORTER: ("C1", ":"),
    RANDOM: ("C2", "-"),
    RANDOM_LONGER: ("C2", ":"),
    NONE: ("0.4", "-"),
    NONE_LONGER: ("0.4", ":"),
}


def finetuning_figures(runs: list[Finetuning], found: dict[Finetuning, dict], seconds: Seconds) -> dict:
    """Return what an arm took and reached at a number of labels. top1: in percent, each run with its draw and seed."""
    run = runs[0]
    top1 = [100 * found[each]["test"] for each in runs]
    return {
        "pretraining_seconds": seconds_before(run, seconds),
        "seconds": run.steps * seconds[FINETUNING_KIND],
        "steps": run.steps,
        "lr": run.lr,
        "top1": {"mean": statistics.fmean(top1), "std": deviation(top1)},
        "runs": [
            {"draw": each.draw, "seed": each.seed, "top1": value} for each, value in zip(runs, top1, strict=True)
        ],
    }


def seconds_before(run: Finetuning, seconds: Seconds) -> float:
    first = run.pretraining
    return first.steps * seconds[pretraining_kind(first.targets)] if first else 0.0


def probe_figures(records: list[dict]) -> dict:
    """Return mean and deviation over the seeds, each a mean over the draws, in percent, by probe and number of labels."""
    return {
        kind: {labels: over_seeds([100 * record[labels][kind] for record in records]) for labels in records[0]}
        for kind in PROBES
    }


def gains(found: dict) -> list[dict]:
    """Return by how many points EVEREST's pre-training is ahead of each other arm, by number of labels.

    Runs are paired by draw and seed. The standard error is that of the mean over the pairs' differences.
    """
    by_arm: dict[str, dict[int, dict]] = {}
    for arm in found["finetuning"]:
        by_arm.setdefault(arm["arm"], {})[arm["labels"]] = {(r["draw"], r["seed"]): r["top1"] for r in arm["runs"]}
    own = by_arm[EVEREST]
    return [
        {"arm": arm, "labels": labels, **_gain([own[labels][pair] - value for pair, value in runs.items()])}
        for arm, by_labels in by_arm.items()
        if arm != EVEREST
        for labels, runs in by_labels.items()
    ]


def _gain(differences: list[float]) -> dict:
    error = deviation(differences) / math.sqrt(len(differences))
    return {"mean": statistics.fmean(differences), "error": error, "pairs": len(differences)}


# ---------------------------------------------------------------------------------------------------------- tables


def tables(found: dict) -> str:
    """Return the Markdown tables of a study."""
    return "\n\n".join([_finetuning_table(found), _gain_table(found), *(_probe_table(found, kind) for kind in PROBES)])


def _numbers(found: dict) -> list[int]:
    return sorted({arm["labels"] for arm in found["finetuning"]})


def _finetuning_table(found: dict) -> str:
    numbers = _numbers(found)
    arms: dict[str, dict[int, dict]] = {}
    for arm in found["finetuning"]:
        arms.setdefault(arm["arm"], {})[arm["labels"]] = arm
    rows = []
    for name, by_labels in arms.items():
        any_of_them = next(iter(by_labels.values()))
        seconds = f"{any_of_them['pretraining_seconds']:.0f} + {any_of_them['seconds']:.0f}"
        cells = [percent(by_labels[n]["top1"]) if n in by_labels else "" for n in numbers]
        rows.append([name, seconds, *cells])
    return measure.markdown_table(["fine-tuning, top-1 %", "seconds before + of it", *_header(numbers)], rows)


def _gain_table(found: dict) -> str:
    numbers, by_arm = _numbers(found), {}
    for gain in gains(found):
        by_arm.setdefault(gain["arm"], {})[gain["labels"]] = f"{gain['mean']:+.1f} ± {gain['error']:.1f}"
    rows = [[arm, *(by_labels.get(n, "") for n in numbers)] for arm, by_labels in by_arm.items()]
    return measure.markdown_table(["EVEREST's lead, points ± standard error", *_header(numbers)], rows)


def _probe_table(found: dict, kind: str) -> str:
    numbers = list(found["probes"][0][kind])
    rows = [[arm["arm"], *(percent(arm[kind][n]) for n in numbers)] for arm in found["probes"]]
    return measure.markdown_table([f"{PROBES[kind]} on frozen features, top-1 %", *_header(numbers)], rows)


def _header(numbers: list) -> list[str]:
    return [f"{n} labels a class" if int(n) > 1 else "1 label a class" for n in numbers]


# --------------------------------------------------------------------------------------------------------- picture


def draw(found: dict, path: Path) -> None:
    """Draw top-1 over the number of labels: fine-tuned, and with a linear classifier on frozen features."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for name, style in STYLES.items():
        points = {a["labels"]: a["top1"] for a in found["finetuning"] if a["arm"] == name}
        _line(left, points, name, style)
        for arm in found["probes"]:
            if arm["arm"] == name:
                _line(right, {int(n): figures for n, figures in arm["linear"].items()}, name, style)
    left.set_title("fine-tuned")
    right.set_title("frozen features, linear classifier")
    left.set_ylabel("top-1 %, test clips")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(_numbers(found))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel("labelled clips of each class")
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    write_whole(path, lambda aside: figure.savefig(aside, dpi=110))
    plt.close(figure)


def _line(axis, points: dict[int, dict], name: str, style: tuple[str, str]) -> None:
    color, line = style
    x = sorted(points)
    mean, std = ([points[n][key] for n in x] for key in ("mean", "std"))
    axis.plot(x, mean, line, color=color, marker="o", markersize=4, label=name)
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
