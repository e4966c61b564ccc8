"""Decoders behind one interface, and what the header of a file says about whether they can be trusted with it.

Each decoder finds frames by their number only in files that are made for it. In the others it would give neighbours of
the frames asked for, or frames that are not to be shown, and say nothing: those are read by `SequentialDecoder`.
"""

import ctypes
import functools
import io
import os
import re
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import av
import torch
from av.video.reformatter import Interpolation, VideoReformatter

# Files of which a process remembers what their headers say.
MAX_HEADERS = 2**16

# ---------------------------------------------------------------------- headers

# What keeps a decoder from finding the frames of a video by their numbers.
CUT = "an edit list begins or ends between key frames"
OPEN_GROUPS = "frames that are shown before a key frame come after it"
RECOVERY = "frames that need others pass for key frames"
UNTIMED = "the container does not tell when frames are shown"
MIRRORED = "the display matrix mirrors the frames"
CROWDED = "several frames come out of the decoder at once"
NARROW = "rows are padded to a multiple of their own length"


@dataclass(frozen=True)
class Header:
    """What a file says about its video.

    codec: its name, "h264". duration: in seconds, None where it is not told. fps: on average, 0 where it is not told.
    height, width: of a frame as it is shown, in pixels. matrix: see `_display_matrix`. times: when each frame is shown,
    in the container's unit; None where it does not tell. obstacles: of the above.
    """

    codec: str
    duration: float | None
    fps: float
    height: int
    width: int
    matrix: tuple[int, int, int, int]
    times: Sequence[int] | None
    obstacles: frozenset[str]


def header_of(source: str | bytes) -> Header:
    """Return the Header of a video, given by path or as bytes. It may raise anything."""
    if isinstance(source, bytes):
        return _read_header(source)
    return _remembered(_read_header, source, *_version(source))


def _version(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(MAX_HEADERS)
def _remembered(function: Callable, path: str, *version: int):
    """Return function(path), a process's second time from memory: to go through a file's packets costs a millisecond."""
    return function(path)


# Up to PyAV 18 metadata that is no UTF-8 is an error unless asked otherwise; later versions read it and take no such word.
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


def open_container(source: str | bytes) -> av.container.InputContainer:
    """Open a video, given by path or as bytes, to read its packets. It may raise what PyAV raises."""
    return av.open(io.BytesIO(source) if isinstance(source, bytes) else source, "r", **_LENIENT)


@contextmanager
def _demuxer(source: str | bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        container = open_container(source)
    except av.error.FFmpegError as error:
        raise ValueError(f"not a video, or its header is damaged ({error.strerror})") from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
            raise ValueError("not a video: it has no stream of pictures, or one of an unknown kind")
        stream.codec_context.thread_count = 1  # the data loader's workers are the parallelism
        yield container, stream


def _read_header(source: str | bytes) -> Header:
    with _demuxer(source) as (container, stream):
        _check_count(container, stream)
        first, packets = None, []
        for packet in container.demux(stream):
            if packet.size:
                is_recovery = packet.is_keyframe and _needs_others(packet, stream.codec_context)
                packets.append(_Packet(packet.pts, packet.is_keyframe, packet.is_discard, is_recovery))
            first = first or _first_frame(packet)
        if first is None:
            raise ValueError("none of its frames can be decoded")
        matrix = _display_matrix(first)
        height, width = (first.height, first.width) if matrix[0] else (first.width, first.height)
        obstacles = frozenset(_obstacles(packets, container, stream, matrix, width))
        times = sorted(packet.time for packet in packets if packet.time is not None)
        return Header(
            codec=stream.codec.canonical_name,
            duration=_seconds(container, stream),
            fps=float(stream.average_rate or 0),
            height=height,
            width=width,
            matrix=matrix,
            times=None if UNTIMED in obstacles else _in_short(times),
            obstacles=obstacles,
        )


class _Packet(NamedTuple):
    time: int | None
    is_key: bool
    is_hidden: bool
    is_recovery: bool  # a key frame in name: the first pictures that are decoded from it are not whole


def _needs_others(packet: av.Packet, context: av.VideoCodecContext) -> bool:
    """Say whether a picture is of H.264 and not one that decoding starts anew with (IDR), whatever its container says.

    Source: ITU-T H.264, table 7-1 (types of units: 1 is a slice, 5 one of an IDR picture).
    """
    kinds = _unit_types(bytes(packet), context.extradata or b"") if context.codec.canonical_name == "h264" else ()
    return next((kind == 1 for kind in kinds if kind in (1, 5)), False)


def _unit_types(packet: bytes, extradata: bytes) -> Iterator[int]:
    """Yield the types of the units: each follows a start code (H.264, annex B), or its size (ISO/IEC 14496-15)."""
    if not extradata.startswith(b"\1"):
        yield from (match[1][0] & 31 for match in re.finditer(b"\0\0\1(.)", packet, re.DOTALL))
        return
    width, place = int.from_bytes(extradata[4:5], "big") % 4 + 1, 0
    while place + width < len(packet):
        yield packet[place + width] & 31
        place += width + int.from_bytes(packet[place : place + width], "big")


def _in_short(times: list[int]) -> Sequence[int]:
    """Return rising times as a range where they are evenly spaced: a process remembers those of many files."""
    steps = {after - before for before, after in pairwise(times)}
    return range(times[0], times[-1] + 1, *steps) if len(steps) <= 1 else array("q", times)


def _check_count(container: av.container.InputContainer, stream: av.VideoStream) -> None:
    # decord makes room for as many frames as are declared, and where there is no room its process ends.
    count = stream.frames or float(stream.average_rate or 0) * (container.duration or 0) / av.time_base
    size: Any = container.size  # files and bytes have one
    if not 0 <= count <= size:
        raise ValueError(f"its header is damaged: it declares {count:.0f} frames in {size} bytes")


def _first_frame(packet: av.Packet) -> av.VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.error.InvalidDataError:
        return None


def _seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return the signs (a, b, c, d) of how pixels are to be shown: x' = a x + c y, y' = b x + d y."""
    side_data: Any = frame.side_data  # annotated as a dict of something else
    data = side_data.get("DISPLAYMATRIX")
    numbers = (1, 0, 0, 0, 1, 0, 0, 0, 1) if data is None else struct.unpack("=9i", bytes(data))
    a, b, c, d = ((x > 0) - (x < 0) for x in (*numbers[:2], *numbers[3:5]))
    if not any((a, b, c, d)):  # players ignore it
        return 1, 0, 0, 1
    if abs(a * d) + abs(b * c) != 1:
        raise ValueError("it is to be shown turned by an angle that is no multiple of 90 degrees, or distorted")
    return a, b, c, d


def _obstacles(
    packets: list[_Packet], container: av.container.InputContainer, stream: av.VideoStream, matrix: tuple, width: int
) -> Iterator[str]:
    """Yield what is in the way of finding frames."""
    a, b, c, d = matrix
    if a * d - b * c < 0:
        yield MIRRORED
    if _is_narrow(width):
        yield NARROW
    if any(packet.is_recovery for packet in packets):
        yield RECOVERY
    times: list[Any] = [packet.time for packet in packets]
    name = container.format.name
    # A frame of these is found by its place in the file, which the first frames of a program stream do not have.
    if name in ("mpeg", "mpegts") or None in times or len(set(times)) < len(times):
        yield UNTIMED
        return
    shown = sorted(range(len(times)), key=times.__getitem__)
    moved = [i for place, i in enumerate(shown) if place != i]
    codec, is_delayed = stream.codec.canonical_name, stream.codec_context.has_b_frames
    if any(packet.is_hidden for packet in packets):
        yield CUT
    if any(packets[i].is_key for i in moved):
        yield OPEN_GROUPS
    if moved and codec == "hevc":
        yield CROWDED
    # Its times are those of decoding. MPEG-4 says that frames are delayed where they merely may be.
    if name == "avi" and (moved or (is_delayed and codec != "mpeg4")):
        yield UNTIMED


def _is_narrow(width: int) -> bool:
    """Say whether decord takes the padding of rows to 64 pixels for colours: at a width of 144, 96, 48, and some below."""
    padded = -(-width // 64) * 64
    return padded != width and 3 * padded % width == 0


# ---------------------------------------------------------------------- decoders


class Decoder(Protocol):
    """What a backend offers. It may raise anything: `open_video` turns it into a VideoError."""

    obstacles: ClassVar[frozenset[str]]
    """With which of the obstacles it gives wrong frames."""

    num_frames: int

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        """Open a video; where that is faster, frames come scaled to `size` (height, width).

        `header` is the video's where it is known: to read that of bytes costs a millisecond or more each time.
        """

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the frames at `indices`, which rise, uint8 (T, H, W, C)."""


class DecordDecoder:
    """decord (packages decord2 or decord). It scales while it converts frames to RGB, bicubic."""

    obstacles: ClassVar = frozenset({CUT, OPEN_GROUPS, RECOVERY, UNTIMED, MIRRORED, CROWDED, NARROW})

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        height, width = (-1, -1) if size is None or _is_narrow(size[1]) else size
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


class TorchcodecDecoder:
    """torchcodec, in its exact mode: the approximate one takes numbers for times, and is wrong at a variable rate.

    It does not scale: that makes it slower.
    """

    obstacles: ClassVar = frozenset({RECOVERY, UNTIMED, MIRRORED})

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        self._decoder = _torchcodec().VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
        self.num_frames = len(self._decoder)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return self._decoder.get_frames_at(list(indices)).data


class PyavDecoder:
    """PyAV, from the last key frame before the first one asked for. It scales as decord does.

    Of H.264, frames that are not asked for and that no other is predicted from are not decoded.
    """

    obstacles: ClassVar = frozenset({CUT, OPEN_GROUPS, RECOVERY, UNTIMED})

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        header = header or header_of(source)
        self._source, self._size, self._matrix = source, size, header.matrix
        self._times: Sequence[int] = header.times or ()
        self.num_frames = len(self._times)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        times = [self._times[i] for i in indices]
        # Some containers find no key frame before a time, and go to one after it.
        frames = self._decode(times, times[0]) or self._decode(times, self._times[0])
        if not frames:
            raise ValueError(f"not all of its frames {indices[0]} to {indices[-1]} are there")
        return _upright(torch.stack(frames), self._matrix)

    def _decode(self, times: list[int], start: int) -> list[torch.Tensor] | None:
        """Return the frames that are shown at `times`, decoded from the key frame before `start`; None if one is missed."""
        height, width = self._size or (None, None)
        if not self._matrix[0]:
            height, width = width, height
        wanted, frames, to_pixels = set(times), [], _converter(height, width)
        with _demuxer(self._source) as (container, stream):
            container.seek(start, stream=stream)
            for frame in _decode_few(container, stream, wanted):
                if frame.pts in wanted:
                    frames.append(to_pixels(frame))
                if frame.pts is None or frame.pts >= times[-1]:
                    break
        return frames if len(frames) == len(times) else None


class SequentialDecoder:
    """PyAV, from the first frame on: right where the other decoders are not, slow late in a long video."""

    obstacles: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        self._source, self._matrix = source, (header or header_of(source)).matrix
        if isinstance(source, bytes):
            self.num_frames = _count_frames(source)
        else:
            self.num_frames = _remembered(_count_frames, source, *_version(source))

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        with _demuxer(self._source) as (container, stream):
            wanted, shown, to_pixels = set(indices), islice(container.decode(stream), max(indices) + 1), _converter()
            frames = [to_pixels(frame) for i, frame in enumerate(shown) if i in wanted]
        return _upright(torch.stack(frames), self._matrix)


def _decode_few(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: set[int]
) -> Iterator[av.VideoFrame]:
    """Yield frames in the order of their times, among them all that are shown at `wanted`.

    In HEVC, a frame that none of its layer is predicted from may be needed by a higher layer. In H.264 it is needed by
    none (ITU-T H.264, nal_ref_idc).
    """
    context = stream.codec_context
    for packet in container.demux(stream):
        if context.codec.canonical_name == "h264":
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from packet.decode()


def _converter(height: int | None = None, width: int | None = None) -> Callable[[av.VideoFrame], torch.Tensor]:
    """Return what makes pixels (H, W, C) of frames, scaled to height and width.

    One for all frames and on this thread: to set it up, or to start threads, takes longer than to use it.
    """
    reformat = VideoReformatter().reformat

    def convert(frame: av.VideoFrame) -> torch.Tensor:
        converted = reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC, threads=1)
        return torch.from_numpy(converted.to_ndarray())

    return convert


def _count_frames(source: str | bytes) -> int:
    with _demuxer(source) as (container, stream):
        return sum(1 for _ in container.decode(stream))


def _upright(frames: torch.Tensor, matrix: tuple[int, int, int, int]) -> torch.Tensor:
    """Return frames (T, H, W, C) as a display matrix has them shown."""
    a, b, c, d = matrix
    if not a:
        frames = frames.transpose(1, 2)
    return frames.flip([axis for axis, sign in ((2, a or c), (1, d or b)) if sign < 0])


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
    # functions of other versions from them, and crashes.
    everywhere = ctypes.RTLD_GLOBAL
    try:
        ctypes.RTLD_GLOBAL = ctypes.RTLD_LOCAL  # type: ignore[misc]  # it is meant to be constant
        import decord
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
    if backend != "auto":
        return DECODERS[backend], SequentialDecoder
    return PyavDecoder, *([TorchcodecDecoder] if torchcodec_loads() else []), SequentialDecoder


@functools.cache
def torchcodec_loads() -> bool:
    """Say whether torchcodec and the libraries that it needs are here."""
    try:
        _torchcodec()
    except ValueError:
        return False
    return True
