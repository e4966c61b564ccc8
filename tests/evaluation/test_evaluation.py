"""From views to videos to figures."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from helpers.commands import train, train_on
from helpers.tiny import TINY
from helpers.videos import write_class_folders, write_clip, write_list
from PIL import Image
from torch import nn
from transformers import AutoModelForVideoClassification

from everest_hf.data import VideoViews, class_names_of, collate, load_videos, share_of_batches
from everest_hf.evaluation.evaluate import figures_of, predict_videos, video_losses
from everest_hf.evaluation.report import write_predictions
from everest_hf.training.recipe import load_recipe


class LinearModel(nn.Module):
    """Logits and a loss that are easy to follow: the first pixels of a clip are its logits."""

    class Output(dict):
        __getattr__ = dict.__getitem__

    def forward(self, pixel_values):
        logits = pixel_values.flatten(1)[:, :3]
        return self.Output(logits=logits, loss=logits.mean())


def view(*pixels) -> torch.Tensor:
    """A clip uint8 (T, C, h, w) = (1, 1, 1, 3) with these pixels."""
    return torch.tensor(pixels, dtype=torch.uint8).view(1, 1, 1, 3)


def batch_of(*videos, first_index=0) -> dict:
    """A batch of videos, each a list of views."""
    pixel_values = torch.stack([torch.stack(views) for views in videos])  # (B, V, 1, 1, 1, 3)
    index = torch.arange(first_index, first_index + len(videos))
    return {"pixel_values": pixel_values, "labels": index % 3, "index": index}


def halve(clip: torch.Tensor) -> torch.Tensor:
    return clip.float() / 2


@pytest.fixture
def batches() -> list[dict]:
    return [
        batch_of([view(4, 0, 0), view(0, 8, 0)], [view(0, 0, 2), view(0, 0, 2)]),
        batch_of([view(6, 6, 6), view(1, 2, 3)], first_index=2),
    ]


def test_probabilities_are_the_mean_of_the_softmax_over_views(batches):
    predicted = predict_videos(LinearModel(), batches, to_pixel_values=halve)
    first = (torch.tensor([2.0, 0, 0]).softmax(0) + torch.tensor([0, 4.0, 0]).softmax(0)) / 2
    third = (torch.full((3,), 1 / 3) + torch.tensor([0.5, 1, 1.5]).softmax(0)) / 2
    torch.testing.assert_close(predicted["scores"][0], first)
    torch.testing.assert_close(predicted["scores"][1], torch.tensor([0, 0, 1.0]).softmax(0))
    torch.testing.assert_close(predicted["scores"][2], third)
    assert predicted["labels"].tolist() == [0, 1, 2]
    assert predicted["index"].tolist() == [0, 1, 2]
    # Not the softmax of the mean logits: that would prefer another class for the first video.
    assert predicted["scores"][0, 1] < torch.tensor([1.0, 2, 0]).softmax(0)[1]


def test_half_precision_logits_become_float32_probabilities(batches):
    class Half(LinearModel):
        def forward(self, pixel_values):
            return self.Output(logits=super().forward(pixel_values).logits.bfloat16())

    predicted = predict_videos(Half(), batches, to_pixel_values=halve)
    assert predicted["scores"].dtype == torch.float32
    torch.testing.assert_close(predicted["scores"].sum(dim=1), torch.ones(3))


def test_the_loss_of_pretraining_is_that_of_a_video_s_batch(batches):
    """A short last batch weighs as its number of videos."""
    found = video_losses(LinearModel(), batches, to_pixel_values=halve)
    assert found["loss"].tolist() == pytest.approx([(4 + 8 + 2 + 2) / 24, (4 + 8 + 2 + 2) / 24, (18 + 6) / 12])
    assert found["index"].tolist() == [0, 1, 2]


def test_evaluation_is_without_dropout_and_gradients(batches):
    class Watched(LinearModel):
        def forward(self, pixel_values):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(pixel_values)

    model = Watched().train()
    predict_videos(model, batches, to_pixel_values=halve)
    model.train()
    video_losses(model, batches, to_pixel_values=halve)


# ------------------------------------------------------------------------------------------------------------ labels

MULTI, REGRESSION = "multi_label_classification", "regression"
SAMPLING = {"num_frames": 4, "frame_step": 1}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a.mp4", "b, c.mp4"):
        write_clip(folder / name, num_frames=6)
    return folder


def rows_of(clips, *labels, **options) -> Dataset:
    rows = zip(("a.mp4", "b, c.mp4"), labels, strict=True)
    return load_videos(write_list(clips / "list.txt", rows), **options)


def test_several_labels_a_video(clips):
    rows = rows_of(clips, "run,jump", "sit", problem_type=MULTI)
    assert class_names_of(rows) == ["jump", "run", "sit"]
    assert rows["label"][:] == [[0, 1], [2]]
    batch = collate(list(VideoViews(rows, (24, 40), **SAMPLING)))
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 0, 1]]
    assert batch["labels"].dtype == torch.float32
    held_out = rows_of(clips, "sit,run", "run", problem_type=MULTI, class_names=["jump", "run", "sit"])
    assert held_out["label"][:] == [[1, 2], [1]]


def test_several_integers_a_video(clips):
    rows = rows_of(clips, "2,0", "1", problem_type=MULTI, num_labels=4)
    assert class_names_of(rows) == ["0", "1", "2", "3"]
    assert rows["label"][:] == [[0, 2], [1]]


def test_numbers_as_labels(clips):
    rows = rows_of(clips, "1.5", "-2e-1", problem_type=REGRESSION)
    assert class_names_of(rows) is None
    batch = collate(list(VideoViews(rows, (24, 40), **SAMPLING)))
    assert torch.equal(batch["labels"], torch.tensor([1.5, -0.2]))


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        (("1.5", "high"), {"problem_type": REGRESSION}, ["list.txt:2", "'high'", "not a finite number"]),
        (("1.5", "nan"), {"problem_type": REGRESSION}, ["list.txt:2", "'nan'", "not a finite number"]),
        (("a,", "b"), {"problem_type": MULTI}, ["list.txt:1", "'a,'", "an empty name"]),
        (("a,d", "b"), {"problem_type": MULTI, "class_names": ["a", "b"]}, ["list.txt:1", "'d'", "2 known"]),
        (("0,7", "1"), {"problem_type": MULTI, "num_labels": 3}, ["list.txt:1", "(7)", "labelled 0 to 2"]),
    ],
)
def test_labels_that_are_none(clips, labels, options, words):
    with pytest.raises(ValueError) as error:
        rows_of(clips, *labels, **options)
    assert all(word in str(error.value) for word in words), error.value


# ------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
@pytest.mark.parametrize("num_videos", [1, 4, 7, 12])
def test_batches_are_the_same_for_any_number_of_processes(num_videos, num_processes):
    whole = share_of_batches(num_videos=num_videos, batch_size=4)
    assert [i for batch in whole for i in batch] == list(range(num_videos))
    shares = [
        share_of_batches(num_videos=num_videos, batch_size=4, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    assert len({len(share) for share in shares}) == 1
    assert {tuple(batch) for share in shares for batch in share} == {tuple(batch) for batch in whole}


# ------------------------------------------------------------------------------------------------------------ figures


def test_the_loss_is_that_of_the_videos_with_an_answer():
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0], [0.1, 0.8, 0.1]])
    figures = figures_of(scores, torch.tensor([1, 0, 1]), "single_label_classification")
    assert figures["loss"] == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2)
    assert figures["top1"] == pytest.approx(1 / 3)
    figures = figures_of(scores, torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 1, 0]]), MULTI)
    by_hand = [0.5, 0.25, 0.75, 0.9, 0.8, 0.9]
    assert figures["loss"] == pytest.approx(-sum(map(math.log, by_hand)) / 6)
    assert figures["accuracy"] == pytest.approx(1 / 3)


def test_regression_figures():
    figures = figures_of(torch.tensor([[1.0], [2.0]]), torch.tensor([1.5, 4.0]), REGRESSION)
    assert figures["loss"] == figures["mse"] == pytest.approx((0.25 + 4) / 2)


@pytest.mark.parametrize(("problem_type", "score"), [(MULTI, torch.sigmoid), (REGRESSION, torch.clone)])
def test_scores_of_the_other_problem_types_are_means_over_views(batches, problem_type, score):
    predicted = predict_videos(LinearModel(), batches, to_pixel_values=halve, problem_type=problem_type)
    first = (score(torch.tensor([2.0, 0, 0])) + score(torch.tensor([0, 4.0, 0]))) / 2
    torch.testing.assert_close(predicted["scores"][0], first)


def test_an_unreadable_video_has_no_answer(batches):
    batches[0]["unreadable"] = torch.tensor([True, False])
    predicted = predict_videos(LinearModel(), batches, to_pixel_values=halve)
    assert predicted["scores"].any(dim=1).tolist() == [False, True, True]


# ------------------------------------------------------------------------------------------------------------- report


def read_csv(path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_the_files_of_an_evaluation(tmp_path):
    names = ["run, fast", "sit", *(f"class {i}" for i in range(5))]
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.08, 0.06, 0.05, 0.01], [0.0] * 7, [0.3, 0.1, 0.2, 0.2, 0.1, 0.1, 0.0]])
    rows = Dataset.from_dict({"video": ["/a b/c, d.mp4", '/q"uote.mp4', "/é.mp4"]})
    write_predictions(tmp_path, "single_label_classification", names, rows, scores, torch.tensor([1, 0, 1]))
    assert read_csv(tmp_path / "predictions.csv") == [
        ["video", "label", "predicted", "score", "top2", "top3", "top4", "top5"],
        ["/a b/c, d.mp4", "sit", "sit", "0.4", "class 0", "run, fast", "class 1", "class 2"],
        ['/q"uote.mp4', "run, fast", "", "", "", "", "", ""],
        ["/é.mp4", "sit", "run, fast", "0.3", "class 0", "class 1", "sit", "class 2"],
    ]
    confusion = read_csv(tmp_path / "confusion.csv")
    assert confusion[0] == ["label", *names, "unreadable"]
    assert confusion[1] == ["run, fast", *"0000000", "1"]
    assert confusion[2] == ["sit", *"1100000", "0"]
    assert sum(int(count) for line in confusion[1:] for count in line[1:]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.csv", "confusion.csv", "confusion.png"}


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    names = ["=1+2", "-jump", "+sit", "@run", "\tlie", "-3.5", "a=b"]
    rows = Dataset.from_dict({"video": ["=cmd|' /C calc'!A0.mp4", "-b.mp4"]})
    scores = torch.tensor([[0.3, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06], [0.01, 0.0, 0.0, 0.0, 0.0, 0.9, 0.09]])
    write_predictions(tmp_path, "single_label_classification", names, rows, scores, torch.tensor([1, 5]))
    assert read_csv(tmp_path / "predictions.csv")[1:] == [
        ["'=cmd|' /C calc'!A0.mp4", "'-jump", "'=1+2", "0.3", "'-jump", "'+sit", "'@run", "'\tlie"],
        ["'-b.mp4", "-3.5", "-3.5", "0.9", "a=b", "'=1+2", "'-jump", "'+sit"],
    ]
    confusion = read_csv(tmp_path / "confusion.csv")
    quoted = ["'=1+2", "'-jump", "'+sit", "'@run", "'\tlie", "-3.5", "a=b"]
    assert confusion[0] == ["label", *quoted]
    assert [line[0] for line in confusion[1:]] == quoted


def test_a_report_that_fails_leaves_the_one_before(tmp_path):
    rows = Dataset.from_dict({"video": ["a.mp4"]})
    scores, labels = torch.tensor([[0.25, 0.75]]), torch.tensor([1])
    write_predictions(tmp_path, "single_label_classification", ["a", "b"], rows, scores, labels)
    before = (tmp_path / "predictions.csv").read_text()
    with pytest.raises(UnicodeEncodeError):  # in the middle of the file
        write_predictions(tmp_path, "single_label_classification", ["a", "\ud800"], rows, scores, labels)
    assert (tmp_path / "predictions.csv").read_text() == before


def test_predictions_of_several_labels_and_of_numbers(tmp_path):
    rows = Dataset.from_dict({"video": [{"path": "a.mp4", "bytes": b""}, {"path": None, "bytes": b""}]})
    scores = torch.tensor([[0.5, 0.75, 0.125], [0.1, 0.2, 0.3]])
    write_predictions(tmp_path, MULTI, ["x", "y", "z"], rows, scores, torch.tensor([[1, 0, 1], [0, 0, 1]]).float())
    assert read_csv(tmp_path / "predictions.csv") == [
        ["video", "label", "predicted", "x", "y", "z"],
        ["a.mp4", "x,z", "x,y", "0.5", "0.75", "0.125"],
        ["row 1", "z", "", "0.1", "0.2", "0.3"],
    ]
    write_predictions(
        tmp_path / "new", REGRESSION, ["x"], rows, torch.tensor([[0.5], [-2.0]]), torch.tensor([1.0, 3.0])
    )
    assert read_csv(tmp_path / "new" / "predictions.csv") == [
        ["video", "label", "predicted"],
        ["a.mp4", "1", "0.5"],
        ["row 1", "3", "-2"],
    ]
    assert not (tmp_path / "confusion.csv").exists()


# --------------------------------------------------------------------------------------------------------- whole runs

CLASSES = [f"class {i}" for i in range(7)]
MODEL = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
MODEL = {name: value for name, value in MODEL.items() if name != "num_labels"}
RECIPE = {
    "task": "finetune",
    "train": "videos",
    "val": "val.txt",
    "config": MODEL,
    "frame_step": 1,
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 4,
    "base_lr": 0.3,
    "log_every": 1,
    "save_every": 1,
    "num_workers": 0,
    "segments": 2,
    "crops": 1,
    "output_dir": "run",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with nine videos of seven classes to train on, and a list of those seven that are held out."""
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos", CLASSES, 1, num_frames=14)
    for i in range(2):
        write_clip(folder / "videos" / CLASSES[0] / f"more, {i}.mp4", seed=50 + i)
    held_out = [(f"videos/{name}/{name}_0.mp4", i) for i, name in enumerate(CLASSES[:6])]
    write_list(folder / "val.txt", [*held_out, (f"videos/{CLASSES[0]}/more, 1.mp4", 0)])
    write_list(folder / "bad.txt", [*held_out[:4], ("bad.mp4", 4), *held_out[4:]])
    (folder / "bad.mp4").write_bytes(b"this is not a video\n" * 20)
    (folder / "run.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture(scope="module")
def run(place) -> Path:
    train("run.yaml", cwd=place).check()
    return place / "run"


def last_figures(run) -> dict[str, float]:
    line = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in line.items() if name.startswith("val_")}


def evaluated(folder) -> dict[str, float]:
    return json.loads((folder / "evaluation" / "figures.json").read_text())


def test_a_run_ends_with_its_predictions(place, run):
    figures = last_figures(run)
    assert set(figures) == {"val_loss", "val_top1", "val_top5", "val_mean_class_accuracy"}
    header, *lines = read_csv(run / "predictions.csv")
    held_out = (place / "val.txt").read_text().splitlines()
    assert [line[0] for line in lines] == [str(place / row.rsplit(" ", 1)[0]) for row in held_out]
    top1 = np.mean([line[1] == line[2] for line in lines])
    top5 = np.mean([line[1] in (line[2], *line[4:]) for line in lines])
    assert figures["val_top1"] == pytest.approx(top1, rel=1e-4)
    assert figures["val_top5"] == pytest.approx(top5, rel=1e-4)
    assert figures["val_top5"] > figures["val_top1"]
    header, *confusion = read_csv(run / "confusion.csv")
    assert header == ["label", *CLASSES]
    assert [sum(map(int, line[1:])) for line in confusion] == [2, 1, 1, 1, 1, 1, 0]
    assert np.mean([int(line[i + 1]) for i, line in enumerate(confusion)]) == pytest.approx(top1)
    with Image.open(run / "confusion.png") as picture:
        assert min(picture.size) > 200


def test_an_evaluation_alone_gives_the_figures_of_the_run_and_leaves_it_alone(place, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if "evaluation" not in path.parts}
    result = train("run.yaml", "--eval_only", cwd=place).check()
    assert evaluated(run) == last_figures(run)
    assert f"val_top1 {last_figures(run)['val_top1']:.5g}" in result.stdout
    assert (run / "evaluation" / "predictions.csv").read_text() == (run / "predictions.csv").read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert set(run.iterdir()) - set(before) == {run / "evaluation"}


def test_a_model_is_evaluated_without_a_recipe_or_a_training_set(place, run):
    arguments = ["--task", "finetune", "--model", "run/model", "--val", "val.txt", "--output_dir", "elsewhere"]
    arguments += ["--frame_step", 1, "--segments", 2, "--crops", 1, "--batch_size", 4, "--num_workers", 1]
    train("--eval_only", *arguments, cwd=place).check()
    assert evaluated(place / "elsewhere") == last_figures(run)
    assert {path.name for path in (place / "elsewhere").iterdir()} == {"evaluation"}


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_no_figure(place, run, processes):
    """Seven videos in batches of two: neither divides by the number of processes."""
    arguments = ["--eval_only", "--model", "run/model", "--output_dir", f"by_{processes}"]
    results = train_on(processes, "run.yaml", *arguments, cwd=place)
    assert sum(result.check().stdout.count("val_top1") for result in results) == 1
    assert evaluated(place / f"by_{processes}") == last_figures(run)
    ours, theirs = (read_csv(folder / "predictions.csv") for folder in (run, place / f"by_{processes}" / "evaluation"))
    assert [line[:3] + line[4:] for line in ours] == [line[:3] + line[4:] for line in theirs]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--eval_only", "--output_dir", "none"], ["model is None", "none/model is not there"]),
        (["--eval_only", "--model", "nowhere"], ["model nowhere"]),
        (["--eval_only", "--model", "run/model", "--task", "pretrain"], ["run/model has no decoder", "task=pretrain"]),
        (["--eval_only", "--val", "no.txt"], ["no.txt: no such list"]),
        (["--count_bad_as_wrong", "--task", "pretrain"], ["count_bad_as_wrong", "pre-training"]),
        (
            ["--count_bad_as_wrong", "--config", "problem_type=regression"],
            ["count_bad_as_wrong", "no number is wrong"],
        ),
    ],
)
def test_what_cannot_be_evaluated(place, run, arguments, words):
    result = train("run.yaml", *arguments, cwd=place)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr


def test_label_smoothing_belongs_to_one_label_a_video():
    options = {"task": "finetune", "train": "videos"}
    assert load_recipe(None, options).label_smoothing == 0.1
    assert load_recipe(None, {**options, "config": {"problem_type": MULTI}}).label_smoothing == 0
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.2; it must be 0 with problem_type=regression"):
        load_recipe(None, {**options, "config": {"problem_type": REGRESSION}, "label_smoothing": 0.2})


def test_an_evaluation_needs_videos_to_evaluate():
    with pytest.raises(ValueError, match="val is None"):
        load_recipe(None, {"eval_only": True, "train": "videos"})


# -------------------------------------------------------------------------------------------------- unreadable videos


@pytest.mark.slow
def test_an_unreadable_video_ends_an_evaluation_of_two_processes(place, run):
    """Each has batches to do after the one with that video."""
    results = train_on(2, "run.yaml", "--eval_only", "--val", "bad.txt", "--num_workers", 1, cwd=place)
    assert 0 not in [result.returncode for result in results]
    said = f"error: bad.txt: unreadable validation videos: {place / 'bad.mp4'}: "
    lines = [line for result in results for line in result.stderr.splitlines()]
    assert sum(line.startswith(said) for line in lines) == 1
    assert not any('train_accelerate.py", line' in line for line in lines)


def test_unreadable_videos_may_count_as_wrong(place, run):
    arguments = ["--val", "bad.txt", "--count_bad_as_wrong", "--output_dir", "counted", "--model", "run/model"]
    result = train("run.yaml", "--eval_only", *arguments, cwd=place).check()
    figures, lines = evaluated(place / "counted"), read_csv(place / "counted" / "evaluation" / "predictions.csv")[1:]
    assert figures["val_unreadable"] == 1
    assert lines[4] == [str(place / "bad.mp4"), CLASSES[4], *[""] * 6]
    assert figures["val_top1"] == pytest.approx(np.mean([line[1] == line[2] for line in lines]), rel=1e-4)
    ours = {line[0]: line for line in read_csv(place / "run" / "predictions.csv")[1:]}
    assert sum(line[2] == ours.get(line[0], line)[2] for line in lines) >= 6
    assert read_csv(place / "counted" / "evaluation" / "confusion.csv")[0][-1] == "unreadable"
    assert "bad.mp4" in result.stderr
    assert "val_unreadable 1" in result.stdout


def test_a_run_may_count_unreadable_videos_as_wrong(place):
    arguments = ["--val", "bad.txt", "--output_dir", "bad_run", "--epochs", 1]
    refused = train("run.yaml", *arguments, cwd=place)
    assert refused.returncode == 1
    assert "bad.mp4" in refused.stderr
    train("run.yaml", *arguments, "--count_bad_as_wrong", cwd=place).check()
    assert last_figures(place / "bad_run")["val_unreadable"] == 1


# ------------------------------------------------------------------------------------------------ other problem types


@pytest.mark.parametrize(
    ("problem_type", "labels", "names"),
    [
        (REGRESSION, ["0.5", "-1", "2e-1", "3", "1", "0", "2"], {"mse", "mae", "pearson", "r2"}),
        (MULTI, ["a,b", "c", "a", "b,c", "a,b,c", "a", "b"], {"map", "f1", "accuracy"}),
    ],
)
def test_the_other_problem_types_train_and_evaluate(place, problem_type, labels, names):
    paths = [line.rsplit(" ", 1)[0] for line in (place / "val.txt").read_text().splitlines()]
    source, folder = f"{problem_type}.txt", place / problem_type
    write_list(place / source, zip(paths, labels, strict=True))
    options = ["--train", source, "--val", source, "--output_dir", folder, "--config", f"problem_type={problem_type}"]
    train("run.yaml", *options, "--epochs", 3, "--base_lr", 0.05, cwd=place).check()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in log if "val_loss" in line]
    assert losses[-1] < losses[0]
    figures = last_figures(folder)
    assert set(figures) == {"val_loss", *(f"val_{name}" for name in names)}

    model = AutoModelForVideoClassification.from_pretrained(folder / "model")
    assert model.config.problem_type == problem_type
    assert model.config.num_labels == (1 if problem_type == REGRESSION else 3)
    header, *lines = read_csv(folder / "predictions.csv")
    assert [line[1] for line in lines] == (
        ["0.5", "-1", "0.2", "3", "1", "0", "2"] if problem_type == REGRESSION else labels
    )
    if problem_type == REGRESSION:
        errors = [float(line[1]) - float(line[2]) for line in lines]
        assert figures["val_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-3)
    else:
        assert header == ["video", "label", "predicted", "a", "b", "c"]
        assert figures["val_accuracy"] == pytest.approx(np.mean([line[1] == line[2] for line in lines]), rel=1e-4)

    train("run.yaml", *options, "--eval_only", cwd=place).check()
    assert evaluated(folder) == figures
