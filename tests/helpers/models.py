"""What the tests of the models share: clips, models with weights like trained ones, losses, gradients, comparisons."""

import torch
from helpers import reference
from helpers.tiny import tiny_config

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel, EverestVideoProcessor
from everest_hf.evaluation.threshold import find_threshold, score_tokens

MODELS = (EverestModel, EverestForPreTraining, EverestForVideoClassification)
HEADS = (EverestForPreTraining, EverestForVideoClassification)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTIVE = {"attentive_pooling": True}
# For tests that draw for thousands of clips.
LIGHT = {"patch_size": 4, "image_size": (12, 20), "num_channels": 1, "image_mean": [0.5], "image_std": [0.5]}
BATCH = {"token_budget": "batch", "min_keep_ratio": 0.1, "max_keep_ratio": 0.9}  # 6 to 54 of 60 tokens
FRAMES = {"frame_oversampling": 1.5}  # 18 frames, 6 candidate slots, of which 4 are chosen


def clips(config=None, batch_size=2, seed=0):
    """Return normalised clips (B, T, C, H, W) for a configuration, by default the tiny one."""
    config = config or tiny_config()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        batch_size, config.num_input_frames, config.num_channels, *config.frame_size, generator=generator
    )


def save_classifier(folder, labels, *, frame_step: int) -> str:
    """Save a tiny classifier of these labels, whose answers differ from clip to clip, and return its folder."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    torch.manual_seed(0)
    model = EverestForVideoClassification(tiny_config(**names))
    torch.nn.init.normal_(model.classifier.weight, std=1)
    model.save_pretrained(folder)
    EverestVideoProcessor.from_config(model.config, frame_step=frame_step).save_pretrained(folder)
    return str(folder)


def build(model_class, seed=0, attention="sdpa", **overrides):
    """Return a tiny model in evaluation mode, of which no weight is 0 or 1 as at the start."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**overrides)).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def calibrated(model, pixel_values):
    """Give a model the threshold that keeps its share of the tokens of clips, and return it."""
    model.config.keep_threshold = find_threshold(model.config, score_tokens(model, pixel_values))
    return model


def mask(masked, rows=2, seed=0):
    """Return a mask (rows, 60) that is True for `masked` tokens of each row."""
    order = torch.rand(rows, 60, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < masked


def main(output):
    """Return what a model is there for: logits, or the encoder's tokens."""
    return output.logits if "logits" in output else output.last_hidden_state


def base(model):
    """Return the encoder of a model."""
    return getattr(model, "everest", model)


def aligned(model):
    """Move weights that lie in a mapped file, at any address, to aligned memory: kernels of the CPU round by it."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def assert_identical(first, second):
    """Fail unless two outputs are the same to the bit."""
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert first[name].dtype == second[name].dtype


# ------------------------------------------------------------------ gradients


def loss_of(model, pixel_values, **kwargs):
    """Return the loss of a model; of the encoder, the mean square of its tokens."""
    if isinstance(model, EverestForVideoClassification):
        kwargs["labels"] = torch.arange(len(pixel_values)) % model.config.num_labels
    output = model(pixel_values, **kwargs)
    return output.loss if "loss" in output else output.last_hidden_state.float().square().mean()


def gradients(model, pixel_values, **kwargs):
    """Return the loss of a model, and the gradient of each weight by name."""
    model.zero_grad()
    loss = loss_of(model, pixel_values, **kwargs)
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same_gradients(first, second, tolerance=1e-6):
    """Fail unless two results of `gradients` are the same up to rounding."""
    torch.testing.assert_close(first[0], second[0], atol=tolerance, rtol=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        error = (grad - second[1][name]).abs().max() / second[1][name].abs().max()
        assert error < 100 * tolerance, name


# ------------------------------------------------------------------ the reference


def double(x):
    """Return a tensor as a numpy array of float64."""
    return x.detach().double().numpy()


def embedded(model, clip):
    """Return the reference's tokens of one clip (T, C, H, W)."""
    config, projection = model.config, base(model).embeddings.projection
    kernel = projection.weight.reshape(
        -1, config.num_channels, config.tubelet_size, config.patch_size, config.patch_size
    )
    return reference.embed(double(clip), double(kernel), double(projection.bias))
