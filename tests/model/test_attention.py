"""Attention: its implementations, dropout and biases."""

import pytest
import torch
from helpers.models import ATTENTIVE, DTYPES, MODELS, build, clips, main
from helpers.tiny import tiny_config

from everest_hf import EverestForVideoClassification, EverestModel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_class", MODELS)
def test_sdpa_equals_eager(model_class, dtype):
    fused, eager = (build(model_class, attention=name).to(dtype) for name in ("sdpa", "eager"))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 1e-2}[dtype]
    with torch.no_grad():
        first, second = fused(clips().to(dtype)), eager(clips().to(dtype))
    torch.testing.assert_close(main(first), main(second), atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_flex_attention_equals_eager_in_inference():
    # Without gradients only: torch has no backward pass of flex attention on a CPU.
    flex, eager = (
        build(EverestForVideoClassification, attention="flex_attention"),
        build(EverestForVideoClassification, attention="eager"),
    )
    with torch.no_grad():
        torch.testing.assert_close(flex(clips()).logits, eager(clips()).logits, atol=1e-5, rtol=1e-5)


def test_flash_attention_equals_eager():
    flash_attn = pytest.importorskip("flash_attn", reason="flash attention is not installed")
    assert flash_attn
    if not torch.cuda.is_available():
        pytest.skip("flash attention needs a GPU")
    models = [build(EverestForVideoClassification, attention=name) for name in ("flash_attention_2", "eager")]
    with torch.no_grad():
        first, second = (model.to("cuda", torch.bfloat16)(clips().cuda()).logits for model in models)
    torch.testing.assert_close(first, second, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attentive_pooling_is_the_same_in_both_implementations(dtype):
    fused, eager = (
        build(EverestForVideoClassification, attention=name, **ATTENTIVE).to(dtype) for name in ("sdpa", "eager")
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 1e-2}[dtype]
    with torch.no_grad():
        first, second = fused(clips().to(dtype)), eager(clips().to(dtype))
    torch.testing.assert_close(first.logits, second.logits, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_dropout_acts_in_training_only(attention):
    model = build(EverestForVideoClassification, attention=attention, attention_probs_dropout_prob=0.5)
    assert torch.equal(model(clips()).logits, model(clips()).logits)
    model.train()
    assert not torch.equal(model(clips()).logits, model(clips()).logits)


def test_key_has_no_bias_and_query_and_value_as_configured():
    for bias in (True, False):
        attention = EverestModel(tiny_config(qkv_bias=bias)).encoder.layers[0].attention
        assert attention.key.bias is None
        assert (attention.query.bias is not None) is bias
        assert (attention.value.bias is not None) is bias
