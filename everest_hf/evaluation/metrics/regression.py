"""Errors and correlation of predicted numbers."""

import datasets
import evaluate
import numpy as np


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
        errors = predictions - references
        mse, variance = np.mean(errors**2), references.var()
        varied = predictions.std() > 0 and variance > 0
        return {
            "mse": float(mse),
            "mae": float(np.abs(errors).mean()),
            "pearson": float(np.corrcoef(predictions, references)[0, 1]) if varied else 0.0,
            "r2": float(1 - mse / variance) if variance > 0 else 0.0,
        }
