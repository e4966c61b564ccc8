"""Input that does not fit is refused in one line."""

import functools

import pytest
import torch
from helpers.models import FRAMES, MODELS, build, clips, mask
from helpers.tiny import tiny_config

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel


def refused(match, model, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        model(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_class", MODELS)
def test_clips_that_do_not_fit_are_refused(model_class):
    model = build(model_class)
    call = functools.partial(refused, model=model)
    call(r"frames 11.*expected 12", pixel_values=torch.rand(2, 11, 3, 24, 40))
    call(r"frames 24.*expected 12", pixel_values=torch.rand(2, 24, 3, 24, 40))
    call(r"\(40, 24\).*\(24, 40\)", pixel_values=torch.rand(2, 12, 3, 40, 24))
    call(r"1 channels.*num_channels=3", pixel_values=torch.rand(2, 12, 1, 24, 40))
    # Channels before frames, as in (B, C, T, H, W).
    call(r"12 channels.*num_channels=3", pixel_values=torch.rand(2, 3, 12, 24, 40))
    call(r"\(12, 3, 24, 40\).*five", pixel_values=torch.rand(12, 3, 24, 40))
    call(r"uint8.*float", pixel_values=torch.zeros(2, 12, 3, 24, 40, dtype=torch.uint8))
    call(r"int64.*float", pixel_values=torch.zeros(2, 12, 3, 24, 40, dtype=torch.int64))


@pytest.mark.parametrize("model_class", MODELS)
def test_frame_selection_wants_all_candidates(model_class):
    refused(r"frames 12.*expected 18", build(model_class, **FRAMES), torch.rand(2, 12, 3, 24, 40))


@pytest.mark.parametrize("model_class", MODELS)
def test_other_sizes_are_checked_too(model_class):
    call = functools.partial(refused, model=build(model_class), interpolate_pos_encoding=True)
    call(r"frames 13.*multiple of 3", pixel_values=torch.rand(1, 13, 3, 24, 40))
    call(r"height 28.*multiple of 8", pixel_values=torch.rand(1, 12, 3, 28, 40))
    call(r"width 42.*multiple of 8", pixel_values=torch.rand(1, 12, 3, 24, 42))
    call(r"frames 3", pixel_values=torch.rand(1, 3, 3, 24, 40))  # one slot: no motion
    call(r"frames 0", pixel_values=torch.rand(1, 0, 3, 24, 40))
    call(r"width 0", pixel_values=torch.rand(1, 12, 3, 24, 0))


def test_a_grid_too_small_for_the_ratios_is_refused():
    small = torch.rand(1, 6, 3, 8, 8)  # two tokens
    refused("mask_ratio", build(EverestForPreTraining), small, interpolate_pos_encoding=True)
    refused("keep_ratio", build(EverestModel), small, interpolate_pos_encoding=True)
    no_target = build(EverestForPreTraining, mask_ratio=0.5, pretraining_keep_ratio=0.6)
    refused("pretraining_keep_ratio", no_target, small, interpolate_pos_encoding=True)


@pytest.mark.parametrize("model_class", MODELS)
def test_masks_that_do_not_fit_are_refused(model_class):
    model = build(model_class)
    pixel_values = clips(model.config)
    uneven = mask(41)
    uneven[0, uneven[0].nonzero()[0]] = False
    refused(r"\[40, 41\].*same number", model, pixel_values, bool_masked_pos=uneven)
    refused(r"\(2, 59\).*\(2, 60\)", model, pixel_values, bool_masked_pos=mask(41)[:, 1:])
    refused(r"\(1, 60\).*\(2, 60\)", model, pixel_values, bool_masked_pos=mask(41)[:1])
    refused("at least one", model, pixel_values, bool_masked_pos=torch.ones(2, 60, dtype=torch.bool))


def test_noise_that_does_not_fit_is_refused():
    pixel_values = clips(tiny_config())
    for selection, count in (("motion", 24), ("random", 60), ("tube", 15)):
        model = build(EverestForPreTraining, token_selection=selection)
        refused(rf"noise.*\(2, 7\).*\(2, {count}\)", model, pixel_values, noise=torch.rand(2, 7))
        refused(rf"noise.*\(1, {count}\).*\(2, {count}\)", model, pixel_values, noise=torch.rand(1, count))
    for selection, count in (("random", 60), ("tube", 15)):
        model = build(EverestForVideoClassification, token_selection=selection)
        refused(rf"noise.*\(2, 7\).*\(2, {count}\)", model, pixel_values, noise=torch.rand(2, 7))
    model = build(EverestModel, **FRAMES)
    for shape in ((1, 6), (2, 5)):
        refused(r"frame_noise.*\(2, 6\)", model, clips(model.config), frame_noise=torch.rand(shape))


@pytest.mark.parametrize("keep_ratio", [0, -0.1, 1.1, float("nan"), "0.5", True])
def test_an_impossible_keep_ratio_is_refused(keep_ratio):
    for model_class in (EverestModel, EverestForVideoClassification):
        refused(f"keep_ratio.*{keep_ratio}", build(model_class), clips(tiny_config()), keep_ratio=keep_ratio)


def test_a_keep_ratio_that_keeps_nothing_is_refused():
    refused("keep_ratio.*0.016", build(EverestModel), clips(tiny_config()), keep_ratio=0.016)
