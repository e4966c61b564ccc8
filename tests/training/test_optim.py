"""Parameter groups and the schedule, against values worked out by hand."""

import math

import pytest
import torch
from helpers.tiny import tiny_config

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.modeling_everest import classification_loss
from everest_hf.training.build import build_optimizer
from everest_hf.training.inputs import model_inputs
from everest_hf.training.optim import MovingAverage, averaged, layer_id, parameter_groups
from everest_hf.training.recipe import load_recipe

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


# -------------------------------------------------------------------------------------------------- a recipe's optimizer


def recipe_of(**options):
    return load_recipe(None, {"train": "videos", "epochs": 10, "warmup_epochs": 2, **options})


@pytest.mark.parametrize(("total_batch", "factor"), [(256, 1.0), (64, 0.25), (1024, 4.0)])
def test_the_learning_rate_grows_with_the_total_batch(classifier, total_batch, factor):
    """From 0, by step, to base_lr x total batch / 256, and by a cosine to min_lr x total batch / 256."""
    recipe = recipe_of(base_lr=1e-3, min_lr=1e-5)
    optimizer, schedule = build_optimizer(recipe, classifier, total_batch, steps_per_epoch=3)
    rates = []
    for _ in range(31):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:7] == pytest.approx([i / 6 * 1e-3 * factor for i in range(7)])
    # Of the 24 steps of the cosine: a quarter, a half, three quarters, all.
    for step, part in ((12, 1 + math.sqrt(0.5)), (18, 1), (24, 1 - math.sqrt(0.5)), (30, 0)):
        assert rates[step] == pytest.approx((1e-5 + (1e-3 - 1e-5) * part / 2) * factor)
    assert rates[6:] == sorted(rates[6:], reverse=True)


@pytest.mark.parametrize(("warmup_epochs", "rates"), [(0, [1e-3, 5.05e-4, 1e-5]), (2, [0, 5e-4, 1e-3])])
def test_a_schedule_without_warmup_and_one_of_nothing_else(classifier, warmup_epochs, rates):
    recipe = recipe_of(base_lr=1e-3, min_lr=1e-5, epochs=2, warmup_epochs=warmup_epochs)
    optimizer, schedule = build_optimizer(recipe, classifier, 256, steps_per_epoch=1)
    for rate in rates:
        assert schedule.get_last_lr()[0] == pytest.approx(rate)
        optimizer.step()
        schedule.step()


def test_two_steps_of_adamw_by_hand():
    """Betas, decay and rates are those of the recipe: a matrix and a bias of the head, worked out in floats."""
    model = EverestForVideoClassification(tiny_config())
    recipe = recipe_of(base_lr=0.1, betas=[0.8, 0.9], weight_decay=0.5, layer_decay=1.0, warmup_epochs=0)
    optimizer, schedule = build_optimizer(recipe, model, 256, steps_per_epoch=10**6)  # so long that the rate stays
    named = {"matrix": model.classifier.weight, "bias": model.classifier.bias}
    first = {name: parameter.detach().flatten()[0].item() for name, parameter in named.items()}
    for gradient in (2.0, -1.0):
        for parameter in named.values():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        schedule.step()
    for name, parameter in named.items():
        value = first[name]
        for mean, square in (
            (0.2 * 2 / (1 - 0.8), 0.1 * 4 / (1 - 0.9)),
            ((0.8 * 0.4 - 0.2 * 1) / (1 - 0.8**2), (0.9 * 0.4 + 0.1 * 1) / (1 - 0.9**2)),
        ):
            value -= 0.1 * (0.5 if name == "matrix" else 0) * value
            value -= 0.1 * mean / (math.sqrt(square) + 1e-8)
        assert parameter.flatten()[0].item() == pytest.approx(value, rel=1e-4), name


def test_smoothed_labels_by_hand():
    recipe = recipe_of(task="finetune", label_smoothing=0.2, erasing=0.0)
    config = tiny_config(problem_type="single_label_classification")
    batch = {
        "pixel_values": torch.zeros(2, 12, 3, 24, 40, dtype=torch.uint8),
        "labels": torch.tensor([0, 3]),
        "seed": torch.tensor([1, 2]),
    }
    labels = model_inputs(batch, recipe, config)["labels"]
    assert labels.tolist()[0] == pytest.approx([0.84, 0.04, 0.04, 0.04, 0.04])
    assert labels.tolist()[1] == pytest.approx([0.04, 0.04, 0.04, 0.84, 0.04])
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0, 0.5]])
    shares = [math.exp(x) / sum(map(math.exp, logits[0].tolist())) for x in logits[0].tolist()]
    wanted = -sum(q * math.log(p) for q, p in zip([0.84, 0.04, 0.04, 0.04, 0.04], shares, strict=True))
    assert classification_loss(logits, labels[:1], config).item() == pytest.approx(wanted, rel=1e-5)


# --------------------------------------------------------------------------------------------------- the moving average


def test_the_moving_average_by_hand():
    weight, frozen = torch.nn.Parameter(torch.tensor([1.0, 10.0])), torch.nn.Parameter(torch.ones(1), False)
    average = MovingAverage([weight, frozen], decay=0.75)
    for value in ([2.0, 20.0], [4.0, 0.0]):
        weight.data = torch.tensor(value)
        average.update()
    # 1 -> 0.75 + 0.5 = 1.25 -> 0.9375 + 1; 10 -> 7.5 + 5 = 12.5 -> 9.375 + 0
    assert average.values[0].tolist() == [1.9375, 9.375]
    assert len(average.values) == 1
    with average.applied():
        assert weight.tolist() == [1.9375, 9.375]
    assert weight.tolist() == [4.0, 0.0]
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert weight.tolist() == [4.0, 0.0]

    again = MovingAverage([weight], decay=0.75)
    again.load_state_dict(average.state_dict())
    assert again.values[0].tolist() == [1.9375, 9.375]


def test_without_a_moving_average_nothing_is_put_in_place():
    with averaged(None) as nothing:
        assert nothing is None
