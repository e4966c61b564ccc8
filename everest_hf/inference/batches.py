"""Batches of views on their way to a model: read by processes, with progress."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm

from ..data import collate, transforms
from ..data.workers import keep_freed_memory, naming_lost_workers, num_cores
from ..video import VideoError
from .classify import evaluation_views
from .sources import Videos


@contextmanager
def reading(
    views: Dataset, batches: Sequence[list[int]], *, num_workers: int | None = None, description: str, total: int
) -> Iterator[Iterator[dict[str, Any]]]:
    """Give the batches of items, each a list of their numbers, in this order; to be used within the context.

    views: a `VideoViews`, or several joined. `num_workers` processes read, by default one a core; a single video is read
    by this process. A bar shows how many of `total` videos are done; those that are in no batch were done before.

    Raises:
        OSError: a process that decodes was killed.
    """
    done = total - sum(map(len, batches))
    processes = 0 if total == 1 else min(num_workers or num_cores(), len(batches))
    # What is garbage now would be let go in the copies of this process: a decoder would wait there for its threads, which
    # no copy has.
    gc.collect()
    loader = DataLoader(
        views, batch_sampler=batches, num_workers=processes, collate_fn=collate, worker_init_fn=keep_freed_memory
    )
    bar = tqdm(total=total, initial=done, desc=description, unit="video", disable=total == 1)
    # The loss of a process is an error wherever this one is then: mostly in the work on a batch.
    with bar, naming_lost_workers():
        yield _counted(loader, bar)


def _counted(loader: DataLoader, bar: tqdm) -> Iterator[dict[str, Any]]:
    for batch in loader:
        yield batch
        bar.update(len(batch["index"]))


def pixel_values_of(batch: dict[str, Any], model) -> torch.Tensor:
    """Return the pixel values (B * V, T, C, h, w) of a batch of B videos of V views, normalised, where the model is."""
    clips = batch["pixel_values"].flatten(0, 1).to(model.device)
    return transforms.normalize(clips, model.config.image_mean, model.config.image_std)


@contextmanager
def reading_videos(
    model,
    processor,
    videos: Sequence[Videos],
    views: tuple[int, int],
    *,
    at_once: int,
    num_workers: int | None = None,
    description: str,
    **opening,
) -> Iterator[Iterator[tuple[list[str], dict[str, Any]]]]:
    """Give the names and the views of `at_once` videos after another, as the model's training evaluated them; to be used
    within the context.

    Of a video that cannot be read the views are black, and `unreadable` is true. views: segments x crops. opening:
    time_limit and max_pixels of `everest_hf.video.open_video`. The others, and what is raised, as in `reading`.
    """
    how: dict[str, Any] = {**opening, "count_unreadable": True}
    clips: Dataset = ConcatDataset(
        [evaluation_views(part.rows, model, processor, views, url_schemes=part.url_schemes, **how) for part in videos]
    )
    names = [name for part in videos for name in part.names]
    batches = [list(range(i, min(i + at_once, len(names)))) for i in range(0, len(names), at_once)]
    with reading(clips, batches, num_workers=num_workers, description=description, total=len(names)) as found:
        yield (([names[i] for i in numbers], batch) for numbers, batch in zip(batches, found, strict=True))


def errors_of(names: Sequence[str], batch: dict[str, Any]) -> dict[int, VideoError]:
    """Return the errors of a batch's videos that cannot be read, by their places in it."""
    places = batch["unreadable"].nonzero().flatten().tolist()
    pairs = zip(places, batch["bad"], strict=True)
    return {place: VideoError(names[place], reason) for place, (_, reason) in pairs}
