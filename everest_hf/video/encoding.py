"""Writing H.264: frames as a file, and the frames of a video upright, in order and at even distances in time."""

import errno
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter

from ..video_reading_everest import MAX_PIXELS, FrameRuns, check_pixels, demuxer, runs_of
from .errors import VideoError
from .pictures import PictureDecoder, picture_header

# Frames a second of a video that does not tell.
DEFAULT_FPS = 25
# Frames from key frame to key frame: of frames in order, of which a clip skips most, and of those that a clip takes.
DEFAULT_GOP, DEFAULT_GOP_OF_RUNS = 16, 4
# By how much a frame is to be turned, anticlockwise in degrees, and FFmpeg's filters that do it.
TURNS: dict[int, list[tuple[str, str | None]]] = {
    90: [("transpose", "cclock")],
    180: [("hflip", None), ("vflip", None)],
    270: [("transpose", "clock")],
}


@dataclass(frozen=True)
class Encoding:
    """How videos are written. short_side: in pixels, never more than the source has. gop: frames from key frame to key
    frame, by default 16, or 4 of a run of frames. crf: constant rate factor of H.264; lower is better, and larger.
    frame_step: 1 for the frames in order; otherwise runs of every frame_step-th frame, so that the frames of a clip
    follow one another. phases: how many of these runs, frame_step (by default) or 1; see `FrameRuns`.

    Raises:
        ValueError: a value is out of range.
    """

    short_side: int = 256
    gop: int = None  # type: ignore[assignment]  # an int once it is made
    crf: int = 20
    frame_step: int = 1
    phases: int = None  # type: ignore[assignment]

    def __post_init__(self):
        defaults = {"gop": DEFAULT_GOP if self.frame_step == 1 else DEFAULT_GOP_OF_RUNS, "phases": self.frame_step}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, low, high in (("short_side", 16, 4096), ("gop", 1, 1000), ("crf", 0, 51), ("frame_step", 1, 64)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be {low} to {high}")
        if self.phases not in (1, self.frame_step):
            raise ValueError(f"phases is {self.phases}; it must be 1, or frame_step={self.frame_step} for all")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of a frame (height, width) scaled to the short side; even, as 4:2:0 chroma needs."""
        short = min(height, width)
        scaled = (2 * round(side * min(self.short_side, short) / short / 2) for side in (height, width))
        height, width = (max(2, min(new, side // 2 * 2)) for new, side in zip(scaled, (height, width), strict=True))
        return height, width


DEFAULT_ENCODING = Encoding()


def even_frames(source: str | bytes, name: str, max_pixels: int = MAX_PIXELS) -> Iterator[av.VideoFrame]:
    """Yield the frames of a video, upright; frame i is at the time i / rate. max_pixels: of one frame (0: no limit)."""
    try:
        with demuxer(source) as (container, stream):
            check_pixels(1, stream.codec_context.height, stream.codec_context.width, max_pixels)
            if runs_of(container):
                raise ValueError("its frames are in phases (prepare --frame-step); prepare its source")
            # Annotated as another class from one version of PyAV to the next.
            rate: Any = stream.average_rate or DEFAULT_FPS
            time_base = 1 / Fraction(rate).limit_denominator(1001)
            packets, place = 0, 0
            for packet in container.demux(stream):
                packets += packet.size > 0
                for frame in packet.decode():
                    frame = upright(frame)
                    frame.pts, frame.time_base = place, time_base
                    place += 1
                    yield frame
            if packets < stream.frames or not place:
                raise ValueError(f"{packets} of the {stream.frames} frames that its header declares are there")
    except (ValueError, OSError, av.error.FFmpegError) as error:
        raise VideoError(name, f"cannot be decoded: {getattr(error, 'strerror', None) or error}") from error


def frames_of_pictures(folder: str, name: str, fps: float, max_pixels: int = MAX_PIXELS) -> Iterator[av.VideoFrame]:
    """Yield the frames of a folder of pictures; frame i is at the time i / fps. name, max_pixels: of `even_frames`."""
    try:
        decoder = PictureDecoder(folder, header=picture_header(folder, max_pixels))
        for place in range(decoder.num_frames):
            frame = av.VideoFrame.from_ndarray(decoder.read([place])[0].numpy(), format="rgb24")
            frame.pts, frame.time_base = place, 1 / Fraction(fps).limit_denominator(1001)
            yield frame
    except ValueError as error:
        raise VideoError(name, f"cannot be decoded: {error}") from error


def upright(frame: av.VideoFrame) -> av.VideoFrame:
    """Return a frame turned as the file says it is to be shown."""
    turn = TURNS.get(frame.rotation % 360)
    if turn is None:
        return frame
    graph = av.filter.Graph()
    first = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, name="in", time_base=frame.time_base
    )
    graph.link_nodes(first, *(graph.add(*step) for step in turn), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.vpull()


def transcode(
    frames: Iterator[av.VideoFrame], path: Path, tag: dict[str, Any], encoding: Encoding, alive: Callable[[], None]
) -> int:
    """Write frames as a file and return their number. The file says what `tag` says, and of runs the frames of all."""
    if encoding.frame_step == 1:
        with _Writer(path, encoding, tag) as writer:
            for frame in frames:
                writer.add(frame)
                alive()
        return writer.count
    paths = [path.with_suffix(f".{phase}{path.suffix}") for phase in range(encoding.phases)]
    count, time_base = 0, Fraction(1)
    with ExitStack() as stack:
        runs = [stack.enter_context(_Writer(run, encoding, {})) for run in paths]
        for place, frame in enumerate(frames):
            if place % encoding.frame_step < encoding.phases:
                frame.pts = place // encoding.frame_step
                runs[place % encoding.frame_step].add(frame)
            count, time_base = place + 1, Fraction(frame.time_base)  # type: ignore[arg-type]  # `even_frames` has set it
            alive()
    frame_runs = FrameRuns(encoding.frame_step, encoding.phases, count)
    written = [run for run, writer in zip(paths, runs, strict=True) if writer.count]
    _join(written, path, {**tag, "frames": count}, time_base, frame_runs.stretch)
    for run in paths:
        run.unlink(missing_ok=True)  # a run without frames is none
    return frame_runs.num_stored


class _Writer:
    """Writes frames to a file, scaled, as H.264; `count` of them. Its end is that of the context."""

    def __init__(self, path: Path, encoding: Encoding, tag: dict[str, Any]):
        self.count, self._encoding = 0, encoding
        self._reformat = VideoReformatter().reformat
        self._container = av.open(str(path), "w", format="mp4")
        self._container.metadata["comment"] = json.dumps(tag)
        self._stream: av.VideoStream | None = None

    def add(self, frame: av.VideoFrame) -> None:
        stream = self._stream = self._stream or _add_stream(self._container, frame, self._encoding)
        size, how = (stream.width, stream.height, stream.pix_fmt), Interpolation.BICUBIC
        scaled = self._reformat(frame, *size, interpolation=how, threads=1)  # other processes use the other cores
        scaled.pict_type = PictureType.NONE  # or the encoder would follow the source's
        self._container.mux(stream.encode(scaled))
        self.count += 1

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        with self._container:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())


def _join(paths: list[Path], target: Path, tag: dict[str, Any], time_base: Fraction, stretch: int) -> None:
    """Write files of one kind, one after another, as one file; each of its frames is shown for `stretch` time_base."""
    with av.open(str(target), "w", format="mp4") as new:
        new.metadata["comment"] = json.dumps(tag)
        stream, place = None, 0
        for path in paths:
            with av.open(str(path)) as old:
                (source,) = old.streams.video
                stream = stream or new.add_stream_from_template(source)
                for packet in old.demux(source):
                    if packet.size:
                        packet.pts = packet.dts = place * stretch
                        packet.duration, packet.time_base, packet.stream = stretch, time_base, stream
                        new.mux(packet)
                        place += 1


def _add_stream(container: av.container.OutputContainer, frame: av.VideoFrame, encoding: Encoding) -> av.VideoStream:
    # "fastdecode" leaves out what costs a decoder most; B-frames would make it read ahead.
    options = {"preset": "veryfast", "tune": "fastdecode", "bf": "0", "threads": "1"}
    options |= {"crf": str(encoding.crf), "g": str(encoding.gop)}
    time_base: Any = frame.time_base  # `even_frames` has set it
    stream = container.add_stream("libx264", rate=1 / Fraction(time_base), options=options)
    stream.height, stream.width = encoding.size(frame.height, frame.width)
    stream.pix_fmt = "yuv420p"
    for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
        if value := getattr(frame, name):  # 0 is "unknown", or RGB
            setattr(stream.codec_context, name, value)
    return stream


def check_written(path: Path, count: int) -> None:
    """Find out what a full disk may have cost: not every failed write is reported where it happens."""
    with av.open(str(path)) as container:
        if container.streams.video[0].frames != count:
            raise OSError(errno.EIO, "it could not be written whole")


def write_mp4(frames: Iterable[np.ndarray], path: str | Path, fps: Fraction, **options: str) -> None:
    """Write frames, each uint8 (H, W, 3) with H and W even, as H.264; `options` are the encoder's, such as crf="18"."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
