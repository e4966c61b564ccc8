"""The files of an evaluation: the prediction for each video, and how often each class was taken for another."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset

from ..data.rows import as_cell
from ..data.segments import segments_in
from ..files import write_table, write_whole
from ..visualize import draw_confusion
from .metrics import load_metric

# The files of an evaluation.
FIGURES, PREDICTIONS, CONFUSION, PICTURE = "figures.json", "predictions.csv", "confusion.csv", "confusion.png"
REPORT = (FIGURES, PREDICTIONS, CONFUSION, PICTURE)
# So many classes are named for each video, the likeliest first.
NAMED_CLASSES = 5
# The end of the name of a figure's spread.
SPREAD = "_std"


def with_spread(figures: dict[str, float], digits: int) -> dict[str, str]:
    """Return figures by name as text, rounded to so many digits; "0.71 ± 0.05" is a mean and its spread."""
    spreads = {name + SPREAD: f" ± {figures[name + SPREAD]:.2g}" for name in figures if name + SPREAD in figures}
    return {
        name: f"{value:.{digits}g}{spreads.get(name + SPREAD, '')}"
        for name, value in figures.items()
        if name not in spreads
    }


def write_figures(folder: Path, figures: dict) -> None:
    """Write figures.json, whole or not at all."""
    write_whole(folder / FIGURES, lambda path: path.write_text(json.dumps(figures, indent=2) + "\n"))


def write_predictions(
    folder: Path, problem_type: str, names: Sequence[str], rows: Dataset, scores: torch.Tensor, labels: torch.Tensor
) -> None:
    """Write predictions.csv into a folder; if each video has one class, also confusion.csv and confusion.png.

    Each file is written whole or not at all. names: of the labels. rows: the videos, in the order of scores (videos,
    labels) and labels (videos,) or (videos, labels), both on the CPU. A row of zeros in scores is no answer. If rows are
    segments, their start and end follow the video.
    """
    header, lines = PREDICTED[problem_type](names, scores, labels)
    paths = [_path_of(row["video"], i) for i, row in enumerate(rows.select_columns("video"))]
    segments = {name: ["" if x is None else _number(x) for x in values] for name, values in segments_in(rows).items()}
    videos = zip(paths, *segments.values(), strict=True)
    lines = [["video", *segments, *header], *([*video, *line] for video, line in zip(videos, lines, strict=True))]
    write_table(folder / PREDICTIONS, lines)
    if problem_type == "single_label_classification":
        _write_confusion(folder, names, scores, labels)


def _path_of(video: str | bytes | dict, index: int) -> str:
    return as_cell(video)["path"] or f"row {index}"


def _class_predictions(names, scores, labels) -> tuple[list[str], Iterator[list]]:
    """Return the header and lines of predictions.csv, without the videos: the likeliest class, its score, the next ones."""
    ranked = scores.argsort(dim=-1, descending=True, stable=True)[:, :NAMED_CLASSES]  # (videos, 5 or fewer)
    header = ["label", "predicted", "score", *(f"top{i + 1}" for i in range(1, ranked.shape[1]))]

    def lines():
        for of_video, ids, label in zip(scores.tolist(), ranked.tolist(), labels.tolist(), strict=True):
            if any(of_video):
                first, *others = [names[i] for i in ids]
                yield [names[label], first, _number(of_video[ids[0]]), *others]
            else:
                yield [names[label], *[""] * (len(ids) + 1)]

    return header, lines()


def _multi_label_predictions(names, scores, labels) -> tuple[list[str], Iterator[list]]:
    """Return the same for several labels: true and predicted ones, joined by commas, and the score of every label."""

    def joined(values: list[float]) -> str:
        return ",".join(name for name, value in zip(names, values, strict=True) if value >= 0.5)

    lines = (
        [joined(wanted), joined(of_video), *map(_number, of_video)]
        for of_video, wanted in zip(scores.tolist(), labels.tolist(), strict=True)
    )
    return ["label", "predicted", *names], lines


def _number_predictions(names, scores, labels) -> tuple[list[str], Iterator[list]]:
    pairs = zip(labels.flatten().tolist(), scores.flatten().tolist(), strict=True)
    return ["label", "predicted"], ([_number(label), _number(predicted)] for label, predicted in pairs)


PREDICTED: dict[str, Callable] = {
    "single_label_classification": _class_predictions,
    "multi_label_classification": _multi_label_predictions,
    "regression": _number_predictions,
}


def _number(value: float) -> str:
    return f"{value:.6g}"


def _write_confusion(folder: Path, names: Sequence[str], scores: torch.Tensor, labels: torch.Tensor) -> None:
    metric = load_metric("confusion_matrix", keep_in_memory=True)
    counts = metric.compute(predictions=scores.double().numpy(), references=labels.numpy())["confusion_matrix"]
    columns = [*names, "unreadable"] if counts[:, -1].any() else list(names)
    counts = counts[:, : len(columns)]
    lines = [["label", *columns], *([name, *row] for name, row in zip(names, counts.tolist(), strict=True))]
    write_table(folder / CONFUSION, lines)
    write_whole(folder / PICTURE, lambda path: draw_confusion(counts, names, columns, path))
