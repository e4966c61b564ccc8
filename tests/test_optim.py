"""Parameter groups and the schedule, against values worked out by hand."""

import math

import pytest
import torch
from tiny import tiny_config

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.optim import cosine_schedule, layer_id, parameter_groups

LR, WEIGHT_DECAY, LAYER_DECAY = 0.8, 0.05, 0.5


def groups_by_name(model, **kwargs) -> dict[str, dict]:
    """The group of each trainable parameter, by the parameter's name."""
    settings = {"lr": LR, "weight_decay": WEIGHT_DECAY, "num_layers": model.config.num_hidden_layers}
    groups = parameter_groups(model, **settings, **kwargs)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    return {name: group_of[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def classifier():
    return EverestForVideoClassification(tiny_config(num_hidden_layers=3))


@pytest.fixture(scope="module")
def pretrainer():
    return EverestForPreTraining(tiny_config(num_hidden_layers=3))


@pytest.mark.parametrize("model_name", ["classifier", "pretrainer"])
def test_every_parameter_is_in_one_group(request, model_name):
    model = request.getfixturevalue(model_name)
    groups = parameter_groups(model, lr=LR, weight_decay=WEIGHT_DECAY, num_layers=3)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    torch.optim.AdamW(groups)  # takes them


def test_frozen_parameters_are_left_out():
    model = EverestForVideoClassification(tiny_config())
    for parameter in model.everest.embeddings.parameters():
        parameter.requires_grad = False
    groups = parameter_groups(model, lr=LR, weight_decay=WEIGHT_DECAY, num_layers=2)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) < len(list(model.parameters()))


@pytest.mark.parametrize("model_name", ["classifier", "pretrainer"])
def test_only_matrices_decay(request, model_name):
    model = request.getfixturevalue(model_name)
    groups = groups_by_name(model)
    decaying = {name for name, group in groups.items() if group["weight_decay"]}
    spared = set(groups) - decaying
    assert all(groups[name]["weight_decay"] == WEIGHT_DECAY for name in decaying)
    assert all(name.endswith(".weight") and "norm" not in name for name in decaying)
    assert all("norm" in name or name.endswith("bias") or "mask_token" in name for name in spared)
    # The kernel of the projection counts as a matrix, the mask token (1, 1, D) as a vector.
    assert "everest.embeddings.projection.weight" in decaying
    if model_name == "pretrainer":
        assert "decoder.mask_token" in spared


def test_layer_decay_by_hand(classifier):
    groups = groups_by_name(classifier, layer_decay=LAYER_DECAY)
    # Embeddings 0, layers 1 to 3, head 4 of 4: the rate halves with each step away from the head.
    wanted = {
        "everest.embeddings.projection.weight": 0.05,
        "everest.embeddings.projection.bias": 0.05,
        "everest.encoder.layers.0.": 0.1,
        "everest.encoder.layers.1.": 0.2,
        "everest.encoder.layers.2.": 0.4,
        "fc_norm.": 0.8,
        "classifier.": 0.8,
    }
    for name, group in groups.items():
        (rate,) = (rate for prefix, rate in wanted.items() if name.startswith(prefix))
        assert group["lr"] == pytest.approx(rate), name
    seen = {prefix for prefix in wanted for name in groups if name.startswith(prefix)}
    assert seen == set(wanted)


def test_without_layer_decay_all_learn_at_one_rate(classifier):
    groups = parameter_groups(classifier, lr=LR, weight_decay=WEIGHT_DECAY, num_layers=3)
    assert {group["lr"] for group in groups} == {LR}


def test_decoder_layers_are_not_taken_for_encoder_layers(pretrainer):
    names = [name for name, _ in pretrainer.named_parameters() if name.startswith("decoder.")]
    assert any(".0." in name for name in names)
    assert {layer_id(name, 3) for name in names} == {4}


def test_two_digit_layers():
    assert layer_id("everest.encoder.layers.11.norm1.weight", 12) == 12
    assert layer_id("module.everest.encoder.layers.1.norm1.weight", 12) == 2


# ---------------------------------------------------------------------------------------------------------- schedule


def test_schedule_by_hand():
    factors = [cosine_schedule(s, total_steps=12, warmup_steps=4, final_factor=0.2) for s in range(13)]
    assert factors[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert factors[8] == pytest.approx(0.6)  # half-way: the mean of 1 and 0.2
    assert factors[6] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert factors[10] == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2)
    assert factors[12] == pytest.approx(0.2)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_schedule_at_its_ends():
    assert cosine_schedule(0, total_steps=5, warmup_steps=0, final_factor=0.1) == 1
    assert cosine_schedule(99, total_steps=5, warmup_steps=0, final_factor=0.1) == pytest.approx(0.1)
    assert cosine_schedule(4, total_steps=5, warmup_steps=5, final_factor=0.1) == pytest.approx(0.8)
    assert cosine_schedule(5, total_steps=5, warmup_steps=5, final_factor=0.1) == 1
