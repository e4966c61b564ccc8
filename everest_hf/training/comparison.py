"""Several runs beside each other: what each has come to, by its log."""

import logging
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .logging import LOG, read_log

logger = logging.getLogger(__name__)

# Figures that are better where they are lower, without "val_"; others are better where they are higher.
LOWER_IS_BETTER = ("loss", "mse", "mae", "unreadable")


@dataclass(frozen=True)
class Figure:
    """A figure of a run's evaluations: the last value, the best one, and after how many steps that was."""

    last: float
    best: float
    best_step: int


@dataclass(frozen=True)
class LoggedRun:
    """A run by its folder. task: None where there is no recipe. log: the lines of its log."""

    name: str
    task: str | None
    log: list[dict[str, Any]] = field(repr=False)

    @property
    def steps(self) -> int:
        """Steps up to the last line of the log."""
        return max((line["step"] for line in self.log), default=0)

    def figures(self) -> dict[str, Figure]:
        """Return what evaluations gave, by name; what is no number, as a loss that was not finite, is left out."""
        names = dict.fromkeys(name for line in self.log for name in line if name.startswith("val_"))
        return {name: figure for name in names if (figure := self._figure(name))}

    def _figure(self, name: str) -> Figure | None:
        points = [(line[name], line["step"]) for line in self.log if isinstance(line.get(name), (int, float))]
        if not points:
            return None
        choose = min if name.removeprefix("val_") in LOWER_IS_BETTER else max
        best, step = choose(points, key=lambda point: point[0])
        return Figure(points[-1][0], best, step)

    def summary(self) -> dict[str, Any]:
        """Return what the run has come to, for JSON: steps, seconds of training, the last loss, its figures."""
        lines = [line for line in self.log if "loss" in line]
        speeds = [line["clips_per_second"] for line in lines if line.get("clips_per_second")]
        return {
            "run": self.name,
            "task": self.task,
            "steps": self.steps,
            "seconds": round(sum(line.get("seconds") or 0 for line in lines)),
            "clips_per_second": round(statistics.median(speeds), 3) if speeds else None,
            "loss": lines[-1]["loss"] if lines else None,
            "figures": {name: asdict(figure) for name, figure in self.figures().items()},
        }


def read_run(folder: str | Path) -> LoggedRun:
    """Return the run in a folder, finished or not.

    A line of its log that is damaged is left out with a warning, as is a last one that is not finished.

    Raises:
        ValueError: the folder holds no run.
    """
    path = Path(folder) / LOG
    if not path.is_file():
        raise ValueError(f"{folder}: has no {LOG}; name the folder of a run")
    return LoggedRun(str(folder), _task_of(path.with_name("recipe.yaml")), read_log(path))


def _task_of(recipe: Path) -> str | None:
    try:
        return str(yaml.safe_load(recipe.read_text())["task"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        logger.warning("%s is missing or damaged: the task of its run is not known", recipe)
        return None


def table_of(runs: list[LoggedRun]) -> str:
    """Return a table with a row a run and a column a figure: its last value and, where another is better, the best."""
    figures = [run.figures() for run in runs]
    names = list(dict.fromkeys(name for of_run in figures for name in of_run))
    rows = [["run", "task", "steps", "loss", *names]]
    for run, of_run in zip(runs, figures, strict=True):
        loss = run.summary()["loss"]
        cells = [_cell(of_run[name]) if name in of_run else "-" for name in names]
        rows.append([run.name, run.task or "-", str(run.steps), "-" if loss is None else f"{loss:.4g}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(figure: Figure) -> str:
    last = f"{figure.last:.4g}"
    return last if figure.best == figure.last else f"{last} (best {figure.best:.4g} at {figure.best_step})"
