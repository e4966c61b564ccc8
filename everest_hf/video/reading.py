"""Reading frames of a video by their numbers, with the decoder that finds them in this file.

Frame i is the i-th that the file shows, upright, whatever its time: a variable frame rate changes nothing. Of a file
that `everest-hf prepare` wrote, it is the i-th of the source, wherever that lies in the file. All decoders give the
same pixels, bit for bit, except where frames are asked for smaller (see `open_video`).

A file that is missing, empty, truncated, not a video, or that the decoder fails on or hangs on is a VideoError. Flipped
bits that still decode are not seen: video codecs carry no checksums, and decoders conceal what they can.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from ..video_reading_everest import MAX_PIXELS, TIME_LIMIT, FrameRuns, check_pixels
from .containers import Header, check_source, header_of
from .decoders import Decoder, decoders_of
from .errors import NotKeptError, VideoError
from .isolation import Overdue, call_within
from .pictures import PictureDecoder, is_folder_of_pictures, picture_header
from .segments import Segment

# Frames that are decoded one after another in a call, and the pixels that they have at most, 16 frames of 1920 x 1080.
FRAMES_OF_A_BLOCK, PIXELS_OF_A_BLOCK = 32, 2**25


@dataclass(frozen=True)
class VideoInfo:
    """Number of frames, frames a second, height and width in pixels, codec ("h264", …) and duration in seconds.

    `fps` and `duration` are 0 where the file does not tell. runs: how it holds the frames, see `FrameRuns`; None for a
    file that shows them in order.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    codec: str
    duration: float
    runs: FrameRuns | None = None


# ---------------------------------------------------------------------- reading


class _Video:
    """An open video, or a segment of one as if it were a whole. Every failure is a VideoError that names the video."""

    def __init__(
        self,
        source: str | bytes,
        name: str,
        decoders: Sequence[type[Decoder]],
        short_side: int | None,
        time_limit: float,
        max_pixels: int,
        segment: Segment | None,
    ):
        self.name, self._time_limit, self._max_pixels = name, time_limit, max_pixels
        if not is_folder_of_pictures(source):
            check_source(source, name)
        self.header, self._decoder = self._guard(_open, source, decoders, short_side, max_pixels)
        if self._decoder.num_frames < 1:
            raise VideoError(name, "it has no frames")
        self._runs = self.header.runs
        self._num_all = self._runs.num_frames if self._runs else self._decoder.num_frames
        self.frames = self._frames_of(segment)

    def _frames_of(self, segment: Segment | None) -> range:
        """Return which of the file's frames, or of its source's, are those of this video."""
        if segment is None:
            return range(self._num_all)
        try:
            return segment.frames_in(self._num_all, self.header)
        except ValueError as error:
            raise VideoError(self.name, str(error)) from error

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def fps(self) -> float:
        return self.header.fps

    def seconds_of(self, indices: Sequence[int]) -> list[float] | None:
        """Return when the file, or its source, shows what `read` returns for `indices`, in seconds from its first frame.

        Without times in the container, frame i is shown at i / fps. Returns None where there is no rate either.
        """
        times, unit, fps = self.header.times, self.header.time_base, self.header.fps
        places = [self.frames[i] for i in indices]
        if self._runs:
            places = [self._runs.shown_for(place) for place in places]
        if times and unit and len(times) == self._num_all:  # not so where an edit list hides frames
            return [float((times[place] - times[0]) * unit) for place in places]
        return [place / fps for place in places] if fps else None

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the frames at `indices`, uint8 (T, H, W, C); an index may come several times, in any order."""
        if not len(indices) or min(indices) < 0 or max(indices) >= self.num_frames:
            raise VideoError(self.name, f"frames {list(indices)} asked for; it has frames 0 to {self.num_frames - 1}")
        places = [self.frames[i] for i in indices]
        if self._runs:
            places = [self._runs.place_of(i) for i in places]
        wanted = sorted(set(places))
        frames = self._guard(self._read, wanted)
        if len(frames) != len(wanted):
            raise VideoError(self.name, f"the decoder gave {len(frames)} of {len(wanted)} frames")
        if wanted == places:
            return frames
        return frames[torch.searchsorted(torch.tensor(wanted), torch.tensor(places))]

    def read_clip(self, indices: Sequence[int], num_clips: int = 1) -> torch.Tensor:
        """Return the frames of clips of one length, one after another, as `read`.

        Raises:
            VideoError: as `read`. NotKeptError: the file does not have the frames of a clip (`FrameRuns.check_clip`).
        """
        if self._runs:
            places, length = [self.frames[i] for i in indices], len(indices) // num_clips
            for start in range(0, len(places), length):
                check_kept(self.name, self._runs, places[start : start + length], self.frames[-1])
        return self.read(indices)

    def read_blocks(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the frames at `indices`, which rise, in blocks of uint8 (n, H, W, C) that fit in memory.

        No frame is decoded twice, however long the video is. The time limit and max_pixels hold for each block.

        Raises:
            VideoError: as `read`. NotKeptError: as `read_clip`.
        """
        at_most = min(PIXELS_OF_A_BLOCK, self._max_pixels or PIXELS_OF_A_BLOCK)
        size = max(1, min(FRAMES_OF_A_BLOCK, at_most // (self.header.height * self.header.width)))
        blocks = [indices[i : i + size] for i in range(0, len(indices), size)]
        if self._runs:  # the file has them in another order
            yield from map(self.read_clip, blocks)
            return
        blocks = [[self.frames[i] for i in block] for block in blocks]
        self._guard(check_pixels, len(blocks[0]), self.header.height, self.header.width, self._max_pixels)
        frames = self._guard(self._decoder.read_blocks, blocks)
        for block in blocks:
            found = self._guard(next, frames, ())
            if len(found) != len(block):
                raise VideoError(self.name, f"the decoder gave {len(found)} of {len(block)} frames")
            yield found

    def _read(self, wanted: list[int]) -> torch.Tensor:
        check_pixels(len(wanted), self.header.height, self.header.width, self._max_pixels)
        return self._decoder.read(wanted)

    def _guard(self, function: Callable, *args):
        try:
            return _within(self._time_limit, self.name, function, *args)
        except (ImportError, VideoError):
            # A decoder that is not installed is no fault of the video.
            raise
        except Exception as error:
            raise VideoError(self.name, reason_of(error)) from error


def check_kept(name: str, runs: FrameRuns, indices: Sequence[int], last: int) -> None:
    """Raise a NotKeptError that calls the video `name` where `FrameRuns.check_clip` raises."""
    try:
        runs.check_clip(indices, last)
    except ValueError as error:
        raise NotKeptError(name, str(error)) from error


def _within(seconds: float, name: str, function: Callable, *args):
    try:
        return call_within(seconds, function, *args)
    except Overdue:
        raise VideoError(name, f"took longer than {seconds:g} s") from None


def _open(
    source: str | bytes, decoders: Sequence[type[Decoder]], short_side: int | None, max_pixels: int
) -> tuple[Header, Decoder]:
    if is_folder_of_pictures(source):
        header = picture_header(source, max_pixels)
        return header, PictureDecoder(source, header=header)
    header = header_of(source, max_pixels)
    kind = next(decoder for decoder in decoders if not header.obstacles & decoder.obstacles)
    decoder = kind(source, _smaller(header.height, header.width, short_side), header)
    if header.runs:
        header.runs.check_stored(decoder.num_frames)
        header = _of_source(header, header.runs)
    return header, decoder


def _of_source(header: Header, runs: FrameRuns) -> Header:
    """Return a header with rate, duration and times of the frames of the source, which are even."""
    times, unit = header.times, header.time_base
    if isinstance(times, range) and unit:
        step = times.step if len(times) > 1 else 1
        first = times.start * runs.stretch
        times, unit = range(first, first + runs.num_frames * step, step), unit / runs.stretch
    fps = header.fps * runs.stretch
    duration = runs.num_frames / fps if fps else header.duration
    return replace(header, fps=fps, duration=duration, times=times, time_base=unit)


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
    backend: str = "auto",
    short_side: int | None = None,
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
    segment: Segment | None = None,
) -> _Video:
    """Open a video, and return an object with num_frames, fps, read(indices) and seconds_of(indices).

    Its `frames` are the range of the file's frames that it holds: all of them, or those of the segment.

    Args:
        source: the path of a file, the path of a folder of frames, or the bytes of a file.
        name: what errors call it, by default its path.
        backend: "decord", "pyav", "torchcodec", or "auto" for the fastest that finds the frames of this video.
        short_side: pixels of the short side that are enough. decord and pyav, which are faster for it, then scale the
            frames of larger videos down to it, in their aspect ratio. A crop that is resized later has then been scaled
            twice, by different filters; it shows the same part of the frame.
        time_limit: seconds after which opening, or a reading, counts as hung; 0 for no limit.
        max_pixels: frames x height x width of a reading that is not refused before anything is decoded; 0 for no limit.
        segment: the part that is opened: its first frame is frame 0.

    Raises:
        VideoError: whatever goes wrong, with path and reason.
        ValueError: the backend is unknown, or cannot be loaded.
    """
    name = name or _name_of(source)
    if not isinstance(source, bytes):
        source = os.path.abspath(source)  # decoders take a relative path such as "concat:a|b" for an address
    return _Video(source, name, decoders_of(backend), short_side, time_limit, max_pixels, segment)


def _name_of(source: str | os.PathLike | bytes) -> str:
    return f"<{len(source)} bytes of video>" if isinstance(source, bytes) else os.fspath(source)


def probe(source: str | os.PathLike | bytes, *, segment: Segment | None = None, **kwargs) -> VideoInfo:
    """Open a video, decode its first frame and return its VideoInfo; arguments and errors as in `open_video`."""
    video = open_video(source, segment=segment, **kwargs)
    height, width = video.read([0]).shape[1:3]
    told = video.header.duration if segment is None else None
    seconds = told or (video.num_frames / video.fps if video.fps else 0.0)
    return VideoInfo(video.num_frames, video.fps, height, width, video.header.codec, seconds, video.header.runs)


def read_frames(source: str | os.PathLike | bytes, indices: Sequence[int], **kwargs) -> torch.Tensor:
    """Return the frames at `indices`, uint8 (T, H, W, C); other arguments and errors as in `open_video`."""
    return open_video(source, **kwargs).read(indices)


def read_clip(
    source: str | os.PathLike | bytes,
    indices_of: Callable[[int], Sequence[int]],
    *,
    num_clips: int = 1,
    name: str | None = None,
    time_limit: float = TIME_LIMIT,
    **kwargs,
) -> torch.Tensor:
    """Return a clip uint8 (T, C, H, W) of the frames at indices_of(number of frames of the video).

    num_clips: how many clips of one length these frames are, one after another.

    Other arguments and errors as in `open_video`; the time limit is one for opening and reading.
    """
    name = name or _name_of(source)

    def read() -> torch.Tensor:
        video = open_video(source, name=name, time_limit=0, **kwargs)
        return video.read_clip(indices_of(video.num_frames), num_clips)

    # In one call: decord decodes ahead as soon as it is open, and waiting for it a second time costs a millisecond or
    # two.
    frames = _within(time_limit, name, read)
    # A view: channels stay last in memory, where uint8 resizing is fastest.
    return frames.permute(0, 3, 1, 2)  # (T, C, H, W)


# ---------------------------------------------------------------------- reasons


def reason_of(error: Exception) -> str:
    """First line of a decoder's message, without the places in its source and the call stack that follows."""
    text = getattr(error, "strerror", None) or str(error)
    first_line = next(iter(text.strip().splitlines()), "") or type(error).__name__
    what = re.sub(r"\[[0-9:]+\] \S+:[0-9]+: |^\w+, \S+:[0-9]+, ", "", first_line)
    return f"cannot be decoded: {what}"
