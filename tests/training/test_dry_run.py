"""`--dry_run`: what it says is what the run does, and it leaves nothing behind."""

import json
import re

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.commands import train, train_on
from helpers.tiny import TINY, tiny_config
from helpers.videos import write_class_folders, write_list

from everest_hf import EverestForPreTraining
from everest_hf.cost import clip_cost, count_parameters, training_memory
from everest_hf.training.dry_run import describe
from everest_hf.training.recipe import load_recipe

MODEL = {name: value for name, value in TINY.items() if name != "num_labels"}
RECIPE = {
    "train": "videos/train",
    "val": "videos/val",
    "frame_step": 1,
    "epochs": 3,
    "warmup_epochs": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "base_lr": 0.3,
    "log_every": 1,
    "num_workers": 1,
    "segments": 1,
    "crops": 1,
    "output_dir": "runs/one",
}
RECIPE_FOLLOWS = "the recipe, where it differs"
TASKS = {"pretrain": {"config": MODEL}, "finetune": {"model": "encoder"}, "probe": {"model": "encoder"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with videos of two classes, a pre-trained encoder, and a recipe for each task."""
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos" / "train", videos_per_class=5)
    write_class_folders(folder / "videos" / "val", videos_per_class=1)
    torch.manual_seed(0)
    EverestForPreTraining(tiny_config()).save_pretrained(folder / "encoder")
    for task, own in TASKS.items():
        values = {**RECIPE, **own, "task": task}
        values["config"] = {k: list(v) if isinstance(v, tuple) else v for k, v in values.get("config", {}).items()}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(values))
    return folder


def contents(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith(".std")}


def said(text: str) -> dict[str, str]:
    """The lines of the first table, by their names."""
    lines = text.split(RECIPE_FOLLOWS)[0].splitlines()
    return dict(re.split(" {2,}", line.strip(), maxsplit=1) for line in lines if line.startswith("  "))


def described(place, monkeypatch, task="finetune", **options) -> str:
    """What a dry run of a recipe says, in this process."""
    monkeypatch.chdir(place)
    return describe(load_recipe(f"{task}.yaml", {"dry_run": True, **options}), Accelerator())


# ------------------------------------------------------------------ what it says


def test_what_it_says_is_what_the_run_then_does(place):
    before = contents(place)
    dry = train("finetune.yaml", "--dry_run", cwd=place).check()
    assert contents(place) == before
    real = train("finetune.yaml", cwd=place).check()
    assert dry.stdout.splitlines()[:2] == real.stdout.splitlines()[:2]  # videos, epochs, steps, tokens
    assert dry.stdout.startswith("finetune: 2 classes, 10 training videos, 2 held out, ")
    lines = said(dry.stdout)
    log = [json.loads(line) for line in (place / "runs/one/log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    assert f"= {len(steps)} steps of 4 clips" in dry.stdout
    peak = max(line["lr"] for line in steps)
    assert lines["learning rate"].startswith(f"0 to {peak:.4g} in 2 steps")
    assert lines["total batch"] == "4 clips = 1 processes x 2 batches x 2 videos"
    assert lines["output"] == "runs/one, new"
    assert re.match(r"[\d.]+ ms of a core for a clip: 1 processes read \d+ clips/s", lines["reading"])
    assert lines["reading"].endswith("; faster after `everest-hf prepare videos/train OUT`")
    assert dry.stdout.splitlines()[-1] == "dry run: all is well; nothing was trained or written"
    # The folder then holds the run, which a dry run leaves as it is.
    before = contents(place)
    again = train("finetune.yaml", "--dry_run", cwd=place).check()
    assert said(again.stdout)["output"] == "runs/one, whose run goes on from step-00000006"
    assert contents(place) == before


@pytest.mark.parametrize("task", TASKS)
def test_size_and_cost_are_those_of_the_model(place, monkeypatch, task):
    lines = said(described(place, monkeypatch, task, output_dir="runs/two"))
    labels = {} if task == "pretrain" else {"num_labels": 2}
    config = tiny_config(**labels)
    parameters, cost = count_parameters(config, task), clip_cost(config, task)
    assert lines["model"].startswith(f"{parameters.total / 1e6:.4g} M parameters")
    trained = f"{parameters.trained / 1e6:.4g} M of them" if task == "probe" else "all of them"
    assert trained in lines["model"]
    assert ("from encoder" if task != "pretrain" else "new") in lines["model"]
    forward, step = f"{cost.forward / 1e9:.4g} GFLOPs forward", f"{cost.total / 1e9:.4g} in a training step"
    assert lines["a clip"] == f"12 frames of 24 x 40, {forward}, {step}"
    memory = training_memory(config, task, 2, on_cpu=True).total / 2**30
    assert lines["memory"].startswith(f"about {memory:.3g} GiB a process in fp32: ")


def test_it_shows_the_recipe_where_it_differs(place, monkeypatch):
    text = described(place, monkeypatch, output_dir="runs/two", erasing=0.25, clip_grad=1.0)
    recipe = said(text.split(RECIPE_FOLLOWS)[1])
    assert (recipe["clip_grad"], recipe["base_lr"], recipe["train"]) == ("1.0", "0.3", "videos/train")
    assert not {"erasing", "layer_decay", "dry_run", "task"} & recipe.keys()


def test_a_full_size_model_needs_no_memory_of_its_own(place, monkeypatch):
    lines = said(described(place, monkeypatch, "pretrain", config={"hidden_size": 12 * 768}, output_dir="runs/two"))
    assert lines["output"] == "runs/two, new"
    assert float(lines["model"].split()[0]) > 100


def test_several_processes_count_as_the_run_counts_them(place):
    before = contents(place)
    results = train_on(2, "pretrain.yaml", "--dry_run", "--output_dir", "runs/three", cwd=place)
    assert [result.returncode for result in results] == [0, 0]
    assert "= 3 steps of 8 clips" in results[0].stdout
    assert said(results[0].stdout)["total batch"] == "8 clips = 2 processes x 2 batches x 2 videos"
    assert results[1].stdout == ""
    assert contents(place) == before


# ------------------------------------------------------------------ what it refuses


def test_what_is_wrong_is_one_line_and_leaves_nothing(place):
    before = contents(place)
    for options, message in (
        (["--epohcs", "3"], "unknown key '--epohcs'; did you mean '--epochs'?"),
        (["--model", "nobody/nothing"], "model nobody/nothing: "),
    ):
        result = train("finetune.yaml", "--dry_run", "--output_dir", "runs/four", *options, cwd=place)
        assert result.returncode == 1
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]
        assert "Traceback" not in result.stderr
    assert contents(place) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_only": True}, "dry_run is True; it must be left out with eval_only"),
        ({"train": "videos/none"}, "videos/none"),
        ({"val": "bad"}, "bad: 1 unreadable videos, the first is"),
        ({"train": "missing.txt"}, "gone.mp4"),
        (
            {"train": "ones.txt"},
            "ones.txt: 1 of 3 classes without a training video, class 0; its labels run from 1 to 2",
        ),
        ({"batch_size": 50}, "train has 10 videos, fewer than the 100 of a step"),
        ({"config": {"num_frames": 7}}, "num_frames is 7; it must be a multiple of tubelet_size=3"),
        ({"output_dir": "encoder/config.json/run"}, "output_dir encoder/config.json/run: "),
        ({"output_dir": "runs/other"}, "output_dir runs/other holds a run of another recipe (different: epochs)"),
        ({"model": "nowhere"}, "model nowhere: "),
    ],
)
def test_what_would_stop_the_run_stops_it(place, monkeypatch, options, message):
    (place / "bad" / "left").mkdir(parents=True, exist_ok=True)
    (place / "bad" / "left" / "text.mp4").write_text("no video\n" * 20)
    write_list(place / "missing.txt", [("gone.mp4", 0)])
    write_list(place / "ones.txt", [(f"videos/val/{name}/{name}_0.mp4", i) for i, name in ((1, "left"), (2, "right"))])
    monkeypatch.chdir(place)
    other = load_recipe("finetune.yaml", {"epochs": 9, "output_dir": "runs/other"})
    (place / "runs" / "other").mkdir(parents=True, exist_ok=True)
    other.save(place / "runs" / "other" / "recipe.yaml")
    (place / "runs" / "other" / "log.jsonl").write_text("")
    with pytest.raises((ValueError, OSError)) as raised:
        described(place, monkeypatch, **{"output_dir": "runs/five", **options})
    assert message in str(raised.value)
    assert not (place / "runs" / "five").exists()


def test_what_would_be_overwritten_is_said(place, monkeypatch):
    other = place / "runs" / "six"
    other.mkdir(parents=True)
    load_recipe(place / "finetune.yaml", {"epochs": 9}).save(other / "recipe.yaml")
    (other / "log.jsonl").write_text("")
    lines = said(described(place, monkeypatch, output_dir="runs/six", overwrite=True))
    assert lines["output"] == "runs/six, whose run is removed first"
    assert (other / "log.jsonl").exists()


def test_without_videos_it_does_not_start_the_quickstart(tmp_path):
    result = train("--dry_run", cwd=tmp_path)
    assert result.returncode == 1
    assert "error: command line: train is None" in result.stderr
    assert contents(tmp_path) == set()
