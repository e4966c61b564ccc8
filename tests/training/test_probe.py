"""Probing: a head that learns on an encoder that stays as it is."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.commands import train
from helpers.tiny import TINY, tiny_config
from helpers.videos import moving_frames, write_list, write_video
from safetensors.torch import load_file
from transformers import AutoModelForVideoClassification

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.data import load_videos
from everest_hf.training import build
from everest_hf.training.accelerator import build_accelerator
from everest_hf.training.recipe import load_recipe

RECIPE = {
    "task": "probe",
    "model": "encoder",
    "train": "videos/train",
    "val": "videos/val",
    "frame_step": 1,
    "epochs": 12,
    "warmup_epochs": 1,
    "batch_size": 4,
    "base_lr": 2.0,
    "segments": 1,
    "crops": 1,
    "eval_every": 6,
    "num_workers": 1,
}
HEADS = {"linear": {}, "attentive": {"attentive_pooling": True}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder that nobody trained, with drop path, and videos whose class is how bright they are."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    EverestForPreTraining(tiny_config(drop_path_rate=0.5)).save_pretrained(folder / "encoder")
    for part, count in (("train", 6), ("val", 3)):
        for name, brightness in (("bright", 1.0), ("dark", 0.3)):
            for i in range(count):
                frames = moving_frames(20, 48, 64, seed=100 * (part == "val") + i) * brightness
                write_video(folder / "videos" / part / name / f"{i}.mp4", frames.astype("uint8"))
    return folder


@pytest.fixture(scope="module", params=HEADS)
def probed(request, place):
    """The folder of a probe with each head."""
    name = request.param
    (place / f"{name}.yaml").write_text(yaml.safe_dump({**RECIPE, "config": HEADS[name], "output_dir": name}))
    train(f"{name}.yaml", cwd=place).check()
    return place / name


def model_of(place, head="linear", **options):
    """Return the model of a probe, as a run builds it, and its recipe."""
    recipe = load_recipe(None, {**RECIPE, "model": str(place / "encoder"), "config": HEADS[head]} | options)
    return build.build_model(recipe, load_videos(place / "videos" / "train")), recipe


# ------------------------------------------------------------------ whole runs


def test_the_encoder_stays_as_it_was_to_the_bit_and_the_head_learns(place, probed):
    before, after = (
        load_file(place / "encoder" / "model.safetensors"),
        load_file(probed / "model" / "model.safetensors"),
    )
    encoder = [name for name in after if name.startswith("everest.")]
    assert encoder == [name for name in before if name.startswith("everest.") and "everest.layernorm" not in name]
    for name in encoder:
        assert torch.equal(after[name], before[name]), name
    assert (after["classifier.bias"] != 0).all()
    assert (after["fc_norm.weight"] != 1).any()
    if "pooling.norm.bias" in after:
        assert (after["pooling.norm.bias"] != 0).any()


def test_it_tells_bright_from_dark(probed):
    lines = [json.loads(line) for line in (probed / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["val_top1"] >= 5 / 6


def test_the_result_is_a_classifier_that_evaluates_as_the_run_did(place, probed):
    model, info = AutoModelForVideoClassification.from_pretrained(probed / "model", output_loading_info=True)
    assert isinstance(model, EverestForVideoClassification)
    assert not any(info.values())
    assert model.config.id2label == {0: "bright", 1: "dark"}
    lines = [json.loads(line) for line in (probed / "log.jsonl").read_text().splitlines()]
    train(probed / "recipe.yaml", "--eval_only", cwd=place).check()
    (figures,) = (json.loads(path.read_text()) for path in (probed / "evaluation").glob("*.json"))
    assert figures["val_top1"] == lines[-1]["val_top1"]


def test_the_card_says_what_was_done(probed):
    card = (probed / "model" / "README.md").read_text()
    assert "probing" in card
    assert "fine-tuning" not in card.split("## Training")[1].split("## Evaluation")[0]


# ------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("head", HEADS)
def test_nothing_of_the_encoder_is_kept_for_a_backward_pass(place, head):
    model, _ = model_of(place, head)
    model.train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = model(torch.randn(8, 12, 3, 24, 40), labels=torch.zeros(8, dtype=torch.long)).loss
    weights = {weight.data_ptr() for weight in model.parameters()}
    inner = [x for x in kept if x.data_ptr() not in weights]
    # 8 clips of 27 tokens of 32 numbers. The linear head sees their mean; the attentive one keeps what its norm saw,
    # what this gave to key and to value, keys and values.
    tokens = [x for x in inner if x.numel() >= 8 * 27 * 32]
    assert len(tokens) == {"linear": 0, "attentive": 5}[head], [x.shape for x in tokens]
    assert not any(x.shape[-1:] == (TINY["intermediate_size"],) for x in inner)
    loss.backward()
    assert all(weight.grad is None for weight in model.everest.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_the_optimizer_has_the_head_alone(place, head):
    model, recipe = model_of(place, head)
    optimizer, _ = build.build_optimizer(recipe, model, 4, 3)
    trained = {weight for group in optimizer.param_groups for weight in group["params"]}
    assert trained == set(model.parameters()) - set(model.everest.parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_training_mode_leaves_the_encoder_in_evaluation(place):
    model, recipe = model_of(place)
    prepared = build_accelerator(recipe).prepare_model(model)
    assert isinstance(Accelerator().unwrap_model(prepared), EverestForVideoClassification)
    prepared.train()
    assert not any(module.training for module in model.everest.modules())
    clips = torch.randn(2, 12, 3, 24, 40)
    assert torch.equal(prepared(clips).logits, prepared(clips).logits)  # no drop path


def test_balanced_weights_of_the_classes_by_hand(place, tmp_path):
    """Three bright videos and one dark: 4 / (2 * 3) and 4 / (2 * 1). Those of a checkpoint are of its own videos."""
    videos = sorted((place / "videos" / "train").glob("*/*.mp4"))
    rows = load_videos(
        write_list(tmp_path / "few.txt", [(path, path.parent.name) for path in (*videos[:3], videos[-1])])
    )
    recipe = load_recipe(None, {**RECIPE, "model": str(place / "encoder"), "class_weights": "balanced"})
    model = build.build_model(recipe, rows)
    assert model.config.class_weights == pytest.approx([2 / 3, 2])
    model.save_pretrained(tmp_path / "weighted")
    config = build.build_model(replace(recipe, model=str(tmp_path / "weighted"), class_weights="none"), rows).config
    assert config.class_weights is None


# ------------------------------------------------------------------ the recipe


def test_probing_has_light_augmentation_and_no_weight_decay_by_default():
    recipe = load_recipe(None, {"task": "probe", "train": "videos"})
    assert (recipe.weight_decay, recipe.layer_decay, recipe.rand_augment, recipe.erasing) == (0, 1, 0, 0)
    assert (recipe.label_smoothing, recipe.flip, recipe.crop_scale) == (0, True, [0.08, 1.0])


def test_a_probe_without_an_encoder_is_refused(place):
    with pytest.raises(ValueError, match="model is None; it must be the checkpoint whose encoder is probed"):
        model_of(place, model=None)
