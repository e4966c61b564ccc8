"""Nearest neighbours among features: the videos that are most alike, and how well neighbours tell a label."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..data import VideoViews
from .batches import errors_of, reading
from .embed import digest_of_model, feature_function, features_of
from .features import FeatureFile, read_features
from .loading import load_encoder, model_folder
from .sources import WEB, NamedVideos

# Temperature of the votes of neighbours (arXiv 1805.01978).
TEMPERATURE = 0.07
# Videos whose similarities to all others are held at a time.
AT_ONCE = 256
# What a file of features says of the views.
_SAMPLING = ("frame_sampling", "num_frames", "frame_step", "num_input_frames", "num_segments", "num_crops")


@dataclass(frozen=True)
class Match:
    """A video that is like another: its path or name, its label where it has one, and the cosine of the angle between
    their features, from -1 to 1.
    """

    video: str
    label: str | None
    similarity: float


def search(
    query: str | os.PathLike,
    features: str | os.PathLike | FeatureFile,
    *,
    top_k: int = 5,
    model: str | os.PathLike | None = None,
    **opening,
) -> list[Match]:
    """Return the videos whose features are nearest to those of a video, the nearest first, at most top_k.

    query: a file or URL; it is embedded as the features were: by the same model and keep ratio, from the same views.
    features: a file that `everest-hf embed` wrote, or what `read_features` returned of it. model: where the model is now,
    by default where it was. opening: time_limit and max_pixels of `everest_hf.video.open_video`.

    Raises:
        FileNotFoundError, ValueError: the features or the model are missing or not such; the model has other weights
            than the one that made the features.
        VideoError: the query cannot be read.
    """
    known = features if isinstance(features, FeatureFile) else read_features(Path(features))
    wanted = F.normalize(_feature_of(os.fspath(query), known.about, model, **opening), dim=-1)  # (1, D)
    similarities = (F.normalize(known.embeddings, dim=-1) @ wanted.T).flatten()  # (n,)
    nearest = similarities.topk(min(top_k, len(similarities)))
    return [
        Match(known.videos[i], None if known.labels is None else known.labels[i], value)
        for i, value in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    ]


def _feature_of(query: str, about: dict[str, Any], model: str | os.PathLike | None, **opening) -> torch.Tensor:
    """Return the feature (1, D) of a video, made as `about` says."""
    name = str(model_folder(about["model"] if model is None else model))
    encoder, _ = load_encoder(name)
    if about.get("weights") not in (None, digest_of_model(encoder)):
        raise ValueError(f"{name}: has other weights than the model that made the features; embed the videos again")
    sampling = {key: about[key] for key in _SAMPLING}
    views = VideoViews(
        NamedVideos([query]),
        encoder.config.frame_size,
        **sampling,
        **opening,
        url_schemes=WEB,
        count_unreadable=True,
    )
    function = feature_function(encoder, about["keep_ratio"])
    with reading(views, [[0]], description="embed", total=1) as batches:
        batch = next(batches)
    for error in errors_of([query], batch).values():
        raise error
    return features_of(batch, encoder, function).embeddings.clone()


# ---------------------------------------------------------------------- labels of neighbours


@dataclass(frozen=True)
class LabelFigures:
    """How well the neighbours of the videos of a label, or of all videos (label None), tell it; see `label_figures`."""

    label: str | None
    videos: int
    accuracy: float
    reciprocal_rank: float


def label_figures(features: FeatureFile, k: int = 20) -> list[LabelFigures]:
    """Return figures over all videos, then over those of each label, each video left out of its own neighbours.

    accuracy: the share of videos whose label has most votes among the k nearest others, where a neighbour of cosine s
    has exp(s / 0.07) votes: Wu et al., Unsupervised Feature Learning via Non-parametric Instance Discrimination
    (arXiv 1805.01978, section 3.4), as DINO and others evaluate features. Where there are fewer others, all of them
    vote. Of labels with as many votes the first in the order of their names counts.

    reciprocal_rank: the mean over videos of 1 / r, where r is the place of the nearest other video of the same label
    among all others, by falling cosine: Voorhees, The TREC-8 Question Answering Track Report (1999). As many places as
    there are nearer videos come before it. A video whose label no other has counts 0, and is not told rightly.

    Raises:
        ValueError: there are no labels, fewer than two videos, or k is below 1.
    """
    if features.labels is None:
        raise ValueError("the videos have no labels; embed a source that has some")
    if len(features.videos) < 2:
        raise ValueError("there is a single video; neighbours need two")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    names = sorted(set(features.labels))
    place = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([place[label] for label in features.labels])  # (n,)
    right, ranks = (torch.cat(parts) for parts in zip(*_answers(features.embeddings, labels, k), strict=True))
    groups = [(None, torch.ones_like(right, dtype=torch.bool)), *((name, labels == place[name]) for name in names)]
    return [
        LabelFigures(name, int(group.sum()), right[group].double().mean().item(), ranks[group].double().mean().item())
        for name, group in groups
    ]


def similarities_to_others(features: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for some videos after others their numbers (b,) and the cosines (b, n) of their features and all others'.

    features: (n, D). The cosine of a video and itself is -inf: it is none of its neighbours.
    """
    directions = F.normalize(features, dim=-1)
    for own in torch.arange(len(directions), device=directions.device).split(AT_ONCE):
        yield own, (directions[own] @ directions.T).scatter_(1, own[:, None], -torch.inf)


def labels_by_votes(
    similarities: torch.Tensor, labels: torch.Tensor, k: int, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Return the labels (b,) with most votes of the k nearest, of which one of cosine s has exp(s / temperature).

    similarities: (b, n). labels: int64 (n,). Of labels with as many votes the lowest counts. Source: arXiv 1805.01978,
    section 3.4.
    """
    nearest = similarities.topk(k, dim=1)  # (b, k)
    weights = ((nearest.values - 1) / temperature).exp()  # at most 1; which label has most is the same
    votes = weights.new_zeros(len(similarities), int(labels.max()) + 1)  # (b, labels)
    return votes.scatter_add_(1, labels[nearest.indices], weights).argmax(dim=1)


def _answers(embeddings: torch.Tensor, labels: torch.Tensor, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for some videos after others whether their neighbours tell their label, and their reciprocal ranks."""
    for own, similarities in similarities_to_others(embeddings.float()):
        told = labels_by_votes(similarities, labels, min(k, len(labels) - 1))
        alike = (labels == labels[own, None]).scatter(1, own[:, None], False)  # (b, n)
        best = similarities.masked_fill(~alike, -torch.inf).max(dim=1, keepdim=True).values  # (b, 1)
        ranks = 1 + (similarities > best).sum(dim=1)
        has_others = alike.any(dim=1)
        yield told == labels[own], torch.where(has_others, 1 / ranks, 0.0)
