"""Conversion: the numbers of Transformers' VideoMAE come out again, from every form of file, and faults are named."""

import argparse
import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from helpers.tiny import tiny_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification, EverestModel, cli
from everest_hf.convert import convert_checkpoint, convert_to_videomae
from everest_hf.embeddings_everest import sincos_table
from everest_hf.video_processing_everest import EverestVideoProcessor

SIZES = {
    "image_size": [24, 40],
    "patch_size": 8,
    "num_frames": 12,
    "tubelet_size": 3,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "decoder_hidden_size": 20,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 28,
}
# What an official file does not tell of this model.
UNTOLD = {
    "image_size": (24, 40),
    "num_frames": 12,
    "num_attention_heads": 4,
    "decoder_num_attention_heads": 2,
    "head_layer_norm_eps": 1e-5,
}
LABELS = {0: "walk", 1: "run", 2: "jump", 3: "climb", 4: "swim"}
NUM_TOKENS = 4 * 3 * 5


def videomae(cls, **overrides):
    """Return a VideoMAE with every parameter away from its initial value."""
    torch.manual_seed(0)
    labels = {"id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}}
    model = cls(VideoMAEConfig(**{**SIZES, "layer_norm_eps": 1e-6, **labels, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def clips(channels=3):
    return torch.randn(2, 12, channels, 24, 40, generator=torch.Generator().manual_seed(1))


def masks():
    """Masks (2, N) with 17 visible tokens each, at other places in the two clips."""
    order = torch.rand(2, NUM_TOKENS, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return order >= 17


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def official_names(model):
    """Write a VideoMAE of Transformers under the names of the official files, pre-training or fine-tuned."""
    state = model.state_dict()
    pretraining = "mask_token" in state
    encoder = "encoder." if pretraining else ""
    out = {}

    def copy(new, old):
        for part in ("weight", "bias"):
            if f"{old}.{part}" in state:
                out[f"{new}.{part}"] = state[f"{old}.{part}"]

    def layer(new, old):
        copy(f"{new}.norm1", f"{old}.layernorm_before")
        attention = f"{old}.attention.attention"
        for short, name in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
            own = short if f"{attention}.{short}" in state else name  # older versions of Transformers name them so too
            out[f"{new}.attn.{short}"] = state[f"{attention}.{own}"]
        out[f"{new}.attn.qkv.weight"] = torch.cat(
            [state[f"{attention}.{x}.weight"] for x in ("query", "key", "value")]
        )
        copy(f"{new}.attn.proj", f"{old}.attention.output.dense")
        copy(f"{new}.norm2", f"{old}.layernorm_after")
        copy(f"{new}.mlp.fc1", f"{old}.intermediate.dense")
        copy(f"{new}.mlp.fc2", f"{old}.output.dense")

    copy(f"{encoder}patch_embed.proj", "videomae.embeddings.patch_embeddings.projection")
    for i in range(model.config.num_hidden_layers):
        layer(f"{encoder}blocks.{i}", f"videomae.encoder.layer.{i}")
    copy(f"{encoder}norm", "videomae.layernorm")
    if not pretraining:
        copy("fc_norm", "fc_norm")
        copy("head", "classifier")
        return out
    copy("encoder_to_decoder", "encoder_to_decoder")
    out["mask_token"] = state["mask_token"]
    for i in range(model.config.decoder_num_hidden_layers):
        layer(f"decoder.blocks.{i}", f"decoder.decoder_layers.{i}")
    copy("decoder.norm", "decoder.norm")
    copy("decoder.head", "decoder.head")
    return out


def training_file(state, path, **arguments):
    """Save as a training run does: the state beside optimizer, scaler and arguments."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    content = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(lr=1e-3, opt_betas=[0.9, 0.95], patch_size=(8, 8), output_dir="out", **arguments),
    }
    torch.save(content, path)
    return path


@pytest.fixture
def classifier():
    return videomae(VideoMAEForVideoClassification)


@pytest.fixture
def autoencoder():
    return videomae(VideoMAEForPreTraining, use_mean_pooling=False)


def num_parameters(model):
    """Parameters that EVEREST has as well; some versions of Transformers give VideoMAE a key bias."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("key.bias"))


def assert_same_classification(model, expected):
    with torch.no_grad():
        ours = model.eval()(clips(), output_hidden_states=True)
        theirs = expected(clips(), output_hidden_states=True)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == expected.config.num_hidden_layers + 1
    for ours_state, theirs_state in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(ours_state, theirs_state, atol=1e-4, rtol=0)


def assert_same_pretraining(model, expected):
    channels = expected.config.num_channels
    with torch.no_grad():
        ours = model.eval()(clips(channels), bool_masked_pos=masks(), output_hidden_states=True)
        theirs = expected(clips(channels), bool_masked_pos=masks(), output_hidden_states=True)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-5)
    for ours_state, theirs_state in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(ours_state, theirs_state, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------- Transformers' VideoMAE


@pytest.mark.parametrize("use_mean_pooling", [True, False])
@pytest.mark.parametrize("layer_norm_eps", [1e-12, 1e-3])
def test_classification_agrees_with_videomae(tmp_path, use_mean_pooling, layer_norm_eps):
    expected = videomae(
        VideoMAEForVideoClassification, use_mean_pooling=use_mean_pooling, layer_norm_eps=layer_norm_eps
    )
    model = EverestForVideoClassification.from_videomae(saved(expected, tmp_path), keep_ratio=1)
    assert_same_classification(model, expected)
    assert model.config.use_mean_pooling is use_mean_pooling
    assert model.config.layer_norm_eps == layer_norm_eps
    assert model.config.head_layer_norm_eps == 1e-5
    assert model.config.id2label == LABELS
    assert model.config.label2id["climb"] == 3


def test_the_epsilon_of_the_head_norms_shows(tmp_path):
    """Tokens that hardly differ make the norm's epsilon decide: a wrong one is far outside of the tolerance."""
    expected = videomae(VideoMAEForVideoClassification)
    with torch.no_grad():
        for parameter in expected.videomae.parameters():
            parameter.mul_(1e-3)
    model = EverestForVideoClassification.from_videomae(saved(expected, tmp_path), keep_ratio=1)
    assert_same_classification(model, expected)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"norm_pix_loss": False}, {"num_channels": 1}, {"num_channels": 4}, {"hidden_act": "relu"}],
    ids=str,
)
def test_pretraining_agrees_with_videomae(tmp_path, overrides):
    expected = videomae(VideoMAEForPreTraining, use_mean_pooling=False, **overrides)
    model = EverestForPreTraining.from_videomae(saved(expected, tmp_path))
    assert_same_pretraining(model, expected)


@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_a_bare_encoder_agrees_with_videomae(tmp_path, use_mean_pooling):
    expected = videomae(VideoMAEModel, use_mean_pooling=use_mean_pooling)
    model = EverestModel.from_videomae(saved(expected, tmp_path), keep_ratio=1).eval()
    with torch.no_grad():
        ours, theirs = model(clips()), expected(clips())
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-4, rtol=0)


def test_the_encoder_of_a_pretraining_checkpoint_ends_with_its_norm(tmp_path, autoencoder):
    model = EverestModel.from_videomae(saved(autoencoder, tmp_path), keep_ratio=1).eval()
    with torch.no_grad():
        ours, theirs = model(clips()), autoencoder.videomae(clips())
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-4, rtol=0)


def test_base_width_agrees_with_videomae(tmp_path):
    sizes = VideoMAEConfig(num_hidden_layers=2, num_labels=7, image_size=64).to_dict()
    torch.manual_seed(0)
    expected = VideoMAEForVideoClassification(VideoMAEConfig(**sizes)).eval()
    model = EverestForVideoClassification.from_videomae(saved(expected, tmp_path), keep_ratio=1).eval()
    assert (model.config.num_attention_heads, model.config.hidden_size) == (12, 768)
    x = torch.randn(1, 16, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, expected(x).logits, atol=1e-5, rtol=1e-5)


def old_key_form(state):
    return {k.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): v for k, v in state.items()}


def new_key_form(state):
    return {k.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): v for k, v in state.items()}


@pytest.mark.parametrize("form", [old_key_form, new_key_form])
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_both_key_forms_and_both_kinds_of_file(tmp_path, classifier, form, file):
    state = form(load_file(saved(classifier, tmp_path) / "model.safetensors"))
    assert sum(k.endswith(("q_bias", "query.bias")) for k in state) == 3
    (tmp_path / "model.safetensors").unlink()
    if file == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_classification(EverestForVideoClassification.from_videomae(tmp_path, keep_ratio=1), classifier)


def test_a_key_bias_changes_nothing_and_is_set_aside(tmp_path, classifier):
    state = new_key_form(load_file(saved(classifier, tmp_path) / "model.safetensors"))
    names = [name for name in state if name.endswith("query.bias")]
    state |= {name.replace("query", "key"): torch.randn_like(state[name]) for name in names}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_classification(EverestForVideoClassification.from_videomae(tmp_path, keep_ratio=1), classifier)
    assert "attention.key.bias" in str(convert_checkpoint(tmp_path, tmp_path / "out"))


def test_sharded_weights(tmp_path, classifier):
    classifier.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_classification(EverestForVideoClassification.from_videomae(tmp_path, keep_ratio=1), classifier)


def test_a_model_without_attention_biases(tmp_path):
    expected = videomae(VideoMAEForVideoClassification, qv_bias=False)
    model = EverestForVideoClassification.from_videomae(saved(expected, tmp_path), keep_ratio=1)
    assert_same_classification(model, expected)
    has_bias = any(name.endswith(("query.bias", "q_bias")) for name in expected.state_dict())
    assert model.config.qkv_bias is has_bias  # some versions of Transformers ignore qv_bias


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch, classifier):
    repository = tmp_path / "models--someone--tiny-videomae"
    saved(classifier, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = EverestForVideoClassification.from_videomae("someone/tiny-videomae", keep_ratio=1)
    assert_same_classification(model, classifier)
    with pytest.raises(FileNotFoundError, match="someone/other: no such file or folder, nor on the Hub: "):
        EverestForVideoClassification.from_videomae("someone/other")


def test_pixel_statistics_come_from_the_processor(tmp_path, classifier):
    saved(classifier, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}')
    config = EverestForVideoClassification.from_videomae(tmp_path).config
    assert (config.image_mean, config.image_std) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


# --------------------------------------------------------------------------------------------------- official files


def bare(state, path):
    torch.save(state, path)


def under_module(state, path):
    torch.save({"module": state, "epoch": 3}, path)


def with_prefix(state, path):
    torch.save({"module": {f"module.{key}": tensor for key, tensor in state.items()}}, path)


def old_format(state, path):
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [bare, under_module, with_prefix, old_format, training_file])
def test_official_files_give_the_same_outputs(tmp_path, write, classifier, autoencoder):
    for expected in (classifier, autoencoder):
        write(official_names(expected), tmp_path / f"{type(expected).__name__}.pth")
    fine_tuned, pretrained = tmp_path / "VideoMAEForVideoClassification.pth", tmp_path / "VideoMAEForPreTraining.pth"
    model = EverestForVideoClassification.from_videomae(fine_tuned, keep_ratio=1, **UNTOLD)
    assert_same_classification(model, classifier)
    assert_same_pretraining(EverestForPreTraining.from_videomae(pretrained, **UNTOLD), autoencoder)


def test_official_file_with_the_first_token_as_pooling(tmp_path):
    expected = videomae(VideoMAEForVideoClassification, use_mean_pooling=False)
    torch.save({"model": official_names(expected)}, tmp_path / "cls.pth")
    model = EverestForVideoClassification.from_videomae(tmp_path / "cls.pth", keep_ratio=1, **UNTOLD)
    assert_same_classification(model, expected)


def test_sizes_and_defaults_of_an_official_file(tmp_path, autoencoder):
    path = tmp_path / "model.pth"
    torch.save({"model": official_names(autoencoder)}, path)
    config = EverestForPreTraining.from_videomae(
        path, **{**UNTOLD, "num_frames": 15, "head_layer_norm_eps": 1e-6}
    ).config
    read = {name: getattr(config, name) for name in SIZES if name not in UNTOLD}
    assert read == {name: value for name, value in SIZES.items() if name not in UNTOLD}
    assert (config.num_slots, config.layer_norm_eps, config.keep_ratio, config.qkv_bias) == (5, 1e-6, 0.6, True)
    assert config.use_mean_pooling is True


@pytest.mark.parametrize(
    ("width", "heads", "decoder_width", "decoder_heads"),
    [(384, 6, 192, 3), (768, 12, 384, 6), (1024, 16, 512, 8), (1280, 16, 640, 8), (1408, 16, 512, 8)],
)
def test_official_sizes_are_known(tmp_path, width, heads, decoder_width, decoder_heads):
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "decoder_hidden_size": decoder_width,
        "decoder_intermediate_size": 4 * decoder_width,
        "decoder_num_attention_heads": decoder_heads,
    }
    with torch.device("meta"):
        shapes = VideoMAEForPreTraining(
            # The weights do not depend on the size of the frames, and VideoMAE is slow to build for large ones.
            VideoMAEConfig(
                **sizes, num_hidden_layers=2, decoder_num_hidden_layers=1, use_mean_pooling=False, image_size=32
            )
        )
    names = official_names(shapes)
    state = {name: torch.zeros((), dtype=torch.float16).expand(tensor.shape) for name, tensor in names.items()}
    torch.save({"module": state}, tmp_path / "official.pth")
    model = EverestForPreTraining.from_videomae(tmp_path / "official.pth")
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    assert (model.config.num_hidden_layers, model.config.decoder_num_hidden_layers) == (2, 1)
    assert (model.config.num_frames, model.config.image_size, model.config.num_tokens) == (16, 224, 1568)
    assert model.num_parameters() == num_parameters(shapes)
    assert model.dtype == torch.float16


def test_the_model_does_not_depend_on_the_file_any_more(tmp_path, classifier):
    path = tmp_path / "tuned.pth"
    torch.save({"model": official_names(classifier)}, path)
    model = EverestForVideoClassification.from_videomae(path, keep_ratio=1, **UNTOLD)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_classification(model, classifier)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_training_arguments_are_heeded(tmp_path, classifier, autoencoder):
    untold = {"num_attention_heads": 4, "decoder_num_attention_heads": 2}
    path = training_file(
        official_names(classifier),
        tmp_path / "tuned.pth",
        num_frames=6,
        num_segments=2,
        input_size=32,
        sampling_rate=3,
        mcm=True,
        mcm_ratio=0.3,
    )
    report = convert_checkpoint(path, tmp_path / "tuned", **untold)
    config = report.config
    assert (config.num_frames, config.image_size, config.keep_ratio) == (12, 32, 0.7)
    assert EverestVideoProcessor.from_pretrained(tmp_path / "tuned").frame_step == 3
    path = training_file(
        official_names(autoencoder),
        tmp_path / "pretrained.pth",
        num_frames=12,
        input_size=40,
        normlize_target=False,
        mask_type="motion-centric",
        mask_ratio=0.8,
        motion_centric_masking_ratio=0.6,
    )
    config = EverestForPreTraining.from_videomae(path, image_size=48, **untold).config
    assert (config.num_frames, config.image_size, config.norm_pix_loss) == (12, 48, False)
    assert (config.pretraining_keep_ratio, config.mask_ratio) == (0.4, 0.8)


# --------------------------------------------------------------------------------------------------- heads and labels


def test_pretraining_to_classification_makes_only_the_head_and_says_so_once(tmp_path, autoencoder):
    saved(autoencoder, tmp_path)
    logger = logging.get_logger("transformers")
    with CaptureLogger(logger) as captured:
        model = EverestForVideoClassification.from_videomae(tmp_path, num_labels=3)
    assert captured.out.count("classifier.weight") == 1
    assert "everest." not in captured.out
    assert model.config.use_mean_pooling is True
    assert model.classifier.weight.std() < model.config.initializer_range * model.config.init_scale * 2
    theirs = autoencoder.videomae.encoder.layer[1].intermediate.dense.weight
    torch.testing.assert_close(model.everest.encoder.layers[1].mlp.fc1.weight, theirs, atol=0, rtol=0)


def test_pooling_by_attention_is_part_of_the_new_head(tmp_path, autoencoder):
    source = saved(autoencoder, tmp_path / "videomae")
    model = EverestForVideoClassification.from_videomae(source, attentive_pooling=True, num_labels=3)
    assert model.pooling.query.abs().sum() > 0
    torch.testing.assert_close(
        model.everest.embeddings.projection.bias, autoencoder.videomae.embeddings.patch_embeddings.projection.bias
    )


def test_another_number_of_labels_makes_a_new_head(tmp_path, classifier):
    saved(classifier, tmp_path)
    with CaptureLogger(logging.get_logger("everest_hf.convert")) as captured:
        model = EverestForVideoClassification.from_videomae(tmp_path, num_labels=9)
    assert "head of 5 labels is replaced by a new one of 9" in captured.out
    assert model.classifier.out_features == 9 == len(model.config.id2label)
    torch.testing.assert_close(model.fc_norm.weight, classifier.fc_norm.weight, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"classifier.weight is \(5, 32\) for \(9, 32\)"):
        convert_checkpoint(tmp_path, tmp_path / "out", num_labels=9)


def test_label_names_can_be_given(tmp_path, classifier):
    torch.save(official_names(classifier), tmp_path / "tuned.pth")
    config = EverestForVideoClassification.from_videomae(tmp_path / "tuned.pth", **UNTOLD).config
    assert config.num_labels == 5
    config = EverestForVideoClassification.from_videomae(
        tmp_path / "tuned.pth", id2label=list("abcde"), **UNTOLD
    ).config
    assert (config.id2label[3], config.label2id["e"]) == ("d", 4)


def test_overrides_and_loading_arguments_apply(tmp_path, classifier):
    model = EverestForVideoClassification.from_videomae(
        saved(classifier, tmp_path), keep_ratio=0.4, token_selection="tube", num_frames=9, dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert model(torch.randn(1, 9, 3, 24, 40)).kept_ids.shape == (1, 6 * 3)
    assert EverestForVideoClassification.from_videomae(tmp_path).config.keep_ratio == 0.6


# --------------------------------------------------------------------------------------------------- whole folders


def test_a_converted_classifier_is_a_complete_checkpoint(tmp_path, classifier):
    out = tmp_path / "deep" / "out"
    report = convert_checkpoint(saved(classifier, tmp_path / "source"), out, keep_ratio=0.5)
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "model.safetensors", "configuration_everest.py", "modeling_everest.py"}
    assert files >= {
        f"{part}_everest.py" for part in ("attention", "camera", "embeddings", "kernels", "packing", "selection")
    }
    assert files >= {"video_processing_everest.py", "video_preprocessor_config.json"}
    assert "AutoModelForPreTraining" in json.loads((out / "config.json").read_text())["auto_map"]
    model = AutoModelForVideoClassification.from_pretrained(out)
    assert model.config.keep_ratio == 0.5
    model.config.keep_ratio = 1
    assert_same_classification(model, classifier)
    processor = EverestVideoProcessor.from_pretrained(out)
    assert processor(torch.zeros(12, 3, 50, 60, dtype=torch.uint8), return_tensors="pt").pixel_values.shape == (
        1,
        12,
        3,
        24,
        40,
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert report.parameters == num_parameters(classifier)
    assert report.assumed.keys() == {"pretraining_keep_ratio", "mask_ratio"}


def test_a_converted_autoencoder_is_a_complete_checkpoint(tmp_path, autoencoder):
    path = training_file(official_names(autoencoder), tmp_path / "run.pth")
    report = convert_checkpoint(path, tmp_path / "out", **UNTOLD)
    assert_same_pretraining(AutoModelForPreTraining.from_pretrained(tmp_path / "out"), autoencoder)
    text = str(report)
    for part in ("EverestForPreTraining", "3 layers of 32, 4 heads", "decoder 2 layers of 20", "12 frames of 24 x 40"):
        assert part in text
    assert "set aside     optimizer, epoch, scaler, args" in text
    assert "mask_ratio=0.9" in text
    assert f"{num_parameters(autoencoder):,} parameters" in text


def test_the_class_may_come_from_the_checkpoints_own_code(tmp_path, monkeypatch, classifier):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    convert_checkpoint(saved(classifier, tmp_path / "source"), tmp_path / "out")
    name = "modeling_everest.EverestForVideoClassification"
    remote = get_class_from_dynamic_module(name, str(tmp_path / "out"))
    assert remote is not EverestForVideoClassification
    model = remote.from_videomae(tmp_path / "source", keep_ratio=1)
    assert isinstance(model, remote)
    assert_same_classification(model, classifier)


def test_an_occupied_place_is_refused_and_left_alone(tmp_path, classifier):
    source = saved(classifier, tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out: is not empty"):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"notes\.txt: is a file"):
        convert_checkpoint(source, tmp_path / "out" / "notes.txt")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch, classifier):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    source = saved(classifier, tmp_path / "source")
    monkeypatch.setattr(EverestVideoProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ------------------------------------------------------------------------------------------------ accounts and faults


def message_of(path, cls=EverestForVideoClassification, **overrides):
    """Return the message of the error that loading raises, and check that it is one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        cls.from_videomae(path, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_keys_that_do_not_fit_are_all_listed(tmp_path, classifier):
    state = official_names(classifier)
    del state["blocks.1.mlp.fc1.bias"]
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:-3]
    state.update({"cls_token": torch.zeros(1, 1, 32), "blocks.2.gamma_1": torch.zeros(32)})
    path = tmp_path / "tuned.pth"
    torch.save({"model": state}, path)
    message = message_of(path, **UNTOLD)
    assert message.startswith(f"{path}: does not fit EverestForVideoClassification; ")
    assert "missing: everest.encoder.layers.1.mlp.fc1.bias;" in message
    assert "left over: blocks.2.gamma_1, cls_token" in message or "left over: cls_token, blocks.2.gamma_1" in message
    assert "blocks.0.attn.qkv.weight is (31, 32) for (32, 32)" in message


def test_a_layer_too_many_or_too_few_is_an_error(tmp_path, classifier):
    saved(classifier, tmp_path)
    assert "left over: videomae.encoder.layer.2." in message_of(tmp_path, num_hidden_layers=2)
    assert "missing: everest.encoder.layers.3." in message_of(tmp_path, num_hidden_layers=4)


def test_two_last_norms_are_an_error(tmp_path, classifier):
    state = {**official_names(classifier), "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    torch.save(state, tmp_path / "tuned.pth")
    assert message_of(tmp_path / "tuned.pth", **UNTOLD).endswith("left over: norm.weight, norm.bias")


def test_both_forms_of_a_bias_at_once_are_an_error(tmp_path, classifier):
    state = load_file(saved(classifier, tmp_path) / "model.safetensors")
    save_file(
        {**old_key_form(state), **{k: v.clone() for k, v in new_key_form(state).items()}},
        tmp_path / "model.safetensors",
    )
    assert "are both everest.encoder.layers.0.attention.query.bias" in message_of(tmp_path)


def test_position_tables_are_recognised(tmp_path, classifier):
    state = official_names(classifier)
    path = tmp_path / "tuned.pth"
    torch.save({"model": {**state, "pos_embed": sincos_table(NUM_TOKENS, 32)[None]}}, path)
    report = convert_checkpoint(path, tmp_path / "out", **UNTOLD)
    assert report.tables == ["pos_embed"]
    assert "recomputed    pos_embed" in str(report)
    torch.save({"model": {**state, "pos_embed": torch.randn(1, NUM_TOKENS, 32)}}, path)
    assert "pos_embed is a learned position table" in message_of(path, **UNTOLD)


def test_a_fine_tuned_checkpoint_has_no_decoder(tmp_path, classifier):
    message = message_of(saved(classifier, tmp_path), EverestForPreTraining)
    assert "has no decoder, so it cannot become EverestForPreTraining" in message


def test_an_encoder_without_its_last_norm_cannot_go_on_pretraining(tmp_path):
    saved(videomae(VideoMAEForPreTraining, use_mean_pooling=True), tmp_path)
    assert "missing: everest.layernorm.weight, everest.layernorm.bias" in message_of(tmp_path, EverestForPreTraining)


def test_heads_that_cannot_be_read_are_asked_for(tmp_path, classifier):
    torch.save(official_names(classifier), tmp_path / "tuned.pth")
    assert "num_attention_heads cannot be read off weights of width 32" in message_of(tmp_path / "tuned.pth")


def test_unknown_and_impossible_overrides(tmp_path, classifier):
    saved(classifier, tmp_path)
    assert "unknown field of EverestConfig: keep_ration" in message_of(tmp_path, keep_ration=0.5)
    assert "EverestConfig.num_frames is 16" in message_of(tmp_path, num_frames=16)


class Pickled:
    """Something that is not a tensor."""


def damaged_files(folder):
    """Write files that are no checkpoints; return a path and what its error must say of each."""
    state = {"patch_embed.proj.weight": torch.ones(200, 1)}
    torch.save(state, folder / "whole.pth")
    torch.save(state, folder / "whole_old.pth", _use_new_zipfile_serialization=False)
    for name in ("whole", "whole_old"):
        content = (folder / f"{name}.pth").read_bytes()
        (folder / f"{name}_cut.pth").write_bytes(content[: len(content) // 2])
    (folder / "text.pth").write_text("walk 0\nrun 1\n" * 30)
    (folder / "empty.pth").touch()
    torch.save({"model": {"weight": Pickled()}}, folder / "object.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"epoch": 3, "optimizer": {}}, folder / "no_model.pth")
    torch.save({"model": {}}, folder / "nothing.pth")
    torch.save({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, folder / "resnet.pth")
    torch.save({"patch_embed.proj.weight": torch.zeros(32, 3, 8, 8)}, folder / "image_vit.pth")
    return {
        "whole_cut.pth": "is truncated or damaged",
        "whole_old_cut.pth": "is truncated or damaged",
        "text.pth": "is not a PyTorch checkpoint",
        "empty.pth": "is empty",
        "object.pth": "holds a Python object, test_convert.Pickled",
        "list.pth": "holds a list; expected tensors by name",
        "no_model.pth": "is no state dict: 'epoch', 'optimizer' is no tensor; expected tensors by name",
        "nothing.pth": "no patch projection",
        "resnet.pth": "is not a VideoMAE or EVEREST checkpoint: no patch projection; has conv1.weight, fc.bias",
        "image_vit.pth": "has the shape (32, 3, 8, 8); expected (hidden size, channels, tubelet, patch, patch)",
        "absent.pth": "no such file or folder",
        "absent/folder/here": "no such file or folder",
    }


def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(Pickled, "__module__", "test_convert")
    for name, expected in damaged_files(tmp_path).items():
        message = message_of(tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: ")
        assert expected in message


def test_a_folder_of_videomae_is_no_checkpoint_of_everest(tmp_path, classifier):
    saved(classifier, tmp_path)
    for cls in (EverestConfig, EverestForVideoClassification):
        with pytest.raises(
            ValueError, match="model_type is 'videomae'; EverestConfig is for 'everest'; from_videomae"
        ):
            cls.from_pretrained(tmp_path)
    own_type = type("OwnConfig", (EverestConfig,), {"model_type": "own"})
    assert own_type.from_dict(EverestConfig(keep_ratio=0.5).to_dict()).keep_ratio == 0.5


def test_a_file_of_mvd_is_refused(tmp_path, classifier):
    path = training_file(official_names(classifier), tmp_path / "mvd.pth", use_cls_token=False)
    assert "mvd.pth: is of MVD, whose table of positions is not the one of VideoMAE and EVEREST" in message_of(path)


def test_folders_that_are_no_checkpoints(tmp_path, classifier):
    saved(classifier, tmp_path / "good")

    def spoilt(name, **config):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **config}))
        return folder

    folder = spoilt("bare")
    (folder / "model.safetensors").unlink()
    assert "bare: no weights in this folder; expected model.safetensors or pytorch_model.bin" in message_of(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    assert "names shards that are not there: model-00001.safetensors" in message_of(folder)
    (folder / "config.json").unlink()
    torch.save({}, folder / "run.pth")
    assert f"no config.json in this folder; give the file itself: {folder / 'run.pth'}" in message_of(folder)

    assert "model_type is 'vivit'; expected 'videomae'" in message_of(spoilt("vivit", model_type="vivit"))
    assert "expected 'videomae': V-JEPA 2 is another" in message_of(spoilt("vjepa", model_type="vjepa2"))
    assert "config.json: " in message_of(spoilt("wrong", hidden_size="wide"))
    assert "patch_size is [8, 4]; EVEREST has square patches" in message_of(spoilt("oblong", patch_size=[8, 4]))
    EverestForVideoClassification(EverestConfig(num_hidden_layers=1)).config.save_pretrained(tmp_path / "everest")
    assert "is an EVEREST checkpoint already" in message_of(tmp_path / "everest")

    folder = spoilt("cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors: is truncated or damaged" in message_of(folder)
    assert "has the names of Transformers' VideoMAE; give its folder" in message_of(
        tmp_path / "good/model.safetensors"
    )
    folder = spoilt("nested")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {}}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: is no state dict: 'state_dict' is no tensor" in message_of(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: is not JSON" in message_of(folder)


# ------------------------------------------------------------------------------------------------- back to VideoMAE


@pytest.mark.parametrize(
    ("cls", "overrides"),
    [
        (VideoMAEForVideoClassification, {"use_mean_pooling": True, "layer_norm_eps": 1e-3}),
        (VideoMAEForVideoClassification, {"use_mean_pooling": False, "qkv_bias": False}),
        (VideoMAEForPreTraining, {"use_mean_pooling": False, "norm_pix_loss": False}),
        (VideoMAEModel, {"use_mean_pooling": False}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_there_and_back(tmp_path, capsys, cls, overrides):
    original = videomae(cls, **overrides)
    assert cli.main(["convert", str(saved(original, tmp_path / "videomae")), str(tmp_path / "everest")]) == 0
    assert cli.main(["convert", str(tmp_path / "everest"), str(tmp_path / "back"), "--to", "videomae"]) == 0
    said = capsys.readouterr().out.split("source")[-1]
    back, info = cls.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert ("keep_ratio 0.6 is 1" in said) is (cls is not VideoMAEForPreTraining)
    given = {"bool_masked_pos": masks()} if cls is VideoMAEForPreTraining else {}
    with torch.no_grad():
        ours, theirs = back.eval()(clips(), **given)[0], original(clips(), **given)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert {name: getattr(back.config, name) for name in SIZES} == SIZES
    assert back.config.id2label == original.config.id2label
    processor = AutoImageProcessor.from_pretrained(tmp_path / "back")
    frames = [torch.randint(256, (3, 50, 70), dtype=torch.uint8) for _ in range(12)]
    assert processor(frames, return_tensors="pt")["pixel_values"].shape == (1, 12, 3, 24, 40)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attentive_pooling": True}, "attentive_pooling is true; VideoMAE has no pooling by attention"),
        ({"frame_oversampling": 1.5}, "frame_oversampling is 1.5; VideoMAE chooses no frames"),
    ],
    ids=str,
)
def test_what_videomae_has_no_place_for_is_refused(tmp_path, overrides, message):
    EverestForVideoClassification(tiny_config(**overrides)).save_pretrained(tmp_path / "everest")
    with pytest.raises(ValueError, match=f"everest: {message}$"):
        convert_to_videomae(tmp_path / "everest", tmp_path / "out")
    EverestForPreTraining(tiny_config()).save_pretrained(tmp_path / "pretrained")
    with pytest.raises(ValueError, match=r"image_mean is \[0.4, 0.5, 0.6\]; the loss of VideoMAE is for \[0.485, "):
        convert_to_videomae(tmp_path / "pretrained", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_of_the_other_direction_are_refused(tmp_path, capsys, classifier):
    EverestForVideoClassification.from_videomae(saved(classifier, tmp_path / "a")).save_pretrained(tmp_path / "b")
    arguments = [str(tmp_path / "b"), str(tmp_path / "c"), "--to", "videomae", "--keep-ratio", "0.5"]
    assert cli.main(["convert", *arguments]) != 0
    assert "--keep-ratio is for a conversion to everest, not --to videomae" in capsys.readouterr().err
