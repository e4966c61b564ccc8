"""What a run says at its start and at its end, and its pictures."""

from datetime import timedelta
from pathlib import Path

import torch

from ..data import BadVideos, VideoViews, head_of, transforms
from ..evaluation.report import with_spread
from ..visualize import draw_curves, draw_kept_tokens, take_slots
from .build import MODEL_CLASSES
from .loaders import HEAD, sampling_of
from .run import Run


def describe(run: Run) -> str:
    """Say in two lines what is about to run."""
    recipe, config = run.recipe, run.config
    videos = f"{run.num_videos} training videos{' an epoch' if recipe.streaming else ''}"
    if recipe.has_labels and recipe.problem_type != "regression":
        videos = f"{config.num_labels} classes, {videos}"
    if recipe.task == "pretrain":
        tokens = f"{config.num_visible_tokens} seen and {config.num_target_tokens} predicted"
    else:
        tokens = f"{config.num_kept_tokens()} kept"
    if config.token_budget == "batch":
        tokens += " of a clip on the average,"
    return (
        f"{recipe.task}: {videos}, {run.num_val} held out, "
        f"{recipe.epochs} epochs = {run.total_steps} steps of {run.total_batch} clips, to {recipe.output_dir}\n"
        f"tokens: {tokens} of {config.num_tokens} ({config.token_selection})"
    )


def summarise(
    run: Run, step: int, figures: dict[str, float], log: list[dict], model: Path, best: Path | None, bad: BadVideos
) -> str:
    """Say how a run ended, after `step` steps, and where its results are: a line, then a table."""
    shown = ", ".join(f"{name} {value}" for name, value in with_spread(figures, 5).items()) or "no validation set"
    lines = [line for line in log if "loss" in line]
    seconds = sum(line["seconds"] for line in lines)
    rows = {
        "steps": f"{lines[-1]['step']} in {timedelta(seconds=round(seconds))}" if lines else None,
        "training loss": f"{lines[0]['loss']:.4f} -> {lines[-1]['loss']:.4f}" if lines else None,
        "stopped early": _early_stop(run, step) if step < run.total_steps else None,
        "model": model,
        "taken from": f"{best.name}, the best on val" if best and run.recipe.keep == "best" else None,
        "best checkpoint": best,
        "log and pictures": run.recipe.output_dir,
    }
    table = [f"  {name:<18}{value}" for name, value in rows.items() if value is not None]
    if bad.reasons:
        table.append(f"{len(bad.reasons)} unreadable training videos, {bad.count} times replaced")
    return "\n".join([f"{run.recipe.task} finished: {shown}", *table])


def _early_stop(run: Run, step: int) -> str:
    count = run.recipe.patience
    return f"after step {step} of {run.total_steps}: {count} evaluation{'s' * (count > 1)} without a better figure"


@torch.no_grad()
def draw_pictures(run: Run, saved: Path, log: list[dict]) -> None:
    """Draw the run's curves, and the tokens that the saved model keeps of the first video that can be read."""
    task = run.recipe.task
    draw_curves({task: log}, run.folder / "curves.png")
    model = MODEL_CLASSES[task].from_pretrained(saved)
    config = model.config
    rows = head_of(run.val or run.train, HEAD)
    views = VideoViews(rows, config.frame_size, count_unreadable=True, **sampling_of(run.recipe, config))
    items = (views[i] for i in range(len(views)))
    clip = next((item["pixel_values"] for item in items if not item["unreadable"]), None)  # (1, T, C, h, w)
    if clip is None:
        return
    pixel_values = transforms.normalize(clip, config.image_mean, config.image_std)
    embedded = model.everest.embeddings(pixel_values, pretraining=task == "pretrain")
    ids = embedded.kept_ids if embedded.target_ids is None else torch.cat([embedded.kept_ids, embedded.target_ids], 1)
    # With frame selection: the frames that the model worked on.
    worked_on = take_slots(clip[0], None if embedded.slots is None else embedded.slots[0], config)
    draw_kept_tokens(worked_on, ids[0], config, run.folder / "tokens.png")
