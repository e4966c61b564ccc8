"""Parameter groups, and the moving average of weights. Knows torch and nothing else of the project."""

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

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


class MovingAverage:
    """The exponential moving average of weights: average = decay * average + (1 - decay) * weight, each step.

    It starts at the weights as they are and leaves frozen ones out. Of a sharded model each process averages its own
    share; the state is whole.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take a step of the optimizer into the average."""
        self._average(self.values, self.parameters, None)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Put the average into the parameters' place for a while."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._copy(self.values)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        """Return the whole average, on the CPU. Every process of a sharded run calls it."""
        return {"values": [(v.full_tensor() if isinstance(v, DTensor) else v).cpu() for v in self.values]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        for value, saved in zip(self.values, state["values"], strict=True):
            if isinstance(value, DTensor):
                saved = distribute_tensor(saved.to(value.device), value.device_mesh, value.placements)
            value.copy_(saved)


def averaged(average: MovingAverage | None) -> AbstractContextManager:
    """Put a moving average into its model for a while, where there is one."""
    return average.applied() if average else nullcontext()
