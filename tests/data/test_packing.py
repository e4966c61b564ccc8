"""Prepared videos in files of many, and preparing them in parts: whole, resumed, divided, streamed."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.tables import datasets_cache  # noqa: F401  # a fixture
from helpers.videos import bad_files, counting_frames, frame_number, write_list, write_video
from PIL import Image
from torch.utils.data import DataLoader

from everest_hf import cli
from everest_hf.data import StreamedClips, VideoClips, class_names_of, collate, load_videos, stream_videos
from everest_hf.data.packing import pack_videos
from everest_hf.data.prepare import prepare_videos
from everest_hf.video.encoding import Encoding

pytestmark = pytest.mark.usefixtures("datasets_cache")
NAMES = ["jump", "run", "walk"]
IN_RUNS = Encoding(frame_step=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Class folders with 10 videos, of which frame 0 of video i has the number 8 i."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(10):
        write_video(folder / NAMES[i % 3] / f"{i}.mp4", counting_frames(8 * i + 8, 32, 64)[8 * i :], crf=10)
    return folder


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_hold_every_video_once_with_its_class_in_random_order(source, tmp_path):
    done = pack_videos(source, tmp_path / "out", 2, encoding=IN_RUNS, workers=1)
    assert names_below(tmp_path / "out") == [f"part-{i:05d}-of-00002.parquet" for i in range(2)]
    assert (len(done.made), done.kept, done.videos, done.bad) == (2, [], 10, [])
    rows = load_videos(tmp_path / "out")
    assert class_names_of(rows) == NAMES
    clips = VideoClips(rows, torch.nn.Identity(), num_frames=4, frame_step=2)
    found = [[frame_number(f.permute(1, 2, 0)) for f in clips[i]["pixel_values"]] for i in range(10)]
    videos = [numbers[0] // 8 for numbers in found]
    assert sorted(videos) == list(range(10)) != videos
    assert all(number - numbers[0] == 2 * k for numbers in found for k, number in enumerate(numbers))
    assert [row["label"] for row in rows] == [video % 3 for video in videos]


def test_what_is_there_stays_and_what_changed_is_made_again(source, tmp_path):
    shutil.copytree(source, tmp_path / "in")
    pack = [tmp_path / "in", tmp_path / "out", 2]
    first = pack_videos(*pack, workers=1)
    times = {path: path.stat().st_mtime_ns for path in first.made}
    first.made[1].unlink()
    again = pack_videos(*pack, workers=1)
    assert (again.made, len(again.kept)) == ([first.made[1]], 1)
    assert all(path.stat().st_mtime_ns == times[path] for path in again.kept)
    write_video(tmp_path / "in" / "jump" / "0.mp4", counting_frames(20, 32, 64))
    assert len(pack_videos(*pack, workers=1).made) == 1
    assert len(pack_videos(*pack, encoding=IN_RUNS, workers=1).made) == 2


def test_a_folder_of_frames_whose_frame_changed_is_made_again(tmp_path):
    pictures = tmp_path / "in" / "jump" / "a"
    pictures.mkdir(parents=True)
    for i, frame in enumerate(counting_frames(8, 32, 64), 1):
        Image.fromarray(frame).save(pictures / f"{i:05}.png")
    pack = [tmp_path / "in", tmp_path / "out", 1]
    assert len(pack_videos(*pack, fps=25, workers=1).made) == 1
    assert len(pack_videos(*pack, fps=25, workers=1).kept) == 1
    Image.fromarray(counting_frames(20, 32, 64)[-1]).save(pictures / "00001.png")  # in place: the folder is as it was
    assert len(pack_videos(*pack, fps=25, workers=1).made) == 1


def test_the_command_in_parts_gives_what_one_gives_and_names_bad_videos_each_time(source, tmp_path, capsys):
    paths = sorted(source.rglob("*.mp4"))
    bad = bad_files(tmp_path / "bad")["text"]
    listed = write_list(tmp_path / "list.txt", [(path, i % 2) for i, path in enumerate([*paths, bad])])
    command = ["prepare", str(listed), str(tmp_path / "out"), "--shards", "2", "--workers", "1"]
    for part, code in (("1/2", None), ("2/2", None), (None, 1)):
        found = cli.main(command + (["--shard", part] if part else []))
        assert code is None or found == code
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"{tmp_path}/out: 0 files written, 2 there already, with 10 videos; 1 unreadable"
    assert err.count(f"error: {bad}: cannot be decoded") == 2
    whole = pack_videos(listed, tmp_path / "whole", 2, workers=1)
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    assert [path.read_bytes() for path in parts] == [path.read_bytes() for path in whole.made]
    for options, message in {
        ("--shards", "99"): "--shards is 99; it must be at most 11, the videos of ",
        ("--shards", "0"): "--shards is 0; it must be at least 1",
    }.items():
        assert cli.main([*command[:3], *options]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--shard", "3/2"])
    assert "'3/2' is not of the form I/N with I from 1 to N, such as 3/16" in capsys.readouterr().err
    segments = tmp_path / "segments.csv"
    segments.write_text(f"video,start,end\n{paths[0]},0,0.1\n")
    assert cli.main(["prepare", str(segments), str(tmp_path / "out"), "--shards", "1"]) == 1
    assert "has segments of videos; --shards takes whole videos" in capsys.readouterr().err


def test_files_are_streamed(source, tmp_path):
    pack_videos(source, tmp_path / "out", 2, encoding=IN_RUNS, workers=1)
    clips = StreamedClips(
        stream_videos(tmp_path / "out" / "*.parquet"),
        torch.nn.Identity(),
        batch_size=1,
        num_batches=10,
        shuffle_buffer=4,
        num_frames=4,
        frame_step=2,
    )
    batches = list(DataLoader(clips, batch_size=1, num_workers=0, collate_fn=collate))
    found = [(frame_number(b["pixel_values"][0, 0].permute(1, 2, 0)) // 8, int(b["labels"])) for b in batches]
    assert sorted(found) == [(i, i % 3) for i in range(10)]


def test_parts_of_a_list_are_files_and_the_list_comes_last(source, tmp_path):
    paths = sorted(source.rglob("*.mp4"))
    listed = write_list(tmp_path / "list.txt", [(path, path.parent.name) for path in paths])
    parts = [prepare_videos(listed, tmp_path / "out", shard=(i, 2), workers=1) for i in range(2)]
    assert [len(part.made) for part in parts] == [5, 5]
    assert len(names_below(tmp_path / "out")) == 10  # no list yet
    done = prepare_videos(listed, tmp_path / "out", workers=1)
    assert (len(done.made), len(done.kept)) == (0, 10)
    assert done.new_list.read_text() == "".join(f"{p.relative_to(source)} {p.parent.name}\n" for p in paths)
