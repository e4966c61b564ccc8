"""Many videos at a time: what is found, scores, tables, bad files; the functions of the package."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, Features
from helpers.commands import ROOT
from helpers.models import save_classifier
from helpers.tables import BOTH
from helpers.videos import bad_files, write_class_folders, write_clip, write_list
from safetensors.torch import load_file

import everest_hf
from everest_hf import cli, inference
from everest_hf.data import VideoViews
from everest_hf.inference import find_videos

LABELS = ["climb", "dive", "=jump", "run, fast", "swim"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A classifier whose answers differ from video to video."""
    return save_classifier(tmp_path_factory.mktemp("checkpoint"), LABELS, frame_step=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Five videos in two folders, and what is none."""
    folder = write_class_folders(tmp_path_factory.mktemp("videos") / "set", num_frames=30)
    write_clip(folder / "left" / "deeper" / "long.mkv", num_frames=70, seed=40)
    (folder / "notes.txt").write_text("not a video")
    write_clip(folder / ".hidden" / "clip.mp4")
    return folder


@pytest.fixture(scope="module")
def paths(videos) -> list[str]:
    names = ("left/deeper/long.mkv", "left/left_0.mp4", "left/left_1.mp4", "right/right_0.mp4", "right/right_1.mp4")
    return [str(videos / name) for name in names]


@pytest.fixture(scope="module")
def one_by_one(checkpoint, paths) -> dict[tuple[int, int], list[dict[str, float]]]:
    """The score of every label of each video, by the views that it is a mean over."""
    model, processor = inference.load_checkpoint(checkpoint, inference.CLASSIFICATION)

    def scores(path, views):
        return dict(inference.top_labels(inference.classify(model, processor, path, views=views), model.config, 99))

    return {views: [scores(path, views) for path in paths] for views in ((1, 1), (2, 3))}


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def names_of(sources, **options) -> list[str]:
    return [name for part in find_videos(sources, **options) for name in part.names]


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (2, 2), (8, 1), (99, None)])
@pytest.mark.parametrize("views", [(1, 1), (2, 3)])
def test_scores_depend_on_neither_batches_nor_processes(
    checkpoint, videos, paths, one_by_one, batch_size, workers, views
):
    found = everest_hf.predict(videos, checkpoint, views=views, top_k=99, batch_size=batch_size, num_workers=workers)
    assert [answer.video for answer in found] == paths
    for answer, expected in zip(found, one_by_one[views], strict=True):
        assert dict(answer.top) == pytest.approx(expected, abs=1e-5)
        assert (answer.label, answer.score) == answer.top[0]
        assert answer.error is None
    assert len({round(answer.score, 3) for answer in found}) > 3  # videos differ


def test_the_centre_view_is_that_of_the_processor(checkpoint, paths):
    _, processor = inference.load_checkpoint(checkpoint, inference.CLASSIFICATION)
    for path in paths:
        pixel_values, places = inference.read_view(processor, path)
        assert torch.equal(pixel_values, processor(path, return_tensors="pt")["pixel_values"])
        assert len(places) == 12


def test_a_keep_ratio_reaches_the_model(checkpoint, paths):
    one = everest_hf.predict(paths[0], checkpoint, keep_ratio=0.1)
    other = everest_hf.predict(paths[0], checkpoint, keep_ratio=1)
    assert one[0].score != other[0].score


# ------------------------------------------------------------------------------------------------------------ sources


def test_every_kind_of_source_gives_its_videos(videos, paths, tmp_path, monkeypatch):
    monkeypatch.chdir(videos.parent)
    listed = write_list(tmp_path / "list.txt", [(paths[3], "right"), (paths[0], "left")])
    Dataset.from_dict({"video": paths[:2]}).save_to_disk(tmp_path / "saved")
    Dataset.from_dict({"path": paths[2:4], "label": [0, 1]}).to_parquet(tmp_path / "set" / "a.parquet")
    for source, expected in (
        (paths[1], [paths[1]]),
        (Path(paths[1]), [paths[1]]),
        (videos, paths),
        ("set", [os.path.relpath(path) for path in paths]),
        (f"{videos}/right", paths[3:]),
        (f"{videos}/*/*_0.mp4", [paths[1], paths[3]]),
        (f"{videos}/**", paths),
        (f"{videos}/*", paths),
        (listed, [paths[3], paths[0]]),
        (tmp_path / "saved", paths[:2]),
        (tmp_path / "set", paths[2:4]),
        (f"{tmp_path}/set/*.parquet", paths[2:4]),
        ("https://a.b/c", ["https://a.b/c"]),
        ("hf://datasets/a/b/c.mp4", ["hf://datasets/a/b/c.mp4"]),
        (pd.DataFrame({"video": paths[:1]}), paths[:1]),
        ([paths[4], listed, paths[4], videos / "right"], [paths[4], paths[3], paths[0], paths[4], *paths[3:]]),
    ):
        assert names_of(source) == expected, source
    assert names_of(videos, split="right") == paths[3:]
    assert names_of(write_list(tmp_path / "names.txt", [("left_0.mp4",)]), data_root=videos / "left") == [paths[1]]


def test_what_is_not_there_is_named(videos, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, reason in {
        tmp_path / "a.mp4": "no such video file",
        tmp_path / "gone": "no such video file, folder, list or data set",
        tmp_path / "empty": "no video in it; expected files ending in one of .mp4",
        f"{videos}/*.gif": "matches no video; expected names ending in .mp4",
        "hf://datasets/nobody/nothing": "cannot be loaded|on the Hub",
    }.items():
        with pytest.raises((FileNotFoundError, ValueError), match=reason) as caught:
            find_videos(source)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="up: no such folder"):
        find_videos(videos, split="up")
    with pytest.raises(ValueError, match="no video is named"):
        find_videos([])


def test_a_data_set_of_the_hub_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="there is a file or folder a/b here"):
        find_videos("hf://datasets/a/b")


def test_bytes_and_files_are_answered_together(checkpoint, paths, one_by_one):
    cells = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths[1:3]]
    rows = Dataset.from_dict({"video": cells}, Features(video=BOTH))
    found = everest_hf.predict([paths[0], rows, paths[3]], checkpoint, top_k=99, batch_size=3)
    assert [answer.video for answer in found] == [paths[0], "Dataset row 0", "Dataset row 1", paths[3]]
    for answer, expected in zip(found, one_by_one[1, 1], strict=False):
        assert dict(answer.top) == pytest.approx(expected, abs=1e-5)


def test_addresses_in_a_data_set_are_fetched_only_if_allowed(checkpoint, paths, tmp_path):
    Dataset.from_dict({"video": ["http://127.0.0.1:9/a.mp4", paths[0]]}).to_parquet(tmp_path / "set.parquet")
    refused, answered = everest_hf.predict(tmp_path / "set.parquet", checkpoint)
    assert refused.error == "hf:// is fetched, http:// is not unless url_schemes=http allows it"
    assert answered.label in LABELS
    tried = everest_hf.predict(tmp_path / "set.parquet", checkpoint, url_schemes=["http"])[0]
    assert tried.error.startswith("cannot be fetched")


# -------------------------------------------------------------------------------------------------------- the command


def test_a_table_has_a_row_for_each_video(checkpoint, videos, paths, one_by_one, tmp_path, capfd, monkeypatch):
    out = tmp_path / "new" / "table.csv"
    strange = shutil.copy(paths[0], tmp_path / "=1+1.mp4")
    monkeypatch.chdir(tmp_path)
    assert run("predict", videos, "=1+1.mp4", "--model", checkpoint, "--csv", out, "--top-k", 2) == 0
    printed, progress = capfd.readouterr()
    assert printed == f"{out}: 6 of 6 videos\n"
    assert "6/6" in progress
    assert "video/s" in progress
    with out.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["video", "label", "score", "top2", "score2"]
    assert [line[0] for line in lines] == [*paths, f"'{Path(strange).name}"]
    for line, expected in zip(lines, [*one_by_one[1, 1], one_by_one[1, 1][0]], strict=True):
        ranked = sorted(expected.items(), key=lambda entry: -entry[1])[:2]
        assert [line[1].removeprefix("'"), line[3].removeprefix("'")] == [name for name, _ in ranked]
        assert [float(line[2]), float(line[4])] == pytest.approx([score for _, score in ranked], abs=1e-5)
        assert "=jump" not in line
    assert os.listdir(out.parent) == ["table.csv"]


def test_bad_videos_are_named_at_the_end_and_the_others_answered(checkpoint, paths, tmp_path, capfd):
    bad = bad_files(tmp_path)
    listed = write_list(tmp_path / "list.txt", [(tmp_path / "gone.mp4",), (paths[1],)])
    out = tmp_path / "table.csv"
    sources = [bad["text"], paths[0], listed, bad["empty"]]
    assert run("predict", *sources, "--model", checkpoint, "--csv", out, "--json", "--batch-size", 2) == 1
    printed, err = capfd.readouterr()
    assert [json.loads(line)["video"] for line in printed.splitlines()[:-1]] == [paths[0], paths[1]]
    assert printed.endswith(f"{out}: 2 of 5 videos\n")
    errors = [line for line in err.splitlines() if "error" in line]
    assert errors == err.splitlines()[-3:]
    for line, path in zip(errors, (bad["text"], tmp_path / "gone.mp4", bad["empty"]), strict=True):
        assert line.startswith(f"everest-hf: error: {path}: ")
    with out.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    assert [line[0] for line in lines] == [
        str(bad["text"]),
        paths[0],
        str(tmp_path / "gone.mp4"),
        paths[1],
        str(bad["empty"]),
    ]
    assert [bool(line[1]) for line in lines] == [False, True, False, True, False]
    assert {len(line) for line in lines} == {11}


def test_a_table_that_cannot_be_written_is_said_before_a_model_is_loaded(paths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inference, "load_checkpoint", None)
    assert run("predict", paths[0], "--csv", tmp_path) == 1
    assert capsys.readouterr().err == f"everest-hf: error: {tmp_path}: is a folder; expected the name of a .csv file\n"
    assert run("predict", paths[0], "--batch-size", 0) == 1
    assert "--batch-size is 0; it must be at least 1" in capsys.readouterr().err


def test_a_decoding_process_that_is_killed_is_said_and_no_table_is_left(
    checkpoint, videos, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(VideoViews, "_read", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    assert run("predict", videos, "--model", checkpoint, "--csv", tmp_path / "a.csv", "--workers", 1) == 1
    assert "everest-hf check-data" in capfd.readouterr().err.splitlines()[-1]
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------------------------- the package


def test_embed_gives_what_the_command_writes(checkpoint, videos, paths, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run("embed", videos / "right", out, "--model", checkpoint, "--views", "2x1", "--keep-ratio", 0.3) == 0
    bad = bad_files(tmp_path)["text"]
    found = everest_hf.embed([bad, videos / "right"], checkpoint, views=(2, 1), keep_ratio=0.3, batch_size=2)
    torch.testing.assert_close(found.embeddings, load_file(out)["embeddings"], atol=1e-5, rtol=1e-5)
    assert found.videos == paths[3:]
    assert [error.path for error in found.bad] == [str(bad)]
    assert not found.embeddings.is_inference()  # a classifier can be trained on them


def test_impossible_arguments_are_refused(checkpoint, paths):
    for function in (everest_hf.predict, everest_hf.embed):
        for arguments, reason in (
            ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
            ({"num_workers": -1}, "num_workers is -1"),
            ({"keep_ratio": 2}, "EverestConfig.keep_ratio is 2"),
            ({"views": (0, 3)}, r"views is \(0, 3\); it must be segments and crops, each at least 1"),
        ):
            with pytest.raises(ValueError, match=reason):
                function(paths[0], checkpoint, **arguments)
    with pytest.raises(ValueError, match="top_k is 0"):
        everest_hf.predict(paths[0], checkpoint, top_k=0)


def test_importing_the_package_stays_cheap():
    """What only `predict`, `embed` and `load_videos` need is imported when they are asked for."""
    program = (
        "import sys, everest_hf\n"
        "print([name for name in ('datasets', 'pyarrow', 'matplotlib') if name in sys.modules])\n"
        "print(everest_hf.predict.__module__, everest_hf.embed.__module__, everest_hf.load_videos.__module__)\n"
        "print('datasets' in sys.modules, hasattr(everest_hf, 'nothing'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    cheap, modules, later = done.stdout.splitlines()
    assert modules == "everest_hf.inference.api everest_hf.inference.api everest_hf.data.sources"
    assert later == "True False"
    assert cheap == "[]"
