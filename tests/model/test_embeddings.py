"""Embeddings: positions, other grids than the config's, the gradient of the patch projection."""

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.models import MODELS, assert_identical, build, clips, main

from everest_hf import EverestForPreTraining, EverestModel
from everest_hf.embeddings_everest import EverestPositionEmbeddings


@pytest.mark.parametrize("model_class", MODELS)
def test_interpolation_to_the_own_grid_changes_nothing(model_class):
    model = build(model_class)
    assert_identical(model(clips()), model(clips(), interpolate_pos_encoding=True))


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("oversampling", [1.0, 1.5])
@pytest.mark.parametrize(("slots", "rows", "columns"), [(6, 3, 5), (4, 5, 2), (8, 6, 10), (2, 3, 5)])
def test_other_sizes_and_frame_counts_run(model_class, oversampling, slots, rows, columns):
    model = build(model_class, frame_oversampling=oversampling)
    frames = int(slots * oversampling) * 3
    output = model(torch.randn(2, frames, 3, rows * 8, columns * 8), interpolate_pos_encoding=True)
    tokens = slots * rows * columns
    assert torch.isfinite(main(output)).all()
    if model_class is EverestForPreTraining:
        assert output.visible_ids.shape[1] == reference.share(0.15, tokens)
        assert output.target_ids.shape[1] == reference.share(0.4, tokens) - reference.share(0.15, tokens)
        assert output.target_ids.max() < tokens
    else:
        assert output.kept_ids.shape[1] == reference.share(0.45, tokens)
        assert output.kept_ids.max() < tokens
    assert (output.slots is None) is (oversampling == 1)
    if oversampling > 1:
        assert output.slots.shape == (2, slots)


def test_positions_are_interpolated_over_slot_row_and_column():
    positions = EverestPositionEmbeddings((4, 3, 5), 32)
    table = reference.positions(60, 32)
    np.testing.assert_allclose(positions((4, 3, 5)), table, atol=1e-6)
    own = table.reshape(4, 3, 5, 32)
    for axis in range(3):
        grid = [4, 3, 5]
        grid[axis] *= 2
        doubled = np.moveaxis(positions(tuple(grid)).numpy().reshape(*grid, 32), axis, 0)
        given = np.moveaxis(own, axis, 0)
        for i in range(len(given) - 1):  # new places lie a quarter of the way from the old ones
            np.testing.assert_allclose(doubled[2 * i + 1], 0.75 * given[i] + 0.25 * given[i + 1], atol=1e-6)
            np.testing.assert_allclose(doubled[2 * i + 2], 0.25 * given[i] + 0.75 * given[i + 1], atol=1e-6)


def test_positions_stay_exact_when_the_model_is_cast():
    positions = EverestPositionEmbeddings((4, 3, 5), 32)
    exact = positions.table.clone()
    for cast in (positions.bfloat16(), positions.half(), positions.float(), positions.to(torch.float64)):
        assert torch.equal(cast.table.float(), exact)


def test_the_gradient_of_the_projection_is_that_of_the_kept_tokens():
    model = build(EverestModel).double()
    pixel_values = clips().double().requires_grad_()
    output = model(pixel_values)
    weights = torch.randn_like(output.last_hidden_state)
    (output.last_hidden_state * weights).sum().backward()
    touched = pixel_values.grad.reshape(2, 4, 3, 3, 3, 8, 5, 8).abs().amax(dim=(2, 3, 5, 7)).flatten(1) > 0
    kept = torch.zeros(2, 60, dtype=torch.bool).scatter(1, output.kept_ids, True)
    assert torch.equal(touched, kept)

    def loss(flat):
        weight = flat.reshape(model.embeddings.projection.weight.shape)
        parameters = {"embeddings.projection.weight": weight}
        states = torch.func.functional_call(model, parameters, (pixel_values.detach(),)).last_hidden_state
        return (states * weights).sum()

    point = model.embeddings.projection.weight.detach().flatten()
    direction = torch.randn_like(point)
    step = 1e-6 * direction
    numeric = (loss(point + step) - loss(point - step)) / 2e-6
    analytic = (model.embeddings.projection.weight.grad.flatten() * direction).sum()
    assert analytic.item() == pytest.approx(numeric.item(), rel=1e-4)
