"""What a model is used for in one call: `everest_hf.predict` and `everest_hf.embed`."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..configuration_everest import check_keep_ratio
from ..video import MAX_PIXELS, TIME_LIMIT, VideoError
from .batches import errors_of, reading_videos
from .embed import feature_function, features_of
from .loading import (
    CLASSIFICATION,
    FEATURES,
    PRETRAINING,
    check_classifier,
    chosen_model,
    load_checkpoint,
    load_encoder,
)
from .predictions import Prediction, predicting
from .sources import Source, find_videos


def predict(
    sources: Source | Iterable[Source],
    model: str | os.PathLike | None = None,
    *,
    keep_ratio: float | None = None,
    views: tuple[int, int] = (1, 1),
    top_k: int = 5,
    batch_size: int = 8,
    num_workers: int | None = None,
    data_root: str | os.PathLike | None = None,
    split: str | None = None,
    video_column: str | None = None,
    url_schemes: Sequence[str] = (),
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
) -> list[Prediction]:
    """Classify videos, as `everest-hf predict` does, and return a `Prediction` for each, in this order.

    Args:
        sources: a video file, folder (of which all videos are taken), pattern, list file, data set, or URL, or an object
            that holds rows; or several of them.
        model: checkpoint or run folder of a classifier, or its name on the Hub; the newest finished run below ./runs.
        keep_ratio: share of the tokens to keep, instead of the model's own.
        views: segments x crops to average over, each video's centre clip by default.
        top_k: labels of a video, at most all.
        batch_size: clips at a time. num_workers: processes that decode, by default one a core. No score depends on them.
        data_root, split, video_column: of lists and data sets, as in `load_videos`. url_schemes: of the addresses in them
            that are fetched beside hf://.
        time_limit: seconds after which fetching or decoding a video counts as hung (0: never).
        max_pixels: frames x height x width that may be decoded of a video at a time (0: any).

    Raises:
        FileNotFoundError, ValueError: a source or the model is missing or not one, or an argument is out of range.
        OSError: a process that decodes was killed. A video that cannot be read is no error: its record says why.
    """
    _check(keep_ratio, views, top_k=top_k, batch_size=batch_size, num_workers=num_workers)
    videos = find_videos(sources, data_root=data_root, split=split, video_column=video_column, url_schemes=url_schemes)
    name = chosen_model(None if model is None else os.fspath(model), CLASSIFICATION)
    check_classifier(name)
    classifier, processor = load_checkpoint(name, CLASSIFICATION)
    with predicting(
        classifier,
        processor,
        videos,
        keep_ratio=keep_ratio,
        views=views,
        top_k=top_k,
        batch_size=batch_size,
        num_workers=num_workers,
        time_limit=time_limit,
        max_pixels=max_pixels,
    ) as answers:
        return list(answers)


@dataclass(frozen=True)
class Embeddings:
    """Vectors of the n videos that can be read: videos, their paths or names; embeddings float32 (n, D); bad, the others,
    with the reason.
    """

    videos: list[str]
    embeddings: torch.Tensor
    bad: list[VideoError]


def embed(
    sources: Source | Iterable[Source],
    model: str | os.PathLike | None = None,
    *,
    keep_ratio: float | None = None,
    views: tuple[int, int] = (1, 1),
    batch_size: int = 8,
    num_workers: int | None = None,
    data_root: str | os.PathLike | None = None,
    split: str | None = None,
    video_column: str | None = None,
    url_schemes: Sequence[str] = (),
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
) -> Embeddings:
    """Return one feature vector for each video, the mean over its views.

    They are what `everest-hf embed` writes into a file (which goes on after an interruption, and has labels): of a
    classifier what its last layer sees, of a pre-trained model the mean token after the encoder's norm.

    model: of any kind. batch_size: videos at a time. The other arguments, and what is raised, as in `predict`.
    """
    _check(keep_ratio, views, batch_size=batch_size, num_workers=num_workers)
    videos = find_videos(sources, data_root=data_root, split=split, video_column=video_column, url_schemes=url_schemes)
    name = chosen_model(None if model is None else os.fspath(model), CLASSIFICATION, PRETRAINING, FEATURES)
    encoder, processor = load_encoder(name)
    function = feature_function(encoder, keep_ratio)
    readable: list[str] = []
    bad: list[VideoError] = []
    embeddings = []
    with reading_videos(
        encoder,
        processor,
        videos,
        views,
        at_once=batch_size,
        num_workers=num_workers,
        description="embed",
        time_limit=time_limit,
        max_pixels=max_pixels,
    ) as batches:
        for names, batch in batches:
            errors = errors_of(names, batch)
            readable += [name for i, name in enumerate(names) if i not in errors]
            bad += errors.values()
            embeddings.append(features_of(batch, encoder, function).embeddings)
    return Embeddings(readable, torch.cat(embeddings), bad)


def _check(keep_ratio: float | None, views: tuple[int, int], **counts: int | None) -> None:
    if keep_ratio is not None:
        check_keep_ratio(keep_ratio)
    if len(views) != 2 or min(views) < 1:
        raise ValueError(f"views is {views}; it must be segments and crops, each at least 1")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
