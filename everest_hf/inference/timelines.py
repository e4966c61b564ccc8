"""A classifier's answers over the time of a long video: scores of overlapping windows, and segments made of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..configuration_everest import problem_type_of
from ..data import source_of
from ..files import write_table, write_whole
from ..modeling_everest import EverestForVideoClassification
from ..video import VideoError
from .classify import scores_of
from .sources import WEB
from .video_windows import VideoWindows, WindowOutput, windows

# A segment goes where a better one overlaps it by more than this (intersection over union).
OVERLAP = 0.5
# A timeline shows its progress after so many seconds.
PROGRESS_AFTER = 5
# Fields of a window in the .json file, rounded to so many digits.
SECONDS_DIGITS, SCORE_DIGITS = 3, 4


@dataclass(frozen=True)
class TimelineSegment:
    """A time in which a video shows a class: start and end in seconds; score: the mean of the class over its windows."""

    label: str
    start: float
    end: float
    score: float


@dataclass(frozen=True)
class Timeline:
    """The classes of a video over its time.

    labels: the C classes. edges: float64 (n + 1,): window i stands for the seconds from edges[i] to edges[i + 1], those
    around its middle up to its neighbours; the first begins at 0 and the last ends with the video. scores: float32
    (n, C), probabilities, smoothed where that was asked for. segments: by start.
    """

    video: str
    labels: list[str]
    edges: np.ndarray
    scores: np.ndarray
    segments: list[TimelineSegment]

    @property
    def duration(self) -> float:
        """Seconds of the video."""
        return float(self.edges[-1])


def timeline(
    model: EverestForVideoClassification,
    processor,
    video: str,
    *,
    threshold: float = 0.5,
    smooth: float = 0.0,
    **reading,
) -> Timeline:
    """Return the classes of a long video over its time, of the model's windows on it.

    threshold, smooth: see `segments_of`; smooth is the seconds over which the scores of windows are averaged, around
    each. reading: the other arguments of `windows`, stride above all.

    Raises:
        ValueError: the model has no classes, an argument is out of range, or as `windows`.
        VideoError: the video cannot be read, or tells no rate.
    """
    check_timeline(model, threshold, smooth)
    found = windows(model, processor, video, **reading)
    if found.centers is None:
        raise VideoError(video, "tells no frame rate, so that its windows have no times")
    logits = torch.stack([window.logits for window in _with_progress(found) if window.logits is not None])  # (n, C)
    edges = edges_of(found.centers, found.num_frames / found.fps)
    width = 2 * max(0, round((smooth * found.fps / found.stride - 1) / 2)) + 1  # windows; odd, so that it has a middle
    scores = smoothed(scores_of(logits, model.config).numpy(), width)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    across = problem_type_of(model.config) == "single_label_classification"
    return Timeline(video, labels, edges, scores, segments_of(scores, edges, labels, threshold, across_classes=across))


def _with_progress(found: VideoWindows) -> Iterator[WindowOutput]:
    return tqdm(found, "timeline", unit="window", leave=False, delay=PROGRESS_AFTER)


def check_timeline(model: EverestForVideoClassification, threshold: float, smooth: float) -> None:
    """Raise a ValueError unless a timeline can be made with these arguments of `timeline`."""
    if problem_type_of(model.config) == "regression":
        raise ValueError(f"{model.name_or_path}: predicts a number; a timeline needs a classifier")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold:g}; it must be above 0 and below 1")
    if not 0 <= smooth < float("inf"):
        raise ValueError(f"smooth is {smooth:g}; it must be 0 seconds or more")


def edges_of(centers: list[float], duration: float) -> np.ndarray:
    """Return where the times of windows meet, (n + 1,): between their middles, from 0 to the end of the video."""
    middles = np.asarray(centers, dtype=np.float64)
    return np.concatenate([[0.0], (middles[1:] + middles[:-1]) / 2, [duration]])


def smoothed(scores: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of scores (n, C) over `width` (odd) windows around each, of those that there are at the ends."""
    half = width // 2
    total = np.concatenate([np.zeros((1, scores.shape[1])), scores.cumsum(axis=0, dtype=np.float64)])
    places = np.arange(len(scores))
    first, after = np.maximum(places - half, 0), np.minimum(places + half + 1, len(scores))
    return ((total[after] - total[first]) / (after - first)[:, None]).astype(np.float32)


def segments_of(
    scores: np.ndarray, edges: np.ndarray, labels: list[str], threshold: float, *, across_classes: bool
) -> list[TimelineSegment]:
    """Return the segments of scores (n, C) over the edges (n + 1,) of their windows, by start.

    Neighbouring windows in which a class has at least `threshold` are one segment of it. Non-maximum suppression then
    takes the segments by falling score and drops each that overlaps one that stays by more than OVERLAP (intersection
    over union): with across_classes, where a video shows one class at a time, one of whatever class. Segments of the
    same class never overlap.
    """
    found = [
        TimelineSegment(label, float(edges[start]), float(edges[end]), float(scores[start:end, i].mean()))
        for i, label in enumerate(labels)
        for start, end in _runs(scores[:, i] >= threshold)
    ]
    return sorted(_suppressed(found) if across_classes else found, key=lambda segment: (segment.start, segment.label))


def _runs(active: np.ndarray) -> list[tuple[int, int]]:
    """Return first place and place after the last of each run of True."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(int)))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def _suppressed(segments: list[TimelineSegment]) -> list[TimelineSegment]:
    kept: list[TimelineSegment] = []
    for segment in sorted(segments, key=lambda segment: -segment.score):
        if all(overlap(segment.start, segment.end, other.start, other.end) <= OVERLAP for other in kept):
            kept.append(segment)
    return kept


def overlap(start: float, end: float, other_start: float, other_end: float) -> float:
    """Return the intersection of two times over their union, 0 where they do not meet."""
    both = max(0.0, min(end, other_end) - max(start, other_start))
    return both / (end - start + other_end - other_start - both) if both else 0.0


# ---------------------------------------------------------------------- files


def write_json(path: Path, line: Timeline, top_k: int = 5) -> None:
    """Write what a timeline has: its segments, and of each window start, end and its top_k classes with their scores."""
    order = np.argsort(-line.scores, axis=1, kind="stable")[:, :top_k]
    table = {
        "video": line.video,
        "duration": round(line.duration, SECONDS_DIGITS),
        "segments": [_rounded(segment) for segment in line.segments],
        "windows": [
            {
                "start": round(float(line.edges[i]), SECONDS_DIGITS),
                "end": round(float(line.edges[i + 1]), SECONDS_DIGITS),
                "labels": [
                    {"label": line.labels[c], "score": round(float(line.scores[i, c]), SCORE_DIGITS)} for c in best
                ],
            }
            for i, best in enumerate(order)
        ],
    }
    write_whole(path, lambda aside: aside.write_text(json.dumps(table, ensure_ascii=False) + "\n", encoding="utf-8"))


def _rounded(segment: TimelineSegment) -> dict:
    values = asdict(segment)
    return {**values, **{name: round(values[name], SECONDS_DIGITS) for name in ("start", "end")}} | {
        "score": round(segment.score, SCORE_DIGITS)
    }


def write_csv(path: Path, line: Timeline, top_k: int = 5) -> None:
    """Write a row for each segment: label, start, end, score."""
    rows = [list(_rounded(segment).values()) for segment in line.segments]
    write_table(path, [["label", "start", "end", "score"], *rows])


def write_srt(path: Path, line: Timeline, top_k: int = 5) -> None:
    """Write each segment as a subtitle, "label 0.93"."""
    texts = [
        f"{i}\n{_clock(segment.start)} --> {_clock(segment.end)}\n{caption(segment)}\n"
        for i, segment in enumerate(line.segments, 1)
    ]
    write_whole(path, lambda aside: aside.write_text("\n".join(texts), encoding="utf-8"))


def caption(segment: TimelineSegment) -> str:
    """Return what a segment is called where people watch the video."""
    return f"{segment.label} {segment.score:.2f}"


def write_captioned(line: Timeline, out: Path, **opening) -> None:
    """Write the video of a timeline with the captions of its segments, while they last, and its own sound.

    opening: time_limit, of fetching, and max_pixels of `everest_hf.video.open_video`.

    Raises:
        VideoError, OSError: as `everest_hf.video.overlay.write_overlay`.
    """
    from ..video.overlay import write_overlay  # which needs what draws pictures

    limits = {name: opening[name] for name in ("max_pixels",) if name in opening}
    source = source_of(line.video, url_schemes=WEB, **{n: v for n, v in opening.items() if n == "time_limit"})

    def caption_at(seconds: float) -> str:
        return "\n".join(caption(segment) for segment in line.segments if segment.start <= seconds < segment.end)

    def write(aside: Path) -> None:
        try:
            write_overlay(**source, path=aside, caption_at=caption_at, **limits)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    write_whole(out, write)


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d},{rest % 1000:03d}"


TIMELINE_FORMATS: dict[str, Callable[[Path, Timeline, int], None]] = {
    ".json": write_json,
    ".csv": write_csv,
    ".srt": write_srt,
}
