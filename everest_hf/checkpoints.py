"""Checkpoints of a run, each whole or absent: written under another name, then renamed."""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

from .video_processing_everest import EverestVideoProcessor


class Checkpoints:
    """Checkpoints of a run, each whole or absent: written under another name, then renamed."""

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator):
        self.folder, self.keep, self.accelerator = folder / "checkpoints", keep, accelerator

    def all(self) -> list[Path]:
        """Return the complete checkpoints, the oldest first."""
        return sorted(self.folder.glob("epoch-*"))

    def save(self, epoch: int, step: int, model, processor) -> None:
        """Save after `epoch` epochs what a resumed run and from_pretrained need; forget the oldest."""
        partial_folder = self.folder / f".partial-{epoch:05d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial_folder / "state"))
        save_model(self.accelerator, model, processor, partial_folder)
        if self.accelerator.is_main_process:
            (partial_folder / "progress.json").write_text(json.dumps({"epoch": epoch, "step": step}))
            final = self.folder / f"epoch-{epoch:05d}"
            shutil.rmtree(final, ignore_errors=True)
            partial_folder.rename(final)
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> tuple[int, int]:
        """Load the newest checkpoint, if any; return how many epochs and steps are done."""
        newest = next(reversed(self.all()), None)
        if newest is None:
            return 0, 0
        self.accelerator.load_state(str(newest / "state"))
        progress = json.loads((newest / "progress.json").read_text())
        return progress["epoch"], progress["step"]


def save_model(accelerator: Accelerator, model, processor: EverestVideoProcessor, folder: Path) -> None:
    """Save weights, configuration, code and processor as from_pretrained wants them. Every process calls it."""
    state_dict = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        folder, state_dict=state_dict, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    if accelerator.is_main_process:
        processor.save_pretrained(folder)


def save_final_model(accelerator: Accelerator, model, processor: EverestVideoProcessor, folder: Path) -> Path:
    """Save the run's result under folder/model, whole or not at all, and return that path."""
    partial_folder, final = folder / ".partial-model", folder / "model"
    save_model(accelerator, model, processor, partial_folder)
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial_folder.rename(final)
    accelerator.wait_for_everyone()
    return final
