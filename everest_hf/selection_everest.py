"""Which tokens of a clip the encoder sees: the grid of its tokens, how many of them are taken, and which.

All are pure functions. Letters in shapes as in modeling_everest.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .configuration_everest import EverestConfig, check_keep_ratio, share_of

# Slots, rows and columns of tokens.
Grid = tuple[int, int, int]
# Gives random numbers (B, n), uniform in [0, 1), for n.
Noise = Callable[[int], torch.Tensor]


# ---------------------------------------------------------------------------------------------- what the model is given


def token_grid(config: EverestConfig, pixel_values: torch.Tensor, interpolate: bool) -> Grid:
    """Return slots, rows and columns that the encoder works on, for clips (B, T, C, H, W) that fit."""
    if not interpolate:
        return config.grid_size
    _, frames, _, height, width = pixel_values.shape
    candidates = frames // config.tubelet_size
    slots = round(candidates * config.num_frames / config.num_input_frames)
    slots = min(candidates, max(slots, 2 if config.uses_motion else 1))
    return slots, height // config.patch_size, width // config.patch_size


def check_inputs(
    config: EverestConfig,
    pixel_values: torch.Tensor,
    bool_masked_pos: torch.Tensor | None,
    frame_noise: torch.Tensor | None,
    keep_ratio: float | None,
    interpolate: bool,
) -> None:
    """Raise a ValueError that says what came and what fits, unless the arguments of `EverestModel.forward` fit."""
    if pixel_values.ndim != 5:
        raise ValueError(
            f"pixel_values has the shape {tuple(pixel_values.shape)}; "
            "expected five dimensions (clips, frames, channels, height, width)"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values is {pixel_values.dtype}; expected normalised floating-point frames")
    batch, frames, channels, height, width = pixel_values.shape
    if channels != config.num_channels:
        raise ValueError(f"pixel_values has {channels} channels; expected num_channels={config.num_channels}")
    if interpolate:
        least = 2 if config.uses_motion else 1  # motion needs a neighbouring slot
        _check_multiple("frames", frames, config.tubelet_size, least)
        _check_multiple("height", height, config.patch_size)
        _check_multiple("width", width, config.patch_size)
    else:
        _check_same("frames", frames, config.num_input_frames)
        _check_same("height and width", (height, width), config.frame_size)
    if keep_ratio is not None:
        check_keep_ratio(keep_ratio)
    if bool_masked_pos is not None:
        num_tokens = math.prod(token_grid(config, pixel_values, interpolate))
        check_shape("bool_masked_pos", bool_masked_pos, (batch, num_tokens))
    if frame_noise is not None and config.selects_frames:
        check_shape("frame_noise", frame_noise, (batch, frames // config.tubelet_size))


def _check_multiple(name: str, value: int, divisor: int, least: int = 1) -> None:
    if value % divisor or value < least * divisor:
        expected = f"a multiple of {divisor}, {least * divisor} or more"
        raise ValueError(f"pixel_values has {name} {value}; expected {expected}")


def _check_same(name: str, value, expected) -> None:
    if value != expected:
        raise ValueError(
            f"pixel_values has {name} {value}; expected {expected} (interpolate_pos_encoding=True takes other sizes)"
        )


def check_shape(name: str, x: torch.Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has the shape {tuple(x.shape)}; expected {expected}")


def count_selected(config: EverestConfig, grid: Grid, keep_ratio: float, pretraining: bool) -> tuple[int, int]:
    """Return how many tokens of a grid the encoder sees, K, and how many pre-training predicts, M, otherwise 0.

    Raises:
        ValueError: the grid is so small that a ratio leaves no token.
    """
    if not pretraining:
        return _counted("keep_ratio", keep_ratio, config.count_tokens(keep_ratio, grid), grid), 0
    visible = config.count_tokens(1 - config.mask_ratio, grid)
    _counted("mask_ratio", config.mask_ratio, visible, grid)
    ratio = config.pretraining_keep_ratio
    return visible, _counted("pretraining_keep_ratio", ratio, config.count_tokens(ratio, grid) - visible, grid)


def _counted(name: str, ratio: float, count: int, grid: Grid) -> int:
    if count <= 0:
        raise ValueError(f"{name} {ratio} leaves no token of the grid (slots, rows, columns) {grid} to use")
    return count


def patchify(pixel_values: torch.Tensor, tubelet_size: int, patch_size: int) -> torch.Tensor:
    """Cut clips (B, T, C, H, W) into tokens' pixels (B, N, P), each in the order channel, frame, row, column."""
    batch, frames, channels, height, width = pixel_values.shape
    slots, rows, columns = frames // tubelet_size, height // patch_size, width // patch_size
    x = pixel_values.reshape(batch, slots, tubelet_size, channels, rows, patch_size, columns, patch_size)
    x = x.permute(0, 1, 4, 6, 3, 2, 5, 7)  # (B, t, rows, columns, C, tubelet, patch, patch)
    return x.flatten(4).flatten(1, 3)  # (B, N, P)


# ------------------------------------------------------------------------------------------------- order of tokens


def sorted_ids(x: torch.Tensor, descending: bool = False) -> torch.Tensor:
    """Return the ids (B, N) that put x (B, N) in order, the lower id first among equals."""
    if torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, but its TopK promises this order. Torch's own TopK breaks ties as it likes.
        return x.topk(x.shape[-1], dim=-1, largest=descending).indices
    return x.sort(dim=-1, descending=descending, stable=True).indices


def motion_scores(embeddings: torch.Tensor) -> torch.Tensor:
    """Score each token by its L2 distance from the same place in the slot before (EVEREST, equation 1).

    embeddings: (B, t, S, D) before positions, t >= 2. Returns (B, t * S) float32. Slot 0 takes the scores of slot 1.
    """
    return scores_of_changes(embeddings.float().diff(dim=1))


def scores_of_changes(changes: torch.Tensor) -> torch.Tensor:
    """Score each token by the L2 norm of its change from the slot before: (B, t - 1, S, D) gives `motion_scores`."""
    distance = torch.linalg.vector_norm(changes, dim=-1)  # (B, t - 1, S)
    return torch.cat([distance[:, :1], distance], dim=1).flatten(1)  # (B, t * S)


def order_by_motion(scores: torch.Tensor, noise: Noise, grid: Grid) -> torch.Tensor:
    """Order tokens by falling score, the lower id first among equals, since slots 0 and 1 always tie: (B, N)."""
    return sorted_ids(scores, descending=True)


def order_at_random(scores: torch.Tensor | None, noise: Noise, grid: Grid) -> torch.Tensor:
    """Order tokens by a random number for each: (B, N)."""
    return sorted_ids(noise(math.prod(grid)))


def order_tubes_at_random(scores: torch.Tensor | None, noise: Noise, grid: Grid) -> torch.Tensor:
    """Order places by a random number for each, alike in every slot: (B, t, S)."""
    slots, rows, columns = grid
    places = sorted_ids(noise(rows * columns))  # (B, S)
    first = torch.arange(slots, device=places.device) * (rows * columns)  # (t,)
    return first[:, None] + places[:, None]


# By config.token_selection: the order in which tokens are taken. Each is a pure function of
#   scores: (B, N) scores of motion, which the BLIND_SELECTIONS of the configuration may not get;
#   noise: noise(n) gives random numbers (B, n), for selections that draw;
#   grid: slots, rows and columns.
# It returns token ids (B, N), the first to be taken first, or (B, t, S), of which each slot gives the same number.
SELECTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "motion": order_by_motion,
    "compensated": order_by_motion,  # of other scores
    "random": order_at_random,
    "tube": order_tubes_at_random,
}


def slice_order(order: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return the ids (B, stop - start) of an order (B, N), or of one (B, t, S), of which each slot gives a part."""
    slots = math.prod(order.shape[1:-1])
    return order[..., start // slots : stop // slots].flatten(1)


def select_tokens(
    config: EverestConfig,
    scores: torch.Tensor | None,
    noise: Noise,
    grid: Grid,
    keep_ratio: float,
    pretraining: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose the first tokens of the order: ids (B, K) in time order, and None.

    In pre-training: the visible tokens (B, K) and those to predict (B, M), in the order of the draw.
    """
    num_kept, num_targets = count_selected(config, grid, keep_ratio, pretraining)
    order = SELECTIONS[config.token_selection](scores, noise, grid)
    if not pretraining:
        return slice_order(order, 0, num_kept).sort(dim=-1).values, None
    num_informative = num_kept + num_targets
    if config.selects_by_motion:  # a draw decides which of the informative tokens are visible
        order = slice_order(order, 0, num_informative).gather(1, sorted_ids(noise(num_informative)))
    return slice_order(order, 0, num_kept), slice_order(order, num_kept, num_informative)


# --------------------------------------------------------------------------------------------- slots, masks, noise


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pick tokens by id: x (B, N, D) and ids (B, K) give (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def select_slots(
    scores: torch.Tensor, num_candidates: int, num_slots: int, ratio: float, noise: torch.Tensor | None
) -> torch.Tensor:
    """Choose the slots that hold most informative tokens (EVEREST, information-intensive frame selection).

    scores: (B, c * S) of all candidates, of which the share `ratio` is informative; p of a slot is its share of them.
    noise: (B, c) uniform in [0, 1) draws slots without replacement with probability p; without it the slots of
    largest p are taken, the lower first among equals. Returns slot ids (B, num_slots) in time order.
    """
    num_places, k = scores.shape[1] // num_candidates, share_of(ratio, scores.shape[1])
    slot_of_token = sorted_ids(scores, descending=True)[:, :k] // num_places  # (B, k)
    counts = scores.new_zeros(scores.shape[0], num_candidates)
    counts = counts.scatter_add(1, slot_of_token, torch.ones_like(slot_of_token, dtype=counts.dtype))
    if noise is not None:
        # An exponential race: the first of waiting times with rates p to end is a draw with probability p, the
        # second a draw from the rest, and so on. Waiting times are -log(1 - noise) / p; the shortest is sought.
        waiting = -torch.log1p(-noise.to(counts))
        counts = counts / waiting.clamp_min(torch.finfo(counts.dtype).tiny)
    return sorted_ids(counts, descending=True)[:, :num_slots].sort(dim=-1).values


def take_slots(x: torch.Tensor, slots: torch.Tensor, num_candidates: int) -> torch.Tensor:
    """Keep the tokens of the chosen slots (B, t): x (B, c * S, D) gives (B, t * S, D)."""
    by_slot = x.unflatten(1, (num_candidates, -1)).flatten(2)  # (B, c, S * D)
    return gather_tokens(by_slot, slots).reshape(x.shape[0], -1, x.shape[2])


def split_by_mask(bool_masked_pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a mask (B, N), True = masked, into ids of the visible and of the masked tokens, each in time order.

    Raises:
        ValueError: the clips of the batch do not have the same number of masked tokens, or all or none is masked.
    """
    masked = bool_masked_pos.bool()
    counts = masked.sum(dim=1).tolist()  # the number of tokens is a shape, so the host must know it
    if len(set(counts)) != 1 or not 0 < counts[0] < masked.shape[1]:
        raise ValueError(
            f"bool_masked_pos masks {counts} of the {masked.shape[1]} tokens of the clips; every clip of a batch "
            "must have the same number, with at least one token masked and one visible"
        )
    order = sorted_ids(masked.to(torch.uint8))  # (B, N), visible first
    num_visible = masked.shape[1] - counts[0]
    return order[:, :num_visible], order[:, num_visible:]


def fixed_noise(batch_size: int, n: int, device: torch.device) -> torch.Tensor:
    """Return (batch_size, n) pseudo-random numbers in [0, 1): always the same, and the same for each clip.

    Evaluation uses it in place of a random draw, so that a clip's result depends on nothing but the clip. The mix is
    a multiplicative hash of the index with Knuth's constant, done in integers so that all devices agree.
    """
    x = torch.arange(1, n + 1, device=device) ^ 0  # or a compiler does the rest as an index, in 32 bits
    x = x * 2654435761 % 2**32
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    x = x ^ (x >> 13)
    return (x.float() / 2**32).expand(batch_size, n)


def draw_noise(
    given: torch.Tensor | None, training: bool, batch_size: int, device: torch.device, n: int
) -> torch.Tensor:
    """Return the caller's noise (batch_size, n); without it a draw in training, and the fixed numbers in evaluation.

    Raises:
        ValueError: the caller's has another shape.
    """
    if given is not None:
        check_shape("noise", given, (batch_size, n))
        return given.to(device)
    return torch.rand(batch_size, n, device=device) if training else fixed_noise(batch_size, n, device)
