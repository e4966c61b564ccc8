"""Initial weights, saving and loading."""

import json
import logging

import pytest
import torch
from helpers.models import ATTENTIVE, DTYPES, MODELS, aligned, assert_identical, build, clips, main
from helpers.tiny import tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForVideoClassification

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel

# ------------------------------------------------------------------ initialisation


def test_weights_start_as_configured():
    torch.manual_seed(0)
    model = EverestForVideoClassification(tiny_config(num_labels=400, init_scale=0.01, hidden_size=64))
    for name, weight in model.named_parameters():
        if name == "classifier.weight":
            assert weight.std().item() == pytest.approx(0.1 * 0.01, rel=0.05)
        elif name.endswith("bias"):
            assert weight.abs().max() == 0, name
        elif weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.1, rel=0.1), name


def test_a_new_head_on_loaded_weights_is_scaled_too(tmp_path):
    EverestForPreTraining(tiny_config()).save_pretrained(tmp_path)
    model = EverestForVideoClassification.from_pretrained(tmp_path, num_labels=400, init_scale=0.01)
    assert model.classifier.weight.std().item() == pytest.approx(0.1 * 0.01, rel=0.05)
    assert model.classifier.bias.abs().max() == 0
    assert (model.fc_norm.weight == 1).all()


def test_a_new_attentive_head_on_a_pretrained_encoder_starts_as_configured(tmp_path):
    build(EverestForPreTraining, hidden_size=64).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, info = EverestForVideoClassification.from_pretrained(tmp_path, output_loading_info=True, **ATTENTIVE)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooling", "fc_norm", "classifier"}
    for name, weight in model.pooling.named_parameters():
        if name.endswith("bias"):
            assert weight.abs().max() == 0, name
        elif name == "norm.weight":
            assert (weight == 1).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.1, rel=0.25), name


# ------------------------------------------------------------------ a model comes back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_class", MODELS)
def test_a_saved_model_comes_back_identical(model_class, dtype, tmp_path):
    model = build(model_class, frame_oversampling=1.5).to(dtype)
    model.save_pretrained(tmp_path)
    pixel_values = clips(model.config).to(dtype)
    larger = torch.randn(1, 18, 3, 32, 56)
    with torch.no_grad():
        expected, expected_larger = model(pixel_values), model(larger, interpolate_pos_encoding=True)
    for kwargs in ({}, {"dtype": dtype}, {"dtype": "auto"}, {"device_map": "cpu"}):
        loaded = aligned(model_class.from_pretrained(tmp_path, **kwargs))
        assert not loaded.training
        assert loaded.dtype == dtype
        assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
        with torch.no_grad():
            assert_identical(loaded(pixel_values), expected)
            assert_identical(loaded(larger, interpolate_pos_encoding=True), expected_larger)
        assert_identical(loaded(pixel_values), model(pixel_values))  # the path of training, with gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", MODELS)
def test_a_model_is_read_in_another_precision_as_it_is_cast_to_it(model_class, dtype, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    loaded = aligned(model_class.from_pretrained(tmp_path, dtype=dtype))
    with torch.no_grad():
        assert_identical(loaded(clips()), model.to(dtype)(clips()))


@pytest.mark.parametrize(
    ("model_class", "auto_class"),
    list(zip(MODELS, (AutoModel, AutoModelForPreTraining, AutoModelForVideoClassification), strict=True)),
)
def test_auto_classes_load_it(model_class, auto_class, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    loaded = aligned(auto_class.from_pretrained(tmp_path))
    assert type(loaded) is model_class
    assert_identical(loaded(clips()), model(clips()))
    assert type(auto_class.from_config(AutoConfig.from_pretrained(tmp_path))) is model_class


def test_a_checkpoint_holds_the_weights_and_nothing_that_can_be_computed(tmp_path):
    from safetensors import safe_open

    model = build(EverestForPreTraining)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert set(stored["auto_map"]) >= {
        "AutoConfig",
        "AutoModel",
        "AutoModelForPreTraining",
        "AutoModelForVideoClassification",
    }
    names = "attention", "camera", "configuration", "embeddings", "kernels", "modeling", "packing", "selection"
    assert {path.name for path in tmp_path.glob("*.py")} == {f"{name}_everest.py" for name in names}


@pytest.mark.parametrize("model_class", MODELS)
def test_a_start_on_the_meta_device_gives_the_same_model(model_class):
    model = build(model_class)
    with torch.device("meta"):
        empty = model_class(tiny_config()).eval()
    assert {weight.device.type for weight in empty.state_dict().values()} == {"meta"}
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert_identical(filled(clips()), model(clips()))


def test_accelerate_loads_it_without_building_it_twice(tmp_path):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    model = build(EverestForVideoClassification)
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = EverestForVideoClassification(tiny_config()).eval()
    loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    loaded = aligned(loaded)
    assert_identical(loaded(clips()), model(clips()))


@pytest.mark.parametrize("model_class", MODELS)
def test_attentions_that_the_config_asks_for_are_saved_with_it(model_class, tmp_path):
    model = build(model_class, output_attentions=True)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "sdpa"
    loaded = model_class.from_pretrained(tmp_path)
    found, expected = aligned(loaded)(clips()), model(clips())
    assert_identical({"main": main(found)}, {"main": main(expected)})
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_ratio", 40),
        ("keep_ratio", 0),
        ("pretraining_keep_ratio", 30),
        ("mask_ratio", -0.5),
        ("token_selection", "movement"),
        ("frame_oversampling", 0.5),
    ],
)
def test_an_impossible_value_that_was_set_is_neither_used_nor_saved(model_class, field, value, tmp_path):
    model = build(model_class)
    setattr(model.config, field, value)
    for use in (
        lambda: model(clips()),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: model.config.save_pretrained(tmp_path / "model"),
    ):
        with pytest.raises(ValueError, match=rf"EverestConfig\.{field} is {value!r}; it must be"):
            use()
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------ one model from another's checkpoint


class Records(logging.Handler):
    """Keeps what the library logs."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings_logged():
    handler, logger = Records(), logging.getLogger("transformers")
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def test_from_pretraining_to_classification_only_the_head_is_new(tmp_path, warnings_logged):
    source = build(EverestForPreTraining)
    source.save_pretrained(tmp_path)
    warnings_logged.clear()
    model, info = EverestForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    said = [message for message in warnings_logged if "classifier" in message]
    assert len(said) == 1
    assert "decoder" not in said[0]
    stored = source.state_dict()
    for name, weight in model.everest.state_dict().items():
        assert torch.equal(weight, stored[f"everest.{name}"])


@pytest.mark.parametrize("source_class", MODELS)
def test_the_encoder_alone_loads_from_every_checkpoint_without_a_word(source_class, tmp_path, warnings_logged):
    source = build(source_class)
    source.save_pretrained(tmp_path)
    warnings_logged.clear()
    model, info = EverestModel.from_pretrained(tmp_path, output_loading_info=True)
    model = aligned(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not warnings_logged
    states = getattr(source, "everest", source)(clips(), output_hidden_states=True).hidden_states
    assert torch.equal(model(clips()).last_hidden_state, states[-1])


def test_the_encoder_of_pretraining_comes_with_its_norm_where_wanted(tmp_path):
    source = build(EverestForPreTraining)
    source.save_pretrained(tmp_path)
    model = aligned(AutoModel.from_pretrained(tmp_path, use_mean_pooling=False))
    assert torch.equal(model(clips()).last_hidden_state, source.everest(clips()).last_hidden_state)


def test_an_encoder_grows_into_each_head(tmp_path):
    build(EverestModel, use_mean_pooling=False).save_pretrained(tmp_path)
    _, info = EverestForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(name.startswith("decoder.") for name in info["missing_keys"])
    _, info = EverestForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}


def test_a_checkpoint_with_something_else_in_it_says_so(tmp_path):
    model = build(EverestForVideoClassification)
    state = {**model.state_dict(), "everest.encoder.layers.7.norm1.weight": torch.ones(32)}
    model.save_pretrained(tmp_path, state_dict=state)
    _, info = EverestForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"everest.encoder.layers.7.norm1.weight"}


def test_the_size_of_the_head_can_change(tmp_path):
    source = build(EverestForVideoClassification)
    source.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        EverestForVideoClassification.from_pretrained(tmp_path, num_labels=7)
    model, info = EverestForVideoClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert not info["missing_keys"]
    assert model(clips()).logits.shape == (2, 7)
    for name, weight in source.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(model.state_dict()[name], weight)
    assert model.classifier.weight.std() < 0.1  # newly made, with init_scale 0.5 of 0.1


def test_attentive_pooling_saves_and_loads(tmp_path, warnings_logged):
    model = build(EverestForVideoClassification, **ATTENTIVE)
    model.save_pretrained(tmp_path)
    loaded, info = EverestForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.attentive_pooling
    assert_identical(aligned(loaded)(clips()), model(clips()))
    warnings_logged.clear()
    EverestModel.from_pretrained(tmp_path)
    assert not warnings_logged  # the encoder leaves the head out without a word
    with torch.device("meta"):
        empty = EverestForVideoClassification(tiny_config(**ATTENTIVE)).eval()
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert_identical(filled(clips()), model(clips()))
