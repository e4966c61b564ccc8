"""What came out of the motion study: figures over the seeds, tables and picture."""

import statistics
from pathlib import Path

import measure
from matplotlib import pyplot as plt
from motion_clips import CONDITIONS
from motion_runs import (
    EQUAL_TIME,
    RATIOS,
    SELECTIONS,
    TARGETS,
    TRAINED_FOR_SWEEP,
    Finetuning,
    Seconds,
    finetuning_kind,
    pretraining_kind,
)

from everest_hf.files import write_whole


def summary(pairs: list[tuple[Finetuning, dict]], seconds: Seconds) -> dict:
    """Return the figures of an arm over the seeds: time, accuracies with mean and deviation, curves."""
    run, first = pairs[0][0], pairs[0][0].pretraining
    before = first.steps * seconds[pretraining_kind(first.targets)] if first else 0.0
    own = run.steps * seconds[finetuning_kind(run.selection, run.keep_ratio, run.oversampling)]
    figures = {
        "pretraining_steps": first.steps if first else 0,
        "steps": run.steps,
        "pretraining_seconds": before,
        "seconds": own,
        **_accuracies([record["test"] for _, record in pairs]),
        "curves": [record["curve"] for _, record in pairs],
    }
    if run.sweep:
        names = pairs[0][1]["inference"]
        figures["inference"] = {
            name: _accuracies([record["inference"][name] for _, record in pairs]) for name in names
        }
    return figures


def _accuracies(found: list[dict[str, float]]) -> dict:
    """Return mean and standard deviation over the seeds of top-1 in percent, over all clips and by condition."""
    values = {"all": [100 * statistics.fmean(each.values()) for each in found]}
    values |= {condition: [100 * each[condition] for each in found] for condition in CONDITIONS}
    return {"top1": {name: over_seeds(v) for name, v in values.items()}}


def over_seeds(values: list[float]) -> dict:
    return {"mean": statistics.fmean(values), "std": deviation(values), "seeds": values}


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def tables(found: dict) -> str:
    """Return the Markdown tables of a study."""
    parts = []
    for question in dict.fromkeys(arm["question"] for arm in found["arms"]):
        header = [question, "steps before + of it", "seconds before + of it", "top-1 %", "of each seed", *CONDITIONS]
        rows = [_row(arm) for arm in found["arms"] if arm["question"] == question]
        parts.append(measure.markdown_table(header, rows))
    swept = [arm for arm in found["arms"] if arm["question"] == "tokens" and "inference" in arm]
    if swept:
        names = list(swept[0]["inference"])
        rows = [[arm["arm"], *(percent(arm["inference"][name]["top1"]["all"]) for name in names)] for arm in swept]
        parts.append(measure.markdown_table(["fine-tuned at, and inference at", *names], rows))
    return "\n\n".join(parts)


def _row(arm: dict) -> list[str]:
    steps = f"{arm['pretraining_steps']} + {arm['steps']}"
    seconds = f"{arm['pretraining_seconds']:.0f} + {arm['seconds']:.0f}"
    of_each = ", ".join(f"{value:.0f}" for value in arm["top1"]["all"]["seeds"])
    by_condition = (f"{arm['top1'][name]['mean']:.1f}" for name in CONDITIONS)
    return [arm["arm"], steps, seconds, percent(arm["top1"]["all"]), of_each, *by_condition]


def percent(figures: dict) -> str:
    return f"{figures['mean']:.1f} ± {figures['std']:.1f}"


def draw(found: dict, path: Path) -> None:
    """Draw what the questions that were asked have found: medians over the seeds, and each seed as a dot."""
    arms = {(arm["question"], arm["arm"]): arm for arm in found["arms"]}
    asked = {question for question, _ in arms}
    panels = [panel for question, panel in PANELS if question in asked]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 4.75 * rows), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis, arms)
        axis.set_ylim(0, 100)
        axis.set_ylabel("top-1 %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    write_whole(path, lambda aside: figure.savefig(aside, dpi=110))
    plt.close(figure)


def _draw_tokens(axis, arms: dict) -> None:
    for suffix, line in (("", "-"), (", equal time", ":")):
        for color, selection in enumerate(SELECTIONS):
            names = [(r, f"{'motion' if r == 1 else selection} {r:g}") for r in RATIOS]
            # The time is that of `motion 0.6`.
            found = [(r, arms.get(("tokens", name if name == "motion 0.6" else name + suffix))) for r, name in names]
            points = [(ratio, arm["top1"]["all"]["seeds"]) for ratio, arm in found if arm]
            if not suffix or selection in dict(EQUAL_TIME):
                _line(axis, points, line, f"C{color}", selection + suffix)
    axis.set_title("tokens kept in fine-tuning and inference")
    axis.set_xlabel("keep ratio")


def _draw_inference(axis, arms: dict) -> None:
    for line, trained in zip(("-", ":"), TRAINED_FOR_SWEEP, strict=True):
        figures = arms["tokens", f"motion {trained:g}"]["inference"]
        for color, selection in enumerate(SELECTIONS):
            names = [(r, f"{'motion' if r == 1 else selection} {r:g}") for r in RATIOS]
            points = [(ratio, figures[name]["top1"]["all"]["seeds"]) for ratio, name in names]
            _line(axis, points, line, f"C{color}", f"{selection}, trained at {trained:g}")
    axis.set_title("tokens kept in inference alone")
    axis.set_xlabel("keep ratio in inference")


def _line(axis, points: list[tuple[float, list[float]]], line: str, color: str, label: str) -> None:
    """Draw a line through the medians of values at x, and each value as a dot."""
    x = [at for at, _ in points]
    axis.plot(x, [statistics.median(values) for _, values in points], line, color=color, label=label)
    dots = [(at, value) for at, values in points for value in values]
    axis.plot(*zip(*dots, strict=True), ".", color=color, markersize=5, alpha=0.6)


def _draw_initialisation(axis, arms: dict) -> None:
    for color, name in enumerate(TARGETS.values()):
        _draw_curve(axis, arms["initialisation", name], 1, f"C{color}", name)
    axis.set_title("after which pre-training (validation, keep ratio 0.6)")
    axis.set_xlabel("steps of fine-tuning")


def _draw_convergence(axis, arms: dict) -> None:
    longest = [(name, figures) for (question, name), figures in arms.items() if question == "convergence"]
    for color, (name, figures) in enumerate(longest):
        _draw_curve(axis, figures, figures["seconds"] / figures["steps"], f"C{color}", name)
    axis.set_title("long fine-tuning (validation)")
    axis.set_xlabel("seconds of fine-tuning")


def _draw_crops(axis, arms: dict) -> None:
    asked = [(name, figures) for (question, name), figures in arms.items() if question == "crops"]
    for color, (name, figures) in enumerate(asked):
        _draw_curve(axis, figures, 1, f"C{color}", name)
    axis.set_title("crops of a clip (validation, keep ratio 0.6)")
    axis.set_xlabel("steps of fine-tuning")


def _draw_curve(axis, figures: dict, unit: float, color: str, label: str) -> None:
    """Draw accuracy while a model learns, over the seeds; unit: what a step is along the axis."""
    points = zip(*figures["curves"], strict=True)  # by step, one (step, loss, accuracy) a seed
    values = [(seeds[0][0] * unit, [100 * accuracy for *_, accuracy in seeds]) for seeds in points]
    _line(axis, values, "-", color, label)


def _draw_conditions(axis, arms: dict) -> None:
    names = [*(f"motion {r:g}" for r in RATIOS), "random 0.3", "tube 0.3"]
    _draw_bars(axis, {name: arms["tokens", name] for name in names})
    axis.set_title("by what else moves")


def _draw_frames(axis, arms: dict) -> None:
    _draw_bars(axis, {arm: figures for (question, arm), figures in arms.items() if question == "frames"})
    axis.set_title("frames, where the action takes a third of the time")


def _draw_bars(axis, named: dict[str, dict]) -> None:
    width = 0.8 / len(named)
    for i, (name, arm) in enumerate(named.items()):
        places = [at + (i - (len(named) - 1) / 2) * width for at in range(len(CONDITIONS))]
        values = [arm["top1"][condition]["seeds"] for condition in CONDITIONS]
        axis.bar(places, [statistics.median(v) for v in values], width, label=name)
        dots = [(at, value) for at, seeds in zip(places, values, strict=True) for value in seeds]
        axis.plot(*zip(*dots, strict=True), "k.", markersize=4)
    axis.set_xticks(range(len(CONDITIONS)), [name.replace(", ", ",\n") for name in CONDITIONS], fontsize=8)


# In the order in which they are drawn, with the question that each answers.
PANELS = (
    ("tokens", _draw_tokens),
    ("tokens", _draw_inference),
    ("initialisation", _draw_initialisation),
    ("convergence", _draw_convergence),
    ("tokens", _draw_conditions),
    ("frames", _draw_frames),
    ("crops", _draw_crops),
)
