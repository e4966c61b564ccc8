"""Pictures: which tokens a model keeps, what it reconstructs, and how a run went."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # pictures are written to files, also where there is no display
from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .configuration_everest import EverestConfig
from .modeling_everest import patchify

# Width of a frame in a picture, and of a whole picture, in inches.
LARGEST_CELL, LARGEST_FIGURE = 2.2, 24.0
# The same of a confusion picture; and the smallest letters that can be read, in points, of which an inch has 72.
LARGEST_CONFUSION_CELL, LARGEST_CONFUSION = 0.45, 13.0
SMALLEST_FONT, POINTS_AN_INCH = 5.0, 72
# What is drawn of a log: losses, and the main scores of each kind of fine-tuning.
LOSSES: tuple[str, ...] = ("loss", "val_loss")
SCORES: tuple[str, ...] = ("val_top1", "val_top5", "val_map", "val_f1", "val_pearson")


def token_mask(ids: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Turn token ids (K,) into a mask of pixels (T, H, W), True where a token is among them."""
    mask = torch.zeros(config.num_tokens, dtype=torch.bool)
    mask[ids.cpu()] = True
    return over_pixels(mask, config)


def over_pixels(tokens: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Give each pixel (T, H, W) the value of its token, one of (N,)."""
    pixels = tokens.view(config.grid_size)  # (t, rows, columns)
    for dim, size in enumerate((config.tubelet_size, config.patch_size, config.patch_size)):
        pixels = pixels.repeat_interleave(size, dim=dim)
    return pixels  # (T, H, W)


def grey_out(clip: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Fade the pixels that are not kept to light grey: clip uint8 (T, C, H, W), kept bool (T, H, W)."""
    faded = (clip.float().mean(dim=1, keepdim=True) * 0.25 + 170).to(torch.uint8).expand_as(clip)
    return torch.where(kept[:, None], clip, faded)


def reconstruct(
    clip: torch.Tensor, ids: torch.Tensor, predictions: torch.Tensor, config: EverestConfig
) -> torch.Tensor:
    """Put predicted pixels in the place of the tokens `ids` (M,) of a clip uint8 (T, C, H, W), and return that clip.

    predictions: (M, P), the logits of EverestForPreTraining for these tokens. With norm_pix_loss they have no
    brightness and contrast of their own: each token's own mean and standard deviation are given back to it.
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
    """Put tokens' pixels (N, P) together to a clip (T, C, H, W): the inverse of `patchify`."""
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
) -> None:
    """Draw the first frame of each tubelet, and below it the same with the dropped tokens greyed out.

    clip: uint8 (T, C, H, W), the frames that the model worked on. ids: the kept tokens (K,).
    slots: with frame selection, the slots (t,) that it chose; clip then holds all candidates.
    frame_numbers: the places (T,) of the clip's frames in the video, for the titles.
    """
    greyed = grey_out(take_slots(clip, slots, config), token_mask(ids, config))
    _draw_strips(clip, {f"{len(ids)} of {config.num_tokens} tokens": greyed}, config, path, slots, frame_numbers)


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
) -> None:
    """Draw the first frame of each tubelet; below it the tokens that the encoder saw, these and the predicted ones
    from the decoder, and the same tokens of the clip to compare with.

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
    _draw_strips(clip, rows, config, path, slots, frame_numbers)


def take_slots(clip: torch.Tensor, slots: torch.Tensor | None, config: EverestConfig) -> torch.Tensor:
    """Return the frames of the chosen slots (t,) of a clip (T, C, H, W) of candidates; all where slots is None."""
    if slots is None:
        return clip
    return clip.unflatten(0, (-1, config.tubelet_size))[slots.cpu()].flatten(0, 1)


def _draw_strips(clip, rows, config, path, slots, frame_numbers) -> None:
    """Draw a column a tubelet: the clip's first frame, then that of each of `rows` by its name, where it was chosen."""
    starts = range(0, len(clip), config.tubelet_size)
    chosen = list(range(len(starts))) if slots is None else slots.tolist()
    height, width = config.frame_size
    side = min(LARGEST_CELL, LARGEST_FIGURE / len(starts))  # inches
    size = (side * len(starts), (side * height / width + 0.05) * (1 + len(rows)) + 0.2)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure, axes = plt.subplots(1 + len(rows), len(starts), figsize=size, squeeze=False, layout=layout)
    for column, start in enumerate(starts):
        number = start if frame_numbers is None else frame_numbers[start]
        axes[0, column].set_title(f"frame {number}" if column in chosen else "not selected", fontsize=9)
        _show(axes[0, column], clip[start], faded=column not in chosen)
    for row, frames in enumerate(rows.values(), 1):
        for place, column in enumerate(chosen):
            _show(axes[row, column], frames[place * config.tubelet_size])
    for row, name in enumerate(("clip", *rows)):
        axes[row, 0].set_ylabel(name, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    _save(figure, path)


def _show(axis, frame: torch.Tensor, faded: bool = False) -> None:
    """Show a frame uint8 (C, H, W), of any number of channels: the first three, or the only one in grey."""
    image = frame.permute(1, 2, 0).numpy()  # (H, W, C)
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, alpha=0.25 if faded else 1.0)


def draw_curves(logs: dict[str, list[dict]], path: str | Path) -> None:
    """Draw the losses of each run, then the scores of each on held-out videos, where it has any.

    logs: the lines of log.jsonl by the run's name.
    """
    panels = [(f"{name}: loss", "loss", log, LOSSES) for name, log in logs.items()]
    panels += [
        (f"{name}: held-out videos", "score (1: perfect)", log, SCORES)
        for name, log in logs.items()
        if any(key in line for line in log for key in SCORES)
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, ylabel, log, keys) in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in log if key in line]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=key, marker="o" if len(points) < 20 else None, markersize=3
                )
        axis.set(title=title, xlabel="step", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if keys == SCORES:
            axis.set_ylim(min(0, axis.get_ylim()[0]), 1.02)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    _save(figure, path)


def draw_keep_ratios(rows: Sequence[dict], recommended: dict, path: str | Path) -> None:
    """Draw accuracy, speed and operations over the keep ratio.

    rows, recommended: as `everest_hf.tune.tune_keep_ratio` returns them. The bars are the standard errors of the
    differences from the most accurate ratio; what may be lost against it is shaded.
    """
    ratios = [row["keep_ratio"] for row in rows]
    top1 = [100 * row["top1"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(13.8, 3.2), layout="constrained")
    accuracy, speed, work = axes
    allowed = recommended["max_loss_points"]
    best = top1[ratios.index(recommended["reference_keep_ratio"])]
    accuracy.axhspan(best - allowed, best, alpha=0.2, color="C2", lw=0, label=f"at most {allowed:g} points lost")
    errors = [row["standard_error_points"] for row in rows]
    accuracy.errorbar(ratios, top1, errors, marker="o", markersize=3, capsize=3, label="top-1")
    accuracy.set(title="accuracy", ylabel="top-1 (%)")
    speed.plot(ratios, [row["clips_per_second"] for row in rows], marker="o", markersize=3)
    speed.set(title="speed of the model", ylabel="clips a second", ylim=0)
    work.plot(ratios, [row["gflops"] for row in rows], marker="o", markersize=3)
    work.set(title="operations", ylabel="GFLOPs a clip", ylim=0)
    for axis in axes:
        axis.axvline(recommended["keep_ratio"], color="C3", linestyle="--", lw=1, label="recommended")
        axis.set(xlabel="keep ratio")
        axis.grid(alpha=0.3)
    accuracy.legend(fontsize=8)
    _save(figure, path)


def draw_confusion(counts: np.ndarray, names: Sequence[str], columns: Sequence[str], path: str | Path) -> None:
    """Draw counts of videos (classes, columns) as shares of their row: a row a class, a column a predicted class.

    names, columns: those of the rows and of the columns, of which there may be more. The counts are written into the
    cells where there is room for them, and the names are left out where there is none.
    """
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(LARGEST_CONFUSION_CELL * len(names), 3.0), LARGEST_CONFUSION)  # inches
    cell = side * POINTS_AN_INCH / len(columns)
    font = min(9.0, cell / 1.2)  # a line of text is as high as 1.2
    has_names = font >= SMALLEST_FONT
    margin = max(map(len, columns)) * font * 0.6 / POINTS_AN_INCH if has_names else 0.0  # a letter is as wide as 0.6
    figure, axis = plt.subplots(figsize=(side + margin + 1.5, side + margin + 0.5), layout="constrained")
    # Few videos of many are to be seen, too.
    image = axis.imshow(shares, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1))
    axis.set(xlabel="predicted", ylabel="class of the video")
    if has_names:
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=font)
        axis.set_yticks(range(len(names)), names, fontsize=font)
    letters = len(str(counts.max())) + 1
    if cell >= SMALLEST_FONT * letters:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.3 else "black"
            font = min(9.0, 1.5 * cell / letters)
            axis.text(column, row, str(count or ""), ha="center", va="center", color=colour, fontsize=font)
    figure.colorbar(image, label="share of the class's videos", shrink=0.6)
    _save(figure, path)


def _save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
