"""Trackers: what they know of a run, read from the files that they leave."""

import json
import shutil
import sqlite3
import struct
from pathlib import Path

import pytest
import yaml
from helpers.commands import log_of, train_on
from helpers.videos import write_class_folders
from test_distributed import MODEL

RECIPE = {
    "task": "finetune",
    "train": "videos/train",
    "val": "videos/val",
    "config": MODEL,
    "frame_step": 1,
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 2,
    "log_every": 1,
    "save_every": 1,
    "num_workers": 0,
    "segments": 1,
    "crops": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos" / "train", ("left", "right"), 2)
    write_class_folders(folder / "videos" / "val", ("left", "right"), 1)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def run_and_go_on(place: Path, tracker: str, environment: dict[str, str]) -> Path:
    """A run, and once more from its checkpoint before the last; tracked as one."""
    folder = place / tracker
    for again in (False, True):
        if again:
            shutil.rmtree(folder / "checkpoints" / "step-00000004")
        options = ["--report_to", tracker, "--output_dir", folder]
        (result,) = train_on(1, "recipe.yaml", *options, cwd=place, environment=environment)
        result.check()
    return folder


def figures_of(lines: list[dict]) -> list[tuple[int, dict]]:
    """The step and the figures that every run repeats."""
    return [
        (line["step"], {name: line[name] for name in ("loss", "lr", "grad_norm", "val_loss") if name in line})
        for line in lines
    ]


def test_trackio_has_the_run_as_one(place):
    pytest.importorskip("trackio")
    folder = run_and_go_on(place, "trackio", {"TRACKIO_DIR": str(place / "tracked")})
    (path,) = (place / "tracked").glob("*.db")
    with sqlite3.connect(path) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = base.execute("select config from configs").fetchall()
    name = (folder / "tracked_as.txt").read_text()
    assert name.startswith("trackio-")
    assert {row[0] for row in rows} == {name}
    found = figures_of([{"step": step, **json.loads(metrics)} for _, step, metrics in rows])
    wanted = figures_of(log_of(folder))
    first = wanted.index(next(line for line in wanted if line[0] == 3))
    assert found == wanted + wanted[first:]  # the second run goes on after step 2
    assert json.loads(configs[0][0])["batch_size"] == 2


def test_wandb_has_the_run_as_one(place):
    pytest.importorskip("wandb")
    folder = run_and_go_on(place, "wandb", {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    name = (folder / "tracked_as.txt").read_text()
    files = sorted((folder / "wandb").glob(f"offline-run-*-{name}/*.wandb"))
    steps, wanted = [], {step: {} for step in range(1, 5)}
    for step, figures in figures_of(log_of(folder)):
        wanted[step] = {**wanted[step], **figures}  # wandb has one line a step
    for path in files:
        records = list(wandb_records(path))
        settings = {item.key: item.value_json for record in records for item in record.run.config.update}
        settings |= {item.key: item.value_json for record in records for item in record.config.update}
        assert json.loads(settings["batch_size"]) == 2
        for record in records:
            line = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            if line:
                steps.append(line["_step"])
                assert figures_of([{"step": line["_step"], **line}])[0][1] == wanted[line["_step"]]
    assert steps == [1, 2, 3, 4, 3, 4]


def wandb_records(path: Path):
    """Yield the records of a run's file: a log as LevelDB has it, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for another header in the block
            place += 32768 - place % 32768
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts.append(content[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []
