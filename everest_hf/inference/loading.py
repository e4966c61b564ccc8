"""Loading a trained model and its processor from a folder or from the Hub."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PretrainedConfig
from transformers.utils import logging

from ..files import RUNS
from ..modeling_everest import (
    EverestForPreTraining,
    EverestForVideoClassification,
    EverestModel,
    EverestPreTrainedModel,
)
from ..video_processing_everest import EverestVideoProcessor

PRETRAINING, CLASSIFICATION, FEATURES = "EverestForPreTraining", "EverestForVideoClassification", "EverestModel"
MODELS: dict[str, type[EverestPreTrainedModel]] = {
    PRETRAINING: EverestForPreTraining,
    CLASSIFICATION: EverestForVideoClassification,
    FEATURES: EverestModel,
}


def model_folder(checkpoint: str | os.PathLike) -> Path:
    """Return the folder of the model: a checkpoint's own, or, for a run, the one that holds its result; or a Hub id as is.

    Raises:
        ValueError: the run has not finished.
    """
    folder = Path(checkpoint)
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: is a run that has not finished; there is no model in it yet")
    return folder


def chosen_model(name: str | None, *architectures: str) -> str:
    """Return the model that `name` says, a checkpoint or a run, or the result of the newest run if it is None."""
    return str(model_folder(name)) if name else newest_run(*architectures)


def newest_run(*architectures: str) -> str:
    """Return the model of the newest finished run below ./runs with one of these architectures, and name it on stderr.

    Raises:
        FileNotFoundError: there is none.
    """
    finished = [path for path in RUNS.rglob("model/config.json") if _stored_architecture(path) in architectures]
    if not finished:
        raise FileNotFoundError(
            f"a model is needed: give --model PATH_OR_ID (there is no finished run of {' or '.join(architectures)} "
            f"below ./{RUNS}; `accelerate launch train_accelerate.py` makes one)"
        )
    folder = max(finished, key=lambda path: path.stat().st_mtime_ns).parent
    print(f"everest-hf: model {folder}", file=sys.stderr)
    return str(folder)


def _stored_architecture(path: Path) -> str | None:
    try:
        return (json.loads(path.read_text(encoding="utf-8")).get("architectures") or [None])[0]
    except (OSError, ValueError, AttributeError):
        return None  # an unfinished run, or the folder of another program


def architecture_of(name: str) -> str:
    """Return the name of the class that saved a checkpoint, a folder or a Hub id.

    Raises:
        ValueError: there is none, or it is not one of EVEREST.
    """
    _check_checkpoint_name(name)
    config = loaded(name, PretrainedConfig.get_config_dict, name)[0]
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in MODELS:
        kind = architecture or config.get("model_type") or "unknown kind"
        raise ValueError(f"{name}: is a checkpoint of {kind}, not of EVEREST (everest-hf convert takes VideoMAE's)")
    return architecture


def check_classifier(name: str) -> None:
    """Raise a ValueError unless a checkpoint holds a classifier."""
    architecture = architecture_of(name)
    if architecture != CLASSIFICATION:
        raise ValueError(
            f"{name}: is a checkpoint of {architecture}, which knows no labels; fine-tune it first: "
            f"accelerate launch train_accelerate.py --task finetune --model {name} --train VIDEOS"
        )


def _check_checkpoint_name(name: str) -> None:
    """Raise an error if `name` is no checkpoint folder and cannot be a Hub id."""
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name}: is a file; expected a checkpoint folder or Hub id (everest-hf convert makes one)")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name}: is no checkpoint; there is no config.json in this folder")
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{name}: no such checkpoint folder") from None


def load_checkpoint(name: str, architecture: str, **overrides):
    """Return a model of the class `architecture`, ready for inference, on a GPU if there is one, and its processor."""
    logging.disable_progress_bar()
    model = loaded(name, MODELS[architecture].from_pretrained, name, **overrides)
    processor = loaded(name, EverestVideoProcessor.from_pretrained, name)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def as_encoder(name: str) -> tuple[str, dict[str, Any]]:
    """Return the class, by its name, that gives a checkpoint's features, and fields of the configuration it is to have."""
    architecture = architecture_of(name)
    # So that what comes from pre-training has the encoder's final norm.
    return (FEATURES, {"use_mean_pooling": False}) if architecture == PRETRAINING else (architecture, {})


def load_encoder(name: str):
    """Return the model that gives a checkpoint's features, ready for inference, and its processor."""
    architecture, values = as_encoder(name)
    return load_checkpoint(name, architecture, **values)


def loaded(name: str, load: Callable, *args, **kwargs):
    """Return load(*args, **kwargs). If that fails, raise a ValueError of one line that begins with `name`."""
    try:
        return load(*args, **kwargs)
    except Exception as error:  # safetensors, torch and the Hub's client have errors of their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{name}: cannot be loaded: {reason}") from error
