"""Outputs of the models: states, attentions, scores, shapes, tuples."""

import copy

import pytest
import torch
from helpers.models import MODELS, assert_identical, build, clips, loss_of, main
from helpers.tiny import tiny_config
from torch import nn

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", MODELS)
def test_states_and_attentions_of_every_layer(model_class, attention):
    model = build(model_class, attention=attention, num_hidden_layers=3)
    plain = model(clips())
    output = model(clips(), output_hidden_states=True, output_attentions=True)
    tokens = 9 if model_class is EverestForPreTraining else 27
    assert [state.shape for state in output.hidden_states] == [(2, tokens, 32)] * 4
    assert [weights.shape for weights in output.attentions] == [(2, 4, tokens, tokens)] * 3
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, tokens))
    torch.testing.assert_close(main(output), main(plain), atol=1e-5, rtol=1e-5)
    assert plain.hidden_states is None
    assert plain.attentions is None
    if model_class is EverestModel:
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("model_class", MODELS)
def test_outputs_can_be_asked_for_in_the_config(model_class):
    model = build(model_class, output_hidden_states=True)
    assert len(model(clips()).hidden_states) == 3
    assert model(clips(), output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("model_class", MODELS)
def test_a_tuple_holds_the_same(model_class):
    model = build(model_class)
    for row, value in zip(model(clips(), return_dict=False), model(clips()).to_tuple(), strict=True):
        assert torch.equal(row, value)


@pytest.mark.parametrize("model_class", MODELS)
def test_scores_come_only_where_asked_for(model_class):
    model = build(model_class)
    assert model(clips()).scores is None
    scores = model(clips(), output_scores=True).scores
    assert scores.shape == (2, 60)
    assert scores.dtype == torch.float32


def test_the_final_norm_goes_with_the_pooling():
    pixel_values = clips()
    with_norm, without = build(EverestModel, use_mean_pooling=False), build(EverestModel)
    assert without.layernorm is None
    states = with_norm(pixel_values, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(with_norm.layernorm(states), with_norm(pixel_values).last_hidden_state)
    assert EverestForPreTraining(tiny_config()).everest.layernorm is not None


@pytest.mark.parametrize("model_class", MODELS)
def test_a_forward_on_the_meta_device_gives_the_shapes(model_class):
    real = build(model_class)(clips())
    with torch.device("meta"):
        shapes = model_class(tiny_config()).eval()(torch.empty(2, 12, 3, 24, 40))
    assert {name: value.shape for name, value in shapes.items()} == {name: value.shape for name, value in real.items()}


def test_a_copy_is_a_model_of_its_own():
    model = build(EverestForVideoClassification)
    twin = copy.deepcopy(model)
    assert_identical(twin(clips()), model(clips()))
    with torch.no_grad():
        twin.classifier.weight.zero_()
    assert not torch.equal(twin(clips()).logits, model(clips()).logits)


# ------------------------------------------------------------------ hooks


@pytest.mark.filterwarnings("ignore:For backward hooks")  # of the models, which return no tuple
@pytest.mark.filterwarnings("ignore:Full backward hook")  # of the embeddings, whose input has no gradient
@pytest.mark.parametrize("model_class", MODELS)
def test_hooks_of_every_kind_see_every_module(model_class):
    model, seen = build(model_class).train(), {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            kinds = seen[name] = set()
            module.register_forward_pre_hook(lambda *_, kinds=kinds: kinds.add("before"))
            module.register_forward_hook(lambda *_, kinds=kinds: kinds.add("after"))
            module.register_full_backward_hook(lambda *_, kinds=kinds: kinds.add("backward"))
    loss_of(model, clips()).backward()
    for name, kinds in seen.items():
        is_model = name in ("", "everest")
        is_constant = name.endswith("position_embeddings")
        assert kinds == {"before", "after"} | (set() if is_model or is_constant else {"backward"}), name
