"""Batches, and the account of what could not be read."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from ..video import VideoError

logger = logging.getLogger(__name__)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of items: pixel_values uint8 (B, …), labels (B,), index (B,), seed int64 (B,) of training clips.

    The clips of a video that is in several (num_sample of `ClipReader`) stand one after another, each with its label,
    its index and a seed of its own. "bad" is the list of the (path, reason) of all items.
    """
    bad = [entry for item in items for entry in item.get("bad", ())]
    clips = [clip for item in items for clip in _clips_of(item)]
    # Channels stay last in memory; see `transforms.stack_clips`.
    channels_last = [{**clip, "pixel_values": clip["pixel_values"].movedim(-3, -1)} for clip in clips]
    batch = default_collate(channels_last)
    return {**batch, "pixel_values": batch["pixel_values"].movedim(-1, -3), "bad": bad}


def _clips_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    clip = {key: value for key, value in item.items() if key != "bad"}
    if not isinstance(clip.get("seed"), list):
        return [clip]
    pairs = zip(clip["pixel_values"], clip["seed"], strict=True)
    return [{**clip, "pixel_values": pixel_values, "seed": seed} for pixel_values, seed in pairs]


def share_of_batches(*, num_videos: int, batch_size: int, rank: int = 0, num_processes: int = 1) -> list[list[int]]:
    """Return the batches of rows that fall to one process: those of a single process, dealt out in turn.

    A batch holds the same videos for any number of processes, as the last bits of a result depend on what else is in
    its batch. All processes get as many batches, as they may have to work in step: where the count does not divide,
    the first ones come up twice, and `join` counts them once.
    """
    batches = [list(range(i, min(i + batch_size, num_videos))) for i in range(0, num_videos, batch_size)]
    share = batches[rank::num_processes]
    rounds = -(-len(batches) // num_processes)
    return share + batches[: rounds - len(share)]


class BadVideos:
    """The unreadable videos that a run has met: counted, and each logged once and listed in a file, with its reason.

    A process takes what its batches report; `share` tells all of them, and the main process logs and lists.

    path: the list, a line "path<TAB>reason" a video; what it has already stays.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.reasons: dict[str, str] = {}
        self.count = 0
        self._news: list[tuple[str, str]] = []

    def take(self, batch: dict[str, Any]) -> None:
        """Take "bad" out of a batch, so that the rest can go to the model."""
        self._news += batch.pop("bad", [])

    def share(self, *, gather: Callable[[list], list] = list, is_main: bool = True) -> None:
        """Make `reasons`, by path, and `count`, how often one came up, those of all processes. All of them call it.

        gather: makes one list of those of all processes, as `accelerate.utils.gather_object` does.
        """
        news, self._news = gather(self._news), []
        self.count += len(news)
        fresh = {path: reason for path, reason in news if path not in self.reasons}
        self.reasons |= fresh
        if is_main and fresh:
            self._tell(fresh)

    def _tell(self, fresh: dict[str, str]) -> None:
        for path, reason in fresh.items():
            logger.warning("unreadable video replaced: %s", VideoError(path, reason))
        if self.path is not None:
            listed = self.path.read_text().splitlines() if self.path.exists() else []
            known = {line.split("\t")[0] for line in listed}
            lines = [f"{path}\t{reason}\n" for path, reason in fresh.items() if path not in known]
            with self.path.open("a") as file:
                file.writelines(lines)
