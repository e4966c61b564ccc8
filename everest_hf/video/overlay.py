"""Writing a video with captions burnt in, and its sound as it was."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from ..video_reading_everest import MAX_PIXELS, check_pixels, demuxer
from .encoding import DEFAULT_FPS, upright
from .errors import VideoError

# Grey levels of the caption's box and letters, in limited range; and no colour.
DARK, BRIGHT, GREY = 24, 235, 128
# A line of text is as high as this share of the shorter side, in pixels at least MIN_FONT.
FONT_SHARE, MIN_FONT = 1 / 16, 9
# Containers whose times are those of decoding, so that a decoder gives frames that are reordered wrong ones.
WITHOUT_TIMES = ("avi",)


def write_overlay(
    source: str | bytes,
    name: str,
    path: Path,
    caption_at: Callable[[float], str],
    *,
    crf: int = 20,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write a video as H.264 with captions in its lower left corner, and its sound, whose packets are copied.

    Frames stay upright, at their times. source, name: as of `open_video`. path: of a container that takes the sound, as
    .mp4 or .mkv. caption_at: the lines to be shown at a second from the first frame on; "" for none.

    Raises:
        VideoError: the video cannot be decoded, or its sound has no place in the container. OSError: nothing can be
            written.
    """
    try:
        with demuxer(source) as (container, stream), av.open(str(path), "w") as out:
            check_pixels(1, stream.codec_context.height, stream.codec_context.width, max_pixels)
            sounds = [sound for sound in container.streams.audio if sound.codec_context is not None]
            video: Any = out.add_stream("libx264", options={"preset": "veryfast", "crf": str(crf)})
            copies = {sound.index: _copy_of(sound, out, path, name) for sound in sounds}
            _write(container, stream, sounds, out, video, copies, caption_at)
    except VideoError:
        raise
    except (ValueError, av.error.FFmpegError) as error:
        if isinstance(error, OSError) and error.filename == str(path):
            raise
        raise VideoError(name, f"cannot be decoded: {getattr(error, 'strerror', None) or error}") from error


def _copy_of(sound: av.AudioStream, out: av.container.OutputContainer, path: Path, name: str) -> av.AudioStream:
    try:
        return out.add_stream_from_template(sound)
    except (ValueError, av.error.FFmpegError):
        hint = "" if path.suffix == ".mkv" else "; a name ending in .mkv may have"
        what = f"has sound ({sound.codec_context.name}) for which {path.suffix} has no place{hint}"
        raise VideoError(name, what) from None


def _write(container, stream, sounds, out, video, copies, caption_at) -> None:
    first, place, waiting = None, None, []
    for packet in container.demux(stream, *sounds):
        if packet.stream.index in copies:
            if packet.dts is not None:  # the last one of a stream is empty
                packet.stream = copies[packet.stream.index]
                waiting.append(packet)
        else:
            for frame in map(upright, packet.decode()):
                place = _place_of(frame, stream, place, has_times=container.format.name not in WITHOUT_TIMES)
                if first is None:
                    first = place
                    _set_up(video, stream, frame)
                captioned = _captioned(frame, caption_at(float((place - first) * stream.time_base)))
                captioned.pts, captioned.time_base = place, stream.time_base
                out.mux(video.encode(captioned))
        if first is not None:  # nothing can be written before the size of a frame is known
            out.mux(waiting)
            waiting = []
    if first is None:
        raise ValueError("it has no frame")
    out.mux(video.encode())


def _place_of(frame: av.VideoFrame, stream: av.VideoStream, last: int | None, *, has_times: bool) -> int:
    """Return when a frame is shown, in the stream's unit of time: after the last one, where the file does not tell."""
    if has_times and frame.pts is not None and (last is None or frame.pts > last):
        return frame.pts
    length: Any = 1 / (stream.average_rate or DEFAULT_FPS) / stream.time_base  # type: ignore[operator]  # it has one
    return 0 if last is None else last + max(1, round(length))


def _set_up(video: Any, source: av.VideoStream, frame: av.VideoFrame) -> None:
    """Give the stream that is written size, colours and times of the source's frames."""
    video.width, video.height, video.pix_fmt = frame.width // 2 * 2, frame.height // 2 * 2, "yuv420p"
    video.codec_context.framerate = source.average_rate or DEFAULT_FPS
    video.codec_context.time_base = source.time_base
    for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
        if value := getattr(frame, name):
            setattr(video.codec_context, name, value)


def _captioned(frame: av.VideoFrame, text: str) -> av.VideoFrame:
    """Return a frame in 4:2:0, without its time, with a caption painted into it; other pixels stay as they are."""
    height, width = frame.height // 2 * 2, frame.width // 2 * 2
    if frame.format.name != "yuv420p" or (height, width) != (frame.height, frame.width):
        smaller = frame.reformat(width=width, height=height, format="yuv420p")
    else:
        smaller = frame
    planes = smaller.to_ndarray()  # (1.5 * H, W): Y, then U and V
    if text:
        _paint(planes, height, width, text)
    painted = av.VideoFrame.from_ndarray(planes, format="yuv420p")
    painted.pict_type = PictureType.NONE  # or the encoder would follow the source's
    for name in ("colorspace", "color_range"):
        setattr(painted, name, getattr(smaller, name))
    return painted


def _paint(planes: np.ndarray, height: int, width: int, text: str) -> None:
    """Paint a caption into the lower left corner of a frame in 4:2:0, in place."""
    box = _box(text, max(MIN_FONT, round(min(height, width) * FONT_SHARE)), height, width)
    rows, columns = box.shape
    planes[height - rows : height, :columns] = box
    chroma = planes[height:].reshape(2, height // 2, width // 2)
    chroma[:, (height - rows) // 2 :, : columns // 2] = GREY


@lru_cache(maxsize=16)
def _box(text: str, size: int, height: int, width: int) -> np.ndarray:
    """Return the grey levels uint8 (h, w) of a caption, both even and at most those of the frame."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    margin = size // 2
    _, _, right, bottom = draw.multiline_textbbox((margin, margin), text, font=font)
    columns, rows = int(right) + margin, int(bottom) + margin
    picture = Image.new("L", (min(width, columns + columns % 2), min(height, rows + rows % 2)), DARK)
    ImageDraw.Draw(picture).multiline_text((margin, margin), text, font=font, fill=BRIGHT)
    return np.asarray(picture)
