"""Confusion matrix of video classification from class probabilities."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import confusion_matrix


class ConfusionMatrix(evaluate.Metric):
    """Counts of videos (classes, classes + 1): row = class of the video, column = class of the highest probability.

    predictions: one list of class probabilities a video. references: class ids. The last column counts the videos
    without an answer, whose row of probabilities is zeros.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Counts of videos by class and predicted class; the last column is no answer.",
            citation="",
            inputs_description="predictions: class probabilities of each video; references: its class id.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references) -> dict[str, np.ndarray]:
        probabilities, references = np.asarray(predictions), np.asarray(references)
        num_classes = probabilities.shape[1]
        predicted = np.where(probabilities.any(axis=1), probabilities.argmax(axis=1), num_classes)
        counts = confusion_matrix(references, predicted, labels=range(num_classes + 1))
        return {"confusion_matrix": counts[:num_classes]}  # no video is of the class "no answer"
