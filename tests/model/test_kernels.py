"""What makes the models fast equals the plain formula."""

import contextlib
import weakref
from functools import partial

import pytest
import torch
from helpers.called import Called
from helpers.models import DTYPES, MODELS, build, clips, main
from helpers.tiny import tiny_config
from torch import nn

from everest_hf import EverestForVideoClassification, EverestModel, attention_everest, kernels_everest
from everest_hf.attention_everest import eager_attention_forward

# ------------------------------------------------------------------ the patch projection


def test_two_numbers_in_16_bits_add_up_to_one_in_32():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1000)
    first, second = kernels_everest.split_float(x)
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.bfloat16)
    assert ((first.double() + second.double() - x).abs() <= 2**-16 * x.abs()).all()
    assert ((first.double() - x).abs() > 2**-12 * x.abs()).any()  # the first alone is not enough


@pytest.fixture
def sums_in_32_bits(monkeypatch):
    """Products of matrices in 16 bits that are added up in 32, which torch has on a GPU alone."""
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))


def test_three_products_in_16_bits_are_near_one_in_32(sums_in_32_bits):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 50, 1536), (768, 1536)))
    exact = x.double() @ weight.double().T
    assert (kernels_everest.split_linear(x, weight) - exact).norm() < 3e-5 * exact.norm()
    assert (x.bfloat16().double() @ weight.bfloat16().double().T - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_projection_in_float32_is_a_product_in_float32(dtype):
    projection = kernels_everest.EverestPatchProjection(18, 32).to(dtype)
    patches = torch.randn(2, 5, 18).to(dtype)
    expected = patches.float() @ projection.weight.float().T + projection.bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(kernels_everest.project(projection, patches, float32=True), expected)
        assert kernels_everest.project(projection, patches).dtype == torch.bfloat16
    torch.testing.assert_close(projection(patches), nn.functional.linear(patches, projection.weight, projection.bias))


@pytest.mark.parametrize("splits", [True, False])
def test_what_is_projected_for_the_scores_differs_between_slots_as_the_tokens_do(splits, sums_in_32_bits, monkeypatch):
    monkeypatch.setattr(kernels_everest, "splits_products", lambda device: splits)
    projection, patches = kernels_everest.EverestPatchProjection(18, 32), torch.randn(2, 4 * 5, 18)
    found = kernels_everest.project_for_scores(projection, patches, num_slots=4).unflatten(1, (4, 5))
    tokens = projection(patches).unflatten(1, (4, 5))
    torch.testing.assert_close(found.diff(dim=1), tokens.diff(dim=1), atol=1e-4, rtol=1e-4)
    assert torch.equal(found, tokens) is not splits


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("oversampling", [1.0, 1.5])
def test_a_model_that_splits_products_gives_the_same(oversampling, model_class, sums_in_32_bits, monkeypatch):
    model = build(model_class, frame_oversampling=oversampling)
    pixel_values = clips(model.config)
    with torch.no_grad():
        expected = model(pixel_values, output_scores=True)
        monkeypatch.setattr(kernels_everest, "splits_products", lambda device: True)
        found = model(pixel_values, output_scores=True)
    assert not torch.equal(found.scores, expected.scores)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [200, 256, 600])
def test_attention_in_blocks_is_attention(tokens, dropout, monkeypatch):
    monkeypatch.setattr(attention_everest, "QUERIES_AT_A_TIME", 256 if dropout == 0 else 1000)  # or it draws otherwise
    shape, scaling = (2, 3, tokens, 8), 8**-0.5
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    results = []
    for attend in (attention_everest.blocked_attention_forward, eager_attention_forward):
        torch.manual_seed(0)
        found, _ = attend(nn.Module().train(), *inputs, None, scaling=scaling, dropout=dropout)
        slopes = torch.autograd.grad(found.square().sum(), inputs)
        results.append((found, *slopes))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    if dropout == 0:
        query, key, value = inputs
        plain = (scaling * query @ key.mT).softmax(dim=-1) @ value
        torch.testing.assert_close(results[0][0], plain.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_attends_in_blocks(dtype, monkeypatch):
    model = build(EverestForVideoClassification).to(dtype)
    pixel_values = clips().to(dtype)
    expected = model(pixel_values, output_attentions=True).logits
    monkeypatch.setattr(attention_everest, "QUERIES_AT_A_TIME", 10)
    with Called() as called:
        found = model(pixel_values).logits
    assert called.names.count("_softmax") == 2 * 3  # two layers, three blocks of 27 queries
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


# ------------------------------------------------------------------ MLP


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize(("training", "grad"), [(True, True), (False, True), (False, False)])
def test_the_mlp_is_two_products_with_an_activation_between(act, mean, training, grad, monkeypatch):
    monkeypatch.setattr(kernels_everest, "TOKENS_AT_A_TIME", 20)  # two clips at a time
    mlp = build(EverestModel, hidden_act=act).encoder.layers[0].mlp.train(training)
    hidden_states = torch.randn(5, 9, 32)
    with torch.set_grad_enabled(grad):
        found = mlp(hidden_states, partial(torch.mean, dim=1, keepdim=True) if mean else None)
    hidden = {"gelu": nn.functional.gelu, "silu": nn.functional.silu}[act](mlp.fc1(hidden_states))
    expected = hidden @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(found, expected.mean(dim=1, keepdim=True) if mean else expected)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_inference_activates_in_place_only_what_nobody_else_reads(act):
    model, layers = build(EverestForVideoClassification, hidden_act=act), tiny_config().num_hidden_layers

    def count(grad):
        with torch.set_grad_enabled(grad), Called() as called:
            logits = model(clips()).logits
        return logits.detach(), called.names.count(act), called.names.count("gelu_")

    expected, *calls = count(grad=True)
    assert calls == [layers, 0]
    found, *calls = count(grad=False)
    assert calls == ([0, layers] if act == "gelu" else [layers, 0])
    assert torch.equal(found, expected)

    seen = []
    model.everest.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *args: seen.append(args[2]))
    found, *calls = count(grad=False)
    assert calls == ([1, layers - 1] if act == "gelu" else [layers, 0])
    assert torch.equal(found, expected)
    assert (seen[0] < -0.5).any()  # which neither activation gives


def put_in_the_place_of_forward(module, hook):
    """Wrap a module's forward, as accelerate does for its hooks."""
    forward = module.forward

    def listen(x):
        result = forward(x)
        hook(module, (x,), result)
        return result

    module.forward = listen


@pytest.mark.parametrize("name", ["fc1", "activation", "all"])
@pytest.mark.parametrize("kind", ["before", "after", "in place of forward"])
def test_hooks_find_the_same_with_and_without_gradients(name, kind):
    model, seen = build(EverestForVideoClassification, hidden_act="gelu"), {}
    mlp = model.everest.encoder.layers[1].mlp

    def listen(module, args, result=None):
        if module in (mlp.fc1, mlp.activation):
            seen.setdefault(module, []).append(args[0] if result is None else result)

    if kind == "in place of forward":
        for each in (mlp.fc1, mlp.activation) if name == "all" else (getattr(mlp, name),):
            put_in_the_place_of_forward(each, listen)
        handle = contextlib.nullcontext()
    elif name == "all":
        every = nn.modules.module
        register = {"before": every.register_module_forward_pre_hook, "after": every.register_module_forward_hook}
        handle = register[kind](listen)
    else:
        module = getattr(mlp, name)
        register = {"before": module.register_forward_pre_hook, "after": module.register_forward_hook}
        handle = register[kind](listen)
    with handle:
        expected = model(clips()).logits
        with torch.no_grad():
            found = model(clips()).logits
    assert torch.equal(found, expected)
    assert len(seen) == (2 if name == "all" else 1)
    for with_gradients, without in seen.values():
        assert torch.equal(with_gradients, without)


@pytest.mark.parametrize("model_class", [EverestModel, EverestForVideoClassification])
@pytest.mark.parametrize(("tokens_at_a_time", "most_clips"), [(1, 1), (54, 2), (200, 5)])
def test_inference_makes_the_hidden_layer_of_few_clips_at_a_time(
    model_class, tokens_at_a_time, most_clips, monkeypatch
):
    model, pixels = build(model_class), clips(batch_size=5)  # 27 kept tokens each
    expected = main(model(pixels)).detach()
    monkeypatch.setattr(kernels_everest, "TOKENS_AT_A_TIME", tokens_at_a_time)
    sizes = []
    layers = (model if model_class is EverestModel else model.everest).encoder.layers
    layers[1].mlp.fc1.register_forward_hook(lambda *args: sizes.append(len(args[2])))
    with torch.no_grad():
        found = main(model(pixels))
    assert max(sizes) == most_clips
    assert sum(sizes) == 5
    torch.testing.assert_close(found, expected)
    model(pixels)
    assert sizes[-1] == 5  # all at once where a backward pass may follow


# ------------------------------------------------------------------ memory


def test_inference_lets_go_of_the_states_that_nobody_asked_for():
    model = build(EverestModel, num_hidden_layers=4)
    outputs, alive = [], []

    def watch(_, args, result):
        alive.append(sum(state() is not None for state in outputs))
        outputs.append(weakref.ref(result[0]))

    for layer in model.encoder.layers:
        layer.register_forward_hook(watch)
    with torch.no_grad():
        model(clips())
    assert max(alive) <= 1
