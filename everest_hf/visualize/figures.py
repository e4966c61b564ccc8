"""What all pictures share: they are drawn without a display, and written to a file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures are written to files, also where there is no display
from matplotlib import pyplot as plt

__all__ = ["plt", "save"]


def save(figure, path: str | Path) -> None:
    """Write a figure under `path`, whose folder is made where it is not there, and close it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
