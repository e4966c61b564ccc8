"""Evaluation: from scores of views to scores of videos to figures.

Each process scores whole batches of its own. At the end all scores are joined in the order of the rows, so no figure
depends on the number of processes.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..configuration_everest import problem_type_of
from ..data import transforms
from ..data.rows import named
from ..distributed import all_write, end_together
from ..modeling_everest import EverestForPreTraining
from ..video import VideoError
from .metrics import load_metric
from .report import write_figures, write_predictions

logger = logging.getLogger(__name__)

# What turns the logits of a view into scores; the mean over its views is a video's score. And the metric of each.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "single_label_classification": partial(torch.softmax, dim=-1),
    "multi_label_classification": torch.sigmoid,
    "regression": nn.Identity(),
}
METRICS = {
    "single_label_classification": "video_accuracy",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
# Figures are rounded to this many digits. The seventh may change with the number of threads, or with where weights lie
# in memory, as sums are then taken in another order.
SIGNIFICANT_DIGITS = 5
# An evaluation shows its progress after so many seconds.
PROGRESS_AFTER = 5


# -------------------------------------------------------------------------------------------------- views to videos


def mean_scores(logits: torch.Tensor, num_views: int, problem_type: str) -> torch.Tensor:
    """Return the scores (B, labels) float32 of videos from the logits (B * V, labels) of their V views."""
    return ACTIVATIONS[problem_type](logits.float()).unflatten(0, (-1, num_views)).mean(dim=1)


@torch.no_grad()
def predict_videos(
    model: nn.Module,
    batches: Iterable[dict],
    *,
    to_pixel_values: Callable[[torch.Tensor], torch.Tensor],
    problem_type: str = "single_label_classification",
) -> dict[str, torch.Tensor]:
    """Score videos by the mean, over their views, of the softmax (several labels: sigmoid; regression: the output).

    batches: `pixel_values` uint8 (B, V, T, C, h, w), `labels` (B,) or (B, labels), `index` (B,), and perhaps
    `unreadable` bool (B,): such a video has no answer, and its scores are zeros. to_pixel_values: uint8 to normalised
    floats. Returns `scores` (videos, labels) float32, `labels` and `index`, on the model's device.
    """
    model.eval()
    found = []
    for batch in batches:
        views = batch["pixel_values"]  # (B, V, T, C, h, w)
        logits = model(pixel_values=to_pixel_values(views.flatten(0, 1))).logits  # (B * V, labels)
        scores = mean_scores(logits, views.shape[1], problem_type)
        if "unreadable" in batch:
            scores = scores.masked_fill(batch["unreadable"][:, None], 0)
        found.append((scores, batch["labels"], batch["index"]))
    return dict(zip(("scores", "labels", "index"), map(torch.cat, zip(*found, strict=True)), strict=True))


@torch.no_grad()
def video_losses(
    model: nn.Module, batches: Iterable[dict], *, to_pixel_values: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the pre-training `loss` (videos,) and `index` (videos,). In evaluation mode the random draw is fixed.

    Arguments as in `predict_videos`. The mean loss of a batch stands for each of its videos.
    """
    model.eval()
    found = []
    for batch in batches:
        loss = model(pixel_values=to_pixel_values(batch["pixel_values"].flatten(0, 1))).loss.float()
        found.append((loss.repeat(len(batch["index"])), batch["index"]))
    return dict(zip(("loss", "index"), map(torch.cat, zip(*found, strict=True)), strict=True))


def join(accelerator: Accelerator, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what all processes found, on the CPU: each video once, in the order of the rows.

    found: tensors with a row for each video, under the same keys in every process; `index` (videos,) names the videos.
    """
    # Processes may have scored different numbers of videos; -1 is no video's index.
    padded = {name: accelerator.pad_across_processes(rows, pad_index=-1) for name, rows in found.items()}
    joined = {name: accelerator.gather(rows).cpu() for name, rows in padded.items()}
    index, places = np.unique(joined["index"].numpy(), return_index=True)
    return {name: rows[torch.from_numpy(places[index >= 0])] for name, rows in joined.items()}


# ------------------------------------------------------------------------------------------------ videos to figures


def figures_of(scores: torch.Tensor, labels: torch.Tensor, problem_type: str) -> dict[str, float]:
    """Return the loss of scores (videos, labels) and the figures of the problem type's metric.

    Where classes are predicted, a row of zeros is no answer, and the loss leaves such videos out.
    """
    if problem_type == "regression":
        scores, labels = scores.flatten(), labels.flatten()
        loss = F.mse_loss(scores.double(), labels.double())
    else:
        answered = scores.any(dim=-1)
        loss = _likelihood_loss(scores[answered].double(), labels[answered], problem_type)
    metric = load_metric(METRICS[problem_type], keep_in_memory=True)
    figures = metric.compute(predictions=scores.double().numpy(), references=labels.numpy())
    return {"loss": float(loss), **figures}


def _likelihood_loss(probabilities: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy(probabilities, labels.double())
    return F.nll_loss(probabilities.clamp_min(1e-12).log(), labels)


def evaluate_model(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    *,
    source: str,
    count_bad: bool = False,
    folder: Path | None = None,
) -> dict[str, float]:
    """Return the figures on a validation set by name: the pre-training loss, or `figures_of`. Names begin with "val_".

    Every process must call this. loader: this process's batches (`share_of_batches`) of a VideoViews that counts
    unreadable videos. source: what errors call the videos. count_bad: count unreadable videos as wrong. folder: where
    figures.json and the files of `write_predictions` are written.

    Raises:
        ValueError: videos cannot be read and do not count as wrong. OSError: a file cannot be written. The main process
            raises, the others exit.
    """
    whole = accelerator.unwrap_model(model)
    config = whole.config
    problem_type = None if isinstance(whole, EverestForPreTraining) else problem_type_of(config)
    was_training = model.training
    found, bad = _find(accelerator, model, loader, config, problem_type)
    model.train(was_training)
    if bad and not (count_bad and _has_answers(found, problem_type)):
        end_together(ValueError(f"{source}: {unreadable(bad)}"))
    if problem_type is None:
        figures = {"loss": float(found["loss"].double().mean())}
    else:
        figures = figures_of(found["scores"], found["labels"], problem_type)
    figures = val_figures(figures)
    if bad:
        figures["val_unreadable"] = int((found["scores"] == 0).all(dim=-1).sum())
    if folder is not None:
        rows = loader.dataset.rows  # type: ignore[attr-defined]  # of VideoViews
        all_write(f"the evaluation in {folder}", _report, accelerator, folder, figures, found, bad, config, rows)
    return figures


def val_figures(figures: dict[str, float]) -> dict[str, float]:
    """Return figures under the names that logs give those of val, rounded to SIGNIFICANT_DIGITS."""
    return {f"val_{name}": float(f"{value:.{SIGNIFICANT_DIGITS}g}") for name, value in figures.items()}


def unreadable(bad: dict[str, str]) -> str:
    """Say for an error which videos of val cannot be read; bad: reasons by path."""
    return f"unreadable validation videos: {named([f'{path}: {reason}' for path, reason in sorted(bad.items())])}"


def _find(accelerator, model, loader, config, problem_type) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return what all processes together found, and the reasons of unreadable videos by path."""
    bad: dict[str, str] = {}
    batches = on_device(loader, accelerator, bad)
    to_pixel_values = partial(transforms.normalize, mean=config.image_mean, std=config.image_std)
    if problem_type is None:
        found = video_losses(model, batches, to_pixel_values=to_pixel_values)
    else:
        found = predict_videos(model, batches, to_pixel_values=to_pixel_values, problem_type=problem_type)
    return join(accelerator, found), dict(gather_object(list(bad.items())))


def _has_answers(found: dict[str, torch.Tensor], problem_type: str | None) -> bool:
    """Say whether any video has a class as its answer, right or wrong; models of pixels or numbers give none."""
    has_classes = problem_type in ("single_label_classification", "multi_label_classification")
    return has_classes and bool(found["scores"].any())


def _report(accelerator, folder, figures, found, bad, config, rows) -> None:
    """In the main process, write the files of an evaluation and warn of the videos that counted as wrong."""
    if not accelerator.is_main_process:
        return
    write_figures(folder, figures)
    if "scores" in found:
        names = [config.id2label[i] for i in range(config.num_labels)]
        write_predictions(folder, problem_type_of(config), names, rows, found["scores"], found["labels"])
    for path, reason in sorted(bad.items()):
        logger.warning("unreadable, counted as wrong: %s", VideoError(path, reason))


def on_device(
    loader: DataLoader, accelerator: Accelerator, bad: dict[str, str], title: str = "evaluation"
) -> Iterator[dict]:
    """Yield the batches of a loader on the device, with progress; put unreadable videos and their reasons into `bad`."""
    hidden = not accelerator.is_main_process
    for batch in tqdm(loader, title, unit="batch", leave=False, delay=PROGRESS_AFTER, disable=hidden):
        bad.update(batch.pop("bad"))
        yield send_to_device(batch, accelerator.device, non_blocking=True)
