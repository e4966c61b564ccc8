"""Reading what can be converted: official .pth files, and folders or Hub ids of Transformers' VideoMAE."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from transformers import VideoMAEConfig

from ..configuration_everest import EverestConfig
from .names import (
    KEY_BIAS,
    OFFICIAL_NAMES,
    POSITION_TABLE,
    PROJECTION,
    TRANSFORMERS_NAMES,
    check_fixed_table,
    rename,
    split_qkv,
)

# A checkpoint is for one of these tasks: it has a decoder, a head, or neither beside the encoder.
AUTOENCODER, CLASSIFIER, ENCODER = "pre-training", "classification", "features"


@dataclass
class Source:
    """A checkpoint as it was read.

    state: the tensors by EVEREST's names; the projection is still a 5-D kernel. original_names: the file's name for
    each of EVEREST's. config_fields, processor_fields: fields that config.json or the training arguments give. tables:
    names of the position tables that were recognised. set_aside: names of what the file holds beside the weights.
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
            return AUTOENCODER
        return CLASSIFIER if "classifier.weight" in self.state else ENCODER


def read_source(name_or_path: str) -> Source:
    """Read a file, a folder or a Hub id; names and errors as in `load_converted`."""
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
    if hasattr(content.get("args"), "use_cls_token"):  # of all projects with these names, MVD alone has this argument
        raise ValueError(f"{path}: is of MVD, whose table of positions is not the one of VideoMAE and EVEREST")
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
    """Remove the prefix that DistributedDataParallel and DeepSpeed put before every name."""
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
        why = ": V-JEPA 2 is another architecture, with rotary positions" if model_type == "vjepa2" else ""
        raise ValueError(f"{path}: model_type is {model_type!r}; expected {VideoMAEConfig.model_type!r}{why}")
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


# An id such as "MCG-NJU/videomae-base": a name, perhaps after its owner's, that does not end as a file's does.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FILE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
# Only the top folder is read: repositories may keep the checkpoints of a run in folders below it.
_PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_HUB_FILES = ["config.json", *_PROCESSOR_FILES, "model*.safetensors", "model.safetensors.index.json"]


def _download(name: str) -> Path:
    """Download what is missing of a Hub id and return its local folder."""
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
        # Official files hold the training's arguments, a plain Namespace, beside the weights. They also hold the
        # optimizer's state, which nobody reads and which a mapped file does not load.
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


def _renamed(name: str, format: str, tensors: dict, rules) -> Source:
    """Return the tensors under EVEREST's names, with query, key and value split and position tables left out."""
    source = Source(name, format, state={}, original_names={})
    for original, tensor in tensors.items():
        if POSITION_TABLE.fullmatch(original):
            check_fixed_table(name, original, tensor)
            source.tables.append(original)
            continue
        for new, part in split_qkv(rename(original, rules), tensor):
            if new.endswith(KEY_BIAS):
                source.set_aside.append(original)
                continue
            if new in source.state:
                raise ValueError(f"{name}: {original} and {source.original_names[new]} are both {new}")
            source.state[new], source.original_names[new] = part, original
    _check_architecture(source)
    return source


def _check_architecture(source: Source) -> None:
    kernel = source.state.get(PROJECTION)
    if kernel is None:
        names = ", ".join(list(source.original_names.values())[:4]) or "nothing"
        raise ValueError(
            f"{source.name}: is not a VideoMAE or EVEREST checkpoint: no patch projection; has {names}, …"
        )
    if kernel.ndim != 5 or kernel.shape[3] != kernel.shape[4]:
        raise ValueError(
            f"{source.name}: {source.original_names[PROJECTION]} has the shape {tuple(kernel.shape)}; expected "
            "(hidden size, channels, tubelet, patch, patch), as in a video model with square patches"
        )


def _fields_of_arguments(arguments) -> tuple[dict, dict]:
    """Return fields of the configuration and of the processor that the official code stores as training arguments."""
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


# Fields that the configurations of VideoMAE and EVEREST have in common; patch_size too, but VideoMAE's may be a pair.
SHARED_FIELDS = (
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


def _fields_of_videomae(content: dict, name: str) -> dict:
    """Return the fields of EverestConfig that the config.json of Transformers' VideoMAE gives."""
    try:
        config = VideoMAEConfig(**content)
    except Exception as error:  # the library's validation errors share no class across its versions
        raise ValueError(f"{name}: config.json: {' '.join(str(error).split())}") from error
    fields = {field: getattr(config, field) for field in SHARED_FIELDS}
    fields["patch_size"] = _square(config.patch_size, name)
    # VideoMAE builds the norms before its heads with PyTorch's own epsilon, whatever layer_norm_eps says.
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
    """Return the mean and standard deviation that the processor's file gives, if there is one."""
    for file in _PROCESSOR_FILES:
        if (folder / file).is_file():
            content = _read_json(folder / file)
            return _known_only({name: content.get(name) for name in ("image_mean", "image_std")})
    return {}
