"""The model of a run, its processor, its optimizer and the schedule of the learning rate."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from transformers import PretrainedConfig, VideoMAEConfig, get_cosine_with_min_lr_schedule_with_warmup

from ..configuration_everest import EverestConfig
from ..convert import load_converted
from ..data import class_names_of
from ..inference.loading import MODELS, as_encoder
from ..modeling_everest import EverestForPreTraining, EverestForVideoClassification, EverestPreTrainedModel
from ..video_processing_everest import EverestVideoProcessor
from .optim import MovingAverage, parameter_groups
from .recipe import CONFIG_FIELDS, Recipe, load_recipe

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
    if recipe.config.get("keep_threshold"):
        raise ValueError("config.keep_threshold is set; training finds it by itself, so leave it out")
    # A threshold of the checkpoint's was found for its weights and its share of tokens.
    cls, values = MODEL_CLASSES[recipe.task], {**recipe.config, "keep_threshold": None}
    if recipe.task == "probe" and recipe.model is None:
        raise ValueError("model is None; it must be the checkpoint whose encoder is probed")
    if recipe.has_labels:
        values |= {"problem_type": recipe.problem_type, **_labels_of(recipe, train)}
        # Set where it is None, too: the checkpoint's were those of other videos.
        values["class_weights"] = _class_weights(recipe, train)
    model: Any
    if recipe.model is None:
        with torch.device("meta") if empty else nullcontext():
            model = cls(EverestConfig(**values))
    else:
        model = _start_from(recipe.model, cls, values, empty)
    _check_channels(model.config)
    set_up_training(recipe, model)
    return model


def set_up_training(recipe: Recipe, model: Any) -> None:
    """Let a model train what the recipe trains, and recompute layers where it says so."""
    if recipe.task == "probe":
        model.freeze_encoder()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _start_from(source: str, cls, values: dict, empty: bool) -> EverestPreTrainedModel:
    """Return a model with the weights of a checkpoint, of EVEREST or VideoMAE; the head alone may be new.

    values: fields of the configuration that differ from the checkpoint's.
    """
    stored = _stored_config(source)
    _check_sizes(source, values, stored)
    if stored.get("model_type") == VideoMAEConfig.model_type:
        PartialState().print(f"model {source}: converted from VideoMAE, all weights of its encoder kept")
        model = _loaded(source, load_converted, cls, source, **values)
        return model.to("meta") if empty else model
    _check_model_type(source, stored)
    where = {"device_map": "meta"} if empty else {}
    loading = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    with _no_report():
        model, info = _loaded(source, cls.from_pretrained, source, **loading, **where, **values)
    _check_weights(source, info, HEAD if _has_decoder(stored) else (*HEAD, "decoder."))
    if any(name.startswith("decoder.") for name in info["missing_keys"]):
        PartialState().print(f"model {source} has no decoder: a new one is trained")
    return model


@contextmanager
def _no_report() -> Iterator[None]:
    """Keep back Transformers' report of weights that are new: `_check_weights` refuses those that must not be."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _loaded(source: str, load: Callable, *args, **kwargs) -> Any:
    """Return load(*args, **kwargs); a ValueError of one line that names the model where that fails."""
    try:
        return load(*args, **kwargs)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model {source}: {str(error).splitlines()[0]}") from error


def _stored_config(source: str) -> dict:
    return _loaded(source, PretrainedConfig.get_config_dict, source)[0]


def _check_model_type(source: str, stored: dict) -> None:
    found = stored.get("model_type")
    if found != EverestConfig.model_type:
        hint = f"; `everest-hf convert {source} OUT` makes one of it" if found == VideoMAEConfig.model_type else ""
        raise ValueError(f"model {source} is of the type {found!r}; expected a checkpoint of EVEREST{hint}")


# Fields of the configuration that say what the weights of the encoder are, and those of the decoder.
ENCODER_FIELDS = (
    "num_channels",
    "patch_size",
    "tubelet_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "qkv_bias",
)
DECODER_FIELDS = tuple(name for name in CONFIG_FIELDS if name.startswith("decoder_"))
# What may be new in a model that starts from a checkpoint: a head, and the norm before it.
HEAD = ("classifier.", "fc_norm.", "pooling.", "everest.layernorm.")


def _has_decoder(stored: dict) -> bool:
    return any(name.endswith("ForPreTraining") for name in stored.get("architectures") or ())


def _check_sizes(source: str, values: dict, stored: dict) -> None:
    """Refuse a field that asks for other weights than those of the checkpoint, whose config.json is `stored`."""
    for name in (*ENCODER_FIELDS, *(DECODER_FIELDS if _has_decoder(stored) else ())):
        if name in values and name in stored and values[name] != stored[name]:
            raise ValueError(
                f"config.{name} is {values[name]!r}; it must be {stored[name]!r}, that of the weights of model {source}"
            )


def _check_weights(source: str, info: dict, head: tuple[str, ...]) -> None:
    """Refuse a model of which more than the head is new, or whose encoder leaves out weights of the checkpoint.

    info: as from_pretrained gives it. head: beginnings of the names that may be new.
    """
    faults = [
        f"has {name} of the shape {tuple(there)}; expected {tuple(here)}"
        for name, there, here in sorted(info["mismatched_keys"])
        if not name.startswith("classifier.")
    ]
    faults += [f"has no {name}" for name in sorted(info["missing_keys"]) if not name.startswith(head)]
    parts = ("everest.", "encoder.", "embeddings.")
    faults += [
        f"has {name}, which is not in its config" for name in sorted(info["unexpected_keys"]) if name.startswith(parts)
    ]
    if faults:
        raise ValueError(f"model {source} {faults[0]}")


def _check_channels(config: EverestConfig) -> None:
    if config.num_channels != 3:
        raise ValueError(f"config.num_channels is {config.num_channels}; it must be 3: videos are read as RGB")


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


def _class_weights(recipe: Recipe, train: Dataset) -> list[float] | None:
    """Return the weights of the classes in the loss, if there are any: the recipe's own, or balanced ones.

    Balanced: w_c = N / (C n_c) for class c with n_c of the N training videos, of C classes, as in scikit-learn after King
    and Zeng 2001, Logistic Regression in Rare Events Data. All classes then weigh the same, and the mean over the
    videos is 1.
    """
    if recipe.class_weights == "none":
        return recipe.config.get("class_weights")
    counts = np.bincount(train["label"][:])
    return (counts.sum() / (len(counts) * counts)).tolist()


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
    stored = _stored_config(source)
    _check_model_type(source, stored)
    _check_sizes(source, recipe.config, stored)
    model, info = _loaded(source, cls.from_pretrained, source, output_loading_info=True, **recipe.config)
    if info["missing_keys"]:
        lacking = sorted(info["missing_keys"])[0]
        raise ValueError(f"model {source} has no {lacking}: it was not trained for task={recipe.task}")
    _check_weights(source, info, ())
    _check_channels(model.config)
    return model


def load_features(recipe: Recipe) -> EverestPreTrainedModel:
    """Return the model whose features are evaluated: a classifier, of pre-training, or an encoder alone.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    source = model_to_evaluate(recipe)
    architecture, values = as_encoder(source)
    _check_sizes(source, recipe.config, _stored_config(source))
    load = partial(MODELS[architecture].from_pretrained, source, output_loading_info=True)
    model, info = _loaded(source, load, **{**values, **recipe.config})
    _check_weights(source, info, ())
    _check_channels(model.config)
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
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=warmup_steps(recipe, steps_per_epoch),
        num_training_steps=recipe.epochs * steps_per_epoch,
        min_lr_rate=final / peak,
    )
    return optimizer, schedule
