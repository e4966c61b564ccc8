"""Pictures of tokens: which ones a model keeps, and what it reconstructs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..configuration_everest import EverestConfig
from ..selection_everest import patchify
from .figures import plt, save

# Width of a frame in a picture, and of a whole picture, in inches.
LARGEST_CELL, LARGEST_FIGURE = 2.2, 24.0
# Stripes over dropped tokens: their grey, and how many of them cross the short side of a frame, if pixels allow.
STRIPE, STRIPES, SMALLEST_PERIOD = 120, 28, 4


def token_mask(ids: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Return a mask of pixels (T, H, W) that is True inside the tokens `ids` (K,)."""
    mask = torch.zeros(config.num_tokens, dtype=torch.bool)
    mask[ids.cpu()] = True
    return over_pixels(mask, config)


def over_pixels(tokens: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Return for each pixel (T, H, W) the value of the token that it lies in; tokens: (N,)."""
    pixels = tokens.view(config.grid_size)  # (t, rows, columns)
    for dim, size in enumerate((config.tubelet_size, config.patch_size, config.patch_size)):
        pixels = pixels.repeat_interleave(size, dim=dim)
    return pixels  # (T, H, W)


def grey_out(clip: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Fade the pixels that are not kept to light grey with dark stripes: clip uint8 (T, C, H, W), kept bool (T, H, W).

    The stripes show where tokens were dropped in bright and grey clips too.
    """
    height, width = clip.shape[-2:]
    faded = (clip.float().mean(dim=1, keepdim=True) * 0.25 + 170).to(torch.uint8)
    diagonals = torch.arange(height)[:, None] + torch.arange(width)  # (H, W)
    is_stripe = diagonals % max(SMALLEST_PERIOD, round(min(height, width) / STRIPES)) == 0
    return torch.where(kept[:, None], clip, faded.masked_fill(is_stripe, STRIPE))


def reconstruct(
    clip: torch.Tensor, ids: torch.Tensor, predictions: torch.Tensor, config: EverestConfig
) -> torch.Tensor:
    """Return a clip uint8 (T, C, H, W) in which predicted pixels replace the tokens `ids` (M,).

    predictions: (M, P), the logits of EverestForPreTraining for these tokens. With norm_pix_loss the model predicts
    each token without its brightness and contrast; the mean and standard deviation are then taken from the clip.
    """
    ids, predictions = ids.cpu(), predictions.float().cpu()
    patches = patchify(clip[None].float() / 255, config.tubelet_size, config.patch_size)[0]  # (N, P)
    pixels = predictions.unflatten(-1, (-1, config.num_channels)).transpose(1, 2)  # (M, C, P / C)
    if config.norm_pix_loss:
        std, mean = torch.std_mean(patches[ids].unflatten(-1, (config.num_channels, -1)), dim=-1, keepdim=True)
        pixels = pixels * (std + 1e-6) + mean
    patches[ids] = pixels.flatten(1)  # (M, P)
    return (unpatchify(patches, config) * 255).round().clamp(0, 255).to(torch.uint8)


def unpatchify(patches: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Return the clip (T, C, H, W) that the tokens' pixels (N, P) make up: the inverse of `patchify`."""
    patch = config.patch_size
    x = patches.view(*config.grid_size, config.num_channels, config.tubelet_size, patch, patch)
    x = x.permute(0, 4, 3, 1, 5, 2, 6)  # (t, tubelet, C, rows, patch, columns, patch)
    return x.flatten(5).flatten(3, 4).flatten(0, 1)  # (T, C, H, W)


def draw_kept_tokens(
    clip: torch.Tensor,
    ids: torch.Tensor,
    config: EverestConfig,
    path: str | Path,
    *,
    slots: torch.Tensor | None = None,
    frame_numbers: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
) -> None:
    """Draw the first frame of each tubelet, and below it the same with the dropped tokens greyed out and striped.

    clip: uint8 (T, C, H, W), the frames that the model worked on. ids: the kept tokens (K,).
    slots: with frame selection, the slots (t,) that it chose; clip then holds all candidates.
    frame_numbers, seconds: where in the video the clip's frames are, (T,) each, for the titles.
    """
    greyed = grey_out(take_slots(clip, slots, config), token_mask(ids, config))
    titles = frame_titles(range(len(clip)) if frame_numbers is None else frame_numbers, seconds)
    _draw_strips(clip, {f"{len(ids)} of {config.num_tokens} tokens": greyed}, config, path, slots, titles)


def draw_reconstruction(
    clip: torch.Tensor,
    visible_ids: torch.Tensor,
    target_ids: torch.Tensor,
    predictions: torch.Tensor,
    config: EverestConfig,
    path: str | Path,
    *,
    slots: torch.Tensor | None = None,
    frame_numbers: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
) -> None:
    """Draw four rows: the first frame of each tubelet, the tokens that the encoder saw, the same with the tokens that
    the decoder predicted, and all these tokens as the clip has them.

    visible_ids (K,), target_ids (M,), predictions (M, P): as EverestForPreTraining returns them for the clip.
    The other arguments are those of `draw_kept_tokens`.
    """
    worked_on = take_slots(clip, slots, config)
    visible = token_mask(visible_ids, config)
    informative = visible | token_mask(target_ids, config)
    rows = {
        f"{len(visible_ids)} visible": grey_out(worked_on, visible),
        f"with {len(target_ids)} predicted": grey_out(
            reconstruct(worked_on, target_ids, predictions, config), informative
        ),
        "clip, same tokens": grey_out(worked_on, informative),
    }
    titles = frame_titles(range(len(clip)) if frame_numbers is None else frame_numbers, seconds)
    _draw_strips(clip, rows, config, path, slots, titles)


def frame_titles(numbers: Sequence[int], seconds: Sequence[float] | None) -> list[str]:
    """Return what is written over frames: the number of each in the video and, where it is known, its time."""
    if seconds is None:
        return [f"frame {number}" for number in numbers]
    return [f"frame {number}, {second:.2f} s" for number, second in zip(numbers, seconds, strict=True)]


def take_slots(clip: torch.Tensor, slots: torch.Tensor | None, config: EverestConfig) -> torch.Tensor:
    """Return the frames of the slots (t,) that frame selection chose from a clip (T, C, H, W); all of them for None."""
    if slots is None:
        return clip
    return clip.unflatten(0, (-1, config.tubelet_size))[slots.cpu()].flatten(0, 1)


def _draw_strips(clip, rows, config, path, slots, titles) -> None:
    """Draw a column for each tubelet, with its first frame: of the clip, then of each of `rows`, named at the left.

    The rows have frames only of the tubelets that frame selection chose.
    """
    starts = range(0, len(clip), config.tubelet_size)
    chosen = list(range(len(starts))) if slots is None else slots.tolist()
    height, width = config.frame_size
    side = min(LARGEST_CELL, LARGEST_FIGURE / len(starts))  # inches
    size = (side * len(starts), (side * height / width + 0.05) * (1 + len(rows)) + 0.4)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure, axes = plt.subplots(1 + len(rows), len(starts), figsize=size, squeeze=False, layout=layout)
    for column, start in enumerate(starts):
        title = titles[start].replace(", ", "\n")  # as wide as the smallest frame allows
        axes[0, column].set_title(title if column in chosen else f"{title}\nnot selected", fontsize=9)
        _show(axes[0, column], clip[start], faded=column not in chosen)
    for row, frames in enumerate(rows.values(), 1):
        for place, column in enumerate(chosen):
            _show(axes[row, column], frames[place * config.tubelet_size])
    for row, name in enumerate(("clip", *rows)):
        axes[row, 0].set_ylabel(name, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    save(figure, path)


def _show(axis, frame: torch.Tensor, faded: bool = False) -> None:
    """Show a frame uint8 (C, H, W): its first three channels in colour, or its first one in grey."""
    image = frame.permute(1, 2, 0).numpy()  # (H, W, C)
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, alpha=0.25 if faded else 1.0)
