"""How far the camera has moved what a clip shows from slot to slot, and what changed besides.

It is for token_selection="compensated". All are pure functions. Letters in shapes as in modeling_everest.py.
"""

from __future__ import annotations

import torch

from .configuration_everest import share_of
from .selection_everest import sorted_ids

# The search begins on frames of which the smaller side is this to twice this. It goes on at double size, up to the frames'
# own, pixel by pixel.
SIDE_OF_SEARCH = 28
# The largest move that is found, as a share of the frame's side.
LARGEST_MOVE = 0.1
# Differences of pixels in [0, 1] count up to this, so that what moves on its own, however bright, counts little.
LARGEST_DIFFERENCE = 8 / 255
# A move is believed if it takes at least a twentieth off the difference. Noise and flat walls do less.
BELIEVED = 0.95


def camera_moves(slots: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return by how many pixels (B, t - 1, 2), in y and x, the picture moved from the slot before: int64.

    slots: (B, t, tubelet, C, H, W), normalised pixels. scale: how much a pixel in [0, 1] was divided by. The moves are
    whole, one for each slot, up to a tenth of the frame, and 0 where no move explains the change. Block matching of grey
    frames with the whole frame as the block: the mean of the differences, each cut off at LARGEST_DIFFERENCE, is sought
    to be least, on ever larger frames. A change of the light is taken off before.
    """
    grey = slots.float().mean((2, 3))  # (B, t, H, W)
    levels = [grey - grey.mean((-2, -1), keepdim=True)]
    while min(levels[-1].shape[-2:]) >= 2 * SIDE_OF_SEARCH:
        levels.append(_halved(levels[-1]))
    largest = LARGEST_DIFFERENCE / scale
    height, width = levels[-1].shape[-2:]
    reach = margin = share_of(LARGEST_MOVE, height), share_of(LARGEST_MOVE, width)
    moves = torch.zeros(*grey[:, 1:].shape[:2], 2, dtype=torch.int64, device=grey.device)
    for i, level in enumerate(reversed(levels)):
        if i:
            moves, reach, margin = 2 * moves, (1, 1), (2 * margin[0] + 1, 2 * margin[1] + 1)
        differences = _differences(level, moves, reach, margin, largest)  # (B, t - 1, 2 * reach + 1, 2 * reach + 1)
        steps, places = _steps(reach, grey.device)
        best = differences.flatten(-2)[..., places].min(-1)
        moves = moves + steps[best.indices]
    still = _differences(levels[0], torch.zeros_like(moves), (0, 0), margin, largest)[..., 0, 0]
    return moves * (best.values < BELIEVED * still)[..., None]


def _halved(images: torch.Tensor) -> torch.Tensor:
    """Return the means of two by two pixels of images (..., H, W); a last odd row or column is left out."""
    height, width = (side // 2 * 2 for side in images.shape[-2:])
    rows = images[..., 0:height:2, :width] + images[..., 1:height:2, :width]
    return (rows[..., ::2] + rows[..., 1::2]) / 4


def _steps(reach: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all steps up to the reach (n, 2), the shortest first, since it wins among equals, and their places (n,).

    A place is that among all steps, row by row.
    """
    y, x = (torch.arange(-far, far + 1, device=device) for far in reach)
    steps = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    places = sorted_ids(steps.abs().sum(-1)[None])[0]
    return steps[places], places


def _differences(
    grey: torch.Tensor, moves: torch.Tensor, reach: tuple[int, int], margin: tuple[int, int], largest: float
) -> torch.Tensor:
    """Return how much each slot differs from the one before, which was moved by `moves` and by each step up to `reach`.

    grey: (B, t, H, W). moves: (B, t - 1, 2). All are compared on the same pixels, those at least `margin` from the
    frame's edges (no move with its step is larger), and of large frames on every second row and column. Returns
    (B, t - 1, 2 * reach[0] + 1, 2 * reach[1] + 1).
    """
    height, width = grey.shape[-2:]
    (far_y, far_x), (margin_y, margin_x) = reach, margin
    stride = 1 if min(height, width) < 4 * SIDE_OF_SEARCH else 2
    now = grey[:, 1:, margin_y : height - margin_y, margin_x : width - margin_x]  # (B, t - 1, h, w)
    high, wide = now.shape[-2:]
    now = now[..., ::stride, None, ::stride]
    rows = torch.arange(margin_y - far_y, height - margin_y + far_y, device=grey.device) - moves[..., :1]
    columns = torch.arange(margin_x - far_x, width - margin_x + far_x, device=grey.device) - moves[..., 1:]
    before = _take(grey[:, :-1], rows, columns)  # (B, t - 1, h + 2 * far_y, w + 2 * far_x)
    found = []
    for first in reversed(range(2 * far_y + 1)):  # a step down means that the row was further up before
        windows = before[..., first : first + high : stride, :].unfold(-1, wide, 1)  # (B, t - 1, h, x, w)
        difference = (now - windows[..., ::stride]).abs_().clamp_max_(largest)
        found.append(difference.mean((-3, -1)).flip(-1))
    return torch.stack(found, dim=-2)


def _take(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Take rows (..., h) and columns (..., w) of images (..., H, W): (..., h, w). Sizes of 1 in front are expanded."""
    places = rows[..., None] * images.shape[-1] + columns[..., None, :]  # (..., h, w)
    flat = places.flatten(-2).expand(*images.shape[:-2], -1)
    return images.flatten(-2).gather(-1, flat).unflatten(-1, places.shape[-2:])


def changes_beside_camera(slots: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """Return each slot less the one before it, which is moved as the camera moved it: (B, t - 1, tubelet, C, H, W).

    slots: (B, t, tubelet, C, H, W). moves: of `camera_moves`. What has come into view has no counterpart, and is taken
    as unchanged.
    """
    height, width = slots.shape[-2:]
    rows = torch.arange(height, device=slots.device) - moves[..., :1]  # (B, t - 1, H)
    columns = torch.arange(width, device=slots.device) - moves[..., 1:]  # (B, t - 1, W)
    seen = _within(rows, height)[..., None] & _within(columns, width)[..., None, :]  # (B, t - 1, H, W)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    before = _take(slots[:, :-1], rows[:, :, None, None], columns[:, :, None, None])
    return (slots[:, 1:] - before).mul_(seen[:, :, None, None].to(slots.dtype))


def _within(places: torch.Tensor, size: int) -> torch.Tensor:
    return (places >= 0) & (places < size)
