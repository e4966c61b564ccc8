"""What the loop in train_accelerate.py is made of: data, model, optimizer, output."""

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from . import transforms
from .configuration_everest import EverestConfig
from .data import (
    BadVideos,
    EpochSampler,
    StreamedClips,
    VideoClips,
    VideoViews,
    check_readable,
    class_names_of,
    collate,
    head_of,
    load_videos,
    name_of,
    stream_videos,
)
from .evaluation import problem_type_of, share_of_batches
from .memory import keep_freed_memory
from .modeling_everest import (
    EverestForPreTraining,
    EverestForVideoClassification,
    EverestPreTrainedModel,
)
from .optim import MovingAverage, cosine_schedule, parameter_groups
from .progress import LOG, NAME
from .ranks import end_together
from .recipe import Recipe, load_recipe
from .report import REPORT
from .video_processing_everest import EverestVideoProcessor
from .visualize import draw_curves, draw_kept_tokens, take_slots

logger = logging.getLogger(__name__)

MODEL_CLASSES: dict[str, type[EverestForPreTraining] | type[EverestForVideoClassification]] = {
    "pretrain": EverestForPreTraining,
    "finetune": EverestForVideoClassification,
    "probe": EverestForVideoClassification,
}
# The list of the training videos that could not be read.
BAD_VIDEOS = "bad_videos.txt"
# Videos of a stream that are opened before anything is trained.
HEAD = 8
# The learning rate of a recipe is that of this total batch (method: linear scaling).
REFERENCE_BATCH = 256
# Devices for which PyTorch does a step of AdamW in one pass over the weights.
FUSED_ADAMW = ("cpu", "cuda", "mps", "xpu")
# The constants of SplitMix64, as signed numbers.
_GOLDEN, _MIX_1, _MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


# ---------------------------------------------------------------------------------------------------------- data


def load_rows(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """Return the rows of training and validation; what is wrong with paths and labels is an error.

    Raises:
        FileNotFoundError, ValueError: as `everest_hf.data.load_videos`.
    """
    labelled = recipe.has_labels
    options: dict[str, Any] = {"labels_required": labelled, "problem_type": recipe.problem_type}
    if recipe.streaming:
        train = stream_videos(num_labels=recipe.num_classes or None, **_source_of(recipe, "train"), **options)
    else:
        train = load_videos(**_source_of(recipe, "train"), **options)
    if recipe.val is None:
        return train, None
    names = class_names_of(train)
    has_integers = labelled and names is None and recipe.problem_type != "regression"
    bound = max(train["label"]) + 1 if has_integers else None
    return train, load_videos(class_names=names, num_labels=bound, **_source_of(recipe, "val"), **options)


def _source_of(recipe: Recipe, which: str) -> dict[str, Any]:
    """Return where the videos of `which`, train or val, and their labels are, as arguments of `load_videos`."""
    columns = {name: getattr(recipe, name) for name in ("data_root", "video_column", "label_column")}
    return {"source": getattr(recipe, which), "split": getattr(recipe, f"{which}_split"), **columns}


def load_held_out(recipe: Recipe, config: EverestConfig) -> Dataset:
    """Return the rows of validation, with the classes of a trained model.

    Raises:
        FileNotFoundError, ValueError: as `everest_hf.data.load_videos`.
    """
    where = _source_of(recipe, "val")
    if recipe.task == "pretrain":
        return load_videos(labels_required=False, **where)
    problem_type = problem_type_of(config)
    names = None if problem_type == "regression" else [config.id2label[i] for i in range(config.num_labels)]
    return load_videos(class_names=names, problem_type=problem_type, **where)


def check_videos(
    recipe: Recipe, config: EverestConfig, train: Dataset, val: Dataset | None, accelerator: Accelerator
) -> None:
    """Open the videos before anything is trained, of a large training set a sample, of a stream the first.

    Those that cannot be read or are too short are named in warnings. Only the main process does all this.

    Raises:
        ValueError: more training videos than max_bad_fraction, or, without count_bad_as_wrong, any of validation
            cannot be read.
    """
    if not accelerator.is_main_process:
        return
    needed = frames_needed(config, frame_step=recipe.frame_step, frame_sampling=recipe.frame_sampling)
    bad_share = 1.0 if recipe.count_bad_as_wrong else 0.0
    train_share = recipe.max_bad_fraction
    if recipe.streaming:
        train, train_share = head_of(train, HEAD), 1.0  # too few to judge the rest by
    options = {"frames_needed": needed, **opening_of(recipe)}
    found = [(recipe.train, train, train_share, check_readable(train, **options))]
    if val is not None:  # all of it: one that is found at the end would cost the whole run
        found.append((recipe.val, val, bad_share, check_readable(val, sample=None, **options)))
    for source, rows, share, errors in found:
        for error in errors:
            logger.warning("unreadable: %s", error)
        if len(errors) > share * len(rows):
            raise ValueError(f"{source}: {len(errors)} unreadable videos, the first is {errors[0]}")


def frames_needed(config: EverestConfig, *, frame_step: int, frame_sampling: str) -> int:
    """Return how many frames a video must have so that a clip repeats none at its end."""
    if frame_sampling == "segment":
        return config.num_input_frames
    candidates = config.num_input_frames
    return (candidates - 1) * config.num_frames * frame_step // candidates + 1


def opening_of(recipe: Recipe) -> dict:
    """Return how videos are opened, as arguments of `everest_hf.video.open_video`."""
    return {"backend": recipe.video_backend, "time_limit": recipe.decode_timeout}


def sampling_of(recipe: Recipe, config: EverestConfig) -> dict:
    """Return how clips are sampled and read, as arguments of `VideoClips` and `VideoViews`."""
    return {
        **opening_of(recipe),
        "num_frames": config.num_frames,
        "num_input_frames": config.num_input_frames,
        "frame_step": recipe.frame_step,
        "frame_sampling": recipe.frame_sampling,
    }


def count_steps(recipe: Recipe, train: Dataset | IterableDataset, num_processes: int) -> tuple[int, int, int]:
    """Return the training videos (of a stream: in an epoch), and over all processes the clips of a step of the
    optimizer, and the steps of an epoch.

    Raises:
        ValueError: the videos do not fill one step.
    """
    videos = recipe.batch_size * recipe.gradient_accumulation_steps * num_processes
    total_batch = videos * recipe.num_sample
    if recipe.streaming:
        return recipe.steps_per_epoch * videos, total_batch, recipe.steps_per_epoch
    if len(train) < videos:
        raise ValueError(
            f"train has {len(train)} videos, fewer than the {videos} of a step (batch_size "
            f"{recipe.batch_size} x gradient_accumulation_steps {recipe.gradient_accumulation_steps} x "
            f"{num_processes} processes); lower batch_size"
        )
    return len(train), total_batch, len(train) // videos


def build_loaders(recipe: Recipe, config: EverestConfig, train: Dataset, val: Dataset | None, total_batch: int):
    """Return the training loader, its sampler, and a function of (segments, crops) that makes a validation loader."""
    reading = {"seed": recipe.seed, "num_sample": recipe.num_sample, **sampling_of(recipe, config)}
    loading = {
        "batch_size": recipe.batch_size,
        "persistent_workers": recipe.num_workers > 0,
        **_workers_of(recipe),
    }
    transform = build_transform(recipe, config)
    if recipe.streaming:
        train_loader, sampler = _stream_loader(recipe, train, transform, reading, loading)
    else:
        clips = VideoClips(train, transform, **reading)
        sampler = EpochSampler(clips, total_batch)
        train_loader = DataLoader(clips, sampler=sampler, **loading)

    def val_loader(num_segments: int, num_crops: int) -> DataLoader:
        return build_val_loader(recipe, config, val, num_segments, num_crops)

    return train_loader, sampler, val_loader


def _stream_loader(recipe: Recipe, train: IterableDataset, transform: Callable, reading: dict, loading: dict):
    """Return the loader of a stream, and what has its `set_epoch`."""
    state = PartialState()
    clips = StreamedClips(
        train,
        transform,
        batch_size=recipe.batch_size,
        num_batches=recipe.steps_per_epoch * recipe.gradient_accumulation_steps,
        shuffle_buffer=recipe.shuffle_buffer,
        process_index=state.process_index,
        num_processes=state.num_processes,
        **reading,
    )
    # The stream divides itself. Left to itself, Accelerate would have one process read for all of them.
    loader = prepare_data_loader(
        DataLoader(clips, **loading),
        state.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
    )
    loader._is_accelerate_prepared = True
    return loader, clips


def _workers_of(recipe: Recipe) -> dict:
    """Return how a loader decodes, as arguments of DataLoader."""
    return {
        "num_workers": recipe.num_workers,
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available(),
        # Of their own: a loader draws when its workers start, and a resumed run starts them anew. From the default
        # generator, that would shift what the model draws.
        "generator": torch.Generator(),
        "worker_init_fn": _start_worker,
    }


def _start_worker(worker: int) -> None:
    keep_freed_memory(worker)
    _outlive_sigterm()


def _outlive_sigterm() -> None:
    """Let a decoding process live on when SIGTERM goes to the whole run: the training process saves, then ends it."""
    if hasattr(signal, "sigwaitinfo"):  # not on a Mac
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def build_val_loader(
    recipe: Recipe, config: EverestConfig, val: Dataset, num_segments: int, num_crops: int
) -> DataLoader:
    """Return the loader of this process's share of the validation videos, for `evaluate_model`."""
    state = PartialState()
    sampling = sampling_of(recipe, config)
    views = VideoViews(
        val, config.frame_size, num_segments=num_segments, num_crops=num_crops, count_unreadable=True, **sampling
    )
    batches = share_of_batches(
        num_videos=len(views),
        batch_size=max(1, recipe.batch_size // (num_segments * num_crops)),
        rank=state.process_index,
        num_processes=state.num_processes,
    )
    return DataLoader(views, batch_sampler=batches, **_workers_of(recipe))


def final_views(recipe: Recipe) -> tuple[int, int]:
    """Return the segments and crops of the final evaluation; pre-training is judged by single views."""
    return (recipe.segments, recipe.crops) if recipe.has_labels else (1, 1)


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
        fill=config.image_mean,
        augmentation=recipe.augmentation,
    )


def model_inputs(batch: dict, recipe: Recipe, config: EverestConfig) -> dict:
    """Turn a uint8 batch on the device into what the model takes: normalised, erased, mixed, with noise."""
    pixel_values = transforms.normalize(batch["pixel_values"], config.image_mean, config.image_std)
    noise = selection_noise(batch["seed"], config, pretraining=recipe.task == "pretrain")
    if recipe.erasing:
        pixel_values = transforms.random_erasing(pixel_values, recipe.erasing)
    if recipe.task == "pretrain":
        return {"pixel_values": pixel_values, **noise}
    labels = batch["labels"]
    if recipe.label_smoothing or recipe.mixup or recipe.cutmix:
        one_hot = torch.nn.functional.one_hot(labels, config.num_labels).float()
        labels = torch.lerp(one_hot, torch.full_like(one_hot, 1 / config.num_labels), recipe.label_smoothing)
        pixel_values, labels = transforms.mix(pixel_values, labels, mixup=recipe.mixup, cutmix=recipe.cutmix)
    return {"pixel_values": pixel_values, "labels": labels, **noise}


def selection_noise(seeds: torch.Tensor, config: EverestConfig, *, pretraining: bool) -> dict[str, torch.Tensor]:
    """Return what the model's selection draws for clips, as arguments of its forward: `noise`, `frame_noise`.

    seeds: int64 (B,). A clip's draw follows from its seed alone, not from its place in a batch or its process. What
    the configuration has no draw for is left out.
    """
    tokens = {"motion": config.num_informative_tokens, "random": config.num_tokens, "tube": config.num_tokens_per_slot}
    draws = {}
    if pretraining or config.token_selection != "motion":
        draws["noise"] = uniform(seeds, tokens[config.token_selection])
    if config.num_input_frames > config.num_frames:
        draws["frame_noise"] = uniform(~seeds, config.num_input_frames // config.tubelet_size)
    return draws


def uniform(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """Return (B, n) pseudo-random float32 in [0, 1), row i a function of seeds[i] alone, the same on every device.

    seeds: int64 (B,). SplitMix64 (Steele, Lea and Flood 2014), its n first numbers for each seed; integers wrap.
    """
    x = seeds[:, None] + torch.arange(1, n + 1, device=seeds.device) * _GOLDEN  # (B, n)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x = (x ^ _shift_right(x, shift)) * factor
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 40).float() / 2**24  # the 24 bits that float32 holds


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 as if it were unsigned."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


# ---------------------------------------------------------------------------------------------------------- model


def build_model(recipe: Recipe, train: Dataset, *, empty: bool = False) -> EverestPreTrainedModel:
    """Return the model of a recipe: from its checkpoint, or new; `empty`: without its weights' values and memory.

    Raises:
        ValueError: the checkpoint cannot be loaded, or the configuration is impossible.
    """
    cls, values = MODEL_CLASSES[recipe.task], dict(recipe.config)
    if recipe.task == "probe" and recipe.model is None:
        raise ValueError("model is None; it must be the checkpoint whose encoder is probed")
    if recipe.has_labels:
        values |= {"problem_type": recipe.problem_type, **_labels_of(recipe, train)}
    if recipe.model is None:
        with torch.device("meta") if empty else nullcontext():
            model = cls(EverestConfig(**values))
    else:
        values |= {"device_map": "meta"} if empty else {}
        try:
            model = cls.from_pretrained(recipe.model, ignore_mismatched_sizes=True, **values)
        except OSError as error:
            raise ValueError(f"model {recipe.model}: {str(error).splitlines()[0]}") from error
    if recipe.task == "probe":
        model.freeze_encoder()  # type: ignore[operator]  # a classifier
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def finish_model(recipe: Recipe, accelerator: Accelerator, model) -> MovingAverage | None:
    """Compile a prepared model where the recipe says so, and return the moving average of its weights, if any."""
    if recipe.compile:
        accelerator.unwrap_model(model).compile()  # in place: its class and the names of its weights stay
    return MovingAverage(model.parameters(), recipe.ema) if recipe.ema else None


def _labels_of(recipe: Recipe, train: Dataset) -> dict:
    """Return the fields of the configuration that say what the outputs of a classifier are."""
    if recipe.problem_type == "regression":
        return {"num_labels": 1}
    names = class_names_of(train) or [str(i) for i in range(max(train["label"]) + 1)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def model_to_evaluate(recipe: Recipe) -> str:
    """Return the model that eval_only is about: of the finished run in output_dir, unless the recipe names another.

    Raises:
        ValueError: there is neither.
    """
    finished = Path(recipe.output_dir) / "model"
    if finished.is_dir() and recipe.model in (None, load_recipe(finished.with_name("recipe.yaml")).model):
        return str(finished)
    if recipe.model is None:
        raise ValueError(f"model is None, and {finished} is not there; --eval_only needs one of them")
    return recipe.model


def load_trained(recipe: Recipe) -> EverestPreTrainedModel:
    """Return the model to evaluate.

    Raises:
        ValueError: there is none, or it cannot be loaded as what the task needs.
    """
    source, cls = model_to_evaluate(recipe), MODEL_CLASSES[recipe.task]
    try:
        loaded: Any = cls.from_pretrained(source, output_loading_info=True, **recipe.config)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model {source}: {str(error).splitlines()[0]}") from error
    model, info = loaded  # annotated as the model alone
    if info["missing_keys"]:
        lacking = sorted(info["missing_keys"])[0]
        raise ValueError(f"model {source} has no {lacking}: it was not trained for task={recipe.task}")
    return model


def build_processor(recipe: Recipe, config: EverestConfig) -> EverestVideoProcessor:
    """Return the processor that samples and scales as the run's evaluation does."""
    return EverestVideoProcessor.from_config(
        config, frame_step=recipe.frame_step, frame_sampling=recipe.frame_sampling
    )


def learning_rates(recipe: Recipe, total_batch: int) -> tuple[float, float]:
    """Return the highest and the last learning rate, scaled linearly with the clips of a step."""
    return recipe.base_lr * total_batch / REFERENCE_BATCH, recipe.min_lr * total_batch / REFERENCE_BATCH


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Return the steps in which the learning rate rises to its highest."""
    return round(recipe.warmup_epochs * steps_per_epoch)


def build_optimizer(recipe: Recipe, model: EverestPreTrainedModel, total_batch: int, steps_per_epoch: int):
    """Return AdamW with its parameter groups, and the schedule that is stepped once a step of the optimizer."""
    peak, final = learning_rates(recipe, total_batch)
    groups = parameter_groups(
        model,
        lr=peak,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        num_layers=model.config.num_hidden_layers,
    )
    is_fused = PartialState().device.type in FUSED_ADAMW
    optimizer = torch.optim.AdamW(groups, betas=tuple(recipe.betas), fused=is_fused)
    factor = partial(
        cosine_schedule,
        total_steps=recipe.epochs * steps_per_epoch,
        warmup_steps=warmup_steps(recipe, steps_per_epoch),
        final_factor=final / peak,
    )
    return optimizer, LambdaLR(optimizer, factor)


# --------------------------------------------------------------------------------------------------------- output


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
    for name in ("recipe.yaml", LOG, NAME, BAD_VIDEOS, *REPORT):
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


# ------------------------------------------------------------------------------------------------- training videos


def names_of(rows: Dataset | IterableDataset, indices: list[int]) -> list[str]:
    """Return what errors call the videos of rows."""
    if isinstance(rows, IterableDataset):
        return [f"number {i} of the stream" for i in indices]
    return [name_of(rows[i]["video"], i) for i in indices]


def share_bad(accelerator: Accelerator, bad: BadVideos, recipe: Recipe, num_videos: int) -> None:
    """Let all processes know the unreadable videos of each, and end them where there are too many. All call it.

    Raises:
        ValueError: on the main process: too many; the others end.
    """
    bad.share(gather=gather_object, is_main=accelerator.is_main_process)
    if len(bad.reasons) > recipe.max_bad_fraction * num_videos:
        path, reason = next(iter(bad.reasons.items()))
        end_together(
            ValueError(
                f"{len(bad.reasons)} of {num_videos} training videos are unreadable, more than max_bad_fraction="
                f"{recipe.max_bad_fraction}; the first is {path}: {reason}; all are in {bad.path}"
            )
        )


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
