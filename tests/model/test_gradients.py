"""Gradients: every weight's, under autocast and checkpointing; dropout and drop path."""

import warnings

import pytest
import torch
from helpers.models import HEADS, MODELS, assert_identical, assert_same_gradients, build, clips, gradients, loss_of
from helpers.tiny import tiny_config

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.modeling_everest import EverestDropPath


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("model_class", MODELS)
def test_every_weight_learns(model_class, autocast):
    model = build(model_class).train()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss, grads = gradients(model, clips())
    assert loss.dtype == torch.float32
    for name, grad in grads.items():
        assert torch.isfinite(grad).all()
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", HEADS)
def test_autocast_gives_nearly_the_same_loss(model_class, dtype):
    model = build(model_class).train()
    noise = {"noise": torch.rand(2, 24)} if model_class is EverestForPreTraining else {}
    expected = loss_of(model, clips(), **noise)
    with torch.autocast("cpu", dtype):
        assert loss_of(model, clips(), **noise).item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model_class, reentrant):
    overrides = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3}
    model = build(model_class, **overrides).train()
    torch.manual_seed(1)
    expected = gradients(model, clips())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every supported version
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    layers = [module for module in model.modules() if type(module).__name__ == "EverestAttention"]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: calls.append(module))
    if reentrant:  # it passes no gradient into a stretch of layers none of whose inputs has one
        model.enable_input_require_grads()
    torch.manual_seed(1)
    assert_same_gradients(gradients(model, clips()), expected)
    assert len(calls) == 2 * len(layers)  # each ran again in the backward pass


def test_frozen_weights_stay_without_gradient():
    model = build(EverestForVideoClassification)
    model.everest.requires_grad_(False)
    loss_of(model, clips()).backward()
    assert all(weight.grad is None for weight in model.everest.parameters())
    assert model.classifier.weight.grad.abs().max() > 0


# ------------------------------------------------------------------ dropout and drop path


@pytest.mark.parametrize("model_class", MODELS)
def test_drop_path_acts_in_training_only(model_class):
    dropping, plain = build(model_class, drop_path_rate=0.7), build(model_class)
    noise = {"noise": torch.rand(2, 24)} if model_class is EverestForPreTraining else {}
    assert_identical(dropping(clips(), **noise), plain(clips(), **noise))
    dropping.train()
    states = [dropping(clips(), output_hidden_states=True, **noise).hidden_states for _ in range(6)]
    last = torch.stack([layers[-1] for layers in states])
    assert not torch.equal(last[0], last[1:].mean(dim=0))
    first = torch.stack([layers[1] for layers in states])
    assert torch.equal(first[0], first[1])  # the rate of the first layer is 0


def test_drop_path_rises_from_layer_to_layer():
    model = EverestForPreTraining(tiny_config(drop_path_rate=0.3, num_hidden_layers=4, decoder_num_hidden_layers=2))
    assert [layer.drop_path.p for layer in model.everest.encoder.layers] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [layer.drop_path.p for layer in model.decoder.layers] == [0, 0]


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = EverestDropPath(0.25).train()
    x = torch.ones(20000, 3, 2)
    dropped = drop(x)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (dropped.flatten(1).std(dim=1) == 0).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "classifier_dropout"])
def test_dropout_acts_in_training_only(field):
    model = build(EverestForVideoClassification, **{field: 0.5})
    assert torch.equal(model(clips()).logits, model(clips()).logits)
    assert torch.equal(model(clips()).logits, build(EverestForVideoClassification)(clips()).logits)
    model.train()
    assert not torch.equal(model(clips()).logits, model(clips()).logits)
