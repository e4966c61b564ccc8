"""Checkpoints as somebody would forge them."""

import pathlib
from pathlib import Path

from everest_hf.training.integrity import PROGRESS, files_in, read_progress, write_progress


class Evil:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def reseal(checkpoint: Path) -> None:
    """Let progress.json say that all files of a checkpoint, as they are now, were written so."""
    progress = {key: value for key, value in read_progress(checkpoint).items() if key != "files"}
    write_progress(checkpoint, progress, [name for name in files_in(checkpoint) if name != PROGRESS])
