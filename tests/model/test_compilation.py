"""Compilation in one graph, and export."""

import pytest
import torch
from helpers.models import HEADS, MODELS, assert_same_gradients, build, clips, gradients

from everest_hf import EverestForPreTraining, EverestForVideoClassification


def draws(model):
    """Return the randomness as arguments, so that two ways to run the model draw the same."""
    kwargs = {}
    if isinstance(model, EverestForPreTraining):
        kwargs["noise"] = torch.rand(2, model.config.num_informative_tokens)
    if model.config.frame_oversampling > 1:
        kwargs["frame_noise"] = torch.rand(2, model.config.num_input_frames // 3)
    return kwargs


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("selection", ["motion", "compensated"])
def test_compiled_in_one_graph_training_is_the_same(model_class, selection):
    torch._dynamo.reset()
    model = build(model_class, token_selection=selection, frame_oversampling=1.5, num_hidden_layers=1).train()
    pixel_values, kwargs = clips(model.config), draws(model)
    expected = gradients(model, pixel_values, **kwargs)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, pixel_values, **kwargs), expected)


@pytest.mark.parametrize("model_class", MODELS)
def test_compiled_in_one_graph_evaluation_is_the_same(model_class):
    torch._dynamo.reset()
    model = build(model_class, num_hidden_layers=1)
    pixel_values = clips(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, output = model(pixel_values), compiled(pixel_values)
    for name in expected:
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "selection"), [(EverestForPreTraining, "tube"), (EverestForVideoClassification, "random")]
)
def test_training_that_draws_by_itself_compiles_in_one_graph(model_class, selection):
    torch._dynamo.reset()
    overrides = {"drop_path_rate": 0.1, "hidden_dropout_prob": 0.1, "num_hidden_layers": 1}
    model = build(model_class, token_selection=selection, frame_oversampling=1.5, **overrides).train()
    model.compile(fullgraph=True, backend="eager")
    output = model(clips(model.config), output_hidden_states=True)
    assert len(output.hidden_states) == 2
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("selection", ["motion", "compensated"])
def test_inductor_gives_the_same(selection):
    torch._dynamo.reset()
    model = build(EverestForVideoClassification, token_selection=selection, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected, output = model(clips()), compiled(clips())
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(output.kept_ids, expected.kept_ids)


@pytest.mark.parametrize("model_class", HEADS)
def test_compiled_under_autocast(model_class):
    torch._dynamo.reset()
    model = build(model_class, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, output = model(clips()), compiled(clips())
    torch.testing.assert_close(output.logits, expected.logits, atol=0.05, rtol=0.05)


def test_an_exported_model_takes_any_number_of_clips():
    model = build(EverestForVideoClassification)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"pixel_values": clips()}, dynamic_shapes={"pixel_values": {0: batch}}
        )
        for batch_size in (1, 2, 5):
            pixel_values = clips(batch_size=batch_size, seed=batch_size)
            output, expected = program.module()(pixel_values=pixel_values), model(pixel_values)
            assert torch.equal(output.kept_ids, expected.kept_ids)
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_what_is_done_in_place_compiles_and_exports():
    model, pixels = build(EverestForVideoClassification, hidden_act="gelu"), clips()
    with torch.no_grad():
        expected = model(pixels).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixels).logits, expected)
        program = torch.export.export(model, (), {"pixel_values": pixels})
        torch.testing.assert_close(program.module()(pixel_values=pixels).logits, expected)
