"""What few labels make of a model's features: linear classifiers and nearest neighbours; the model stays as it is."""

import logging
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader

from ..distributed import all_write, end_together
from ..inference.neighbours import labels_by_votes
from ..video import VideoError
from .evaluate import unreadable, val_figures
from .neighbours import NEIGHBOURS, find_features
from .report import SPREAD, write_figures

logger = logging.getLogger(__name__)

# The protocol of mteb's classification tasks (arXiv 2210.07316, section 3.1), for several numbers of labels.
LABELS_A_CLASS, DRAWS = (1, 4, 8, 16, 64), 10
MAX_ITERATIONS = 1000


def evaluate_few_shot(
    accelerator: Accelerator,
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    names: list[str] | None,
    seed: int,
    count_bad: bool = False,
    folder: Path | None = None,
    others: dict[str, float] | None = None,
) -> dict[str, float]:
    """Return `few_shot_figures` of labelled videos; the names of the figures begin with "val_". Every process calls it.

    model: see `find_features` for its features. train_loader, val_loader: this process's batches of a VideoViews of one
    view that counts unreadable videos: of training, from which labels are drawn, and of validation, which is classified.
    names: of the classes, None where they are numbers. An unreadable video of training is never drawn; one of validation
    counts as wrong with count_bad. folder: where figures.json is written, with the figures `others` before these.

    Raises:
        ValueError: a video of validation cannot be read and does not count as wrong, or a class has no video to draw.
        OSError: figures.json cannot be written. The main process raises all this, the others exit.
    """
    train, bad_train = find_features(accelerator, model, train_loader)
    val, bad_val = find_features(accelerator, model, val_loader)
    if bad_val and not count_bad:
        end_together(ValueError(unreadable(bad_val)))
    if accelerator.is_main_process:
        _warn(bad_train, "not drawn")
        _warn(bad_val, "counted as wrong")
    features, labels = (train[name][~train["unreadable"]] for name in ("features", "labels"))
    names = names or [str(i) for i in range(int(train["labels"].max()) + 1)]
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    if not min(counts):
        end_together(ValueError(f"class {names[counts.index(0)]}: none of its training videos can be read"))
    numbers = numbers_of_labels(dict(zip(names, counts, strict=True)), tell=accelerator.is_main_process)
    val["labels"] = val["labels"].masked_fill(val["unreadable"], -1)  # which is no answer
    figures = val_figures(
        few_shot_figures(features, labels, val["features"], val["labels"], numbers=numbers, seed=seed)
    )
    if folder is not None:
        all_write(f"the evaluation in {folder}", _write, accelerator, folder, {**(others or {}), **figures})
    return figures


def _write(accelerator: Accelerator, folder: Path, figures: dict[str, float]) -> None:
    if accelerator.is_main_process:
        write_figures(folder, figures)


def _warn(bad: dict[str, str], what: str) -> None:
    for path, reason in sorted(bad.items()):
        logger.warning("unreadable, %s: %s", what, VideoError(path, reason))


def numbers_of_labels(counts: dict[str, int], *, tell: bool = True) -> list[int]:
    """Return those of LABELS_A_CLASS that every class has videos for. A warning names the others, with `tell`.

    counts: videos of training by class, each at least 1.
    """
    smallest = min(counts, key=lambda name: counts[name])
    left_out = [str(number) for number in LABELS_A_CLASS if number > counts[smallest]]
    if left_out and tell:
        logger.warning(
            "not measured with %s labels a class: class %s has %d readable training video%s",
            ", ".join(left_out),
            smallest,
            counts[smallest],
            "s" * (counts[smallest] > 1),
        )
    return [number for number in LABELS_A_CLASS if number <= counts[smallest]]


def few_shot_figures(
    features: torch.Tensor,
    labels: torch.Tensor,
    val_features: torch.Tensor,
    val_labels: torch.Tensor,
    *,
    numbers: list[int],
    seed: int,
    draws: int = DRAWS,
) -> dict[str, float]:
    """Return the top-1 accuracy of classifiers that have seen few labels: its mean over draws, and its spread.

    "linear_4": of scikit-learn's LogisticRegression, with its defaults, on 4 labels a class. "knn_4": of the votes of
    the nearest 4 (as many as there are labels a class, at most NEIGHBOURS), see `labels_by_votes`. "linear_4_std",
    "knn_4_std": the standard deviation over the draws, with the divisor draws - 1; the same draws serve both.

    features: (n, D). labels: int64 (n,), of the classes 0 to C - 1, each with max(numbers) or more. val_features: (m, D).
    val_labels: (m,).
    """
    features, val_features = features.double(), val_features.double()
    top1: dict[str, list[float]] = {}
    for drawn in draw_videos(labels, draws, seed):
        for number in numbers:
            some = drawn[:, :number].flatten()
            for name, classify in (("linear", _by_linear), ("knn", _by_neighbours)):
                predicted = classify(features[some], labels[some], val_features, number)
                top1.setdefault(f"{name}_{number}", []).append((predicted == val_labels).double().mean().item())
    by_kind = sorted(top1, key=lambda name: name.startswith("knn"))
    return {
        key: value
        for name in by_kind
        for key, value in ((name, statistics.mean(top1[name])), (name + SPREAD, statistics.stdev(top1[name])))
    }


def draw_videos(labels: torch.Tensor, draws: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield for each draw a random order of the videos of each class: int64 (C, n), n the size of the smallest class.

    The first k columns are the draw of k labels a class, so that more labels are added to the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    of_class = [(labels == i).nonzero().flatten() for i in range(int(labels.max()) + 1)]
    smallest = min(map(len, of_class))
    for _ in range(draws):
        orders = [videos[torch.randperm(len(videos), generator=generator)[:smallest]] for videos in of_class]
        yield torch.stack(orders)


def _by_linear(features, labels, others, number) -> torch.Tensor:
    centre = features.mean(dim=0)  # the same minimum, as nothing is asked of the bias, in fewer steps
    classifier = LogisticRegression(max_iter=MAX_ITERATIONS).fit((features - centre).numpy(), labels.numpy())
    return torch.from_numpy(classifier.predict((others - centre).numpy()))


def _by_neighbours(features, labels, others, number) -> torch.Tensor:
    similarities = F.normalize(others, dim=-1) @ F.normalize(features, dim=-1).T  # (m, n)
    return labels_by_votes(similarities, labels, min(number, NEIGHBOURS))
