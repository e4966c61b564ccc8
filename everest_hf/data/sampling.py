"""How the frames of a clip are chosen from those of a video."""

from dataclasses import dataclass

import torch

from ..video import frame_indices


@dataclass(frozen=True)
class Sampling:
    """How frames are sampled; see `everest_hf.video.frame_indices` for what the fields mean."""

    num_frames: int
    frame_step: int = 1
    num_input_frames: int | None = None
    frame_sampling: str = "stride"

    @property
    def frames_read(self) -> int:
        """Frames of a clip as they are read."""
        return self.num_input_frames or self.num_frames

    @property
    def span(self) -> int:
        """Frames that a video must have so that a clip repeats none at its end."""
        if self.frame_sampling == "segment":
            return self.frames_read
        return (self.frames_read - 1) * self.num_frames * self.frame_step // self.frames_read + 1

    def drawn(self, num_video_frames: int, generator: torch.Generator) -> list[int]:
        """Return the frames of a training clip, drawn from a video of `num_video_frames` frames."""
        return self._indices(num_video_frames, generator=generator)

    def views(self, num_video_frames: int, num_segments: int) -> list[int]:
        """Return the frames of evaluation's `num_segments` clips, one clip after another."""
        of_segments = (
            self._indices(num_video_frames, segment=k, num_segments=num_segments) for k in range(num_segments)
        )
        return [i for indices in of_segments for i in indices]

    def _indices(self, num_video_frames: int, **which) -> list[int]:
        return frame_indices(
            num_video_frames=num_video_frames,
            num_frames=self.num_frames,
            frame_step=self.frame_step,
            num_input_frames=self.num_input_frames,
            frame_sampling=self.frame_sampling,
            **which,
        )
