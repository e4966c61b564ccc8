"""Tokens back at their places in the video."""

import math
from typing import Any

import torch


def tokens_to_grid(output: Any, grid_size: tuple[int, int, int], fill: float | torch.Tensor = 0.0) -> torch.Tensor:
    """Put the tokens of an `EverestModel` at their places: (B, slots, rows, columns, D), as a dense encoder has them.

    output: what the model gave, with last_hidden_state (B, K, D) and kept_ids (B, K), or those of all clips and their
    packing. With frame selection, slot i is the candidate output.slots[:, i].
    grid_size: `model.config.grid_size`, or that of the clips where interpolate_pos_encoding takes others.
    fill: what the places of dropped tokens hold: a number, NaN too, or a vector (D,), such as a mean token.

    Raises:
        ValueError: the tokens do not fit the grid, or the vector does not fit the tokens.
    """
    tokens, ids = output.last_hidden_state, output.kept_ids
    num_places, size = math.prod(grid_size), tokens.shape[-1]
    if int(ids.max()) >= num_places:
        raise ValueError(
            f"grid_size is {tuple(grid_size)}, {num_places} places; the output has token {int(ids.max())}"
        )
    filling = torch.as_tensor(fill, dtype=tokens.dtype, device=tokens.device)
    if filling.shape not in ((), (size,)):
        raise ValueError(f"fill has the shape {tuple(filling.shape)}; expected a number or a vector ({size},)")
    clips, packing = tokens.shape[0], output.packing
    if packing is not None:  # all places of all clips, one after the other
        clips, ids = packing.num_clips, ids + num_places * packing.clip_of(ids.shape[1])
    grid = filling.expand(tokens.shape[0], clips * num_places // tokens.shape[0], size)
    grid = grid.scatter(1, ids[..., None].expand_as(tokens), tokens)
    return grid.reshape(clips, *grid_size, size)
