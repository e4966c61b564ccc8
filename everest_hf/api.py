"""Training and evaluation from Python. The loop itself is the module train_accelerate, which comes with the package."""

from dataclasses import replace

from .data.workers import naming_lost_workers
from .training.recipe import Recipe


def train(recipe: Recipe) -> dict[str, float]:
    """Train by a recipe and return the figures on its validation videos at the end, by name; {} without such videos.

    This is what `train_accelerate.py` does. The run's folder is `recipe.output_dir`. Where that holds a run of the same
    recipe, it goes on from its last checkpoint. The next call in the same process is a run of its own.

    >>> train(Recipe(task="finetune", train="videos/train", val="videos/val"))  # doctest: +SKIP
    {'val_loss': 0.31, 'val_top1': 0.94, 'val_top5': 1.0, 'val_mean_class_accuracy': 0.94}

    Raises:
        ValueError, OSError: data, model or folder are not what the recipe needs, videos cannot be read, or a loss is
            not finite. Of several processes the main one raises it; the others exit.
        SystemExit: SIGTERM has stopped the run, which is saved.
    """
    import train_accelerate

    with naming_lost_workers():
        return train_accelerate.train(replace(recipe, eval_only=False, dry_run=False))


def evaluate(recipe: Recipe) -> dict[str, float]:
    """Evaluate a trained model on `recipe.val` as at the end of its training and return the figures by name.

    The model is `recipe.model`, or else the result of the finished run in `recipe.output_dir`; files with the figures
    and predictions go to its folder `evaluation`. `recipe.train` may be left out where `eval_only` is true.

    >>> evaluate(Recipe(task="finetune", eval_only=True, model="runs/everest", val="videos/val"))  # doctest: +SKIP
    {'val_loss': 0.31, 'val_top1': 0.94, 'val_top5': 1.0, 'val_mean_class_accuracy': 0.94}

    Raises:
        ValueError, OSError: there is no such model, or videos cannot be read. Of several processes the main one raises
            it; the others exit.
    """
    import train_accelerate

    with naming_lost_workers():
        return train_accelerate.evaluate(replace(recipe, eval_only=True, dry_run=False))
