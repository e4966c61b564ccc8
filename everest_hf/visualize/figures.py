"""What all pictures share: matplotlib draws them without a display and writes them to a file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures are written to files, also where there is no display
from matplotlib import pyplot as plt

__all__ = ["plt", "save"]


def save(figure, path: str | Path) -> None:
    """Write a figure to the file `path`, make the file's folder if need be, and close the figure."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
