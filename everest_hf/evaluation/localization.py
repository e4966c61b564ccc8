"""How well segments of videos are found: mean average precision over temporal overlaps."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Value
from tqdm.auto import tqdm

from ..data import class_names_of
from ..data.rows import paths_of
from ..data.segments import segments_in
from ..inference import timeline
from ..inference.timelines import overlap
from ..modeling_everest import EverestForVideoClassification
from ..video.segments import SECONDS

# Intersections over union at which a found segment is right, as for THUMOS14.
OVERLAPS = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class FoundSegment:
    """A segment of a video, true or found, in seconds; a true one has no score."""

    video: str
    label: str
    start: float
    end: float
    score: float = 0.0


def localization_figures(true: Sequence[FoundSegment], found: Sequence[FoundSegment]) -> dict[str, float]:
    """Return the mean over classes of `average_precision` at each of OVERLAPS ("map_0.5"), and the mean of these ("map").

    Classes are those of the true segments; segments of others are not looked at.

    Raises:
        ValueError: there are no true segments.
    """
    labels = sorted({segment.label for segment in true})
    if not labels:
        raise ValueError("there are no segments to find")
    figures = {}
    for least in OVERLAPS:
        of_class = [
            average_precision(
                [segment for segment in true if segment.label == label],
                [segment for segment in found if segment.label == label],
                least,
            )
            for label in labels
        ]
        figures[f"map_{least:g}"] = float(np.mean(of_class))
    return {**figures, "map": float(np.mean(list(figures.values())))}


def average_precision(true: Sequence[FoundSegment], found: Sequence[FoundSegment], least: float) -> float:
    """Return the average precision of found segments of a class: the area under its precision over its recall.

    By falling score (of equal ones in the order given), each found segment takes, of the true ones in its video that none
    before it has taken, the one of largest intersection over union; it is right if that is at least `least`. After k of
    them, of which r_k are right, the precision is r_k / k and the recall r_k / n, of n true ones. Where recall rises, the
    area counts the highest precision at this recall or a higher one: Everingham et al., The Pascal Visual Object Classes
    Challenge: A Retrospective (2015), as ActivityNet (Heilbron et al. 2015) has it for segments.

    true: one or more.
    """
    if not found:
        return 0.0
    right = np.cumsum(_right(true, found, least))
    precision = right / np.arange(1, len(right) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    gained = np.diff(right, prepend=0) / len(true)  # of recall
    return float((gained * highest).sum())


def _right(true: Sequence[FoundSegment], found: Sequence[FoundSegment], least: float) -> list[bool]:
    """Say of each found segment, by falling score, whether it is right."""
    free: dict[str, list[FoundSegment]] = defaultdict(list)
    for segment in true:
        free[segment.video].append(segment)
    answers = []
    for segment in sorted(found, key=lambda segment: -segment.score):
        there = free[segment.video]
        best = max(there, key=lambda other: overlap(segment.start, segment.end, other.start, other.end), default=None)
        if best is None or overlap(segment.start, segment.end, best.start, best.end) < least:
            answers.append(False)
        else:
            there.remove(best)
            answers.append(True)
    return answers


def evaluate_timelines(
    model: EverestForVideoClassification, processor, rows: Dataset, **options
) -> tuple[dict[str, float], list[FoundSegment]]:
    """Return `localization_figures` of a classifier's timelines of videos, and the segments of these.

    rows: segments with their classes, which are the model's, as `load_videos` returns them with its class_names; the
    videos are paths. A class that is in no row is not looked at. options: those of `everest_hf.inference.timeline`.

    Raises:
        ValueError: rows are no segments in seconds with labels, or as `timeline`. VideoError: a video cannot be read.
    """
    true = true_segments(rows)
    found = [
        FoundSegment(video, segment.label, segment.start, segment.end, segment.score)
        for video in tqdm(dict.fromkeys(segment.video for segment in true), "timelines", unit="video", leave=False)
        for segment in timeline(model, processor, video, **options).segments
    ]
    return localization_figures(true, found), found


def true_segments(rows: Dataset) -> list[FoundSegment]:
    """Return the segments of rows of `load_videos`.

    Raises:
        ValueError: a row is no segment in seconds of a file.
    """
    if rows.features["video"] != Value("string"):
        raise ValueError("the videos are not files of their own; a timeline reads whole ones by their paths")
    bounds, names = segments_in(rows), class_names_of(rows)
    if set(bounds) != set(SECONDS) or any(value is None for values in bounds.values() for value in values):
        raise ValueError("each row must be a segment in seconds: columns video, label, start, end")
    labels = [names[label] if names else str(label) for label in rows["label"]]
    columns = (paths_of(rows), labels, *(bounds[name] for name in SECONDS))
    return [FoundSegment(*values) for values in zip(*columns, strict=True)]
