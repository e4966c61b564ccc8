"""Data sets by their name on the Hub: read by a process with an empty cache, from a Hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from helpers.commands import ROOT, SCRIPT
from helpers.local_hub import LocalHub
from helpers.videos import write_class_folders
from huggingface_hub import HfApi
from test_distributed import MODEL

from everest_hf.data import load_videos

CLASSES = ("left", "right", "up")
# Prints what a source holds, as a stream where that is asked for: of each video its class, and a number made of pixels.
READ = """
import json, sys, zlib
from datasets import Dataset
from everest_hf.data import VideoViews, class_names_of, load_videos, stream_videos
for argument in sys.argv[1:]:
    source = argument.removeprefix("stream:")
    rows = load_videos(source) if source == argument else stream_videos(source)
    names = class_names_of(rows)
    views = VideoViews(Dataset.from_list(list(rows)), (24, 40), num_frames=6, num_segments=2)
    items = [views[i] for i in range(len(views))]
    found = [(names[item["labels"]], zlib.crc32(item["pixel_values"].numpy().tobytes())) for item in items]
    print(json.dumps(sorted(found)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Folders of videos as a user has them; and the same as two parquet files with the videos' bytes."""
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos" / "train", CLASSES, 2)
    rows = load_videos(folder / "videos" / "train")
    table = {"clip": [Path(row["video"]).read_bytes() for row in rows], "label": rows["label"]}
    features = Features({"clip": Value("binary"), "label": ClassLabel(names=list(CLASSES))})
    (folder / "parquet" / "data").mkdir(parents=True)
    for i in range(2):
        part = Dataset.from_dict({name: column[3 * i : 3 * i + 3] for name, column in table.items()}, features)
        part.to_parquet(folder / "parquet" / "data" / f"train-0000{i}-of-00002.parquet")
    return folder


@pytest.fixture(scope="module")
def server(place):
    """A Hub to which both were uploaded, one of them private."""
    with LocalHub(x="tester").running() as running:
        api = HfApi(running.url, token="x")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
                patch.setattr(f"huggingface_hub.constants.{name}", value)
            for name in ("videos", "parquet"):
                api.create_repo(f"tester/{name}", repo_type="dataset", private=name == "parquet")
                api.upload_folder(repo_id=f"tester/{name}", folder_path=place / name, repo_type="dataset")
        yield running


def run(server: LocalHub, home: Path, *command, cwd=None) -> str:
    """Run Python with a command in a process of its own with an empty cache, and return what it prints."""
    environment = {**os.environ, **server.environment(home), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_data_set_by_its_name_is_the_one_on_the_disk(place, server, tmp_path):
    names = ["tester/videos", "tester/parquet"]
    sources = [place / "videos" / "train", *(f"stream:{name}" for name in names), *names]
    local, *others = map(json.loads, run(server, tmp_path / "home", "-c", READ, *sources).splitlines())
    assert [label for label, _ in local] == sorted(2 * CLASSES)
    assert len({number for _, number in local}) == 6
    assert others == [local] * 4


@pytest.mark.slow
def test_a_run_trains_on_a_stream_from_the_hub(server, tmp_path):
    values = {"task": "finetune", "train": "tester/parquet", "config": MODEL, "frame_step": 1, "epochs": 1}
    values |= {"warmup_epochs": 0, "batch_size": 2, "num_workers": 0, "streaming": True, "steps_per_epoch": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    run(server, tmp_path / "home", SCRIPT, "recipe.yaml", "--output_dir", "run", cwd=tmp_path)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(CLASSES)
