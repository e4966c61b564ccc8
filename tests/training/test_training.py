"""Whole runs of train_accelerate.py on real video files: what they leave, repeat, go on from, and refuse."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.commands import Run, launch, log_of, train, train_on
from helpers.tiny import TINY
from helpers.videos import bad_files, real_clips, write_class_folders, write_clip, write_list
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.data import VideoViews, load_videos
from everest_hf.evaluation.evaluate import evaluate_model
from everest_hf.training import build, loaders
from everest_hf.training.recipe import load_recipe

CLASSES = ("left", "right", "up")
MODEL = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
MODEL = {name: value for name, value in MODEL.items() if name != "num_labels"}
COMMON = {
    "train": "videos/train",
    "val": "videos/val",
    "frame_step": 1,
    "warmup_epochs": 1,
    "batch_size": 4,
    "base_lr": 0.3,
    "log_every": 1,
    "save_every": 1,
    "num_workers": 1,
}
PRETRAIN = {**COMMON, "config": {**MODEL, "drop_path_rate": 0.1}, "epochs": 3, "output_dir": "pretrain"}
# What fine-tuning does by default (drop path, RandAugment, erasing, label smoothing, layer decay) stays on.
FINETUNE = {
    **COMMON,
    "task": "finetune",
    "epochs": 2,
    "model": "pretrain/model",
    "output_dir": "finetune",
    "segments": 1,
    "crops": 1,
}


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with nine training videos, five for validation, of three classes, and the recipes."""
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos" / "train", CLASSES, 3)
    write_class_folders(folder / "videos" / "val", CLASSES, 1)
    write_clip(folder / "videos" / "val" / "left" / "long.mp4", num_frames=33, seed=98)
    write_clip(folder / "videos" / "val" / "up" / "high.mp4", height=80, seed=99)
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(PRETRAIN))
    (folder / "finetune.yaml").write_text(yaml.safe_dump(FINETUNE))
    return folder


@pytest.fixture(scope="module")
def pretrained(place) -> Path:
    launch("pretrain.yaml", cwd=place).check()
    return place / "pretrain"


@pytest.fixture(scope="module")
def finetuned(place, pretrained) -> Path:
    result = train("finetune.yaml", cwd=place).check()
    (place / "finetune" / "stderr.txt").write_text(result.stderr)
    return place / "finetune"


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one, other) -> bool:
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def checkpoints_of(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@torch.no_grad()
def evaluate_by_hand(model_folder, rows) -> dict[str, float]:
    """The figures of a saved model on videos, one by one, with its own processor."""
    config = AutoConfig.from_pretrained(model_folder)
    processor = AutoVideoProcessor.from_pretrained(model_folder)
    pixel_values = [processor(videos=row["video"], return_tensors="pt")["pixel_values"] for row in rows]
    if "EverestForPreTraining" in config.architectures:
        model = AutoModelForPreTraining.from_pretrained(model_folder).eval()
        return {"val_loss": float(np.mean([model(clip).loss.item() for clip in pixel_values]))}
    model = AutoModelForVideoClassification.from_pretrained(model_folder).eval()
    probabilities = [model(clip).logits[0].softmax(-1) for clip in pixel_values]
    top1 = np.mean([int(p.argmax()) == row["label"] for p, row in zip(probabilities, rows, strict=True)])
    loss = np.mean([-p[row["label"]].log().item() for p, row in zip(probabilities, rows, strict=True)])
    return {"val_loss": float(loss), "val_top1": float(top1)}


# ----------------------------------------------------------------------------------------------------- pre-training


def test_pretraining_leaves_what_it_should(pretrained):
    names = {path.name for path in pretrained.iterdir()}
    assert {"model", "checkpoints", "log.jsonl", "recipe.yaml", "curves.png", "tokens.png"} <= names
    assert checkpoints_of(pretrained) == ["step-00000004", "step-00000006"]
    assert not list(pretrained.rglob(".partial*"))


def test_the_pretrained_model_and_its_checkpoints_load(pretrained):
    for folder in (pretrained / "model", pretrained / "checkpoints" / "step-00000004"):
        model, info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert isinstance(model, EverestForPreTraining)
        assert not any(info.values())
        assert model.config.frame_size == tuple(TINY["image_size"])
        processor = AutoVideoProcessor.from_pretrained(folder)
        assert list(processor.image_mean) == list(TINY["image_mean"])
    assert same_weights(pretrained / "model", pretrained / "checkpoints" / "step-00000006")
    assert not same_weights(pretrained / "model", pretrained / "checkpoints" / "step-00000004")


def assert_same_log(left, right):
    """Training repeats to the bit; a figure of an evaluation may differ in its last one with where weights lie."""
    assert [line for line in left if "loss" in line] == [line for line in right if "loss" in line]
    evaluations = [[line for line in log if "loss" not in line] for log in (left, right)]
    assert len(evaluations[0]) == len(evaluations[1])
    for ours, theirs in zip(*evaluations, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_pretraining_log_has_every_step(pretrained):
    lines = log_of(pretrained)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    # Nine videos in batches of four: two whole batches an epoch.
    assert [(line["step"], line["epoch"]) for line in steps] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(2, 0), (4, 1), (6, 2)]
    assert all(np.isfinite(line.get("loss", line.get("val_loss"))) for line in lines)
    peak, final = 0.3 * 4 / 256, 1e-5 * 4 / 256
    cosine = [final + (peak - final) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert [line["lr"] for line in steps] == pytest.approx([0, peak / 2, *cosine])


def test_pretraining_lowers_the_loss(pretrained):
    losses = [line["val_loss"] for line in log_of(pretrained) if "val_loss" in line]
    assert losses[-1] < losses[0]


def test_the_pretraining_figure_is_that_of_the_saved_model(place, pretrained):
    logged = log_of(pretrained)[-1]["val_loss"]
    by_hand = evaluate_by_hand(pretrained / "model", load_videos(place / "videos" / "val"))
    assert by_hand["val_loss"] == pytest.approx(logged, abs=1e-4)


@pytest.mark.parametrize("run", ["pretrained", "finetuned"])
def test_the_pictures_are_pictures(request, run):
    folder = request.getfixturevalue(run)
    for name in ("curves.png", "tokens.png"):
        with Image.open(folder / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 100
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.fixture(scope="module")
def repeated(place, pretrained) -> Path:
    """The pre-training again, from the recipe that it saved; decoding processes change the speed alone."""
    train("pretrain/recipe.yaml", "--output_dir", "repeated", "--num_workers", 0, cwd=place).check()
    return place / "repeated"


def test_the_saved_recipe_repeats_the_run(repeated, pretrained):
    """Up to the last bits: the two runs may have different numbers of threads."""
    again, first = log_of(repeated), log_of(pretrained)
    assert [line.keys() for line in again] == [line.keys() for line in first]
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(again, first, strict=True))
    torch.testing.assert_close(
        weights_of(repeated / "model"), weights_of(pretrained / "model"), rtol=1e-3, atol=1e-4, check_device=False
    )


def test_another_seed_is_another_run(place, pretrained):
    train("pretrain.yaml", "--output_dir", "seed", "--seed", 1, "--epochs", 1, cwd=place).check()
    assert log_of(place / "seed")[0]["loss"] != log_of(pretrained)[0]["loss"]


# ------------------------------------------------------------------------------------------- stopping and going on


def test_the_gradient_is_clipped_before_the_step(place, pretrained):
    """AdamW divides by |gradient| + 1e-8: of norm 1e-14, it moves a weight by less than a millionth of the rate."""
    moves = {}
    for clip in (0.0, 1e-14):
        folder = place / f"clipped-{clip}"
        options = ["--model", pretrained / "model", "--weight_decay", 0, "--epochs", 1, "--warmup_epochs", 0]
        train("pretrain.yaml", *options, "--clip_grad", clip, "--output_dir", folder, cwd=place).check()
        before, after = weights_of(pretrained / "model"), weights_of(folder / "model")
        moves[clip] = max(float((after[name] - before[name]).abs().max()) for name in before)
        assert all(line["grad_norm"] > 1e-3 for line in log_of(folder) if "grad_norm" in line)  # as it came
    rate = COMMON["base_lr"] * COMMON["batch_size"] / 256
    assert moves[0.0] > 0.5 * rate
    assert moves[1e-14] < 1e-5 * rate


def test_a_killed_pretraining_goes_on_to_the_same_end(place, repeated):
    folder = place / "killed"
    Run("pretrain.yaml", "--output_dir", folder, cwd=place).kill_when(folder / "checkpoints" / "step-00000002")
    assert not (folder / "model").exists()
    stale = folder / "checkpoints" / ".partial-00000099"
    shutil.copytree(folder / "checkpoints" / "step-00000002", stale)
    (stale / "progress.json").write_text('{"step": 99}')
    with (folder / "log.jsonl").open("a") as log:  # of steps after the checkpoint that the run goes on from
        log.write('{"step": 99, "epoch": 9, "loss": 7.0}\n')

    train("pretrain.yaml", "--output_dir", folder, cwd=place).check()
    assert_same_log(log_of(folder), log_of(repeated))
    assert same_weights(folder / "model", repeated / "model")
    assert [name for name in checkpoints_of(folder) if name.startswith("step")] == checkpoints_of(repeated)


def test_a_killed_fine_tuning_goes_on_to_the_same_end(place, pretrained):
    steady = place / "steady"
    train("finetune.yaml", "--output_dir", steady, cwd=place).check()
    folder = place / "killed_finetune"
    Run("finetune.yaml", "--output_dir", folder, cwd=place).kill_when(folder / "checkpoints" / "step-00000002")
    train("finetune.yaml", "--output_dir", folder, cwd=place).check()
    assert_same_log(log_of(folder), log_of(steady))
    assert same_weights(folder / "model", steady / "model")


def test_a_finished_run_is_not_trained_again(place, pretrained):
    before, checkpoint = log_of(pretrained), pretrained / "checkpoints" / "step-00000006" / "model.safetensors"
    written = checkpoint.stat().st_mtime_ns
    weights = weights_of(pretrained / "model")
    result = train("pretrain.yaml", cwd=place).check()
    assert "pretrain finished" in result.stdout
    assert_same_log(log_of(pretrained), before)
    assert checkpoint.stat().st_mtime_ns == written
    assert all(torch.equal(weights[name], new) for name, new in weights_of(pretrained / "model").items())


def test_another_recipe_in_the_same_folder_is_refused(place, pretrained):
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    result = train("pretrain.yaml", "--epochs", 9, "--base_lr", 0.1, cwd=place)
    assert_refused(result, "output_dir pretrain holds a run of another recipe", "epochs", "base_lr", "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before


def test_overwrite_starts_again(place, pretrained):
    folder = place / "overwritten"
    shutil.copytree(pretrained, folder)
    train("pretrain.yaml", "--output_dir", folder, "--overwrite", "--epochs", 1, "--seed", 3, cwd=place).check()
    assert checkpoints_of(folder) == ["step-00000002"]
    assert [line["step"] for line in log_of(folder)] == [1, 2, 2]
    assert not same_weights(folder / "model", pretrained / "model")
    assert load_recipe(folder / "recipe.yaml").overwrite is False


def test_a_start_that_was_refused_does_not_occupy_the_folder(place):
    assert train("pretrain.yaml", "--output_dir", "free", "--config", "mask_ratio=2", cwd=place).returncode == 1
    train("pretrain.yaml", "--output_dir", "free", "--epochs", 1, cwd=place).check()


# ------------------------------------------------------------------------------------------------------ fine-tuning


def test_the_classifier_loads_with_its_classes(finetuned):
    model, info = AutoModelForVideoClassification.from_pretrained(finetuned / "model", output_loading_info=True)
    assert isinstance(model, EverestForVideoClassification)
    assert not any(info.values())
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {name: i for i, name in enumerate(CLASSES)}
    assert model.classifier.out_features == len(CLASSES)


def test_the_classifier_starts_from_the_pretrained_encoder(place, pretrained, monkeypatch):
    monkeypatch.chdir(place)
    recipe = load_recipe("finetune.yaml")
    start = build.build_model(recipe, loaders.load_rows(recipe)[0]).state_dict()
    source = weights_of(pretrained / "model")
    encoder = [name for name in source if name.startswith(("everest.embeddings.", "everest.encoder."))]
    assert len(encoder) > 10
    assert all(torch.equal(start[name], source[name]) for name in encoder)


def test_a_head_that_must_be_new_is_not_reported(finetuned):
    text = (finetuned / "stderr.txt").read_text()
    assert "LOAD REPORT" not in text
    assert "classifier.weight" not in text


def test_the_fine_tuning_figures_are_those_of_the_saved_model(place, finetuned):
    logged = log_of(finetuned)[-1]
    by_hand = evaluate_by_hand(finetuned / "model", load_videos(place / "videos" / "val"))
    assert by_hand["val_top1"] == pytest.approx(logged["val_top1"])
    assert by_hand["val_loss"] == pytest.approx(logged["val_loss"], abs=1e-4)


def test_several_views_by_hand(place, finetuned):
    recipe = load_recipe(
        None, {**FINETUNE, "train": str(place / "videos/train"), "val": str(place / "videos/val"), "num_workers": 0}
    )
    _, val_rows = loaders.load_rows(recipe)
    model = AutoModelForVideoClassification.from_pretrained(finetuned / "model").eval()
    config = model.config
    loader = loaders.build_val_loader(recipe, config, val_rows, 2, 3)
    figures = evaluate_model(Accelerator(cpu=True), model, loader, source=recipe.val)

    sampling = {"num_frames": 12, "frame_step": 1}
    views = VideoViews(val_rows, config.frame_size, num_segments=2, num_crops=3, **sampling)
    mean, std = (torch.tensor(TINY[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    likelihoods = []
    for item in views:
        clips = item["pixel_values"]
        assert clips.shape == (6, 12, 3, 24, 40)
        with torch.no_grad():
            of_views = [model(((clip / 255 - mean) / std)[None]).logits[0].softmax(-1) for clip in clips]
        likelihoods.append(torch.stack(of_views).mean(0)[item["labels"]])
    assert figures["val_loss"] == pytest.approx(-torch.stack(likelihoods).log().mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_pretrain_and_evaluate_an_odd_number_of_videos(place):
    folder = place / "two_pretrain"
    arguments = ["--output_dir", folder, "--batch_size", 2, "--epochs", 1, "--base_lr", 3]
    result = launch("pretrain.yaml", *arguments, cwd=place, processes=2).check()
    assert result.stdout.count("pretrain finished") == 1
    lines = log_of(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    by_hand = evaluate_by_hand(folder / "model", load_videos(place / "videos" / "val"))
    assert by_hand["val_loss"] == pytest.approx(lines[-1]["val_loss"], abs=1e-4)


def test_two_processes_fine_tune_and_evaluate_an_odd_number_of_videos(place, pretrained):
    folder = place / "two_finetune"
    arguments = ["--output_dir", folder, "--batch_size", 2, "--epochs", 1]
    for result in train_on(2, "finetune.yaml", *arguments, cwd=place):
        result.check()
    lines = log_of(folder)
    assert [line["step"] for line in lines] == [1, 2, 2]
    by_hand = evaluate_by_hand(folder / "model", load_videos(place / "videos" / "val"))
    assert by_hand["val_top1"] == pytest.approx(lines[-1]["val_top1"])
    assert by_hand["val_loss"] == pytest.approx(lines[-1]["val_loss"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_say_what_is_wrong_once(place):
    result = launch("pretrain.yaml", "--train", "nowhere", "--output_dir", "none", cwd=place, processes=2)
    assert result.returncode != 0
    said = "error: nowhere: no such list file, folder of videos or data set"
    assert result.stderr.splitlines().count(said) == 1  # the launcher's report ends with it too
    assert 'train_accelerate.py", line' not in result.stderr


# ------------------------------------------------------------------------------------------------------------- data


def test_a_list_with_relative_paths_and_every_other_option(place, pretrained):
    """Segments, more candidate frames, accumulation, clipping, config values of the command line over the recipe's."""
    names = sorted((place / "videos" / "train").glob("*/*.mp4"))
    (place / "lists").mkdir()
    shutil.copy(names[0], place / "videos" / "with a blank.mp4")
    rows = [(path.relative_to(place), CLASSES.index(path.parent.name)) for path in names]
    write_list(place / "lists" / "train.txt", [*rows, ("videos/with a blank.mp4", 0)])
    write_list(place / "lists" / "val.txt", [("../videos/val/left/left_0.mp4", 0), ("../videos/val/up/up_0.mp4", 2)])
    arguments = [
        "--train",
        "lists/train.txt",
        "--data_root",
        ".",
        "--frame_sampling",
        "segment",
        "--flip",
        "--epochs",
        1,
    ]
    arguments += ["--gradient_accumulation_steps", 2, "--batch_size", 2, "--clip_grad", 1, "--output_dir", "list"]
    arguments += ["--segments", 2, "--crops", 2, "--val", "videos/val.txt"]
    write_list(place / "videos" / "val.txt", [("videos/val/left/left_0.mp4", 0), ("videos/val/up/up_0.mp4", 2)])
    options = ["--config", "frame_oversampling=1.5", "keep_ratio=3e-1"]
    train("finetune.yaml", *arguments, *options, cwd=place).check()
    lines = log_of(place / "list")
    # Ten clips in batches of two, two batches a step; the fifth batch fills no step and is left out.
    assert [line["step"] for line in lines] == [1, 2, 2]
    config = AutoConfig.from_pretrained(place / "list" / "model")
    assert (config.frame_oversampling, config.keep_ratio) == (1.5, 0.3)
    assert config.num_input_frames == 18
    assert config.num_labels == 3
    processor = AutoVideoProcessor.from_pretrained(place / "list" / "model")
    assert processor(videos=str(names[0]), return_tensors="pt")["pixel_values"].shape == (1, 18, 3, 24, 40)
    recipe = load_recipe(place / "list" / "recipe.yaml")
    assert recipe.config == {"drop_path_rate": 0.1, "frame_oversampling": 1.5, "keep_ratio": 0.3}


def test_relative_paths_start_at_the_list(place, pretrained):
    write_list(place / "deep" / "er" / "train.txt", [("../../videos/train/left/left_0.mp4", 0)] * 4)
    arguments = ["--train", "deep/er/train.txt", "--epochs", 1, "--output_dir", "relative"]
    result = train("pretrain.yaml", *arguments, "--val", "deep/er/train.txt", cwd=place).check()
    assert "4 training videos, 4 held out" in result.stdout


def test_a_video_of_three_frames_is_used_and_named(place, pretrained):
    short = write_clip(place / "short" / "three.mp4", num_frames=3)
    write_list(place / "short.txt", [(short, 0), ("videos/train/right/right_0.mp4", 1)])
    arguments = ["--train", "short.txt", "--val", "short.txt", "--epochs", 1, "--output_dir", "short_run"]
    arguments += ["--batch_size", 2]
    result = train("finetune.yaml", *arguments, cwd=place).check()
    (warning,) = {line for line in result.stderr.splitlines() if "fewer frames" in line}
    assert f"{short} (3)" in warning
    assert "12" in warning
    assert "right_0" not in warning
    assert log_of(place / "short_run")[-1]["val_top1"] in (0, 0.5, 1)


def test_a_share_of_unreadable_training_videos_is_replaced_and_reported(place, pretrained):
    files = bad_files(place / "bad_share")
    write_list(place / "share.txt", [("videos/train/left/left_0.mp4", 0)] * 7 + [(files["text"], 0)])
    arguments = ["--train", "share.txt", "--max_bad_fraction", 0.2, "--epochs", 1, "--output_dir", "share"]
    result = train("pretrain.yaml", *arguments, cwd=place).check()
    assert "1 unreadable training videos, 1 times replaced" in result.stdout
    assert str(files["text"]) in result.stderr


def test_real_footage(place):
    """Pre-train on four real clips of different sizes, fine-tune on two classes of them, predict."""
    clips = real_clips()
    paths = sorted(clips.values())
    assert len(paths) == 4
    write_list(place / "real.txt", [(path,) for path in paths])
    write_list(place / "real_labels.txt", [(path, ("few", "many")[i % 2]) for i, path in enumerate(paths)])
    shared = ["--batch_size", 2, "--num_workers", 0, "--epochs", 1, "--val"]
    config = ["--config", "image_size=[64, 112]", "patch_size=16"]
    arguments = ["--train", "real.txt", "--output_dir", "real"]
    train("pretrain.yaml", *arguments, *shared, "real.txt", *config, cwd=place).check()
    arguments = ["--train", "real_labels.txt", "--output_dir", "real_classes", "--model", "real/model"]
    train("finetune.yaml", *arguments, *shared, "real_labels.txt", cwd=place).check()
    assert [line["step"] for line in log_of(place / "real")] == [1, 2, 2]
    assert all(0.2 < line["loss"] < 5 for line in log_of(place / "real") if "loss" in line)

    model = AutoModelForVideoClassification.from_pretrained(place / "real_classes" / "model").eval()
    processor = AutoVideoProcessor.from_pretrained(place / "real_classes" / "model")
    pixel_values = processor(videos=[str(path) for path in paths], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (4, 12, 3, 64, 112)
    with torch.no_grad():
        probabilities = model(pixel_values).logits.softmax(-1)
    assert probabilities.isfinite().all()
    assert len({tuple(row.tolist()) for row in probabilities}) == 4  # it looks at them
    assert set(model.config.id2label.values()) == {"few", "many"}


# ---------------------------------------------------------------------------------------------------------- bad input


def assert_refused(result, *words) -> None:
    """A run that ends before it trains, with one line on stderr that has these words, and no traceback."""
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert all(str(word) in lines[0] for word in words), lines[0]
    assert "Traceback" not in result.stderr
    assert "training videos" not in result.stdout  # said when training begins


@pytest.fixture(scope="module")
def bad(place) -> dict[str, Path]:
    return bad_files(place / "bad")


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "missing"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_video_files(place, bad, kind, split):
    write_list(place / f"{kind}.txt", [("videos/train/left/left_0.mp4", 0), (bad[kind], 0)])
    result = train("pretrain.yaml", f"--{split}", f"{kind}.txt", "--output_dir", "no", cwd=place)
    reasons = {"text": "not a video", "empty": "empty", "truncated": "truncated", "missing": "no such"}
    assert_refused(result, bad[kind], f"{kind}.txt", reasons[kind])


LEFT = "videos/train/left/left_0.mp4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train", "nowhere"], ["nowhere", "no such list file, folder of videos or data set"]),
        (["--val", "nowhere.txt"], ["nowhere.txt", "no such list file, folder of videos or data set"]),
        (["--val", "high.txt"], ["high.txt:2", "(3)", "3 classes"]),
        (["--val", "unknown.txt"], ["unknown.txt:1", "'down'"]),
        (["--train", "unlabelled.txt"], ["unlabelled.txt:2", "line without label"]),
        (["--train", "blank.txt"], ["blank.txt", "empty"]),
        (["--train", LEFT], [LEFT, "a video, not a list"]),
        (["--train", "videos"], ["videos", "splits"]),
        (["--train", "no_videos"], ["no_videos", "no video in it"]),
        (["--model", "nowhere/model"], ["model nowhere/model"]),
        (["--model", "videos"], ["model videos"]),
        (["--config", "keep_ratio=1.5"], ["keep_ratio", "1.5"]),
        (["--config", "mask_ratio=0"], ["mask_ratio", "0"]),
        (["--config", "patch_size=7"], ["patch_size", "7"]),
        (["--config", "patch_size=small"], ["patch_size", "small"]),
        (["--config", "patch_sise=8"], ["patch_sise", "did you mean 'patch_size'"]),
        (["--config", "num_labels=7"], ["num_labels"]),
        (["--output_dir", "finetune.yaml/run"], ["output_dir finetune.yaml/run"]),
        (["--output_dir", "/proc/run"], ["output_dir /proc/run"]),
        (["--epohcs", 3], ["--epohcs", "did you mean '--epochs'"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--epochs", 0], ["epochs is 0", "at least 1"]),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else None,
)
def test_bad_recipes(place, pretrained, arguments, words):
    write_list(place / "high.txt", [(LEFT, 0), (LEFT, 3)])
    write_list(place / "unknown.txt", [(LEFT, "down")])
    write_list(place / "unlabelled.txt", [(LEFT, 0), (LEFT,)])
    write_list(place / "blank.txt", [])
    (place / "no_videos" / "left").mkdir(parents=True, exist_ok=True)
    output = [] if "--output_dir" in arguments else ["--output_dir", "no"]
    assert_refused(train("finetune.yaml", *arguments, *output, cwd=place), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epohcs: 3", ["bad.yaml", "epohcs", "did you mean 'epochs'"]),
        ("train: [", ["bad.yaml", "not a readable YAML recipe"]),
        ("epochs: many", ["bad.yaml", "epochs is 'many'", "int"]),
        ("flip: true", ["bad.yaml", "train is None"]),
    ],
)
def test_bad_recipe_files(place, text, words):
    (place / "bad.yaml").write_text(text + "\n")
    assert_refused(train("bad.yaml", cwd=place), *words)


@pytest.mark.slow
def test_a_launched_command_says_one_line_and_fails(place, bad):
    write_list(place / "launched.txt", [(bad["empty"], 0)])
    result = launch("pretrain.yaml", "--train", "launched.txt", "--output_dir", "no", cwd=place)
    assert_refused(result, bad["empty"], "empty")
