"""Features judged by classifiers that see few labels a class."""

import json
import statistics

import pytest
import torch
import yaml
from helpers.commands import log_of, train, train_on
from helpers.tiny import TINY, tiny_config
from helpers.videos import moving_frames, write_video

from everest_hf import EverestForPreTraining
from everest_hf.evaluation import few_shot
from everest_hf.training.recipe import load_recipe

FEW = {"evaluation": "few_shot", "train": "videos/train", "val": "videos/val", "frame_step": 1, "num_workers": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder that nobody trained, and videos whose class is how bright they are: 5 and 4 of a class."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    EverestForPreTraining(tiny_config(drop_path_rate=0.5)).save_pretrained(folder / "encoder")
    for part, counts in (("train", (5, 4)), ("val", (3, 3))):
        for name, brightness, count in zip(("bright", "dark"), (1.0, 0.3), counts, strict=True):
            for i in range(count):
                frames = moving_frames(20, 48, 64, seed=100 * (part == "val") + i) * brightness
                write_video(folder / "videos" / part / name / f"{i}.mp4", frames.astype("uint8"))
    return folder


@pytest.fixture(scope="module")
def measured(place):
    """What a command says that measures the encoder; its figures are in features/evaluation."""
    (place / "few.yaml").write_text(yaml.safe_dump(FEW))
    return train("few.yaml", "--eval_only", "--model", "encoder", "--output_dir", "features", cwd=place).check()


def figures_in(folder) -> dict:
    return json.loads((folder / "figures.json").read_text())


# ------------------------------------------------------------------ whole evaluations


def test_an_encoder_is_judged_by_few_labels(place, measured):
    figures = figures_in(place / "features" / "evaluation")
    kinds = ("linear_1", "linear_4", "knn_1", "knn_4")
    assert list(figures) == [f"val_{kind}{end}" for kind in kinds for end in ("", "_std")]
    assert figures["val_linear_4"] >= 5 / 6
    assert figures["val_knn_4"] >= 5 / 6
    assert "not measured with 8, 16, 64 labels a class: class dark has 4 readable training videos" in measured.stderr
    mean, spread = figures["val_linear_1"], figures["val_linear_1_std"]
    assert f"val_linear_1 {mean:.5g} ± {spread:.2g}, " in measured.stdout


def test_the_number_of_processes_changes_no_figure(place, measured):
    options = ["--eval_only", "--model", "encoder", "--output_dir", "by_2", "--batch_size", 2]
    for result in train_on(2, "few.yaml", *options, cwd=place):
        result.check()
    assert figures_in(place / "by_2" / "evaluation") == figures_in(place / "features" / "evaluation")


def test_a_pretraining_ends_with_figures_of_its_features(place):
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
    del sizes["num_labels"]
    run = {**FEW, "config": sizes, "epochs": 1, "warmup_epochs": 0, "batch_size": 4, "output_dir": "run"}
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    (place / "videos" / "train" / "dark" / "none.mp4").write_bytes(b"no video")
    try:
        result = train("run.yaml", "--max_bad_fraction", 0.5, cwd=place).check()
    finally:
        (place / "videos" / "train" / "dark" / "none.mp4").unlink()
    figures = figures_in(place / "run")
    assert {"val_loss", "val_knn_4", "val_linear_1_std"} <= set(figures)
    assert log_of(place / "run")[-1]["val_linear_4"] == figures["val_linear_4"]
    assert "unreadable, not drawn: " in result.stderr
    assert "none.mp4" in result.stderr
    card = (place / "run" / "model" / "README.md").read_text()
    mean, spread = figures["val_linear_4"], figures["val_linear_4_std"]
    assert f"| top-1 of a linear classifier, 4 labels a class, 10 draws | {mean:.4g} ± {spread:.2g} |" in card
    assert "| top-1 of nearest neighbours, 1 label a class, 10 draws | " in card
    assert "linear_1_std" not in card
    again = train("run/recipe.yaml", "--eval_only", cwd=place).check()
    assert figures_in(place / "run" / "evaluation") == {n: v for n, v in figures.items() if n != "val_loss"}
    assert "val_knn_1" in again.stdout


def test_unreadable_videos_of_validation(place, measured, tmp_path):
    bad = place / "videos" / "val" / "dark" / "none.mp4"
    bad.write_bytes(b"no video")
    options = ["few.yaml", "--eval_only", "--model", "encoder", "--output_dir", tmp_path / "out"]
    try:
        refused = train(*options, cwd=place)
        train(*options, "--task", "finetune", "--count_bad_as_wrong", cwd=place).check()
    finally:
        bad.unlink()
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"error: unreadable validation videos: {bad}: ")
    figures = figures_in(tmp_path / "out" / "evaluation")
    assert figures["val_knn_4"] == pytest.approx(
        figures_in(place / "features" / "evaluation")["val_knn_4"] * 6 / 7, 1e-4
    )


def test_videos_without_labels_are_refused(place, measured, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in (place / "videos").rglob("*.mp4")))
    options = ["--model", "encoder", "--train", tmp_path / "list.txt", "--output_dir", tmp_path / "out"]
    result = train("few.yaml", "--eval_only", *options, cwd=place)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'list.txt'}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val": None}, "val is None; it must be labelled videos with evaluation=few_shot"),
        ({"eval_only": True, "train": None}, "train is None; it must be labelled videos with evaluation=few_shot"),
        ({"task": "finetune"}, "must be views with task=finetune, which learns all labels of train"),
        ({"streaming": True, "steps_per_epoch": 1}, "must be views with streaming"),
        ({"config": {"problem_type": "regression"}}, "must be views with problem_type=regression"),
        ({"evaluation": "few"}, r"evaluation is 'few'; it must be one of \('views', 'few_shot'\)"),
    ],
)
def test_recipes_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(None, {**FEW, **values})


# ------------------------------------------------------------------ draws, classifiers, figures


def test_draws_have_as_many_videos_of_each_class_and_repeat_with_the_seed():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 1, 0])
    draws = list(few_shot.draw_videos(labels, 10, seed=3))
    for drawn in draws:
        assert drawn.shape == (3, 3)
        assert labels[drawn].tolist() == [[0] * 3, [1] * 3, [2] * 3]
        assert len(drawn.unique()) == 9
    assert len({str(drawn[:, :1].tolist()) for drawn in draws}) > 3
    assert all(map(torch.equal, draws, few_shot.draw_videos(labels, 10, seed=3)))
    assert not all(map(torch.equal, draws, few_shot.draw_videos(labels, 10, seed=4)))


def test_figures_are_means_and_spreads_over_draws():
    """Two classes along a line; of "b" one video lies among those of "a", so that what is drawn decides."""
    features = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [1.0, 0.12]])
    labels = torch.tensor([0, 0, 1, 1])
    val, val_labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    figures = few_shot.few_shot_figures(features, labels, val, val_labels, numbers=[1], seed=0)
    nearest = torch.nn.functional.normalize(val, dim=1) @ torch.nn.functional.normalize(features, dim=1).T
    top1 = []
    for drawn in few_shot.draw_videos(labels, 10, seed=0):
        places = nearest[:, drawn[:, 0]].argmax(dim=1)
        top1.append((places == val_labels).double().mean().item())
    assert len(set(top1)) > 1
    assert figures["knn_1"] == pytest.approx(statistics.mean(top1))
    assert figures["knn_1_std"] == pytest.approx(statistics.stdev(top1))


def test_neighbours_are_as_many_as_there_are_labels_a_class(monkeypatch):
    asked = []
    monkeypatch.setattr(few_shot, "labels_by_votes", lambda s, labels, k: asked.append(k) or labels[:1].expand(len(s)))
    labels = torch.arange(2).repeat(64)
    few_shot.few_shot_figures(
        torch.randn(128, 2), labels, torch.ones(1, 2), labels[:1], numbers=[1, 8, 64], seed=0, draws=2
    )
    assert asked == [1, 8, 20] * 2


def test_a_number_that_a_class_does_not_reach_is_left_out_and_named(caplog):
    assert few_shot.numbers_of_labels({"a": 100, "b": 8}) == [1, 4, 8]
    assert caplog.messages == ["not measured with 16, 64 labels a class: class b has 8 readable training videos"]
    assert few_shot.numbers_of_labels({"a": 64, "b": 65}) == [1, 4, 8, 16, 64]
    assert len(caplog.messages) == 1
