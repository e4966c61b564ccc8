"""What a file says before it is decoded: its size, its header, and what keeps a decoder from finding its frames.

A decoder finds frames by their number only in files of certain kinds. In others it would return neighbours of the
wanted frames, or frames that are not shown, without a word. `Header.obstacles` says what a file has of this.
"""

import functools
import io
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, BinaryIO, NamedTuple

import av

from ..video_reading_everest import FrameRuns, check_pixels, demuxer, display_matrix, runs_of
from .errors import VideoError

# Files, or bytes of them, of which a process remembers what their headers say.
MAX_HEADERS = 2**16
# In times of the usual one, the step from a frame to the next that is a jump.
JUMP = 3
# What keeps a decoder from finding the frames of a video by their numbers.
CUT = "an edit list begins or ends between key frames"
OPEN_GROUPS = "frames that are shown before a key frame come after it"
RECOVERY = "frames that need others pass for key frames"
UNTIMED = "the container does not tell when frames are shown"
MIRRORED = "the display matrix mirrors the frames"
CROWDED = "several frames come out of the decoder at once"
NARROW = "rows are padded to a multiple of their own length"
UNRATED = "the header tells no frame rate"
FOREIGN = "the container is none of those in which a time leads to its frame"
# The names of those containers.
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")


@dataclass(frozen=True)
class Header:
    """What a file says about its video.

    codec: its name, "h264". duration: in seconds, None where it is not told. fps: on average, 0 where it is not told.
    height, width: of a frame as it is shown, in pixels. matrix: see `display_matrix`. times: when each frame is shown,
    in units of time_base seconds; None where the container does not tell. obstacles: of the above. keys: when the key
    frames are shown. runs: how the file holds the frames of the source that it was prepared from, None for one that
    shows them in order.
    """

    codec: str
    duration: float | None
    fps: float
    height: int
    width: int
    matrix: tuple[int, int, int, int]
    times: Sequence[int] | None
    time_base: Fraction | None
    obstacles: frozenset[str]
    keys: Sequence[int] = ()
    runs: FrameRuns | None = None


def header_of(source: str | bytes, max_pixels: int = 0) -> Header:
    """Return the Header of a video, given by path or as bytes; max_pixels: of `check_pixels`. It may raise anything."""
    return remembered(_read_header, source, max_pixels)


def remembered(function: Callable, source: str | bytes, *args):
    """Return function(source, *args), from memory where this process has called it before for the same file or bytes.

    To go through a video's packets takes milliseconds, and the hash of its bytes a tenth of that.
    """
    if isinstance(source, str):
        status = os.stat(source)
        return _cached(function, source, args, status.st_size, status.st_mtime_ns)
    content = _Content(source)
    try:
        return _cached(function, content, args)
    finally:
        content.data = b""  # it stays in memory as a key


@functools.lru_cache(MAX_HEADERS)
def _cached(function: Callable, source: "str | _Content", args: tuple, *version: int):
    return function(source if isinstance(source, str) else source.data, *args)


class _Content:
    """The bytes of a file as a key, which is equal where their number and their hash of 64 bits are."""

    def __init__(self, data: bytes):
        self.data, self._key = data, (len(data), hash(data))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and self._key == other._key


def _read_header(source: str | bytes, max_pixels: int) -> Header:
    with demuxer(source) as (container, stream):
        check_pixels(1, stream.codec_context.height, stream.codec_context.width, max_pixels)
        _check_count(container, stream)
        first, packets = None, []
        for packet in container.demux(stream):
            if packet.size:
                is_recovery = packet.is_keyframe and _needs_others(packet, stream.codec_context)
                packets.append(_Packet(packet.pts, packet.is_keyframe, packet.is_discard, is_recovery))
            first = first or _first_frame(packet)
        if first is None:
            raise ValueError("none of its frames can be decoded")
        matrix = display_matrix(first)
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
            time_base=stream.time_base,
            obstacles=obstacles,
            keys=_in_short(sorted({p.time for p in packets if p.is_key and p.time is not None})),
            runs=runs_of(container),
        )


class _Packet(NamedTuple):
    time: int | None
    is_key: bool
    is_hidden: bool
    is_recovery: bool  # a key frame in name: the first pictures that are decoded from it are not whole


def _needs_others(packet: av.Packet, context: av.VideoCodecContext) -> bool:
    """Say whether a picture is of H.264 and not one that decoding can start at (IDR), whatever its container says.

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
    if not times:
        return ()
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


def _obstacles(
    packets: list[_Packet], container: av.container.InputContainer, stream: av.VideoStream, matrix: tuple, width: int
) -> Iterator[str]:
    """Yield what is in the way of finding frames."""
    a, b, c, d = matrix
    if a * d - b * c < 0:
        yield MIRRORED
    if is_narrow(width):
        yield NARROW
    if any(packet.is_recovery for packet in packets):
        yield RECOVERY
    if not stream.average_rate:
        yield UNRATED
    times: list[Any] = [packet.time for packet in packets]
    name = container.format.name
    if name not in _INDEXED:
        yield FOREIGN
    # A frame of these is found by its place in the file, which the first frames of a program stream do not have.
    if name in ("mpeg", "mpegts") or None in times or len(set(times)) < len(times):
        yield UNTIMED
        return
    shown = sorted(range(len(times)), key=times.__getitem__)
    moved = [i for place, i in enumerate(shown) if place != i]
    if moved and any(_jumps(packets, shown)):
        yield UNTIMED
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


def _jumps(packets: list[_Packet], shown: list[int]) -> Iterator[bool]:
    """Yield, for each jump in the times, whether they may tell another order than that in which frames are shown.

    Where the clock of a recording jumps, it moves all packets that follow, even frames that are shown before one that
    was sent earlier. Where an encoder gets frames with a jump, it codes a frame from behind the jump first, or begins
    with a key frame.
    """
    times: list[Any] = [packets[i].time for i in shown]
    steps = [after - before for before, after in pairwise(times)]
    usual = sorted(steps)[len(steps) // 2]
    last_before = list(accumulate(shown, max))
    first_behind = list(accumulate(reversed(shown), min))[::-1]
    for place, step in enumerate(steps, 1):
        if step > JUMP * usual:
            first = first_behind[place]
            yield last_before[place - 1] < first and not packets[first].is_key


def is_narrow(width: int) -> bool:
    """Say whether decord takes the padding of rows to 64 pixels for colours: at a width of 144, 96, 48, and some below."""
    padded = -(-width // 64) * 64
    return padded != width and 3 * padded % width == 0


# ---------------------------------------------------------------------- size of the file


def check_source(source: str | bytes, name: str) -> None:
    """Raise a VideoError for what a decoder would report badly or not at all."""
    if isinstance(source, bytes):
        return _check_size(io.BytesIO(source), len(source), name)
    if not os.path.exists(source):
        raise VideoError(name, "no such file")
    if not os.path.isfile(source):
        raise VideoError(name, "not a file")
    try:
        with open(source, "rb") as file:
            _check_size(file, os.path.getsize(source), name)
    except OSError as error:
        raise VideoError(name, error.strerror or str(error)) from error


def _check_size(file: BinaryIO, size: int, name: str) -> None:
    if size == 0:
        raise VideoError(name, "the file is empty")
    declared = _declared_size(file, size)
    if declared > size:
        # A decoder takes what is left for the whole video, and a clip would be of its beginning alone.
        raise VideoError(name, f"the file is truncated: {size} of the {declared} bytes that its header declares")


def _declared_size(file: BinaryIO, size: int) -> int:
    """Number of bytes that an AVI, MP4, MOV, MKV or WebM file says it has; `size` where it does not say."""
    head = file.read(128)
    if head.startswith(b"RIFF"):
        declared = int.from_bytes(head[4:8], "little")
        # A writer that was cut off, or that streamed, leaves all bits set.
        return size if declared == 0xFFFFFFFF else 8 + declared
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return _end_of_boxes(file, size)
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _end_of_segment(head) or size
    return size


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """End of the last top-level box of an MP4 file: each begins with its size (4 bytes) and its type."""
    end = 0
    while end < size:
        file.seek(end)
        head = file.read(16)
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        if length < 8 or not head[4:8].isalnum():
            # The last box may run to the end of the file (length 0); other players ignore what follows the boxes.
            return size
        end += length
    return end


def _end_of_segment(head: bytes) -> int | None:
    """End of the segment of a Matroska file, which follows its header; None where the size is left open."""
    length, start = _matroska_size(head, 4)
    segment = start + length
    if head[segment : segment + 4] != b"\x18\x53\x80\x67" or len(head) < segment + 12:
        return None
    length, start = _matroska_size(head, segment + 4)
    is_open = length + 1 == 1 << 7 * (start - segment - 4)
    return None if is_open else start + length


def _matroska_size(data: bytes, at: int) -> tuple[int, int]:
    """Size of an element and where its content starts: the leading zero bits of the size tell its number of bytes."""
    width = 9 - int.from_bytes(data[at : at + 1], "big").bit_length()
    return int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1), at + width
