"""What a run would be, checked before it starts: `--dry_run`."""

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from ..configuration_everest import EverestConfig
from ..cost import clip_cost, count_parameters
from ..distributed import main_first
from ..files import LOCK, held
from . import build
from .accelerator import build_accelerator
from .batch_size import memory_of, with_batch_size
from .checkpoints import refuse_other_setting
from .folder import refuse_other_run
from .integrity import Found, find_checkpoint
from .recipe import Recipe
from .run import Run, plan
from .summary import describe as describe_run
from .waiting import reading_of, seconds_of_clip

logger = logging.getLogger(__name__)

_GIB = 2**30


def dry_run(recipe: Recipe) -> None:
    """Print what a run would do, having checked data, model and output folder as it would; train and write nothing.

    Raises:
        ValueError, OSError: what would stop the run before its first step.
    """
    accelerator = build_accelerator(recipe)
    recipe = with_batch_size(recipe, accelerator, try_steps=False)
    accelerator.print(main_first(accelerator, describe, recipe, accelerator))


def describe(recipe: Recipe, accelerator: Accelerator) -> str:
    """Check a run and return what it would do, in lines. Only the main process opens videos.

    Raises:
        ValueError, OSError: as `dry_run`.
    """
    found = _check_output(recipe)
    run, _ = plan(recipe, accelerator, empty=True)
    config = run.config
    if found.newest is not None:
        refuse_other_setting(found.newest, found.progress, run.setting)
    rows = {
        "model": _model(config, recipe),
        "a clip": _clip(config, recipe),
        "total batch": _batch(run, accelerator),
        "learning rate": _learning_rate(run),
        "memory": _memory(config, recipe, accelerator),
        "reading": _reading(run, accelerator),
        "output": _output(recipe, found.newest),
        "checkpoints": _checkpoints(config, recipe),
    }
    return "\n".join(
        [
            describe_run(run),
            *_table(rows),
            f"the recipe, where it differs from the defaults of {recipe.task}:",
            *_table(replace(recipe, dry_run=False).settings()),
            "dry run: all is well; nothing was trained or written",
        ]
    )


def _table(rows: dict) -> list[str]:
    width = max(map(len, rows)) + 2
    return [f"  {name:<{width}}{value}" for name, value in rows.items()]


def _check_output(recipe: Recipe) -> Found:
    """Return the checkpoint that the run would go on from, having seen that its folder can be written and is its own."""
    folder = Path(recipe.output_dir)
    try:
        refuse_other_run(recipe)
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
        if (folder / LOCK).exists():
            with held(folder):
                pass
    except BlockingIOError:
        raise
    except OSError as error:
        raise ValueError(f"output_dir {folder}: {error.strerror or error}") from error
    found = Found(None, {}, []) if recipe.overwrite else find_checkpoint(folder / "checkpoints")
    for path, reason in found.damaged:
        logger.warning("checkpoint %s is damaged (%s)", path, reason)
    return found


def _output(recipe: Recipe, newest: Path | None) -> str:
    folder = Path(recipe.output_dir)
    if recipe.overwrite and (folder / "recipe.yaml").exists():
        return f"{folder}, whose run is removed first"
    return f"{folder}, whose run goes on from {newest.name}" if newest else f"{folder}, new"


def _existing(folder: Path) -> Path:
    """Return a folder, or the one in which it would be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _model(config: EverestConfig, recipe: Recipe) -> str:
    count = count_parameters(config, recipe.task)
    trained = "all" if count.trained == count.total else f"{count.trained / 1e6:.4g} M"
    source = f"from {recipe.model}" if recipe.model else "new"
    return f"{count.total / 1e6:.4g} M parameters, {trained} of them trained, {source}"


def _clip(config: EverestConfig, recipe: Recipe) -> str:
    cost = clip_cost(config, recipe.task, gradient_checkpointing=recipe.gradient_checkpointing)
    height, width = config.frame_size
    return (
        f"{config.num_input_frames} frames of {height} x {width}, {cost.forward / 1e9:.4g} GFLOPs forward, "
        f"{cost.total / 1e9:.4g} in a training step"
    )


def _batch(run: Run, accelerator: Accelerator) -> str:
    recipe = run.recipe
    sampled = f" x {recipe.num_sample} clips of each" if recipe.num_sample > 1 else ""
    return (
        f"{run.total_batch} clips = {accelerator.num_processes} processes x {recipe.gradient_accumulation_steps} batches x "
        f"{recipe.batch_size} videos{sampled}"
    )


def _learning_rate(run: Run) -> str:
    peak, final = build.learning_rates(run.recipe, run.total_batch)
    warmup = build.warmup_steps(run.recipe, run.steps_per_epoch)
    return f"0 to {peak:.4g} in {warmup} steps, then a cosine to {final:.4g}"


def _memory(config: EverestConfig, recipe: Recipe, accelerator: Accelerator) -> str:
    memory = memory_of(recipe, config, accelerator, recipe.batch_size)
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "AdamW": memory.moments,
        "activations": memory.activations,
    }
    shown = ", ".join(f"{name} {size / _GIB:.3g}" for name, size in parts.items())
    there = ""
    if accelerator.device.type == "cuda":
        there = f" of {torch.cuda.get_device_properties(accelerator.device).total_memory / _GIB:.3g}"
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"about {memory.total / _GIB:.3g} GiB{there} a process in {precision}: {shown}"


def _reading(run: Run, accelerator: Accelerator) -> str:
    seconds = seconds_of_clip(run.recipe, run.config, run.train)
    if seconds is None:
        return "of the first videos none can be read"
    return reading_of(run.recipe, run.train, accelerator).forecast(seconds)


def _checkpoints(config: EverestConfig, recipe: Recipe) -> str:
    """Say how much room checkpoints take: weights twice, once as from_pretrained wants them, and what AdamW keeps."""
    count = count_parameters(config, recipe.task)
    size = 4 * (2 * count.total + (3 if recipe.ema else 2) * count.trained)
    # Those that are kept, the best, and one that is being written.
    most = recipe.keep_checkpoints + 2
    free = shutil.disk_usage(_existing(Path(recipe.output_dir))).free
    return f"up to {most} of {size / _GIB:.3g} GiB; {free / _GIB:.4g} GiB are free"
