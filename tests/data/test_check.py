"""The report on a source: what is counted, listed, printed."""

import json
import os
import signal
import time

import pytest
import torch
from datasets import Dataset
from helpers.commands import fork
from helpers.videos import bad_files, real_clips, write_clip, write_list

from everest_hf import cli
from everest_hf.data import Opened, check_readable, load_videos
from everest_hf.data import checking as check
from everest_hf.data.checking import as_text, check_videos, summarize
from everest_hf.video import VideoError, VideoInfo


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A list of good videos of several kinds, and of all kinds of bad ones."""
    folder = tmp_path_factory.mktemp("videos")
    write_clip(folder / "long.mp4", 40, 48, 80)
    write_clip(folder / "short clip.avi", 10, 64, 80, codec="mpeg4", fps=10)
    write_clip(folder / "vp9.webm", 30, 48, 80, codec="libvpx-vp9")
    bad_files(folder)
    rows = [("long.mp4", "run"), ("short clip.avi", "run"), ("vp9.webm", "jump"), ("good.mp4", "run")]
    bad = [("text.mp4", "jump"), ("empty.mp4", "swim"), ("truncated.mp4", "run"), ("missing.mp4", "run")]
    return write_list(folder / "list.txt", rows + bad)


def test_the_report_counts_and_names(source, capsys):
    assert cli.main(["check-data", str(source), "--json", "--clip-frames", "31", "--min-videos", "2"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "8/8" in err
    reasons = {bad["video"]: bad["reason"] for bad in report.pop("unreadable")}
    folder = source.parent
    assert list(reasons) == [str(folder / f"{name}.mp4") for name in ("text", "empty", "truncated", "missing")]
    for name, part in {
        "text": "cannot be decoded",
        "empty": "empty",
        "truncated": "truncated",
        "missing": "no such",
    }.items():
        assert part in reasons[str(folder / f"{name}.mp4")]
    assert report == {
        "videos": 8,
        "readable": 4,
        "codecs": {"h264": 2, "mpeg4": 1, "vp9": 1},
        "sizes": {"80x48": 2, "80x64": 1, "128x96": 1},
        "fps": {"25": 3, "10": 1},
        "prepared": {},
        "seconds": pytest.approx({"min": 1.0, "p5": 1.0, "median": 1.6, "p95": 2.4, "max": 2.4}, abs=0.05),
        "total_seconds": pytest.approx(6.2, abs=0.1),
        "frames": {"min": 10, "p5": 10, "median": 40, "p95": 60, "max": 60},
        "clip_frames": 31,
        "short": [
            {"video": str(folder / "short clip.avi"), "frames": 10},
            {"video": str(folder / "vp9.webm"), "frames": 30},
        ],
        "classes": {"jump": 1, "run": 3, "swim": 0},
        "min_videos": 2,
        "small_classes": {"jump": 1, "swim": 0},
    }


def test_the_text_fits_a_screen_and_names_all_that_is_unreadable(source, capsys):
    assert cli.main(["check-data", str(source), "--min-videos", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 videos, 4 readable, 4 unreadable"
    assert "h264 (2), mpeg4 (1), vp9 (1)" in lines[1]
    text = "\n".join(lines)
    assert "fewer than the 61 frames that a clip spans" in text  # 16 frames, every fourth one
    assert "3, of 0 to 3 readable videos, median 1" in text
    assert "1 classes of fewer than 1 readable videos: swim (0)" in text
    assert sum(line.startswith("unreadable ") for line in lines) == 4
    assert len(lines) < 24


def test_a_source_without_faults_and_labels_ends_with_0(tmp_path, capsys):
    clips = [(str(path),) for path in real_clips().values()]
    source = write_list(tmp_path / "list.txt", clips)
    assert cli.main(["check-data", str(source), "--workers", "2", "--clip-frames", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{len(clips)} videos, {len(clips)} readable, 0 unreadable\n")
    assert "classes" not in out
    assert "unreadable  " not in out


def test_folders_splits_and_integer_labels(tmp_path, capsys):
    for name in ("train/left/a.mp4", "train/right/b.mp4", "val/left/c.mp4"):
        write_clip(tmp_path / "videos" / name, 12)
    assert cli.main(["check-data", str(tmp_path / "videos")]) == 1
    assert "are splits, not classes" in capsys.readouterr().err
    assert cli.main(["check-data", str(tmp_path / "videos"), "--split", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == {"left": 1, "right": 1}
    numbers = write_list(tmp_path / "list.txt", [("videos/val/left/c.mp4", 2)])
    assert cli.main(["check-data", str(numbers), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == {"0": 0, "1": 0, "2": 1}


def test_a_video_on_which_the_decoder_crashes_is_named_and_the_others_are_checked(source, monkeypatch):
    probe = check.probe

    def crash_on_webm(path, **kwargs):
        if path.endswith(".webm"):
            os.kill(os.getpid(), signal.SIGKILL)
        return probe(path, **kwargs)

    monkeypatch.setattr(check, "probe", crash_on_webm)  # in the processes too: they are forked
    rows = load_videos(source, check_files=False)
    found = check_videos(rows, workers=2)
    kinds = [type(result) for result in found]
    assert kinds == [VideoInfo, VideoInfo, VideoError, VideoInfo, *[VideoError] * 4]
    assert str(found[2]) == f"{source.parent}/vp9.webm: the process that worked on it crashed (SIGKILL)"


def test_sound_videos_are_readable_after_torch_has_run_in_the_process(tmp_path):
    """As in a notebook. The threads of torch are not in the processes that are forked from it."""
    for name in "ab":
        write_clip(tmp_path / f"{name}.mp4", 12, 320, 144)  # a width for which frames are put together by torch
    rows = load_videos(tmp_path, labels_required=False)

    def check_after_torch() -> int:
        torch.set_num_threads(2)
        torch.ones(2**22).sum()
        return sum(isinstance(result, VideoError) for result in check_videos(rows, workers=1, time_limit=10))

    process = fork(check_after_torch)
    process.join()
    assert process.exitcode == 0


def test_a_decoder_may_be_given_less_time(source, capsys, monkeypatch):
    probe = check.probe

    def hang_on_webm(path, **kwargs):
        if path.endswith(".webm"):
            time.sleep(600)
        return probe(path, **kwargs)

    monkeypatch.setattr(check, "probe", hang_on_webm)
    assert cli.main(["check-data", str(source), "--json", "--decode-timeout", "3"]) == 1
    unreadable = {bad["video"]: bad["reason"] for bad in json.loads(capsys.readouterr().out)["unreadable"]}
    assert unreadable.pop(f"{source.parent}/vp9.webm") == "no answer for 3 s"
    assert len(unreadable) == 4


def test_all_three_frames_are_decoded(source, monkeypatch):
    """A video of which only the beginning decodes is not readable."""
    read = check.read_frames

    def fail_behind_the_middle(path, indices, **kwargs):
        if max(indices) == 39:
            raise VideoError(path, f"cannot decode {indices}")
        return read(path, indices, **kwargs)

    monkeypatch.setattr(check, "read_frames", fail_behind_the_middle)
    found = check_videos(load_videos(source, check_files=False))
    assert str(found[0]).endswith("long.mp4: cannot decode [20, 39]")
    assert isinstance(found[1], VideoInfo)


def test_data_sets_are_checked_by_row(tmp_path, capsys):
    content = write_clip(tmp_path / "a.mp4", 12).read_bytes()
    rows = {"video": [{"bytes": content, "path": "a.mp4"}, {"bytes": content[:500], "path": None}], "label": [0, 1]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "set.parquet")
    assert cli.main(["check-data", str(tmp_path / "set.parquet"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["readable"] == 1
    assert [bad["video"] for bad in report["unreadable"]] == ["row 1"]


def test_many_kinds_and_culprits_are_shortened():
    infos = [VideoInfo(10 + i, 25.0, 100 + 2 * i, 50, "h264", 1.0 + i) for i in range(20)]
    rows = Dataset.from_dict({"video": [f"{i}.mp4" for i in range(20)], "label": list(range(20))})
    report = summarize(rows, infos, clip_frames=100, min_videos=2)
    assert len(report["sizes"]) == len(report["short"]) == len(report["small_classes"]) == 20
    assert report["frames"] == {"min": 10, "p5": 11, "median": 20, "p95": 28, "max": 29}
    text = as_text(report)
    assert "and 15 others" in text
    assert "20 videos of fewer than the 100 frames that a clip spans: 0.mp4 (10), " in text
    assert "20 classes of fewer than 2 readable videos: 0 (1), " in text
    assert max(map(len, text.splitlines())) < 140


def test_nothing_readable_is_no_crash(tmp_path, capsys):
    source = write_list(tmp_path / "list.txt", [("gone.mp4", "a")])
    assert cli.main(["check-data", str(source)]) == 1
    assert "1 videos, 0 readable, 1 unreadable" in capsys.readouterr().out
    assert cli.main(["check-data", str(tmp_path / "no.txt")]) == 1
    assert capsys.readouterr().err.startswith(f"everest-hf: error: {tmp_path}/no.txt: no such ")


# ---------------------------------------------------------------------- a glance at a run's videos


def test_what_was_opened_is_not_opened_again_until_it_changes(tmp_path):
    """What is in the file is another matter as long as size and time of change are the same."""
    path, memory = write_clip(tmp_path / "a.mp4", 12, 48, 80), tmp_path / "opened.jsonl"
    rows = Dataset.from_dict({"video": [str(path), str(tmp_path / "missing.mp4")]})
    for _ in range(2):
        (error,) = check_readable(rows, opened=Opened(memory))
        assert error.path == str(tmp_path / "missing.mp4")
    (line,) = memory.read_text().splitlines()
    assert json.loads(line)[0] == str(path)
    assert json.loads(line)[-1] == 12
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with memory.open("a") as file:
        file.write("[" + '"half a line')
    assert len(check_readable(rows, opened=Opened(memory))) == 1
    assert len(check_readable(rows, opened=Opened(memory), backend="pyav")) == 2  # which has not opened it
    assert len(check_readable(rows, opened=Opened(memory), max_pixels=3000)) == 2  # nor has a smaller limit
    os.utime(path)
    assert len(check_readable(rows, opened=Opened(memory))) == 2


def test_short_videos_that_were_opened_before_are_named_again(tmp_path, caplog):
    path, memory = write_clip(tmp_path / "a.mp4", 12, 48, 80), tmp_path / "opened.jsonl"
    rows = Dataset.from_dict({"video": [str(path)]})
    for _ in range(2):
        assert check_readable(rows, opened=Opened(memory), frames_needed=13) == []
        assert f"{path} (12): fewer frames than the 13" in caplog.text
        caplog.clear()


def test_a_check_that_takes_long_has_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "PROGRESS_AFTER", 0)
    rows = Dataset.from_dict({"video": [str(write_clip(tmp_path / "a.mp4", 12, 48, 80))] * 2})
    assert check_readable(rows, sample=None) == []
    assert "check:" in capsys.readouterr().err
