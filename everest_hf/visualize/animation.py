"""Moving pictures: a clip beside what a model makes of it, as .mp4 or .gif."""

from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from ..configuration_everest import EverestConfig
from ..files import write_whole
from ..video.encoding import write_mp4
from .tokens import grey_out, over_pixels, reconstruct, take_slots, token_mask

# Smaller frames are enlarged by a whole factor to about this many pixels, and panels lie this far apart.
PANEL_SIDE, GAP, CAPTION = 224, 8, 22
# Of a moving picture: slow enough to follow single tubelets.
FRAMES_PER_SECOND = 6
HEAT = matplotlib.colormaps["inferno"]


def kept_token_panels(
    clip: torch.Tensor,
    ids: torch.Tensor,
    scores: torch.Tensor,
    config: EverestConfig,
    slots: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return panels by caption, each uint8 (T, 3, H, W): the clip, its kept tokens, its motion scores.

    clip: uint8 (T, C, H, W). ids: the kept tokens (K,). scores: (N,), as the model returns them with output_scores.
    slots: with frame selection, the slots (t,) that it chose; clip then holds all candidates, and frames that were
    not chosen are faded as a whole.
    """
    worked_on = as_rgb(take_slots(clip, slots, config))
    panels = {
        f"{len(ids)} of {config.num_tokens} tokens": grey_out(worked_on, token_mask(ids, config)),
        "motion scores": heat_map(worked_on, scores, config),
    }
    return {"clip": as_rgb(clip), **{name: _at_slots(panel, clip, slots, config) for name, panel in panels.items()}}


def reconstruction_panels(
    clip: torch.Tensor,
    visible_ids: torch.Tensor,
    target_ids: torch.Tensor,
    predictions: torch.Tensor,
    config: EverestConfig,
    slots: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return panels by caption, each uint8 (T, 3, H, W): the clip, the visible tokens, these and the predicted ones.

    visible_ids (K,), target_ids (M,), predictions (M, P): as EverestForPreTraining returns them for the clip. The
    other arguments are those of `kept_token_panels`.
    """
    worked_on = take_slots(clip, slots, config)
    visible = token_mask(visible_ids, config)
    rebuilt = reconstruct(worked_on, target_ids, predictions, config)
    panels = {
        f"{len(visible_ids)} visible": grey_out(as_rgb(worked_on), visible),
        f"with {len(target_ids)} predicted": grey_out(as_rgb(rebuilt), visible | token_mask(target_ids, config)),
    }
    return {"clip": as_rgb(clip), **{name: _at_slots(panel, clip, slots, config) for name, panel in panels.items()}}


def as_rgb(clip: torch.Tensor) -> torch.Tensor:
    """Return a clip (T, C, H, W) of any number of channels with three: the first three, or the first as grey."""
    return clip[:, :3] if clip.shape[1] >= 3 else clip[:, :1].expand(-1, 3, -1, -1)


def heat_map(clip: torch.Tensor, scores: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Lay the scores (N,) of the tokens over a clip uint8 (T, 3, H, W): dark is none, bright the clip's largest."""
    share = over_pixels(scores.float().cpu() / scores.max().clamp_min(1e-12).cpu(), config)  # (T, H, W)
    heat = torch.from_numpy(HEAT(share.numpy())[..., :3]).permute(0, 3, 1, 2) * 255  # (T, 3, H, W)
    grey = clip.float().mean(dim=1, keepdim=True)
    return (0.65 * heat + 0.35 * grey).round().to(torch.uint8)


def _at_slots(panel, clip, slots, config) -> torch.Tensor:
    """Put the frames of a panel where the chosen slots lie among all candidates, the others faded."""
    if slots is None:
        return panel
    none = torch.zeros(clip.shape[0], *clip.shape[2:], dtype=torch.bool)
    frames = grey_out(as_rgb(clip), none).unflatten(0, (-1, config.tubelet_size)).clone()
    frames[slots.cpu()] = panel.unflatten(0, (-1, config.tubelet_size))
    return frames.flatten(0, 1)


def write_animation(panels: dict[str, torch.Tensor], path: str | Path, fps: float = FRAMES_PER_SECOND) -> None:
    """Write panels, uint8 (T, 3, H, W) by caption, side by side as .mp4 (H.264) or as .gif that repeats.

    The file appears under its name when it is complete.

    Raises:
        ValueError: the name ends in something else.
    """
    path = Path(path)
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"{path}: not a moving picture; expected a name ending in {', '.join(WRITERS)}")
    frames = [_compose(images) for images in _frames(panels)]
    write_whole(path, lambda aside: write(frames, aside, fps))


def _frames(panels: dict[str, torch.Tensor]):
    """Yield for each time the images of the panels by caption, PIL, enlarged."""
    height, width = next(iter(panels.values())).shape[-2:]
    factor = max(1, round(PANEL_SIDE / max(height, width)))
    for images in zip(*panels.values(), strict=True):
        arrays = (image.permute(1, 2, 0).contiguous().numpy() for image in images)  # (H, W, 3)
        yield {
            caption: Image.fromarray(array).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            for caption, array in zip(panels, arrays, strict=True)
        }


def _compose(images: dict[str, Image.Image]) -> Image.Image:
    """Lay images side by side with their captions above; both sides even, as H.264 with 4:2:0 chroma needs."""
    width, height = next(iter(images.values())).size
    total = GAP + len(images) * (width + GAP), CAPTION + height + GAP
    canvas = Image.new("RGB", [side + side % 2 for side in total], "white")
    draw = ImageDraw.Draw(canvas)
    for i, (caption, image) in enumerate(images.items()):
        left = GAP + i * (width + GAP)
        draw.text((left, 4), caption, fill="black", font_size=13)
        canvas.paste(image, (left, CAPTION))
    return canvas


def _write_gif(frames: list[Image.Image], path: Path, fps: float) -> None:
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def _write_mp4(frames: list[Image.Image], path: Path, fps: float) -> None:
    write_mp4(np.stack([np.asarray(frame) for frame in frames]), path, Fraction(fps).limit_denominator(1000), crf="18")


WRITERS = {".mp4": _write_mp4, ".gif": _write_gif}
