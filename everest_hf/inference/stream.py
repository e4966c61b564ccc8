"""A model's output on the newest window of frames that keep coming."""

from collections import deque
from itertools import count

import numpy as np
import torch

from ..modeling_everest import EverestPreTrainedModel
from ..video_processing_everest import EverestVideoProcessor
from .slots import Slot, SlotEncoder
from .video_windows import WindowOutput, checked_windows


class EverestStream:
    """Takes frames as they come, and gives the model's output on the newest window of them.

    It holds the embedded tokens of one window, num_frames / tubelet_size slots, and embeds each new slot once. A window
    begins every tubelet_size * frame_step frames; its output is that of `everest_hf.windows` with this stride on a file
    of the same frames.

    Args:
        model: an `EverestForVideoClassification` or `EverestModel` in evaluation mode, without frame selection.
        processor: its `EverestVideoProcessor`.
        frame_step: as in the processor, whose own is the default.
        keep_ratio: as in the model's forward.

    Raises:
        ValueError: the model cannot do this, or an argument is out of range.
    """

    def __init__(
        self,
        model: EverestPreTrainedModel,
        processor: EverestVideoProcessor,
        *,
        frame_step: int | None = None,
        keep_ratio: float | None = None,
    ):
        self._encoder = SlotEncoder(model, keep_ratio)
        self._processor = processor
        self.frame_step: int = checked_windows(model, processor, frame_step=frame_step)["frame_step"]
        self._numbers = count()  # of the frames that come
        self._waiting: list[tuple[int, torch.Tensor]] = []  # frames of the slot that is not whole
        self._slots: deque[tuple[list[int], Slot]] = deque(maxlen=self._encoder.num_slots)

    @property
    def frames_of_window(self) -> int:
        """How many frames a window has."""
        return self._encoder.config.num_frames

    def push(self, frames: np.ndarray | torch.Tensor) -> WindowOutput | None:
        """Take frames, uint8 (n, H, W, C) or one (H, W, C), and return the output on the newest window.

        None where no window has become whole. Where several have, in one call, only the newest is encoded.

        Raises:
            ValueError: the frames do not fit.
        """
        return self.output() if self.add(frames) else None

    def add(self, frames: np.ndarray | torch.Tensor) -> bool:
        """Take frames as `push` does, and say whether a window has become whole; nothing is encoded."""
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.ndim != 4:
            raise ValueError(
                f"frames have the shape {tuple(frames.shape)}; expected (frames, height, width, channels)"
            )
        numbered = [(number, place) for place, number in zip(range(len(frames)), self._numbers, strict=False)]
        wanted = [(number, place) for number, place in numbered if number % self.frame_step == 0]
        if not wanted:
            return False
        chosen = frames[[place for _, place in wanted]]
        pixels = self._processor(chosen, do_sample_frames=False, return_tensors="pt")["pixel_values"][0]
        whole = [self._add(number, frame) for (number, _), frame in zip(wanted, pixels, strict=True)]
        return any(whole) and len(self._slots) == self._encoder.num_slots

    def _add(self, number: int, frame: torch.Tensor) -> bool:
        """Take a frame (C, H, W), and say whether a slot has become whole."""
        self._waiting.append((number, frame))
        if len(self._waiting) < self._encoder.config.tubelet_size:
            return False
        numbers, pixels = zip(*self._waiting, strict=True)
        self._waiting = []
        before = self._slots[-1][1] if self._slots else None
        self._slots.append((list(numbers), self._encoder.embed(torch.stack(pixels), before)))
        return True

    def output(self) -> WindowOutput | None:
        """Return the output on the newest whole window, None before the first one; the numbers of its frames count all
        frames that came.
        """
        if len(self._slots) < self._encoder.num_slots:
            return None
        features, logits = self._encoder.encode([[slot for _, slot in self._slots]])
        numbers = [number for numbers, _ in self._slots for number in numbers]
        return WindowOutput(numbers, None, None, features[0], None if logits is None else logits[0])
