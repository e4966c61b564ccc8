"""Charts: how a run went, what a keep ratio costs, and which classes are taken for which."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .figures import plt, save

# The keys of a log that are drawn: losses, and the main scores of each kind of fine-tuning.
LOSSES: tuple[str, ...] = ("loss", "val_loss")
SCORES: tuple[str, ...] = ("val_top1", "val_top5", "val_map", "val_f1", "val_pearson", "val_knn_top1")
# Widths of a cell of a confusion picture and of the whole picture, in inches.
LARGEST_CONFUSION_CELL, LARGEST_CONFUSION = 0.45, 13.0
# The smallest letters that can be read, in points, of which an inch has 72.
SMALLEST_FONT, POINTS_AN_INCH = 5.0, 72


def draw_curves(logs: dict[str, list[dict]], path: str | Path) -> None:
    """Draw a panel for the losses of each run, then one for the scores of each run that was evaluated.

    logs: by the name of each run, the lines of its log.jsonl.
    """
    panels = [(f"{name}: loss", "loss", log, LOSSES) for name, log in logs.items()]
    panels += [
        (f"{name}: held-out videos", "score (1: perfect)", log, SCORES)
        for name, log in logs.items()
        if any(key in line for line in log for key in SCORES)
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, (title, ylabel, log, keys) in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in log if key in line]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=key, marker="o" if len(points) < 20 else None, markersize=3
                )
        axis.set(title=title, xlabel="step", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if keys == SCORES:
            axis.set_ylim(min(0, axis.get_ylim()[0]), 1.02)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(keys), fontsize=8, frameon=False)
    save(figure, path)


def draw_comparison(runs: Sequence[tuple[str, str | None, list[dict]]], path: str | Path) -> None:
    """Draw several runs, each in a colour of its own: the losses, a panel a task, then each score on held-out videos.

    runs: name, task and the lines of log.jsonl of each. Losses of different tasks cannot be compared.

    Raises:
        ValueError: no run has a loss or a score.
    """
    panels = {}
    for key in (*LOSSES, *SCORES):
        for task in dict.fromkeys(task for _, task, _ in runs) if key in LOSSES else (None,):
            lines = {
                place: points
                for place, (_, its_task, log) in enumerate(runs)
                if (key in SCORES or its_task == task) and (points := _points(log, key))
            }
            if lines:
                panels[key if task is None else f"{task}: {key}"] = lines
    if not panels:
        raise ValueError(f"{', '.join(name for name, _, _ in runs)}: no figures are logged yet")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.2 * rows + 0.3), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for place, points in lines.items():
            _plot(axis, points, color=f"C{place}")
        axis.set(title=title, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=f"C{place}", label=name) for place, (name, _, _) in enumerate(runs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(runs)), fontsize=8)
    save(figure, path)


def _points(log: list[dict], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of a figure; what was not finite is null in a log, and no point."""
    return [(line["step"], line[key]) for line in log if isinstance(line.get(key), (int, float))]


def _plot(axis, points: list[tuple[int, float]], **style) -> None:
    marker = "o" if len(points) < 20 else None
    axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, **style)


def draw_keep_ratios(results: Sequence[Any], recommended: Any, path: str | Path) -> None:
    """Draw accuracy, speed and operations over the keep ratio.

    results, recommended: `RatioResult` and `Recommendation` of everest_hf.evaluation.keep_ratio_results. The bars are
    standard errors of the differences from the most accurate ratio. The shaded band is the loss against it that is
    allowed.
    """
    ratios = [result.keep_ratio for result in results]
    top1 = [100 * result.top1 for result in results]
    figure, axes = plt.subplots(1, 3, figsize=(13.8, 3.8), layout="constrained")
    accuracy, speed, work = axes
    allowed = recommended.max_loss_points
    best = top1[ratios.index(recommended.reference_keep_ratio)]
    accuracy.axhspan(
        best - allowed, best, alpha=0.2, color="C2", lw=0, label=f"allowed loss ({allowed:g} of 100 videos)"
    )
    errors = [result.standard_error_points for result in results]
    accuracy.errorbar(ratios, top1, errors, marker="o", markersize=3, capsize=3, label="top-1")
    accuracy.set(title="accuracy", ylabel="top-1 (%)")
    speed.plot(ratios, [result.clips_per_second for result in results], marker="o", markersize=3)
    speed.set(title="speed of the model", ylabel="clips a second", ylim=0)
    work.plot(ratios, [result.gflops for result in results], marker="o", markersize=3)
    work.set(title="operations", ylabel="GFLOPs a clip", ylim=0)
    for axis in axes:
        axis.axvline(recommended.keep_ratio, color="C3", linestyle="--", lw=1, label="recommended")
        axis.set(xlabel="keep ratio")
        if len(results) == 1:
            axis.set(xlim=(0, 1))
        axis.grid(alpha=0.3)
    figure.legend(
        *accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    save(figure, path)


def draw_confusion(counts: np.ndarray, names: Sequence[str], columns: Sequence[str], path: str | Path) -> None:
    """Draw a confusion matrix: a row for each class, a column for each predicted class, coloured by shares of the row.

    counts: (classes, columns), of videos. names, columns: what rows and columns are called; there may be more columns.
    Cells show their counts, and rows and columns their names, where there is room.
    """
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(LARGEST_CONFUSION_CELL * len(names), 3.0), LARGEST_CONFUSION)  # inches
    cell = side * POINTS_AN_INCH / len(columns)
    font = min(9.0, cell / 1.2)  # a line of text is as high as 1.2
    has_names = font >= SMALLEST_FONT
    margin = max(map(len, columns)) * font * 0.6 / POINTS_AN_INCH if has_names else 0.0  # a letter is as wide as 0.6
    figure, axis = plt.subplots(figsize=(side + margin + 1.5, side + margin + 0.5), layout="constrained")
    # The square root makes small shares visible.
    image = axis.imshow(shares, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1))
    axis.set(xlabel="predicted", ylabel="class of the video")
    if has_names:
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=font)
        axis.set_yticks(range(len(names)), names, fontsize=font)
    letters = len(str(counts.max())) + 1
    if cell >= SMALLEST_FONT * letters:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.3 else "black"
            font = min(9.0, 1.5 * cell / letters)
            axis.text(column, row, str(count or ""), ha="center", va="center", color=colour, fontsize=font)
    figure.colorbar(image, label="share of the class's videos", shrink=0.6)
    save(figure, path)
