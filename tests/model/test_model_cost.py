"""What the models do not do: keep, compute or wait for what the dropped tokens would need."""

import gc

import pytest
import torch
from helpers.tiny import tiny_config
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel
from everest_hf.cost import operations_counter
from everest_hf.embeddings_everest import pixel_targets
from everest_hf.selection_everest import patchify

MODELS = (EverestModel, EverestForPreTraining, EverestForVideoClassification)

# Large enough that tokens, and not the ids and the odd scalar, make up what is counted.
SIZES = {"image_size": (48, 80), "hidden_size": 64, "intermediate_size": 128}
TOKENS = 4 * 6 * 10
PIXELS = 3 * 3 * 8 * 8  # of one token


def clips(config, batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        batch_size, config.num_input_frames, config.num_channels, *config.frame_size, generator=generator
    )


def build(model_class, **overrides):
    torch.manual_seed(0)
    return model_class(tiny_config(**{**SIZES, **overrides})).train()


def saved_bytes(function, model):
    """Return the bytes of distinct storages that autograd keeps for the backward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The tensor itself is held, so that no address is used twice.
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(size for size, _ in storages.values())


def backward_flops(loss):
    with operations_counter() as counter:
        loss.backward()
    return counter.get_total_flops()


# ------------------------------------------------------------------ what the backward pass costs


@pytest.mark.parametrize("oversampling", [1.0, 1.5])
def test_the_embedding_layer_saves_the_kept_tokens_only(oversampling):
    model = build(EverestModel, frame_oversampling=oversampling)
    pixel_values = clips(model.config)
    saved = {}
    for keep_ratio in (0.1, 0.3, 0.6, 1.0):
        kept = int(keep_ratio * TOKENS)
        saved[keep_ratio] = saved_bytes(
            lambda ratio=keep_ratio: model.embeddings(pixel_values, keep_ratio=ratio).hidden_states, model
        )
        pixels_of_kept = 2 * kept * PIXELS * 4
        assert pixels_of_kept <= saved[keep_ratio] <= 1.02 * pixels_of_kept
    assert saved[0.3] / saved[1.0] == pytest.approx(0.3, rel=0.02)


def test_in_pretraining_it_saves_the_visible_tokens_only():
    model = build(EverestForPreTraining)
    visible = model.config.num_visible_tokens
    saved = saved_bytes(
        lambda: model.everest.embeddings(clips(model.config), pretraining=True).hidden_states, model.everest
    )
    assert 2 * visible * PIXELS * 4 <= saved <= 1.05 * 2 * visible * PIXELS * 4


def test_the_whole_model_saves_in_proportion_to_its_tokens():
    model = build(EverestForVideoClassification)
    pixel_values = clips(model.config)
    saved = {
        ratio: saved_bytes(lambda ratio=ratio: model(pixel_values, keep_ratio=ratio).logits, model)
        for ratio in (0.3, 1.0)
    }
    # A little of it does not shrink: the head's.
    assert 0.29 < saved[0.3] / saved[1.0] < 0.32


@pytest.mark.parametrize("oversampling", [1.0, 1.5])
def test_the_backward_pass_of_the_projection_computes_the_kept_tokens_only(oversampling):
    model = build(EverestModel, frame_oversampling=oversampling)
    pixel_values = clips(model.config)
    for keep_ratio in (0.1, 0.3, 0.6, 1.0):
        hidden_states = model.embeddings(pixel_values, keep_ratio=keep_ratio).hidden_states
        kept = int(keep_ratio * TOKENS)
        assert backward_flops(hidden_states.sum()) == 2 * 2 * kept * PIXELS * 64
    hidden_states = build(EverestForPreTraining).everest.embeddings(clips(model.config)[:, :12], pretraining=True)
    visible = model.config.num_visible_tokens
    assert backward_flops(hidden_states.hidden_states.sum()) == 2 * 2 * visible * PIXELS * 64


def test_the_forward_pass_of_the_embedding_projects_all_tokens_once_and_the_kept_ones_again():
    model = build(EverestModel)
    pixel_values = clips(model.config)

    def forward_flops(keep_ratio):
        with operations_counter() as counter:
            model.embeddings(pixel_values, keep_ratio=keep_ratio)
        return counter.get_total_flops() / (2 * 2 * PIXELS * 64)

    assert forward_flops(0.3) == TOKENS + 0.3 * TOKENS
    assert forward_flops(1) == TOKENS  # nothing to select
    with torch.no_grad():
        assert forward_flops(0.3) == TOKENS  # the scores' embeddings serve
        assert forward_flops(1) == TOKENS


def test_frozen_projections_are_not_computed_twice():
    model = build(EverestModel)
    model.embeddings.projection.requires_grad_(False)
    with operations_counter() as counter:
        model.embeddings(clips(model.config), keep_ratio=0.3)
    assert counter.get_total_flops() == 2 * 2 * TOKENS * PIXELS * 64


def test_dense_costs_what_a_plain_vit_costs_but_for_the_last_product():
    model = build(EverestForVideoClassification)
    with operations_counter() as counter:
        model(clips(model.config), keep_ratio=1)
    n, d, mlp, layers = TOKENS, 64, 128, 2
    layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * mlp
    last_product = (n - 1) * d * mlp  # is of the tokens' mean alone
    multiplications = n * PIXELS * d + layers * layer - last_product + d * 5
    assert counter.get_total_flops() == 2 * 2 * multiplications


# ------------------------------------------------------------------ pixel targets


class Sizes(TorchDispatchMode):
    """Notes the number of elements that each operation writes; views write none."""

    def __init__(self):
        super().__init__()
        self.written = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            outputs = result if isinstance(result, (tuple, list)) else [result]
            self.written += [(str(func), x.numel()) for x in outputs if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixel_targets_touch_the_target_tokens_only(norm_pix_loss):
    config = tiny_config(**SIZES, norm_pix_loss=norm_pix_loss)
    patches = patchify(clips(config), config.tubelet_size, config.patch_size)
    ids = torch.rand(2, TOKENS).argsort(dim=1)[:, : config.num_target_tokens]
    targets = torch.zeros(2, TOKENS, dtype=torch.bool).scatter(1, ids, True)
    expected = pixel_targets(patches, ids, config)
    poisoned = patches.masked_fill(~targets[..., None], float("nan"))
    with Sizes() as sizes:
        assert torch.equal(pixel_targets(poisoned, ids, config), expected)
    assert max(size for _, size in sizes.written) <= ids.numel() * PIXELS


def test_pretraining_writes_the_pixels_of_all_tokens_only_once():
    model = build(EverestForPreTraining)
    pixel_values = clips(model.config)
    with Sizes() as sizes:
        model(pixel_values)
    whole = [name for name, size in sizes.written if size >= 2 * TOKENS * PIXELS]
    assert len(whole) == 1, whole  # cutting the clip into patches


# ------------------------------------------------------------------ no waiting for the device, no loop over clips


class OnDevice(TorchDispatchMode):
    """Fails when an operation reads or makes a tensor on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "cuda", func
        return result


def to_imagined_gpu(model):
    """Put the weights of a model on a GPU that need not exist; call it under FakeTensorMode."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty(weight.shape, device="cuda"))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, device="cuda")
    return model


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_never_waits_for_the_device(model_class, training):
    # Tensors without values: whatever would read one on the host (item, tolist, a boolean index, a comparison in an
    # `if`) raises, and a copy between host and device is seen.
    for overrides in (
        {},
        {"token_selection": "compensated"},
        {"token_selection": "random"},
        {"token_selection": "tube"},
        {"keep_ratio": 1},
        {"frame_oversampling": 1.5},
        {"frame_oversampling": 1.5, "token_selection": "compensated"},
        {"frame_oversampling": 1.5, "token_selection": "random"},
    ):
        model = build(model_class, **overrides, drop_path_rate=0.1).train(training)
        config = model.config
        with FakeTensorMode():
            to_imagined_gpu(model)
            pixel_values = torch.empty(2, config.num_input_frames, 3, *config.frame_size, device="cuda")
            kwargs = {}
            if model_class is EverestForVideoClassification:
                kwargs["labels"] = torch.empty(2, dtype=torch.long, device="cuda")
            with OnDevice():
                model(pixel_values, output_hidden_states=True, output_scores=True, **kwargs)
                model(torch.empty(2, config.num_input_frames, 3, 64, 64, device="cuda"), interpolate_pos_encoding=True)


def test_the_imagined_gpu_notices_who_waits():
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        for wait in (torch.Tensor.item, bool):
            with pytest.raises(DataDependentOutputException):
                wait(x.sum())
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]
        with OnDevice(), pytest.raises(AssertionError):
            x.cpu()
        with OnDevice(), pytest.raises(AssertionError):
            torch.arange(3).to("cuda")


@pytest.mark.parametrize("model_class", MODELS)
def test_the_number_of_operations_does_not_grow_with_the_batch(model_class):
    model = build(model_class, frame_oversampling=1.5)
    counts = []
    for batch_size in (2, 7):
        pixel_values = clips(model.config, batch_size)
        with Sizes() as sizes:
            model(pixel_values)
        counts.append([name for name, _ in sizes.written])
    assert counts[0] == counts[1]


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("model_class", MODELS)
def test_no_copy_of_the_clip_outlives_the_embedding(model_class):
    model = build(model_class)
    pixel_values = clips(model.config)
    alive = []

    def large():
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.nbytes >= pixel_values.nbytes]
        return {x.untyped_storage().data_ptr() for x in tensors}

    encoder = model.get_submodule("encoder" if model_class is EverestModel else "everest.encoder")
    encoder.register_forward_pre_hook(lambda *_: alive.append(large()))
    gc.collect()
    before = large()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(pixel_values)
    assert alive == [before, before]
