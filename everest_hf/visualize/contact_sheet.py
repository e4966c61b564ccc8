"""A contact sheet: clips one below the other, each as strips of its frames with a line of text above."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ..files import write_whole

# At most so many frames of a clip, and their width in pixels: a small frame is enlarged by a whole factor to about this.
FRAMES, FRAME_WIDTH = 8, 144
GAP, LINE, FONT = 4, 22, 14


def write_contact_sheet(
    heading: str, clips: Sequence[tuple[str, Sequence[torch.Tensor]]], path: Path, *, every: int = 1
) -> None:
    """Write a picture of clips, each a line of text and strips uint8 (T, 3, H, W) of the same size.

    every: frames that are alike, as those of a tubelet; the first of them is shown. Of long clips fewer are, evenly
    spread. The file appears under its name when it is complete.
    """
    first = clips[0][1][0]
    starts = range(0, len(first), every)
    shown = [starts[i * len(starts) // min(FRAMES, len(starts))] for i in range(min(FRAMES, len(starts)))]
    factor = FRAME_WIDTH / first.shape[-1]
    factor, resampling = (round(factor), Image.Resampling.NEAREST) if factor > 1 else (factor, Image.Resampling.BOX)
    height, width = round(first.shape[-2] * factor), round(first.shape[-1] * factor)
    strips = sum(len(of_clip) for _, of_clip in clips)
    size = len(shown) * (width + GAP) + GAP, (len(clips) + 1) * (LINE + GAP) + strips * (height + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), heading, fill="black", font_size=FONT)
    top = LINE + GAP
    for text, of_clip in clips:
        draw.text((GAP, top + GAP), text, fill="black", font_size=FONT)
        top += LINE + GAP
        for strip in of_clip:
            for column, frame in enumerate(shown):
                picture = Image.fromarray(strip[frame].permute(1, 2, 0).contiguous().numpy())
                canvas.paste(picture.resize((width, height), resampling), (GAP + column * (width + GAP), top))
            top += height + GAP
    write_whole(path, lambda aside: canvas.save(aside))
