"""A run as people see it: its folder, what it says at its start and at its end, and its pictures."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from ..configuration_everest import EverestConfig
from ..data import BadVideos, VideoViews, head_of, transforms
from ..distributed import main_first
from ..evaluation.report import REPORT
from ..files import held
from ..visualize import draw_curves, draw_kept_tokens, take_slots
from .build import MODEL_CLASSES
from .loaders import HEAD, OPENED, sampling_of
from .logging import LOG, NAME
from .recipe import Recipe, load_recipe

# The list of the training videos that could not be read.
BAD_VIDEOS = "bad_videos.txt"


@contextmanager
def hold(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder of a run for it alone: its main process does. Every process calls it.

    Raises:
        BlockingIOError, ValueError: another run is in it, or it cannot be made. The others end.
    """
    with ExitStack() as stack:
        main_first(accelerator, _hold_on_main, folder, accelerator, stack)
        yield


def _hold_on_main(folder: Path, accelerator: Accelerator, stack: ExitStack) -> None:
    if accelerator.is_main_process:
        try:
            stack.enter_context(held(folder))
        except BlockingIOError:
            raise
        except OSError as error:
            raise ValueError(f"output_dir {folder}: {error.strerror or error}") from error


def prepare_output(recipe: Recipe, accelerator: Accelerator) -> Path:
    """Return the run's folder, with its recipe in it.

    Raises:
        ValueError: the folder holds a run of another recipe, or cannot be written.
    """
    folder = Path(recipe.output_dir)
    if accelerator.is_main_process:
        try:
            refuse_other_run(recipe)
            folder.mkdir(parents=True, exist_ok=True)
            if recipe.overwrite:
                _remove_run(folder)
            recipe.save(folder / "recipe.yaml")
        except OSError as error:
            raise ValueError(f"output_dir {folder}: {error.strerror or error}") from error
    return folder


def _remove_run(folder: Path) -> None:
    for name in ("checkpoints", "model", "evaluation"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("recipe.yaml", LOG, NAME, BAD_VIDEOS, OPENED, *REPORT):
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


# ----------------------------------------------------------------------------------------------------------- words


def describe(
    recipe: Recipe, config: EverestConfig, num_videos: int, val: Dataset | None, total_batch: int, total_steps: int
) -> str:
    """Say in two lines what is about to run."""
    videos = f"{num_videos} training videos{' an epoch' if recipe.streaming else ''}"
    if recipe.has_labels and recipe.problem_type != "regression":
        videos = f"{config.num_labels} classes, {videos}"
    if recipe.task == "pretrain":
        tokens = f"{config.num_visible_tokens} seen and {config.num_target_tokens} predicted"
    else:
        tokens = f"{config.num_kept_tokens()} kept"
    return (
        f"{recipe.task}: {videos}, {len(val) if val is not None else 0} held out, "
        f"{recipe.epochs} epochs = {total_steps} steps of {total_batch} clips, to {recipe.output_dir}\n"
        f"tokens: {tokens} of {config.num_tokens} ({config.token_selection})"
    )


def summarise(
    recipe: Recipe, figures: dict[str, float], log: list[dict], model: Path, best: Path | None, bad: BadVideos
) -> str:
    """Say how a run ended and where its results are: a line, then a table."""
    shown = ", ".join(f"{name} {value:.5g}" for name, value in figures.items()) or "no validation set"
    lines = [line for line in log if "loss" in line]
    seconds = sum(line["seconds"] for line in lines)
    rows = {
        "steps": f"{lines[-1]['step']} in {timedelta(seconds=round(seconds))}" if lines else None,
        "training loss": f"{lines[0]['loss']:.4f} -> {lines[-1]['loss']:.4f}" if lines else None,
        "model": model,
        "best checkpoint": best,
        "log and pictures": recipe.output_dir,
    }
    table = [f"  {name:<18}{value}" for name, value in rows.items() if value is not None]
    if bad.reasons:
        table.append(f"{len(bad.reasons)} unreadable training videos, {bad.count} times replaced")
    return "\n".join([f"{recipe.task} finished: {shown}", *table])


# -------------------------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def draw_pictures(recipe: Recipe, saved: Path, rows: Dataset | IterableDataset, log: list[dict], folder: Path) -> None:
    """Draw the run's curves, and the tokens that the saved model keeps of the first video that can be read."""
    draw_curves({recipe.task: log}, folder / "curves.png")
    model = MODEL_CLASSES[recipe.task].from_pretrained(saved)
    config = model.config
    rows = head_of(rows, HEAD)
    views = VideoViews(rows, config.frame_size, count_unreadable=True, **sampling_of(recipe, config))
    items = (views[i] for i in range(len(views)))
    clip = next((item["pixel_values"] for item in items if not item["unreadable"]), None)  # (1, T, C, h, w)
    if clip is None:
        return
    pixel_values = transforms.normalize(clip, config.image_mean, config.image_std)
    embedded = model.everest.embeddings(pixel_values, pretraining=recipe.task == "pretrain")
    ids = embedded.kept_ids if embedded.target_ids is None else torch.cat([embedded.kept_ids, embedded.target_ids], 1)
    # With frame selection: the frames that the model worked on.
    worked_on = take_slots(clip[0], None if embedded.slots is None else embedded.slots[0], config)
    draw_kept_tokens(worked_on, ids[0], config, folder / "tokens.png")
