"""Errors and correlation of predicted numbers."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score


class Regression(evaluate.Metric):
    """Mean squared error, mean absolute error, Pearson's correlation and R², the share of variance explained.

    predictions, references: one number a video. `pearson` and `r2` are 0 where they are not defined: where all
    references, or for `pearson` all predictions, are equal.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean squared and absolute error, Pearson's correlation and R2.",
            citation="",
            inputs_description="predictions, references: one number a video.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        known, varied = references.std() > 0, predictions.std() > 0
        return {
            "mse": float(mean_squared_error(references, predictions)),
            "mae": float(mean_absolute_error(references, predictions)),
            "pearson": float(np.corrcoef(predictions, references)[0, 1]) if known and varied else 0.0,
            "r2": float(r2_score(references, predictions)) if known else 0.0,
        }
