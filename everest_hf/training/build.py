"""The model of a run, its processor, its optimizer and the schedule of the learning rate."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR

from ..configuration_everest import EverestConfig
from ..data import class_names_of
from ..modeling_everest import EverestForPreTraining, EverestForVideoClassification, EverestPreTrainedModel
from ..video_processing_everest import EverestVideoProcessor
from .optim import MovingAverage, cosine_schedule, parameter_groups
from .recipe import Recipe, load_recipe

MODEL_CLASSES: dict[str, type[EverestForPreTraining] | type[EverestForVideoClassification]] = {
    "pretrain": EverestForPreTraining,
    "finetune": EverestForVideoClassification,
    "probe": EverestForVideoClassification,
}
# The learning rate of a recipe is that of this total batch (method: linear scaling).
REFERENCE_BATCH = 256
# Devices for which PyTorch does a step of AdamW in one pass over the weights.
FUSED_ADAMW = ("cpu", "cuda", "mps", "xpu")


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
