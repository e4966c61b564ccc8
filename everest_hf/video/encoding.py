"""Writing H.264: frames as a file, and the frames of a video upright, in order and at even distances in time."""

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter

from ..video_reading_everest import MAX_PIXELS, check_pixels, demuxer
from .errors import VideoError
from .pictures import PictureDecoder, picture_header

# Frames a second of a video that does not tell.
DEFAULT_FPS = 25
# By how much a frame is to be turned, anticlockwise in degrees, and FFmpeg's filters that do it.
TURNS: dict[int, list[tuple[str, str | None]]] = {
    90: [("transpose", "cclock")],
    180: [("hflip", None), ("vflip", None)],
    270: [("transpose", "clock")],
}


@dataclass(frozen=True)
class Encoding:
    """How videos are written. short_side: in pixels, never more than the source has. gop: frames from key frame to key
    frame. crf: constant rate factor of H.264; lower is better, and larger.

    Raises:
        ValueError: a value is out of range.
    """

    short_side: int = 256
    gop: int = 16
    crf: int = 20

    def __post_init__(self):
        for name, low, high in (("short_side", 16, 4096), ("gop", 1, 1000), ("crf", 0, 51)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be {low} to {high}")

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
    frames: Iterator[av.VideoFrame], path: Path, tag: str, encoding: Encoding, alive: Callable[[], None]
) -> int:
    """Write frames as a file and return their number."""
    count, stream, reformat = 0, None, VideoReformatter().reformat
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = tag
        for frame in frames:
            stream = stream or _add_stream(container, frame, encoding)
            size, how = (stream.width, stream.height, stream.pix_fmt), Interpolation.BICUBIC
            scaled = reformat(frame, *size, interpolation=how, threads=1)  # other processes use the other cores
            scaled.pict_type = PictureType.NONE  # or the encoder would follow the source's
            container.mux(stream.encode(scaled))
            count += 1
            alive()
        if stream is not None:
            container.mux(stream.encode())
    return count


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
