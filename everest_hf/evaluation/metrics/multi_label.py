"""Mean average precision, F1 and accuracy of videos that have several labels each."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, f1_score


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
        shown = wanted.any(axis=0)
        precisions = average_precision_score(wanted[:, shown], probabilities[:, shown]) if shown.any() else 0.0
        return {
            "map": float(precisions),
            "f1": float(f1_score(wanted, answers, average="micro", zero_division=0.0)),
            "accuracy": float(right.mean()),
        }
