"""Checkpoints that are damaged, forged, old or of other videos: none is taken for what it is not, and none runs code."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.commands import log_of, train
from helpers.forgery import Evil, reseal
from safetensors.torch import load_file, save_file
from test_resume import assert_same_end, steps_of, write_place

from everest_hf.data import differences, identity_of, load_videos
from everest_hf.training.integrity import find_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), epochs=1, warmup_epochs=0)


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """A run of four steps, with the checkpoints of steps 2 and 4."""
    train("pretrain.yaml", "--output_dir", "finished", cwd=place).check()
    return place / "finished"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def go_on(place: Path, folder: Path, *options):
    return train("pretrain.yaml", "--output_dir", folder, *options, cwd=place)


def assert_refused(result, *parts: str) -> None:
    assert result.returncode == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    for part in parts:
        assert part in error
    assert "Traceback" not in result.stderr


# ----------------------------------------------------------------------------------------------------------- damaged


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("fault", [remove, truncate, flip])
def test_every_file_that_is_not_as_it_was_written_is_found(run, fault):
    newest, before = (run / "checkpoints" / f"step-{step:08d}" for step in (4, 2))
    assert find_checkpoint(run / "checkpoints").newest == newest
    files = [path for path in newest.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "parts.pt", "progress.json"}
    for path in files:
        content = path.read_bytes()
        fault(path)
        found = find_checkpoint(run / "checkpoints")
        assert found.newest == before, path
        ((damaged, reason),) = found.damaged
        assert damaged == newest
        assert path.name in reason
        path.write_bytes(content)
    assert find_checkpoint(run / "checkpoints").newest == newest


@pytest.mark.parametrize("content", ["", "{}", "[1]", "null", '{"step": 4', "\0" * 40])
def test_garbage_for_progress_is_damage(run, content):
    (run / "checkpoints" / "step-00000004" / "progress.json").write_text(content)
    assert find_checkpoint(run / "checkpoints").newest == run / "checkpoints" / "step-00000002"


def test_a_run_goes_on_from_the_one_before_a_damaged_checkpoint(place, finished, run):
    """To the same end. A garbage line of the log is named, and what others have put there stays."""
    folder = run / "checkpoints"
    truncate(folder / "step-00000004" / "state" / "optimizer.bin")
    foreign = [folder / ".DS_Store", folder / ".nfs0001", folder / "step-00000004.zip", folder / "step-notes" / "x"]
    foreign[-1].parent.mkdir()
    for path in foreign:
        path.write_text("not ours")
    log = run / "log.jsonl"
    log.write_text("\0\0\0\0\n" + log.read_text())
    result = go_on(place, run).check()
    warning = f"checkpoint {folder / 'step-00000004'} is damaged (state/optimizer.bin has"
    assert warning in result.stderr
    assert f"{log}:1 is damaged and left out" in result.stderr
    assert_same_end(run, finished)
    assert (folder / "damaged-step-00000004").is_dir()
    assert all(path.read_text() == "not ours" for path in foreign)


def test_nothing_is_started_again_where_all_checkpoints_are_damaged(place, run):
    for step in (2, 4):
        remove(run / "checkpoints" / f"step-{step:08d}" / "state" / "random_states_0.pkl")
    for options in ([], ["--dry_run"]):
        assert_refused(go_on(place, run, *options), "step-00000004 is damaged (state/random_states_0.pkl is missing)")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]


def test_a_checkpoint_that_leads_to_nan_is_not_called_sound(place, run):
    checkpoint = run / "checkpoints" / "step-00000002"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    weights = load_file(checkpoint / "state" / "model.safetensors")
    weights["decoder.mask_token"][:] = torch.nan
    save_file(weights, checkpoint / "state" / "model.safetensors", metadata={"format": "pt"})
    reseal(checkpoint)
    result = go_on(place, run)
    assert_refused(result, "step 3 is not finite", f"the run went on from {checkpoint}, which may be at fault")
    assert "sound" not in result.stderr


# ------------------------------------------------------------------------------------------------------- forged, old


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "parts.pt", "custom_checkpoint_0.pkl"])
def test_nothing_in_a_checkpoint_is_executed(place, run, tmp_path, name):
    checkpoint, trace = run / "checkpoints" / "step-00000004", tmp_path / "was executed"
    torch.save(Evil(trace), checkpoint / "state" / name)
    reseal(checkpoint)
    assert_refused(go_on(place, run), f"checkpoint {checkpoint} is not loaded: ")
    assert not trace.exists()


def test_the_forgery_of_these_tests_would_do_it(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "was executed")))
    assert (tmp_path / "was executed").exists()


def test_a_checkpoint_of_the_version_before_checksums_is_refused(place, run):
    path = run / "checkpoints" / "step-00000004" / "progress.json"
    progress = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in progress.items() if k not in ("files", "crc32", "data")}))
    assert_refused(go_on(place, run), "step-00000004 was written by an earlier version")


# ------------------------------------------------------------------------------------------------------ other videos


@pytest.fixture
def videos(place, tmp_path) -> Path:
    return shutil.copytree(place / "videos" / "train", tmp_path / "videos")


def changes_of(videos: Path, change) -> str:
    before = identity_of(load_videos(videos))
    change()
    return differences(json.loads(json.dumps(before)), identity_of(load_videos(videos)))


def test_the_same_videos_elsewhere_are_the_same(videos):
    before = identity_of(load_videos(videos))
    assert differences(before, identity_of(load_videos(videos.rename(videos.with_name("moved"))))) == ""


def test_a_video_that_was_added_differs(videos):
    added = lambda: shutil.copy(videos / "up" / "up_0.mp4", videos / "up" / "up_9.mp4")  # noqa: E731
    assert changes_of(videos, added) == "10 videos for 9, other paths, other labels"


def test_a_class_that_was_renamed_differs(videos):
    """All numbers shift."""
    assert "other classes" in changes_of(videos, lambda: (videos / "up").rename(videos / "aloft"))


def test_a_video_with_another_label_differs(videos):
    (videos / "list.txt").write_text("up/up_0.mp4 0\nleft/left_0.mp4 1\n")
    before = identity_of(load_videos(videos / "list.txt"))
    (videos / "list.txt").write_text("up/up_0.mp4 1\nleft/left_0.mp4 1\n")
    assert differences(before, identity_of(load_videos(videos / "list.txt"))) == "other labels"


def test_a_run_whose_videos_have_changed_does_not_go_on(place, tmp_path):
    for name in ("train", "val"):
        shutil.copytree(place / "videos" / name, tmp_path / "videos" / name)
    shutil.copy(place / "finetune.yaml", tmp_path)
    train("finetune.yaml", "--output_dir", "run", cwd=tmp_path).check()
    log = log_of(tmp_path / "run")
    for name in ("train", "val"):
        (tmp_path / "videos" / name / "up").rename(tmp_path / "videos" / name / "aloft")
    for options in ([], ["--dry_run"]):
        result = train("finetune.yaml", "--output_dir", "run", *options, cwd=tmp_path)
        assert_refused(result, "train is not what run/checkpoints/step-", "other paths, other classes; bring it back")
    assert log_of(tmp_path / "run") == log
    assert steps_of(tmp_path / "run")[-1] == 9
