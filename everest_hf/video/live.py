"""Frames as they come: from a camera, a network camera, a pipe, or a file as if it were shown."""

import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import av
import torch

from ..video_reading_everest import (
    FORMATS_OF_FILES,
    MAX_PIXELS,
    TIME_LIMIT,
    best_stream,
    check_pixels,
    display_matrix,
    open_container,
    rgb_converter,
    upright,
)
from .errors import VideoError
from .reading import reason_of

PIPE = "-"
_CAMERA = re.compile(r"camera(?::(\d+))?")
# How the cameras of a system are opened: FFmpeg's format, and the name of camera number n.
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
# Frames that wait at most; when more come, the oldest is dropped.
WAITING = 32


@dataclass(frozen=True)
class LiveFrame:
    """pixels: uint8 (H, W, C). second: since the first frame. arrived: when it was there, as time.monotonic() tells."""

    pixels: torch.Tensor
    second: float
    arrived: float


class LiveVideo:
    """Every `step`-th frame of a source, from now on; a thread reads them, in the time in which they are shown.

    source: "camera" or "camera:1" (Linux, macOS), an address rtsp://…, "-" for a video on standard input, or a file.
    time_limit: seconds without a frame after which the source counts as hung (0: never). max_pixels: of a frame.

    Iterated, it gives each `LiveFrame` once. Where nobody takes them in time, the oldest are dropped. `read` and
    `dropped` count frames of which every `step`-th is one.

    Raises:
        VideoError: by iterating it: the source cannot be opened or read, or hangs.
    """

    def __init__(self, source: str, *, step: int = 1, time_limit: float = TIME_LIMIT, max_pixels: int = MAX_PIXELS):
        self.source, self._step, self._time_limit, self._max_pixels = source, step, time_limit, max_pixels
        self.read = self.dropped = 0
        self._frames: deque[LiveFrame] = deque()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._ended = self._closed = False

    @property
    def waiting(self) -> int:
        """How many frames are there that nobody has taken."""
        return len(self._frames)

    def __iter__(self) -> Iterator[LiveFrame]:
        threading.Thread(target=self._run, daemon=True).start()
        try:
            while (frame := self._next()) is not None:
                yield frame
        finally:
            self._closed = True

    def _next(self) -> LiveFrame | None:
        with self._changed:
            came = self._changed.wait_for(lambda: self._frames or self._ended, self._time_limit or None)
            if self._frames:
                return self._frames.popleft()
            if not came:
                raise VideoError(self.source, f"gave no frame for {self._time_limit:g} s")
            if self._error is not None:
                reason = str(self._error) if type(self._error) is ValueError else reason_of(self._error)
                raise VideoError(self.source, reason) from self._error
            return None

    def _run(self) -> None:
        try:
            for frame in self._decoded():
                with self._changed:
                    self.read += 1
                    if len(self._frames) == WAITING:
                        self._frames.popleft()
                        self.dropped += 1
                    self._frames.append(frame)
                    self._changed.notify()
        except Exception as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _decoded(self) -> Iterator[LiveFrame]:
        with _opened(self.source) as container:
            stream = best_stream(container)
            clock, convert, matrix = _Clock(waits=os.path.isfile(self.source)), None, (1, 0, 0, 1)
            for number, frame in enumerate(container.decode(stream)):
                if self._closed:
                    return
                if convert is None:
                    check_pixels(1, frame.height, frame.width, self._max_pixels)
                    convert, matrix = rgb_converter(frame.height, frame.width), display_matrix(frame)
                second = clock.second_of(frame, number, float(stream.average_rate or 0))
                if number % self._step == 0:
                    pixels = upright(convert(frame)[None], matrix)[0]
                    yield LiveFrame(pixels, second, time.monotonic())


class _Clock:
    """The seconds of frames since the first; with `waits` it lets them pass."""

    def __init__(self, waits: bool):
        self._waits, self._start, self._first = waits, time.monotonic(), 0.0

    def second_of(self, frame, number: int, rate: float) -> float:
        now = time.monotonic()
        told = frame.time if frame.time is not None else number / rate if rate else now - self._start
        if number == 0:
            self._start, self._first = now, told
        second = told - self._first
        if self._waits:
            time.sleep(max(0.0, self._start + second - now))
        return second


def _opened(source: str) -> "av.container.InputContainer":
    camera = _CAMERA.fullmatch(source)
    if camera is not None and not os.path.exists(source):
        if sys.platform not in _CAMERAS:
            raise ValueError("cameras are read on Linux and macOS; pipe the frames in: ffmpeg … -f matroska - | …")
        kind, name = _CAMERAS[sys.platform]
        return av.open(name.format(camera[1] or 0), format=kind)
    if source.startswith(("rtsp://", "rtsps://")):
        return av.open(source, format="rtsp", options={"rtsp_transport": "tcp"})  # over UDP, packets are lost
    if "://" in source:
        raise ValueError("an address is rtsp:// here; pipe others in: ffmpeg -i ADDRESS -f matroska - | … watch -")
    if source == PIPE:
        return av.open("pipe:0", options={"format_whitelist": FORMATS_OF_FILES})
    if not os.path.exists(source):
        raise ValueError("no such file; expected a video, camera, rtsp://… or - for standard input")
    return open_container(source)
