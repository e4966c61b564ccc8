"""RandAugment of a clip, one draw for all its frames: the operations, their magnitudes, and two ways to do them.

The semantics are those that timm writes as "rand-m7-n4-mstd0.5-inc1": of 15 operations 4 are drawn with replacement,
each is applied with probability 0.5 and with a magnitude drawn from a normal distribution about 7 of 10, and all grow
more severe with it.

The reference is Pillow. `FAST` does most of the operations on the bytes of a frame instead, in integers, several times
faster; what it gives differs from Pillow by the levels that are said there.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

NUM_OPERATIONS = 4
PROBABILITY = 0.5
MAGNITUDE_STD = 0.5
MAX_MAGNITUDE = 10


class RandAugment:
    """RandAugment of a clip uint8 (T, 3, H, W), drawn from torch's default generator.

    magnitude: mean of the magnitudes, 0 to 10. fill: RGB of 0 to 255, where a frame is moved away. exact: all by Pillow,
    geometric operations bicubic; otherwise those take the nearest pixel, and what is in `FAST` is done by it.
    """

    def __init__(self, magnitude: float, *, fill: tuple[int, int, int], exact: bool = False):
        self.magnitude, self.fill, self.exact = magnitude, fill, exact

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        drawn = self.draw()
        if not drawn:
            return clip
        clip = clip.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)  # (T, H, W, C)
        # Frame by frame, as one frame stays in the cache from operation to operation.
        for frame in clip.numpy():
            for name, argument in drawn:
                self.apply(name, frame, argument)
        return clip.permute(0, 3, 1, 2)

    def draw(self) -> list[tuple[str, float]]:
        """Draw what is done to a clip: names of operations with their arguments, in order."""
        chosen = torch.randint(len(OPERATIONS), (NUM_OPERATIONS,)).tolist()
        applied = (torch.rand(NUM_OPERATIONS) < PROBABILITY).tolist()
        levels = torch.normal(self.magnitude, MAGNITUDE_STD, (NUM_OPERATIONS,)).clamp(0, MAX_MAGNITUDE) / MAX_MAGNITUDE
        signs = (2 * torch.randint(2, (NUM_OPERATIONS,)) - 1).tolist()
        names = list(OPERATIONS)
        return [
            (names[i], OPERATIONS[names[i]][0](level, sign))
            for i, is_applied, level, sign in zip(chosen, applied, levels.tolist(), signs, strict=True)
            if is_applied
        ]

    def apply(self, name: str, frame: np.ndarray, argument: float) -> None:
        """Do an operation to a frame uint8 (H, W, 3), in place."""
        if name in FAST and not self.exact:
            FAST[name](frame, argument)
            return
        resample = Image.Resampling.BICUBIC if self.exact else Image.Resampling.NEAREST
        _, function = OPERATIONS[name]
        frame[...] = np.asarray(function(Image.fromarray(frame), argument, resample=resample, fillcolor=self.fill))


# ---------------------------------------------------------------------- Pillow's operations: the reference


def _affine(image: Image.Image, matrix: tuple, **kwargs) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **kwargs)


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    return image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)


def _plain(function: Callable) -> Callable:
    """Let a function of (image, argument) take the arguments of geometric operations, which mean nothing to it."""
    return lambda image, argument, **_: function(image, argument)


def _enhance(enhancer: type) -> Callable:
    return _plain(lambda image, factor: enhancer(image).enhance(factor))


# Magnitude as a share of the largest (0 to 1), and a random sign, to the argument of an operation.


def _none(level: float, sign: int) -> float:
    return 0.0


def _factor(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * level)


def _signed(largest: float) -> Callable[[float, int], float]:
    return lambda level, sign: sign * largest * level


# Name: (argument of magnitude and sign, Pillow's function of image and argument).
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "auto_contrast": (_none, _plain(lambda image, _: ImageOps.autocontrast(image))),
    "equalize": (_none, _plain(lambda image, _: ImageOps.equalize(image))),
    "invert": (_none, _plain(lambda image, _: ImageOps.invert(image))),
    "rotate": (_signed(30), lambda image, degrees, **kwargs: image.rotate(degrees, **kwargs)),
    "posterize": (lambda level, _: max(1, 4 - int(4 * level)), _plain(ImageOps.posterize)),  # 0 bits are a black frame
    "solarize": (lambda level, _: 256 - min(256, int(256 * level)), _plain(ImageOps.solarize)),
    "solarize_add": (lambda level, _: min(128, int(110 * level)), _plain(_solarize_add)),
    "color": (_factor, _enhance(ImageEnhance.Color)),
    "contrast": (_factor, _enhance(ImageEnhance.Contrast)),
    "brightness": (_factor, _enhance(ImageEnhance.Brightness)),
    "sharpness": (_factor, _enhance(ImageEnhance.Sharpness)),
    "shear_x": (_signed(0.3), lambda image, shear, **kwargs: _affine(image, (1, shear, 0, 0, 1, 0), **kwargs)),
    "shear_y": (_signed(0.3), lambda image, shear, **kwargs: _affine(image, (1, 0, 0, shear, 1, 0), **kwargs)),
    "translate_x": (
        _signed(0.45),
        lambda image, share, **kwargs: _affine(image, (1, 0, share * image.width, 0, 1, 0), **kwargs),
    ),
    "translate_y": (
        _signed(0.45),
        lambda image, share, **kwargs: _affine(image, (1, 0, 0, 0, 1, share * image.height), **kwargs),
    ),
}


# ---------------------------------------------------------------------- on bytes: frame uint8 (H, W, 3), in place


def _fast_invert(frame: np.ndarray, _) -> None:
    np.invert(frame, out=frame)


def _fast_posterize(frame: np.ndarray, bits: int) -> None:
    frame &= np.uint8(256 - 2 ** (8 - bits))


def _fast_solarize(frame: np.ndarray, threshold: int) -> None:
    frame ^= np.negative((frame >= threshold).view(np.uint8))


def _fast_solarize_add(frame: np.ndarray, amount: int) -> None:
    frame += (frame < 128).view(np.uint8) * np.uint8(amount)


def _blend(frame: np.ndarray, other, factor: float) -> None:
    """Put a frame at other + factor * (frame - other), in 64ths: the products of bytes fit into 16 bits."""
    mixed = frame.astype(np.int16)
    mixed -= other
    mixed *= np.int16(round(64 * factor))
    mixed >>= 6
    mixed += other
    frame[...] = np.clip(mixed, 0, 255, out=mixed)


def _gray(frame: np.ndarray) -> np.ndarray:
    """Return the luma of a frame, uint8 (H, W)."""
    return np.asarray(Image.fromarray(frame).convert("L"))


def _fast_brightness(frame: np.ndarray, factor: float) -> None:
    _blend(frame, np.int16(0), factor)


def _fast_contrast(frame: np.ndarray, factor: float) -> None:
    _blend(frame, np.int16(_gray(frame).mean() + 0.5), factor)


def _fast_color(frame: np.ndarray, factor: float) -> None:
    _blend(frame, np.repeat(_gray(frame), 3).reshape(frame.shape), factor)


def _fast_sharpness(frame: np.ndarray, factor: float) -> None:
    """The blurred frame is (the sum of the 3 x 3 pixels + 4 times the middle) / 13; the outermost pixels stay."""
    height, width, channels = frame.shape
    flat = frame.reshape(height, width * channels)  # neighbours in x are `channels` bytes apart
    inner = flat[1:-1, channels:-channels]
    wide = flat.astype(np.int16)
    rows = wide[:-2] + wide[1:-1]
    rows += wide[2:]
    blurred = rows[:, : -2 * channels] + rows[:, channels:-channels]
    blurred += rows[:, 2 * channels :]
    blurred -= 9 * wide[1:-1, channels:-channels]  # 13 times what blurring adds
    change = blurred.astype(np.int32)
    change *= round((1 - factor) / 13 * 65536)
    change >>= 16
    change += inner
    inner[...] = np.clip(change, 0, 255, out=change)


def _fast_auto_contrast(frame: np.ndarray, _) -> None:
    low, high = (bound(axis=0).reshape(-1, 3) for bound in (frame.min, frame.max))
    low, high = low.min(0).astype(int), high.max(0).astype(int)
    low, high = np.where(low < high, (low, high), [[0], [255]])  # a channel of one value stays
    # In 256ths, rounded up, so that the highest value becomes 255; the products just fit into 16 bits.
    scale = -(-255 * 256 // (high - low))
    flat, width = frame.reshape(frame.shape[0], -1), frame.shape[1]
    flat -= np.tile(low.astype(np.uint8), width)
    stretched = flat.astype(np.uint16)
    stretched *= np.tile(scale.astype(np.uint16), width)
    stretched >>= 8
    flat[...] = stretched


# Largest difference to Pillow in levels of 0 to 255: factors are rounded to 64ths (color, contrast, brightness: 2), sums
# once instead of twice (sharpness: 2), scales up (auto_contrast: 1); the others give the same.
FAST: dict[str, Callable] = {
    "auto_contrast": _fast_auto_contrast,
    "invert": _fast_invert,
    "posterize": _fast_posterize,
    "solarize": _fast_solarize,
    "solarize_add": _fast_solarize_add,
    "color": _fast_color,
    "contrast": _fast_contrast,
    "brightness": _fast_brightness,
    "sharpness": _fast_sharpness,
}
