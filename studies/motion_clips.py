"""The clips of the motion study: sixteen classes, eight directions at two speeds, told by motion and by nothing else.

Sprites move together over a cluttered background, on which sprites of the same make lie still. In half of the clips
the camera stands; in the other half it pans and shakes, and takes the background with it. In half of each half the
light flickers; the sensor always has noise. Class, camera, light, background and sprites are drawn independently of
each other, and what moves goes round at the edges of the frame, so that no single frame tells the class. Training,
validation and test draw backgrounds and sprites from stocks of their own.

A clip is a function of (spec, split, index). Sizes are in pixels, times in frames, light in grey levels of 256.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SPLITS = ("train", "val", "test")
DIRECTIONS = 8
# Range in pixels a frame.
SPEEDS = {"slow": (1.0, 1.6), "fast": (2.6, 3.6)}
CLASSES = tuple(f"{speed} {360 * k // DIRECTIONS}°" for speed in SPEEDS for k in range(DIRECTIONS))
# The rounds of classes in a set follow each other in this order.
CONDITIONS = {
    "still camera": {"camera_moves": False, "flickers": False},
    "moving camera": {"camera_moves": True, "flickers": False},
    "still camera, flicker": {"camera_moves": False, "flickers": True},
    "moving camera, flicker": {"camera_moves": True, "flickers": True},
}
# Blotches of a background: side in pixels, standard deviation of their light.
BLOTCHES = ((32, 15.0), (16, 12.0), (8, 10.0), (4, 6.0))


@dataclass(frozen=True)
class MotionClips:
    """What to draw.

    num_frames, side: of a clip, square. action_frames: frames in which the sprites move; before and after they stand.
    num_moving, num_still, sprite: how many sprites move and lie still, and their side. fewest_moving: where it is given,
    the number that moves is drawn from it to num_moving. flicker: standard deviation of the light where it flickers, as a
    share. noise: standard deviation of the sensor's. pan, shake: largest speed and standard deviation of a camera that
    moves. stock: backgrounds and sprites of a split.
    """

    num_frames: int = 8
    side: int = 64
    action_frames: int = 8
    num_moving: int = 4
    fewest_moving: int | None = None
    num_still: int = 3
    sprite: int = 16
    flicker: float = 0.04
    noise: float = 3.0
    pan: float = 1.5
    shake: float = 0.5
    stock: int = 64
    seed: int = 0


class Plan(NamedTuple):
    """A clip before it is painted.

    scene: the background. movers: (sprite, start, scale) of each that moves. path, camera, light: by frame how far they
    have moved, where the camera is, and how bright the light is.
    """

    scene: np.ndarray
    movers: list[tuple[int, np.ndarray, float]]
    path: np.ndarray
    camera: np.ndarray
    light: np.ndarray


class Split:
    """Training, validation or test clips, with the backgrounds and sprites that no other split has."""

    def __init__(self, spec: MotionClips, name: str):
        self.spec, self.number = spec, SPLITS.index(name)
        rng = np.random.default_rng((spec.seed, self.number))
        self.backgrounds = [draw_background(2 * spec.side, rng) for _ in range(spec.stock)]
        self.sprites = [draw_sprite(spec.sprite, rng) for _ in range(spec.stock)]

    def draw(self, index: int) -> np.ndarray:
        """Draw a clip: uint8 (T, side, side, 3)."""
        spec, rng = self.spec, self._rng(index)
        plan = self._plan(index, rng)
        frames = np.empty((spec.num_frames, spec.side, spec.side, 3))
        for frame, shift, step, brightness in zip(frames, plan.camera, plan.path, plan.light, strict=True):
            frame[:] = _shifted(plan.scene, shift)[: spec.side, : spec.side]
            for sprite, start, scale in plan.movers:
                _paint(frame, self.sprites[sprite], start + step, scale)
            frame *= brightness
        frames += rng.normal(0, spec.noise, frames.shape)
        return frames.round().clip(0, 255).astype(np.uint8)

    def draw_truth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how much of each pixel of a clip moving sprites cover (T, side, side), and where its camera is (T, 2)."""
        spec, plan = self.spec, self._plan(index, self._rng(index))
        cover = np.zeros((spec.num_frames, spec.side, spec.side, 1))
        for frame, step in zip(cover, plan.path, strict=True):
            for sprite, start, scale in plan.movers:
                opacity = self.sprites[sprite][..., 3:]
                white = np.concatenate([np.ones_like(opacity), opacity], axis=-1)
                _paint(frame, white, start + step, scale)
        return cover[..., 0], plan.camera

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.spec.seed, len(SPLITS) + self.number, index))

    def _plan(self, index: int, rng: np.random.Generator) -> Plan:
        """Draw everything about a clip but the noise."""
        spec, count = self.spec, self.spec.num_moving
        camera_moves, flickers = CONDITIONS[condition_of(index)].values()
        if spec.fewest_moving is not None:
            count = rng.integers(spec.fewest_moving, spec.num_moving + 1)
        scene, movers = self._draw_scene(rng), rng.choice(spec.stock, size=count, replace=False)
        starts, scales = rng.uniform(0, spec.side, (count, 2)), rng.uniform(0.8, 1.1, count)
        path = _clock(spec, rng)[:, None] * _velocity(label_of(index), rng)  # (T, 2)
        camera, light = _camera(spec, rng) * camera_moves, 1 + rng.normal(0, spec.flicker, spec.num_frames) * flickers
        return Plan(scene, list(zip(movers, starts, scales, strict=True)), path, camera, light)

    def _draw_scene(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a background with sprites that lie still on it (2 side, 2 side, 3)."""
        background, side = self.backgrounds[rng.integers(self.spec.stock)], self.spec.side
        scene = np.roll(background, tuple(rng.integers(2 * side, size=2)), (0, 1))
        for sprite in rng.choice(self.spec.stock, size=self.spec.num_still, replace=False):
            _paint(scene, self.sprites[sprite], rng.uniform(0, side, size=2), scale=1.0)
        return scene


def label_of(index: int) -> int:
    """Return the class of the clip with this index: the classes take turns."""
    return index % len(CLASSES)


def condition_of(index: int) -> str:
    """Return the condition of the clip with this index: each round of the classes has one."""
    return tuple(CONDITIONS)[index // len(CLASSES) % len(CONDITIONS)]


def draw_background(side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw clutter (side, side, 3) that closes at its edges."""
    image = np.full((side, side, 3), 70.0)
    for cell, deviation in BLOTCHES:
        image += np.kron(rng.normal(0, deviation, (side // cell, side // cell, 3)), np.ones((cell, cell, 1)))
    # A little blur, so that a move by half a pixel is one.
    return sum(np.roll(image, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9


def draw_sprite(side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a striped superellipse (side, side, 4): colour, and how much it covers, softly at its rim."""
    axis = np.linspace(-1, 1, side)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    power, (a, b) = rng.uniform(1.5, 5), rng.uniform(0.65, 0.95, size=2)
    cover = np.clip((1 - (np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power)) * side / 3, 0, 1)
    angle, wave = rng.uniform(0, np.pi), rng.uniform(2, 5)
    stripes = np.sin(wave * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi))
    colour = rng.uniform(140, 240, size=3) + 40 * stripes[..., None] * rng.choice([-1, 1], size=3)
    return np.concatenate([colour, cover[..., None]], axis=-1)


def _velocity(label: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the velocity of a class, in y, x, anticlockwise from the right; y points down."""
    speed, direction = divmod(label, DIRECTIONS)
    angle = 2 * np.pi * direction / DIRECTIONS
    return rng.uniform(*list(SPEEDS.values())[speed]) * np.array([-np.sin(angle), np.cos(angle)])


def _clock(spec: MotionClips, rng: np.random.Generator) -> np.ndarray:
    """Draw for how many frames the sprites have moved at each frame (T,): the action begins anywhere."""
    start = rng.integers(spec.num_frames - spec.action_frames + 1)
    return (np.arange(spec.num_frames) - start).clip(0, spec.action_frames)


def _camera(spec: MotionClips, rng: np.random.Generator) -> np.ndarray:
    """Draw where a moving camera looks (T, 2), in y, x."""
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1) * spec.pan
    pan = speed * np.array([np.sin(angle), np.cos(angle)]) * np.arange(spec.num_frames)[:, None]
    return pan + rng.normal(0, spec.shake, size=(spec.num_frames, 2))


def _shifted(image: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Move an image (H, W, C) that closes at its edges, by parts of a pixel: bilinear."""
    whole = np.floor(by).astype(int)
    (y, x), moved = by - whole, np.roll(image, tuple(-whole), (0, 1))
    moved = (1 - y) * moved + y * np.roll(moved, -1, 0)
    return (1 - x) * moved + x * np.roll(moved, -1, 1)


def _paint(frame: np.ndarray, sprite: np.ndarray, middle: np.ndarray, scale: float) -> None:
    """Paint a sprite into a frame that closes at its edges, in place."""
    side = sprite.shape[0] * scale
    y, x = (np.arange(np.ceil(at - side / 2), np.floor(at + side / 2) + 1).astype(int) for at in middle)
    # Where these pixels lie on the sprite, in its own.
    v, u = (((axis - at) / side + 0.5) * (sprite.shape[0] - 1) for axis, at in zip((y, x), middle, strict=True))
    patch = _sampled(sprite, v, u)
    rows, columns = np.ix_(y % frame.shape[0], x % frame.shape[1])
    cover = patch[..., -1:]
    frame[rows, columns] = frame[rows, columns] * (1 - cover) + patch[..., :-1] * cover


def _sampled(image: np.ndarray, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Sample an image at rows v and columns u: bilinear."""
    top, left = (np.clip(a.astype(int), 0, image.shape[0] - 2) for a in (v, u))
    y, x = (v - top)[:, None, None], (u - left)[None, :, None]
    rows = (1 - y) * image[top] + y * image[top + 1]
    return (1 - x) * rows[:, left] + x * rows[:, left + 1]


def write_clips(draw: Callable[[int], np.ndarray], count: int, path: Path) -> None:
    """Write what draw(index) gives, (T, H, W, 3), as clips uint8 (count, T, 3, H, W), for `open_clips`."""
    frames, height, width, _ = draw(0).shape
    clips = np.lib.format.open_memmap(path, "w+", np.uint8, (count, frames, 3, height, width))
    for index in range(count):
        clips[index] = draw(index).transpose(0, 3, 1, 2)
    clips.flush()


def open_clips(path: Path) -> torch.Tensor:
    """Open the clips of a file, for reading; what is not looked at is not read."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))
