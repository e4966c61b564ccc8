"""What the loop in train_accelerate.py is made of: data, model, optimizer, log, checkpoints."""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from . import transforms
from .configuration_everest import EverestConfig
from .data import (
    BadVideos,
    EpochSampler,
    VideoClips,
    VideoViews,
    check_readable,
    class_names_of,
    collate,
    load_videos,
)
from .modeling_everest import EverestForPreTraining, EverestForVideoClassification, EverestPreTrainedModel
from .optim import cosine_schedule, parameter_groups
from .recipe import Recipe, load_recipe
from .video_processing_everest import EverestVideoProcessor
from .visualize import draw_curves, draw_kept_tokens, take_slots

logger = logging.getLogger(__name__)

MODEL_CLASSES = {"pretrain": EverestForPreTraining, "finetune": EverestForVideoClassification}
LOG = "log.jsonl"
# The learning rate of a recipe is that of this total batch (method: linear scaling).
REFERENCE_BATCH = 256


# --------------------------------------------------------------------------------------------------- all processes


def main_first(state: Accelerator | PartialState, function: Callable, *arguments):
    """Call a function on the main process, then on the others, and return what it returns.

    What the main process finds wrong (ValueError, OSError) is said by it alone, and all processes end.
    """
    failure = result = None
    if state.is_main_process:
        try:
            result = function(*arguments)
        except (ValueError, OSError) as error:
            failure = error
    (failed,) = broadcast_object_list([failure is not None])
    if failure is not None:
        raise failure
    if failed:
        sys.exit(1)
    return result if state.is_main_process else function(*arguments)


# ---------------------------------------------------------------------------------------------------------- data


def load_rows(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """Return the rows of training and validation; what is wrong with paths and labels is an error.

    Raises:
        FileNotFoundError, ValueError: as `everest_hf.data.load_videos`.
    """
    labelled = recipe.task == "finetune"
    train = load_videos(recipe.train, data_root=recipe.data_root, labels_required=labelled)
    if recipe.val is None:
        return train, None
    names = class_names_of(train)
    bound = None if names or not labelled else max(train["label"]) + 1
    val = load_videos(
        recipe.val, data_root=recipe.data_root, labels_required=labelled, class_names=names, num_labels=bound
    )
    return train, val


def check_videos(
    recipe: Recipe, config: EverestConfig, train: Dataset, val: Dataset | None, accelerator: Accelerator
) -> None:
    """Open the videos (of a large set, a sample) before anything is trained, and warn of those that are too short.

    Only the main process does.

    Raises:
        ValueError: more training videos than max_bad_fraction, or any of validation, cannot be read.
    """
    if not accelerator.is_main_process:
        return
    needed = frames_needed(config, frame_step=recipe.frame_step, frame_sampling=recipe.frame_sampling)
    for rows, source, share in ((train, recipe.train, recipe.max_bad_fraction), (val, recipe.val, 0.0)):
        errors = check_readable(rows, frames_needed=needed) if rows is not None else []
        if len(errors) > share * len(rows or ()):
            raise ValueError(f"{source}: {len(errors)} unreadable videos, the first is {errors[0]}")
        for error in errors:
            logger.warning("unreadable: %s", error)


def frames_needed(config: EverestConfig, *, frame_step: int, frame_sampling: str) -> int:
    """Return how many frames a video must have so that a clip repeats none at its end."""
    if frame_sampling == "segment":
        return config.num_input_frames
    candidates = config.num_input_frames
    return (candidates - 1) * config.num_frames * frame_step // candidates + 1


def sampling_of(recipe: Recipe, config: EverestConfig) -> dict:
    """Return how clips are sampled, as arguments of `VideoClips` and `VideoViews`."""
    return {
        "num_frames": config.num_frames,
        "num_input_frames": config.num_input_frames,
        "frame_step": recipe.frame_step,
        "frame_sampling": recipe.frame_sampling,
    }


def build_loaders(recipe: Recipe, config: EverestConfig, train: Dataset, val: Dataset | None):
    """Return the training loader and a function of (segments, crops) that makes a validation loader."""
    sampling = sampling_of(recipe, config)
    workers = {
        "num_workers": recipe.num_workers,
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available(),
        # Of their own: a loader draws when its workers start, and a resumed run starts them anew. From the default
        # generator, that would shift what the model draws.
        "generator": torch.Generator(),
    }
    clips = VideoClips(train, build_transform(recipe, config), seed=recipe.seed, **sampling)
    train_loader = DataLoader(
        clips,
        batch_size=recipe.batch_size,
        sampler=EpochSampler(clips),
        persistent_workers=recipe.num_workers > 0,
        # A short last batch would weigh its clips more; a set smaller than one batch has nothing else.
        drop_last=len(clips) >= recipe.batch_size,
        **workers,
    )

    def val_loader(num_segments: int, num_crops: int) -> DataLoader:
        views = VideoViews(val, config.frame_size, num_segments=num_segments, num_crops=num_crops, **sampling)
        batch_size = max(1, recipe.batch_size // (num_segments * num_crops))
        return DataLoader(views, batch_size=batch_size, **workers)

    return train_loader, val_loader


def build_transform(recipe: Recipe, config: EverestConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the augmentation of a clip: uint8 (T, C, H, W) to uint8 (T, C, h, w)."""
    if recipe.task == "pretrain":
        return transforms.pretraining_transform(config.frame_size, scales=tuple(recipe.crop_scale))
    return transforms.finetuning_transform(
        config.frame_size,
        scale=tuple(recipe.crop_scale),
        ratio=tuple(recipe.crop_ratio),
        flip=0.5 if recipe.flip else 0.0,
        rand_augment=recipe.rand_augment,
        fill=tuple(config.image_mean),
        augmentation=recipe.augmentation,
    )


def model_inputs(batch: dict, recipe: Recipe, config: EverestConfig) -> dict:
    """Turn a uint8 batch on the device into what the model takes: normalised, erased, mixed."""
    pixel_values = transforms.normalize(batch["pixel_values"], config.image_mean, config.image_std)
    if recipe.erasing:
        pixel_values = transforms.random_erasing(pixel_values, recipe.erasing)
    if recipe.task == "pretrain":
        return {"pixel_values": pixel_values}
    labels = batch["labels"]
    if recipe.label_smoothing or recipe.mixup or recipe.cutmix:
        one_hot = torch.nn.functional.one_hot(labels, config.num_labels).float()
        labels = torch.lerp(one_hot, torch.full_like(one_hot, 1 / config.num_labels), recipe.label_smoothing)
        pixel_values, labels = transforms.mix(pixel_values, labels, mixup=recipe.mixup, cutmix=recipe.cutmix)
    return {"pixel_values": pixel_values, "labels": labels}


# ---------------------------------------------------------------------------------------------------------- model


def build_model(recipe: Recipe, train: Dataset) -> EverestPreTrainedModel:
    """Return the model of a recipe: from its checkpoint, or new.

    Raises:
        ValueError: the checkpoint cannot be loaded, or the configuration is impossible.
    """
    cls, values = MODEL_CLASSES[recipe.task], dict(recipe.config)
    if recipe.task == "finetune":
        names = class_names_of(train) or [str(i) for i in range(max(train["label"]) + 1)]
        values |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        values.setdefault("problem_type", "single_label_classification")
    if recipe.model is None:
        return cls(EverestConfig(**values))
    try:
        return cls.from_pretrained(recipe.model, ignore_mismatched_sizes=True, **values)
    except OSError as error:
        raise ValueError(f"model {recipe.model}: {str(error).splitlines()[0]}") from error


def build_processor(recipe: Recipe, config: EverestConfig) -> EverestVideoProcessor:
    """Return the processor that samples and scales as the run's evaluation does."""
    return EverestVideoProcessor.from_config(
        config, frame_step=recipe.frame_step, frame_sampling=recipe.frame_sampling
    )


def build_optimizer(recipe: Recipe, model: EverestPreTrainedModel, total_batch: int, steps_per_epoch: int):
    """Return AdamW with its parameter groups, and the schedule that is stepped once a step of the optimizer."""
    peak, final = (lr * total_batch / REFERENCE_BATCH for lr in (recipe.base_lr, recipe.min_lr))
    groups = parameter_groups(
        model,
        lr=peak,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        num_layers=model.config.num_hidden_layers,
    )
    optimizer = torch.optim.AdamW(groups, betas=tuple(recipe.betas))
    factor = partial(
        cosine_schedule,
        total_steps=recipe.epochs * steps_per_epoch,
        warmup_steps=round(recipe.warmup_epochs * steps_per_epoch),
        final_factor=final / peak,
    )
    return optimizer, LambdaLR(optimizer, factor)


# ------------------------------------------------------------------------------------------------- log and output


def read_log(path: Path) -> list[dict]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class RunLog:
    """The run's log: JSON lines in a file, written by the main process as they come."""

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator

    def write(self, **values) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def read(self) -> list[dict]:
        return read_log(self.path) if self.path.exists() else []

    def cut_after(self, step: int, *, finished: bool = False) -> None:
        """Forget what a killed run logged after the checkpoint that the run goes on from.

        finished: the steps are all done; the final evaluation is forgotten too, as it is made again.
        """
        if self.accelerator.is_main_process:
            kept = [line for line in self.read() if line["step"] <= step]
            if finished:
                kept = [line for line in kept if line["step"] < step or "loss" in line]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))


class Meter:
    """Mean loss and clips a second since the last reading. Adds up on the device, so that no step waits for it."""

    def __init__(self):
        self._start()

    def _start(self) -> None:
        self.loss, self.batches, self.clips, self.since = 0.0, 0, 0, time.perf_counter()

    def add(self, loss: torch.Tensor, clips: int) -> None:
        self.loss = self.loss + loss.detach()
        self.batches += 1
        self.clips += clips

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        loss = accelerator.reduce(self.loss / self.batches, reduction="mean").item()
        rate = self.clips * accelerator.num_processes / (time.perf_counter() - self.since)
        self._start()
        return {"loss": loss, "clips_per_second": rate}


def prepare_output(recipe: Recipe, accelerator: Accelerator) -> Path:
    """Return the run's folder, with its recipe in it.

    Raises:
        ValueError: the folder holds a run of another recipe, or cannot be written.
    """
    folder, path = Path(recipe.output_dir), Path(recipe.output_dir) / "recipe.yaml"
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if recipe.overwrite:
                _remove_run(folder)
            if path.exists() and (folder / LOG).exists():  # without a log, nothing has been trained
                _refuse_other_run(recipe, path)
            recipe.save(path)
        except OSError as error:
            raise ValueError(f"output_dir {folder}: {error.strerror or error}") from error
    return folder


def _remove_run(folder: Path) -> None:
    for name in ("checkpoints", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("recipe.yaml", LOG):
        (folder / name).unlink(missing_ok=True)


def _refuse_other_run(recipe: Recipe, path: Path) -> None:
    differences = load_recipe(path).differences(recipe)
    if differences:
        raise ValueError(
            f"output_dir {path.parent} holds a run of another recipe (different: {', '.join(differences)}); "
            "choose another output_dir, or --overwrite to start again"
        )


# ------------------------------------------------------------------------------------------------------ bad videos


def watched(loader: DataLoader, bad: BadVideos, recipe: Recipe, num_videos: int) -> Iterator[dict]:
    """Yield the batches of a training loader and stop the run when too many of its videos cannot be read."""
    for batch in loader:
        if bad.take(batch) and len(bad.reasons) > recipe.max_bad_fraction * num_videos:
            path, reason = next(iter(bad.reasons.items()))
            raise ValueError(
                f"{len(bad.reasons)} of {num_videos} training videos are unreadable, more than "
                f"max_bad_fraction={recipe.max_bad_fraction}; the first is {path}: {reason}"
            )
        yield batch


# ------------------------------------------------------------------------------------------------- what people see


def use_all_cores(accelerator: Accelerator) -> None:
    """Give the processes of a CPU run all cores; `accelerate launch` leaves each one thread unless told otherwise."""
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        # Not every system tells which cores a process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes))


def describe(
    recipe: Recipe, config: EverestConfig, train: Dataset, val: Dataset | None, total_batch: int, total_steps: int
) -> str:
    """Say in two lines what is about to run."""
    if recipe.task == "pretrain":
        tokens = f"{config.num_visible_tokens} seen and {config.num_target_tokens} predicted"
    else:
        tokens = f"{config.num_kept_tokens()} kept"
    return (
        f"{recipe.task}: {len(train)} training videos, {len(val) if val is not None else 0} held out, "
        f"{recipe.epochs} epochs = {total_steps} steps of {total_batch} clips, to {recipe.output_dir}\n"
        f"tokens: {tokens} of {config.num_tokens} ({config.token_selection})"
    )


def summarise(recipe: Recipe, figures: dict[str, float], model: Path, bad: BadVideos) -> str:
    """Say in a line or two how a run ended and where its results are."""
    shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items()) or "no validation set"
    lines = [f"{recipe.task} finished: {shown}", f"model in {model}, log and pictures in {recipe.output_dir}"]
    if bad.reasons:
        lines.append(f"{len(bad.reasons)} unreadable training videos, {bad.count} times replaced")
    return "\n".join(lines)


@torch.no_grad()
def draw_pictures(recipe: Recipe, model: EverestPreTrainedModel, rows: Dataset, log: list[dict], folder: Path) -> None:
    """Draw the run's curves, and the tokens that the model keeps of the first video of the rows."""
    draw_curves({recipe.task: log}, folder / "curves.png")
    config = model.config
    views = VideoViews(rows, config.frame_size, **sampling_of(recipe, config))
    clip = views[0]["pixel_values"]  # (1, T, C, h, w)
    pixel_values = transforms.normalize(clip, config.image_mean, config.image_std).to(model.device)
    model.eval()
    embedded = model.everest.embeddings(pixel_values, pretraining=recipe.task == "pretrain")
    ids = embedded.kept_ids if embedded.target_ids is None else torch.cat([embedded.kept_ids, embedded.target_ids], 1)
    # With frame selection: the frames that the model worked on.
    worked_on = take_slots(clip[0], None if embedded.slots is None else embedded.slots[0], config)
    draw_kept_tokens(worked_on, ids[0], config, folder / "tokens.png")
