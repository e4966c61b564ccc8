"""What a run starts from: a checkpoint of EVEREST or VideoMAE whose weights it keeps, or an error."""

import json

import pytest
import torch
from accelerate import Accelerator
from helpers.tiny import TINY, tiny_config
from helpers.videos import write_class_folders
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel
from everest_hf.data import load_videos
from everest_hf.training import build
from everest_hf.training.dry_run import describe
from everest_hf.training.recipe import load_recipe

NOT_OF_VIDEOMAE = ("keep_ratio", "pretraining_keep_ratio", "mask_ratio", "init_scale", "head_layer_norm_eps")
SHARED = {name: value for name, value in TINY.items() if name not in NOT_OF_VIDEOMAE}
MODELS = {
    "encoder": EverestModel,
    "autoencoder": EverestForPreTraining,
    "classifier": EverestForVideoClassification,
    "videomae": VideoMAEForPreTraining,
    "videomae-classifier": VideoMAEForVideoClassification,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with videos of two classes and a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos", videos_per_class=1)
    for name, model_class in MODELS.items():
        torch.manual_seed(0)
        # As published, VideoMAE pools the mean in classifiers alone.
        videomae = {**SHARED, "num_labels": 2, "use_mean_pooling": name != "videomae"}
        config = VideoMAEConfig(**videomae) if "videomae" in name else tiny_config(num_labels=2)
        model_class(config).save_pretrained(folder / name)
    return folder


def recipe_of(place, model, task="finetune", **options):
    videos = str(place / "videos")
    return load_recipe(None, {"task": task, "model": str(place / model), "train": videos, "val": videos, **options})


def started(place, model, task="finetune", empty=False, **options):
    """Return the model that a run builds."""
    rows = load_videos(place / "videos", labels_required=task != "pretrain")
    return build.build_model(recipe_of(place, model, task, **options), rows, empty=empty)


@pytest.mark.parametrize(
    ("model", "task", "fresh"),
    [
        ("videomae", "finetune", {"classifier", "fc_norm"}),
        ("videomae", "probe", {"classifier", "fc_norm"}),
        ("videomae", "pretrain", set()),
        ("videomae-classifier", "finetune", set()),
    ],
)
def test_a_checkpoint_of_videomae_is_converted_and_this_is_said(place, model, task, fresh, capsys):
    built = started(place, model, task)
    assert f"model {place / model}: converted from VideoMAE" in capsys.readouterr().out
    expected = type(built).from_videomae(str(place / model), num_labels=2).state_dict()
    for name, weight in built.state_dict().items():
        if name.split(".")[0] not in fresh:
            assert torch.equal(weight, expected[name]), name
    empty = started(place, model, task, empty=True)
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    assert empty.config.to_dict() == built.config.to_dict()


OTHER = {
    "num_channels": 4,
    "patch_size": 4,
    "tubelet_size": 2,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "qkv_bias": False,
}
STATISTICS = {"image_mean": [0.5] * 4, "image_std": [0.5] * 4}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("field", OTHER)
def test_a_field_that_asks_for_other_weights_is_refused(place, model, field):
    config = {field: OTHER[field], **(STATISTICS if field == "num_channels" else {})}
    right = TINY.get(field, {"num_channels": 3, "qkv_bias": True}.get(field))
    expected = (
        f"config.{field} is {OTHER[field]!r}; it must be {right!r}, that of the weights of model {place / model}"
    )
    if field == "qkv_bias" and "videomae" in model:  # whose configuration does not tell
        expected = f"{place / model}: does not fit EverestForVideoClassification; left over: "
    with pytest.raises(ValueError) as raised:
        started(place, model, config=config)
    assert str(raised.value).startswith(expected)
    if model == "classifier":
        with pytest.raises(ValueError) as raised:
            build.load_trained(recipe_of(place, model, config=config))
        assert str(raised.value) == expected


@pytest.mark.parametrize("model", ["autoencoder", "videomae"])
def test_the_decoder_is_kept_where_there_is_one(place, model):
    config = {"decoder_hidden_size": 24}
    with pytest.raises(ValueError, match=r"config\.decoder_hidden_size is 24; it must be 20"):
        started(place, model, "pretrain", config=config)
    assert started(place, "encoder", "pretrain", config=config).decoder.mask_token.shape[-1] == 24


def test_what_changes_no_weight_may_differ(place):
    config = {"image_size": [32, 48], "num_frames": 9, "keep_ratio": 0.5, "attentive_pooling": True}
    expected = load_file(place / "autoencoder" / "model.safetensors")
    for model in ("autoencoder", "videomae"):
        built = started(place, model, config=config)
        assert built.config.grid_size == (3, 4, 6)
        assert built.pooling is not None
        if model == "autoencoder":
            for name, weight in built.everest.state_dict().items():
                assert torch.equal(weight, expected[f"everest.{name}"])


def test_the_head_may_have_another_size(place, tmp_path):
    EverestForVideoClassification(tiny_config(num_labels=7)).save_pretrained(tmp_path / "seven")
    assert started(place, tmp_path / "seven").classifier.out_features == 2


def without_a_layer(weights: dict) -> dict:
    return {name: weight for name, weight in weights.items() if ".layers.1." not in name}


def with_another_layer(weights: dict) -> dict:
    return weights | {
        name.replace(".1.", ".2."): weight.clone() for name, weight in weights.items() if ".layers.1." in name
    }


def with_wider_layers(weights: dict) -> dict:
    return {name: torch.cat([weight, weight]) if ".fc1." in name else weight for name, weight in weights.items()}


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_a_layer, "has no everest.encoder.layers.1."),
        (with_another_layer, "has everest.encoder.layers.2.attention.key.weight, which is not in its config"),
        (with_wider_layers, "has everest.encoder.layers.0.mlp.fc1.bias of the shape (96,); expected (48,)"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(place, tmp_path, change, words, evaluated):
    EverestForVideoClassification(tiny_config(num_labels=2)).save_pretrained(tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    load = (lambda: build.load_trained(recipe_of(place, tmp_path))) if evaluated else lambda: started(place, tmp_path)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        load()
    assert f"model {tmp_path}" in str(raised.value)
    if not (evaluated and change is with_wider_layers):  # which Transformers refuses itself
        assert words in str(raised.value)


def test_no_other_model_is_evaluated_or_started_from(place, tmp_path):
    with pytest.raises(ValueError) as raised:
        build.load_trained(recipe_of(place, "videomae-classifier"))
    source = place / "videomae-classifier"
    assert str(raised.value) == (
        f"model {source} is of the type 'videomae'; expected a checkpoint of EVEREST; "
        f"`everest-hf convert {source} OUT` makes one of it"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vivit"}))
    with pytest.raises(ValueError, match=f"model {tmp_path} is of the type 'vivit'; expected a checkpoint of EVEREST"):
        started(place, tmp_path)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_a_run_reads_three_channels_and_the_dry_run_says_so(place, num_channels):
    statistics = {"image_mean": [0.5] * num_channels, "image_std": [0.5] * num_channels}
    config = {**TINY, "num_channels": num_channels, **statistics}
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in config.items() if name != "num_labels"}
    options = {"train": str(place / "videos"), "batch_size": 1, "frame_step": 1, "output_dir": str(place / "run")}
    recipe = load_recipe(None, {"config": config, **options})
    with pytest.raises(
        ValueError, match=f"config.num_channels is {num_channels}; it must be 3: videos are read as RGB"
    ):
        describe(recipe, Accelerator())
