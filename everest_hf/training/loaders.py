"""The data of a run: its rows, checked before anything is trained, and the loaders of clips and views."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from ..configuration_everest import EverestConfig, problem_type_of
from ..data import (
    EpochSampler,
    Opened,
    StreamedClips,
    VideoClips,
    VideoViews,
    check_readable,
    class_names_of,
    collate,
    head_of,
    identity_of,
    load_videos,
    name_of,
    share_of_batches,
    stream_videos,
    transforms,
)
from ..data.labels import check_classes, warn_of_shared
from ..data.sampling import Sampling
from ..data.workers import start_worker
from ..video import NotKeptError
from .recipe import Recipe

logger = logging.getLogger(__name__)

# Videos of a stream that are opened before anything is trained.
HEAD = 8
# Videos of which the threshold of token_budget "batch" is found.
CALIBRATION_VIDEOS = 512
# The file that remembers which videos a run has opened to see whether they can be read.
OPENED = "opened_videos.jsonl"


def load_rows(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """Return the rows of training and validation; what is wrong with paths and labels is an error.

    Raises:
        FileNotFoundError, ValueError: as `everest_hf.data.load_videos`; and a class has no training video.
    """
    train = load_train(recipe)
    if recipe.val is None:
        return train, None
    names, has_classes = class_names_of(train), _has_classes(recipe)
    if has_classes and names is None:
        names = [str(i) for i in range(max(train["label"]) + 1)]
    names = names if has_classes else None
    val = load_videos(class_names=names, **_source_of(recipe, "val"), **_labels_of(recipe))
    if recipe.monitor == "knn":
        _check_monitored(val, str(recipe.val))
    if not recipe.streaming and PartialState().is_main_process:
        warn_of_shared(train, val, str(recipe.val))
    return train, val


def load_train(recipe: Recipe) -> Dataset | IterableDataset:
    """Return the rows of training. Raises as `load_rows`."""
    where = _source_of(recipe, "train")
    if recipe.streaming:
        return stream_videos(num_labels=recipe.num_classes or None, **where, **_labels_of(recipe))
    train = load_videos(**where, **_labels_of(recipe))
    if _has_classes(recipe):
        check_classes(train, str(recipe.train))
    return train


def _has_classes(recipe: Recipe) -> bool:
    return recipe.needs_labels and recipe.problem_type != "regression"


def _labels_of(recipe: Recipe) -> dict[str, Any]:
    """Return what labels the run needs, as arguments of `load_videos`."""
    return {"labels_required": recipe.needs_labels, "problem_type": recipe.problem_type}


def _check_monitored(val: Dataset, source: str) -> None:
    """Raise a ValueError unless there are classes of several videos for nearest neighbours."""
    labels = val["label"][:] if "label" in val.column_names else []
    if not labels or None in labels:
        raise ValueError(f"{source}: has no labels, which monitor=knn needs; name them, or leave out monitor")
    if len(labels) < 2:
        raise ValueError(f"{source}: has 1 video; monitor=knn needs 2 or more, which are neighbours")


def identities_of(train: Dataset | IterableDataset, val: Dataset | None) -> dict[str, dict[str, Any] | None]:
    """Return what tells the videos of a run from others: a run that goes on must find them as they were."""
    return {"train": identity_of(train), "val": None if val is None else identity_of(val)}


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
    recipe: Recipe,
    config: EverestConfig,
    train: Dataset,
    val: Dataset | None,
    accelerator: Accelerator,
    opened: Path | None = None,
) -> None:
    """Open the videos before anything is trained, of a large training set a sample, of a stream the first.

    Warnings name those that cannot be read or are too short. Only the main process does all this. opened: a file that
    remembers what was opened, so that a run that goes on opens only what is new.

    Raises:
        ValueError: more training videos than max_bad_fraction, or, without count_bad_as_wrong, any of validation
            cannot be read; or a prepared one does not have the frames of a clip.
    """
    if not accelerator.is_main_process:
        return
    needed = frames_needed(config, frame_step=recipe.frame_step, frame_sampling=recipe.frame_sampling)
    bad_share = 1.0 if recipe.count_bad_as_wrong else 0.0
    train_share = recipe.max_bad_fraction
    if recipe.streaming:
        train, train_share = head_of(train, HEAD), 1.0  # too few to judge the rest by
    sampling = Sampling(**clips_of(recipe, config))
    options = {"frames_needed": needed, "sampling": sampling, "opened": Opened(opened), **opening_of(recipe)}
    found = [(recipe.train, train, train_share, check_readable(train, **options))]
    if val is not None:  # all of it: one that is found at the end would cost the whole run
        found.append((recipe.val, val, bad_share, check_readable(val, sample=None, **options)))
    for source, rows, share, errors in found:
        not_kept = next((error for error in errors if isinstance(error, NotKeptError)), None)
        if not_kept:
            raise ValueError(str(not_kept))
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
    """Return how videos are fetched and opened, as arguments of `VideoClips` and `VideoViews`."""
    return {
        "backend": recipe.video_backend,
        "time_limit": recipe.decode_timeout,
        "max_pixels": recipe.max_pixels,
        "url_schemes": recipe.url_schemes.split(",") if recipe.url_schemes else (),
    }


def sampling_of(recipe: Recipe, config: EverestConfig) -> dict:
    """Return how clips are sampled and read, as arguments of `VideoClips` and `VideoViews`."""
    return {**opening_of(recipe), **clips_of(recipe, config)}


def drawing_of(recipe: Recipe) -> dict:
    """Return what clips are drawn of a video, as arguments of `ClipReader`."""
    return {name: getattr(recipe, name) for name in ("seed", "num_sample", "sample_shift")}


def clips_of(recipe: Recipe, config: EverestConfig) -> dict:
    """Return how clips are sampled, as arguments of `Sampling`."""
    return {
        "num_frames": config.num_frames,
        "num_input_frames": config.num_input_frames,
        "frame_step": recipe.frame_step,
        "frame_sampling": recipe.frame_sampling,
    }


def videos_of_step(recipe: Recipe, train: Dataset | IterableDataset, num_processes: int) -> int:
    """Return the videos of a step of the optimizer, over all processes.

    Raises:
        ValueError: the training videos do not fill one step.
    """
    videos = recipe.batch_size * recipe.gradient_accumulation_steps * num_processes
    if not recipe.streaming and len(train) < videos:
        raise ValueError(
            f"train has {len(train)} videos, fewer than the {videos} of a step (batch_size "
            f"{recipe.batch_size} x gradient_accumulation_steps {recipe.gradient_accumulation_steps} x "
            f"{num_processes} processes); lower batch_size"
        )
    return videos


def build_train_loader(recipe: Recipe, config: EverestConfig, train: Dataset | IterableDataset, total_batch: int):
    """Return the training loader, and what has its `set_epoch(epoch, start)`: its sampler, or of a stream its data."""
    reading = {**drawing_of(recipe), **sampling_of(recipe, config)}
    loading = {
        "batch_size": recipe.batch_size,
        "persistent_workers": recipe.num_workers > 0,
        **_workers_of(recipe),
    }
    transform = build_transform(recipe, config)
    if recipe.streaming:
        return _stream_loader(recipe, train, transform, reading, loading)
    clips = VideoClips(train, transform, balanced=recipe.balanced_sampling, **reading)
    sampler = EpochSampler(clips, total_batch)
    return DataLoader(clips, sampler=sampler, **loading), sampler


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
    # The stream divides itself. Left to itself, Accelerate would have one process read for all of them, or divide it
    # again. https://github.com/huggingface/accelerate/issues/4199
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
        # Each loader has its own: it draws when its workers start, and a resumed run starts them again. Drawn from the
        # default generator, that would shift what the model draws.
        "generator": torch.Generator(),
        "worker_init_fn": start_worker,
    }


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


def build_calibration_loader(recipe: Recipe, config: EverestConfig, train: Dataset | IterableDataset) -> DataLoader:
    """Return the loader of this process's share of training videos for `set_threshold`, read as evaluation reads them.

    They are CALIBRATION_VIDEOS at most, evenly spaced; of a stream the first.
    """
    if isinstance(train, IterableDataset):
        return build_val_loader(recipe, config, head_of(train, CALIBRATION_VIDEOS), 1, 1)
    step = -(-len(train) // CALIBRATION_VIDEOS)
    return build_val_loader(recipe, config, train.select(range(0, len(train), step)), 1, 1)


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


def names_of(rows: Dataset | IterableDataset, indices: list[int]) -> list[str]:
    """Return what errors call the videos of rows."""
    if isinstance(rows, IterableDataset):
        return [f"number {i} of the stream" for i in indices]
    return [name_of(rows[i]["video"], i) for i in indices]
