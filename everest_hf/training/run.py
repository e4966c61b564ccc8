"""A run: what its recipe comes to, set up once and checked, before anything is trained or evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset

from ..configuration_everest import EverestConfig
from ..modeling_everest import EverestPreTrainedModel
from ..video_processing_everest import EverestVideoProcessor
from . import build, loaders
from .accelerator import hardware_of
from .folder import TRAIN_CLIPS, write_recipe
from .recipe import Recipe
from .train_clips import draw_train_clips


@dataclass(frozen=True)
class Run:
    """What training, evaluation and dry run work with; its processes all have the same.

    folder: where it writes. processor: samples and scales as evaluation does. train, val: the rows of the videos; an
    evaluation has no train unless it draws labels from it, and the rest is left at its defaults. hardware: in words.
    num_videos: for training, of a stream in an epoch. total_batch: clips of a step of the optimizer, over all
    processes. identities: what tells the videos of train and val from others.
    """

    recipe: Recipe
    folder: Path
    config: EverestConfig
    processor: EverestVideoProcessor
    train: Dataset | IterableDataset | None
    val: Dataset | None
    hardware: str = ""
    num_videos: int = 0
    total_batch: int = 0
    steps_per_epoch: int = 0
    identities: dict[str, dict[str, Any] | None] | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer over all epochs."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def setting(self) -> dict[str, Any]:
        """What must stay the same when the run goes on: a checkpoint counts steps of these."""
        return {
            "data": self.identities,
            "total_batch": self.total_batch,
            "steps_per_epoch": self.steps_per_epoch,
        }

    @property
    def checkpointing(self) -> dict[str, Any]:
        """How checkpoints are kept, as arguments of `Checkpoints`."""
        every = max(1, round(self.recipe.save_every * self.steps_per_epoch))
        return {"keep": self.recipe.keep_checkpoints, "every": every, "setting": self.setting}

    def is_evaluated_after(self, step: int) -> bool:
        """Say whether the model is evaluated after a step, beside the final evaluation of the run's result.

        After the last step only where the result is the best of all.
        """
        is_due = step % (self.recipe.eval_every * self.steps_per_epoch) == 0
        if step == self.total_steps:
            is_due = self.recipe.keep == "best"
        return self.val is not None and is_due

    def is_monitored_after(self, step: int) -> bool:
        """Say whether the monitor is due after a step: after some epochs, and the last step."""
        is_due = step % (self.recipe.monitor_every * self.steps_per_epoch) == 0 or step == self.total_steps
        return self.recipe.monitor != "none" and is_due

    def is_judged_after(self, step: int) -> bool:
        """Say whether the model is evaluated or monitored after a step."""
        return self.is_evaluated_after(step) or self.is_monitored_after(step)

    @property
    def num_val(self) -> int:
        """Held-out videos."""
        return 0 if self.val is None else len(self.val)


def set_up(recipe: Recipe, accelerator: Accelerator) -> tuple[Run, EverestPreTrainedModel]:
    """Return a run that is ready to train and its model, with weights drawn from the seed or those of a checkpoint.

    Only the main process writes the run's folder, opens videos and draws the first training clips.

    Raises:
        ValueError, OSError: folder, data, model or videos are not what the recipe needs.
    """
    if accelerator.is_main_process:
        write_recipe(recipe)
    run, model = plan(recipe, accelerator, opened=Path(recipe.output_dir) / loaders.OPENED)
    picture = run.folder / TRAIN_CLIPS
    if accelerator.is_main_process and not picture.exists():
        draw_train_clips(recipe, model, run.train, picture)
    return run, model


def plan(
    recipe: Recipe, accelerator: Accelerator, *, empty: bool = False, opened: Path | None = None
) -> tuple[Run, EverestPreTrainedModel]:
    """Do what `set_up` does, without touching the folder.

    empty: the model has no weights. opened: the file that remembers which videos have been opened.
    """
    train, val = loaders.load_rows(recipe)
    set_seed(recipe.seed)
    model = build.build_model(recipe, train, empty=empty)
    loaders.build_transform(recipe, model.config)  # an augmentation that is impossible is an error now
    loaders.check_videos(recipe, model.config, train, val, accelerator, opened)
    videos = loaders.videos_of_step(recipe, train, accelerator.num_processes)
    steps_per_epoch = recipe.steps_per_epoch if recipe.streaming else len(train) // videos
    run = Run(
        recipe,
        Path(recipe.output_dir),
        model.config,
        build.build_processor(recipe, model.config),
        train,
        val,
        hardware=hardware_of(accelerator),
        num_videos=steps_per_epoch * videos if recipe.streaming else len(train),
        total_batch=videos * recipe.num_sample,
        steps_per_epoch=steps_per_epoch,
        identities=loaders.identities_of(train, val),
    )
    return run, model


def set_up_evaluation(recipe: Recipe) -> tuple[Run, EverestPreTrainedModel]:
    """Return the evaluation of a trained model, as a run with a folder of its own, and that model.

    Raises:
        ValueError, OSError: there is no such model, or the videos are not of its classes.
    """
    if recipe.evaluation == "few_shot":
        model = build.load_features(recipe)
        train, val = loaders.load_rows(recipe)
    else:
        model = build.load_trained(recipe)
        train, val = None, loaders.load_held_out(recipe, model.config)
    folder = Path(recipe.output_dir) / "evaluation"
    return Run(recipe, folder, model.config, build.build_processor(recipe, model.config), train, val), model
