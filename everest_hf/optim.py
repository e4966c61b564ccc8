"""Parameter groups and the learning-rate schedule. Knows torch and nothing else of the project."""

import math
import re

from torch import nn

_ENCODER_LAYER = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")


def layer_id(name: str, num_layers: int) -> int:
    """Return the depth of a parameter: 0 for the embeddings, i + 1 for encoder layer i, num_layers + 1 for the rest."""
    if "embeddings.projection" in name:
        return 0
    match = _ENCODER_LAYER.search(name)
    return int(match[1]) + 1 if match else num_layers + 1


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0, num_layers: int
) -> list[dict]:
    """Group the trainable parameters for AdamW.

    Biases, norms and other parameters of one dimension (mask tokens count as such) get no weight decay. A parameter
    of depth d gets lr * layer_decay ** (num_layers + 1 - d), so the head learns fastest and the embeddings slowest.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = layer_id(name, num_layers)
        decays = parameter.squeeze().ndim > 1 and not name.endswith(".bias")
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "lr": lr * layer_decay ** (num_layers + 1 - depth),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def cosine_schedule(step: int, *, total_steps: int, warmup_steps: int, final_factor: float) -> float:
    """Return the factor on the peak learning rate at a step.

    Linear from 0 over warmup_steps, then half a cosine from 1 to final_factor = minimum / peak at total_steps.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2
