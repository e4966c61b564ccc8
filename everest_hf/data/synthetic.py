"""Small labelled videos, made on the spot: the class of a clip is how things move in it, and nothing else.

Bright shaded sprites of one kind glide in formation over a still, dim texture, in one of eight directions. Where they
start, how fast they go, what they look like and what lies behind them is drawn in the same way for every class, and
frames wrap around at their edges, so that each single frame has the same distribution in every class. Frames in a
wrong order tell the axis of a motion at best, never its sense: backwards, a clip is one of the opposite class.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import thread_map

from ..files import held, write_table
from ..video.encoding import write_mp4

# In steps of 45 degrees, anticlockwise from the right; y points down in a frame.
DIRECTIONS = ("right", "right_up", "up", "left_up", "left", "left_down", "down", "right_down")
SPLITS = ("train", "val")
MANIFEST = "manifest.json"
# The class of what lies between the motions of an untrimmed video, and how long its parts last.
PAUSE, PAUSE_SECONDS, ACTION_SECONDS = "pause", (1.0, 2.0), (2.0, 4.0)


@dataclass(frozen=True)
class MotionVideos:
    """What to write. Every video is a function of (seed, split, index) and of the sizes below.

    num_train, num_val: videos a split, the classes in turn. num_frames, height, width: of a video, in pixels.
    num_sprites: how many move; spacing: pixels from one place in their formation to the next; radius: range of their
    size in pixels. speed: range in pixels a frame. noise: standard deviation of the camera's noise in grey levels of
    256. quality: constant rate factor of H.264, lower is better.

    Raises:
        ValueError: values that contradict each other, such as more sprites than places.
    """

    num_train: int = 1600
    num_val: int = 240
    num_frames: int = 12
    height: int = 64
    width: int = 64
    fps: int = 12
    num_sprites: int = 8
    spacing: int = 16
    radius: tuple[float, float] = (5.0, 7.0)
    speed: tuple[float, float] = (1.5, 3.0)
    noise: float = 2.0
    quality: int = 18
    seed: int = 0

    def __post_init__(self):
        for name in ("num_train", "num_val", "num_frames", "fps", "num_sprites", "spacing"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("noise", "quality", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in (
            "height",
            "width",
        ):  # even for 4:2:0 chroma; whole cells, or the frame would not close at its edges
            size = getattr(self, name)
            good = size > 0 and size % 2 == 0 and size % self.spacing == 0
            _require(good, name, size, f"an even multiple of spacing={self.spacing}")
        places = (self.height // self.spacing) * (self.width // self.spacing)
        _require(self.num_sprites <= places, "num_sprites", self.num_sprites, f"at most the {places} places")
        low, high = self.radius
        fits = 0 < low <= high <= self.spacing / 2 - 0.5  # half a pixel of soft rim
        _require(fits, "radius", self.radius, f"a range above 0 and up to {self.spacing / 2 - 0.5}, or sprites touch")
        _require(0 < self.speed[0] <= self.speed[1], "speed", self.speed, "a range above 0")


def _require(condition: bool, name: str, value, right: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} must be {right}")


def label_of(index: int) -> str:
    """Return the class of the video with this index."""
    return DIRECTIONS[index % len(DIRECTIONS)]


def render(spec: MotionVideos, split: str, index: int) -> np.ndarray:
    """Draw a video: uint8 (num_frames, height, width, 3)."""
    rng = np.random.default_rng((spec.seed, SPLITS.index(split), index))
    return _draw(spec, rng, DIRECTIONS.index(label_of(index)))


def _draw(spec: MotionVideos, rng: np.random.Generator, direction: int) -> np.ndarray:
    """Draw a video; what comes from `rng` is the same for every direction."""
    angle = 2 * np.pi * direction / len(DIRECTIONS)
    velocity = rng.uniform(*spec.speed) * np.array([np.cos(angle), -np.sin(angle)])
    path = rng.uniform(0, spec.spacing, size=2) + velocity * np.arange(spec.num_frames)[:, None]  # (T, 2) in x, y
    frames = np.repeat(_background(spec, rng)[None], spec.num_frames, axis=0)  # (T, H, W, 3)
    _paint_formation(frames, path, rng, spec)
    frames += rng.normal(0, spec.noise, frames.shape)
    return frames.clip(0, 255).astype(np.uint8)


def _background(spec: MotionVideos, rng: np.random.Generator) -> np.ndarray:
    """Return a dim texture (H, W, 3) float: a base colour and a few waves that close at the edges."""
    y, x = np.mgrid[: spec.height, : spec.width] * 2 * np.pi
    waves = np.zeros((spec.height, spec.width))
    for _ in range(3):
        ky, kx = rng.integers(-3, 4, size=2)
        waves += np.sin(ky * y / spec.height + kx * x / spec.width + rng.uniform(0, 2 * np.pi))
    return rng.uniform(30, 80, size=3) + 8 * waves[..., None]


def _paint_formation(frames: np.ndarray, path: np.ndarray, rng: np.random.Generator, spec: MotionVideos) -> None:
    """Paint sprites of one kind into frames (T, H, W, 3), in place; path (T, 2) is where the formation is, in x, y."""
    radius, exponent, colour = rng.uniform(*spec.radius), rng.choice([2.0, 4.0]), rng.uniform(150, 255, size=3)
    taken = np.zeros((spec.height // spec.spacing, spec.width // spec.spacing))
    taken.flat[rng.choice(taken.size, size=spec.num_sprites, replace=False)] = 1
    row, y = _cells(np.arange(spec.height) - path[:, 1:], spec.spacing, taken.shape[0])  # (T, H)
    column, x = _cells(np.arange(spec.width) - path[:, :1], spec.spacing, taken.shape[1])  # (T, W)
    x, y = x[:, None] / radius, y[:, :, None] / radius  # 1 at the rim
    distance = (np.abs(x) ** exponent + np.abs(y) ** exponent) ** (1 / exponent)  # (T, H, W): a disc or a rounded box
    cover = taken[row[:, :, None], column[:, None]] * np.clip((1 - distance) * radius + 0.5, 0, 1)
    light = 0.8 - 0.2 * (x + y)  # from above left, so that a part of a sprite tells the rest
    frames += cover[..., None] * (colour * light[..., None] - frames)


def _cells(position: np.ndarray, spacing: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `count` cells of a circle a position lies in, and how far from the middle of that cell."""
    cell, rest = np.divmod(position + spacing / 2, spacing)
    return cell.astype(int) % count, rest - spacing / 2


def write_motion_videos(folder: str | Path, spec: MotionVideos) -> Path:
    """Write folder/train/<class>/*.mp4 and folder/val/<class>/*.mp4, or find them there; return the folder.

    The set is written under another name beside the folder, and renamed when it is complete.

    Raises:
        ValueError: the folder holds something else, or cannot be written. BlockingIOError: another process writes it.
    """
    folder = Path(folder)
    try:
        if not _is_there(folder):
            with held(folder.parent, f".lock-{folder.name}"):
                if not _is_there(folder):
                    _write_set(folder, spec)
        _refuse_other(folder, spec)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror or error}") from error
    return folder


def _is_there(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _manifest(spec: MotionVideos) -> str:
    return json.dumps(dataclasses.asdict(spec), indent=1)


def _refuse_other(folder: Path, spec: MotionVideos) -> None:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds something other than motion videos (no {MANIFEST}); choose another folder")
    if path.read_text() != _manifest(spec):
        raise ValueError(f"{folder} holds videos of another specification ({path}); remove it or choose another")


def _write_set(folder: Path, spec: MotionVideos) -> None:
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    jobs = [("train", i) for i in range(spec.num_train)] + [("val", i) for i in range(spec.num_val)]
    write = functools.partial(_write_video, partial, spec)
    # Threads are enough: encoding and most of numpy's work let others run.
    thread_map(write, jobs, max_workers=os.cpu_count(), desc=f"writing {folder}", unit="video")
    (partial / MANIFEST).write_text(_manifest(spec))
    os.sync()  # all at once: to flush 1,840 small files one by one takes seconds
    partial.rename(folder)


def _write_video(folder: Path, spec: MotionVideos, job: tuple[str, int]) -> None:
    split, index = job
    path = folder / split / label_of(index) / f"{index:05d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    _encode(render(spec, split, index), path, spec)


def _encode(frames: np.ndarray, path: Path, spec: MotionVideos) -> None:
    """Write frames (T, H, W, 3) as H.264."""
    write_mp4(frames, path, Fraction(spec.fps), crf=str(spec.quality), preset="ultrafast", threads="1")


# ---------------------------------------------------------------------- untrimmed videos


@dataclass(frozen=True)
class MotionPart:
    """A part of an untrimmed video, from frame `start` to before frame `end`: a motion, or PAUSE."""

    label: str
    start: int
    end: int


def write_untrimmed_videos(
    folder: str | Path, spec: MotionVideos, *, actions: int = 3, directions: tuple[str, ...] = DIRECTIONS
) -> Path:
    """Write folder/train/*.mp4 and folder/val/*.mp4, several motions each, with pauses around them; return the folder.

    folder/train.csv and val.csv list the parts of the videos: video, label, start and end in seconds; pauses are the
    class PAUSE. spec: of its fields num_frames is not used; parts last as ACTION_SECONDS and PAUSE_SECONDS say.
    directions: those that are drawn from. What moves, and over what, stays the same in a video, so that no single frame
    tells its part.

    Raises:
        FileExistsError: the folder is there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    for split, count in zip(SPLITS, (spec.num_train, spec.num_val), strict=True):
        (folder / split).mkdir()
        rows: list[Sequence] = [("video", "label", "start", "end")]
        for index in range(count):
            rng = np.random.default_rng((spec.seed, SPLITS.index(split), index))
            parts = _draw_parts(spec, rng, actions, directions)
            name = f"{split}/{index:05d}.mp4"
            _encode(_draw_parts_of_video(spec, rng, parts), folder / name, spec)
            rows += [(name, part.label, f"{part.start / spec.fps:g}", f"{part.end / spec.fps:g}") for part in parts]
        write_table(folder / f"{split}.csv", rows)
    return folder


def _draw_parts(
    spec: MotionVideos, rng: np.random.Generator, actions: int, directions: tuple[str, ...]
) -> list[MotionPart]:
    """Draw the parts of a video: a pause, and after each motion another one."""
    labels = [PAUSE, *(label for _ in range(actions) for label in (str(rng.choice(directions)), PAUSE))]
    parts: list[MotionPart] = []
    for label in labels:
        start = parts[-1].end if parts else 0
        seconds = rng.uniform(*(PAUSE_SECONDS if label == PAUSE else ACTION_SECONDS))
        parts.append(MotionPart(label, start, start + max(1, round(seconds * spec.fps))))
    return parts


def _draw_parts_of_video(spec: MotionVideos, rng: np.random.Generator, parts: list[MotionPart]) -> np.ndarray:
    """Draw a video of these parts: uint8 (T, height, width, 3)."""
    count = parts[-1].end
    velocity = np.zeros((count, 2))  # from the frame before
    for part in parts:
        if part.label != PAUSE:
            angle = 2 * np.pi * DIRECTIONS.index(part.label) / len(DIRECTIONS)
            velocity[part.start : part.end] = rng.uniform(*spec.speed) * np.array([np.cos(angle), -np.sin(angle)])
    path = rng.uniform(0, spec.spacing, size=2) + velocity.cumsum(axis=0)  # (T, 2) in x, y
    frames = np.repeat(_background(spec, rng)[None], count, axis=0)  # (T, H, W, 3)
    _paint_formation(frames, path, rng, spec)
    frames += rng.normal(0, spec.noise, frames.shape)
    return frames.clip(0, 255).astype(np.uint8)
