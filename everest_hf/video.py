"""The only place that opens a video file: frame indices, reading, errors.

A file that is missing, empty, truncated, not a video, or that the decoder fails on is a VideoError. Flipped bits that
still decode are not seen: video codecs carry no checksums, and decoders conceal what they can.
"""

import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import av
import torch

from .video_processing_everest import FRAME_SAMPLINGS, frame_indices, segment_indices, stride_indices

__all__ = [
    "DECODERS",
    "FRAME_SAMPLINGS",
    "Decoder",
    "VideoError",
    "VideoInfo",
    "frame_indices",
    "open_video",
    "probe",
    "read_clip",
    "read_frames",
    "segment_indices",
    "stride_indices",
]


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
    """Number of frames, frames a second, height and width in pixels, codec ("h264", …) and duration in seconds."""

    num_frames: int
    fps: float
    height: int
    width: int
    codec: str
    duration: float


# ---------------------------------------------------------------------- decoders


class Decoder(Protocol):
    """What a backend offers. It may raise anything: `open_video` turns it into a VideoError."""

    num_frames: int
    fps: float

    def __init__(self, source: str | bytes): ...

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the frames at `indices`, uint8 (T, H, W, C)."""


class DecordDecoder:
    """decord (packages decord2 or decord)."""

    def __init__(self, source: str | bytes):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        with _as_file(source) as path:
            try:
                # One thread: the data loader's workers are the parallelism. Without fault_tol, decord puts a
                # neighbour in the place of a frame that it cannot decode, and says nothing.
                self._reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
            except RuntimeError as error:
                raise ValueError("not a video, or one that decord does not know or finds damaged") from error
        self.num_frames = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self._reader.get_batch(list(indices)).asnumpy())


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


def _codec_and_duration(source: str | bytes) -> tuple[str, float | None]:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with av.open(file, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream.duration is not None:
            return stream.codec.canonical_name, float(stream.duration * stream.time_base)
        seconds = None if container.duration is None else container.duration / av.time_base
        return stream.codec.canonical_name, seconds


DECODERS: dict[str, Callable[[str | bytes], Decoder]] = {"decord": DecordDecoder}


# ---------------------------------------------------------------------- reading


class _Video:
    """An open video. Every failure is a VideoError that names it."""

    def __init__(self, source, name: str, backend: str):
        self.name, self._source = name, source
        _check_source(source, name)
        self._decoder = self._guard(DECODERS[backend], source)
        if self.num_frames < 1:
            raise VideoError(name, "it has no frames")

    @property
    def num_frames(self) -> int:
        return self._decoder.num_frames

    @property
    def fps(self) -> float:
        return self._decoder.fps

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

    def codec_and_duration(self) -> tuple[str, float]:
        """Return the codec's name and the duration in seconds that the file states, or that its frames give."""
        codec, seconds = self._guard(_codec_and_duration, self._source)
        return codec, seconds or self.num_frames / self.fps

    def _guard(self, function: Callable, *args):
        try:
            return function(*args)
        except ImportError:
            # A decoder that is not installed is no fault of the video.
            raise
        except Exception as error:
            raise VideoError(self.name, _reason(error)) from error


def open_video(source: str | os.PathLike | bytes, *, name: str | None = None, backend: str = "decord") -> _Video:
    """Open a video given by path or as the bytes of a file; it has num_frames, fps and read(indices).

    `name` is what errors call it, by default its path. `backend` is a key of DECODERS.

    Raises:
        VideoError: whatever goes wrong, with path and reason.
    """
    if backend not in DECODERS:
        raise ValueError(f"video backend is {backend!r}; it must be one of {sorted(DECODERS)}")
    if isinstance(source, bytes):
        return _Video(source, name or f"<{len(source)} bytes of video>", backend)
    return _Video(os.fspath(source), name or os.fspath(source), backend)


def probe(source: str | os.PathLike | bytes, **kwargs) -> VideoInfo:
    """Open a video, decode its first frame and return its VideoInfo; arguments and errors as in `open_video`."""
    video = open_video(source, **kwargs)
    height, width = video.read([0]).shape[1:3]
    codec, duration = video.codec_and_duration()
    return VideoInfo(video.num_frames, video.fps, height, width, codec, duration)


def read_frames(source: str | os.PathLike | bytes, indices: Sequence[int], **kwargs) -> torch.Tensor:
    """Return the frames at `indices`, uint8 (T, H, W, C); other arguments and errors as in `open_video`."""
    return open_video(source, **kwargs).read(indices)


def read_clip(source: str | os.PathLike | bytes, indices_of: Callable[[int], Sequence[int]], **kwargs) -> torch.Tensor:
    """Return a clip uint8 (T, C, H, W) of the frames at indices_of(number of frames of the video).

    Other arguments and errors as in `open_video`.
    """
    video = open_video(source, **kwargs)
    # A view: channels stay last in memory, where uint8 resizing is fastest.
    return video.read(indices_of(video.num_frames)).permute(0, 3, 1, 2)  # (T, C, H, W)


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
    width = 9 - data[at].bit_length()
    return int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1), at + width


def _reason(error: Exception) -> str:
    """First line of a decoder's message, without the places in its source and the call stack that follows."""
    first_line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    what = re.sub(r"\[[0-9:]+\] \S+:[0-9]+: ", "", first_line)
    return f"cannot be decoded: {what}"
