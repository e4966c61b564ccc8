"""Decoders behind one interface. Each lists the obstacles with which it would give wrong frames.

`SequentialDecoder` has none: it reads the files that the others cannot be trusted with.
"""

import ctypes
import functools
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import ClassVar, Protocol

import av
import torch

from ..video_reading_everest import decode_in_order, decoded_in_order, demuxer, rgb_converter, upright
from .containers import (
    CROWDED,
    CUT,
    FOREIGN,
    MIRRORED,
    NARROW,
    OPEN_GROUPS,
    RECOVERY,
    UNRATED,
    UNTIMED,
    Header,
    header_of,
    is_narrow,
    remembered,
)

# Frames that the decoder would decode for nothing, from which on it is faster to seek.
WORTH_SEEKING = 8


class Decoder(Protocol):
    """What a backend offers. It may raise anything: `open_video` turns it into a VideoError."""

    obstacles: ClassVar[frozenset[str]]
    """The obstacles with which it gives wrong frames."""

    num_frames: int

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        """Open a video; where that is faster, frames come scaled to `size` (height, width).

        `header` is the video's where it is known.
        """

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the frames at `indices`, which rise, uint8 (T, H, W, C)."""

    def read_blocks(self, blocks: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """Yield what `read` would return for each of `blocks`, which rise too, and decode no frame twice."""


class ReadsOn:
    """For a decoder that remembers where it is, and decodes on from there."""

    read: Callable[[Sequence[int]], torch.Tensor]

    def read_blocks(self, blocks: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        return map(self.read, blocks)


class DecordDecoder(ReadsOn):
    """decord (packages decord2 or decord). It scales while it converts frames to RGB, bicubic."""

    obstacles: ClassVar = frozenset({CUT, OPEN_GROUPS, RECOVERY, UNTIMED, MIRRORED, CROWDED, NARROW, UNRATED, FOREIGN})

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        height, width = (-1, -1) if size is None or is_narrow(size[1]) else size
        with _as_file(source) as path:
            try:
                # One thread: the data loader's workers are the parallelism. Without fault_tol, decord puts a
                # neighbour in the place of a frame that it cannot decode, and says nothing.
                self._reader = _reader_class()(path, width=width, height=height, num_threads=1, fault_tol=1e-9)
            except RuntimeError as error:
                raise ValueError("not a video, or one that decord does not know or finds damaged") from error
        self.num_frames = len(self._reader)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self._reader.get_batch(list(indices)).asnumpy())


class TorchcodecDecoder(ReadsOn):
    """torchcodec, in its exact mode: the approximate one takes numbers for times, and is wrong at a variable rate.

    It does not scale: that makes it slower.
    """

    obstacles: ClassVar = frozenset({RECOVERY, UNTIMED, MIRRORED, FOREIGN})

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        self._source, self._header = source, header
        self._decoder = _torchcodec().VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
        self.num_frames = len(self._decoder)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        try:
            return self._decoder.get_frames_at(list(indices)).data
        except RuntimeError:
            # Among other things it refuses a video whose frames change their size, which no header tells.
            return SequentialDecoder(self._source, header=self._header).read(indices)


class PyavDecoder:
    """PyAV, from the last key frame before the first one asked for, and again where some frames asked for lie far behind
    others. It scales as decord does.

    Of H.264, frames that are not asked for and that no other is predicted from are not decoded.
    """

    obstacles: ClassVar = frozenset({CUT, OPEN_GROUPS, RECOVERY, UNTIMED})

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        header = header or header_of(source)
        self._source, self._matrix = source, header.matrix
        self._size = _coded(size or (header.height, header.width), header)
        self._times: Sequence[int] = header.times or ()
        self._keys = header.keys
        self.num_frames = len(self._times)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        times = [self._times[i] for i in indices]
        # Some containers find no key frame before a time, and seek to one after it: then from the first frame.
        frames = self._decode(list(self._parts(indices))) or self._decode([(self._times[0], times)])
        if not frames:
            raise ValueError(f"not all of its frames {indices[0]} to {indices[-1]} are there")
        return upright(torch.stack(frames), self._matrix)

    def read_blocks(self, blocks: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        times = [self._times[i] for block in blocks for i in block]
        frames = self._decoded([(times[0], times)])
        for block in blocks:
            found = list(islice(frames, len(block)))
            if [time for time, _ in found] != [self._times[i] for i in block]:
                raise ValueError(f"not all of its frames {block[0]} to {block[-1]} are there")
            yield upright(torch.stack([pixels for _, pixels in found]), self._matrix)

    def _parts(self, indices: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield the times of frames that are decoded one after another, and before them the time to seek."""
        part = [self._times[indices[0]]]
        for before, after in pairwise(indices):
            key = bisect_right(self._keys, self._times[after])
            if key and self._keys[key - 1] > self._times[min(before + WORTH_SEEKING, after)]:
                yield part[0], part
                part = []
            part.append(self._times[after])
        yield part[0], part

    def _decode(self, parts: list[tuple[int, list[int]]]) -> list[torch.Tensor] | None:
        """Return the frames at the times of each part, decoded from the key frame before its start; None if one is missed."""
        frames = [pixels for _, pixels in self._decoded(parts)]
        return frames if len(frames) == sum(len(times) for _, times in parts) else None

    def _decoded(self, parts: list[tuple[int, list[int]]]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the frames of `_decode`, each with its time, when their turn comes."""
        to_pixels = rgb_converter(*self._size)
        with demuxer(self._source) as (container, stream):
            for start, times in parts:
                wanted = set(times)
                container.seek(start, stream=stream)
                for frame in _decode_few(container, stream, wanted):
                    if frame.pts in wanted:
                        yield frame.pts, to_pixels(frame)
                    if frame.pts is None or frame.pts >= times[-1]:
                        break


class SequentialDecoder:
    """PyAV, from the first frame on: right where the other decoders are not, slow late in a long video."""

    obstacles: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        header = header or header_of(source)
        self._source, self._matrix = source, header.matrix
        self._size = _coded((header.height, header.width), header)
        self.num_frames = remembered(_count_frames, source)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return upright(decode_in_order(self._source, indices, self._size), self._matrix)

    def read_blocks(self, blocks: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        frames = decoded_in_order(self._source, [i for block in blocks for i in block], self._size)
        for block in blocks:
            yield upright(torch.stack(list(islice(frames, len(block)))), self._matrix)


def _coded(size: tuple[int, int], header: Header) -> tuple[int, int]:
    """Return a size (height, width) of frames as they are shown before they are turned upright."""
    return size if header.matrix[0] else size[::-1]


def _decode_few(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: set[int]
) -> Iterator[av.VideoFrame]:
    """Yield frames in the order of their times, among them all that are shown at `wanted`.

    Of H.264, frames from which no other is predicted are skipped (ITU-T H.264, nal_ref_idc). In HEVC, a frame of a
    higher layer may need such a frame.
    """
    context = stream.codec_context
    for packet in container.demux(stream):
        if context.codec.canonical_name == "h264":
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from packet.decode()


def _count_frames(source: str | bytes) -> int:
    with demuxer(source) as (container, stream):
        return sum(1 for _ in container.decode(stream))


@contextmanager
def _as_file(source: str | bytes) -> Iterator[str]:
    """Give the path of a file with these bytes; a path stays what it is. A decoder keeps open what it has opened.

    decord's own reading from memory follows offsets of damaged files out of bounds, and crashes.
    """
    if isinstance(source, str):
        yield source
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(source)
        file.flush()
        yield file.name


@functools.cache
def _reader_class() -> type:
    # decord offers the libraries that it brings to all that the process loads later: the FFmpeg of torchcodec takes
    # functions of other versions from them, and crashes. https://github.com/dmlc/decord/issues/361
    everywhere = ctypes.RTLD_GLOBAL
    try:
        ctypes.RTLD_GLOBAL = ctypes.RTLD_LOCAL  # type: ignore[misc]  # it is meant to be constant
        import decord
    except (ImportError, OSError, RuntimeError):
        raise ValueError(
            "video backend decord cannot be loaded; it needs the package decord2 (pip install decord2), which not every "
            f"system has; the others are {', '.join(name for name in BACKENDS if name != 'decord')}"
        ) from None
    finally:
        ctypes.RTLD_GLOBAL = everywhere  # type: ignore[misc]
    decord.logging.set_level(decord.logging.QUIET)

    class Reader(decord.VideoReader):
        def __init__(self, *args, **kwargs):
            self._process = os.getpid()
            super().__init__(*args, **kwargs)

        def __del__(self):
            # In a forked process, to end a reader of its parent is to wait for threads that are not there.
            if self._process == os.getpid():
                super().__del__()

    return Reader


@functools.cache
def _torchcodec():
    try:
        import torchcodec
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError):
        loads = False
    else:
        loads = getattr(torchcodec, "ffmpeg_major_version", True) is not None
    if not loads:
        raise ValueError(
            "video backend torchcodec cannot be loaded; it needs the package (pip install torchcodec) and the libraries "
            "of FFmpeg 4 or later (apt install ffmpeg, or conda install ffmpeg)"
        )
    return decoders


DECODERS: dict[str, type[Decoder]] = {"decord": DecordDecoder, "pyav": PyavDecoder, "torchcodec": TorchcodecDecoder}
BACKENDS = ("auto", *DECODERS)


def decoders_of(backend: str) -> tuple[type[Decoder], ...]:
    """Return the decoders that `backend` means here: a video is for the first of them that has no obstacle in it.

    "auto" is pyav, which is the fastest (`benchmarks/loader.py`), and for what it cannot seek in, torchcodec where that
    loads.

    Raises:
        ValueError: `backend` is none of BACKENDS, or cannot be loaded.
    """
    if backend not in BACKENDS:
        raise ValueError(f"video backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "torchcodec":
        _torchcodec()
    if backend == "decord":
        _reader_class()
    if backend != "auto":
        return DECODERS[backend], SequentialDecoder
    return DECODERS["pyav"], *([DECODERS["torchcodec"]] if torchcodec_loads() else []), SequentialDecoder


@functools.cache
def torchcodec_loads() -> bool:
    """Say whether torchcodec and the libraries that it needs are here."""
    try:
        _torchcodec()
    except ValueError:
        return False
    return True
