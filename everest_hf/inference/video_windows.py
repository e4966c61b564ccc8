"""A model's outputs on overlapping windows of a long video, of which each frame is decoded and embedded once."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..data import source_of
from ..modeling_everest import EverestPreTrainedModel
from ..video import MAX_PIXELS, TIME_LIMIT, VideoError, open_video
from ..video_processing_everest import EverestVideoProcessor
from .classify import WEB
from .slots import Slot, SlotEncoder
from .windows import TOLERANCE


@dataclass(frozen=True)
class WindowOutput:
    """A model's output on one window of a video.

    frames: the number (T,) of each frame of the window in the video. seconds: when the video shows each, (T,), and
    center: the middle of the window, both None where the file tells no times. features: (D,) float32, see
    `everest_hf.inference.feature_function`. logits: (num_labels,) float32 of a classifier, else None.
    """

    frames: list[int]
    seconds: list[float] | None
    center: float | None
    features: torch.Tensor
    logits: torch.Tensor | None


class VideoWindows:
    """The windows of an open video, and, iterated, a `WindowOutput` for each; see `windows`.

    num_frames: of the video, at `fps` frames a second (0 where the file tells no rate). stride, frame_step, span: in
    these frames. centers: the second of the middle of each window, None where there is no rate.
    """

    def __init__(
        self,
        encoder: SlotEncoder,
        processor,
        video,
        *,
        stride: int,
        frame_step: int,
        fps: float | None,
        batch_size: int,
    ):
        self.video = video
        self._encoder, self._processor, self._batch_size = encoder, processor, batch_size
        self._places = range(self.video.num_frames) if fps is None else _resampled(self.video, fps)
        self.num_frames, self.fps = len(self._places), fps or self.video.fps
        self.stride, self.frame_step = stride, frame_step
        self.span = (encoder.config.num_frames - 1) * frame_step + 1

    def __len__(self) -> int:
        return max(0, self.num_frames - self.span) // self.stride + 1

    def __iter__(self) -> Iterator[WindowOutput]:
        windows = self._windows()
        index = 0
        while batch := list(islice(windows, self._batch_size)):
            features, logits = self._encoder.encode(batch)
            for i in range(len(batch)):
                yield self._output(index, features[i], None if logits is None else logits[i])
                index += 1

    @property
    def centers(self) -> list[float] | None:
        return [self._center(index) for index in range(len(self))] if self.fps else None

    def _center(self, index: int) -> float:
        return (index * self.stride + self.span / 2) / self.fps

    def _output(self, index: int, features: torch.Tensor, logits: torch.Tensor | None) -> WindowOutput:
        frames = self._frames_at(index * self.stride, self._encoder.config.num_frames)
        center = self._center(index) if self.fps else None
        return WindowOutput(frames, self.video.seconds_of(frames), center, features, logits)

    def _frames_at(self, start: int, count: int) -> list[int]:
        """Return the numbers in the file of `count` frames from `start` on; the last one stands for those after it."""
        last = self.num_frames - 1
        return [self._places[min(start + i * self.frame_step, last)] for i in range(count)]

    def _windows(self) -> Iterator[list[Slot]]:
        """Yield the slots of each window. Frames and slots that no later window needs are let go."""
        config = self._encoder.config
        step = config.tubelet_size * self.frame_step  # from a slot to the next
        starts = range(0, len(self) * self.stride, self.stride)
        frames = _Frames(
            self._processor,
            self.video,
            sorted({frame for start in starts for frame in self._frames_at(start, config.num_frames)}),
        )
        slots: dict[int, Slot] = {}  # by first frame
        for start in starts:
            slots = {first: slot for first, slot in slots.items() if first >= start}
            frames.drop_before(self._frames_at(start, 1)[0])
            firsts = range(start, start + step * self._encoder.num_slots, step)
            for first in firsts:
                if first not in slots:
                    pixels = frames.at(self._frames_at(first, config.tubelet_size))
                    slots[first] = self._encoder.embed(pixels, slots.get(first - step))
            yield [slots[first] for first in firsts]


class _Frames:
    """The frames of a video at `numbers`, which rise, as the processor makes them: each is read once."""

    def __init__(self, processor, video, numbers: list[int]):
        self._processor = processor
        self._numbers, self._blocks = iter(numbers), video.read_blocks(numbers)
        self._there: dict[int, torch.Tensor] = {}

    def at(self, numbers: Iterable[int]) -> torch.Tensor:
        """Return frames (n, C, H, W), and read on until they are there."""
        while any(number not in self._there for number in numbers):
            frames = next(self._blocks).numpy()  # (n, H, W, C)
            pixels = self._processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"][0]
            self._there |= zip(islice(self._numbers, len(pixels)), pixels.unbind(), strict=True)
        return torch.stack([self._there[number] for number in numbers])

    def drop_before(self, number: int) -> None:
        self._there = {known: frame for known, frame in self._there.items() if known >= number}


def _resampled(video, fps: float) -> list[int]:
    """Return the number of the frame that a video shows at each of its moments 0, 1 / fps, 2 / fps …"""
    seconds = video.seconds_of(range(video.num_frames))
    if seconds is None or not video.fps:
        raise VideoError(video.name, f"tells no times, so that it cannot be read at fps={fps:g}")
    count = math.ceil((seconds[-1] + 1 / video.fps) * fps - TOLERANCE)
    return [bisect_right(seconds, i / fps + TOLERANCE) - 1 for i in range(max(1, count))]


def windows(
    model: EverestPreTrainedModel,
    processor: EverestVideoProcessor,
    video: str,
    *,
    stride: int | None = None,
    frame_step: int | None = None,
    fps: float | None = None,
    keep_ratio: float | None = None,
    batch_size: int = 8,
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
) -> VideoWindows:
    """Return the windows of a long video, with the model's output on each: `for window in windows(...)`.

    Windows begin at frames 0, stride, 2 * stride …; each spans (num_frames - 1) * frame_step + 1 frames, the last one
    ends in the video, and a video that is shorter is one window with its last frame repeated. Outputs are those of the
    model on each window alone, but each frame is decoded, scaled and embedded once, and memory does not grow with the
    length of the video. The `VideoWindows` has a length, num_frames, fps, stride, frame_step and span.

    Args:
        model: an `EverestForVideoClassification` or `EverestModel` in evaluation mode, without frame selection.
        processor: its `EverestVideoProcessor`.
        video: a file, folder of frames, or URL.
        stride: frames from a window to the next; by default a quarter of num_frames * frame_step.
        frame_step: as in the processor, whose own is the default.
        fps: frames a second at which the video is read, by default all of its frames. stride and frame_step count these.
        keep_ratio: as in the model's forward.
        batch_size: windows at a time.
        time_limit: see `everest_hf.video.open_video`.
        max_pixels: see `everest_hf.video.open_video`.

    Raises:
        ValueError: the model cannot do this, or an argument is out of range.
        VideoError: the video cannot be read; where this shows itself late in the file, after some windows.
    """
    encoder = SlotEncoder(model, keep_ratio)
    places = checked_windows(model, processor, stride, frame_step, fps, batch_size)
    source = source_of(video, url_schemes=WEB, time_limit=time_limit)
    return VideoWindows(
        encoder, processor, open_video(**source, time_limit=time_limit, max_pixels=max_pixels), **places
    )


def checked_windows(
    model: EverestPreTrainedModel,
    processor,
    stride: int | None = None,
    frame_step: int | None = None,
    fps: float | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Return the arguments of `windows` that say where windows are, and their number at a time, with defaults filled in.

    Raises:
        ValueError: one is out of range.
    """
    frame_step = frame_step_of(processor) if frame_step is None else frame_step
    if stride is None:
        stride = max(1, int(model.config.num_frames * frame_step // 4))
    counts = {"frame_step": frame_step, "stride": stride, "batch_size": batch_size}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps!r}; it must be a positive number")
    return {**counts, "fps": fps}


def frame_step_of(processor) -> int:
    """Return a processor's frame_step.

    Raises:
        ValueError: it samples by other rules, which fit no window.
    """
    if processor.frame_sampling != "stride":
        raise ValueError(
            f"the processor's frame_sampling is {processor.frame_sampling!r}, which spreads a clip over the whole video; "
            "give the frame_step of a window"
        )
    if processor.fps is not None:
        raise ValueError(
            f"the processor's fps is {processor.fps}; give the frame_step of a window, or fps and frame_step"
        )
    return processor.frame_step
