"""The answers of a classifier to many videos."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..files import write_table
from ..modeling_everest import EverestForVideoClassification
from ..video import Segment
from ..video_processing_everest import EverestVideoProcessor
from .batches import errors_of, pixel_values_of, reading_videos
from .classify import top_labels
from .sources import Videos


@dataclass(frozen=True)
class Prediction:
    """The answer to a video: its path or name, and the most probable label with its score, or why there is none.

    top: the labels of largest score, with it, the largest first. A score is a probability, or for regression the value.
    error: why the video cannot be read; label and score are then None, and top is empty. segment: the part of the video
    that was looked at, None for all of it.
    """

    video: str
    label: str | None = None
    score: float | None = None
    top: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None
    segment: Segment | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """Start and end of the segment, by what they are called; {} for the whole video."""
        segment = self.segment
        return {} if segment is None else dict(zip(segment.columns, (segment.start, segment.end), strict=True))


@contextmanager
def predicting(
    model: EverestForVideoClassification,
    processor: EverestVideoProcessor,
    videos: Sequence[Videos],
    *,
    keep_ratio: float | None = None,
    views: tuple[int, int] = (1, 1),
    top_k: int = 5,
    batch_size: int = 8,
    num_workers: int | None = None,
    **opening,
) -> Iterator[Iterator[Prediction]]:
    """Give the answers to videos as they come, in this order; to be used within the context.

    keep_ratio: as in the model's forward. views: segments x crops, whose scores are averaged. batch_size: clips at a
    time, those of one video at least; no score depends on it, but for the last digits. num_workers: processes that read,
    by default one a core. opening: time_limit and max_pixels of `everest_hf.video.open_video`.

    Raises:
        OSError: a process that decodes was killed.
    """
    reading_all = reading_videos(
        model,
        processor,
        videos,
        views,
        at_once=max(1, batch_size // (views[0] * views[1])),
        num_workers=num_workers,
        description="predict",
        **opening,
    )
    with reading_all as batches:
        answers = (answer for names, batch in batches for answer in _answers(names, batch, model, keep_ratio, top_k))
        segments = (segment for part in videos for segment in part.segments)
        yield (replace(answer, segment=segment) for answer, segment in zip(answers, segments, strict=True))


@torch.inference_mode()
def _answers(
    names: list[str], batch: dict[str, Any], model: EverestForVideoClassification, keep_ratio: float | None, top_k: int
) -> list[Prediction]:
    logits = model(pixel_values_of(batch, model), keep_ratio=keep_ratio).logits.float().cpu()  # (B * V, labels)
    errors, answers = errors_of(names, batch), []
    for i, of_video in enumerate(logits.unflatten(0, (len(names), -1))):  # (V, labels)
        if i in errors:
            answers.append(Prediction(names[i], error=errors[i].reason))
        else:
            top = top_labels(of_video, model.config, top_k)
            answers.append(Prediction(names[i], *top[0], top))
    return answers


def write_predictions(path: Path, answers: Sequence[Prediction]) -> None:
    """Write answers as a .csv file, whole or not at all, with the columns video, start and end of a segment (or
    start_frame and end_frame), label, score, and top2, score2, … for the labels that follow. The cells of a video
    without an answer are empty.
    """
    count = max((len(answer.top) for answer in answers), default=0)
    bounds = list(dict.fromkeys(name for answer in answers for name in answer.bounds))
    labels = ["label", "score", *(f"{name}{i}" for i in range(2, count + 1) for name in ("top", "score"))]
    header = ["video", *bounds, *labels]
    lines = [
        [
            answer.video,
            *(f"{answer.bounds[name]:g}" if name in answer.bounds else "" for name in bounds),
            *(cell for label, score in answer.top for cell in (label, f"{score:.6g}")),
        ]
        for answer in answers
    ]
    write_table(path, [header, *(line + [""] * (len(header) - len(line)) for line in lines)])
