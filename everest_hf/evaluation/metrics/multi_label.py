"""Mean average precision, F1 and accuracy of videos that have several labels each."""

import datasets
import evaluate
import numpy as np


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the mean, over the positive videos, of the precision at their score: the area under precision-recall.

    scores (videos,), positive bool (videos,) with at least one True. Videos of equal scores come in together, so that
    their order plays no part.
    """
    hits = np.sort(scores[positive])
    # How many videos, and how many positive ones, have at least the score of each positive video.
    retrieved = len(scores) - np.searchsorted(np.sort(scores), hits, side="left")
    right = len(hits) - np.searchsorted(hits, hits, side="left")
    return float((right / retrieved).mean())


class MultiLabel(evaluate.Metric):
    """Mean average precision over the labels, and F1 and accuracy of the labels of a probability of 0.5 or more.

    predictions: one list of probabilities a video, one for each label; a row of zeros is no answer and wrong.
    references: lists of 0 and 1. `map` leaves out labels that no video has. `f1` is over all pairs of a video and a
    label. `accuracy` is the share of videos with all labels right.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean average precision, F1 and accuracy of multi-label video classification.",
            citation="",
            inputs_description="predictions: label probabilities of each video; references: its 0 and 1 for each label.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        probabilities, wanted = np.asarray(predictions), np.asarray(references) == 1  # (videos, labels)
        answers = probabilities >= 0.5
        right = (answers == wanted).all(axis=1) & probabilities.any(axis=1)
        precisions = [
            average_precision(column, positive)
            for column, positive in zip(probabilities.T, wanted.T, strict=True)
            if positive.any()
        ]
        return {
            "map": float(np.mean(precisions)) if precisions else 0.0,
            "f1": float(2 * (answers & wanted).sum() / max(1, answers.sum() + wanted.sum())),
            "accuracy": float(right.mean()),
        }
