"""What an unknown name of an option or a field may have been meant as."""

import difflib
from collections.abc import Collection, Mapping, Sequence

# Fields of a recipe by what Transformers' Trainer and its examples, timm and VideoMAE's scripts call them.
NAMES_ELSEWHERE = {
    "lr": "base_lr",
    "blr": "base_lr",
    "learning_rate": "base_lr",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "per_gpu_train_batch_size": "batch_size",
    "model_name_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "data_path": "train",
    "dataset_name": "train",
    "train_dir": "train",
    "train_file": "train",
    "validation_dir": "val",
    "validation_file": "val",
    "dataloader_num_workers": "num_workers",
    "warmup_ratio": "warmup_epochs",
    "warmup_steps": "warmup_epochs",
    "max_grad_norm": "clip_grad",
    "label_smoothing_factor": "label_smoothing",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "do_eval": "eval_only",
    "overwrite_output_dir": "overwrite",
    "hub_model_id": "push_to_hub",
    "torch_compile": "compile",
}


def hint(name: str, known: Sequence[str], fields: Mapping[str, str], config_fields: Collection[str]) -> str:
    """Say what a name that is not among the known ones may have been meant as.

    name, known: both with the dashes of an option, or both without. fields: those of a recipe with their meanings.
    config_fields: those of the model's configuration.
    """
    dashes, plain = "--" * name.startswith("--"), name.strip("-").replace("-", "_")
    meant = NAMES_ELSEWHERE.get(plain, plain)
    if dashes + meant in known:
        return f"did you mean {dashes + meant!r}, {fields[meant]}?"
    if plain in config_fields:
        return f"it is a field of the model: --config {plain}=VALUE" if dashes else "it is a field of config"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
