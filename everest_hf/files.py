"""Files that are whole or absent, and the folders of the package and of runs."""

import os
from collections.abc import Callable
from pathlib import Path

# Where recipes and the template of the model card lie; in a checkout both are links to those beside the package.
PACKAGE = Path(__file__).parent
# Where a run is by default, and is looked for.
RUNS = Path("runs")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name of the same suffix, by `write` of that name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".partial-{path.name}")
    write(aside)
    os.replace(aside, path)
