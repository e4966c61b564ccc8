"""Conversion of VideoMAE and official EVEREST checkpoints to EVEREST for Transformers.

Two kinds of source are read: the .pth files of the official VideoMAE and EVEREST code, whose sizes are read off the
shapes, and VideoMAE checkpoints of Transformers (a folder or a Hub id), whose config.json is kept. Both come down to
one table of names; every key is used, set aside by name, or an error.

From top to bottom: the two public functions, sources, names, configuration, accounting, report.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from transformers import VideoMAEConfig
from transformers.utils import logging

from .configuration_everest import EverestConfig
from .modeling_everest import EverestForPreTraining, EverestForVideoClassification, EverestModel, sincos_table
from .video_processing_everest import EverestVideoProcessor

logger = logging.get_logger(__name__)

PRETRAINING, CLASSIFICATION, FEATURES = "pre-training", "classification", "features"
MODEL_OF_TASK = {
    PRETRAINING: EverestForPreTraining,
    CLASSIFICATION: EverestForVideoClassification,
    FEATURES: EverestModel,
}


def load_converted(cls, name_or_path: str, **config_overrides):
    """Return a model of class `cls` with the weights of a VideoMAE or official EVEREST checkpoint.

    cls: EverestModel, EverestForPreTraining or EverestForVideoClassification.
    name_or_path: an official .pth file, a folder of Transformers' VideoMAE, or a Hub id of one.
    config_overrides: fields of EverestConfig, such as keep_ratio=0.6, num_frames=16 or num_labels=101 (another number
        than the checkpoint has makes a new head); also dtype and attn_implementation, as in from_pretrained.

    Raises:
        FileNotFoundError: there is no such file, folder or Hub id.
        ValueError: the source is no such checkpoint, is damaged, lacks weights or has some that are not understood.
    """
    loading = {name: config_overrides.pop(name) for name in _LOADING_ARGUMENTS if name in config_overrides}
    source = read_source(name_or_path)
    return _build(cls, source, config_overrides, may_replace_head=True, **loading)[0]


def convert_checkpoint(source: str, out: str | os.PathLike, **config_overrides) -> ConversionReport:
    """Convert a VideoMAE or official EVEREST checkpoint into a complete checkpoint folder, and report on it.

    source: as in `load_converted`. out: the folder to write; it appears when it is complete, or not at all.
    config_overrides: fields of EverestConfig. The model is of the class that the source holds: EverestForPreTraining,
    EverestForVideoClassification, or EverestModel for a bare encoder.

    Raises:
        FileExistsError: `out` is a file, or a folder with something in it.
        FileNotFoundError, ValueError: as in `load_converted`.
    """
    out = Path(out)
    _check_free(out)
    read = read_source(source)
    cls = MODEL_OF_TASK[read.task]
    model, report = _build(cls, read, config_overrides)
    processor = EverestVideoProcessor.from_config(model.config, **read.processor_fields)
    _save_atomically(out, model, processor)
    report.out = str(out)
    return report


def _build(cls, source: Source, overrides: dict, may_replace_head: bool = False, **loading):
    """Return the loaded model and the report."""
    _check_overrides(overrides)
    fields = {**_fields_of(source, cls), **_with_label_names(overrides)}
    _check_heads(source, fields)
    config = cls.config_class(**fields)
    state, account = _account(cls, config, source, may_replace_head)
    # A copy of each tensor: the model would otherwise live on memory that is mapped from the source's file, and its
    # query, key and value on one piece.
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model, info = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **loading)
    unforeseen = sorted(set(info["missing_keys"]) - set(account.new)) + sorted(info["unexpected_keys"])
    if unforeseen or info["mismatched_keys"]:
        raise RuntimeError(f"{source.name}: not loaded as planned: {unforeseen or info['mismatched_keys']}")
    return model, _report(source, model, account, overrides)


# ----------------------------------------------------------------------------------------------------------- sources


@dataclass
class Source:
    """A checkpoint as read: tensors under EVEREST's names, and what is known beside them.

    state: the tensors, with the projection still a 5-D kernel. original_names: EVEREST's name to the file's.
    config_fields: what config.json or the training arguments say of EverestConfig; processor_fields: of the processor.
    tables: names of the position tables that were recognised. set_aside: what the file holds beside the weights.
    """

    name: str
    format: str
    state: dict[str, torch.Tensor]
    original_names: dict[str, str]
    config_fields: dict = field(default_factory=dict)
    processor_fields: dict = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)

    @property
    def task(self) -> str:
        if any(name.startswith("decoder.") for name in self.state):
            return PRETRAINING
        return CLASSIFICATION if "classifier.weight" in self.state else FEATURES


def read_source(name_or_path: str) -> Source:
    """Read a file, a folder or a Hub id; see `load_converted` for what may be given and for the errors."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return _read_official(path)
    if path.is_dir():
        return _read_transformers(path, str(name_or_path))
    return _read_transformers(_download(str(name_or_path)), str(name_or_path))


def _read_official(path: Path) -> Source:
    content = _load_tensors(path)
    tensors, set_aside = content, []
    if isinstance(content, dict):
        tensors = next((content[key] for key in ("model", "module") if isinstance(content.get(key), dict)), content)
        set_aside = [] if tensors is content else [str(key) for key in content if content[key] is not tensors]
    _check_tensors(path, tensors)
    tensors = _without_wrapper(tensors)
    if any("patch_embeddings.projection" in key for key in tensors):
        raise ValueError(f"{path}: has the names of Transformers' VideoMAE; give its folder, with config.json")
    source = _renamed(str(path), "official", tensors, OFFICIAL_NAMES)
    source.set_aside = set_aside
    source.config_fields, source.processor_fields = _fields_of_arguments(content.get("args"))
    return source


def _check_tensors(path: Path, content) -> None:
    expected = "expected tensors by name, bare or under 'model' or 'module'"
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; {expected}")
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if others:
        raise ValueError(f"{path}: is no state dict: {', '.join(map(repr, others[:8]))} is no tensor; {expected}")


def _without_wrapper(tensors: dict) -> dict:
    """Take off the prefix that DistributedDataParallel and DeepSpeed put before every name."""
    prefix = "module."
    if all(key.startswith(prefix) for key in tensors):
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _read_transformers(folder: Path, name: str) -> Source:
    config = _read_config(folder, name)
    tensors = {}
    for file in _weight_files(folder, name):
        shard = _load_tensors(file)
        _check_tensors(file, shard)
        tensors.update(shard)
    source = _renamed(name, "transformers", tensors, TRANSFORMERS_NAMES)
    source.config_fields = {**_fields_of_videomae(config, name), **_pixel_statistics(folder)}
    return source


def _read_config(folder: Path, name: str) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        hint = "".join(f"; give the file itself: {file}" for file in sorted(folder.glob("*.pth"))[:1])
        raise ValueError(f"{name}: no config.json in this folder{hint}")
    config = _read_json(path)
    model_type = config.get("model_type")
    if model_type == EverestConfig.model_type:
        raise ValueError(f"{name}: is an EVEREST checkpoint already; load it with from_pretrained")
    if model_type != VideoMAEConfig.model_type:
        raise ValueError(f"{path}: model_type is {model_type!r}; expected {VideoMAEConfig.model_type!r}")
    return config


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def _weight_files(folder: Path, name: str) -> list[Path]:
    """Return the files that hold the weights: one, or the shards that an index names."""
    for weights in _WEIGHTS:
        if (folder / weights).is_file():
            return [folder / weights]
        index = folder / f"{weights}.index.json"
        if index.is_file():
            files = [folder / shard for shard in sorted(set(_read_json(index).get("weight_map", {}).values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent or not files:
                raise ValueError(f"{index}: names shards that are not there: {', '.join(absent) or 'none at all'}")
            return files
    raise ValueError(f"{name}: no weights in this folder; expected {' or '.join(_WEIGHTS)}, single or sharded")


# ids such as "MCG-NJU/videomae-base": a name, or an owner and a name, without a file's ending
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FILE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
# Of the top folder alone: repositories may keep the checkpoints of a run in folders below.
_PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_HUB_FILES = ["config.json", *_PROCESSOR_FILES, "model*.safetensors", "model.safetensors.index.json"]


def _download(name: str) -> Path:
    """Return the local folder of a Hub id, downloading what is not there yet."""
    if not _HUB_ID.fullmatch(name) or name.endswith(_FILE_ENDINGS):
        raise FileNotFoundError(f"{name}: no such file or folder")
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, "pytorch_model*"]))
    except (OSError, HFValidationError) as error:
        why = f"{type(error).__name__}: {_first_line(error)}"
        raise FileNotFoundError(f"{name}: no such file or folder, nor on the Hub: {why}") from error
    return folder


def _load_tensors(path: Path):
    """Load a file of weights without running code from it."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Official files hold the training's arguments, a plain Namespace, beside the weights. Mapping the file
        # spares the memory of the optimizer's state, which nobody reads.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # on bytes that are no pickle, the unpickler raises whatever they make it raise
        raise ValueError(f"{path}: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    forbidden = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if forbidden:
        return f"holds a Python object, {forbidden[1]}, which is not loaded because it could run code"
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02") or path.suffix == ".safetensors":
        return f"is truncated or damaged: {_first_line(error)}"
    return "is not a PyTorch checkpoint"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------- names

# Pattern and replacement, applied to every name in this order. What comes out and is no name of EVEREST is left over.
OFFICIAL_NAMES = (
    (r"^(encoder\.)?patch_embed\.proj\.", "everest.embeddings.projection."),
    (r"^decoder\.blocks\.", "decoder.layers."),
    (r"^(encoder\.)?blocks\.", "everest.encoder.layers."),
    (r"^(encoder\.)?norm\.", "everest.layernorm."),
    (r"^encoder_to_decoder\.", "decoder.projection."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^head\.", "classifier."),
    (r"\.attn\.q_bias$", ".attention.query.bias"),
    (r"\.attn\.v_bias$", ".attention.value.bias"),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.output."),
)
TRANSFORMERS_NAMES = (
    (r"^videomae\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "everest.embeddings.projection."),
    (r"^decoder\.decoder_layers\.", "decoder.layers."),
    (r"^encoder\.layer\.", "everest.encoder.layers."),
    (r"^layernorm\.", "everest.layernorm."),
    (r"^encoder_to_decoder\.", "decoder.projection."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"\.attention\.attention\.q_bias$", ".attention.query.bias"),
    (r"\.attention\.attention\.v_bias$", ".attention.value.bias"),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.attention\.output\.dense\.", ".attention.output."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
_POSITION_TABLE = re.compile(r"(.*\.)?(pos_embed|position_embeddings)")
_PROJECTION = "everest.embeddings.projection.weight"
_QKV = ".attention.qkv.weight"
# Some versions of Transformers' VideoMAE store one. It adds the same to all scores of a query, and softmax cancels it.
_KEY_BIAS = ".attention.key.bias"


def _renamed(name: str, format: str, tensors: dict, rules) -> Source:
    """Give the tensors EVEREST's names, split query, key and value, and recognise position tables."""
    source = Source(name, format, state={}, original_names={})
    for original, tensor in tensors.items():
        if _POSITION_TABLE.fullmatch(original):
            _check_fixed_table(name, original, tensor)
            source.tables.append(original)
            continue
        for new, part in _split_qkv(_rename(original, rules), tensor):
            if new.endswith(_KEY_BIAS):
                source.set_aside.append(original)
                continue
            if new in source.state:
                raise ValueError(f"{name}: {original} and {source.original_names[new]} are both {new}")
            source.state[new], source.original_names[new] = part, original
    _check_architecture(source)
    return source


def _rename(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _split_qkv(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if not name.endswith(_QKV) or tensor.shape[0] % 3:
        return [(name, tensor)]
    stem = name.removesuffix("qkv.weight")
    return [
        (f"{stem}{part}.weight", rows) for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    ]


def _check_fixed_table(name: str, key: str, table: torch.Tensor) -> None:
    """EVEREST computes the sine-cosine table; a learned one in its place would be lost without a word."""
    flat = table.reshape(-1, table.shape[-1]).float()  # (N, D)
    if flat.shape[1] % 2 or not torch.allclose(flat, sincos_table(*flat.shape), atol=1e-3):
        raise ValueError(f"{name}: {key} is a learned position table; EVEREST has the fixed sine-cosine table")


def _check_architecture(source: Source) -> None:
    kernel = source.state.get(_PROJECTION)
    if kernel is None:
        names = ", ".join(list(source.original_names.values())[:4]) or "nothing"
        raise ValueError(
            f"{source.name}: is not a VideoMAE or EVEREST checkpoint: no patch projection; has {names}, …"
        )
    if kernel.ndim != 5 or kernel.shape[3] != kernel.shape[4]:
        raise ValueError(
            f"{source.name}: {source.original_names[_PROJECTION]} has the shape {tuple(kernel.shape)}; expected "
            "(hidden size, channels, tubelet, patch, patch), as in a video model with square patches"
        )


# ----------------------------------------------------------------------------------------------------- configuration

# Heads cannot be read off the weights. These are the sizes that exist, encoder and decoder.
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}

_KEPT_FIELDS = (
    "image_size",
    "num_channels",
    "num_frames",
    "tubelet_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "use_mean_pooling",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
    "norm_pix_loss",
    "id2label",
    "label2id",
    "problem_type",
)
_LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
_LOADING_ARGUMENTS = ("dtype", "attn_implementation")


def _check_overrides(overrides: dict) -> None:
    known = [name for name in inspect.signature(EverestConfig).parameters if name != "kwargs"]
    unknown = sorted(set(overrides) - set(known) - set(_LABEL_FIELDS))
    if unknown:
        raise ValueError(f"unknown field of EverestConfig: {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def _with_label_names(overrides: dict) -> dict:
    """Labels that are given, a mapping or a list, replace those of the checkpoint, both ways of the mapping."""
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
    """Return the fields of EverestConfig that a source says, for a model of class `cls`."""
    fields = _sizes(source.state) if source.format == "official" else {}
    fields.update(source.config_fields)
    # From the weights: the field of the configuration has had two names, and versions of the library that ignore it.
    fields["qkv_bias"] = any(name.endswith("attention.query.bias") for name in source.state)
    if source.task == PRETRAINING:
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
    """Read the sizes of a model off the shapes of its weights."""
    hidden_size, channels, tubelet_size, patch_size, _ = state[_PROJECTION].shape
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


def _fields_of_arguments(arguments) -> tuple[dict, dict]:
    """Read what the official code keeps in its arguments instead of the model: fields of config and processor."""
    known = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    fields = {
        "image_size": known.get("input_size"),
        "num_frames": known["num_frames"] * known.get("num_segments", 1) if "num_frames" in known else None,
        "norm_pix_loss": known.get("normlize_target"),
    }
    if known.get("mcm"):
        fields["keep_ratio"] = _complement(known.get("mcm_ratio"))
    if known.get("mask_type") == "motion-centric":
        fields["pretraining_keep_ratio"] = _complement(known.get("motion_centric_masking_ratio"))
        fields["mask_ratio"] = known.get("mask_ratio")
    processor = {"frame_step": known.get("sampling_rate")}
    return _known_only(fields), _known_only(processor)


def _complement(ratio: float | None) -> float | None:
    return None if ratio is None else round(1 - ratio, 9)


def _known_only(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if value is not None}


def _fields_of_videomae(content: dict, name: str) -> dict:
    """Translate the config.json of Transformers' VideoMAE."""
    try:
        config = VideoMAEConfig(**content)
    except Exception as error:  # the library's validation errors share no class across its versions
        raise ValueError(f"{name}: config.json: {' '.join(str(error).split())}") from error
    fields = {field: getattr(config, field) for field in _KEPT_FIELDS}
    fields["patch_size"] = _square(config.patch_size, name)
    # The norms in front of its heads are PyTorch's, whatever layer_norm_eps says.
    fields["head_layer_norm_eps"] = torch.nn.LayerNorm(1).eps
    if config.num_channels != len(EverestConfig().image_mean):
        # VideoMAE undoes the normalisation of RGB only.
        fields.update(image_mean=[0.0] * config.num_channels, image_std=[1.0] * config.num_channels)
    return fields


def _square(size, name: str) -> int:
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise ValueError(f"{name}: config.json: patch_size is {size}; EVEREST has square patches")
    return sides.pop()


def _pixel_statistics(folder: Path) -> dict:
    """Read from the processor's file, where there is one, how pixel values were normalised."""
    for file in _PROCESSOR_FILES:
        if (folder / file).is_file():
            content = _read_json(folder / file)
            return _known_only({name: content.get(name) for name in ("image_mean", "image_std")})
    return {}


# -------------------------------------------------------------------------------------------------------- accounting


@dataclass
class Account:
    """Where every key went: the number of tensors `used`, and the names that are `new` in the model."""

    used: int
    new: list[str]


def _account(cls, config, source: Source, may_replace_head: bool) -> tuple[dict[str, torch.Tensor], Account]:
    """Choose the tensors of `cls` under its own names, or raise a ValueError that lists all that does not fit."""
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
    # What the source's own class has no place for is understood by nobody; another class may leave heads aside.
    is_whole = cls.__name__ == MODEL_OF_TASK[source.task].__name__
    understood = {prefix + name for name in chosen} | (set() if is_whole else _all_names(config))
    left_over = [source.original_names[name] for name in state if name not in understood]
    _check_account(cls, source, [name for name in missing if name not in new], left_over, misshapen)
    return chosen, Account(used=len(chosen), new=new)


_HEAD = ("classifier.", "fc_norm.", "pooling.")


def _as_linear(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The kernel (D, C, tubelet, patch, patch) is the matrix (D, P) in EVEREST's order of a token's pixels."""
    return tensor.flatten(1) if name == _PROJECTION else tensor


def _without_other_head(state: dict, config, source: Source) -> dict:
    """Leave out a classifier of another number of labels than was asked for, and say so."""
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
    if source.task != PRETRAINING and any(name.startswith("decoder.") for name in missing):
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
    """What was converted; `str` of it is for reading.

    task: "pre-training", "classification" or "features". parameters: their number. tensors: number of tensors in the
    model, each of them from the source. tables: position tables of the source, computed anew. set_aside: what the
    file holds beside weights. assumed: fields of the config that neither source nor caller gave, with their values.
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
            "computed anew": ", ".join(self.tables),
            "set aside": ", ".join(self.set_aside),
            "assumed": ", ".join(f"{name}={value}" for name, value in self.assumed.items()),
            "written": self.out,
        }
        return "\n".join(f"{name:14}{text}" for name, text in lines.items() if text)

    def _sizes(self) -> str:
        config = self.config
        text = f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads"
        if self.task == PRETRAINING:
            text += (
                f"; decoder {config.decoder_num_hidden_layers} layers of {config.decoder_hidden_size}, "
                f"{config.decoder_num_attention_heads} heads"
            )
        return text + (f"; {config.num_labels} labels" if self.task == CLASSIFICATION else "")

    def _input(self) -> str:
        config = self.config
        height, width = config.frame_size
        return (
            f"{config.num_input_frames} frames of {height} x {width}, {config.num_channels} channels, "
            f"tubelet {config.tubelet_size}, patch {config.patch_size}"
        )

    def _tokens(self) -> str:
        config = self.config
        if self.task == PRETRAINING:
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


def _check_free(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out}: is not empty; give a new folder")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is a file; give a folder")


def _save_atomically(out: Path, model, processor) -> None:
    """Write aside, on the same disk, and rename: a folder that is there is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        folder = Path(aside) / out.name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
