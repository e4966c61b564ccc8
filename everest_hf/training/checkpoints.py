"""Checkpoints of a run, each whole or absent: written under another name, then renamed."""

import json
import logging
import math
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GatheredParameters, broadcast_object_list
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm

from ..distributed import WRITE_ERRORS, all_write, end_together, first_line
from ..video_processing_everest import EverestVideoProcessor
from .optim import MovingAverage, averaged

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


class Checkpoints:
    """The checkpoints of a run: the newest few, and the one with the best validation figure.

    A checkpoint is a folder step-<steps done> with what from_pretrained needs, `state/` (model, optimizer, schedule,
    scaler, moving average, meter, random states of each process) and progress.json. The number of steps is also the
    position in the data, as long as total_batch and steps_per_epoch are the same: else the run does not go on.

    keep: how many of the newest stay. every: steps from one checkpoint to the next. average: saved and loaded too.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        keep: int,
        every: int,
        total_batch: int,
        steps_per_epoch: int,
        average: MovingAverage | None = None,
    ):
        self.folder, self.accelerator, self.keep, self.every = folder / "checkpoints", accelerator, keep, every
        self.setting = {"total_batch": total_batch, "steps_per_epoch": steps_per_epoch}
        self.average = average

    def all(self) -> list[Path]:
        """Return the complete checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*"))

    def best(self) -> Path | None:
        """Return the checkpoint with the best validation figure, the newest among equals, if there are figures."""
        scored = [(score(_progress(path)["figures"]), path) for path in self.all()]
        value, path = max(scored, default=(-math.inf, None))
        return path if value > -math.inf else None

    def are_due(self, step: int, figures: dict[str, float]) -> bool:
        """Say whether to save after this step: at every interval, and when validation figures are the best so far.

        Every process calls it, with the same figures.
        """
        return step % self.every == 0 or bool(figures and self._improved_by(figures))

    def _improved_by(self, figures: dict[str, float]) -> bool:
        best = self.best() if self.accelerator.is_main_process else None
        better = best is None or score(figures) > score(_progress(best)["figures"])
        return broadcast_object_list([better])[0]  # the main process decides: others may see the folder later

    def save(self, step: int, figures: dict[str, float], model, processor: EverestVideoProcessor) -> None:
        """Save after `step` steps; figures: of an evaluation at this step, or none. Forget the oldest but the best.

        Every process calls it. Where one of them cannot write, all end, and earlier checkpoints stay.

        Raises:
            OSError: a process could not write. ValueError: the weights are not finite. On the main process.
        """
        _check_weights(model, step)
        partial_folder = self.folder / f".partial-{step:08d}"
        try:
            all_write(f"checkpoint {partial_folder}", self._start, partial_folder)
            all_write(f"checkpoint {partial_folder}", self._write, partial_folder, step, figures, model, processor)
        except OSError:
            shutil.rmtree(partial_folder, ignore_errors=True)
            raise
        if self.accelerator.is_main_process:
            partial_folder.rename(self.folder / f"step-{step:08d}")
            for old in set(self.all()[: -self.keep]) - {self.best()}:
                _remove(old)
        self.accelerator.wait_for_everyone()

    def _start(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def _write(self, folder: Path, step: int, figures: dict[str, float], model, processor) -> None:
        self._write_state(folder / "state")
        save_model(self.accelerator, model, processor, folder, self.average)
        if self.accelerator.is_main_process:
            progress = {"step": step, **self.setting, "processes": self.accelerator.num_processes, "figures": figures}
            (folder / PROGRESS).write_text(json.dumps(progress))

    def _write_state(self, folder: Path) -> None:
        try:
            self.accelerator.save_state(str(folder))
        except WRITE_ERRORS as error:
            if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
                raise
            # The others wait for this process within DeepSpeed, where nothing can reach them but its end.
            sys.exit(f"error: cannot write checkpoint {folder.parent}: {first_line(error)}")

    def resume(self) -> int:
        """Load the newest checkpoint, if any; return how many steps are done.

        Raises:
            ValueError: the checkpoint counts steps of another total batch or another number of videos.
        """
        if self.accelerator.is_main_process:
            for unfinished in self.folder.glob(".*"):
                shutil.rmtree(unfinished)
        (newest,) = broadcast_object_list([next(reversed(self.all()), None)])
        if newest is None:
            return 0
        progress = _progress(newest)
        for name, value in self.setting.items():
            if progress[name] != value:
                end_together(ValueError(f"{newest} was trained with {name}={progress[name]}, which is now {value}"))
        if progress["processes"] != self.accelerator.num_processes:
            logger.warning("%s is of %d processes: dropout goes on otherwise", newest, progress["processes"])
        self.accelerator.load_state(str(newest / "state"))
        return progress["step"]


def score(figures: dict[str, float]) -> float:
    """Return how good validation figures are, higher is better: the accuracy, or else the loss, negative."""
    value = figures.get("val_top1", -figures.get("val_loss", math.inf))
    return value if math.isfinite(value) else -math.inf


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is never seen half removed."""
    aside = checkpoint.with_name(f".{checkpoint.name}")
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def _progress(checkpoint: Path) -> dict:
    return json.loads((checkpoint / PROGRESS).read_text())


def _check_weights(model, step: int) -> None:
    """End the run, on all processes, if the weights are not finite: they belong in no checkpoint."""
    with GatheredParameters(list(model.parameters())):  # of ZeRO 3, which leaves each process a share
        norm = get_total_norm(model.parameters())
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if not norm.isfinite():
        end_together(ValueError(f"step {step}: the weights are not finite; the last checkpoint is sound"))


def save_model(
    accelerator: Accelerator,
    model,
    processor: EverestVideoProcessor,
    folder: Path,
    average: MovingAverage | None = None,
) -> None:
    """Save weights, configuration, code and processor as from_pretrained wants them. Every process calls it.

    average: its weights are saved in place of the model's.
    """
    with averaged(average):
        state_dict = accelerator.get_state_dict(model)  # of a sharded model, whole on the main process
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(model)
            # Saving copies the file that the class is from; for the class of a sharded model that would be torch's.
            with torch.device("meta"):
                shell = _own_class(model)(model.config)
            shell.save_pretrained(folder, state_dict=state_dict)
            processor.save_pretrained(folder)


def _own_class(model: torch.nn.Module) -> type:
    """Return the class of a model without the one that fully_shard puts before it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def save_final_model(accelerator, model, processor, folder: Path, average: MovingAverage | None = None) -> Path:
    """Save the run's result under folder/model, whole or not at all, and return that path.

    Raises:
        OSError: it cannot be written.
    """
    partial_folder, final = folder / ".partial-model", folder / "model"
    all_write(f"the model in {folder}", save_model, accelerator, model, processor, partial_folder, average)
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial_folder.rename(final)
    accelerator.wait_for_everyone()
    return final
