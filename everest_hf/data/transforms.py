"""Clip in, clip out: torch tensors, uint8 up to the device, one random draw for all frames of a clip.

Randomness comes from torch's default generator, as in torchvision; `seeded` makes it a function of a seed.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..configuration_everest import IMAGENET_MEAN
from ..video_processing_everest import cover_size, crop_at, view_position
from .rand_augment import RandAugment

MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)
AUGMENTATIONS = ("fast", "release")


@contextmanager
def seeded(seed: int):
    """Let torch's default CPU generator start at `seed` inside the block, and go on as before after it."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would set the generators of all devices.
        torch.random.default_generator.manual_seed(seed)
        yield


def _draw(count: int) -> int:
    return int(torch.randint(count, ()))


class MultiScaleCrop(v2.Transform):
    """Crop a part of the frame and scale it to `size` (height, width): the augmentation of pre-training.

    The largest crop of the aspect ratio of `size` is shrunk by one of `scales` in height and in width, where the two
    choices are neighbours in `scales` at most; it lies at one of 13 fixed places: corners, centre, middles of the
    edges, and the points half-way from the centre to the corners.

    `short_side` is the short side of the frames from which on the smallest crop has the pixels of `size`: what a
    larger frame has more is averaged away.
    """

    def __init__(self, size: tuple[int, int], scales: tuple[float, ...] = MULTI_SCALES):
        super().__init__()
        self.size, self.scales = tuple(size), tuple(scales)
        self.short_side = math.ceil(max(size) / min(scales))
        count = range(len(scales))
        self.scale_pairs = [(scales[i], scales[j]) for i in count for j in count if abs(i - j) <= 1]
        # Places on a 5 x 5 grid over the free room, every other one as on a chess board.
        self.places = [(i / 4, j / 4) for i in range(5) for j in range(5) if (i + j) % 2 == 0]

    def make_params(self, flat_inputs):
        height, width = flat_inputs[0].shape[-2:]
        unit = min(height / self.size[0], width / self.size[1])
        scales = self.scale_pairs[_draw(len(self.scale_pairs))]
        crop = [max(1, round(side * unit * scale)) for side, scale in zip(self.size, scales, strict=True)]
        crop = [min(crop[0], height), min(crop[1], width)]
        place = self.places[_draw(len(self.places))]
        top, left = round((height - crop[0]) * place[0]), round((width - crop[1]) * place[1])
        return {"top": top, "left": left, "height": crop[0], "width": crop[1]}

    def transform(self, inpt, params):
        return F.resized_crop(inpt, **params, size=list(self.size), antialias=True)


def pretraining_transform(size: tuple[int, int], scales: tuple[float, ...] = MULTI_SCALES) -> v2.Transform:
    """Multi-scale crop of a clip uint8 (T, C, H, W) to (T, C, *size)."""
    return MultiScaleCrop(size, scales)


class FineTuningTransform(v2.Compose):
    """Steps one after the other. A random resized crop may be of a small part, and makes use of all pixels there are."""

    short_side = None


def finetuning_transform(
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    rand_augment: float = 0,
    fill: Sequence[float] = IMAGENET_MEAN,
    augmentation: str = "fast",
) -> v2.Transform:
    """Random resized crop to `size`, flip, RandAugment of a clip uint8 (T, C, H, W).

    `scale` and `ratio` (width / height) bound the crop's share of the frame and its shape. `flip` is a probability.
    `rand_augment` is the mean magnitude, 0 to 10, of RandAugment's operations, 0 for none (see `RandAugment`); `fill`
    is the colour, in [0, 1], of what comes into the frame from outside.

    `augmentation` is "fast" or "release". Fast: crop, flip, RandAugment, so that operations are done on the small
    frame, geometric ones by the nearest pixel, and a crop that shrinks is antialiased. The release's: RandAugment of
    the whole frame, bicubic, all of it by Pillow; then the crop, bilinear without antialiasing; then the flip. So the
    two differ in more than speed: moved by a share of the frame, the fast mode's frame loses a share of the crop, and
    statistics that operations take of a frame (equalize, auto-contrast, contrast) are those of the crop.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation is {augmentation!r}; it must be one of {', '.join(AUGMENTATIONS)}")
    exact = augmentation == "release"
    crop = v2.RandomResizedCrop(list(size), scale=scale, ratio=ratio, antialias=not exact)
    steps: list[Callable] = [crop, v2.RandomHorizontalFlip(flip)] if flip else [crop]
    if rand_augment:
        red, green, blue = (round(255 * value) for value in fill)
        steps.insert(0 if exact else len(steps), RandAugment(rand_augment, fill=(red, green, blue), exact=exact))
    return FineTuningTransform(steps)


def evaluation_crops(clip: torch.Tensor, size: tuple[int, int], num_crops: int = 1) -> torch.Tensor:
    """Scale a clip uint8 (T, C, H, W) to just cover `size` and crop it `num_crops` times: (num_crops, T, C, *size).

    The crops are spread evenly over the side that sticks out; a single one is the centre, as the processor cuts it.
    """
    clip = F.resize(clip, list(cover_size(clip.shape[-2], clip.shape[-1], size)), antialias=True)
    return stack_clips([crop_at(clip, size, view_position(k, num_crops)) for k in range(num_crops)])


def stack_clips(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack clips (T, C, H, W) to (k, T, C, H, W) whose channels are last in memory.

    Decoding and resizing leave them so; to move them costs as much as to resize.
    """
    return torch.stack([clip.movedim(-3, -1) for clip in clips]).movedim(-1, -3)


# ---------------------------------------------------------------------- on the batch, on the device


def normalize(batch: torch.Tensor, mean, std) -> torch.Tensor:
    """Return uint8 (..., C, H, W) as float32, scaled to [0, 1] and normalised by mean and std, one value a channel."""
    if batch.dtype != torch.uint8:
        raise ValueError(f"normalize takes uint8 pixels of 0 to 255; these are {batch.dtype}")
    mean, std = (255 * torch.tensor(v, device=batch.device).view(-1, 1, 1) for v in (mean, std))  # (C, 1, 1)
    # Here channels, last in memory so far, come before the pixels of a frame, as the model takes them.
    return batch.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def mix(
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each clip of a batch (B, ..., H, W) with the one before it, and their targets (B, classes) in proportion.

    mixup: share * clip + (1 - share) * other, with the share from Beta(mixup, mixup), one for the batch. cutmix: the
    other is put into a box of 1 - share of the frame, the share from Beta(cutmix, cutmix); the box may reach out of
    the frame, and the targets go by the part that lies in it. 0 is off; where both are on, one of them is taken, each
    half of the time. `generator` is a CPU generator: nothing waits for the device. Clips are mixed in a new tensor.

    Sources: Zhang et al. 2018 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899).
    """
    alpha, cut = mixup, False
    if cutmix and (not mixup or torch.rand((), generator=generator) < 0.5):
        alpha, cut = cutmix, True
    if not alpha:
        return pixel_values, targets
    share = _beta(alpha, generator)
    others = pixel_values.roll(1, 0)
    if cut:
        top, bottom, left, right = _box(pixel_values.shape[-2:], 1 - share, generator)
        mixed = pixel_values.clone()
        mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (pixel_values.shape[-2] * pixel_values.shape[-1])
    else:
        mixed = torch.lerp(others, pixel_values, share)
    return mixed, torch.lerp(targets.roll(1, 0), targets, share)


def _beta(alpha: float, generator: torch.Generator | None) -> float:
    """Draw from Beta(alpha, alpha). Torch's own distribution takes no generator."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _box(frame, area: float, generator: torch.Generator | None) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the part in the frame (height, width) of a box of its shape and of `area` of it."""
    bounds = []
    for side in frame:
        centre = int(torch.randint(side, (), generator=generator))
        half = int(side * math.sqrt(area)) // 2
        bounds += [max(0, centre - half), min(side, centre + half)]
    return tuple(bounds)


def random_erasing(
    batch: torch.Tensor,
    probability: float = 0.25,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Fill one box of some clips of a normalised batch (B, T, C, H, W) with normal noise, in place; return the batch.

    A clip is chosen with `probability`; its box lies at the same place in all frames, its noise differs (pixel mode).
    `area` bounds the box's share of the frame, `ratio` its height / width. `generator` is a CPU generator for the
    choice of clips and boxes: nothing waits for the device.
    """
    chosen = torch.rand(len(batch), generator=generator) < probability
    for clip in (batch[i] for i in chosen.nonzero().flatten().tolist()):
        top, left, height, width = _erasing_box(clip.shape[-2:], area, ratio, generator)
        clip[..., top : top + height, left : left + width].normal_()
    return batch


def _erasing_box(frame, area, ratio, generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random box inside a frame (height, width)."""
    u = torch.rand(4, generator=generator).tolist()
    pixels = frame[0] * frame[1] * (area[0] + (area[1] - area[0]) * u[0])
    aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[1])
    height = min(frame[0], max(1, round(math.sqrt(pixels * aspect))))
    width = min(frame[1], max(1, round(math.sqrt(pixels / aspect))))
    return int(u[2] * (frame[0] - height + 1)), int(u[3] * (frame[1] - width + 1)), height, width
