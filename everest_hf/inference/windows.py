"""The frames of a video that a model takes at a time, with their places in the video: one window, or one after another."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.video_utils import VideoMetadata

from ..data import source_of
from ..video import MAX_PIXELS, TIME_LIMIT, VideoError, frame_indices, open_video
from .classify import WEB

# Seconds by which a frame may come before the start that is asked for: times are rounded when they are printed.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Window:
    """A clip for a model.

    pixel_values: (1, T, C, H, W). frames: the number (T,) of each frame in the video. seconds: when the video shows
    each, (T,), or None where the file tells no times. first_new: the first frame that no window before this one has.
    """

    pixel_values: torch.Tensor
    frames: list[int]
    seconds: list[float] | None
    first_new: int = 0


class WindowReader:
    """The windows of a video, each read when its turn comes.

    There is one window, the centre view as the processor samples it. With `start` (seconds) the window begins at the
    first frame that is shown then or later. With `whole`, windows follow one another from the start to the end of the
    video; the last one moves back until the video fills it. A processor that spreads its frames over the whole video
    (frame_sampling "segment") spreads them over all that follows the start, in one window.

    video: a file or URL. time_limit, max_pixels: see `everest_hf.video.open_video`.

    Raises:
        VideoError: the video cannot be read, has no frame at `start`, or tells no times although `start` is given.
    """

    def __init__(
        self,
        processor,
        video: str,
        *,
        start: float | None = None,
        whole: bool = False,
        time_limit: float = TIME_LIMIT,
        max_pixels: int = MAX_PIXELS,
    ):
        source = source_of(video, url_schemes=WEB, time_limit=time_limit)
        self._processor, self._video = processor, open_video(**source, time_limit=time_limit, max_pixels=max_pixels)
        num_frames = self._video.num_frames
        if start is None and not whole:
            metadata = VideoMetadata(total_num_frames=num_frames, video_backend="everest_hf")
            self._places = [processor.sample_frames(metadata)]
        else:
            self._places = _places(processor, num_frames, self._first_frame(video, start or 0.0))
        if not whole:
            del self._places[1:]

    def _first_frame(self, video: str, start: float) -> int:
        if start == 0:
            return 0
        seconds = self._video.seconds_of(range(self._video.num_frames))
        if seconds is None:
            raise VideoError(video, "tells no times, so that it can only be read from its first frame on")
        first = bisect_left(seconds, start - TOLERANCE)
        if first == len(seconds):
            raise VideoError(video, f"shows no frame at {start:g} s or later; its last is at {seconds[-1]:.4g} s")
        return first

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Window]:
        last = -1
        for places in self._places:
            frames = self._video.read_clip(places).numpy()  # (T, H, W, C)
            pixel_values = self._processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"]
            yield Window(pixel_values, places, self._video.seconds_of(places), bisect_left(places, last + 1))
            last = places[-1]


def _places(processor, num_frames: int, first: int) -> list[list[int]]:
    """Return the numbers of the frames of each window, from frame `first` of a video of `num_frames` to its end."""
    follow, rest = processor.frame_sampling == "stride", num_frames - first
    span = min(processor.num_frames * processor.frame_step, rest) if follow else rest
    offsets = frame_indices(
        num_video_frames=span,
        num_frames=processor.num_frames,
        num_input_frames=processor.num_input_frames,
        frame_step=processor.frame_step,
        frame_sampling=processor.frame_sampling,
        num_segments=2 if follow else 1,  # with strides, the first of two views begins at the first frame
    )
    starts = (first + min(start, rest - span) for start in range(0, rest, span))
    return [[start + offset for offset in offsets] for start in starts]


def read_window(processor, video: str, **opening) -> Window:
    """Return the window that `WindowReader`, with the same arguments and errors, reads first."""
    return next(iter(WindowReader(processor, video, **opening)))
