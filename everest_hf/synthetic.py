"""Small labelled videos, made on the spot: the class of a clip is how things move in it, and nothing else.

Bright shaded sprites glide over a still, dim texture, all of a clip in one of eight directions. Where they start, how
fast they go, what they look like and what lies behind them is drawn in the same way for every class, and frames wrap
around at their edges, so that a single frame says nothing about its class.
"""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm.auto import tqdm

# In steps of 45 degrees, anticlockwise from the right; y points down in a frame.
DIRECTIONS = ("right", "right_up", "up", "left_up", "left", "left_down", "down", "right_down")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class MotionVideos:
    """What to write. Every video is a function of (seed, split, index) and of the sizes below.

    num_train, num_val: videos a split, the classes in turn. num_frames, height, width: of a video, in pixels.
    num_sprites and radius (range, in pixels): what moves. speed: range in pixels a frame. noise: standard deviation
    of the camera's noise in grey levels of 256. quality: constant rate factor of H.264, lower is better.
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


def label_of(index: int) -> str:
    """Return the class of the video with this index."""
    return DIRECTIONS[index % len(DIRECTIONS)]


def render(spec: MotionVideos, split: str, index: int) -> np.ndarray:
    """Draw a video: uint8 (num_frames, height, width, 3)."""
    rng = np.random.default_rng((spec.seed, split == "val", index))
    angle = 2 * np.pi * (index % len(DIRECTIONS)) / len(DIRECTIONS)
    velocity = rng.uniform(*spec.speed) * np.array([np.cos(angle), -np.sin(angle)])
    paths = rng.uniform(0, spec.spacing, size=2) + velocity * np.arange(spec.num_frames)[:, None]  # (T, 2) in x, y
    frames = np.repeat(_background(spec, rng)[None], spec.num_frames, axis=0)  # (T, H, W, 3)
    _paint_flock(frames, paths, rng, spec)
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


def _paint_flock(frames: np.ndarray, paths: np.ndarray, rng: np.random.Generator, spec: MotionVideos) -> None:
    """Paint sprites of one kind, in formation, into frames (T, H, W, 3); the first one's path (T, 2) in x, y."""
    rows, columns = spec.height // spec.spacing, spec.width // spec.spacing
    radius, exponent, colour = rng.uniform(*spec.radius), rng.choice([2.0, 4.0]), rng.uniform(150, 255, size=3)
    for site in rng.choice(rows * columns, size=spec.num_sprites, replace=False):
        centres = paths + np.array([site % columns, site // columns]) * spec.spacing  # (T, 2)
        x = _wrapped(np.arange(spec.width) - centres[:, :1], spec.width)[:, None] / radius  # (T, 1, W)
        y = _wrapped(np.arange(spec.height) - centres[:, 1:], spec.height)[:, :, None] / radius  # (T, H, 1)
        distance = (np.abs(x) ** exponent + np.abs(y) ** exponent) ** (1 / exponent)  # (T, H, W), 1 at the rim
        cover = np.clip((1 - distance) * radius + 0.5, 0, 1)[..., None]
        light = (0.8 - 0.2 * (x + y))[..., None]  # from above left
        frames += cover * (colour * light - frames)


def _wrapped(offset: np.ndarray, size: int) -> np.ndarray:
    """Return the shortest way around a circle of this size."""
    return (offset + size / 2) % size - size / 2


def write_motion_videos(folder: str | Path, spec: MotionVideos) -> Path:
    """Write folder/train/<class>/*.mp4 and folder/val/<class>/*.mp4, or find them there; return the folder.

    Raises:
        ValueError: the folder holds videos of another specification, or cannot be written.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    wanted = json.loads(json.dumps(dataclasses.asdict(spec)))
    if manifest.exists():
        if json.loads(manifest.read_text()) != wanted:
            raise ValueError(f"{folder} holds videos of another specification ({manifest}); remove it or choose another")
        return folder
    jobs = [("train", i) for i in range(spec.num_train)] + [("val", i) for i in range(spec.num_val)]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            written = pool.map(lambda job: _write_video(folder, spec, *job), jobs)
            for _ in tqdm(written, total=len(jobs), desc=f"writing {folder}", unit="video"):
                pass
        _write_whole(manifest, lambda path: path.write_text(json.dumps(wanted, indent=1)))  # last: the set is complete
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror or error}") from error
    return folder


def _write_video(folder: Path, spec: MotionVideos, split: str, index: int) -> None:
    path = folder / split / label_of(index) / f"{index:05d}.mp4"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, lambda partial: _encode(render(spec, split, index), partial, spec))


def _write_whole(path: Path, write) -> None:
    """Write a file under another name and rename it, so that what has the final name is complete."""
    partial = path.with_name(f".partial-{path.name}")
    write(partial)
    partial.rename(path)


def _encode(frames: np.ndarray, path: Path, spec: MotionVideos) -> None:
    """Write frames (T, H, W, 3) as H.264."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": str(spec.quality), "preset": "ultrafast", "threads": "1"}
        stream = container.add_stream("libx264", rate=Fraction(spec.fps), options=options)
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
