"""How well the features of a pre-training tell the classes of videos apart: nearest neighbours, nothing is trained."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from ..data import transforms
from ..distributed import end_together
from ..inference import feature_function
from ..inference.neighbours import TEMPERATURE, labels_by_votes, similarities_to_others
from ..modeling_everest import EverestForPreTraining
from .evaluate import join, on_device, unreadable, val_figures

NEIGHBOURS = 20


def knn_top1(
    features: torch.Tensor, labels: torch.Tensor, *, neighbours: int | None = None, temperature: float = TEMPERATURE
) -> float:
    """Return the share of videos whose class has the most votes of their nearest neighbours among the other videos.

    With the cosine s_ij of features i and j, the k nearest of i vote for their classes with exp(s_ij / temperature)
    (Wu et al. 2018, arXiv 1805.01978, section 3.4, with its temperature), each video against all others (leave one out).
    k: `neighbours`; by default NEIGHBOURS, or where the classes are smaller, the others of a class of average size. A
    video that is alone in its class is never right.

    features: (n, D), n at least 2. labels: int64 (n,), on the same device.
    """
    # Of more, those of other classes would outvote the few of a video's own.
    neighbours = neighbours or min(NEIGHBOURS, max(1, len(labels) // len(labels.unique()) - 1))
    right = [
        labels_by_votes(similarities, labels, neighbours, temperature) == labels[own]
        for own, similarities in similarities_to_others(features.double())
    ]
    return int(torch.cat(right).sum()) / len(labels)


def evaluate_neighbours(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, *, source: str
) -> dict[str, float]:
    """Return {"val_knn_top1": `knn_top1`} of labelled videos. Every process calls it.

    model, loader: as in `find_features`. source: where the videos are from, for errors.

    Raises:
        ValueError: videos cannot be read. The main process raises, the others exit.
    """
    videos, bad = find_features(accelerator, model, loader)
    if bad:
        end_together(ValueError(f"{source}: {unreadable(bad)}"))
    top1 = knn_top1(videos["features"].to(accelerator.device), videos["labels"].to(accelerator.device))
    return val_figures({"knn_top1": top1})


@torch.no_grad()
def find_features(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return `features` (n, D), `labels` (n,), `index` and `unreadable` (n,) of videos, and reasons by unreadable path.

    Every process calls it, and gets all videos, on the CPU, in the order of the rows. model: of pre-training, whose
    features are the mean of the tokens that its encoder gives in evaluation mode, of those that the config's keep_ratio
    keeps; or another, with the features of `feature_function`. loader: this process's batches of a VideoViews of one
    view that counts unreadable videos.
    """
    whole, was_training = accelerator.unwrap_model(model), model.training
    mean, std = whole.config.image_mean, whole.config.image_std
    bad: dict[str, str] = {}
    found = []
    features_of = feature_function(whole.everest if isinstance(whole, EverestForPreTraining) else whole)
    model.eval()
    for batch in on_device(loader, accelerator, bad):
        clips = transforms.normalize(batch["pixel_values"].flatten(0, 1), mean, std)  # (B, T, C, h, w)
        with accelerator.autocast():
            features = features_of(clips)  # (B, D)
        found.append((features, batch["labels"], batch["index"], batch["unreadable"].long()))  # padding makes it so
    model.train(was_training)
    names = ("features", "labels", "index", "unreadable")
    parts = dict(zip(names, map(torch.cat, zip(*found, strict=True)), strict=True))
    joined = join(accelerator, parts)
    return {**joined, "unreadable": joined["unreadable"].bool()}, dict(gather_object(list(bad.items())))
