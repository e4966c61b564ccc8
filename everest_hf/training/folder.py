"""The folder of a run: one run at a time holds it, and the run of another recipe is not overwritten unasked."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator, PartialState

from ..distributed import main_first
from ..evaluation.report import REPORT
from ..files import held
from .loaders import OPENED
from .logging import LOG, NAME
from .recipe import Recipe, load_recipe

# The list of the training videos that could not be read.
BAD_VIDEOS = "bad_videos.txt"
# The picture of what the model sees in training.
TRAIN_CLIPS = "train_clips.png"


@contextmanager
def hold(folder: Path, state: Accelerator | PartialState) -> Iterator[None]:
    """Hold the folder of a run for it alone: its main process does. Every process calls it.

    Raises:
        BlockingIOError, ValueError: another run is in it, or it cannot be made. The others end.
    """
    with ExitStack() as stack:
        main_first(state, _hold_on_main, folder, state, stack)
        yield


def _hold_on_main(folder: Path, state: Accelerator | PartialState, stack: ExitStack) -> None:
    if state.is_main_process:
        try:
            stack.enter_context(held(folder))
        except BlockingIOError:
            raise
        except OSError as error:
            raise ValueError(f"output_dir {folder}: {error.strerror or error}") from error


def write_recipe(recipe: Recipe) -> None:
    """Make the run's folder and write its recipe; with `overwrite` the run that is in it is removed first.

    Raises:
        ValueError: the folder holds a run of another recipe, or cannot be written.
    """
    folder = Path(recipe.output_dir)
    try:
        refuse_other_run(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        if recipe.overwrite:
            _remove_run(folder)
        recipe.save(folder / "recipe.yaml")
    except OSError as error:
        raise ValueError(f"output_dir {folder}: {error.strerror or error}") from error


def _remove_run(folder: Path) -> None:
    for name in ("checkpoints", "model", "evaluation"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("recipe.yaml", LOG, NAME, BAD_VIDEOS, TRAIN_CLIPS, OPENED, *REPORT):
        (folder / name).unlink(missing_ok=True)


def refuse_other_run(recipe: Recipe) -> None:
    """Raise a ValueError if the output folder holds the run of another recipe, which is not to be overwritten."""
    path = Path(recipe.output_dir) / "recipe.yaml"
    if recipe.overwrite or not (path.exists() and path.with_name(LOG).exists()):
        return  # without a log, nothing has been trained
    differences = load_recipe(path).differences(recipe)
    if differences:
        raise ValueError(
            f"output_dir {path.parent} holds a run of another recipe (different: {', '.join(differences)}); "
            "choose another output_dir, or --overwrite to start again"
        )
