"""Checkpoints of a run, each whole or absent: written under another name, then renamed."""

import logging
import math
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GatheredParameters, broadcast_object_list, gather_object
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm

from ..data import differences
from ..distributed import WRITE_ERRORS, all_write, end_together, first_line
from ..files import put_in_place
from ..video_processing_everest import EverestVideoProcessor
from .integrity import checkpoints_in, files_in, find_checkpoint, read_progress, step_of, write_progress
from .optim import MovingAverage, averaged
from .state import load_state, save_state

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run: the newest few, and the one with the best validation figure.

    A checkpoint is a folder step-<steps done> with what from_pretrained needs, `state/` (model, optimizer, schedule,
    scaler, moving average, meter, random states of each process) and progress.json. The number of steps is also the
    position in the data as long as `setting` is the same; otherwise the run does not go on.

    keep: how many of the newest stay. every: steps from one checkpoint to the next. setting: total_batch,
    steps_per_epoch, and data, which tells the videos of train and val from others. parts: by name, what has a
    `state_dict` that Accelerate does not know of. average: another such part, whose weights from_pretrained then finds.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        keep: int,
        every: int,
        setting: dict[str, Any],
        parts: dict[str, Any],
        average: MovingAverage | None = None,
    ):
        self.folder, self.accelerator, self.keep, self.every = folder / "checkpoints", accelerator, keep, every
        self.setting, self.average = setting, average
        self.saved = False  # in this process
        self.resumed_from: Path | None = None
        self.parts = {**parts, **({"average": average} if average else {})}

    def all(self) -> list[Path]:
        """Return the complete checkpoints, the oldest first."""
        return checkpoints_in(self.folder)

    def best(self) -> Path | None:
        """Return the checkpoint with the best validation figure, the newest among equals, if there are figures."""
        scored = [(score(read_progress(path)["figures"]), path) for path in self.all()]
        value, path = max(scored, default=(-math.inf, None))
        return path if value > -math.inf else None

    def are_due(self, step: int, figures: dict[str, float]) -> bool:
        """Say whether to save after this step: at every interval, and when validation figures are the best so far.

        Every process calls it, with the same figures.
        """
        return step % self.every == 0 or bool(figures and self._improved_by(figures))

    def _improved_by(self, figures: dict[str, float]) -> bool:
        best = self.best() if self.accelerator.is_main_process else None
        better = best is None or score(figures) > score(read_progress(best)["figures"])
        return broadcast_object_list([better])[0]  # the main process decides: others may see the folder later

    def save(self, step: int, figures: dict[str, float], model, processor: EverestVideoProcessor) -> None:
        """Save after `step` steps; figures: of an evaluation at this step, or none. Forget the oldest but the best.

        Every process calls it. Where one of them cannot write, all end, and earlier checkpoints stay.

        Raises:
            OSError: a process could not write. ValueError: the weights are not finite. On the main process.
        """
        _check_weights(model, step, self.standing())
        partial_folder = self.folder / f".partial-{step:08d}"
        try:
            all_write(f"checkpoint {partial_folder}", self._start, partial_folder)
            all_write(f"checkpoint {partial_folder}", self._write, partial_folder, step, figures, model, processor)
            files = gather_object(files_in(partial_folder))
            all_write(f"checkpoint {partial_folder}", self._seal, partial_folder, step, figures, files)
        except OSError:
            shutil.rmtree(partial_folder, ignore_errors=True)
            raise
        if self.accelerator.is_main_process:
            put_in_place(partial_folder, self.folder / f"step-{step:08d}")
            for old in set(self.all()[: -self.keep]) - {self.best()}:
                _remove(old)
        self.saved = True
        self.accelerator.wait_for_everyone()

    def standing(self) -> str:
        """Say in a sentence what a failure leaves of the checkpoints."""
        if self.saved:
            return "The last checkpoint is sound"
        if self.resumed_from is None:
            return "There is no checkpoint yet"
        return f"Nothing was saved since the run went on from {self.resumed_from}, which may be at fault"

    def _start(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def _write(self, folder: Path, step: int, figures: dict[str, float], model, processor) -> None:
        self._write_state(folder / "state")
        save_model(self.accelerator, model, processor, folder, self.average)

    def _seal(self, folder: Path, step: int, figures: dict[str, float], files: list[str]) -> None:
        if self.accelerator.is_main_process:
            progress = {"step": step, **self.setting, "processes": self.accelerator.num_processes, "figures": figures}
            write_progress(folder, progress, files)

    def _write_state(self, folder: Path) -> None:
        try:
            save_state(self.accelerator, folder, self.parts)
        except WRITE_ERRORS as error:
            if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
                raise
            # The others wait for this process within DeepSpeed, where nothing can reach them but its end.
            sys.exit(f"error: cannot write checkpoint {folder.parent}: {first_line(error)}")

    def resume(self) -> int:
        """Load the newest checkpoint that is whole, if there are any; return how many steps are done.

        Damaged ones are named in warnings and get another name.

        Raises:
            ValueError: no checkpoint is whole; or it is of other videos or another total batch; or it does not load.
        """
        newest: Path | None = None
        progress: dict[str, Any] = {}
        failure = None
        if self.accelerator.is_main_process:
            try:
                newest, progress = self._choose()
            except (ValueError, OSError) as error:
                failure = error
        has_failed, newest, progress = broadcast_object_list([failure is not None, newest, progress])
        if has_failed:
            end_together(failure)
        if newest is None:
            return 0
        is_restored = self._load(newest)
        if not (is_restored and progress["processes"] == self.accelerator.num_processes):
            what = "%s was saved by %d processes, or on other devices: from here on, dropout draws other numbers"
            if self.accelerator.is_main_process:
                logger.warning(what, newest, progress["processes"])
        self.resumed_from = newest
        return progress["step"]

    def restore_best(self, step: int) -> int:
        """Give the model the weights of the best checkpoint; return its number of steps. Every process calls it.

        step: the steps that are done, whose weights the model has.

        Raises:
            ValueError: no evaluation gave a finite figure, or the checkpoint does not load. On the main process.
        """
        (best,) = broadcast_object_list([self.best() if self.accelerator.is_main_process else None])
        if best is None:
            end_together(ValueError(f"keep is 'best', and no checkpoint in {self.folder} has a finite figure on val"))
        best_step = step_of(best)
        if best_step != step:
            self._load(best)
        return best_step

    def _choose(self) -> tuple[Path | None, dict[str, Any]]:
        """Return the checkpoint to go on from and its progress; tidy up what killed runs and bad disks have left."""
        for unfinished in (*self.folder.glob(".partial-*"), *self.folder.glob(".step-*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        found = find_checkpoint(self.folder)
        if found.newest is not None:
            refuse_other_setting(found.newest, found.progress, self.setting)
        for path, reason in found.damaged:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            what = f"checkpoint {path} is damaged ({reason}); it is {aside.name} now"
            logger.warning("%s, and the run goes on from %s", what, found.newest)
        return found.newest, found.progress

    def _load(self, checkpoint: Path) -> bool:
        """Load a checkpoint; return whether the random states of all processes are as they were.

        Where it fails on one of the processes, all end.
        """
        failure, is_restored = None, True
        try:
            is_restored = load_state(self.accelerator, checkpoint / "state", self.parts)
        except pickle.UnpicklingError as error:
            logger.debug("%s", checkpoint, exc_info=True)
            failure = f"it holds more than tensors and numbers ({_forbidden_name(error)})"
        except (Exception, CheckpointException) as error:  # whatever the libraries raise where a state does not fit
            logger.debug("%s", checkpoint, exc_info=True)
            failure = first_line(error) or type(error).__name__
        outcomes = gather_object([(failure, is_restored)])
        if failures := [text for text, _ in outcomes if text is not None]:
            end_together(ValueError(f"checkpoint {checkpoint} is not loaded: {failures[0]}"))
        return all(restored for _, restored in outcomes)


def refuse_other_setting(checkpoint: Path, progress: dict[str, Any], setting: dict[str, Any]) -> None:
    """Raise a ValueError if a checkpoint counts the steps of other videos, or other steps."""
    for which, now in setting["data"].items():
        if changes := differences(progress["data"][which], now):
            raise ValueError(
                f"{which} is not what {checkpoint} was trained with: {changes}; bring it back, or choose another "
                "output_dir, or --overwrite to start again"
            )
    for name in ("total_batch", "steps_per_epoch"):
        if progress[name] != setting[name]:
            raise ValueError(f"{checkpoint} was trained with {name}={progress[name]}, which is now {setting[name]}")


def score(figures: dict[str, float]) -> float:
    """Return how good validation figures are, higher is better: the accuracy, or else the loss, negative."""
    value = figures.get("val_top1", -figures.get("val_loss", math.inf))
    return value if math.isfinite(value) else -math.inf


def _forbidden_name(error: pickle.UnpicklingError) -> str:
    """Return the name that a file must not hold, out of an error of torch.load or of our own."""
    found = re.search(r"(?:GLOBAL |class )?(\S+) (?:was not an allowed|does not belong)", str(error))
    return found[1] if found else first_line(error)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is never seen half removed."""
    aside = checkpoint.with_name(f".{checkpoint.name}")
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # what a network disk still holds goes when the run next goes on


def _check_weights(model, step: int, standing: str) -> None:
    """End the run, on all processes, if the weights are not finite: they belong in no checkpoint."""
    with GatheredParameters(list(model.parameters())):  # of ZeRO 3, which leaves each process a share
        norm = get_total_norm(model.parameters())
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if not norm.isfinite():
        end_together(ValueError(f"step {step}: the weights are not finite. {standing}"))


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
        put_in_place(partial_folder, final)
    accelerator.wait_for_everyone()
    return final
