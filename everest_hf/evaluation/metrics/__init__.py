"""Metric modules for the `evaluate` library that load from the package, without a network."""

from pathlib import Path

import evaluate


def load_metric(name: str, **kwargs) -> evaluate.Metric:
    """Return a metric of this folder, such as "video_accuracy"; kwargs go to `evaluate.load`."""
    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), **kwargs)
