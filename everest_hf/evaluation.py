"""From views to videos to figures. Knows torch; how to gather over processes comes in as an argument."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


@torch.no_grad()
def predict_videos(
    model: nn.Module,
    batches: Iterable[dict],
    *,
    to_pixel_values: Callable[[torch.Tensor], torch.Tensor],
    gather: Callable = lambda tensors: tensors,
) -> dict[str, torch.Tensor]:
    """Classify videos by the mean of the softmax over their views.

    batches: `pixel_values` uint8 (B, V, T, C, h, w), `labels` (B,), `index` (B,). to_pixel_values: uint8 to
    normalised floats. gather: joins the tensors of all processes, without duplicates. Returns, on the CPU,
    `probabilities` (videos, classes) float32, `labels` (videos,), `index` (videos,).
    """
    model.eval()
    gathered = []
    for batch in batches:
        views = batch["pixel_values"]  # (B, V, T, C, h, w)
        logits = model(pixel_values=to_pixel_values(views.flatten(0, 1))).logits  # (B * V, classes)
        probabilities = logits.float().softmax(dim=-1).unflatten(0, views.shape[:2]).mean(dim=1)
        gathered.append(gather((probabilities, batch["labels"], batch["index"])))
    columns = zip(*gathered, strict=True)
    return dict(
        zip(("probabilities", "labels", "index"), (torch.cat(column).cpu() for column in columns), strict=True)
    )


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterable[dict],
    *,
    to_pixel_values: Callable[[torch.Tensor], torch.Tensor],
    gather: Callable = lambda tensors: tensors,
) -> float:
    """Return the mean pre-training loss over videos, each view counted once, in evaluation mode (a fixed draw)."""
    model.eval()
    losses = []
    for batch in batches:
        views = batch["pixel_values"]  # (B, V, T, C, h, w)
        loss = model(pixel_values=to_pixel_values(views.flatten(0, 1))).loss
        losses.append(gather(loss.float().repeat(len(views))))  # one entry a video, so that short batches weigh less
    return float(torch.cat(losses).mean())
