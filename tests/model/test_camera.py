"""What changes beside the camera's motion: moves that are found, scores, and the models that select by them."""

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.models import build, clips
from helpers.tiny import tiny_config

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel
from everest_hf.camera_everest import camera_moves, changes_beside_camera

SIZES = {"one level": (24, 40), "two levels": (60, 90), "three levels, strided": (117, 150)}


def scene(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Draw a picture in [0, 1] with blotches of all sizes: (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(3, height, width)
    for cell in (1, 2, 4, 8, 16):
        blotches = torch.rand(3, height // cell + 1, width // cell + 1, generator=generator)
        picture += blotches.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width]
    return picture / 5


def panned(size: tuple[int, int], moves: list[tuple[int, int]], tubelet: int = 3) -> torch.Tensor:
    """Return slots (1, t, tubelet, 3, H, W) of a scene that has moved by so many pixels from each to the next."""
    height, width = size
    whole = scene(3 * height, 3 * width)
    y, x, views = height, width, []
    for down, right in [(0, 0), *moves]:
        y, x = y - down, x - right
        views.append(whole[:, y : y + height, x : x + width].expand(tubelet, -1, -1, -1))
    return torch.stack(views)[None]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_moves_of_the_camera_are_found(size):
    far_y, far_x = (side // 12 for side in size)
    moves = [(0, 0), (1, -1), (far_y, far_x), (-far_y, 0), (0, far_x), (-1, -far_x)]
    slots = panned(size, moves)
    assert camera_moves(slots)[0].tolist() == [list(move) for move in moves]
    assert changes_beside_camera(slots, camera_moves(slots)).abs().max() == 0
    noisy = slots + 0.02 * torch.randn(slots.shape, generator=torch.Generator().manual_seed(1))
    assert camera_moves(noisy)[0].tolist() == [list(move) for move in moves]
    brighter = slots * torch.linspace(1, 1.1, len(moves) + 1).view(-1, 1, 1, 1, 1)
    assert camera_moves(brighter)[0].tolist() == [list(move) for move in moves]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_moves_and_changes_are_what_the_reference_computes(size):
    far_y, far_x = (side // 12 for side in size)
    slots = panned(size, [(1, -1), (-far_y, far_x), (0, 0)], tubelet=2)
    slots = slots + 0.05 * torch.randn(slots.shape, generator=torch.Generator().manual_seed(1))
    slots[:, 2:, :, :, 5:15, 5:20] += 0.4
    found = camera_moves(slots / 0.25, 0.25)
    own = list((slots[0] / 0.25).double().numpy())
    expected = reference.camera_moves(own, 0.25)
    assert found[0].tolist() == [list(move) for move in expected]
    changes = reference.changes_beside_camera(own, expected)
    np.testing.assert_allclose(changes_beside_camera(slots / 0.25, found)[0], changes, atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "noise", "another scene", "too far", "stripes"])
def test_where_no_move_explains_the_change_there_is_none(kind):
    size = (48, 64)
    if kind == "too far":
        slots = panned(size, [(24, 30), (-20, 28)])
    else:
        slots = torch.full((1, 3, 2, 3, *size), 0.5)
        if kind == "noise":
            slots = slots + 0.05 * torch.randn(slots.shape, generator=torch.Generator().manual_seed(0))
        elif kind == "another scene":
            slots = torch.stack([scene(*size, seed).expand(2, -1, -1, -1) for seed in range(3)])[None]
        elif kind == "stripes":  # alike at several moves, also at none
            slots = slots + 0.4 * torch.arange(64).div(2, rounding_mode="floor").remainder(2)
    assert camera_moves(slots).abs().max() == 0


def test_what_moves_on_its_own_is_no_motion_of_the_camera():
    slots = panned((48, 64), [(0, 0)] * 3)
    slots = slots.clone()
    for i in range(4):
        slots[0, i, :, :, 10:30, 8 + 3 * i : 28 + 3 * i] = 0.9
    assert camera_moves(slots).abs().max() == 0


@pytest.mark.parametrize("model_class", [EverestModel, EverestForVideoClassification, EverestForPreTraining])
def test_scores_are_what_the_reference_computes(model_class):
    model = build(model_class, token_selection="compensated")
    config = model.config
    slots = panned(config.frame_size, [(1, -3), (-2, 1), (0, 0)])
    slots = slots + 0.02 * torch.randn(slots.shape, generator=torch.Generator().manual_seed(1))
    slots[0, 1:, :, :, 4:9, 20:26] += 0.5
    pixel_values = (slots.flatten(1, 2) - 0.5) / 0.25
    with torch.no_grad():
        output = model(pixel_values, output_scores=True)
    base = model.base_model
    kernel = base.embeddings.projection.weight.detach().double().numpy()
    kernel = kernel.reshape(-1, 3, config.tubelet_size, config.patch_size, config.patch_size)
    expected = reference.compensated_scores(pixel_values[0].double().numpy(), kernel, scale=0.25)
    np.testing.assert_allclose(output.scores[0], expected, rtol=1e-4, atol=1e-5)
    assert reference.camera_moves(list(slots[0].double().numpy() / 0.25), 0.25)[:2] == [(1, -3), (-2, 1)]
    if model_class is not EverestForPreTraining:
        wanted = sorted(reference.top(expected, config.num_kept_tokens()))
        assert output.kept_ids[0].tolist() == wanted


def test_without_motion_of_the_camera_scores_are_those_of_motion():
    model = build(EverestForVideoClassification)
    slots = panned(model.config.frame_size, [(0, 0)] * 3)
    slots = slots + 0.02 * torch.randn(slots.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(slots.flatten(1, 2), output_scores=True)
        model.config.token_selection = "compensated"
        found = model(slots.flatten(1, 2), output_scores=True)
    torch.testing.assert_close(found.scores, plain.scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.kept_ids, plain.kept_ids)
    torch.testing.assert_close(found.logits, plain.logits, atol=1e-5, rtol=1e-5)


def test_what_moves_before_a_camera_that_moves_is_kept():
    model = build(EverestForVideoClassification, keep_ratio=0.15)
    slots = panned(model.config.frame_size, [(1, -2)] * 3).clone()
    for i in range(4):  # the middle of a token of each slot
        slots[0, i, :, :, 10:14, 8 * i + 2 : 8 * i + 6] += 0.25
    tokens = {15 * i + 5 + i for i in range(1, 4)}
    kept = {}
    for selection in ("motion", "compensated"):
        model.config.token_selection = selection
        kept[selection] = set(model(slots.flatten(1, 2)).kept_ids[0].tolist())
    assert tokens <= kept["compensated"]
    assert not tokens <= kept["motion"]


def test_chosen_slots_are_compared_with_each_other():
    config = tiny_config(token_selection="compensated", frame_oversampling=1.5)
    torch.manual_seed(0)
    model = EverestForVideoClassification(config).eval()
    pixel_values = clips(config)
    with torch.no_grad():
        output = model(pixel_values, output_scores=True)
        frames = (output.slots[..., None] * 3 + torch.arange(3)).flatten(1)
        chosen = torch.stack([clip[ids] for clip, ids in zip(pixel_values, frames, strict=True)])
        expected = model.everest.embeddings.score_beside_camera(chosen)
    assert torch.equal(output.scores, expected)
