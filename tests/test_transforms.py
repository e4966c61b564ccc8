"""Transforms of clips and batches."""

import numpy as np
import pytest
import torch

from everest_hf.transforms import (
    MultiScaleCrop,
    evaluation_crops,
    finetuning_transform,
    normalize,
    pretraining_transform,
    random_erasing,
    seeded,
)
from everest_hf.video_processing_everest import cover_size

SIZE = (24, 40)


def position_clip(frames: int = 5, height: int = 60, width: int = 80) -> torch.Tensor:
    """Clip uint8 (T, 3, H, W) whose channels are 3 * row, 3 * column, and 40 * frame."""
    rows = (3 * torch.arange(height)).view(-1, 1).expand(height, width)
    columns = (3 * torch.arange(width)).expand(height, width)
    stills = torch.stack([torch.stack([rows, columns, torch.full_like(rows, 40 * t)]) for t in range(frames)])
    return stills.to(torch.uint8)


def crop_box(clip: torch.Tensor) -> np.ndarray:
    """Top, left, bottom and right of the crop of a position_clip, in its pixels, read off the values."""
    values = clip[0].float() / 3
    return np.array([values[0].min(), values[1].min(), values[0].max(), values[1].max()])


TRANSFORMS = {
    "pre-training": pretraining_transform(SIZE),
    "fine-tuning": finetuning_transform(SIZE),
    "fine-tuning with RandAugment": finetuning_transform(SIZE, rand_augment=(4, 7)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("frame", [(60, 80), (80, 60), (24, 40), (10, 17)])
def test_shape_and_dtype(name, frame):
    clip = TRANSFORMS[name](position_clip(3, *frame))
    assert clip.dtype == torch.uint8
    assert clip.shape == (3, 3, *SIZE)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_draw_for_all_frames_of_a_clip(name):
    still = torch.randint(256, (1, 3, 60, 80), dtype=torch.uint8).expand(6, -1, -1, -1)
    for seed in range(10):
        with seeded(seed):
            clip = TRANSFORMS[name](still)
        assert (clip == clip[:1]).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_seed_decides_and_leaves_the_default_generator_alone(name):
    clip, results = position_clip(), []
    state = torch.get_rng_state()
    for seed in (5, 5, 6, 7, 8):
        with seeded(seed):
            results.append(TRANSFORMS[name](clip))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert any(not torch.equal(results[0], other) for other in results[2:])


def test_multi_scale_crop_draws_its_scales_and_places():
    crop = MultiScaleCrop((32, 32), scales=(1.0, 0.75, 0.5))
    clip = torch.zeros(1, 3, 64, 96)
    boxes = []
    for seed in range(400):
        with seeded(seed):
            boxes.append(crop.make_params([clip]))
    sizes = {(box["height"], box["width"]) for box in boxes}
    assert sizes == {(64, 64), (64, 48), (48, 64), (48, 48), (48, 32), (32, 48), (32, 32)}
    smallest = {(box["top"], box["left"]) for box in boxes if (box["height"], box["width"]) == (32, 32)}
    assert len(smallest) == 13
    assert {(0, 0), (0, 64), (32, 0), (32, 64), (16, 32), (8, 16)} <= smallest


def test_multi_scale_crop_keeps_the_shape_of_a_frame_that_is_not_square():
    crop = MultiScaleCrop(SIZE, scales=(1.0,))
    box = crop.make_params([torch.zeros(1, 3, 60, 80)])
    assert (box["height"], box["width"]) == (48, 80)


def test_multi_scale_crop_shows_the_part_that_it_drew():
    with seeded(3):
        box = MultiScaleCrop(SIZE).make_params([position_clip()])
    with seeded(3):
        found = crop_box(MultiScaleCrop(SIZE)(position_clip()))
    expected = [box["top"], box["left"], box["top"] + box["height"] - 1, box["left"] + box["width"] - 1]
    assert np.abs(found - expected).max() <= 1.5


def test_random_resized_crop_follows_scale_and_flip():
    whole = finetuning_transform(SIZE, scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip=0.0)(position_clip())
    assert np.abs(crop_box(whole) - [0, 0, 59, 79]).max() <= 2
    flipped = finetuning_transform(SIZE, scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip=1.0)(position_clip())
    assert torch.equal(flipped, whole.flip(-1))


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("frame", "target", "covered"),
    [
        ((60, 80), (24, 24), (24, 32)),
        ((80, 60), (24, 24), (32, 24)),
        ((60, 80), (24, 40), (30, 40)),
        ((7, 7), (24, 40), (40, 40)),
    ],
)
def test_cover_size(frame, target, covered):
    assert cover_size(*frame, target) == covered


def test_single_crop_is_the_centre():
    crops = evaluation_crops(position_clip(4, 60, 80), (30, 30))
    assert crops.shape == (1, 4, 3, 30, 30)
    box = crop_box(crops[0])
    assert abs((box[1] + box[3]) / 2 - 39.5) < 0.6
    assert np.abs(box[[0, 2]] - [0, 59]).max() <= 1


@pytest.mark.parametrize(("frame", "axis"), [((60, 80), 1), ((80, 60), 0)])
def test_crops_are_spread_over_the_long_side(frame, axis):
    crops = evaluation_crops(position_clip(2, *frame), (60, 60), num_crops=3)  # no scaling: places are exact
    starts = [crop_box(crop)[axis] for crop in crops]
    assert starts == [0, 10, 20]
    assert all(crop_box(crop)[1 - axis] == 0 for crop in crops)


# ---------------------------------------------------------------------- batches


def test_normalize():
    batch = torch.randint(256, (2, 4, 3, 6, 10), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = (batch.double().numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    result = normalize(batch, mean, std)
    assert result.dtype == torch.float32
    assert np.abs(result.numpy() - expected).max() < 1e-5
    with pytest.raises(ValueError, match=r"uint8.*torch\.float32"):
        normalize(result, mean, std)


def test_random_erasing_fills_one_box_a_clip_with_fresh_noise():
    batch = random_erasing(torch.full((64, 4, 3, 24, 40), 9.0), 0.5, generator=torch.Generator().manual_seed(0))
    changed = batch != 9
    erased = changed.flatten(1).any(1)
    assert 20 < erased.sum() < 44
    for clip, mask in zip(batch[erased], changed[erased], strict=True):
        assert (mask == mask[:1, :1]).all()  # the same box in all frames and channels
        rows, columns = mask[0, 0].any(1).nonzero().flatten(), mask[0, 0].any(0).nonzero().flatten()
        assert (
            mask[0, 0].sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        )
        assert 0.01 < mask[0, 0].float().mean() < 0.37
        box = clip[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert not torch.equal(box[0], box[1])
    noise = batch[changed]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_random_erasing_by_probability_and_generator():
    batch = torch.zeros(6, 2, 3, 24, 40)
    assert (random_erasing(batch.clone(), 0.0) == 0).all()
    assert (random_erasing(batch.clone(), 1.0) != 0).flatten(1).any(1).all()
    masks = [random_erasing(batch.clone(), 0.5, generator=torch.Generator().manual_seed(s)) != 0 for s in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
