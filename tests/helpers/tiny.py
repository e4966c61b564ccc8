"""The configuration that the tests share: small, and with no size that is a default or equal to another."""

from everest_hf import EverestConfig

TINY = {
    "image_size": (24, 40),
    "patch_size": 8,
    "num_frames": 12,
    "tubelet_size": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "layer_norm_eps": 1e-5,
    "head_layer_norm_eps": 2e-5,
    "decoder_hidden_size": 20,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 28,
    "image_mean": (0.4, 0.5, 0.6),
    "image_std": (0.2, 0.25, 0.3),
    "keep_ratio": 0.45,
    "pretraining_keep_ratio": 0.4,
    "mask_ratio": 0.85,
    "init_scale": 0.5,
    "num_labels": 5,
}


def tiny_config(**overrides) -> EverestConfig:
    """Return a configuration of 4 slots of 3 x 5 tokens: 60 tokens, 27 kept; 24 informative, 9 visible, 15 targets.

    A clip is (12, 3, 24, 40) for it. `overrides` replace fields.
    """
    return EverestConfig(**{**TINY, **overrides})
