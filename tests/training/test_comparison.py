"""`everest-hf compare`: runs of other tasks and lengths, one of them killed while it wrote."""

import json

import pytest
from PIL import Image

from everest_hf import cli

RUNS = {
    "first": (
        "pretrain",
        [
            {"step": 5, "epoch": 0, "loss": 0.9, "seconds": 2.0, "clips_per_second": 10.0},
            {"step": 10, "epoch": 0, "val_loss": 0.8},
            {"step": 10, "epoch": 0, "loss": 0.7, "seconds": 1.0, "clips_per_second": 30.0},
            {"step": 20, "epoch": 1, "val_loss": 0.85},
        ],
    ),
    "second": (
        "finetune",
        [
            {"step": 3, "epoch": 0, "loss": 1.5, "seconds": 1.0, "clips_per_second": 5.0},
            {"step": 4, "epoch": 0, "val_loss": 1.2, "val_top1": 0.5},
            {"step": 8, "epoch": 1, "val_loss": None, "val_top1": 0.25},
        ],
    ),
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (task, lines) in RUNS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"task: {task}\nepochs: 2\n")
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (tmp_path / "second" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    return tmp_path


def test_a_table_and_a_picture(runs, capsys):
    assert cli.main(["compare", "first", "second", "-o", "out/both.png"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert table == [
        ["run", "task", "steps", "loss", "val_loss", "val_top1"],
        ["first", "pretrain", "20", "0.7", "0.85 (best 0.8 at 10)", "-"],
        ["second", "finetune", "8", "1.5", "1.2", "0.25 (best 0.5 at 4)"],
        ["out/both.png: curves"],
    ]
    with Image.open("out/both.png") as picture:
        assert picture.size[0] > 1000  # three panels side by side


def test_the_same_as_json(runs, capsys):
    assert cli.main(["compare", "first", "second", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {
        "run": "first",
        "task": "pretrain",
        "steps": 20,
        "seconds": 3,
        "clips_per_second": 20.0,
        "loss": 0.7,
        "figures": {"val_loss": {"last": 0.85, "best": 0.8, "best_step": 10}},
    }
    assert second["figures"]["val_top1"] == {"last": 0.25, "best": 0.5, "best_step": 4}
    assert (runs / "compare.png").is_file()


def test_what_is_no_run_and_what_has_no_figures(runs, capsys):
    (runs / "new").mkdir()
    (runs / "new" / "log.jsonl").write_text('{"step": 1, "bad_vid')
    for arguments, message in (
        (["first", "nowhere"], "nowhere: has no log.jsonl; name the folder of a run"),
        (["new"], "new: no figures are logged yet"),
        (["first", "-o", "both.txt"], "both.txt: not a picture; expected a name ending in .png"),
    ):
        assert cli.main(["compare", *arguments]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["compare", "first", "new"]) == 0  # its recipe is missing, too: the task is not known
    assert "new    -         0" in capsys.readouterr().out
