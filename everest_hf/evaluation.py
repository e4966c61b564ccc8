"""From views to videos to figures."""

import os
from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from . import transforms
from .metrics import load_metric
from .recipe import Recipe


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
    batches: Collection[dict],
    *,
    to_pixel_values: Callable[[torch.Tensor], torch.Tensor],
    gather: Callable = lambda tensors: tensors,
) -> float:
    """Return the mean pre-training loss over videos, each view counted once, in evaluation mode (a fixed draw).

    Arguments as in `predict_videos`; batches has a length.
    """
    model.eval()
    losses = []
    for i, batch in enumerate(batches, 1):
        views = batch["pixel_values"]  # (B, V, T, C, h, w)
        # On several processes the last batch may be filled up with copies, and `gather` drops them: no video's loss
        # may be mixed with theirs. Elsewhere a batch's mean stands for each of its videos.
        parts = views.split(1 if i == len(batches) else len(views))
        means = [model(pixel_values=to_pixel_values(part.flatten(0, 1))).loss.float() for part in parts]
        losses.append(gather(torch.cat([loss.repeat(len(part)) for loss, part in zip(means, parts, strict=True)])))
    return float(torch.cat(losses).mean())


def evaluate_model(accelerator: Accelerator, model, loader: DataLoader, recipe: Recipe) -> dict[str, float]:
    """Return the figures on a validation loader: the loss of pre-training, or accuracies of classification."""
    config = accelerator.unwrap_model(model).config
    options = {
        "to_pixel_values": partial(transforms.normalize, mean=config.image_mean, std=config.image_std),
        "gather": accelerator.gather_for_metrics,
    }
    loader = accelerator.prepare(loader)
    was_training = model.training
    try:
        if recipe.task == "pretrain":
            return {"val_loss": mean_loss(model, loader, **options)}
        predicted = predict_videos(model, loader, **options)
    finally:
        model.train(was_training)
        accelerator._dataloaders.remove(loader)  # prepared for this once; a checkpoint must not look for it
    metric = load_metric("video_accuracy", experiment_id=f"{os.getpid()}")
    figures = metric.compute(predictions=predicted["probabilities"].double().numpy(), references=predicted["labels"])
    likelihood = predicted["probabilities"].gather(1, predicted["labels"][:, None]).clamp_min(1e-12)
    return {"val_loss": float(-likelihood.log().mean()), **{f"val_{name}": value for name, value in figures.items()}}
