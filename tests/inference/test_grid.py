"""Tokens at their places: every kept one at its own, every other place filled."""

import pytest
import torch
from helpers.tiny import tiny_config

from everest_hf import EverestModel
from everest_hf.inference import tokens_to_grid

GRID = (4, 3, 5)


@pytest.fixture(scope="module")
def model() -> EverestModel:
    torch.manual_seed(0)
    return EverestModel(tiny_config()).eval()


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return torch.randn(2, 12, 3, 24, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fill", [0.0, -2.5, float("nan"), torch.arange(32.0)], ids=str)
def test_kept_tokens_are_at_their_places(model, clips, fill):
    output = model(clips)
    grid = tokens_to_grid(output, model.config.grid_size, fill)
    assert grid.shape == (2, *GRID, 32)
    for b in range(2):
        places = {int(i): token for i, token in zip(output.kept_ids[b], output.last_hidden_state[b], strict=True)}
        for i in range(60):
            found = grid[b, i // 15, i % 15 // 5, i % 5]
            expected = places.get(i, torch.as_tensor(fill).expand(32))
            torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)
    grid.nansum().backward()
    assert model.embeddings.projection.weight.grad.abs().max() > 0


def test_what_does_not_fit_is_named(model, clips):
    output = model(clips)
    with pytest.raises(ValueError, match=r"^fill has the shape \(31,\); expected a number or a vector \(32,\)$"):
        tokens_to_grid(output, GRID, torch.zeros(31))
    with pytest.raises(ValueError, match=r"^grid_size is \(1, 3, 5\), 15 places; the output has token \d+$"):
        tokens_to_grid(output, (1, 3, 5))
