"""Data in whole runs: streams, several processes, unreadable videos."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import ROOT, Run, launch, train, train_on
from helpers.tables import write_parquet, write_tar
from helpers.tiny import TINY
from helpers.videos import bad_files, write_clip, write_list
from safetensors.torch import load_file

from everest_hf.data.packing import pack_videos
from everest_hf.video.encoding import Encoding

MODEL = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
MODEL.pop("num_labels")
RECIPE = {
    "config": MODEL,
    "frame_step": 1,
    "epochs": 2,
    "warmup_epochs": 0,
    "batch_size": 2,
    "num_workers": 2,
    "log_every": 1,
    "segments": 1,
    "crops": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with 12 videos in a list, in three parquet files and in two webdataset files, and two recipes."""
    folder = tmp_path_factory.mktemp("place")
    videos = [write_clip(folder / f"{i:02}.mp4", seed=i) for i in range(12)]
    write_list(folder / "list.txt", [(path, i % 3) for i, path in enumerate(videos)])
    for part in range(3):
        numbers = range(part, 12, 3)
        cells = [{"bytes": videos[i].read_bytes(), "path": videos[i].name} for i in numbers]
        write_parquet(folder / f"part-{part}.parquet", cells, [i % 3 for i in numbers], ["a", "b", "c"])
    for part in range(2):
        numbers = range(part, 12, 2)
        write_tar(folder / f"part-{part}.tar", [videos[i] for i in numbers], cls=[str(i % 3) for i in numbers])
    (folder / "pretrain.yaml").write_text(yaml.safe_dump({**RECIPE, "task": "pretrain"}))
    (folder / "finetune.yaml").write_text(yaml.safe_dump({**RECIPE, "task": "finetune"}))
    return folder


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- streams


def test_pretraining_on_a_stream_of_parquet_files_goes_on_where_it_was_killed(place):
    options = ["--train", "part-*.parquet", "--streaming", "--steps_per_epoch", 4, "--save_every", 0.25]
    done = train("pretrain.yaml", *options, "--output_dir", "whole", cwd=place).check()
    assert "pretrain: 8 training videos an epoch, 0 held out, 2 epochs = 8 steps of 2 clips" in done.stdout
    killed = Run("pretrain.yaml", *options, "--output_dir", "killed", cwd=place)
    killed.kill_when(place / "killed" / "checkpoints" / "step-00000003")
    train("pretrain.yaml", *options, "--output_dir", "killed", cwd=place).check()
    whole, again = (log_of(place / name) for name in ("whole", "killed"))
    assert [line["step"] for line in again] == list(range(1, 9))
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
    weights = [load_file(place / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_fine_tuning_on_a_stream_of_webdataset_files(place):
    options = ["--streaming", "--steps_per_epoch", 3, "--num_classes", 3, "--num_sample", 2, "--val", "list.txt"]
    done = train("finetune.yaml", "--train", "part-*.tar", *options, "--output_dir", "tar", cwd=place).check()
    assert "finetune: 3 classes, 6 training videos an epoch, 12 held out, 2 epochs = 6 steps of 4 clips" in done.stdout
    log = log_of(place / "tar")
    assert sum("loss" in line for line in log) == 6
    assert 0 <= log[-1]["val_top1"] <= 1
    config = json.loads((place / "tar" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1", "2": "2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "part-*.tar", "--streaming"], "steps_per_epoch is 0; it must be at least 1 with streaming"),
        (["--train", "list.txt", "--streaming", "--steps_per_epoch", 1], "list.txt: is read where it lies"),
        (["--train", "list.txt", "--num_classes", 3], "num_classes is 3; it must be"),
        (["--train", "part-*.tar", "--streaming", "--steps_per_epoch", 1], "a stream does not tell its classes"),
        (["--train", "part-*.parquet", "--train_split", "val"], "has no split 'val'; choose one of ['train']"),
    ],
)
def test_what_does_not_start(place, options, message):
    failed = train("finetune.yaml", *options, "--output_dir", "refused", cwd=place)
    assert failed.returncode != 0
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_wrong_label_in_a_stream_is_one_line(place):
    options = ["--train", "part-*.tar", "--streaming", "--steps_per_epoch", 6, "--num_classes", 2]
    failed = train("finetune.yaml", *options, "--output_dir", "wrong", cwd=place)
    assert failed.returncode != 0
    assert "label out of range; 2 classes are labelled 0 to 1" in failed.stderr.splitlines()[-1]


# ---------------------------------------------------------------------- several processes


def read_shards(place, num_processes: int, *workers: int) -> list[dict[int, tuple]]:
    """What each process reads of the third epoch, after its first step; see shards.py."""
    folder = place / f"shards-{num_processes}"
    folder.mkdir()
    arguments = [place / "list.txt", place / "part-*.parquet", folder, 4, 1, *workers]
    script = ROOT / "tests" / "helpers" / "shards.py"
    for result in train_on(num_processes, *arguments, cwd=folder, script=script):
        result.check()
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_processes)]


def test_processes_and_workers_share_the_clips_and_change_none(place):
    (one,) = read_shards(place, 1, 0, 3)
    two = read_shards(place, 2, 1)
    (alone, *streams), (three, stream) = one[0], one[3]
    (first, *first_stream), (second, *second_stream) = (shard[1] for shard in two)
    # Alone, the first step had two of the twelve videos; the two processes' first step had four.
    assert alone == three
    assert len({index for index, _ in alone}) == len(alone) == 10
    assert len(first) == len(second) == 4
    assert sorted(first + second) == sorted(alone[2:])
    # The order of a stream depends on who reads it, its clips do not.
    clips = {}
    for pairs in (*streams, stream, *first_stream, *second_stream):
        assert len(pairs) == 6
        assert all(clips.setdefault(index, number) == number for index, number in pairs)
    assert not dict(first_stream[0]).keys() & dict(second_stream[0]).keys()


@pytest.mark.slow
def test_four_processes_of_four_workers_read_each_clip_of_prepared_files_once(place, tmp_path):
    """34 videos in 16 files make four steps of eight; two are left over, by the stream those of the larger files."""
    videos = [write_clip(tmp_path / "in" / f"{i:02}.mp4", seed=i) for i in range(34)]
    listed = write_list(tmp_path / "list.txt", [(path, i % 3) for i, path in enumerate(videos)])
    assert len(pack_videos(listed, tmp_path / "out", 16, encoding=Encoding(frame_step=2), workers=1).made) == 16
    pattern, script = tmp_path / "out" / "*.parquet", str(ROOT / "tests" / "helpers" / "shards.py")
    found = {}
    for processes, steps, workers in ((1, 17, 1), (4, 4, 4)):
        folder = tmp_path / f"read by {processes}"
        folder.mkdir()
        how = {"cwd": folder, "processes": processes, "program": (script,)}
        launch(pattern, pattern, folder, steps, 0, workers, **how).check()
        found[processes] = [torch.load(folder / f"{rank}.pt")[workers] for rank in range(processes)]
    for which in range(2):  # of all files as one list, of the stream
        (alone,), shared = ([process[which] for process in found[count]] for count in (1, 4))
        assert len(alone) == len(set(alone)) == 34
        assert [len(pairs) for pairs in shared] == [8] * 4
        together = {pair for pairs in shared for pair in pairs}
        assert len(together) == 32
        assert together < set(alone)

    options = ["--train", pattern, "--epochs", 2, "--num_workers", 4, "--config", "drop_path_rate=0.0"]
    train("pretrain.yaml", *options, "--batch_size", 8, "--output_dir", "one of eight", cwd=place).check()
    for result in train_on(4, "pretrain.yaml", *options, "--output_dir", "four of two", cwd=place):
        result.check()
    one, four = (
        [line["loss"] for line in log_of(place / name) if "loss" in line] for name in ("one of eight", "four of two")
    )
    assert len(one) == 8
    assert one == pytest.approx(four, abs=1e-5)


# ---------------------------------------------------------------------- unreadable videos


@pytest.fixture(scope="module")
def four_bad(place) -> Path:
    """A list of 300 lines of which 4 name unreadable videos: the first, and three that no look at 256 of them finds."""
    content = bad_files(place / "bad")["text"].read_bytes()
    lines = [(place / f"{i % 12:02}.mp4",) for i in range(300)]
    opened = {i * 300 // 256 for i in range(256)}
    for number, i in enumerate([0, *[i for i in range(300) if i not in opened][:3]]):
        path = place / "bad" / f"bad_{number}.mp4"
        path.write_bytes(content)
        lines[i] = (path,)
    return write_list(place / "four.txt", lines)


@pytest.mark.slow
def test_unreadable_videos_are_counted_over_the_processes(place, four_bad):
    """A share of 1 % is 3 of 300 videos; each process meets fewer, both together 4. All of them end, with one line."""
    options = ["--train", four_bad, "--batch_size", 15, "--epochs", 1, "--log_every", 5, "--num_workers", 1]
    stopped = train_on(2, "pretrain.yaml", *options, "--output_dir", "stopped", cwd=place)
    assert 0 not in [result.returncode for result in stopped]
    (line,) = [line for result in stopped for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "4 of 300 training videos are unreadable, more than max_bad_fraction=0.01; the first is " in line
    assert "bad_videos.txt" in line
    assert not (place / "stopped" / "model").exists()


def test_unreadable_videos_are_listed(place, four_bad):
    options = ["--train", four_bad, "--batch_size", 30, "--epochs", 2, "--max_bad_fraction", 0.02]
    done = train("pretrain.yaml", *options, "--output_dir", "listed", cwd=place).check()
    listed = [line.split("\t") for line in (place / "listed" / "bad_videos.txt").read_text().splitlines()]
    assert sorted(path for path, _ in listed) == [str(place / "bad" / f"bad_{i}.mp4") for i in range(4)]
    for path, reason in listed:
        assert done.stderr.count(f"unreadable video replaced: {path}: {reason}") == 1
    counts = [line for line in log_of(place / "listed") if "bad_videos" in line]
    assert [(line["step"], line["bad_videos"]) for line in counts] == [(10, 4), (20, 4)]
    assert counts[0]["replaced"] >= 4 < counts[1]["replaced"]
    assert "4 unreadable training videos" in done.stdout


def test_every_unreadable_video_of_validation_is_named_before_the_first_step(place, four_bad):
    options = ["--train", "list.txt", "--val", four_bad, "--output_dir", "named"]
    failed = train("pretrain.yaml", *options, cwd=place)
    assert failed.returncode != 0
    for i in range(4):
        assert failed.stderr.count(f"unreadable: {place / 'bad' / f'bad_{i}.mp4'}: ") == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "four.txt: 4 unreadable videos, the first is " in line
    assert not (place / "named" / "log.jsonl").exists()
