"""Frames of a video in the order in which it shows them, upright, as FFmpeg's program `ffmpeg` gives them.

Reading from the first frame on is right for every file, and slow late in a long one; `everest_hf.video` knows which files
allow better. This file is copied beside a checkpoint as remote code: it imports nothing but PyAV and torch.
"""

import io
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch

try:
    import av
    import av.filter
except ImportError:  # whoever reads files needs it; the processor also takes arrays
    av = None  # type: ignore[assignment]


# Up to PyAV 18 metadata that is no UTF-8 is an error unless asked otherwise; later versions read it and take no such word.
_LENIENT: dict[str, Any] = (
    {} if av is None or int(av.__version__.split(".")[0]) > 18 else {"metadata_errors": "ignore"}
)
# Pixels of all frames that are decoded at a time, by default: 16 frames of 7680 x 4320, which take 1.6 GB.
MAX_PIXELS = 2**29
# Seconds after which fetching a video, opening it, or reading frames of it counts as hung, by default.
TIME_LIMIT = 60.0
# Formats that name other files or addresses, which FFmpeg would open in their place.
_REFERRING = {"avisynth", "concat", "dash", "hls", "image2", "imf", "rtsp", "sap", "sdp", "vapoursynth", "vobsub"}
FORMATS_OF_FILES = "" if av is None else ",".join(sorted(av.formats_available - _REFERRING))


def check_pixels(num_frames: int, height: int, width: int, max_pixels: int) -> None:
    """Raise a ValueError where frames that are decoded at a time have more pixels than may be (0: no limit)."""
    pixels = num_frames * height * width
    if 0 < max_pixels < pixels:
        raise ValueError(f"{num_frames} x {width} x {height} pixels are {pixels}, more than max_pixels={max_pixels}")


def open_container(source: "str | bytes") -> "av.container.InputContainer":
    """Open a video, given by path or as bytes, to read its packets. It may raise what PyAV raises.

    Nothing but this file is opened: a list of files or addresses is refused, whatever its name.
    """
    if av is None:
        raise ImportError("reading a video file needs the package av (pip install av)")
    # FFmpeg takes a relative path such as "concat:a|b" for an address.
    file = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
    return av.open(file, "r", options={"format_whitelist": FORMATS_OF_FILES}, **_LENIENT)


@contextmanager
def demuxer(source: str | bytes) -> "Iterator[tuple[av.container.InputContainer, av.VideoStream]]":
    """Open a video and give its container and its stream of pictures; covers of music and films are none.

    Raises:
        ValueError: it is not a video.
    """
    try:
        container = open_container(source)
    except av.error.FFmpegError as error:
        raise ValueError(f"not a video, or its header is damaged ({error.strerror})") from error
    with container:
        stream = best_stream(container)
        stream.codec_context.thread_count = 1  # the data loader's workers are the parallelism
        yield container, stream


def best_stream(container: "av.container.InputContainer") -> "av.VideoStream":
    covers = [s for s in container.streams.video if s.disposition & av.stream.Disposition.attached_pic]
    stream = container.streams.best("video")
    if stream in covers:
        stream = next((s for s in container.streams.video if s not in covers), None)
        if stream is None:
            raise ValueError("not a video: its only picture is a cover")
    if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
        raise ValueError("not a video: it has no stream of pictures, or one of an unknown kind")
    return stream


class FrameRuns(NamedTuple):
    """How a file of `everest-hf prepare --frame-step` holds the frames of its source: as runs of every step-th frame.

    The first run is frames 0, step, 2 step …, the next one 1, 1 + step …; of these runs the file has the first `phases`,
    one after another: all `step` of them, or 1. num_frames: of the source.
    """

    step: int
    phases: int
    num_frames: int

    @property
    def num_stored(self) -> int:
        """Frames that the file has."""
        return self.num_frames if self.phases > 1 else -(-self.num_frames // self.step)

    @property
    def stretch(self) -> int:
        """Frames of the source that pass while the file shows one."""
        return self.step if self.phases == 1 else 1

    def check_stored(self, count: int) -> None:
        """Raise a ValueError unless the file has as many frames as were written."""
        if count != self.num_stored:
            raise ValueError(
                f"has {count} of the {self.num_stored} frames that prepare wrote; prepare its source again"
            )

    def shown_for(self, index: int) -> int:
        """Return which frame of the source the file has for its frame `index`: with one run, the last up to there."""
        return index - index % self.stretch

    def place_of(self, index: int) -> int:
        """Return the place in the file of what it has for the source's frame `index`."""
        run = index % self.step if self.phases > 1 else 0
        return run * (self.num_frames // self.step) + min(run, self.num_frames % self.step) + index // self.step

    def check_clip(self, indices: Sequence[int], last: int) -> None:
        """Raise a ValueError unless the file has a clip's frames, or all of those that come equally many frames before.

        Frame `last`, which a clip repeats that is longer than its video, may be any.
        """
        clip = [i for i in indices if i != last]
        wrong = next((i - clip[0] for i in clip if (i - clip[0]) % self.step), None)
        if self.phases == 1 and wrong:
            raise ValueError(
                f"was prepared with one frame of {self.step} (--phases 1), and a clip takes the frame {wrong} after its "
                f"first; let frame_step be a multiple of {self.step}, or prepare the source with all phases"
            )


def runs_of(container: "av.container.InputContainer") -> FrameRuns | None:
    """Return how a file holds the frames of its source, None where it shows them one after another, as others do."""
    try:
        made = json.loads(container.metadata.get("comment", ""))
        runs = FrameRuns(made["frame_step"], made["phases"], made["frames"])
    except (ValueError, TypeError, KeyError):
        return None
    return runs if all(type(value) is int and value > 0 for value in runs) else None


class SequentialVideo:
    """A video that is read from its first frame on; it has num_frames, fps (0.0 where the file does not tell) and read.

    The numbers of frames are those of the source where `everest-hf prepare` made the file.

    Args: source: a path, or the bytes of a file.

    Raises:
        ValueError: it is not a video, it has no frames, or more pixels than MAX_PIXELS would be decoded at a time.
    """

    def __init__(self, source: str | bytes):
        self.num_frames, first = 0, None
        with demuxer(source) as (container, stream):
            check_pixels(1, stream.codec_context.height, stream.codec_context.width, MAX_PIXELS)
            self._runs, self.fps = runs_of(container), float(stream.average_rate or 0)
            for frame in container.decode(stream):
                first = first or frame
                self.num_frames += 1
        if first is None:
            raise ValueError("none of its frames can be decoded")
        if self._runs:
            self._runs.check_stored(self.num_frames)
            self.num_frames, self.fps = self._runs.num_frames, self.fps * self._runs.stretch
        self._source, self._size, self._matrix = source, (first.height, first.width), display_matrix(first)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the frames at `indices`, uint8 (T, H, W, C); an index may come several times, in any order."""
        places = [self._runs.place_of(i) for i in indices] if self._runs else list(indices)
        rising = sorted(set(places))
        check_pixels(len(rising), *self._size, MAX_PIXELS)
        frames = upright(decode_in_order(self._source, rising, self._size), self._matrix)
        return frames[[rising.index(place) for place in places]]

    def read_clip(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the frames of a clip, as `read`.

        Raises:
            ValueError: the file does not have them (see `FrameRuns.check_clip`).
        """
        if self._runs:
            self._runs.check_clip(indices, self.num_frames - 1)
        return self.read(indices)


def decode_in_order(source: str | bytes, indices: Sequence[int], size: tuple[int, int]) -> torch.Tensor:
    """Return the frames at `indices`, which rise, uint8 (T, H, W, C), scaled to `size` and not turned upright."""
    return torch.stack(list(decoded_in_order(source, indices, size)))


def decoded_in_order(source: str | bytes, indices: Sequence[int], size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Yield what `decode_in_order` returns, each frame (H, W, C) when its turn comes."""
    wanted, to_pixels = set(indices), rgb_converter(*size)
    with demuxer(source) as (container, stream):
        shown = islice(container.decode(stream), indices[-1] + 1)
        yield from (to_pixels(frame) for i, frame in enumerate(shown) if i in wanted)


def rgb_converter(height: int, width: int) -> "Callable[[av.VideoFrame], torch.Tensor]":
    """Return what makes pixels uint8 (height, width, 3) of frames, as the program ffmpeg does.

    It goes through the same filters. The library's function for one frame differs: in interlaced video, in 10 bits, in
    frames of odd sizes. Frames whose size or format changes in the course of a video are scaled to the one size.
    """
    graphs: dict[tuple, Any] = {}

    def convert(frame: "av.VideoFrame") -> torch.Tensor:
        kind = (frame.width, frame.height, frame.format.name)
        if kind not in graphs:
            graphs[kind] = _rgb_graph(*kind, f"{width}:{height}")
        graphs[kind].vpush(frame)
        return torch.from_numpy(graphs[kind].vpull().to_ndarray())

    return convert


def _rgb_graph(width: int, height: int, pixel_format: str, size: str) -> "av.filter.Graph":
    graph = av.filter.Graph()
    if hasattr(graph, "threads"):  # not in PyAV 17.0
        graph.threads = 1  # to start threads takes longer than to use them
    source = (
        f"video_size={width}x{height}:pix_fmt={pixel_format}:time_base=1/1"  # the time of a frame is of no use here
    )
    graph.link_nodes(
        graph.add("buffer", source),
        graph.add("scale", f"{size}:flags=bicubic"),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    ).configure()
    return graph


def display_matrix(frame: "av.VideoFrame") -> tuple[int, int, int, int]:
    """Return the signs (a, b, c, d) of how pixels are to be shown: x' = a x + c y, y' = b x + d y.

    Raises:
        ValueError: they are to be shown turned by another angle than a right one.
    """
    side_data: Any = frame.side_data  # annotated as a dict of something else
    data = side_data.get("DISPLAYMATRIX")
    numbers = (1, 0, 0, 0, 1, 0, 0, 0, 1) if data is None else struct.unpack("=9i", bytes(data))
    a, b, c, d = ((x > 0) - (x < 0) for x in (*numbers[:2], *numbers[3:5]))
    if not any((a, b, c, d)):  # players ignore it
        return 1, 0, 0, 1
    if abs(a * d) + abs(b * c) != 1:
        raise ValueError("it is to be shown turned by an angle that is no multiple of 90 degrees, or distorted")
    return a, b, c, d


def upright(frames: torch.Tensor, matrix: tuple[int, int, int, int]) -> torch.Tensor:
    """Return frames (T, H, W, C) as a display matrix has them shown."""
    a, b, c, d = matrix
    if not a:
        frames = frames.transpose(1, 2)
    return frames.flip([axis for axis, sign in ((2, a or c), (1, d or b)) if sign < 0])
