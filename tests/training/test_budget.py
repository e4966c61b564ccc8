"""Runs with token_budget "batch": what they train on, and the threshold that they leave for evaluation."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import FSDP2, train, train_on
from helpers.tiny import TINY
from helpers.videos import bad_files, moving_frames, write_list, write_video

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel
from everest_hf.data import VideoViews, load_videos, transforms
from everest_hf.evaluation.threshold import score_tokens
from everest_hf.training import loaders
from everest_hf.training.recipe import load_recipe

BUDGET = {"token_budget": "batch", "min_keep_ratio": 0.1, "max_keep_ratio": 0.9}
MODEL = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
RECIPE = {
    "train": "videos/train",
    "val": "videos/val",
    "config": {**{name: value for name, value in MODEL.items() if name != "num_labels"}, **BUDGET},
    "frame_step": 1,
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 4,
    "base_lr": 0.1,
    "num_workers": 0,
}
LABELLED = {**RECIPE, "config": BUDGET, "model": "pretrain/model", "segments": 1, "crops": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with videos of two classes, of which every other one stands still after a while."""
    folder = tmp_path_factory.mktemp("place")
    for part, count in (("train", 6), ("val", 2)):
        for label in ("left", "right"):
            for i in range(count):
                frames = moving_frames(20, 48, 64, seed=100 * (part == "val") + i + 50 * (label == "left"))
                if i % 2:
                    frames[10:] = frames[10]
                write_video(folder / "videos" / part / label / f"{i}.mp4", frames)
    recipes = {
        "pretrain": RECIPE,
        "finetune": {**LABELLED, "task": "finetune"},
        "probe": {**LABELLED, "task": "probe"},
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": name}))
    return folder


@pytest.fixture(scope="module")
def pretrained(place) -> Path:
    train("pretrain.yaml", cwd=place).check()
    return place / "pretrain"


@pytest.fixture(scope="module")
def finetuned(place, pretrained) -> Path:
    train("finetune.yaml", cwd=place).check()
    return place / "finetune"


def threshold_in(folder: Path) -> list[float]:
    """Return the numbers of the threshold of a checkpoint."""
    found = EverestModel.from_pretrained(folder).config.keep_threshold
    return [found["medians"], found["median_score"]]


def scores_of(place: Path, name: str, model) -> torch.Tensor:
    """Return the scores (V, N) of a run's training videos, as evaluation reads them."""
    recipe = load_recipe(str(place / f"{name}.yaml"), {})
    rows = load_videos(place / "videos" / "train")
    views = VideoViews(rows, model.config.frame_size, **loaders.sampling_of(recipe, model.config))
    clips = torch.cat([views[i]["pixel_values"] for i in range(len(views))])
    return score_tokens(model, transforms.normalize(clips, model.config.image_mean, model.config.image_std))


@pytest.mark.parametrize(("name", "cls"), [("pretrain", EverestModel), ("finetune", EverestForVideoClassification)])
def test_a_run_leaves_the_threshold_that_keeps_the_share_of_its_training_videos(place, finetuned, name, cls):
    model = cls.from_pretrained(place / name / "model")
    scores = scores_of(place, name, model)
    threshold = model.config.score_threshold()
    kept = (scores > threshold).sum(dim=1).clamp(6, 54)
    assert abs(float(kept.float().mean()) - 27) <= 1
    assert kept.min() < 20 < 34 < kept.max()
    assert model.config.keep_threshold["median_score"] == pytest.approx(float(scores[scores > 0].median()))


def test_what_evaluates_a_run_later_finds_the_figures_of_its_end(place, finetuned):
    figures = json.loads((finetuned / "figures.json").read_text())
    train("finetune.yaml", "--eval_only", cwd=place).check()
    assert json.loads((finetuned / "evaluation" / "figures.json").read_text()) == figures
    refused = train("finetune.yaml", "--eval_only", "--config", "keep_ratio=0.3", cwd=place)
    assert refused.returncode == 1
    assert "keep_threshold['keep_ratio'] is 0.45; it must be 0.3, as keep_ratio is" in refused.stderr
    train("finetune.yaml", "--eval_only", "--config", "keep_ratio=0.3", "token_budget=clip", cwd=place).check()


def test_fine_tuning_at_another_ratio_finds_a_threshold_of_its_own(place, pretrained):
    train("finetune.yaml", "--config", "keep_ratio=0.3", "--output_dir", "less", "--epochs", "1", cwd=place).check()
    found = EverestForVideoClassification.from_pretrained(place / "less" / "model").config.keep_threshold
    assert found["keep_ratio"] == 0.3
    before = EverestForPreTraining.from_pretrained(pretrained / "model").config.keep_threshold
    assert found["medians"] > before["medians"]


def test_the_picture_of_training_clips_shows_unequal_ones(finetuned):
    assert (finetuned / "train_clips.png").exists()
    assert (finetuned / "tokens.png").exists()


def test_a_probe_knows_the_threshold_before_it_learns(place, pretrained):
    train("probe.yaml", "--epochs", "1", cwd=place).check()
    assert threshold_in(place / "probe" / "model") == pytest.approx(threshold_in(place / "pretrain" / "model"))


def test_each_checkpoint_has_the_threshold_of_its_weights(place, pretrained):
    options = ("--output_dir", "often", "--epochs", "2", "--eval_every", "2", "--save_every", "0.5")
    train("finetune.yaml", *options, "--keep_checkpoints", "9", cwd=place).check()
    folders = [path.parent for path in sorted((place / "often" / "checkpoints").rglob("config.json"))]
    assert len(folders) == 3
    for folder in (*folders, place / "often" / "model"):
        model = EverestForVideoClassification.from_pretrained(folder)
        scores = scores_of(place, "finetune", model)
        median = float(scores[scores > 0].median())
        assert model.config.keep_threshold["median_score"] == pytest.approx(median, rel=1e-5), folder


def test_a_threshold_in_a_recipe_of_training_is_refused(place, pretrained):
    found = EverestModel.from_pretrained(pretrained / "model").config.keep_threshold
    result = train(
        "finetune.yaml", "--config", f"keep_threshold={json.dumps(found)}", "--output_dir", "given", cwd=place
    )
    assert result.returncode == 1
    assert "config.keep_threshold is set; training finds it by itself" in result.stderr


def test_without_validation_there_is_a_threshold_too(place, pretrained):
    recipe = yaml.safe_load((place / "finetune.yaml").read_text())
    del recipe["val"]
    (place / "blind.yaml").write_text(yaml.safe_dump(recipe))
    train("blind.yaml", "--output_dir", "blind", "--epochs", "1", cwd=place).check()
    model = EverestForVideoClassification.from_pretrained(place / "blind" / "model")
    assert model.config.keep_threshold is not None


@pytest.mark.slow
def test_several_processes_find_the_threshold_of_one(place, pretrained):
    """With no learning rate, all weights stay as they were."""
    options = ("--base_lr", "1e-12", "--epochs", "1", "--batch_size")
    train("finetune.yaml", *options, "4", "--output_dir", "one", cwd=place).check()
    for result in train_on(2, "finetune.yaml", *options, "2", "--output_dir", "two", cwd=place):
        result.check()
    one, two = (threshold_in(place / name / "model") for name in ("one", "two"))
    assert two == pytest.approx(one)


@pytest.mark.slow
def test_a_sharded_encoder_is_calibrated_before_and_after_training(place, pretrained):
    found = []
    for name, environment in (("sharded", FSDP2), ("sharded", FSDP2), ("whole", None)):  # the second has nothing to do
        options = ("--epochs", "1", "--batch_size", "2", "--output_dir", name)
        for result in train_on(2, "probe.yaml", *options, cwd=place, environment=environment):
            result.check()
        found.append(threshold_in(place / name / "model"))
    assert found[0] == found[1] == pytest.approx(found[2], rel=1e-4)


@pytest.mark.slow
def test_unreadable_videos_and_an_average_of_weights_change_nothing(place, pretrained):
    for name in ("good", "bad"):
        paths = sorted((place / "videos" / "train").rglob("*.mp4"))
        rows = [(str(path), path.parent.name) for path in paths]
        bad = bad_files(place / "bad_files")["text"] if name == "bad" else None
        write_list(place / f"{name}.txt", rows + ([(str(bad), "left")] if bad else []))
        train(
            "finetune.yaml",
            *("--train", f"{name}.txt", "--output_dir", name, "--base_lr", "1e-12", "--epochs", "1"),
            *("--ema", "0.9", "--max_bad_fraction", "0.5"),
            cwd=place,
        ).check()
    good, bad = (threshold_in(place / name / "model") for name in ("good", "bad"))
    assert bad == pytest.approx(good, rel=1e-4)
