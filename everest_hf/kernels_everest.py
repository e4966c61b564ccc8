"""What makes the models fast and changes no result.

Each function says in its docstring which plain formula it computes. Letters in shapes as in modeling_everest.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUActivation

# ------------------------------------------------------------------------------------------- the patch projection


def without_autocast(device_type: str):
    """Return a context in which autocast is off. The meta device knows no autocast."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def splits_products(device: torch.device) -> bool:
    """Whether a device computes products of float32 as three of bf16: NVIDIA's GPUs with matrix units for bf16 do."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    if "dtype" not in torch.ops.aten.mm.overloads():  # older versions of PyTorch round products in bf16 to bf16
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def split_float(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two bf16 tensors whose sum is x (float32), to 16 bits.

    The first is x cut off after 8 bits. No cast rounds it, because a compiler may leave out a cast there and back.
    """
    first = (x.view(torch.int32) & -(2**16)).view(torch.float32)
    return first.bfloat16(), (x - first).bfloat16()


def split_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` in float32, on matrix units for bf16: x (..., P) and weight (D, P) give (..., D).

    With x = x1 + x2 and weight = w1 + w2 in bf16, it adds up x1 w1 + x1 w2 + x2 w1 in float32. The error is 1e-5 of
    the result.
    """
    (x1, x2), (w1, w2) = split_float(x.flatten(0, -2)), split_float(weight)
    first = torch.mm(x1, torch.cat([w1, w2]).T, out_dtype=torch.float32)  # (rows, 2 * D)
    second = torch.mm(x2, w1.T, out_dtype=torch.float32)  # (rows, D)
    first, between = first.chunk(2, dim=-1)
    return (first + (between + second)).unflatten(0, x.shape[:-1])


class EverestPatchProjection(nn.Linear):
    """The 3-D patch projection as a matrix product over a token's pixels."""

    def forward(self, patches: torch.Tensor, float32: bool = False) -> torch.Tensor:
        """`patches @ weight.T + bias`: (..., P) gives (..., D).

        float32: compute in float32, whatever the precision of the weights and of autocast. The weights are cast here,
            inside the module, because hooks that offload weights bring them in only while the module runs.
        """
        if not float32:
            return super().forward(patches.to(self.weight.dtype))
        with without_autocast(patches.device.type):
            if splits_products(patches.device):
                return split_linear(patches.float(), self.weight.float()) + self.bias.float()
            return F.linear(patches.float(), self.weight.float(), self.bias.float())


def project(projection: nn.Module, patches: torch.Tensor, float32: bool = False) -> torch.Tensor:
    """`projection(patches)`, with `float32` in that precision.

    Quantisation puts another linear layer in the place of the projection. That layer takes nothing but its input, and
    is as exact as its own weights.
    """
    if any(isinstance(part, EverestPatchProjection) for part in projection.modules()):
        return projection(patches, float32=True) if float32 else projection(patches)
    if not float32:
        return projection(patches.to(dtype_of(projection)))
    with without_autocast(patches.device.type):
        return projection(patches.to(dtype_of(projection))).float()


def project_for_scores(projection: nn.Module, patches: torch.Tensor, num_slots: int) -> torch.Tensor:
    """`projection(patches)` of all tokens (B, t * S, P) in float32, up to what the slots have in common.

    Scores are distances between slots. A device that splits products projects the difference to the first slot: all
    distances stay the same, and the error of a small distance is small too.
    """
    if splits_products(patches.device):
        slots = patches.unflatten(1, (num_slots, -1))  # (B, t, S, P)
        patches = (slots.float() - slots[:, :1].float()).flatten(1, 2)
    return project(projection, patches, float32=True)


def serve_as_tokens(projection: nn.Module, patches: torch.Tensor) -> bool:
    """Whether what `project_for_scores` gave can be used as embedded tokens too, which saves a second projection.

    In training it cannot. There the kept tokens are projected again, so that the backward pass stores and computes
    no more than the share of the tokens that is kept.
    """
    trains = patches.requires_grad or any(weight.requires_grad for weight in projection.parameters())
    return not (torch.is_grad_enabled() and trains) and not splits_products(patches.device)


def dtype_of(projection: nn.Module) -> torch.dtype:
    """Return the precision of a projection's weights; float32 where quantisation hides it."""
    dtypes = (weight.dtype for weight in projection.parameters() if weight.is_floating_point())
    return next(dtypes, torch.float32)


def working_dtype(projection: nn.Module, device_type: str) -> torch.dtype:
    """Return the precision of what a projection gives: autocast's where that is on, otherwise the weights'."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype_of(projection)


# ------------------------------------------------------------------------------------------------------------- MLP

# Tokens whose hidden layer a CPU makes at a time in inference. The hidden layer of a whole batch is so large that the
# system maps and clears its memory in each layer, which takes longer than the activation (benchmarks/mlp.py).
TOKENS_AT_A_TIME = 2048


def mlp_forward(
    fc1: nn.Module,
    activation: nn.Module,
    fc2: nn.Module,
    hidden_states: torch.Tensor,
    mean: Callable[[torch.Tensor], torch.Tensor] | None = None,
    is_packed: bool = False,
    training: bool = False,
) -> torch.Tensor:
    """`fc2(activation(fc1(hidden_states)))` of (B, K, D); with `mean` that of its clips, (B, 1, D).

    mean: takes the mean of each clip's tokens. In inference a CPU does this for a few clips at a time, or, where the tokens
    of clips are packed and no mean is taken, for a few tokens.
    """
    transform = partial(_transform, fc1, activation, fc2, mean=mean, training=training)
    if torch.is_grad_enabled() or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return transform(hidden_states)
    clips, tokens = hidden_states.shape[:2]
    if is_packed and mean is None:
        return torch.cat([transform(part) for part in hidden_states.split(TOKENS_AT_A_TIME, dim=1)], dim=1)
    at_a_time = max(1, TOKENS_AT_A_TIME // tokens)
    if clips <= at_a_time:
        return transform(hidden_states)
    return torch.cat([transform(part) for part in hidden_states.split(at_a_time)])


def _transform(fc1, activation, fc2, hidden_states, mean: Callable | None, training: bool) -> torch.Tensor:
    hidden = fc1(hidden_states)
    finish = partial(_activate_and_project, fc1, activation, fc2, mean=mean)
    if training and torch.is_grad_enabled() and hidden.device.type != "cpu" and mean is None:
        # The activation is a quarter of all that would be kept for the backward pass. On a GPU, where memory limits the
        # batch, the backward pass computes it a second time instead, at little cost.
        return checkpoint(finish, hidden, use_reentrant=False, preserve_rng_state=False)
    return finish(hidden)


def _activate_and_project(fc1, activation, fc2, hidden: torch.Tensor, mean: Callable | None) -> torch.Tensor:
    hidden = activate(fc1, activation, hidden)
    # fc2 of the mean is the mean of what fc2 gives, because fc2 is linear. It takes 1 / K of the work.
    return fc2(hidden if mean is None else mean(hidden))


def activate(fc1: nn.Module, activation: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """`activation(hidden)` of what fc1 gave, in place where neither the backward pass nor a hook reads `hidden`."""
    if hidden.requires_grad or torch.compiler.is_compiling() or not isinstance(activation, GELUActivation):
        return activation(hidden)
    if has_hooks(*fc1.modules(), activation):
        return activation(hidden)
    return torch.ops.aten.gelu_(hidden)


def has_hooks(*modules: nn.Module) -> bool:
    """Whether anyone sees what these modules take or give.

    That is a hook on one of them, a hook on all modules, or a forward that replaces a module's own, as other libraries
    hook theirs.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)
