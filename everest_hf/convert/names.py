"""The names that other code gives to weights, and EVEREST's names for them."""

import re

import torch

from ..embeddings_everest import sincos_table

# Patterns and replacements, applied to every name in this order. A result that EVEREST does not know is left over.
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
# The way back: from EVEREST's names to those of Transformers' VideoMAE.
NAMES_OF_VIDEOMAE = (
    (r"^everest\.embeddings\.projection\.", "videomae.embeddings.patch_embeddings.projection."),
    (r"^everest\.encoder\.layers\.", "videomae.encoder.layer."),
    (r"^everest\.layernorm\.", "videomae.layernorm."),
    (r"^decoder\.projection\.", "encoder_to_decoder."),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.layers\.", "decoder.decoder_layers."),
    (r"\.attention\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.attention\.output\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
POSITION_TABLE = re.compile(r"(.*\.)?(pos_embed|position_embeddings)")
PROJECTION = "everest.embeddings.projection.weight"
QKV = ".attention.qkv.weight"
# Some versions of Transformers' VideoMAE store a key bias. It shifts all scores of a query alike: softmax cancels it.
KEY_BIAS = ".attention.key.bias"


def rename(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def split_qkv(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if not name.endswith(QKV) or tensor.shape[0] % 3:
        return [(name, tensor)]
    stem = name.removesuffix("qkv.weight")
    return [
        (f"{stem}{part}.weight", rows) for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    ]


def check_fixed_table(name: str, key: str, table: torch.Tensor) -> None:
    """Raise a ValueError if a position table was learned: EVEREST computes a fixed one and would drop it silently."""
    flat = table.reshape(-1, table.shape[-1]).float()  # (N, D)
    if flat.shape[1] % 2 or not torch.allclose(flat, sincos_table(*flat.shape), atol=1e-3):
        raise ValueError(f"{name}: {key} is a learned position table; EVEREST has the fixed sine-cosine table")
