"""Clips of training and views of evaluation: map-style data sets of tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from torch.utils.data import Sampler

from ..video import MAX_PIXELS, TIME_LIMIT, VideoError, read_clip
from . import transforms
from .rows import video_in
from .sampling import Sampling

# A run of this many unreadable videos in the order of an epoch is no longer bad luck.
MAX_REPLACEMENTS = 16
# In the place of a row's number, for the seed of the order of `balanced_order`.
_ORDER_OF_CLASSES = 2**62


def seed_of(*, seed: int, epoch: int, index: int) -> int:
    """Return the seed of one sample: a function of (seed, epoch, index) and of nothing else."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator))


def epoch_order(*, num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the permutation of the rows (num_rows,) in an epoch."""
    generator = torch.Generator().manual_seed(seed_of(seed=seed, epoch=epoch, index=num_rows))
    return torch.randperm(num_rows, generator=generator)


def balanced_order(*, labels: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """Return the draws (num_rows,) of an epoch with all classes equally often: in any stretch from the start, to one.

    labels: the class of each row (num_rows,). A draw is row + k * num_rows for the k-th draw of that row, from 0, so
    that all are different. The epoch is made of rounds; in each of them every class comes once, in a random order. The
    rows of a class come in the order of a permutation, then of another one.
    """
    generator = torch.Generator().manual_seed(seed_of(seed=seed, epoch=epoch, index=_ORDER_OF_CLASSES))
    classes = labels.unique()
    rounds = -(-len(labels) // len(classes))
    draws = torch.stack(
        [_draws_of((labels == label).nonzero()[:, 0], rounds, len(labels), generator) for label in classes]
    )
    places = torch.rand(rounds, len(classes), generator=generator).argsort(dim=1)  # (rounds, classes)
    return draws.T.gather(1, places).flatten()[: len(labels)]


def _draws_of(rows: torch.Tensor, count: int, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return `count` draws of the rows (n,) of a class."""
    orders = [
        rows[torch.randperm(len(rows), generator=generator)] + k * num_rows for k in range(-(-count // len(rows)))
    ]
    return torch.cat(orders)[:count]


def replacements(*, index: int, order: torch.Tensor) -> list[int]:
    """Return the indices that stand in for an unreadable video: those that follow it in the epoch's order, cyclically.

    At most MAX_REPLACEMENTS, and never the index itself.
    """
    place = int((order == index).nonzero()[0])
    following = torch.roll(order, -place - 1)[:-1]
    return following[:MAX_REPLACEMENTS].tolist()


class ClipReader:
    """Reads clips for training: from a row to an item, {"pixel_values", "labels", "index", "seed"}.

    `pixel_values` is uint8 (T, C, h, w) and `seed` an integer. With num_sample > 1, repeated augmentation: the video
    is decoded once for that many crops, `pixel_values` is (num_sample, T, C, h, w) and `seed` a list. Frames and
    augmentation are drawn from (seed, epoch, index) alone; `seed` is for what else is drawn for the clip on its way
    through the model, and follows from them too. `labels` is there where the row has a label.

    Args:
        transform: clip uint8 (T, C, H, W) -> clip uint8 (T, C, h, w). Its attribute `short_side`, if it has one, is the
            most that it can use of a frame's; see `everest_hf.video.open_video`.
        seed: that of the run. num_sample: crops of a video. sample_shift: all but the first are of clips that begin later
            by a number of sampled frames that is drawn, at most this one; frames that they share are decoded once.
        backend, time_limit, max_pixels: see `everest_hf.video.open_video`. url_schemes: see `everest_hf.data.source_of`.
        sampling: the fields of `Sampling`, num_frames and so on.
    """

    def __init__(
        self,
        transform: Callable[[torch.Tensor], torch.Tensor],
        *,
        seed: int = 0,
        num_sample: int = 1,
        sample_shift: int = 0,
        backend: str = "auto",
        time_limit: float = TIME_LIMIT,
        max_pixels: int = MAX_PIXELS,
        url_schemes: Sequence[str] = (),
        **sampling,
    ):
        self.transform, self.seed, self.num_sample, self.sample_shift = transform, seed, num_sample, sample_shift
        self.sampling = Sampling(**sampling)
        self.opening: dict[str, Any] = {
            "backend": backend,
            "time_limit": time_limit,
            "max_pixels": max_pixels,
            "short_side": getattr(transform, "short_side", None),
        }
        self.fetching: dict[str, Any] = {"url_schemes": url_schemes, "time_limit": time_limit}

    def read(
        self, row: dict[str, Any], features: Features, *, epoch: int, index: int, place: int | None = None
    ) -> dict[str, Any]:
        """Return the item of a row in an epoch; `place` is the row's number where an error is to tell it.

        Raises:
            VideoError: the video cannot be read.
        """
        generator = torch.Generator().manual_seed(seed_of(seed=self.seed, epoch=epoch, index=index))
        drawn: list[list[int]] = []

        def indices_of(num_video_frames: int) -> list[int]:
            drawn.extend(self._drawn(num_video_frames, generator))
            return drawn[0] if len(drawn) == 1 else sorted({i for clip in drawn for i in clip})

        source = video_in(row, place, **self.fetching)
        frames = read_clip(**source, indices_of=indices_of, **self.opening)
        clips = [frames] if len(drawn) == 1 else _clips_among(frames, drawn)
        crops, seeds = zip(
            *(self._crop(clips[i % len(clips)], generator) for i in range(self.num_sample)), strict=True
        )
        if self.num_sample == 1:
            return {**_item(crops[0], features, row, index), "seed": seeds[0]}
        return {**_item(transforms.stack_clips(crops), features, row, index), "seed": list(seeds)}

    def _drawn(self, num_video_frames: int, generator: torch.Generator) -> list[list[int]]:
        """Return the frames of the clip of all crops, or of a clip for each, where they are shifted."""
        first = self.sampling.drawn(num_video_frames, generator)
        if not self.sample_shift:
            return [first]
        step = self.sampling.frame_step
        most = min(self.sample_shift, (num_video_frames - 1 - first[-1]) // step)
        shifts = torch.randint(most + 1, (self.num_sample - 1,), generator=generator).tolist()
        return [[i + step * shift for i in first] for shift in (0, *shifts)]

    def _crop(self, clip: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        # A seed of its own: from the same one, the place of the crop would follow from the choice of frames.
        with transforms.seeded(_draw_seed(generator)):
            crop = self.transform(clip)
        return crop, _draw_seed(generator)


def _clips_among(frames: torch.Tensor, drawn: list[list[int]]) -> list[torch.Tensor]:
    """Return clips (T, C, H, W) of frames (F, C, H, W), which are all that are drawn, once and in order.

    Where a clip's frames follow one another there, it is a view of them.
    """
    place_of = {frame: place for place, frame in enumerate(sorted({i for clip in drawn for i in clip}))}
    places = [[place_of[frame] for frame in clip] for clip in drawn]
    return [
        frames[of[0] : of[-1] + 1]
        if of == list(range(of[0], of[-1] + 1))
        else frames.movedim(1, -1)[of].movedim(-1, 1)  # channels stay last in memory
        for of in places
    ]


class VideoClips(torch.utils.data.Dataset):
    """Training clips: item i is what a ClipReader reads of row i, and "bad".

    The same for any number of workers and processes. `set_epoch` reaches workers that are running already. A video
    that cannot be read is replaced by the next one of the epoch's order (see `replacements`) and reported in "bad", a
    list of (path, reason); `index` is that of the row that was read.

    Args:
        rows: data set with `video` and perhaps `label`. transform and the others: as `ClipReader`.
        balanced: the order is that of `balanced_order`, and item row + k * len(rows) the k-th clip of that row, another
            one for each k.
    """

    def __init__(
        self, rows: Dataset, transform: Callable[[torch.Tensor], torch.Tensor], *, balanced: bool = False, **reading
    ):
        self.rows, self.reader = rows, ClipReader(transform, **reading)
        self.labels = torch.tensor(rows["label"][:]) if balanced else None
        # In shared memory, so that a worker that started in an earlier epoch sees the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> int:
        """Epoch that items are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the items of another epoch, also in running workers. Call it between epochs."""
        self._epoch.fill_(epoch)

    def order(self) -> torch.Tensor:
        """Return the items (num_rows,) of the epoch: a permutation of the rows, or what `balanced_order` draws."""
        if self.labels is not None:
            return balanced_order(labels=self.labels, seed=self.reader.seed, epoch=self.epoch)
        return epoch_order(num_rows=len(self), seed=self.reader.seed, epoch=self.epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {**self._read(index), "bad": []}
        except VideoError as error:
            return self._read_replacement(index, error)

    def _read(self, index: int) -> dict[str, Any]:
        place = index % len(self)
        item = self.reader.read(self.rows[place], self.rows.features, epoch=self.epoch, index=index, place=place)
        return {**item, "index": place}

    def _read_replacement(self, index: int, error: VideoError) -> dict[str, Any]:
        bad = [(error.path, error.reason)]
        for candidate in replacements(index=index, order=self.order()):
            try:
                return {**self._read(candidate), "bad": bad}
            except VideoError as next_error:
                bad.append((next_error.path, next_error.reason))
        raise VideoError(
            error.path, f"{error.reason}; nor could any of the {len(bad) - 1} videos tried in its place be read"
        )


class EpochSampler(Sampler[int]):
    """The order of the rows of a VideoClips in its epoch, the same in every process.

    An epoch is whole steps of `total_batch` clips; what is left over, different rows in each epoch, is left out. A row
    is num_sample clips (see `ClipReader`).
    """

    def __init__(self, clips: VideoClips, total_batch: int | None = None):
        self.clips, self.start = clips, 0
        rows = (total_batch or clips.reader.num_sample) // clips.reader.num_sample
        self.stop = len(clips) // rows * rows

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Give the order of an epoch, without its first `start` clips, which all processes together have had of it.

        Without `start`, an epoch that is set already keeps what it has (Accelerate's loaders set it once more
        whenever they are iterated), and another one starts at 0.
        """
        if start is not None:
            self.start = start // self.clips.reader.num_sample
        elif epoch != self.clips.epoch:
            self.start = 0
        self.clips.set_epoch(epoch)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self):
        yield from self.clips.order()[self.start : self.stop].tolist()


class VideoViews(torch.utils.data.Dataset):
    """Evaluation: item i is {"pixel_values" uint8 (V, T, C, h, w), "labels", "index"}, all V views of one video.

    V = num_segments * num_crops, segment-major. A video is one item, so that it is opened and decoded once and the
    mean over its views needs no other process. A video that cannot be read raises a VideoError, or with
    count_unreadable gives black views, with (path, reason) in "bad": it is never skipped.

    Args: as in `ClipReader`; size: height and width of a view; num_segments, num_crops: views in time and in space.
    """

    def __init__(
        self,
        rows: Dataset,
        size: tuple[int, int],
        *,
        num_segments: int = 1,
        num_crops: int = 1,
        backend: str = "auto",
        time_limit: float = TIME_LIMIT,
        max_pixels: int = MAX_PIXELS,
        url_schemes: Sequence[str] = (),
        count_unreadable: bool = False,
        **sampling,
    ):
        self.rows, self.size, self.count_unreadable = rows, (size[0], size[1]), count_unreadable
        self.sampling = Sampling(**sampling)
        # Never scaled by the decoder: the pixels are those of the processor.
        self.opening: dict[str, Any] = {"backend": backend, "time_limit": time_limit, "max_pixels": max_pixels}
        self.fetching: dict[str, Any] = {"url_schemes": url_schemes, "time_limit": time_limit}
        self.num_segments, self.num_crops = num_segments, num_crops

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, bad = self.rows[index], []
        try:
            views = self._read(row, index)
        except VideoError as error:
            if not self.count_unreadable:
                raise
            views, bad = self._black(), [(error.path, error.reason)]
        return {**_item(views, self.rows.features, row, index), "unreadable": bool(bad), "bad": bad}

    def _read(self, row: dict[str, Any], index: int) -> torch.Tensor:
        source = video_in(row, index, **self.fetching)
        clip = read_clip(**source, indices_of=self._indices, num_clips=self.num_segments, **self.opening)
        crops = transforms.evaluation_crops(clip, self.size, self.num_crops)  # (crops, segments * T, C, h, w)
        return crops.unflatten(1, (self.num_segments, -1)).transpose(0, 1).flatten(0, 1)  # (V, T, C, h, w)

    def _black(self) -> torch.Tensor:
        views = self.num_segments * self.num_crops
        return torch.zeros(views, self.sampling.frames_read, 3, *self.size, dtype=torch.uint8)

    def _indices(self, num_video_frames: int) -> list[int]:
        return self.sampling.views(num_video_frames, self.num_segments)


def _item(pixel_values: torch.Tensor, features: Features, row: dict[str, Any], index: int) -> dict[str, Any]:
    item = {"pixel_values": pixel_values, "index": index}
    return item if row.get("label") is None else {**item, "labels": _label_of(row["label"], features)}


def _label_of(label: int | float | list[int], features: Features) -> int | torch.Tensor:
    """Return a label as the model takes it: a class id, a number (), or 0 and 1 for each label (labels,)."""
    if isinstance(label, list):
        wanted = torch.zeros(features["label"].feature.num_classes)
        wanted[label] = 1
        return wanted
    return torch.tensor(label) if isinstance(label, float) else label
