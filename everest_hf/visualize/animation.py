"""Moving pictures: a clip beside what a model makes of it, as .mp4 or .gif."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ..configuration_everest import EverestConfig
from ..files import write_whole
from ..video.encoding import write_mp4
from .tokens import grey_out, over_pixels, reconstruct, take_slots, token_mask

# Smaller frames are enlarged by a whole factor to about this many pixels, and panels lie this far apart. Pixels for
# title and captions, for the labels of an axis, and for the scale of the scores; and how many of them are an inch.
PANEL_SIDE, GAP, TOP, AXIS, SCALE, DOTS = 224, 8, 44, 42, 58, 100
# Slow enough to follow single tubelets.
FRAMES_PER_SECOND = 6
# The panel that has axes and a scale.
SCORES = "motion scores"
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
    slots: with frame selection, the slots (t,) that it chose; clip then holds all candidates, and whole frames fade
    that were not chosen.
    """
    worked_on = as_rgb(take_slots(clip, slots, config))
    panels = {
        f"{len(ids)} of {config.num_tokens} tokens": grey_out(worked_on, token_mask(ids, config)),
        SCORES: heat_map(worked_on, scores, config),
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
    """Return panels by caption, each uint8 (T, 3, H, W): the clip, its visible tokens, and these with predicted ones.

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
    """Return a clip (T, C, H, W) with three channels: its first three, or its first one as grey."""
    return clip[:, :3] if clip.shape[1] >= 3 else clip[:, :1].expand(-1, 3, -1, -1)


def heat_map(clip: torch.Tensor, scores: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Return a clip uint8 (T, 3, H, W) coloured by the scores (N,) of its tokens: dark is 0, bright the largest."""
    share = over_pixels(scores.float().cpu() / scores.max().clamp_min(1e-12).cpu(), config)  # (T, H, W)
    heat = torch.from_numpy(HEAT(share.numpy())[..., :3]).permute(0, 3, 1, 2) * 255  # (T, 3, H, W)
    grey = clip.float().mean(dim=1, keepdim=True)
    return (0.65 * heat + 0.35 * grey).round().to(torch.uint8)


def _at_slots(panel, clip, slots, config) -> torch.Tensor:
    """Return a panel of all candidates: its frames in the slots that were chosen, the clip's frames faded elsewhere."""
    if slots is None:
        return panel
    none = torch.zeros(clip.shape[0], *clip.shape[2:], dtype=torch.bool)
    frames = grey_out(as_rgb(clip), none).unflatten(0, (-1, config.tubelet_size)).clone()
    frames[slots.cpu()] = panel.unflatten(0, (-1, config.tubelet_size))
    return frames.flatten(0, 1)


def write_animation(
    panels: dict[str, torch.Tensor], path: str | Path, fps: float = FRAMES_PER_SECOND, titles: Sequence[str] = ()
) -> None:
    """Write panels, uint8 (T, 3, H, W) by caption, side by side as .mp4 (H.264) or as .gif that repeats.

    The file appears under its name when it is complete. titles: what is written over each frame, see `frame_titles`.

    Raises:
        ValueError: the name ends in something else.
    """
    write_windows([(panels, titles)], path, fps)


def write_windows(
    windows: Iterable[tuple[dict[str, torch.Tensor], Sequence[str]]], path: str | Path, fps: float = FRAMES_PER_SECOND
) -> None:
    """Write the panels and titles of one window after another, as `write_animation` does; the captions are the same."""
    path = Path(path)
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"{path}: not a moving picture; expected a name ending in {', '.join(WRITERS)}")
    write_whole(path, lambda aside: write(_pictures(windows), aside, fps))


def _pictures(windows: Iterable[tuple[dict[str, torch.Tensor], Sequence[str]]]) -> Iterator[Image.Image]:
    canvas = None
    for panels, titles in windows:
        canvas = canvas or Canvas(panels)
        images_by_time: list[tuple[torch.Tensor, ...]] = list(zip(*panels.values(), strict=True))
        shown: Sequence[str] = titles or [""] * len(images_by_time)
        for images, title in zip(images_by_time, shown, strict=True):
            yield canvas.compose(images, title)


class Canvas:
    """What all frames of a moving picture share: captions, axes and scale. Sizes are in pixels."""

    def __init__(self, panels: dict[str, torch.Tensor]):
        height, width = next(iter(panels.values())).shape[-2:]
        factor = max(1, round(PANEL_SIDE / max(height, width)))
        self.shown = width * factor, height * factor
        self.lefts, end = [], GAP
        for caption in panels:
            left = end + AXIS * (caption == SCORES)
            self.lefts.append(left)
            end = left + self.shown[0] + GAP
        has_scores = SCORES in panels
        total = end + SCALE * has_scores, TOP + self.shown[1] + (AXIS if has_scores else GAP)
        self.size = total[0] + total[0] % 2, total[1] + total[1] % 2  # even, as H.264 with 4:2:0 chroma needs
        self.background = self._draw(list(panels), (width, height))

    def _draw(self, captions: list[str], frame: tuple[int, int]) -> Image.Image:
        figure = Figure(figsize=(self.size[0] / DOTS, self.size[1] / DOTS), dpi=DOTS)
        pixels = FigureCanvasAgg(figure)
        for caption, left in zip(captions, self.lefts, strict=True):
            figure.text(left / self.size[0], 1 - (TOP - 5) / self.size[1], caption, fontsize=9)
            if caption == SCORES:
                axis = figure.add_axes(self._place(left, self.shown[0]), xlim=(0, frame[0]), ylim=(frame[1], 0))
                axis.set_xlabel("x (pixels)", fontsize=8)
                axis.set_ylabel("y (pixels)", fontsize=8)
                scale = figure.add_axes(self._place(left + self.shown[0] + GAP, 12))
                figure.colorbar(ScalarMappable(cmap=HEAT), cax=scale, ticks=[0, 0.5, 1])
                scale.set_ylabel("share of the largest score", fontsize=8)
        for axis in figure.axes:
            axis.tick_params(labelsize=7)
        pixels.draw()
        drawn = Image.new("RGB", self.size, "white")
        drawn.paste(Image.fromarray(np.asarray(pixels.buffer_rgba())))  # a pixel smaller where inches are rounded down
        return drawn

    def _place(self, left: int, width: int) -> tuple[float, float, float, float]:
        """Return where an axis is that is as high as the panels: left, bottom, width and height, as shares."""
        (total_width, total_height), height = self.size, self.shown[1]
        bottom = total_height - TOP - height
        return left / total_width, bottom / total_height, width / total_width, height / total_height

    def compose(self, images: Sequence[torch.Tensor], title: str) -> Image.Image:
        """Return one frame: images uint8 (3, H, W), enlarged, below a title."""
        canvas = self.background.copy()
        ImageDraw.Draw(canvas).text((GAP, 4), title, fill="black", font_size=13)
        for image, left in zip(images, self.lefts, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # (H, W, 3)
            canvas.paste(picture.resize(self.shown, Image.Resampling.NEAREST), (left, TOP))
        return canvas


def _write_gif(frames: Iterator[Image.Image], path: Path, fps: float) -> None:
    first = next(frames)
    first.save(path, format="GIF", save_all=True, append_images=frames, duration=round(1000 / fps), loop=0)


def _write_mp4(frames: Iterator[Image.Image], path: Path, fps: float) -> None:
    write_mp4(map(np.asarray, frames), path, Fraction(fps).limit_denominator(1000), crf="18")


WRITERS = {".mp4": _write_mp4, ".gif": _write_gif}
