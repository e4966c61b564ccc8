"""The four commands of the README on own videos, typed in an empty folder, by a package that is installed from a wheel."""

import csv
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers.commands import log_of
from helpers.videos import write_class_folders, write_clip
from test_readme import blocks_of
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEImageProcessor

ROOT = Path(__file__).parents[2]
# The block of the README, and what is added so that its third command takes seconds.
(COMMANDS,) = [
    text.splitlines() for _, text in blocks_of("README.md") if text.startswith("everest-hf split my_videos")
]
QUICK = [
    "--epochs",
    "2",
    "--warmup_epochs",
    "1",
    "--batch_size",
    "2",
    "--log_every",
    "1",
    "--segments",
    "1",
    "--crops",
    "1",
]
CLASSES = ("jump", "run", "walk")


def run(*command, cwd, path: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The folder of the programs of an environment that has the wheel, and sees the packages of the tests' own."""
    work = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".git", "build", "*.egg-info", "runs", "data", "site")
    shutil.copytree(
        ROOT, work / "source", ignore=lambda folder, names: left_out(folder, names) if folder == str(ROOT) else []
    )
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", work, work / "source", cwd=work)
    run(sys.executable, "-m", "venv", "--without-pip", work / "env", cwd=work)
    (packages,) = (work / "env").glob("lib/python*/site-packages")
    # As a path alone: what is installed there in editable form, such as this checkout, is not seen.
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = work.glob("everest_hf-*.whl")
    run(*pip, "--python", work / "env" / "bin" / "python", "install", "-q", "--no-deps", wheel, cwd=work)
    shutil.rmtree(work / "source")
    return work / "env" / "bin"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An empty folder, but for videos, and for a small VideoMAE under the name of that on the Hub."""
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "my_videos", CLASSES, 5)
    write_clip(folder / "new_videos" / "a.mp4", seed=98)
    write_clip(folder / "new_videos" / "b.mp4", num_frames=9, seed=99)
    sizes = {"image_size": 32, "num_frames": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = VideoMAEConfig(
        **sizes, **decoder, intermediate_size=48, decoder_intermediate_size=32, use_mean_pooling=False
    )
    torch.manual_seed(0)
    VideoMAEForPreTraining(config).save_pretrained(folder / "MCG-NJU" / "videomae-base")
    processor = VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "MCG-NJU" / "videomae-base")
    return folder


@pytest.mark.slow
def test_four_commands_from_videos_to_labels(programs, place):
    assert len(COMMANDS) == 4
    for line in COMMANDS:
        program, name, *arguments = shlex.split(line)
        run(programs / program, name, *arguments, *(QUICK if name == "train" else []), cwd=place, path=programs)
    assert [line["step"] for line in log_of(place / "runs" / "mine") if "loss" in line]
    with (place / "labels.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert sorted(Path(row["video"]).name for row in rows) == ["a.mp4", "b.mp4"]
    assert {row["label"] for row in rows} <= set(CLASSES)
