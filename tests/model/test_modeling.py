"""The models: outputs, saving and loading, remote code, attention, gradients, compilation, losses."""

import contextlib
import copy
import importlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.called import Called
from helpers.tiny import TINY, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForVideoClassification

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel, modeling_everest
from everest_hf.modeling_everest import EverestDropPath, EverestPositionEmbeddings

MODELS = (EverestModel, EverestForPreTraining, EverestForVideoClassification)
HEADS = (EverestForPreTraining, EverestForVideoClassification)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clips(config=None, batch_size=2, seed=0):
    config = config or tiny_config()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        batch_size, config.num_input_frames, config.num_channels, *config.frame_size, generator=generator
    )


def build(model_class, seed=0, attention="sdpa", **overrides):
    torch.manual_seed(seed)
    model = model_class(tiny_config(**overrides)).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms too, which start at 0 and 1
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def main(output):
    return output.logits if "logits" in output else output.last_hidden_state


def aligned(model):
    """Move weights that lie in a mapped file, at any address, to aligned memory: kernels of the CPU round by it."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def assert_identical(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert first[name].dtype == second[name].dtype


# ------------------------------------------------------------------ outputs


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


def test_pretraining_leaves_the_loss_out_where_not_wanted():
    model = build(EverestForPreTraining)
    output = model(clips(), return_loss=False)
    assert output.loss is None
    assert torch.equal(output.logits, model(clips()).logits)


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_class", MODELS)
def test_sdpa_equals_eager(model_class, dtype):
    fused, eager = (build(model_class, attention=name).to(dtype) for name in ("sdpa", "eager"))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 1e-2}[dtype]
    with torch.no_grad():
        first, second = fused(clips().to(dtype)), eager(clips().to(dtype))
    torch.testing.assert_close(main(first), main(second), atol=tolerance, rtol=tolerance)


def test_flex_attention_equals_eager_in_inference():
    # Without gradients only: torch has no backward pass of flex attention on a CPU.
    flex, eager = (
        build(EverestForVideoClassification, attention="flex_attention"),
        build(EverestForVideoClassification, attention="eager"),
    )
    with torch.no_grad():
        torch.testing.assert_close(flex(clips()).logits, eager(clips()).logits, atol=1e-5, rtol=1e-5)


def test_flash_attention_equals_eager():
    flash_attn = pytest.importorskip("flash_attn", reason="flash attention is not installed")
    assert flash_attn
    if not torch.cuda.is_available():
        pytest.skip("flash attention needs a GPU")
    models = [build(EverestForVideoClassification, attention=name) for name in ("flash_attention_2", "eager")]
    with torch.no_grad():
        first, second = (model.to("cuda", torch.bfloat16)(clips().cuda()).logits for model in models)
    torch.testing.assert_close(first, second, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_dropout_acts_in_training_only(attention):
    model = build(EverestForVideoClassification, attention=attention, attention_probs_dropout_prob=0.5)
    assert torch.equal(model(clips()).logits, model(clips()).logits)
    model.train()
    assert not torch.equal(model(clips()).logits, model(clips()).logits)


def test_key_has_no_bias_and_query_and_value_as_configured():
    for bias in (True, False):
        attention = EverestModel(tiny_config(qkv_bias=bias)).encoder.layers[0].attention
        assert attention.key.bias is None
        assert (attention.query.bias is not None) is bias
        assert (attention.value.bias is not None) is bias


# ------------------------------------------------------------------ positions


@pytest.mark.parametrize("model_class", MODELS)
def test_interpolation_to_the_own_grid_changes_nothing(model_class):
    model = build(model_class)
    assert_identical(model(clips()), model(clips(), interpolate_pos_encoding=True))


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("oversampling", [1.0, 1.5])
@pytest.mark.parametrize(("slots", "rows", "columns"), [(6, 3, 5), (4, 5, 2), (8, 6, 10), (2, 3, 5)])
def test_other_sizes_and_frame_counts_run(model_class, oversampling, slots, rows, columns):
    model = build(model_class, frame_oversampling=oversampling)
    frames = int(slots * oversampling) * 3
    output = model(torch.randn(2, frames, 3, rows * 8, columns * 8), interpolate_pos_encoding=True)
    tokens = slots * rows * columns
    assert torch.isfinite(main(output)).all()
    if model_class is EverestForPreTraining:
        assert output.visible_ids.shape[1] == reference.share(0.15, tokens)
        assert output.target_ids.shape[1] == reference.share(0.4, tokens) - reference.share(0.15, tokens)
        assert output.target_ids.max() < tokens
    else:
        assert output.kept_ids.shape[1] == reference.share(0.45, tokens)
        assert output.kept_ids.max() < tokens
    assert (output.slots is None) is (oversampling == 1)
    if oversampling > 1:
        assert output.slots.shape == (2, slots)


def test_positions_are_interpolated_over_slot_row_and_column():
    positions = EverestPositionEmbeddings((4, 3, 5), 32)
    table = reference.positions(60, 32)
    np.testing.assert_allclose(positions((4, 3, 5)), table, atol=1e-6)
    own = table.reshape(4, 3, 5, 32)
    for axis in range(3):
        grid = [4, 3, 5]
        grid[axis] *= 2
        doubled = np.moveaxis(positions(tuple(grid)).numpy().reshape(*grid, 32), axis, 0)
        given = np.moveaxis(own, axis, 0)
        for i in range(len(given) - 1):  # new places lie a quarter of the way from the old ones
            np.testing.assert_allclose(doubled[2 * i + 1], 0.75 * given[i] + 0.25 * given[i + 1], atol=1e-6)
            np.testing.assert_allclose(doubled[2 * i + 2], 0.25 * given[i] + 0.75 * given[i + 1], atol=1e-6)


def test_positions_stay_exact_when_the_model_is_cast():
    positions = EverestPositionEmbeddings((4, 3, 5), 32)
    exact = positions.table.clone()
    for cast in (positions.bfloat16(), positions.half(), positions.float(), positions.to(torch.float64)):
        assert torch.equal(cast.table.float(), exact)


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


# ------------------------------------------------------------------ saving and loading


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
    assert (tmp_path / "configuration_everest.py").exists()
    assert (tmp_path / "modeling_everest.py").exists()


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


# ------------------------------------------------------------------ remote code

SUBCLASS = """
from {origin} import EverestForVideoClassification


class Recogniser(EverestForVideoClassification):
    pass
"""


@pytest.mark.parametrize("origin", ["everest_hf.modeling_everest", ".modeling_everest"])
def test_a_class_of_another_file_is_saved_with_the_files_that_are_named(origin, tmp_path, monkeypatch):
    package = tmp_path / f"own_{origin.count('.')}{len(origin)}"
    package.mkdir()
    for name in ("configuration_everest", "modeling_everest"):
        shutil.copy(sys.modules[f"everest_hf.{name}"].__file__, package)
    (package / "recogniser.py").write_text(SUBCLASS.format(origin=origin))
    monkeypatch.syspath_prepend(tmp_path)
    recogniser = importlib.import_module(f"{package.name}.recogniser").Recogniser
    model = recogniser(recogniser.config_class(**TINY))
    model.save_pretrained(tmp_path / "model")
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForVideoClassification"] == "recogniser.Recogniser"
    assert ("AutoModel" in auto_map) == (origin == ".modeling_everest")
    for path in auto_map.values():
        assert (tmp_path / "model" / f"{path.split('.')[0]}.py").is_file(), path
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert recogniser.from_pretrained(tmp_path / "model").config.num_labels == 5


def test_a_class_of_the_session_is_saved_without_code_of_models(tmp_path):
    model_class = type("Recogniser", (EverestForVideoClassification,), {"__module__": "__main__"})
    model_class(tiny_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_everest.EverestConfig"}
    assert sorted(path.name for path in tmp_path.glob("*.py")) == ["configuration_everest.py"]


CHILD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "everest_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())

import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForVideoClassification

root, folders = sys.argv[1], sys.argv[2].split(",")
pixel_values = torch.load(f"{root}/clips.pt")
classes = {"base": AutoModel, "pretraining": AutoModelForPreTraining, "classes": AutoModelForVideoClassification}
results = {}
for folder in folders:
    path = f"{root}/{folder}"
    assert AutoConfig.from_pretrained(path, trust_remote_code=True).num_tokens == 60
    for name, auto_class in classes.items():
        model = auto_class.from_pretrained(path, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
        with torch.no_grad():
            output = model(pixel_values, output_hidden_states=True)
        results[folder, name] = {"states": output.hidden_states[-1]}
        if name == folder.split("-")[0] and name != "base":
            results[folder, name]["logits"] = output.logits
            if "-" not in folder:
                model.save_pretrained(f"{root}/{name}-again")
torch.save(results, f"{root}/results.pt")
"""


def run_without_the_package(root, folders):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-I", "-c", CHILD, str(root), ",".join(folders)]
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return torch.load(root / "results.pt")


def test_a_folder_serves_a_process_that_cannot_import_the_package(tmp_path):
    pixel_values = clips()
    torch.save(pixel_values, tmp_path / "clips.pt")
    models = dict(zip(("base", "pretraining", "classes"), (build(each) for each in MODELS), strict=True))
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    results = run_without_the_package(tmp_path, models)
    assert len(results) == 9
    for (folder, name), result in results.items():
        loaded = MODELS[list(models).index(name)].from_pretrained(tmp_path / folder)
        with torch.no_grad():
            output = loaded(pixel_values, output_hidden_states=True)
        assert torch.equal(result["states"], output.hidden_states[-1]), (folder, name)
        if "logits" in result:
            assert torch.equal(result["logits"], output.logits)

    # What such a process saves again serves the next one.
    again = ["pretraining-again", "classes-again"]
    for folder in again:
        before, after = (
            json.loads((tmp_path / name / "config.json").read_text()) for name in (folder.split("-")[0], folder)
        )
        assert after == before
        for file in ("configuration_everest.py", "modeling_everest.py"):
            source = tmp_path / folder.split("-")[0] / file
            assert (tmp_path / folder / file).read_text() == source.read_text()
    results_again = run_without_the_package(tmp_path, again)
    for folder in again:
        name = folder.split("-")[0]
        assert torch.equal(results_again[folder, name]["logits"], results[name, name]["logits"])


# ------------------------------------------------------------------ gradients


def loss_of(model, pixel_values, **kwargs):
    if isinstance(model, EverestForVideoClassification):
        kwargs["labels"] = torch.arange(len(pixel_values)) % model.config.num_labels
    output = model(pixel_values, **kwargs)
    return output.loss if "loss" in output else output.last_hidden_state.float().square().mean()


def gradients(model, pixel_values, **kwargs):
    model.zero_grad()
    loss = loss_of(model, pixel_values, **kwargs)
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same_gradients(first, second, tolerance=1e-6):
    torch.testing.assert_close(first[0], second[0], atol=tolerance, rtol=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        error = (grad - second[1][name]).abs().max() / second[1][name].abs().max()
        assert error < 100 * tolerance, name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("model_class", MODELS)
def test_every_weight_learns(model_class, autocast):
    model = build(model_class).train()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss, grads = gradients(model, clips())
    assert loss.dtype == torch.float32
    for name, grad in grads.items():
        assert torch.isfinite(grad).all()
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", HEADS)
def test_autocast_gives_nearly_the_same_loss(model_class, dtype):
    model = build(model_class).train()
    noise = {"noise": torch.rand(2, 24)} if model_class is EverestForPreTraining else {}
    expected = loss_of(model, clips(), **noise)
    with torch.autocast("cpu", dtype):
        assert loss_of(model, clips(), **noise).item() == pytest.approx(expected.item(), rel=0.02)


def test_the_gradient_of_the_projection_is_that_of_the_kept_tokens():
    model = build(EverestModel).double()
    pixel_values = clips().double().requires_grad_()
    output = model(pixel_values)
    weights = torch.randn_like(output.last_hidden_state)
    (output.last_hidden_state * weights).sum().backward()
    touched = pixel_values.grad.reshape(2, 4, 3, 3, 3, 8, 5, 8).abs().amax(dim=(2, 3, 5, 7)).flatten(1) > 0
    kept = torch.zeros(2, 60, dtype=torch.bool).scatter(1, output.kept_ids, True)
    assert torch.equal(touched, kept)

    def loss(flat):
        weight = flat.reshape(model.embeddings.projection.weight.shape)
        parameters = {"embeddings.projection.weight": weight}
        states = torch.func.functional_call(model, parameters, (pixel_values.detach(),)).last_hidden_state
        return (states * weights).sum()

    point = model.embeddings.projection.weight.detach().flatten()
    direction = torch.randn_like(point)
    step = 1e-6 * direction
    numeric = (loss(point + step) - loss(point - step)) / 2e-6
    analytic = (model.embeddings.projection.weight.grad.flatten() * direction).sum()
    assert analytic.item() == pytest.approx(numeric.item(), rel=1e-4)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model_class, reentrant):
    overrides = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3}
    model = build(model_class, **overrides).train()
    torch.manual_seed(1)
    expected = gradients(model, clips())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every supported version
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    layers = [module for module in model.modules() if type(module).__name__ == "EverestAttention"]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: calls.append(module))
    if reentrant:  # it passes no gradient into a stretch of layers none of whose inputs has one
        model.enable_input_require_grads()
    torch.manual_seed(1)
    assert_same_gradients(gradients(model, clips()), expected)
    assert len(calls) == 2 * len(layers)  # each ran again in the backward pass


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


def test_frozen_weights_stay_without_gradient():
    model = build(EverestForVideoClassification)
    model.everest.requires_grad_(False)
    loss_of(model, clips()).backward()
    assert all(weight.grad is None for weight in model.everest.parameters())
    assert model.classifier.weight.grad.abs().max() > 0


# ------------------------------------------------------------------ attentive pooling, frozen encoder

ATTENTIVE = {"attentive_pooling": True}


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_attentive_pooling_is_the_same_in_both_implementations(dtype):
    fused, eager = (
        build(EverestForVideoClassification, attention=name, **ATTENTIVE).to(dtype) for name in ("sdpa", "eager")
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 1e-2}[dtype]
    with torch.no_grad():
        first, second = fused(clips().to(dtype)), eager(clips().to(dtype))
    torch.testing.assert_close(first.logits, second.logits, atol=tolerance, rtol=tolerance)


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


def test_every_weight_of_an_attentive_head_learns_compiled_too():
    torch._dynamo.reset()
    model = build(EverestForVideoClassification, num_hidden_layers=1, **ATTENTIVE).train()
    expected = gradients(model, clips())
    for name, grad in expected[1].items():
        assert grad.abs().max() > 0, name
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, clips()), expected)


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
    model.train(training)
    (model if whole else model.everest).requires_grad_(True)
    assert {module.training for module in model.modules()} == {training}
    model.everest.eval()  # by the caller's own will
    model.requires_grad_(True)
    assert not model.everest.training


def test_a_classifier_that_was_frozen_whole_thaws_too():
    model = build(EverestForVideoClassification).requires_grad_(False).train()
    assert not model.everest.training
    assert model.requires_grad_(False) is model
    assert not model.everest.training
    assert model.requires_grad_(True) is model
    assert model.everest.training


# ------------------------------------------------------------------ dropout and drop path


@pytest.mark.parametrize("model_class", MODELS)
def test_drop_path_acts_in_training_only(model_class):
    dropping, plain = build(model_class, drop_path_rate=0.7), build(model_class)
    noise = {"noise": torch.rand(2, 24)} if model_class is EverestForPreTraining else {}
    assert_identical(dropping(clips(), **noise), plain(clips(), **noise))
    dropping.train()
    states = [dropping(clips(), output_hidden_states=True, **noise).hidden_states for _ in range(6)]
    last = torch.stack([layers[-1] for layers in states])
    assert not torch.equal(last[0], last[1:].mean(dim=0))
    first = torch.stack([layers[1] for layers in states])
    assert torch.equal(first[0], first[1])  # the rate of the first layer is 0


def test_drop_path_rises_from_layer_to_layer():
    model = EverestForPreTraining(tiny_config(drop_path_rate=0.3, num_hidden_layers=4, decoder_num_hidden_layers=2))
    assert [layer.drop_path.p for layer in model.everest.encoder.layers] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [layer.drop_path.p for layer in model.decoder.layers] == [0, 0]


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = EverestDropPath(0.25).train()
    x = torch.ones(20000, 3, 2)
    dropped = drop(x)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (dropped.flatten(1).std(dim=1) == 0).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "classifier_dropout"])
def test_dropout_acts_in_training_only(field):
    model = build(EverestForVideoClassification, **{field: 0.5})
    assert torch.equal(model(clips()).logits, model(clips()).logits)
    assert torch.equal(model(clips()).logits, build(EverestForVideoClassification)(clips()).logits)
    model.train()
    assert not torch.equal(model(clips()).logits, model(clips()).logits)


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
    model.config.problem_type = "clustering"
    with pytest.raises(
        ValueError, match=r"EverestConfig\.problem_type is 'clustering'; it must be one of 'regression', "
    ):
        model(clips(), labels=torch.tensor([1, 2]))


def test_labels_of_another_kind_than_the_first_are_refused():
    model = head_with(LOGITS)
    model(clips(), labels=torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"labels for problem_type 'multi_label_classification' .*\(2,\).*\(2, 3\)"):
        model(clips(), labels=torch.tensor([1, 2]))


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


def test_norm_pix_loss_of_a_flat_tubelet_is_finite():
    model = build(EverestForPreTraining)
    output = model(torch.zeros(2, 12, 3, 24, 40))
    torch.testing.assert_close(output.loss, output.logits.square().mean())  # a flat tubelet's target is 0


# ------------------------------------------------------------------ compilation and export


def draws(model):
    """Return the randomness as arguments, so that two ways to run the model draw the same."""
    kwargs = {}
    if isinstance(model, EverestForPreTraining):
        kwargs["noise"] = torch.rand(2, model.config.num_informative_tokens)
    if model.config.frame_oversampling > 1:
        kwargs["frame_noise"] = torch.rand(2, model.config.num_input_frames // 3)
    return kwargs


@pytest.mark.parametrize("model_class", MODELS)
def test_compiled_in_one_graph_training_is_the_same(model_class):
    torch._dynamo.reset()
    model = build(model_class, frame_oversampling=1.5, num_hidden_layers=1).train()
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


def test_inductor_gives_the_same():
    torch._dynamo.reset()
    model = build(EverestForVideoClassification, num_hidden_layers=1)
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
    monkeypatch.setattr(modeling_everest, "_TOKENS_AT_A_TIME", tokens_at_a_time)
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


def test_what_is_done_in_place_compiles_and_exports():
    model, pixels = build(EverestForVideoClassification, hidden_act="gelu"), clips()
    with torch.no_grad():
        expected = model(pixels).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixels).logits, expected)
        program = torch.export.export(model, (), {"pixel_values": pixels})
        torch.testing.assert_close(program.module()(pixel_values=pixels).logits, expected)
