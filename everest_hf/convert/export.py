"""From an EVEREST checkpoint back to a VideoMAE of Transformers, which is what EVEREST is at keep_ratio 1."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VideoMAEModel,
)

from ..configuration_everest import IMAGENET_MEAN, IMAGENET_STD, EverestConfig
from ..modeling_everest import EverestForPreTraining, EverestForVideoClassification, EverestModel
from .checkpoint import check_free, save_atomically
from .names import NAMES_OF_VIDEOMAE, PROJECTION, rename
from .sources import SHARED_FIELDS

# By the name of a class in config.json: the class, and that of VideoMAE.
_CLASSES: dict[str, tuple[Any, Any]] = {
    "EverestModel": (EverestModel, VideoMAEModel),
    "EverestForPreTraining": (EverestForPreTraining, VideoMAEForPreTraining),
    "EverestForVideoClassification": (EverestForVideoClassification, VideoMAEForVideoClassification),
}


@dataclass
class ExportReport:
    """What was written: the class of VideoMAE, its number of parameters, and what it has no place for."""

    source: str
    out: str
    model_class: str
    parameters: int
    changed: list[str]

    def __str__(self) -> str:
        lines = {
            "source": self.source,
            "model": f"{self.model_class}, {self.parameters:,} parameters",
            "changed": "; ".join(self.changed),
            "written": self.out,
        }
        return "\n".join(f"{name:14}{text}" for name, text in lines.items() if text)


def convert_to_videomae(source: str | os.PathLike, out: str | os.PathLike) -> ExportReport:
    """Write the VideoMAE that an EVEREST checkpoint is at keep_ratio 1, with an image processor, and report on it.

    source: a folder. out: the folder to write; it appears when it is complete, or not at all.

    Raises:
        FileExistsError: `out` is a file, or a folder with something in it.
        OSError, ValueError: the source is no checkpoint of EVEREST, or one that VideoMAE has no place for.
    """
    out = Path(out)
    check_free(out)
    config = EverestConfig.from_pretrained(source)
    name = (config.architectures or ["none"])[0]
    if name not in _CLASSES:
        raise ValueError(f"{source}: config.json names the class {name}; expected one of {', '.join(_CLASSES)}")
    everest, videomae = _CLASSES[name]
    fields = _fields_of(config, everest, str(source))
    model = everest.from_pretrained(source)
    converted = videomae(VideoMAEConfig(**fields)).to(model.dtype)
    converted.load_state_dict(_state_of(model, converted.state_dict()))
    processor = VideoMAEImageProcessor(
        # The short side, scaled to the longer one of the model, covers a crop of any shape.
        size={"shortest_edge": max(config.frame_size)},
        crop_size=dict(zip(("height", "width"), config.frame_size, strict=True)),
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )
    save_atomically(out, converted, processor)
    parameters = sum(weight.numel() for weight in model.parameters())
    return ExportReport(str(source), str(out), videomae.__name__, parameters, _changes(config, everest))


def _fields_of(config: EverestConfig, cls: type, source: str) -> dict:
    """Return the fields of VideoMAEConfig, or raise a ValueError that names what VideoMAE does not have."""
    if config.attentive_pooling:
        raise ValueError(f"{source}: attentive_pooling is true; VideoMAE has no pooling by attention")
    if config.num_input_frames > config.num_frames:
        raise ValueError(f"{source}: frame_oversampling is {config.frame_oversampling}; VideoMAE chooses no frames")
    fields = {name: getattr(config, name) for name in (*SHARED_FIELDS, "patch_size")}
    known = inspect.signature(VideoMAEConfig).parameters
    fields["qv_bias" if "qv_bias" in known else "qkv_bias"] = config.qkv_bias
    if cls is EverestForPreTraining:
        fields["use_mean_pooling"] = False  # its encoder ends with a norm
        is_rgb = config.num_channels == len(IMAGENET_MEAN)
        statistics = (IMAGENET_MEAN, IMAGENET_STD) if is_rgb else ((0.0,), (1.0,))
        for name, expected in zip(("image_mean", "image_std"), statistics, strict=True):
            value, wanted = getattr(config, name), list(expected) if is_rgb else list(expected) * config.num_channels
            if value != wanted:
                raise ValueError(f"{source}: {name} is {value}; the loss of VideoMAE is for {wanted}")
    return fields


def _state_of(model, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under VideoMAE's names, as this version of Transformers has them."""
    bare = isinstance(model, EverestModel)
    state = {}
    for name, tensor in model.state_dict().items():
        own = f"everest.{name}" if bare else name
        new = rename(own, NAMES_OF_VIDEOMAE)
        new = new.removeprefix("videomae.") if bare else new
        if new not in wanted:  # older versions
            new = new.replace(".query.bias", ".q_bias").replace(".value.bias", ".v_bias")
        state[new] = tensor.reshape(wanted[new].shape) if own == PROJECTION else tensor
    for name, tensor in wanted.items():
        if name.endswith(".key.bias"):  # some versions have one; it changes nothing
            state[name] = torch.zeros_like(tensor)
    return state


def _changes(config: EverestConfig, cls: type) -> list[str]:
    changes = []
    if cls is not EverestForPreTraining and config.keep_ratio < 1:
        changes.append(f"keep_ratio {config.keep_ratio:g} is 1: all tokens go through the encoder")
    default = torch.nn.LayerNorm(1).eps
    if cls is not EverestModel and config.head_layer_norm_eps != default:
        changes.append(f"head_layer_norm_eps {config.head_layer_norm_eps:g} is {default:g}")
    return changes
