"""Batches, and the account of what could not be read."""

import logging
from typing import Any

from torch.utils.data import default_collate

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


class BadVideos:
    """Counts how often an unreadable video came up in a run, and logs each path once, with its reason."""

    def __init__(self):
        self.reasons: dict[str, str] = {}
        self.count = 0

    def take(self, batch: dict[str, Any]) -> int:
        """Take "bad" out of a batch, so that the rest can go to the model; return how many it reports."""
        bad = batch.pop("bad", [])
        self.count += len(bad)
        for path, reason in bad:
            if path not in self.reasons:
                self.reasons[path] = reason
                logger.warning("unreadable video replaced: %s: %s", path, reason)
        return len(bad)
