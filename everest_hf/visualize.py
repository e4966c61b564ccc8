"""Pictures: which tokens a model keeps, and how a run went."""

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")  # pictures are written to files, also where there is no display
from matplotlib import pyplot as plt

from .configuration_everest import EverestConfig


def token_mask(ids: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Turn token ids (K,) into a mask of pixels (T, H, W), True where a token is among them."""
    mask = torch.zeros(config.num_tokens, dtype=torch.bool)
    mask[ids.cpu()] = True
    mask = mask.view(config.grid_size)  # (t, rows, columns)
    for dim, size in enumerate((config.tubelet_size, config.patch_size, config.patch_size)):
        mask = mask.repeat_interleave(size, dim=dim)
    return mask  # (T, H, W)


def grey_out(clip: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Fade the pixels that are not kept to light grey: clip uint8 (T, C, H, W), kept bool (T, H, W)."""
    faded = (clip.float().mean(dim=1, keepdim=True) * 0.25 + 170).to(torch.uint8).expand_as(clip)
    return torch.where(kept[:, None], clip, faded)


def draw_kept_tokens(clip: torch.Tensor, ids: torch.Tensor, config: EverestConfig, path: str | Path) -> None:
    """Draw the first frame of each tubelet, and below it the same with the dropped tokens greyed out.

    clip: uint8 (T, C, H, W), the frames that the model worked on. ids: the kept tokens (K,).
    """
    greyed = grey_out(clip, token_mask(ids, config))
    frames = range(0, config.num_frames, config.tubelet_size)
    height, width = config.frame_size
    figure, axes = plt.subplots(
        2, len(frames), figsize=(1.6 * len(frames), 3.5 * height / width), squeeze=False, layout="constrained"
    )
    for column, frame in enumerate(frames):
        for row, pixels in enumerate((clip, greyed)):
            image = pixels[frame].permute(1, 2, 0).numpy()  # (H, W, C)
            axes[row, column].imshow(image.squeeze(-1) if image.shape[-1] == 1 else image[..., :3], cmap="gray")
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(f"frame {frame}", fontsize=8)
    axes[0, 0].set_ylabel("clip", fontsize=8)
    axes[1, 0].set_ylabel(f"{len(ids)} of {config.num_tokens} tokens", fontsize=8)
    _save(figure, path)


def draw_curves(logs: dict[str, list[dict]], path: str | Path) -> None:
    """Draw the training loss of each run, then validation figures; logs: the lines of log.jsonl by the run's name."""
    panels = [(f"{name}: loss", log, ("loss", "val_loss")) for name, log in logs.items()]
    panels += [
        (f"{name}: accuracy on held-out videos", log, ("val_top1",))
        for name, log in logs.items()
        if any("val_top1" in line for line in log)
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, log, keys) in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in log if key in line]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=key, marker="o" if len(points) < 20 else None, markersize=3
                )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
