"""From a VideoMAE or official EVEREST checkpoint to a model, or to a checkpoint folder with a report.

From top to bottom: the two public functions, configuration, accounting, report.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from ..configuration_everest import EverestConfig
from ..files import put_in_place
from ..modeling_everest import EverestForPreTraining, EverestForVideoClassification, EverestModel
from ..video_processing_everest import EverestVideoProcessor
from .names import PROJECTION
from .sources import AUTOENCODER, CLASSIFIER, ENCODER, Source, read_source

logger = logging.get_logger(__name__)

MODEL_OF_TASK = {
    AUTOENCODER: EverestForPreTraining,
    CLASSIFIER: EverestForVideoClassification,
    ENCODER: EverestModel,
}


def load_converted(cls, name_or_path: str, **config_overrides):
    """Return a model of class `cls` with the weights of a VideoMAE or official EVEREST checkpoint.

    cls: EverestModel, EverestForPreTraining or EverestForVideoClassification.
    name_or_path: an official .pth file, a folder of Transformers' VideoMAE, or a Hub id of one.
    config_overrides: fields of EverestConfig, such as keep_ratio=0.6, num_frames=16 or num_labels=101; also dtype and
        attn_implementation, as in from_pretrained. A num_labels that differs from the checkpoint's makes a new head.

    Raises:
        FileNotFoundError: there is no such file, folder or Hub id.
        ValueError: the source is no such checkpoint, is damaged, lacks weights, or has weights of unknown names.
    """
    loading = {name: config_overrides.pop(name) for name in _LOADING_ARGUMENTS if name in config_overrides}
    source = read_source(name_or_path)
    return _build(cls, source, config_overrides, may_replace_head=True, **loading)[0]


def convert_checkpoint(source: str, out: str | os.PathLike, **config_overrides) -> ConversionReport:
    """Convert a VideoMAE or official EVEREST checkpoint, write it as a checkpoint folder, and report on it.

    source: as in `load_converted`. out: the folder to write; it appears when it is complete, or not at all.
    config_overrides: fields of EverestConfig. What the source holds decides the class of the model:
    EverestForPreTraining, EverestForVideoClassification, or EverestModel for a bare encoder.

    Raises:
        FileExistsError: `out` is a file, or a folder with something in it.
        FileNotFoundError, ValueError: as in `load_converted`.
    """
    out = Path(out)
    check_free(out)
    read = read_source(source)
    cls = MODEL_OF_TASK[read.task]
    model, report = _build(cls, read, config_overrides)
    processor = EverestVideoProcessor.from_config(model.config, **read.processor_fields)
    save_atomically(out, model, processor)
    report.out = str(out)
    return report


def _build(cls, source: Source, overrides: dict, may_replace_head: bool = False, **loading):
    """Return the loaded model and the report."""
    _check_overrides(overrides)
    fields = {**_fields_of(source, cls), **_with_label_names(overrides)}
    _check_heads(source, fields)
    config = cls.config_class(**fields)
    state, account = _account(cls, config, source, may_replace_head)
    # Tensors are copied. Otherwise the model would use memory that is mapped from the source's file, and query, key and
    # value would share one piece.
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model, info = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **loading)
    unforeseen = sorted(set(info["missing_keys"]) - set(account.new)) + sorted(info["unexpected_keys"])
    if unforeseen or info["mismatched_keys"]:
        raise RuntimeError(f"{source.name}: not loaded as planned: {unforeseen or info['mismatched_keys']}")
    return model, _report(source, model, account, overrides)


# ----------------------------------------------------------------------------------------------------- configuration

# Weights do not tell the number of heads. These are the published sizes: heads by width, of encoder and decoder.
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}

_LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
_LOADING_ARGUMENTS = ("dtype", "attn_implementation")


def _check_overrides(overrides: dict) -> None:
    known = [name for name in inspect.signature(EverestConfig).parameters if name != "kwargs"]
    unknown = sorted(set(overrides) - set(known) - set(_LABEL_FIELDS))
    if unknown:
        raise ValueError(f"unknown field of EverestConfig: {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def _with_label_names(overrides: dict) -> dict:
    """Return the overrides with both mappings of the labels: given ones, a mapping or a list, replace the source's."""
    fields = dict(overrides)
    if "id2label" in fields:
        labels = fields["id2label"]
        pairs = labels.items() if isinstance(labels, dict) else enumerate(labels)
        fields["id2label"] = {int(index): label for index, label in pairs}
        fields.setdefault("label2id", {label: index for index, label in fields["id2label"].items()})
    elif "num_labels" in fields:
        fields.update(id2label=None, label2id=None)
    return fields


def _fields_of(source: Source, cls) -> dict:
    """Return the fields of EverestConfig that a source gives, for a model of class `cls`."""
    fields = _sizes(source.state) if source.format == "official" else {}
    fields.update(source.config_fields)
    # The weights decide, as the field has had two names and some versions of the library ignore it.
    fields["qkv_bias"] = any(name.endswith("attention.query.bias") for name in source.state)
    if source.task == AUTOENCODER:
        # Pre-training knows no pooling. A bare encoder ends as the source's does; heads pool as EVEREST does.
        fields["use_mean_pooling"] = _NORM not in source.state or not _is_encoder(cls)
    elif source.format == "official":
        fields["use_mean_pooling"] = "fc_norm.weight" in source.state or _NORM not in source.state
    return fields


_NORM = "everest.layernorm.weight"


def _is_encoder(cls) -> bool:
    # By name: a class of remote code is not the class of this package.
    return cls.__name__ == EverestModel.__name__


def _sizes(state: dict[str, torch.Tensor]) -> dict:
    """Return the sizes of a model, by the shapes of its weights."""
    hidden_size, channels, tubelet_size, patch_size, _ = state[PROJECTION].shape
    fields = {
        "num_channels": channels,
        "tubelet_size": tubelet_size,
        "patch_size": patch_size,
        **_stack_sizes(state, "", hidden_size, "everest.encoder.layers.", _HEADS),
    }
    if "decoder.projection.weight" in state:
        width = state["decoder.projection.weight"].shape[0]
        fields.update(_stack_sizes(state, "decoder_", width, "decoder.layers.", _DECODER_HEADS))
    if "classifier.weight" in state:
        fields["num_labels"] = state["classifier.weight"].shape[0]
    return fields


def _stack_sizes(state: dict, prefix: str, width: int, layers: str, heads: dict[int, int]) -> dict:
    indices = [re.match(re.escape(layers) + r"(\d+)\.", name) for name in state]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max((int(index[1]) for index in indices if index), default=0),
        "num_attention_heads": heads.get(width),
    }
    first_mlp = state.get(f"{layers}0.mlp.fc1.weight")
    if first_mlp is not None:
        sizes["intermediate_size"] = first_mlp.shape[0]
    return {prefix + name: value for name, value in sizes.items()}


def _check_heads(source: Source, fields: dict) -> None:
    for name in ("num_attention_heads", "decoder_num_attention_heads"):
        if name in fields and fields[name] is None:
            width = fields[name.replace("num_attention_heads", "hidden_size")]
            raise ValueError(f"{source.name}: {name} cannot be read off weights of width {width}; give {name}=...")


# -------------------------------------------------------------------------------------------------------- accounting


@dataclass
class Account:
    """What became of the keys: how many tensors are `used`, and which names are `new` in the model."""

    used: int
    new: list[str]


def _account(cls, config, source: Source, may_replace_head: bool) -> tuple[dict[str, torch.Tensor], Account]:
    """Return the tensors that `cls` needs under its own names; a ValueError lists all that does not fit."""
    wanted = _shapes(cls, config)  # under the names of `cls`
    prefix = "everest." if _is_encoder(cls) else ""
    state = {name: _as_linear(name, tensor) for name, tensor in source.state.items()}
    if may_replace_head:
        state = _without_other_head(state, config, source)
    chosen = {name: state[prefix + name] for name in wanted if prefix + name in state}

    missing = [name for name in wanted if name not in chosen]
    new = [name for name in missing if name.startswith(_HEAD)] if "classifier.weight" not in state else []
    misshapen = [
        f"{source.original_names[prefix + name]} is {tuple(tensor.shape)} for {tuple(wanted[name])}"
        for name, tensor in chosen.items()
        if tensor.shape != wanted[name]
    ]
    # The source's own class must know every key; another class may leave out heads.
    is_whole = cls.__name__ == MODEL_OF_TASK[source.task].__name__
    understood = {prefix + name for name in chosen} | (set() if is_whole else _all_names(config))
    left_over = [source.original_names[name] for name in state if name not in understood]
    _check_account(cls, source, [name for name in missing if name not in new], left_over, misshapen)
    return chosen, Account(used=len(chosen), new=new)


_HEAD = ("classifier.", "fc_norm.", "pooling.")


def _as_linear(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The kernel (D, C, tubelet, patch, patch) is the matrix (D, P) in EVEREST's order of a token's pixels."""
    return tensor.flatten(1) if name == PROJECTION else tensor


def _without_other_head(state: dict, config, source: Source) -> dict:
    """Return the state without its classifier, with a warning, if that has another number of labels than `config`."""
    if "classifier.weight" not in state or state["classifier.weight"].shape[0] == config.num_labels:
        return state
    stored = state["classifier.weight"].shape[0]
    logger.warning(f"{source.name}: its head of {stored} labels is replaced by a new one of {config.num_labels}")
    return {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}


def _shapes(cls, config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in cls(config).state_dict().items()}


def _all_names(config) -> set[str]:
    """Return every name that a checkpoint of this configuration may hold for some task and pooling."""
    names = {*_shapes(EverestForPreTraining, config), *_shapes(EverestForVideoClassification, config)}
    return names | {f"{head}{part}" for head in ("classifier.", "fc_norm.") for part in ("weight", "bias")}


def _check_account(cls, source: Source, missing: list, left_over: list, misshapen: list) -> None:
    if source.task != AUTOENCODER and any(name.startswith("decoder.") for name in missing):
        raise ValueError(
            f"{source.name}: has no decoder, so it cannot become {cls.__name__}; give a pre-training checkpoint"
        )
    lists = {"missing": missing, "left over": left_over, "of another shape": misshapen}
    faults = [f"{name}: {', '.join(entries)}" for name, entries in lists.items() if entries]
    if faults:
        raise ValueError(f"{source.name}: does not fit {cls.__name__}; {'; '.join(faults)}")


# ------------------------------------------------------------------------------------------------------------ output


@dataclass
class ConversionReport:
    """What was converted; `str(report)` is for people.

    task: "pre-training", "classification" or "features". parameters: their number. tensors: how many the model has,
    all from the source. tables: the source's position tables, which EVEREST computes itself. set_aside: what the file
    holds beside weights. assumed: fields of the config that neither source nor caller gave, with their values.
    """

    source: str
    out: str
    format: str
    task: str
    model_class: str
    config: EverestConfig
    parameters: int
    dtype: str
    tensors: int
    tables: list[str]
    set_aside: list[str]
    assumed: dict

    def __str__(self) -> str:
        lines = {
            "source": f"{self.source} ({self.format} names, {self.task})",
            "model": f"{self.model_class}, {self._sizes()}",
            "input": self._input(),
            "tokens": self._tokens(),
            "weights": f"{self.parameters:,} parameters ({self.dtype}) in {self.tensors} tensors, all from the source",
            "recomputed": ", ".join(self.tables),
            "set aside": ", ".join(self.set_aside),
            "assumed": ", ".join(f"{name}={value}" for name, value in self.assumed.items()),
            "written": self.out,
        }
        return "\n".join(f"{name:14}{text}" for name, text in lines.items() if text)

    def _sizes(self) -> str:
        config = self.config
        text = f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads"
        if self.task == AUTOENCODER:
            text += (
                f"; decoder {config.decoder_num_hidden_layers} layers of {config.decoder_hidden_size}, "
                f"{config.decoder_num_attention_heads} heads"
            )
        return text + (f"; {config.num_labels} labels" if self.task == CLASSIFIER else "")

    def _input(self) -> str:
        config = self.config
        height, width = config.frame_size
        return (
            f"{config.num_input_frames} frames of {height} x {width}, {config.num_channels} channels, "
            f"tubelet {config.tubelet_size}, patch {config.patch_size}"
        )

    def _tokens(self) -> str:
        config = self.config
        if self.task == AUTOENCODER:
            return f"{config.num_visible_tokens} seen and {config.num_target_tokens} predicted of {config.num_tokens}"
        return f"{config.num_kept_tokens()} kept of {config.num_tokens} (keep_ratio {config.keep_ratio:g})"


# What no weight tells, and what a user may want to set.
_UNREADABLE = ("image_size", "num_frames", "keep_ratio", "pretraining_keep_ratio", "mask_ratio", "norm_pix_loss")


def _report(source: Source, model, account: Account, overrides: dict) -> ConversionReport:
    told = {*source.config_fields, *overrides}
    return ConversionReport(
        source=source.name,
        out="",
        format=source.format,
        task=source.task,
        model_class=type(model).__name__,
        config=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        tensors=account.used,
        tables=source.tables,
        set_aside=source.set_aside,
        assumed={name: getattr(model.config, name) for name in _UNREADABLE if name not in told},
    )


def check_free(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out}: is not empty; give a new folder")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is a file; give a folder")


def save_atomically(out: Path, model, processor) -> None:
    """Write to a temporary folder on the same disk and rename it, so that `out` is complete whenever it exists."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        folder = Path(aside) / out.name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if out.is_dir():
            out.rmdir()
        put_in_place(folder, out)
