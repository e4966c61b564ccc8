"""The classes of a video over its time, as a heat map."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .figures import plt, save

# Rows and columns of the picture: so many classes, those of the highest scores, and moments of the video.
ROWS, COLUMNS = 20, 1200
# Steps between the times that are written under the picture, in seconds.
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
TICKS = 12


def draw_timeline(
    labels: Sequence[str], edges: np.ndarray, scores: np.ndarray, segments: Sequence[Any], path: str | Path
) -> None:
    """Draw a row a class, as dark as its score is high, and a line under each segment.

    labels, edges (n + 1,), scores (n, C), segments: as a `Timeline` of everest_hf.inference has them. Of more than ROWS
    classes those of the highest scores are drawn. Where windows are narrower than a column of the picture, a column has
    the highest score among them, so that nothing short is lost.
    """
    rows = _shown(scores)
    columns = _columns(edges, scores[:, rows])  # (columns, rows)
    figure, axis = plt.subplots(figsize=(13, 1.5 + 0.32 * len(rows)), layout="constrained")
    extent = (0.0, float(edges[-1]), len(rows) - 0.5, -0.5)
    image = axis.imshow(columns.T, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    places = {labels[label]: row for row, label in enumerate(rows)}
    for segment in segments:
        if segment.label in places:
            row = places[segment.label] + 0.42
            axis.plot([segment.start, segment.end], [row, row], color="C3", lw=2.5, solid_capstyle="butt")
    axis.set_yticks(range(len(rows)), [labels[label] for label in rows], fontsize=9)
    axis.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axis.grid(which="minor", axis="y", color="0.85", lw=0.8)
    axis.tick_params(which="minor", length=0)
    _mark_times(axis, float(edges[-1]))
    if len(rows) < len(labels):
        axis.set_title(f"the {len(rows)} of {len(labels)} classes with the highest scores", fontsize=9)
    figure.colorbar(image, label="score", pad=0.01)
    save(figure, path)


def _shown(scores: np.ndarray) -> list[int]:
    """Return the classes that are drawn, in their order."""
    peaks = scores.max(axis=0)
    return sorted(np.argsort(-peaks, kind="stable")[:ROWS].tolist())


def _columns(edges: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return scores (COLUMNS, C) of moments at even distances: the highest of the windows that a column touches."""
    moments = np.linspace(0, edges[-1], COLUMNS + 1)
    first = np.clip(np.searchsorted(edges, moments[:-1], side="right") - 1, 0, len(scores) - 1)
    last = np.clip(np.searchsorted(edges, moments[1:], side="left") - 1, first, len(scores) - 1)
    return np.stack([scores[a : b + 1].max(axis=0) for a, b in zip(first, last, strict=True)])


def _mark_times(axis, duration: float) -> None:
    """Write round times under the picture: seconds, or minutes and hours with colons."""
    step = next((step for step in STEPS if duration / step <= TICKS), None)
    if step is None:
        axis.xaxis.set_major_locator(MaxNLocator(TICKS))
    else:
        axis.set_xticks(np.arange(0, duration + step * 1e-6, step))
    if duration < 60:
        axis.set_xlabel("seconds")
        return
    axis.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _clock(seconds, duration >= 3600)))
    axis.set_xlabel("hours:minutes:seconds" if duration >= 3600 else "minutes:seconds")


def _clock(seconds: float, hours: bool) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
