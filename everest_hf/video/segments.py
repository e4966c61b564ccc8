"""A part of a video, by the seconds or the frames at which it starts and ends."""

from bisect import bisect_left
from dataclasses import dataclass

from .containers import Header

# What the start and the end of a segment are called, in seconds and in frames.
SECONDS, FRAMES = ("start", "end"), ("start_frame", "end_frame")
# Seconds by which a segment may end after its video: annotations give whole seconds.
OVERHANG = 1.0


@dataclass(frozen=True)
class Segment:
    """The frames of a video from `start` on, up to `end` and without it.

    start, end: in seconds from the first frame, or with in_frames as numbers of frames from 0. where: what errors call
    the place that gives the segment, such as the line of a list.
    """

    start: float
    end: float
    in_frames: bool = False
    where: str = ""

    @property
    def columns(self) -> tuple[str, str]:
        """What its start and its end are called."""
        return FRAMES if self.in_frames else SECONDS

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g}" + (" (frames)" if self.in_frames else " s")

    def frames_in(self, num_frames: int, header: Header) -> range:
        """Return the numbers of its frames in a video of `num_frames` frames.

        A time is that of the container, to the nearest of its units; where it tells none, frame i is shown at i / fps.

        Raises:
            ValueError: the segment holds no frame, or ends after the video (in seconds: by more than OVERHANG).
        """
        if self.in_frames:
            first, stop = int(self.start), int(self.end)
            there, is_beyond = f"{num_frames} frames", self.end > num_frames
        else:
            first, stop, seconds = self._places(num_frames, header)
            there, is_beyond = f"{seconds:.4g} s", self.end > seconds + OVERHANG
        if first >= num_frames or is_beyond:
            raise ValueError(self._named(f"is not in the video, which has {there}"))
        if first >= stop:
            raise ValueError(self._named("holds no frame; make it longer"))
        return range(first, stop)

    def _places(self, num_frames: int, header: Header) -> tuple[int, int, float]:
        """Return the first frame, the one after the last, and the seconds of the video."""
        times, unit = header.times, header.time_base
        if times and unit and len(times) == num_frames:  # not so where an edit list hides frames
            first, stop = (bisect_left(times, times[0] + round(x / unit)) for x in (self.start, self.end))
            return first, stop, float((times[-1] - times[0]) * unit) + (1 / header.fps if header.fps else 0.0)
        if not header.fps:
            raise ValueError(
                self._named("is in seconds, and the video tells no times; give start_frame and end_frame")
            )
        first, stop = (round(x * header.fps) for x in (self.start, self.end))
        return first, min(stop, num_frames), num_frames / header.fps

    def _named(self, what: str) -> str:
        return f"{self.where}: the segment {self} {what}".removeprefix(": ")
