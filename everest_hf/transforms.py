"""Clip in, clip out: torch tensors, uint8 up to the device, one random draw for all frames of a clip.

Randomness comes from torch's default generator, as in torchvision; `seeded` makes it a function of a seed.
"""

import math
from contextlib import contextmanager

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .video_processing_everest import cover_size, crop_at, view_position

MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)


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
    """

    def __init__(self, size: tuple[int, int], scales: tuple[float, ...] = MULTI_SCALES):
        super().__init__()
        self.size, self.scales = tuple(size), tuple(scales)
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


def finetuning_transform(
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    rand_augment: tuple[int, int] | None = None,
) -> v2.Transform:
    """Random resized crop to `size`, flip, RandAugment of a clip uint8 (T, C, H, W); in this order, so that colour
    work is done on the small frame.

    `scale` and `ratio` (width / height) bound the crop's share of the frame and its shape. `flip` is a probability.
    `rand_augment` is (number of operations, magnitude of 0 to 10), or None for none.
    """
    steps: list[v2.Transform] = [v2.RandomResizedCrop(list(size), scale=scale, ratio=ratio, antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if rand_augment is not None:
        num_ops, magnitude = rand_augment
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandAugment(num_ops, magnitude, num_magnitude_bins=11, interpolation=bilinear))
    return v2.Compose(steps)


def evaluation_crops(clip: torch.Tensor, size: tuple[int, int], num_crops: int = 1) -> torch.Tensor:
    """Scale a clip uint8 (T, C, H, W) to just cover `size` and crop it `num_crops` times: (num_crops, T, C, *size).

    The crops are spread evenly over the side that sticks out; a single one is the centre, as the processor cuts it.
    """
    clip = F.resize(clip, list(cover_size(*clip.shape[-2:], size)), antialias=True)
    return torch.stack([crop_at(clip, size, view_position(k, num_crops)) for k in range(num_crops)])


# ---------------------------------------------------------------------- on the batch, on the device


def normalize(batch: torch.Tensor, mean, std) -> torch.Tensor:
    """Return uint8 (..., C, H, W) as float32, scaled to [0, 1] and normalised by mean and std, one value a channel."""
    if batch.dtype != torch.uint8:
        raise ValueError(f"normalize takes uint8 pixels of 0 to 255; these are {batch.dtype}")
    mean, std = (255 * torch.tensor(v, device=batch.device).view(-1, 1, 1) for v in (mean, std))  # (C, 1, 1)
    return batch.to(torch.float32).sub_(mean).div_(std)


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
