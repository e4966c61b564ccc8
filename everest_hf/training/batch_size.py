"""How much memory a run takes, and `batch_size: auto`: the largest batch that fits, found before the run."""

import math
import os
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, find_executable_batch_size, gather_object
from datasets import Dataset, IterableDataset

from ..configuration_everest import EverestConfig, problem_type_of
from ..cost import TrainingMemory, training_memory
from ..distributed import end_together, main_first
from . import build
from .inputs import model_inputs
from .loaders import load_train
from .logging import LOG
from .optim import MovingAverage
from .recipe import AUTO, Recipe, load_recipe

# Of the memory that is free, what a batch is fitted into by the estimate; the rest is for the runtime, decoding
# processes and what the estimate does not know. Where steps are tried: what of a GPU they leave free.
SHARE, SPARE = 0.8, 0.05
# Where the trial begins, over the estimate, which is rather high.
HEAD_START = 1.2
CGROUP = Path("/sys/fs/cgroup")


def memory_of(recipe: Recipe, config: EverestConfig, accelerator: Accelerator, batch_size: int) -> TrainingMemory:
    """Estimate the memory of a process of a run with a batch of so many videos."""
    return training_memory(
        config,
        recipe.task,
        batch_size * recipe.num_sample,
        mixed_precision=accelerator.mixed_precision,
        gradient_checkpointing=recipe.gradient_checkpointing,
        moving_average=recipe.ema > 0,
        num_processes=accelerator.num_processes,
        sharded=_is_sharded(accelerator),
        on_cpu=accelerator.device.type == "cpu",
    )


def _is_sharded(accelerator: Accelerator) -> bool:
    zero = accelerator.deepspeed_plugin
    return accelerator.distributed_type == DistributedType.FSDP or (zero is not None and zero.zero_stage == 3)


def with_batch_size(recipe: Recipe, accelerator: Accelerator, *, try_steps: bool = True) -> Recipe:
    """Return the recipe with a number for its batch_size, the same on all processes. Every process calls it.

    auto is the batch_size of the run in output_dir, if there is one, or else the largest that fits on every process,
    and of which the training videos fill a step. On a CPU the estimate says what fits; on a GPU, training steps are
    tried on a model of their own. try_steps: by the estimate there too, as for a sharded model or under DeepSpeed.

    Raises:
        ValueError: not even one video fits. The main process raises, the others exit.
    """
    if recipe.batch_size != AUTO:
        return recipe
    (known,) = broadcast_object_list([_batch_size_of_run(recipe) if accelerator.is_main_process else None])
    if known is not None:
        return replace(recipe, batch_size=known)
    recipe = replace(recipe, batch_size=1)
    train, config = main_first(accelerator, _train_and_config, recipe)
    room = room_for(accelerator)
    size = _most_by_estimate(recipe, config, accelerator, SHARE * room)
    if accelerator.device.type == "cuda" and accelerator.distributed_type in _WHOLE and try_steps:
        start = math.ceil(HEAD_START * _most_by_estimate(recipe, config, accelerator, room))
        size = most_by_trial(recipe, config, accelerator, max(1, _at_most(start, recipe, train, accelerator)))
    size = min(gather_object([_at_most(size, recipe, train, accelerator)]))
    if size < 1:
        needed = memory_of(recipe, config, accelerator, 1).total
        there = f"{min(gather_object([room])) / 2**30:.3g} GiB are free for each process"
        end_together(
            ValueError(
                f"batch_size is 'auto', and a batch of 1 video takes about {needed / 2**30:.3g} GiB, while {there}; take "
                "a smaller model, set gradient_checkpointing, or name a number"
            )
        )
    accelerator.print(f"batch_size auto: {size} videos a process and step")
    return replace(recipe, batch_size=size)


# The kinds of runs whose processes each hold the whole model, as the trial does.
_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU)


def _batch_size_of_run(recipe: Recipe) -> int | None:
    """Return the batch_size with which the run in the output folder was trained, if there is one to go on with."""
    path = Path(recipe.output_dir) / "recipe.yaml"
    goes_on = not recipe.overwrite and path.exists() and path.with_name(LOG).exists()
    return load_recipe(path).batch_size if goes_on else None


def _train_and_config(recipe: Recipe) -> tuple[Dataset | IterableDataset, EverestConfig]:
    train = load_train(recipe)
    return train, build.build_model(recipe, train, empty=True).config


def _at_most(size: int, recipe: Recipe, train: Dataset | IterableDataset, accelerator: Accelerator) -> int:
    """Return a batch_size, or the largest of which the training videos fill a step."""
    if recipe.streaming:
        return size
    # With fewer videos than processes, 1: what is wrong then is said by the run.
    return min(size, max(1, len(train) // (accelerator.num_processes * recipe.gradient_accumulation_steps)))


# ------------------------------------------------------------------------------------------------- by the estimate


def room_for(accelerator: Accelerator) -> int:
    """Return the bytes that are free for a process: of its GPU, or its part of the machine's memory."""
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info(accelerator.device)[0]
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_memory(cgroup: Path = CGROUP) -> int:
    """Return the bytes that are free on this machine, or if these are fewer, in its container.

    cgroup: where Linux tells the limit of a container (version 2) and what it uses; file caches count as free.
    """
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        return free


def _most_by_estimate(recipe: Recipe, config: EverestConfig, accelerator: Accelerator, room: float) -> int:
    """Return how many videos fit into `room` bytes: what the model takes, and as much again for each video."""
    without, one = (memory_of(recipe, config, accelerator, size).total for size in (0, 1))
    return max(0, int((room - without) // (one - without)))


# ------------------------------------------------------------------------------------------------------- by trial


def most_by_trial(recipe: Recipe, config: EverestConfig, accelerator: Accelerator, start: int) -> int:
    """Return the first of start, 9/10 of it, and so on, for which `try_steps` does not run out of memory, or 0."""

    def attempt(batch_size: int) -> int:
        try_steps(recipe, config, accelerator, batch_size)
        return batch_size

    try:
        return find_executable_batch_size(attempt, starting_batch_size=start)()
    except RuntimeError as error:
        if "No executable batch size" in str(error):
            return 0
        raise


def try_steps(recipe: Recipe, config: EverestConfig, accelerator: Accelerator, batch_size: int) -> None:
    """Take two training steps as the run does, on a model of their own and black clips; random numbers stay as they are.

    The second step has all that a step needs: the moments of AdamW too.

    Raises:
        torch.OutOfMemoryError: the device has not enough memory.
    """
    device = accelerator.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        spare = torch.empty(_spare_bytes(device), dtype=torch.uint8, device=device)
        model = build.MODEL_CLASSES[recipe.task](config).to(device).train()
        build.set_up_training(recipe, model)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=0.0, fused=device.type in build.FUSED_ADAMW)
        beside = [MovingAverage(weights, recipe.ema)] if recipe.ema else []
        buckets = [torch.empty_like(weight) for weight in weights] if accelerator.num_processes > 1 else []
        batch = _black_batch(recipe, config, batch_size * recipe.num_sample, device)
        for _ in range(2):
            inputs = model_inputs(batch, recipe, config)
            with accelerator.autocast():
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        del spare, beside, buckets


def _spare_bytes(device: torch.device) -> int:
    return int(SPARE * torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def _black_batch(recipe: Recipe, config: EverestConfig, clips: int, device: torch.device) -> dict[str, torch.Tensor]:
    shape = clips, config.num_input_frames, config.num_channels, *config.frame_size
    batch = {
        "pixel_values": torch.zeros(shape, dtype=torch.uint8, device=device),
        "seed": torch.arange(clips, device=device),
    }
    if recipe.has_labels:
        kind = problem_type_of(config)
        sizes, dtype = (clips,), torch.float32
        if kind == "multi_label_classification":
            sizes = (clips, config.num_labels)  # type: ignore[assignment]
        elif kind == "single_label_classification":
            dtype = torch.int64
        batch["labels"] = torch.zeros(sizes, dtype=dtype, device=device)
    return batch
