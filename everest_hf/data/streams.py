"""Training clips of a stream, for data sets that are larger than the disk."""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import get_worker_info

from ..video import VideoError
from .clips import MAX_REPLACEMENTS, ClipReader, seed_of
from .rows import as_cell
from .segments import segment_in


class StreamedClips(torch.utils.data.IterableDataset):
    """Training clips of a stream: items as those of `VideoClips`, in epochs of a length that is given.

    Every decoding process of every training process reads a part of its own of the stream: whole files where there
    are enough of them, otherwise the processes that share a file read all of it, and each keeps its own rows. In each
    epoch, files are dealt out and read in another order, and a buffer of `shuffle_buffer` rows shuffles what comes out
    of them. A part that is at its end starts again. A video that cannot be read is passed over and reported in "bad" of
    the next item.

    `index` is a number made from the name of the video, or from its bytes, and its segment: what is drawn for a clip
    follows from (seed, epoch, index), whoever reads it. The order depends on the number of processes. An epoch that
    goes on reads what it has given already once more, without decoding it; the clips are the same unless some could
    not be read.

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
        """Give the clips of an epoch without its first `start`, as `EpochSampler.set_epoch`."""
        if start is not None:
            self._place[1] = start // (self.batch_size * self.reader.num_sample * self.num_processes)
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
        """Yield the rows that one reader reads, over and over: its own files, or its share of a file that several read."""
        files = self._random(epoch, 0).sample(range(self.rows.num_shards), self.rows.num_shards)
        groups = min(members, len(files))
        group, rank = member % groups, member // groups
        readers = len(range(group, members, groups))  # which share what files the group has
        for number in itertools.count(1):
            row, random = None, self._random(epoch, number)
            own = random.sample(files[group::groups], len(files[group::groups]))
            rows = itertools.chain.from_iterable(itertools.islice(self._file(i), rank, None, readers) for i in own)
            for row in _shuffled(rows, self.shuffle_buffer, random):
                yield row
            if row is None:
                raise ValueError(f"the stream has fewer videos than the {members} processes that read it")

    def _random(self, epoch: int, number: int) -> Random:
        return Random(seed_of(seed=self.reader.seed, epoch=epoch, index=number))

    def _file(self, number: int) -> Iterator[dict[str, Any]]:
        file = self.rows.shard(num_shards=self.rows.num_shards, index=number)
        # Not with iter(): in a worker of a data loader that would divide the rows once more.
        for row in file.iter(batch_size=1):
            yield {name: values[0] for name, values in row.items()}

    def _readable(self, rows: Iterator[dict[str, Any]], epoch: int) -> Iterator[dict[str, Any]]:
        bad: list[tuple[str, str]] = []
        for row in rows:
            try:
                item = self.reader.read(row, self.rows.features, epoch=epoch, index=_number_of(row))
            except VideoError as error:
                bad.append((error.path, error.reason))
                if len(bad) > MAX_REPLACEMENTS:
                    raise VideoError(
                        error.path, f"{error.reason}; nor could the {MAX_REPLACEMENTS} before it be read"
                    ) from error
                continue
            yield {**item, "bad": bad}
            bad = []


def _shuffled(rows: Iterable, buffer_size: int, random: Random) -> Iterator:
    """Yield the rows, each drawn from a buffer that the next one then enters."""
    buffer: list = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        place = random.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = row
    random.shuffle(buffer)
    yield from buffer


def _number_of(row: dict[str, Any]) -> int:
    cell, segment = as_cell(row["video"]), segment_in(row)
    number = zlib.crc32(cell["path"].encode() if cell["path"] else cell["bytes"] or b"")
    return number if segment is None else zlib.crc32(str(segment).encode(), number)
