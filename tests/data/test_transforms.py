"""Transforms of clips and batches."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import tiny_config
from helpers.videos import write_clip
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import v2

from everest_hf.data import VideoClips, collate
from everest_hf.data.rand_augment import FAST, MAX_MAGNITUDE, OPERATIONS, RandAugment
from everest_hf.data.transforms import (
    MultiScaleCrop,
    evaluation_crops,
    finetuning_transform,
    mix,
    normalize,
    pretraining_transform,
    random_erasing,
    seeded,
    stack_clips,
)
from everest_hf.training.inputs import model_inputs
from everest_hf.training.loaders import build_transform
from everest_hf.training.recipe import load_recipe
from everest_hf.video_processing_everest import cover_size

SIZE = (24, 40)
FILL = (124, 116, 104)


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
    "fine-tuning with RandAugment": finetuning_transform(SIZE, rand_augment=7),
    "fine-tuning as the release": finetuning_transform(SIZE, rand_augment=7, augmentation="release"),
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


@pytest.mark.parametrize("name", TRANSFORMS)
def test_calls_draw_anew_and_leave_their_input_alone(name):
    # Repeated augmentation cuts several clips from one decoded clip, also where nothing has to be scaled.
    for clip in (position_clip(), torch.randint(256, (3, 3, *SIZE), dtype=torch.uint8)):
        before = clip.clone()
        with seeded(0):
            results = [TRANSFORMS[name](clip) for _ in range(8)]
        assert torch.equal(clip, before)
        assert sum(not torch.equal(a, b) for a, b in pairwise(results)) >= 4


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_reach_processes_that_are_not_forked(name):
    clip, transform = position_clip(), pickle.loads(pickle.dumps(TRANSFORMS[name]))
    with seeded(1):
        expected = TRANSFORMS[name](clip)
    with seeded(1):
        assert torch.equal(transform(clip), expected)


def test_short_side_is_the_most_that_the_smallest_crop_can_use():
    crop = pretraining_transform(SIZE, scales=(1.0, 0.7))
    sizes = []
    for seed in range(100):
        with seeded(seed):
            box = crop.make_params([torch.zeros(1, 3, crop.short_side, 2 * crop.short_side)])
            sizes.append((box["height"], box["width"]))
    assert np.less_equal(SIZE, np.min(sizes, axis=0)).all()
    assert crop.short_side == 58  # 40 / 0.7, up
    assert finetuning_transform(SIZE).short_side is None


def test_the_decoder_gives_no_more_than_a_transform_can_use(tmp_path):
    rows = Dataset.from_dict({"video": [str(write_clip(tmp_path / "large.mp4", height=240, width=320))]})
    sizes = {}
    for task in ("pre-training", "fine-tuning"):
        seen = []

        class Spy:
            short_side = TRANSFORMS[task].short_side

            def __call__(self, clip, seen=seen):
                seen.append(tuple(clip.shape[-2:]))
                return clip

        VideoClips(rows, Spy(), num_frames=4)[0]
        (sizes[task],) = seen
    assert sizes == {"pre-training": (61, 81), "fine-tuning": (240, 320)}  # 40 / 0.66, up


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


def test_the_release_augments_whole_frames_then_crops_then_flips():
    clip = torch.randint(256, (2, 3, 60, 80), dtype=torch.uint8)
    steps = [
        RandAugment(7, fill=FILL, exact=True),
        v2.RandomResizedCrop(SIZE, scale=(0.08, 1.0), antialias=False),
        v2.RandomHorizontalFlip(),
    ]
    transform = finetuning_transform(SIZE, rand_augment=7, augmentation="release")
    for seed in range(10):
        with seeded(seed):
            expected = clip
            for step in steps:
                expected = step(expected)
        with seeded(seed):
            assert torch.equal(transform(clip), expected)


def test_an_unknown_augmentation_is_named():
    with pytest.raises(ValueError, match="augmentation is 'quick'; it must be one of fast, release"):
        finetuning_transform(SIZE, augmentation="quick")


# ---------------------------------------------------------------------- RandAugment

# Arguments at magnitude 7 of 10 with positive sign, as published for the increasing set.
ARGUMENTS = {
    "auto_contrast": 0,
    "equalize": 0,
    "invert": 0,
    "rotate": 21.0,
    "posterize": 2,
    "solarize": 77,
    "solarize_add": 77,
    "color": 1.63,
    "contrast": 1.63,
    "brightness": 1.63,
    "sharpness": 1.63,
    "shear_x": 0.21,
    "shear_y": 0.21,
    "translate_x": 0.315,
    "translate_y": 0.315,
}
SIGNED = set(ARGUMENTS) - {"auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"}


def natural_frames(height: int = 45, width: int = 62) -> list[np.ndarray]:
    """Frames uint8 (H, W, 3): one of all values, one of few and with a channel of one value, one flat."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([128 + 90 * np.sin(rows / 9 + k) * np.cos(columns / 7 - k) for k in range(3)], -1)
    full = (smooth + rng.normal(0, 25, smooth.shape)).clip(0, 255).astype(np.uint8)
    narrow = 40 + full // 3
    narrow[..., 1] = 90
    return [full, narrow, np.full_like(full, 200)]


def pillow(name: str, image: Image.Image, argument: float, resample=Image.Resampling.NEAREST) -> Image.Image:
    """Do an operation of RandAugment by Pillow's functions."""
    width, height = image.size
    matrices = {
        "shear_x": (1, argument, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, argument, 1, 0),
        "translate_x": (1, 0, argument * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, argument * height),
    }
    if name in matrices:
        return image.transform(image.size, Image.Transform.AFFINE, matrices[name], resample, fillcolor=FILL)
    if name in ("color", "contrast", "brightness", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(image).enhance(argument)
    return {
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "rotate": lambda: image.rotate(argument, resample, fillcolor=FILL),
        "posterize": lambda: ImageOps.posterize(image, argument),
        "solarize": lambda: ImageOps.solarize(image, argument),
        "solarize_add": lambda: Image.eval(image, lambda i: min(255, i + argument) if i < 128 else i),
    }[name]()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_grow_with_the_magnitude(name):
    assert set(OPERATIONS) == set(ARGUMENTS)
    argument_of, _ = OPERATIONS[name]
    assert argument_of(0.7, 1) == pytest.approx(ARGUMENTS[name])
    mirrored = {"color", "contrast", "brightness", "sharpness"}
    expected = 2 - ARGUMENTS[name] if name in mirrored else -ARGUMENTS[name]
    assert argument_of(0.7, -1) == pytest.approx(expected if name in SIGNED else ARGUMENTS[name])
    frames, changes = natural_frames(), []
    for level in (0.3, 1.0):
        changed = [np.asarray(pillow(name, Image.fromarray(frame), argument_of(level, 1))) for frame in frames]
        changes.append(np.abs(np.array(changed).astype(int) - frames).mean())
    assert changes[1] >= changes[0] > 0


# Largest difference to Pillow, in levels of 0 to 255.
TOLERANCES = {"color": 2, "contrast": 2, "brightness": 2, "sharpness": 2, "auto_contrast": 1}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_fast_operations_are_those_of_pillow(name):
    augment, (argument_of, _) = RandAugment(7, fill=FILL), OPERATIONS[name]
    for frame in natural_frames():
        for level in (0.0, 0.13, 0.5, 0.7, 0.77, 1.0):
            for sign in (-1, 1):
                argument = argument_of(level, sign)
                expected = np.asarray(pillow(name, Image.fromarray(frame), argument)).astype(int)
                augment.apply(name, result := frame.copy(), argument)
                assert np.abs(result - expected).max() <= TOLERANCES.get(name, 0)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_exact_operations_are_those_of_pillow_bicubic(name):
    augment, (argument_of, _) = RandAugment(7, fill=FILL, exact=True), OPERATIONS[name]
    for frame in natural_frames():
        argument = argument_of(0.7, 1)
        expected = np.asarray(pillow(name, Image.fromarray(frame), argument, Image.Resampling.BICUBIC))
        augment.apply(name, result := frame.copy(), argument)
        assert np.array_equal(result, expected)


def test_the_tolerances_are_needed_by_fast_operations_alone():
    assert set(TOLERANCES) < set(FAST) < set(OPERATIONS)


def test_translation_shows_the_fill_colour():
    frame = natural_frames(20, 40)[0]
    RandAugment(7, fill=FILL).apply("translate_x", moved := frame.copy(), 0.25)
    assert np.array_equal(moved[:, :30], frame[:, 10:])
    assert (moved[:, 30:] == FILL).all()


def test_sharpness_blurs_with_the_kernel_of_pillow():
    frame = natural_frames()[0]
    FAST["sharpness"](blurred := frame.copy(), 0.0)
    expected = np.asarray(Image.fromarray(frame).filter(ImageFilter.SMOOTH)).astype(int)
    assert np.abs(blurred - expected).max() <= 1
    assert np.array_equal(blurred[0], frame[0])


def test_draws_of_rand_augment():
    augment = RandAugment(7, fill=FILL)
    with seeded(0):
        draws = [augment.draw() for _ in range(6000)]
    counts = np.bincount([len(draw) for draw in draws], minlength=5) / len(draws)
    assert counts == pytest.approx(np.array([1, 4, 6, 4, 1]) / 16, abs=0.03)  # four times, each by half
    drawn = [name for draw in draws for name, _ in draw]
    shares = [drawn.count(name) / len(drawn) for name in OPERATIONS]
    assert shares == pytest.approx([1 / len(OPERATIONS)] * len(OPERATIONS), abs=0.015)
    degrees = np.array([argument for draw in draws for name, argument in draw if name == "rotate"])
    assert np.abs(degrees).mean() == pytest.approx(21, abs=0.3)
    assert np.abs(degrees).std() == pytest.approx(1.5, abs=0.2)  # 0.5 of 10, of 30 degrees
    assert (degrees > 0).mean() == pytest.approx(0.5, abs=0.06)


def test_magnitudes_stay_in_their_range():
    augment = RandAugment(MAX_MAGNITUDE, fill=FILL)
    degrees = [abs(argument) for _ in range(500) for name, argument in augment.draw() if name == "rotate"]
    assert max(degrees) == pytest.approx(30)
    assert min(degrees) < 30


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
    channels_last = normalize(stack_clips(list(batch)), mean, std)
    assert torch.equal(channels_last, result)
    assert channels_last.is_contiguous()
    with pytest.raises(ValueError, match=r"uint8.*torch\.float32"):
        normalize(result, mean, std)


def mixed(batch=None, **alphas):
    """Mix a batch (3, 2, 1, 20, 30) whose clips are 0, 1 and 2 and whose targets are one-hot, with a seed."""
    batch = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 2, 1, 20, 30) if batch is None else batch
    return mix(batch, torch.eye(3), **alphas)


def test_mixup_by_hand():
    for seed in range(20):
        clips, targets = mixed(mixup=0.8, generator=torch.Generator().manual_seed(seed))
        share = float(targets[0, 0])
        expected = torch.tensor([[share, 0, 1 - share], [1 - share, share, 0], [0, 1 - share, share]])
        assert torch.allclose(targets, expected)
        # Clip 0 is mixed with 2, 1 with 0, 2 with 1.
        levels = torch.tensor([2 * (1 - share), share, 2 * share + (1 - share)])
        assert torch.allclose(clips, levels.view(3, 1, 1, 1, 1).expand_as(clips))


def test_cutmix_by_hand():
    shares = []
    for seed in range(40):
        clips, targets = mixed(cutmix=1.0, generator=torch.Generator().manual_seed(seed))
        cut = clips == torch.tensor([2.0, 0.0, 1.0]).view(3, 1, 1, 1, 1)
        assert ((clips == torch.arange(3.0).view(3, 1, 1, 1, 1)) ^ cut).all()
        assert (cut == cut[:1, :1]).all()  # the same box in all clips and frames
        rows, columns = cut[0, 0, 0].any(1).sum(), cut[0, 0, 0].any(0).sum()
        assert cut[0, 0, 0].sum() == rows * columns
        share = 1 - float(rows * columns) / 600
        assert targets[0].tolist() == pytest.approx([share, 0, 1 - share], abs=1e-6)
        assert targets[1].tolist() == pytest.approx([1 - share, share, 0], abs=1e-6)
        shares.append(share)
    assert min(shares) < 0.3
    assert max(shares) > 0.9


def test_shares_follow_beta():
    generator = torch.Generator().manual_seed(0)
    for alpha in (0.2, 1.0, 8.0):
        shares = [float(mixed(mixup=alpha, generator=generator)[1][0, 0]) for _ in range(800)]
        assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
        assert np.std(shares) == pytest.approx(math.sqrt(1 / (8 * alpha + 4)), abs=0.03)


def test_mixup_and_cutmix_take_turns_at_random():
    generator = torch.Generator().manual_seed(0)
    results = [mixed(mixup=1.0, cutmix=1.0, generator=generator)[0] for _ in range(200)]
    cuts = np.mean([torch.equal(clips, clips.round()) for clips in results])
    assert cuts == pytest.approx(0.5, abs=0.12)


def test_mix_off_and_its_generator():
    batch, targets = torch.rand(3, 2, 1, 4, 6), torch.eye(3)
    assert mix(batch, targets) == (batch, targets)
    before = batch.clone()
    results = [mix(batch, targets, cutmix=1.0, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(batch, before)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_training_smooths_labels_and_mixes():
    config = tiny_config()
    options = {"task": "finetune", "train": "videos", "erasing": 0.0, "label_smoothing": 0.2, "mixup": 0.8}
    batch = {"pixel_values": torch.randint(256, (3, 12, 3, 24, 40), dtype=torch.uint8)}
    batch |= {"labels": torch.tensor([0, 3, 4]), "seed": torch.arange(3)}
    inputs = model_inputs(batch, load_recipe(options=options), config)
    share = float(inputs["labels"][0, 0] - 0.04) / 0.8  # of 5 classes; 0.2 / 5 goes to each
    assert inputs["labels"][:, [0, 3, 4]].flatten().tolist() == pytest.approx(
        [0.04 + 0.8 * part for part in (share, 0, 1 - share, 1 - share, share, 0, 0, 1 - share, share)], abs=1e-5
    )
    clips = normalize(batch["pixel_values"], config.image_mean, config.image_std)
    expected = share * clips + (1 - share) * clips[[2, 0, 1]]
    assert torch.allclose(inputs["pixel_values"], expected, atol=1e-4)


def test_a_recipe_chooses_the_augmentation():
    clip, results = torch.randint(256, (2, 3, 60, 80), dtype=torch.uint8), {}
    for augmentation in ("fast", "release"):
        options = {"task": "finetune", "train": "videos", "augmentation": augmentation, "flip": False}
        transform = build_transform(load_recipe(options=options), tiny_config())
        colour = (0.4, 0.5, 0.6)  # the mean of the tiny configuration
        expected = finetuning_transform(SIZE, rand_augment=7, flip=0, fill=colour, augmentation=augmentation)
        for seed in range(5):
            with seeded(seed):
                results[augmentation, seed] = transform(clip)
            with seeded(seed):
                assert torch.equal(results[augmentation, seed], expected(clip))
    assert any(not torch.equal(results["fast", seed], results["release", seed]) for seed in range(5))


def test_stacked_clips_keep_channels_last_in_memory():
    clips = [torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8) for _ in range(3)]
    stacked = stack_clips(clips)
    assert torch.equal(stacked, torch.stack(clips))
    assert stacked.permute(0, 1, 3, 4, 2).is_contiguous()


def test_batches_of_the_loader_keep_channels_last_in_memory(tmp_path):
    rows = Dataset.from_dict({"video": [str(write_clip(tmp_path / f"{i}.mp4", seed=i)) for i in range(2)]})
    for name in ("pre-training", "fine-tuning with RandAugment"):
        clips = VideoClips(rows, TRANSFORMS[name], num_frames=4, num_sample=2)
        batch = collate([clips[0], clips[1]])["pixel_values"]
        assert batch.shape == (4, 4, 3, *SIZE)
        assert batch.permute(0, 1, 3, 4, 2).is_contiguous()
        assert torch.equal(batch[2], clips[1]["pixel_values"][0])


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
