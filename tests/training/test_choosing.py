"""Which weights a run ends with, and when: patience, the best on val, and what a monitor sees on the way."""

import shutil

import pytest
import torch
import yaml
from helpers.commands import log_of, train, train_on
from helpers.videos import write_class_folders
from safetensors.torch import load_file
from test_distributed import sharding
from test_resume import CLASSES, RECIPE

from everest_hf.data import load_videos
from everest_hf.evaluation.neighbours import knn_top1
from everest_hf.training.early_stopping import Patience

# Five epochs of one step. The first has the learning rate 0, the second an absurd one: no figure is better than the
# first.
CHOOSY = {
    **{name: value for name, value in RECIPE.items() if name != "config"},
    "config": {name: value for name, value in RECIPE["config"].items() if name != "num_labels"},
    "epochs": 5,
    "ema": 0.0,
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "log_every": 1,
    "save_every": 1,
    "warmup_epochs": 2.9,
    "base_lr": 300,
    "keep_checkpoints": 2,
    "num_workers": 0,
    "patience": 1,
    "keep": "best",
    "monitor": "knn",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos" / "train", CLASSES, 3)
    write_class_folders(folder / "videos" / "val", CLASSES, 2)
    (folder / "choosy.yaml").write_text(yaml.safe_dump(CHOOSY))
    return folder


@pytest.fixture(scope="module")
def stopped(place):
    """A run that stops early, and what it said."""
    return place / "stopped", train("choosy.yaml", "--output_dir", "stopped", cwd=place).check().stdout


def evaluations(folder) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for line in log_of(folder):
        if "val_loss" in line:
            found.setdefault(line["step"], []).append(line["val_loss"])
    return found


def same_model(one, other) -> bool:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ------------------------------------------------------------------ patience and the best


def test_a_run_stops_after_an_evaluation_without_a_better_figure(stopped):
    folder, said = stopped
    losses = evaluations(folder)
    assert list(losses) == [1, 2]
    assert losses[1][0] < losses[2][0]
    assert "stopped early     after step 2 of 5: 1 evaluation without a better figure" in said
    assert (folder / "checkpoints" / "step-00000002").is_dir()


def test_its_result_is_the_best_checkpoint(stopped):
    folder, said = stopped
    assert "taken from        step-00000001, the best on val" in said
    assert same_model(folder / "model", folder / "checkpoints" / "step-00000001")
    assert evaluations(folder)[2][1] == pytest.approx(evaluations(folder)[1][0], rel=1e-6)  # the final evaluation
    assert "| steps | 1 of 8 clips |" in (folder / "model" / "README.md").read_text()


def test_a_run_that_has_stopped_early_does_not_go_on(place, stopped):
    before = log_of(stopped[0])
    again = train("choosy.yaml", "--output_dir", "stopped", cwd=place).check()
    assert "the run has stopped early, after step 2: nothing is left to train" in again.stdout
    assert "stopped early     after step 2 of 5" in again.stdout
    assert log_of(stopped[0]) == before
    assert same_model(stopped[0] / "model", stopped[0] / "checkpoints" / "step-00000001")


def test_a_run_that_goes_on_stops_at_the_same_step(place, stopped):
    folder = place / "goes_on"
    shutil.copytree(stopped[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    train("choosy.yaml", "--output_dir", folder, cwd=place).check()
    assert log_of(folder) == log_of(stopped[0])
    assert same_model(folder / "model", stopped[0] / "model")


def test_two_processes_stop_together(place, stopped):
    folder = place / "two"
    options = ["--gradient_accumulation_steps", 2, "--output_dir", folder]
    for result in train_on(2, "choosy.yaml", *options, cwd=place):
        result.check()
    assert {step: len(losses) for step, losses in evaluations(folder).items()} == {1: 1, 2: 2}
    monitored = [[line for line in log_of(run) if "val_knn_top1" in line] for run in (folder, stopped[0])]
    assert monitored[0][0] == monitored[1][0]  # later ones see other weights, by rounding


def test_patience_counts_from_the_best_figure_on():
    patience, never = Patience(2), Patience(0)
    over = []
    for top1 in (0.5, 0.5, 0.6, 0.4, 0.6):
        patience.take({"val_top1": top1, "val_loss": -top1})
        never.take({"val_top1": 0.0})
        over.append(patience.is_over)
    assert over == [False, False, False, False, True]  # an equal figure is not a better one
    assert not never.is_over
    again = Patience(3)
    again.load_state_dict(patience.state_dict())
    assert not again.is_over
    again.take({"val_loss": float("nan")})
    assert again.is_over


# ------------------------------------------------------------------ the monitor


def test_the_monitor_changes_no_figure_of_the_training(place, stopped):
    folder = place / "unmonitored"
    options = ["--monitor", "none", "--output_dir", folder]
    train("choosy.yaml", *options, cwd=place).check()
    lines = [line for line in log_of(folder) if "loss" in line]
    assert lines == [line for line in log_of(stopped[0]) if "loss" in line]
    assert [line["step"] for line in log_of(stopped[0]) if "val_knn_top1" in line] == [1, 2]


def test_nearest_neighbours_by_hand():
    """Five directions in a plane; each video votes with exp(cosine / temperature)."""
    angles = torch.tensor([0.0, 10, 23, 100, 110]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([1.0, 5, 2, 3, 1])[:, None]
    labels = torch.tensor([0, 0, 1, 1, 1])
    # The nearest of 0 is 1, of 1 is 0 by 3 degrees, of 2 is 1, of 3 and 4 each other: 2 alone is wrong.
    assert knn_top1(features, labels, neighbours=1) == pytest.approx(4 / 5)
    # All others, at so high a temperature that each counts almost the same: 0 and 1 have one of their class among four.
    # 2, 3 and 4 have two of each class, and the nearer ones count a little more: 0 and 1 for 2, their own for 3 and 4.
    assert knn_top1(features, labels, neighbours=4, temperature=1e3) == pytest.approx(2 / 5)
    torch.manual_seed(0)
    many, classes = torch.randn(2100, 6), torch.randint(4, (2100,))  # in more than two parts
    similarities = torch.nn.functional.cosine_similarity(many[:, None], many[None], dim=-1) - 9 * torch.eye(2100)
    nearest, places = similarities.topk(20)
    votes = torch.zeros(2100, 4).scatter_add(1, classes[places], (nearest / 0.07).exp())
    assert knn_top1(many, classes) == pytest.approx(float((votes.argmax(1) == classes).float().mean()), abs=1e-3)


@pytest.mark.parametrize(("kind", "message"), [("fsdp2", "monitor is 'knn', which is not offered with FSDP")])
def test_a_monitor_and_shards_are_refused(place, kind, message):
    (result,) = train_on(1, "choosy.yaml", "--output_dir", "no", cwd=place, environment=sharding(kind, place))
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]


def test_a_monitor_needs_labels(place):
    (place / "unlabelled.txt").write_text(
        "".join(f"{row['video']}\n" for row in load_videos(place / "videos" / "val"))
    )
    result = train("choosy.yaml", "--val", "unlabelled.txt", "--output_dir", "no", cwd=place)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: unlabelled.txt: has no labels, which monitor=knn needs")
