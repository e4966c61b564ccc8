"""Selection of frames, against the independent reference."""

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.models import FRAMES, LIGHT, MODELS, build, clips, embedded
from helpers.tiny import tiny_config

from everest_hf import EverestForPreTraining, EverestModel


def frame_clip(strengths, config, batch_size=1, seed=0):
    """Return a clip (B, T, C, H, W) in which about `strengths` places of each candidate slot change."""
    pixel_values = clips(config, batch_size, seed)[:, :1].repeat(1, config.num_input_frames, 1, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    _, rows, columns = config.grid_size
    side = config.patch_size
    for slot, strength in enumerate(strengths):
        for place in torch.randperm(rows * columns, generator=generator)[:strength].tolist():
            top, left = place // columns * side, place % columns * side
            block = pixel_values[:, slot * config.tubelet_size :, :, top : top + side, left : left + side]
            block += torch.randn(batch_size, 1, config.num_channels, side, side, generator=generator)
    return pixel_values


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_evaluation_takes_the_slots_with_most_informative_tokens(model_class, seed):
    model = build(model_class, **FRAMES)
    pixel_values = clips(model.config, batch_size=3, seed=seed)
    ratio = model.config.pretraining_keep_ratio if model_class is EverestForPreTraining else model.config.keep_ratio
    with torch.no_grad():
        slots = model(pixel_values).slots
    for clip, chosen in zip(pixel_values, slots.tolist(), strict=True):
        counts = reference.informative_per_slot(embedded(model, clip), 6, ratio)
        assert sum(counts) == reference.share(ratio, 90)
        assert chosen == reference.choose_slots(counts, 4)


def test_still_slots_are_left_out_and_ties_go_to_the_earlier():
    model = build(EverestModel, keep_ratio=0.4, **FRAMES)
    pixel_values = frame_clip([0, 0, 12, 0, 12, 12], model.config, batch_size=2)
    output = model(pixel_values)
    assert output.slots.tolist() == [[0, 2, 4, 5]] * 2
    still = frame_clip([0] * 6, model.config)
    assert model(still).slots.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("overrides", [{}, {"token_selection": "random"}, {"token_selection": "tube"}], ids=str)
def test_frame_selection_equals_a_plain_model_on_the_chosen_frames(model_class, overrides):
    model = build(model_class, **FRAMES, **overrides)
    plain = model_class(tiny_config(**overrides)).eval()
    plain.load_state_dict(model.state_dict())
    pixel_values = clips(model.config, batch_size=3)
    with torch.no_grad():
        output = model(pixel_values, output_scores=True)
        frames = torch.stack(
            [
                clip.unflatten(0, (6, 3))[slots].flatten(0, 1)
                for clip, slots in zip(pixel_values, output.slots, strict=True)
            ]
        )
        expected = plain(frames, output_scores=True)
    assert len(set(map(tuple, output.slots.tolist()))) > 1
    assert expected.slots is None
    for name in expected:
        if name != "loss":
            assert torch.equal(output[name], expected[name]), name
    if "loss" in expected:
        torch.testing.assert_close(output.loss, expected.loss)


def test_a_keep_ratio_at_call_time_moves_no_slot():
    model = build(EverestModel, **FRAMES)
    pixel_values = clips(model.config)
    expected = model(pixel_values)
    for keep_ratio in (0.1, 0.8, 1):
        output = model(pixel_values, keep_ratio=keep_ratio)
        assert torch.equal(output.slots, expected.slots)
        assert output.kept_ids.shape[1] == reference.share(keep_ratio, 60)


@pytest.mark.parametrize("pretraining", [False, True])
def test_training_draws_slots_with_the_right_probabilities(pretraining):
    model = build(EverestModel, **FRAMES, **LIGHT).train()
    pixel_values = frame_clip([3, 2, 14, 5, 9, 7], model.config)
    ratio = model.config.pretraining_keep_ratio if pretraining else model.config.keep_ratio
    counts = reference.informative_per_slot(embedded(model, pixel_values[0]), 6, ratio)
    expected = reference.inclusion_probabilities(counts, 4)
    assert expected.max() - expected.min() > 0.2  # or the test could not fail
    torch.manual_seed(0)
    draws = 6000
    slots = model.embeddings(pixel_values.expand(draws, -1, -1, -1, -1), pretraining=pretraining).slots
    assert (slots.diff(dim=1) > 0).all()  # in time order, none twice
    share = torch.bincount(slots.flatten(), minlength=6).double().numpy() / draws
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(share - expected) <= 4 * error + 1e-9).all(), (share, expected)


def test_frame_noise_decides_the_draw():
    model = build(EverestModel, **FRAMES)
    pixel_values = clips(model.config)
    noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    first = model(pixel_values, frame_noise=noise).slots
    assert torch.equal(first, model.train()(pixel_values, frame_noise=noise).slots)
    others = [model(pixel_values, frame_noise=torch.rand(2, 6)).slots for _ in range(8)]
    assert any(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("value", [0.0, 1.0 - 2**-24, 1.0])
def test_frame_noise_at_its_ends_still_gives_distinct_slots(value):
    model = build(EverestModel, **FRAMES)
    slots = model(clips(model.config), frame_noise=torch.full((2, 6), value)).slots
    assert (slots.diff(dim=1) > 0).all()


def test_without_oversampling_no_frame_is_selected():
    for oversampling in (1.0, 1.2):  # 1.2 of 12 frames are 14, rounded down to 12
        model = build(EverestModel, frame_oversampling=oversampling)
        assert model(clips(model.config)).slots is None
