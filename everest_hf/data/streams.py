"""Training clips of a stream, for data sets that are larger than the disk."""

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info

from ..video import VideoError
from .clips import MAX_REPLACEMENTS, ClipReader, seed_of
from .rows import as_cell


class StreamedClips(torch.utils.data.IterableDataset):
    """Training clips of a stream: items as those of `VideoClips`, in epochs of a length that is given.

    Every decoding process of every training process reads a part of its own of the stream: whole files where there
    are enough of them, otherwise the processes that share a file read all of it, and each keeps its own rows. In each
    epoch, files are in another order, and a buffer of `shuffle_buffer` rows shuffles what comes out of them. A part
    that is at its end starts anew. A video that cannot be read is passed over and reported in "bad" of the next item.

    `index` is a number made from the name of the video, or from its bytes: what is drawn for a clip follows from
    (seed, epoch, index), whoever reads it. The order depends on the number of processes.

    Args:
        rows: stream with `video` and perhaps `label`. transform and the others: as `ClipReader`.
        batch_size: videos of a batch. num_batches: batches of an epoch for each training process.
        process_index, num_processes: which of the training processes this is.
    """

    def __init__(
        self,
        rows: IterableDataset,
        transform: Callable[[torch.Tensor], torch.Tensor],
        *,
        batch_size: int,
        num_batches: int,
        shuffle_buffer: int,
        process_index: int = 0,
        num_processes: int = 1,
        **reading,
    ):
        self.rows, self.reader = rows, ClipReader(transform, **reading)
        self.batch_size, self.num_batches, self.shuffle_buffer = batch_size, num_batches, shuffle_buffer
        self.process_index, self.num_processes = process_index, num_processes
        # Epoch and the batches that it has given already, in shared memory for workers that are running.
        self._place = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Give the clips of an epoch, without the first `start` videos; as `EpochSampler.set_epoch`."""
        if start is not None:
            self._place[1] = start // (self.batch_size * self.num_processes)
        elif epoch != self._place[0]:
            self._place[1] = 0
        self._place[0] = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, start = self._place.tolist()
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # The data loader asks its workers in turn, from the first on: batch `start` is this one's if it is number 0.
        place = (start + number) % count
        before, after = (len(range(place, stop, count)) * self.batch_size for stop in (start, self.num_batches))
        rows = self._part(epoch, place * self.num_processes + self.process_index, count * self.num_processes)
        yield from itertools.islice(self._readable(itertools.islice(rows, before, None), epoch), after - before)

    def _part(self, epoch: int, member: int, members: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of one of the processes, over and over."""
        # As many groups of files as can be, and in each of them the processes that read it together.
        groups = min(members, self.rows.num_shards)
        group, rank = member % groups, member // groups
        part = self.rows.shard(num_shards=groups, index=group, contiguous=False)
        for number in itertools.count():
            seed = seed_of(seed=self.reader.seed, epoch=epoch, index=number)
            shuffled = part.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
            size = len(range(group, members, groups))
            own = split_dataset_by_node(shuffled, rank=rank, world_size=size)
            # Not iter(): in a worker of a data loader that would divide the rows once more.
            batch = None
            for batch in own.iter(batch_size=1):
                yield {name: values[0] for name, values in batch.items()}
            if batch is None:
                raise ValueError(f"the stream has fewer videos than the {members} processes that read it")

    def _readable(self, rows: Iterator[dict[str, Any]], epoch: int) -> Iterator[dict[str, Any]]:
        bad: list[tuple[str, str]] = []
        for row in rows:
            try:
                item = self.reader.read(row, self.rows.features, epoch=epoch, index=_number_of(row["video"]))
            except VideoError as error:
                bad.append((error.path, error.reason))
                if len(bad) > MAX_REPLACEMENTS:
                    raise VideoError(
                        error.path, f"{error.reason}; nor could the {MAX_REPLACEMENTS} before it be read"
                    ) from error
                continue
            yield {**item, "bad": bad}
            bad = []


def _number_of(video: Any) -> int:
    cell = as_cell(video)
    return zlib.crc32(cell["path"].encode() if cell["path"] else cell["bytes"] or b"")
