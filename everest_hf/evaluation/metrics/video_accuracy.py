"""Accuracy of video classification from class probabilities."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import recall_score


class VideoAccuracy(evaluate.Metric):
    """Top-1, top-5 and mean class accuracy, each a share in [0, 1].

    predictions: one list of class probabilities a video; a row of zeros is no answer and wrong. references: class ids.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1, top-5 and mean class accuracy of video classification.",
            citation="",
            inputs_description="predictions: class probabilities of each video; references: its class id.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        probabilities, references = np.asarray(predictions), np.asarray(references)
        # Stable, so that among equal probabilities the lower class comes first on every machine.
        ranked = np.argsort(-probabilities, axis=1, kind="stable")  # (videos, classes)
        hits = (ranked == references[:, None]) & probabilities.any(axis=1, keepdims=True)
        answers = np.where(hits[:, 0], references, -1)  # -1: another class, or none
        return {
            "top1": float(hits[:, 0].mean()),
            "top5": float(hits[:, :5].any(axis=1).mean()),
            "mean_class_accuracy": float(
                recall_score(references, answers, labels=np.unique(references), average="macro", zero_division=0.0)
            ),
        }
