"""`everest-hf embed --windows`: features of long videos, and what programs for action localisation read beside them."""

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, fork
from helpers.models import build
from helpers.videos import bad_files, moving_frames, write_clip, write_list, write_video

import everest_hf
from everest_hf import EverestForVideoClassification, EverestVideoProcessor, cli
from everest_hf.files import held
from everest_hf.inference.embed_windows import feature_names

FPS, PATIENCE = 25, 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    model = build(EverestForVideoClassification)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    EverestVideoProcessor.from_config(model.config, frame_step=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two films of 90 and 60 frames, and a list of the actions in them, in seconds."""
    folder = tmp_path_factory.mktemp("films")
    for i, (name, count) in enumerate({"one": 90, "two": 60}.items()):
        write_clip(folder / f"{name}.mp4", count, seed=i, fps=FPS)
    actions = ["one.mp4,0.4,1.2,jump", "one.mp4,2,3.2,run", "two.mp4,0.8,1.6,jump"]
    (folder / "actions.csv").write_text("\n".join(["video,start,end,label", *actions]) + "\n")
    return folder


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def read(out: Path) -> dict:
    return json.loads((out / "features.json").read_text())


def test_features_of_a_folder_of_films(checkpoint, films, tmp_path, capsys):
    out = tmp_path / "features"
    assert run("embed", films, out, "--model", checkpoint, "--windows", "--stride", 4, "--keep-ratio", 0.3) == 0
    assert f"{out}: 32 values for each window of 2 videos\n" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["annotations.json", "features.json", "one.npy", "two.npy"]
    model = EverestForVideoClassification.from_pretrained(checkpoint).eval()
    processor = EverestVideoProcessor.from_pretrained(checkpoint)
    about = read(out)
    for name, count in {"one": 90, "two": 60}.items():
        features = np.load(out / f"{name}.npy")
        found = list(everest_hf.windows(model, processor, str(films / f"{name}.mp4"), stride=4, keep_ratio=0.3))
        assert features.dtype == np.float32
        assert len(features) == len(found) == (count - 23) // 4 + 1
        torch.testing.assert_close(torch.tensor(features), torch.stack([window.features for window in found]))
        video = about["videos"][name]
        assert (video["num_frames"], video["fps"], video["count"]) == (count, FPS, len(features))
        assert video["seconds"] == pytest.approx([(4 * i + 23 / 2) / FPS for i in range(len(features))])
        assert video["annotations"] == []
    assert (about["stride"], about["span"], about["frame_step"], about["dim"]) == (4, 23, 2, 32)
    assert (about["model"], about["keep_ratio"], about["bad"]) == (checkpoint, 0.3, [])


def actionformer_items(settings: dict, subset: str) -> dict[str, dict]:
    """What ActionFormer makes of its `dataset` settings: features, and actions in features, by video.

    The rules are those of its loader "thumos": the file is feat_folder + file_prefix + key + file_ext; classes are the
    label_id of what the json holds; an action lies at (second * fps - num_frames / 2) / feat_stride.
    """
    database = json.loads(Path(settings["json_file"]).read_text())["database"]
    classes = {a["label"]: a["label_id"] for entry in database.values() for a in entry["annotations"]}
    assert len(classes) == settings["num_classes"]
    items = {}
    for key, entry in database.items():
        if entry["subset"].lower() != subset:
            continue
        features = np.load(
            os.path.join(settings["feat_folder"], (settings["file_prefix"] or "") + key + settings["file_ext"])
        )
        assert features.shape[1] == settings["input_dim"]
        fps = settings["default_fps"] or entry["fps"]
        seconds = np.array([action["segment"] for action in entry["annotations"]]).reshape(-1, 2)
        places = (seconds * fps - 0.5 * settings["num_frames"]) / settings["feat_stride"]
        labels = [classes[action["label"]] for action in entry["annotations"]]
        items[key] = {"features": features, "places": places, "labels": labels, "seconds": seconds}
    return items


def opentad_items(settings: dict, subset: str) -> dict[str, dict]:
    """What OpenTAD's ThumosPaddingDataset and LoadFeats make of their settings.

    Seconds become frames by frame / duration, cut off to whole ones, and then (frame - offset_frames) / snippet stride.
    """
    database = json.loads(Path(settings["ann_file"]).read_text())["database"]
    stride = settings["feature_stride"] * settings["sample_stride"]
    items = {}
    for key, entry in database.items():
        if entry["subset"] == subset:
            seconds = np.array([action["segment"] for action in entry["annotations"]]).reshape(-1, 2)
            frames = (seconds / entry["duration"] * entry["frame"]).astype(int)
            features = np.load(os.path.join(settings["data_path"], f"{key}.npy"))[:: settings["sample_stride"]]
            items[key] = {"features": features, "places": (frames - settings["offset_frames"]) / stride}
    return items


@pytest.mark.parametrize("options", [[], ["--fps", 10, "--frame-step", 1, "--stride", 2]])
def test_programs_for_action_localisation_read_them(checkpoint, films, tmp_path, options):
    """Where a program puts an action, there are the features whose windows have their middle in it."""
    out = tmp_path / "features"
    assert run("embed", films / "actions.csv", out, "--model", checkpoint, "--windows", *options) == 0
    about = read(out)
    items = actionformer_items(about["actionformer"], "training")
    assert {name: item["labels"] for name, item in items.items()} == {"one": [0, 1], "two": [0]}
    assert items["one"]["seconds"].tolist() == [[0.4, 1.2], [2.0, 3.2]]
    others = opentad_items(about["opentad"], "training")
    for name, item in items.items():
        centers = np.array(about["videos"][name]["seconds"])
        assert len(centers) == len(item["features"]) == len(others[name]["features"])
        for (start, end), place, other in zip(item["seconds"], item["places"], others[name]["places"], strict=True):
            inside = [i for i, center in enumerate(centers) if start <= center <= end]
            assert inside == [i for i in range(len(centers)) if place[0] <= i + 1e-9 and i <= place[1] + 1e-9]
            assert inside
            assert other == pytest.approx(place, abs=1.5 / about["stride"])  # whole frames
    if options:
        assert (about["actionformer"]["default_fps"], about["videos"]["one"]["num_frames"]) == (10, 36)


def test_the_page_leads_from_films_to_the_input_of_actionformer(checkpoint, tmp_path, monkeypatch):
    """The list and the commands that docs/long-videos.md shows, on films that are there."""
    page = (ROOT / "docs" / "long-videos.md").read_text(encoding="utf-8")
    seconds = {"kitchen": 40, "garden": 8, "cellar": 10}
    for name, length in seconds.items():
        write_clip(tmp_path / f"films/{name}.mp4", 10 * length, height=32, width=48, seed=length, fps=10)
    listed = re.search(r"```\n(video,start,end,label\n.*?)```", page, flags=re.DOTALL)[1]
    (tmp_path / "films/train.csv").write_text(listed)
    (tmp_path / "films/val.csv").write_text("video,start,end,label\ncellar.mp4,3,9,close\n")
    model = tmp_path / "runs/quickstart/finetune"
    model.mkdir(parents=True)
    (model / "model").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^everest-hf (embed films.*)$", page, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert run(*shlex.split(command)) == 0
    settings = read(Path("features"))["actionformer"]
    train, val = (actionformer_items(settings, subset) for subset in ("training", "validation"))
    assert {name: item["labels"] for name, item in train.items()} == {"kitchen": [1, 0], "garden": [1]}
    assert val["cellar"]["labels"] == [0]
    for name, item in {**train, **val}.items():
        assert len(item["features"]) == (25 * seconds[name] - 12) // 4 + 1
    assert (settings["feat_stride"], settings["num_frames"], settings["default_fps"]) == (4, 12, 25)


def test_segments_in_frames_have_their_seconds(checkpoint, films, tmp_path):
    lines = ["video,start_frame,end_frame,label", f"{films}/one.mp4,10,30,jump", f"{films}/two.mp4,50,80,run"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    out = tmp_path / "features"
    assert run("embed", tmp_path / "list.csv", out, "--model", checkpoint, "--windows") == 1  # two.mp4 has 60
    assert read(out)["bad"][0]["video"] == str(films / "two.mp4")
    assert "50 to 80 (frames) is not in the video, which has 60 frames" in read(out)["bad"][0]["reason"]
    database = json.loads((out / "annotations.json").read_text())["database"]
    assert database["one"]["annotations"] == [{"segment": [0.4, 1.2], "label": "jump", "label_id": 0}]
    assert set(database) == {"one"}


def test_another_subset_in_the_same_folder(checkpoint, films, tmp_path, capsys):
    out = tmp_path / "features"
    (tmp_path / "val.csv").write_text(f"video,start,end,label\n{films}/two.mp4,0.8,1.6,dance\n")
    (tmp_path / "train.csv").write_text(f"video,start,end,label\n{films}/one.mp4,0.4,1.2,jump\n")
    command = ["--model", checkpoint, "--windows", "--stride", 10]
    assert run("embed", tmp_path / "train.csv", out, *command) == 0
    assert run("embed", tmp_path / "val.csv", out, *command, "--subset", "validation") == 0
    settings = read(out)["actionformer"]
    assert set(actionformer_items(settings, "training")) == {"one"}
    assert actionformer_items(settings, "validation")["two"]["labels"] == [0]  # dance, jump
    capsys.readouterr()

    other = write_clip(tmp_path / "other" / "two.mp4", 30)
    for arguments, reason in {
        (films, *command, "--keep-ratio", 0.2): "holds features of another kind (different: keep_ratio)",
        (other.parent, *command): f"{other}: its features would be two.npy, which are of {films}/two.mp4",
    }.items():
        source, *options = arguments
        assert run("embed", source, out, *options) == 1
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_names_that_collide_keep_their_folders():
    assert feature_names(["/a/x/1.mp4", "/a/y/1.mp4", "/a/y/2.mp4"]) == ["x/1", "y/1", "2"]
    assert feature_names(["/a/1.mp4", "/a/1.mkv", "/a/b/2"]) == ["1.mp4", "1.mkv", "2"]
    assert feature_names(["/a/1.mp4", "/a/x/1.mp4"]) == ["1", "x/1"]
    assert feature_names(["hf://datasets/me/set/v.1.mp4"]) == ["v.1"]
    with pytest.raises(ValueError, match=r"1.mp4.npy would hold the features of several videos"):
        feature_names(["/a/1.mp4", "/a/1.mkv", "/a/1.mp4.avi"])


def test_films_of_one_name(checkpoint, tmp_path):
    for folder in "ab":
        write_clip(tmp_path / "films" / folder / "film.mp4", 30, seed=ord(folder))
    out = tmp_path / "features"
    assert run("embed", tmp_path / "films", out, "--model", checkpoint, "--windows") == 0
    assert set(read(out)["videos"]) == {"a/film", "b/film"}
    assert not np.array_equal(np.load(out / "a" / "film.npy"), np.load(out / "b" / "film.npy"))


def test_bad_videos_are_named_and_the_others_done(checkpoint, tmp_path, capfd):
    bad = bad_files(tmp_path)
    good = write_clip(tmp_path / "other.mp4", 30, seed=5)
    damaged = write_clip(tmp_path / "damaged.mp4", 200, height=96, width=128, g=12, crf=10)
    content = damaged.read_bytes()
    place = (content.index(b"mdat") + content.index(b"moov")) // 2
    damaged.write_bytes(content[:place] + np.random.default_rng(0).bytes(2000) + content[place + 2000 :])
    bad["damaged"] = damaged  # after some windows
    names, out = ("text", "empty", "truncated", "damaged"), tmp_path / "features"
    source = write_list(tmp_path / "list.txt", [*((bad[name],) for name in names), (good,)])
    assert run("embed", source, out, "--model", checkpoint, "--windows") == 1
    printed, err = capfd.readouterr()
    for name in names:
        assert f"everest-hf: error: {bad[name]}: " in err
    assert "for each window of 1 videos" in printed
    assert sorted(os.listdir(out)) == ["annotations.json", "features.json", "other.npy"]
    assert set(read(out)["videos"]) == {"other"}
    assert [entry["video"] for entry in read(out)["bad"]] == [str(bad[name]) for name in names]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on(checkpoint, tmp_path, how):
    for i in range(3):
        write_clip(tmp_path / "films" / f"{i}.mp4", 120, seed=i)
    out = tmp_path / "features"
    command = ["embed", tmp_path / "films", out, "--model", checkpoint, "--windows", "--stride", 1]
    process = fork(lambda: run(*command))
    deadline = time.monotonic() + PATIENCE
    while not (out / "0.npy").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, how)
    process.join(PATIENCE)
    assert process.exitcode == (-signal.SIGKILL if how is signal.SIGKILL else 130)
    assert not (out / "2.npy").exists()
    first = (out / "0.npy").stat().st_mtime_ns
    np.save(out / "1.npy", np.zeros((4, 32), np.float32))  # of a video that was another one then
    assert run(*command) == 0
    assert sorted(os.listdir(out)) == ["0.npy", "1.npy", "2.npy", "annotations.json", "features.json"]
    assert (out / "0.npy").stat().st_mtime_ns == first
    assert {
        name: (video["count"], len(np.load(out / f"{name}.npy"))) for name, video in read(out)["videos"].items()
    } == {str(i): (98, 98) for i in range(3)}


def test_two_in_the_same_folder_at_once(checkpoint, films, tmp_path, capfd):
    with held(tmp_path / "features"):
        second = fork(lambda: run("embed", films, tmp_path / "features", "--model", checkpoint, "--windows"))
        second.join(PATIENCE)
    assert second.exitcode == 1
    assert "features is in use by process" in capfd.readouterr().err.splitlines()[-1]


def test_memory_does_not_grow_with_the_video(checkpoint, tmp_path):
    """No more frames than a window's and a run's are held at a time."""
    model = EverestForVideoClassification.from_pretrained(checkpoint).eval()
    processor = EverestVideoProcessor.from_pretrained(checkpoint)
    path = str(write_video(tmp_path / "long.mp4", moving_frames(600, 48, 64), fps=FPS))
    held_frames, at = [], everest_hf.inference.video_windows._Frames.at

    def counting(self, numbers):
        held_frames.append(len(self._there))
        return at(self, numbers)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(everest_hf.inference.video_windows._Frames, "at", counting)
        assert len(list(everest_hf.windows(model, processor, path, stride=4))) == (600 - 23) // 4 + 1
    assert max(held_frames) <= 23 + 32


def test_what_is_wrong_is_said_before_anything_is_computed(checkpoint, films, tmp_path, capsys):
    model = ["--model", checkpoint]
    there = tmp_path / "there"
    there.write_text("")
    for arguments, reason in {
        (tmp_path / "x.parquet", *model, "--stride", 4): "--stride is of windows; give --windows too",
        (tmp_path / "x.parquet", *model, "--windows"): "with --windows the output is a folder",
        (there, *model, "--windows"): "with --windows the output is a folder",
        (
            tmp_path / "x",
            *model,
            "--windows",
            "--views",
            "2x3",
        ): "--workers, --views and --shard have no meaning with --windows",
        (tmp_path / "x", *model, "--windows", "--stride", 0): "stride is 0; it must be a positive integer",
    }.items():
        assert run("embed", films, *arguments) == 1
        assert reason in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(tmp_path) == ["there"]
