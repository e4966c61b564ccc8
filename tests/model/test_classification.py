"""The classifier: pooling, a frozen encoder, losses."""

import math

import pytest
import torch
from helpers.models import ATTENTIVE, assert_same_gradients, build, clips, gradients
from helpers.tiny import tiny_config
from torch import nn
from transformers import AutoConfig

from everest_hf import EverestForVideoClassification
from everest_hf.modeling_everest import classification_loss

# ------------------------------------------------------------------ pooling


# Dropout in training, and another pooling, need each token of the last layer.
@pytest.mark.parametrize(
    ("overrides", "given_in_training", "given_in_evaluation"),
    [({"drop_path_rate": 0.3}, 1, 1), ({"hidden_dropout_prob": 0.3}, 27, 1), ({"attentive_pooling": True}, 27, 27)],
)
def test_the_mean_taken_in_the_last_layer_is_that_of_its_tokens(overrides, given_in_training, given_in_evaluation):
    model = build(EverestForVideoClassification, **overrides).double()
    given = []
    last = model.everest.encoder.layers[-1]
    last.register_forward_hook(lambda module, args, result: given.append(result[0].shape[1]))
    for training, expected in (True, given_in_training), (False, given_in_evaluation):
        model.train(training)
        given.clear()
        results = []
        for output_hidden_states in (False, True):
            torch.manual_seed(1)  # of dropout and drop path
            results.append(gradients(model, clips().double(), output_hidden_states=output_hidden_states))
        assert given == [expected, 27]
        assert_same_gradients(*results)


@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_attentive_pooling_is_one_query_over_all_tokens(use_mean_pooling):
    model = build(EverestForVideoClassification, use_mean_pooling=use_mean_pooling, **ATTENTIVE).double()
    pixel_values = clips().double()
    tokens = model.everest(pixel_values).last_hidden_state  # (2, 27, 32)
    pooling, attention = model.pooling, model.pooling.attention
    assert (model.everest.layernorm is None) is use_mean_pooling
    rows = []
    for clip in pooling.norm(tokens):
        query = attention.query(pooling.query[0, 0])  # (32,)
        keys, values = attention.key(clip), attention.value(clip)  # (27, 32)
        heads = [slice(8 * i, 8 * i + 8) for i in range(4)]
        weights = [(keys[:, head] @ query[head] / math.sqrt(8)).softmax(0) for head in heads]
        parts = [weight @ values[:, head] for weight, head in zip(weights, heads, strict=True)]
        rows.append(attention.output(torch.cat(parts)))
    expected = model.classifier(model.fc_norm(torch.stack(rows)))
    torch.testing.assert_close(model(pixel_values).logits, expected)


def test_every_weight_of_an_attentive_head_learns_compiled_too():
    torch._dynamo.reset()
    model = build(EverestForVideoClassification, num_hidden_layers=1, **ATTENTIVE).train()
    expected = gradients(model, clips())
    for name, grad in expected[1].items():
        assert grad.abs().max() > 0, name
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, clips()), expected)


# ------------------------------------------------------------------ a frozen encoder


def test_a_frozen_encoder_is_in_evaluation_mode_in_training():
    overrides = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5, "classifier_dropout": 0.5}
    model = build(EverestForVideoClassification, **overrides).train()
    assert model.everest.training
    model.freeze_encoder()
    for _ in range(2):
        assert not any(module.training for module in model.everest.modules())
        assert model.dropout.training
        states = [model(clips(), output_hidden_states=True).hidden_states[-1] for _ in range(2)]
        assert torch.equal(*states)
        model.eval()
        assert not model.dropout.training
        model.train()
    model.everest.requires_grad_(True)
    assert model.train().everest.training


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_thawed_encoder_takes_the_mode_of_its_classifier(whole, training):
    model = build(EverestForVideoClassification).train()
    model.freeze_encoder()
    (model if whole else model.everest).requires_grad_(True)
    assert {module.training for module in model.train(training).modules()} == {training}
    model.everest.eval()  # by the caller's own will
    model.requires_grad_(True)
    assert not model.everest.training


def test_a_classifier_that_was_frozen_whole_thaws_too():
    model = build(EverestForVideoClassification).requires_grad_(False).train()
    assert not model.everest.training
    assert model.requires_grad_(False) is model
    assert not model.everest.training
    assert model.requires_grad_(True) is model
    assert model.train().everest.training


# ------------------------------------------------------------------ losses


def head_with(logits, **overrides):
    """Return a model whose logits are the given row for each clip."""
    model = build(EverestForVideoClassification, num_labels=len(logits), **overrides)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(logits))
    return model


LOGITS = [1.0, -2.0, 0.5]
LOG_SUM = math.log(math.exp(1.0) + math.exp(-2.0) + math.exp(0.5))


def test_the_loss_of_single_labels():
    expected = LOG_SUM - (-2.0 + 0.5) / 2
    for kwargs in ({}, {"problem_type": "single_label_classification"}):
        model = head_with(LOGITS, **kwargs)
        for labels in (torch.tensor([1, 2]), torch.tensor([[1], [2]]), torch.tensor([1, 2], dtype=torch.int32)):
            assert model(clips(), labels=labels).loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_soft_labels_is_their_cross_entropy():
    model = head_with(LOGITS, problem_type="single_label_classification")
    labels = torch.tensor([[0.1, 0.7, 0.2], [0.0, 0.25, 0.75]])
    rows = [sum(p * (LOG_SUM - x) for p, x in zip(row, LOGITS, strict=True)) for row in labels.tolist()]
    assert model(clips(), labels=labels).loss.item() == pytest.approx(sum(rows) / 2, rel=1e-6)
    hard = model(clips(), labels=torch.tensor([1, 2])).loss
    one_hot = nn.functional.one_hot(torch.tensor([1, 2]), 3)
    assert model(clips(), labels=one_hot.float()).loss.item() == pytest.approx(hard.item(), rel=1e-6)


def test_class_weights_by_hand():
    """The mean over the clips of w_c times the loss; a soft label weighs each class by its share."""
    torch.manual_seed(0)
    config, logits, labels = tiny_config(num_labels=3, class_weights=[0.5, 2, 1]), torch.randn(4, 3), [0, 1, 1, 2]
    losses = [-logits[i].log_softmax(-1)[label] * [0.5, 2, 1][label] for i, label in enumerate(labels)]
    hard = classification_loss(logits, torch.tensor(labels), config)
    torch.testing.assert_close(hard, torch.stack(losses).mean())
    one_hot = torch.nn.functional.one_hot(torch.tensor(labels), 3).float()
    torch.testing.assert_close(classification_loss(logits, one_hot, config), hard)
    halves = [
        classification_loss(logits[part], torch.tensor(labels)[part], config) for part in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), hard)  # accumulated, or on two processes


def test_the_loss_of_several_labels_at_once():
    labels = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    terms = [math.log1p(math.exp(x)) - y * x for row in labels for x, y in zip(LOGITS, row, strict=True)]
    for kwargs in ({}, {"problem_type": "multi_label_classification"}):
        loss = head_with(LOGITS, **kwargs)(clips(), labels=torch.tensor(labels)).loss
        assert loss.item() == pytest.approx(sum(terms) / 6, rel=1e-6)


def test_the_loss_of_regression(recwarn):
    expected = ((0.5 - 2) ** 2 + (0.5 + 1) ** 2) / 2
    for kwargs in ({}, {"problem_type": "regression"}):
        model = head_with([0.5], **kwargs)
        for labels in (torch.tensor([2.0, -1.0]), torch.tensor([[2.0], [-1.0]]), torch.tensor([2, -1])):
            assert model(clips(), labels=labels).loss.item() == pytest.approx(expected)
        assert model(clips(batch_size=1), labels=torch.tensor([2.0])).loss.item() == pytest.approx(1.5**2)
    model = head_with(LOGITS, problem_type="regression")
    labels = [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]
    terms = [(x - y) ** 2 for row in labels for x, y in zip(LOGITS, row, strict=True)]
    assert model(clips(), labels=torch.tensor(labels)).loss.item() == pytest.approx(sum(terms) / 6)
    assert not [warning for warning in recwarn if "size" in str(warning.message)]


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type"),
    [
        (torch.tensor([1, 2]), 3, "single_label_classification"),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), 3, "multi_label_classification"),
        (torch.tensor([0.3, -1.0]), 1, "regression"),
    ],
)
def test_what_the_loss_infers_is_in_the_config_from_then_on(labels, num_labels, problem_type, tmp_path):
    model = build(EverestForVideoClassification, num_labels=num_labels)
    losses = [model(clips(), labels=labels).loss for _ in range(2)]
    assert torch.equal(*losses)
    assert model.config.problem_type == problem_type
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).problem_type == problem_type


def test_a_compiled_loss_tells_the_config_too():
    torch._dynamo.reset()
    model, labels = build(EverestForVideoClassification, num_hidden_layers=1), torch.rand(2, 5)
    expected = model(clips(), labels=labels).loss
    model.config.problem_type = None
    model.compile(fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(model(clips(), labels=labels).loss, expected)
        assert model.config.problem_type == "multi_label_classification"


def test_a_problem_type_that_is_none_has_no_loss():
    model = head_with(LOGITS)
    vars(model.config)["problem_type"] = "clustering"  # which some versions of Transformers refuse to set
    with pytest.raises(
        ValueError, match=r"EverestConfig\.problem_type is 'clustering'; it must be one of 'regression', "
    ):
        model(clips(), labels=torch.tensor([1, 2]))


def test_labels_of_another_kind_than_the_first_are_refused():
    model = head_with(LOGITS)
    model(clips(), labels=torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"labels for problem_type 'multi_label_classification' .*\(2,\).*\(2, 3\)"):
        model(clips(), labels=torch.tensor([1, 2]))


@pytest.mark.parametrize("label", [-1, 3, 7])
def test_a_class_that_there_is_not_is_named(label):
    model = head_with(LOGITS, problem_type="single_label_classification")
    message = f"labels for problem_type 'single_label_classification' hold {label}; expected classes from 0 to 2"
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(clips(), labels=torch.tensor([1, label]))
    left_out = model(clips(), labels=torch.tensor([1, -100])).loss  # as everywhere in PyTorch
    torch.testing.assert_close(left_out, model(clips()[:1], labels=torch.tensor([1])).loss)


def test_labels_that_do_not_fit_are_refused():
    for problem_type, labels in (
        ("single_label_classification", torch.tensor([1, 2, 0])),
        ("single_label_classification", torch.rand(2, 4)),
        ("multi_label_classification", torch.rand(2, 4)),
        ("multi_label_classification", torch.rand(2)),
        ("regression", torch.rand(2)),
        ("regression", torch.rand(1, 3)),
    ):
        model = head_with(LOGITS, problem_type=problem_type)
        with pytest.raises(ValueError, match=rf"labels.*{len(labels)}"):
            model(clips(), labels=labels)


def test_the_loss_has_the_gradient_of_its_formula():
    model = head_with(LOGITS, problem_type="single_label_classification")
    labels = torch.tensor([[0.1, 0.7, 0.2], [0.0, 0.25, 0.75]], requires_grad=True)
    model(clips(), labels=labels).loss.backward()
    log_probabilities = torch.tensor(LOGITS) - LOG_SUM
    torch.testing.assert_close(labels.grad, -log_probabilities.expand(2, 3) / 2)
    slope = (log_probabilities.exp() - labels.detach()).mean(dim=0)
    torch.testing.assert_close(model.classifier.bias.grad, slope)


def test_losses_are_taken_in_float32():
    model = head_with(LOGITS).bfloat16()
    loss = model(clips(), labels=torch.tensor([1, 2])).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(LOG_SUM + 0.75, rel=1e-6)
