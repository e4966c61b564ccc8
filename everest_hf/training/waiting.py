"""How fast a run's videos are read, how many processes read as fast as its model trains, and what else mends a wait."""

import math
import os
import shlex
import time
from dataclasses import dataclass

from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from ..configuration_everest import EverestConfig
from ..data import VideoClips, head_of
from ..data.rows import video_in
from ..data.workers import num_cores
from ..video import VideoError, probe
from .loaders import build_transform, drawing_of, opening_of, sampling_of
from .recipe import Recipe

# Videos of which a clip is read to tell how long that takes.
SAMPLE = 8


@dataclass(frozen=True)
class Reading:
    """How a run reads its videos. workers: decoding processes of a training process. cores: that it has for them.
    command: what prepares the videos so that they are read faster, None where they are.
    """

    workers: int
    cores: int
    command: str | None

    def workers_needed(self, wait: float) -> int:
        """Return how many processes read as fast as the model trains, by the share of the time that is waited.

        With W of them, a step takes as long as they read, t = r / W, and the model 1 - wait of that: W / (1 - wait)
        read as fast. Without any, the training process reads for the share that is waited, in between.
        """
        train = max(1 - wait, 1e-3)
        return max(1, math.ceil(self.workers / train if self.workers else wait / train))

    def advice(self, wait: float) -> str:
        """Return a sentence on what helps, in one command or option."""
        needed = self.workers_needed(wait)
        waited = f"{wait:.0%} of the time is spent waiting for data"
        if needed <= self.cores:
            return f"{waited}: raise --num_workers to {needed}, which read as fast as the model trains"
        lacking = (
            f"{needed} decoding processes would read as fast as the model trains, and there are {self.cores} cores"
        )
        if self.command:
            return f"{waited}: {lacking}; prepare the videos once: `{self.command}`"
        return f"{waited}: {lacking}; the videos are prepared already, so use a machine with more cores for each GPU"

    def forecast(self, seconds: float) -> str:
        """Say how many clips are read in a second where one takes a core so many `seconds`."""
        rate, most = max(1, self.workers) / seconds, self.cores / seconds
        text = (
            f"{1000 * seconds:.3g} ms of a core for a clip: {max(1, self.workers)} processes read {rate:.0f} clips/s"
        )
        text += f", {self.cores} cores {most:.0f}" if self.cores > max(1, self.workers) else ""
        return text + (f"; faster after `{self.command}`" if self.command else "")


def reading_of(recipe: Recipe, train: Dataset | IterableDataset, accelerator: Accelerator) -> Reading:
    """Return how a run reads its training videos, by the first of them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    command = None if _is_prepared(recipe, train) else _command(recipe)
    return Reading(recipe.num_workers, max(1, num_cores() // local), command)


def _command(recipe: Recipe) -> str:
    parts = ["everest-hf", "prepare", str(recipe.train), "OUT"]
    parts += ["--split", recipe.train_split] if recipe.train_split else []
    parts += ["--data-root", recipe.data_root] if recipe.data_root else []
    if recipe.frame_sampling == "stride" and recipe.frame_step > 1:
        parts += ["--frame-step", str(recipe.frame_step)]
    return shlex.join(parts)


def _is_prepared(recipe: Recipe, train: Dataset | IterableDataset) -> bool:
    opening = opening_of(recipe)
    fetching = {name: opening.pop(name) for name in ("url_schemes",)}
    for row in head_of(train, 1):
        try:
            return probe(**video_in(row, **fetching), **opening).runs is not None
        except VideoError:
            return False
    return False


def seconds_of_clip(recipe: Recipe, config: EverestConfig, train: Dataset | IterableDataset) -> float | None:
    """Return the seconds of a core that a training clip takes, on average of some; None where none can be read."""
    videos = head_of(train, SAMPLE) if isinstance(train, IterableDataset) else train
    count = min(SAMPLE, len(videos))
    chosen = videos.select([i * len(videos) // count for i in range(count)])
    clips = VideoClips(chosen, build_transform(recipe, config), **drawing_of(recipe), **sampling_of(recipe, config))
    times = []
    for i in range(count):
        try:
            clips[i]  # the first reading brings the file into memory
            start = time.process_time()
            clips[i]
        except VideoError:
            continue
        times.append((time.process_time() - start) / recipe.num_sample)
    return sum(times) / len(times) if times else None
