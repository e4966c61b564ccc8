"""Attention: implementations beside those of Transformers, and attention that keeps to the clip in packed tokens.

Queries are (B, heads, Q, d), keys and values (B, heads, K, d). All return (B, Q, heads, d), and the weights or None. Of
packed tokens B is 1, and Q and K are those of all clips. Other letters in shapes as in modeling_everest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from .packing_everest import Packing

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]

# Queries of a block: the weights of a block then stay in the cache of a CPU core (benchmarks/attention.py).
QUERIES_AT_A_TIME = 256


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as two matrix products, with the weights (B, heads, Q, K)."""
    weights = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(weights.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def blocks_are_faster(query: torch.Tensor) -> bool:
    """Whether `blocked_attention_forward` is faster than the fused kernel: in 16 bits on a CPU, up to twice.

    Its backward pass keeps the attention weights, which the fused kernel does not.
    """
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)


def blocked_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """`softmax(scaling * query @ key.T) @ value`, a block of queries at a time, without a mask and without weights."""
    outputs = []
    for block in query.split(QUERIES_AT_A_TIME, dim=2):
        weights = ((block * scaling) @ key.transpose(2, 3)).softmax(dim=-1)  # (B, heads, block, K)
        weights = F.dropout(weights, p=dropout, training=module.training)
        outputs.append((weights @ value).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


# ---------------------------------------------------------------------------------------------------- packed tokens


def attend_packed(
    attend: Callable,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: Packing,
    keys: Packing,
    scaling: float,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let each clip's queries attend to the tokens of that clip alone.

    attend: the implementation that the config names, or the eager one. Kernels for packed tokens are chosen here by name.
    The others would take the lengths for options that they do not know, and let clips attend to each other, so they get
    one clip at a time.
    """
    name, compiling = module.config._attn_implementation, torch.compiler.is_compiling()
    lengths = queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest
    if output_attentions or (compiling and attend is eager_attention_forward):
        alike = _clips_alike(queries, keys, query.shape[2], key.shape[2])
        mask = torch.where(alike, 0.0, -torch.inf).to(query.dtype)
        return attend(module, query, key, value, mask, scaling)
    if "flash" in name:
        names = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
        options = dict(zip(names, lengths, strict=True))
        return attend(module, query, key, value, None, scaling=scaling, is_causal=False, **options)
    if name == "flex_attention":
        mask = _block_mask(queries, keys, query.shape[2], key.shape[2])
        return attend(module, query, key, value, mask, scaling=scaling)
    if name == "sdpa" and _has_varlen(query):
        # It scales by 1 / sqrt(d) by itself, as EverestAttention does. In torch 2.10 no other scale can be given.
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, d)
        attended: Any = varlen_attn(query, key, value, *lengths)
        return attended[None], None
    if compiling and name == "sdpa":
        return torch.ops.everest.attend_segments(query, key, value, *lengths[:2], scaling), None
    return attend_one_by_one(attend, module, query, key, value, *lengths[:2], scaling), None


def _has_varlen(query: torch.Tensor) -> bool:
    """Whether flash attention takes packed queries (1, heads, Q, d): on NVIDIA's GPUs from Ampere on, in 16 bits."""
    if varlen_attn is None or not query.is_cuda or torch.version.hip is not None:
        return False
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _clips_alike(queries: Packing, keys: Packing, num_queries: int, num_keys: int) -> torch.Tensor:
    """Return whether a query and a key are of one clip, (Q, K) bool."""
    return queries.clip_of(num_queries)[:, None] == keys.clip_of(num_keys)


def _block_mask(queries: Packing, keys: Packing, num_queries: int, num_keys: int):
    clip_of_query, clip_of_key = queries.clip_of(num_queries), keys.clip_of(num_keys)

    def is_alike(batch, head, query, key):
        return clip_of_query[query] == clip_of_key[key]

    return create_block_mask(is_alike, None, None, num_queries, num_keys, device=clip_of_query.device)


def attend_one_by_one(attend, module, query, key, value, cu_queries, cu_keys, scaling: float) -> torch.Tensor:
    """Call an implementation for each clip, and lay what it gives one after the other: (1, Q, heads, d).

    cu_queries, cu_keys: (B + 1,), as `Packing.cu_seqlens`.
    """
    num_queries, num_keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    clips = zip(query.split(num_queries, 2), key.split(num_keys, 2), value.split(num_keys, 2), strict=True)
    return torch.cat([attend(module, *clip, None, scaling=scaling, is_causal=False)[0] for clip in clips], dim=1)


# A compiled graph cannot cut tensors at lengths that it does not know. It takes these operators as a whole.


def _fused_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


def _attend_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    return attend_one_by_one(_fused_attention_forward, None, query, key, value, cu_queries, cu_keys, scaling)


def _segments_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value. The weights of attention are computed a second time."""
    num_queries, num_keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    of_queries = (x.split(num_queries, 2) for x in (gradient.transpose(1, 2), query))
    of_keys = (x.split(num_keys, 2) for x in (key, value))
    found = []
    for gradient, query, key, value in zip(*of_queries, *of_keys, strict=True):
        weights = (scaling * query @ key.mT).softmax(dim=-1)  # (1, heads, Q, K)
        slopes = gradient @ value.mT  # of the weights
        slopes = scaling * weights * (slopes - (slopes * weights).sum(-1, keepdim=True))  # of query @ key.mT
        found.append((slopes @ key, slopes.mT @ query, weights.mT @ gradient))
    of_query, of_key, of_value = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    return of_query, of_key, of_value


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, gradient: torch.Tensor):
    return *torch.ops.everest.attend_segments_backward(gradient, *ctx.saved_tensors, ctx.scaling), None, None, None


if not hasattr(torch.ops.everest, "attend_segments"):  # a checkpoint's copy of this file does not register it again
    forward_operator = torch.library.custom_op("everest::attend_segments", _attend_segments, mutates_args=())
    forward_operator.register_fake(lambda query, *others: query.new_empty(query.transpose(1, 2).shape))
    forward_operator.register_autograd(_differentiate, setup_context=_keep_for_backward)
    backward_operator = torch.library.custom_op(
        "everest::attend_segments_backward", _segments_backward, mutates_args=()
    )
    backward_operator.register_fake(lambda gradient, *others: tuple(x.new_empty(x.shape) for x in others[:3]))
