"""The only place that opens a video file: frame indices, reading, errors. The decoders are those of decoders.py.

Frame i is the i-th that the file shows, upright, whatever its time: a variable frame rate changes nothing. All decoders
give the same pixels, bit for bit, except where frames are asked for smaller (see `open_video`).

A file that is missing, empty, truncated, not a video, or that the decoder fails on or hangs on is a VideoError. Flipped
bits that still decode are not seen: video codecs carry no checksums, and decoders conceal what they can.
"""

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import torch

from .deadline import Overdue, call_within
from .decoders import BACKENDS, DECODERS, Decoder, Header, decoders_of, header_of
from .video_processing_everest import FRAME_SAMPLINGS, frame_indices, segment_indices, stride_indices

__all__ = [
    "BACKENDS",
    "DECODERS",
    "FRAME_SAMPLINGS",
    "TIME_LIMIT",
    "Decoder",
    "VideoError",
    "VideoInfo",
    "decoders_of",
    "frame_indices",
    "open_video",
    "probe",
    "read_clip",
    "read_frames",
    "segment_indices",
    "stride_indices",
]

# Seconds after which opening a video, or reading frames of it, counts as hung.
TIME_LIMIT = 60.0


class VideoError(ValueError):
    """A video that cannot be read: `path` names it, `reason` says why, the message is both in one line."""

    def __init__(self, path, reason: str | None = None):
        if reason is None:
            # A DataLoader re-raises a worker's exception with its whole traceback as the one argument; the last
            # line of that is our own message.
            last_line = str(path).strip().splitlines()[-1]
            path, _, reason = last_line.split(f"{type(self).__name__}: ", 1)[-1].partition(": ")
        self.path, self.reason = str(path), " ".join(str(reason).split())
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self):
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class VideoInfo:
    """Number of frames, frames a second, height and width in pixels, codec ("h264", …) and duration in seconds.

    `fps` and `duration` are 0 where the file does not tell.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    codec: str
    duration: float


# ---------------------------------------------------------------------- reading


class _Video:
    """An open video. Every failure is a VideoError that names it."""

    def __init__(
        self,
        source: str | bytes,
        name: str,
        decoders: Sequence[type[Decoder]],
        short_side: int | None,
        time_limit: float,
    ):
        self.name, self._time_limit = name, time_limit
        _check_source(source, name)
        self.header, self._decoder = self._guard(_open, source, decoders, short_side)
        if self.num_frames < 1:
            raise VideoError(name, "it has no frames")

    @property
    def num_frames(self) -> int:
        return self._decoder.num_frames

    @property
    def fps(self) -> float:
        return self.header.fps

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the frames at `indices`, uint8 (T, H, W, C); an index may come several times, in any order."""
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise VideoError(self.name, f"frames {list(indices)} asked for; it has frames 0 to {self.num_frames - 1}")
        frames = self._guard(self._decoder.read, wanted)
        if len(frames) != len(wanted):
            raise VideoError(self.name, f"the decoder gave {len(frames)} of {len(wanted)} frames")
        if wanted == list(indices):
            return frames
        return frames[torch.searchsorted(torch.tensor(wanted), torch.tensor(indices))]

    def _guard(self, function: Callable, *args):
        try:
            return _within(self._time_limit, self.name, function, *args)
        except (ImportError, VideoError):
            # A decoder that is not installed is no fault of the video.
            raise
        except Exception as error:
            raise VideoError(self.name, _reason(error)) from error


def _within(seconds: float, name: str, function: Callable, *args):
    try:
        return call_within(seconds, function, *args)
    except Overdue:
        raise VideoError(name, f"took longer than {seconds:g} s") from None


def _open(source: str | bytes, decoders: Sequence[type[Decoder]], short_side: int | None) -> tuple[Header, Decoder]:
    header = header_of(source)
    decoder = next(decoder for decoder in decoders if not header.obstacles & decoder.obstacles)
    return header, decoder(source, _smaller(header.height, header.width, short_side), header)


def _smaller(height: int, width: int, short_side: int | None) -> tuple[int, int] | None:
    """Return the size (height, width) scaled to a short side, or None where it is not larger."""
    if short_side is None or min(height, width) <= short_side:
        return None
    scale = Fraction(short_side, min(height, width))
    return round(height * scale), round(width * scale)


def open_video(
    source: str | os.PathLike | bytes,
    *,
    name: str | None = None,
    backend: str = "decord",
    short_side: int | None = None,
    time_limit: float = TIME_LIMIT,
) -> _Video:
    """Open a video given by path or as the bytes of a file; it has num_frames, fps and read(indices).

    Args:
        name: what errors call it, by default its path.
        backend: "decord", "pyav", "torchcodec", or "auto" for the fastest that finds the frames of this video.
        short_side: pixels of the short side that are enough. Frames of larger videos may come scaled down to it, in
            their aspect ratio, where the decoder is faster for it: decord and pyav are. What is then cut out of a
            frame has been scaled twice, by different filters; its content stays the same.
        time_limit: seconds after which opening, or a reading, counts as hung; 0 for no limit.

    Raises:
        VideoError: whatever goes wrong, with path and reason.
        ValueError: the backend is unknown, or cannot be loaded.
    """
    source, name = source if isinstance(source, bytes) else os.fspath(source), name or _name_of(source)
    return _Video(source, name, decoders_of(backend), short_side, time_limit)


def _name_of(source: str | os.PathLike | bytes) -> str:
    return f"<{len(source)} bytes of video>" if isinstance(source, bytes) else os.fspath(source)


def probe(source: str | os.PathLike | bytes, **kwargs) -> VideoInfo:
    """Open a video, decode its first frame and return its VideoInfo; arguments and errors as in `open_video`."""
    video = open_video(source, **kwargs)
    height, width = video.read([0]).shape[1:3]
    seconds = video.header.duration or (video.num_frames / video.fps if video.fps else 0.0)
    return VideoInfo(video.num_frames, video.fps, height, width, video.header.codec, seconds)


def read_frames(source: str | os.PathLike | bytes, indices: Sequence[int], **kwargs) -> torch.Tensor:
    """Return the frames at `indices`, uint8 (T, H, W, C); other arguments and errors as in `open_video`."""
    return open_video(source, **kwargs).read(indices)


def read_clip(
    source: str | os.PathLike | bytes,
    indices_of: Callable[[int], Sequence[int]],
    *,
    name: str | None = None,
    time_limit: float = TIME_LIMIT,
    **kwargs,
) -> torch.Tensor:
    """Return a clip uint8 (T, C, H, W) of the frames at indices_of(number of frames of the video).

    Other arguments and errors as in `open_video`; the time limit is one for opening and reading.
    """
    name = name or _name_of(source)

    def read() -> torch.Tensor:
        video = open_video(source, name=name, time_limit=0, **kwargs)
        return video.read(indices_of(video.num_frames))

    # In one call: decord decodes ahead as soon as it is open, and to wait for it again costs a millisecond or two.
    frames = _within(time_limit, name, read)
    # A view: channels stay last in memory, where uint8 resizing is fastest.
    return frames.permute(0, 3, 1, 2)  # (T, C, H, W)


# ---------------------------------------------------------------------- reasons


def _check_source(source: str | bytes, name: str) -> None:
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


def _reason(error: Exception) -> str:
    """First line of a decoder's message, without the places in its source and the call stack that follows."""
    text = getattr(error, "strerror", None) or str(error)
    first_line = next(iter(text.strip().splitlines()), "") or type(error).__name__
    what = re.sub(r"\[[0-9:]+\] \S+:[0-9]+: |^\w+, \S+:[0-9]+, ", "", first_line)
    return f"cannot be decoded: {what}"
