"""A classifier on frames that keep coming, and what it cost."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from ..video.live import LiveVideo
from .classify import top_labels
from .stream import EverestStream
from .video_windows import WindowOutput

# Seconds that an output waits at most for frames that are there already.
LATEST = 1.0


@dataclass(frozen=True)
class Sighting:
    """What a classifier says of a window: start and end, its seconds in the source; top, labels with scores; latency, the
    seconds since its last frame was there; dropped, the frames that were dropped until now.
    """

    start: float
    end: float
    top: list[tuple[str, float]]
    latency: float
    dropped: int


@dataclass
class Tally:
    """What watching has cost: frames that the model could take, those dropped among them, seconds of the source, outputs,
    and their latency in seconds: of all together, and the longest.
    """

    frames: int = 0
    dropped: int = 0
    seconds: float = 0.0
    outputs: int = 0
    latency: float = 0.0
    longest: float = 0.0

    def add(self, latency: float) -> None:
        """Take the latency of an output."""
        self.outputs, self.latency, self.longest = self.outputs + 1, self.latency + latency, max(self.longest, latency)

    def __str__(self) -> str:
        if not self.outputs:
            return f"ended after {self.seconds:.1f} s, before the first window was whole"
        memory = psutil.Process().memory_info().rss / 2**20
        return (
            f"ended after {self.seconds:.1f} s: {self.outputs} outputs, latency {self.latency / self.outputs:.2f} s (at "
            f"most {self.longest:.2f} s), {self.dropped} of {self.frames} frames dropped, {memory:.0f} MiB of memory"
        )


def watch(
    stream: EverestStream, video: LiveVideo, config, *, every: float, top_k: int, tally: Tally
) -> Iterator[Sighting]:
    """Yield a `Sighting` of the newest window every `every` seconds of the source, as long as frames come.

    Where the model is slower than that, there are fewer of them: frames that are there already are taken first.

    stream: with frame_step 1, where the video has it as its step. tally: is kept up to date.

    Raises:
        VideoError: the source cannot be read, or hangs.
    """
    taken: deque[tuple[float, float]] = deque(maxlen=2 * stream.frames_of_window)  # second and arrival of frames
    due, is_whole = 0.0, False
    for number, frame in enumerate(video):
        taken.append((frame.second, frame.arrived))
        is_whole = stream.add(frame.pixels) or is_whole
        tally.frames, tally.dropped, tally.seconds = video.read, video.dropped, frame.second
        late = frame.second - due
        if not is_whole or late < 0 or (video.waiting and late < LATEST):
            continue
        due, is_whole = frame.second + every, False
        output: WindowOutput = stream.output()  # type: ignore[assignment]  # a window is whole
        first, last = (taken[place - number - 1] for place in (output.frames[0], output.frames[-1]))
        top = top_labels(output.logits[None], config, top_k)  # type: ignore[index]  # a classifier has logits
        latency = time.monotonic() - last[1]
        tally.add(latency)
        yield Sighting(first[0], last[0], top, latency, video.dropped)
