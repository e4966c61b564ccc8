"""Videos made ready for training: what is in the files, what is kept, refused, interrupted."""

import multiprocessing
import os
import resource
import signal
import struct
import time
from pathlib import Path

import av
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from helpers.commands import fork
from helpers.videos import (
    bad_files,
    counting_frames,
    frame_number,
    real_clips,
    write_class_folders,
    write_clip,
    write_list,
)
from helpers.videos import write_video as write

from everest_hf import cli
from everest_hf.data import class_names_of, load_videos
from everest_hf.data import prepare as module
from everest_hf.data.prepare import Encoding, measure_gain, prepare_videos
from everest_hf.data.sampling import Sampling
from everest_hf.video import probe, read_frames

PATIENCE = 60


def names_below(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def shown(path) -> np.ndarray:
    """First frame of a file (H, W, 3) as its pixels are stored."""
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


# ------------------------------------------------------------------------------------------------------ what is written


def test_frames_are_those_of_the_source_scaled_in_short_groups(tmp_path):
    source = write(tmp_path / "in" / "count.avi", counting_frames(100, 300, 512), codec="mpeg4", fps=30)
    done = prepare_videos(tmp_path / "in", tmp_path / "out", encoding=Encoding(short_side=128, gop=7))
    target = tmp_path / "out" / "count.avi.mp4"
    assert (done.made, done.kept, done.bad, done.new_list) == ([(0, target)], [], [], None)
    assert names_below(tmp_path / "out") == ["count.avi.mp4"]
    info = probe(target)
    assert (info.num_frames, info.fps, info.height, info.width, info.codec) == (100, 30, 128, 218, "h264")
    frames = read_frames(target, range(100))[:, :, :216]
    assert [frame_number(frame) for frame in frames] == list(range(100))
    with av.open(str(target)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        key_frames = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert np.diff([*key_frames, 100]).max() == 7
    assert done.pairs(5) == [(str(source), target)]


def test_sizes_are_even_and_never_enlarged():
    encoding = Encoding(short_side=256)
    sizes = {(720, 1280): (256, 456), (1280, 720): (456, 256), (240, 320): (240, 320), (101, 75): (100, 74)}
    assert {size: encoding.size(*size) for size in sizes} == sizes
    assert Encoding(short_side=16).size(17, 4000) == (16, 3764)


def with_sound(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16000)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for frame in counting_frames(30, 64, 64):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for _ in range(20):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux(sound.encode(samples))
        container.mux(video.encode())
        container.mux(sound.encode())
    return path


def test_a_file_of_sound_alone_is_unreadable(tmp_path):
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in" / "a.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    (error,) = prepare_videos(tmp_path / "in", tmp_path / "out").bad
    assert (
        str(error)
        == f"{tmp_path}/in/a.mp4: cannot be decoded: not a video: it has no stream of pictures, or one of an unknown kind"
    )


def test_sound_is_left_out(tmp_path):
    source = with_sound(tmp_path / "in" / "a.mp4")
    with av.open(str(source)) as container:
        assert len(container.streams.audio) == 1
    prepare_videos(tmp_path / "in", tmp_path / "out")
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
    assert [frame_number(f) for f in read_frames(tmp_path / "out" / "a.mp4", range(30))] == list(range(30))


# The matrix of a track's header that tells a player to turn frames clockwise by so many degrees.
MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def turned(source: Path, path: Path, degrees: int) -> Path:
    """Copy a video, with a header that says that it is to be shown turned clockwise."""
    content = bytearray(source.read_bytes())
    header = content.index(b"tkhd") + 4
    matrix = header + (52 if content[header] else 40)
    a, b, c, d = (value << 16 for value in MATRICES[degrees])
    content[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("degrees", MATRICES)
def test_turned_videos_are_written_upright(tmp_path, degrees):
    frames = np.zeros((5, 80, 112, 3), np.uint8)
    frames[:, :40, :56], frames[:, :40, 56:], frames[:, 40:, :56] = (240, 0, 0), (0, 240, 0), (0, 0, 240)
    source = write(tmp_path / "flat.mp4", frames, crf=5)
    (tmp_path / "in").mkdir()
    turned(source, tmp_path / "in" / "a.mp4", degrees)
    prepare_videos(tmp_path / "in", tmp_path / "out", encoding=Encoding(crf=5))
    target = tmp_path / "out" / "a.mp4"
    expected = np.rot90(frames[0], -degrees // 90)
    assert np.abs(shown(target).astype(int) - expected)[8:-8, 8:-8].mean() < 6
    with av.open(str(target)) as container:
        assert next(container.decode(video=0)).rotation == 0


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("libx264", "yuvj420p", ".mp4"),
        ("libx264", "yuv444p", ".mkv"),
        ("libx264", "yuv420p10le", ".mov"),
        ("mjpeg", "yuvj422p", ".avi"),
        ("libx264rgb", "rgb24", ".mp4"),
        ("libvpx-vp9", "yuv420p", ".webm"),
    ],
)
def test_colours_stay(tmp_path, codec, pix_fmt, suffix):
    frames = np.zeros((3, 120, 160, 3), np.uint8) + np.uint8([210, 60, 30])
    frames[:, 60:] = (20, 90, 230)
    source = write(tmp_path / "in" / f"a{suffix}", frames, codec=codec, pix_fmt=pix_fmt)
    prepare_videos(tmp_path / "in", tmp_path / "out", encoding=Encoding(short_side=60, crf=5))
    (target,) = (tmp_path / "out").iterdir()
    before, after = shown(source).astype(int), read_frames(target, [0])[0].numpy().astype(int)
    for part in (0.25, 0.75):
        places = [int(part * len(frame)) for frame in (before, after)]
        assert np.abs(before[places[0]].mean(0) - after[places[1]].mean(0)).max() < 4


# ---------------------------------------------------------------------------------------------------------- structure


def test_class_folders_and_splits_stay(tmp_path, capsys):
    for split in ("train", "val"):
        write_class_folders(tmp_path / "in" / split, videos_per_class=2)
    (tmp_path / "in" / "train" / ".hidden.mp4").write_bytes(b"no")
    write_clip(tmp_path / "in" / "train" / "left" / "left_0.mkv")  # its name as .mp4 is taken
    assert cli.main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--short-side", "32"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/out: 9 videos written, 0 there already, 0 unreadable\n" in out
    assert "random clips of 16 frames, step 4, in one process: " in out
    expected = [name + (".mp4" if name.endswith(".mkv") else "") for name in names_below(tmp_path / "in")]
    assert names_below(tmp_path / "out") == [name for name in expected if "hidden" not in name]
    rows = load_videos(tmp_path / "out", split="train")
    assert (class_names_of(rows), len(rows)) == (["left", "right"], 5)
    assert cli.main(["prepare", str(tmp_path / "in"), str(tmp_path / "one"), "--split", "val"]) == 0
    assert names_below(tmp_path / "one") == [name for name in names_below(tmp_path / "out") if name.startswith("val")]


def test_the_list_has_the_labels_and_the_videos_that_could_be_read(tmp_path, capsys):
    videos = tmp_path / "videos"
    write_clip(videos / "far" / "a clip.avi", codec="mpeg4")
    write_clip(videos / "far" / "a clip.mp4", seed=1)
    bad = bad_files(videos)
    source = write_list(
        tmp_path / "lists" / "train.txt",
        [
            ("far/a clip.avi", "jump"),
            ("text.mp4", "run"),
            ("far/a clip.mp4", "run"),
            ("missing.mp4", "run"),
            ("far/a clip.avi", "jump"),
            ("truncated.mp4", "walk"),
        ],
    )
    command = ["prepare", str(source), str(tmp_path / "out"), "--data-root", str(videos)]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert "2 videos written, 0 there already, 3 unreadable" in out
    for name in ("text", "missing", "truncated"):
        assert f"everest-hf: error: {bad[name]}: " in err
    new = tmp_path / "out" / "train.txt"
    assert f"list: {new}\n" in out
    assert new.read_text() == "far/a clip.avi.mp4 jump\nfar/a clip.mp4 run\nfar/a clip.avi.mp4 jump\n"
    assert names_below(tmp_path / "out") == ["far/a clip.avi.mp4", "far/a clip.mp4", "train.txt"]
    assert len(load_videos(new)) == 3


def test_a_list_without_labels_and_with_videos_elsewhere(tmp_path):
    paths = [write_clip(tmp_path / "disk" / part / "same.mp4", seed=i) for i, part in enumerate("ab")]
    source = write_list(tmp_path / "lists" / "all.txt", [(path,) for path in paths])
    done = prepare_videos(source, tmp_path / "out")
    assert done.new_list.read_text() == "a/same.mp4\nb/same.mp4\n"
    assert load_videos(done.new_list, labels_required=False).column_names == ["video"]


def test_a_data_set_becomes_class_folders(tmp_path):
    contents = [write_clip(tmp_path / f"{i}.avi", 12 + i, codec="mpeg4").read_bytes() for i in range(3)]
    rows = {"video": [{"bytes": content, "path": "same.avi"} for content in contents], "label": [1, 0, 1]}
    features = Features(
        video={"bytes": Value("binary"), "path": Value("string")}, label=ClassLabel(names=["put up", "take / drop"])
    )
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set.parquet")
    done = prepare_videos(tmp_path / "set.parquet", tmp_path / "out")
    expected = ["put up/00000001.mp4", "take _ drop/00000000.mp4", "take _ drop/00000002.mp4"]
    assert names_below(tmp_path / "out") == expected
    assert [probe(tmp_path / "out" / name).num_frames for name in expected] == [13, 12, 14]
    assert len(prepare_videos(tmp_path / "set.parquet", tmp_path / "out").kept) == 3
    assert measure_gain(done.pairs(2), Sampling(4, 2))[0] > 0


# ------------------------------------------------------------------------------------------------------------- refused


def test_folders_that_are_links_are_prepared(tmp_path):
    write_clip(tmp_path / "elsewhere" / "a.mp4")
    (tmp_path / "in" / "own").mkdir(parents=True)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "own" / "back").symlink_to(tmp_path / "in")
    prepare_videos(tmp_path / "in", tmp_path / "out")
    assert names_below(tmp_path / "out") == ["linked/a.mp4"]


def test_several_labels_a_video_are_not_lost(tmp_path):
    write_clip(tmp_path / "a.mp4")
    source = write_list(tmp_path / "list.txt", [("a.mp4", "high,low")])
    assert prepare_videos(source, tmp_path / "out").new_list.read_text() == "a.mp4 high,low\n"
    for label in (List(ClassLabel(names=["high", "low"])), LargeList(Value("int64"))):  # the second is polars'
        features = Features(video=Value("string"), label=label)
        rows = Dataset.from_dict({"video": ["a.mp4"], "label": [[0, 1]]}, features=features)
        rows.to_parquet(tmp_path / "set.parquet")
        with pytest.raises(ValueError, match=r"set.parquet: has several labels a video, .* 'path a,b'"):
            prepare_videos(tmp_path / "set.parquet", tmp_path / "out")


@pytest.mark.parametrize("name", ["..", ".", "", "../..", ".hidden", "a\0b", "x" * 256, "é" * 128])
def test_classes_that_no_folder_can_be_named_after_are_refused(tmp_path, capsys, name):
    content = write_clip(tmp_path / "a.mp4").read_bytes()
    rows = {"video": [content, content], "label": ["run", name]}
    features = Features(video=Value("binary"), label=Value("string"))
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "in" / "set.parquet")
    source, out = tmp_path / "in" / "set.parquet", tmp_path / "far" / "out"
    assert cli.main(["prepare", str(source), str(out), "--video-column", "video"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"everest-hf: error: {source}: the class {name[:40]!r} cannot be the name of a folder")
    assert names_below(tmp_path) == ["a.mp4", "in/set.parquet"]


def test_classes_that_would_share_a_folder_and_names_that_grow_too_long_are_refused(tmp_path):
    content = write_clip(tmp_path / "a.mp4").read_bytes()
    rows = {"video": [{"bytes": content, "path": "a.mp4"}] * 2, "label": ["on/off", "on_off"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match=r"the classes 'on/off' and 'on_off' would share the folder 'on_off'; rename"):
        prepare_videos(tmp_path / "set.parquet", tmp_path / "out")
    long = write_clip(tmp_path / "in" / f"{'a' * 249}.avi", codec="mpeg4")
    write_clip(tmp_path / "in" / f"{'a' * 251}.mp4")  # which stays as it is
    with pytest.raises(ValueError, match=f"^{long}: is too long a name: with .mp4 after it"):
        prepare_videos(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    long.unlink()
    assert len(prepare_videos(tmp_path / "in", tmp_path / "out").made) == 1


def test_what_would_harm_the_sources_is_refused(tmp_path, capsys):
    write_class_folders(tmp_path / "in")
    before = {name: (tmp_path / "in" / name).read_bytes() for name in names_below(tmp_path / "in")}
    (tmp_path / "link").symlink_to(tmp_path / "in")
    source = write_list(tmp_path / "in" / "list.txt", [(name, 0) for name in before])
    write_clip(tmp_path / "up" / "up" / "a.mp4")
    write_clip(tmp_path / "up" / "a.mp4")
    for command, reason in {
        (tmp_path / "in", tmp_path / "in"): "the folder of the sources",
        (tmp_path / "in", tmp_path / "in" / "left" / "out"): "the folder of the sources",
        (tmp_path / "in", tmp_path / "link" / "out"): "the folder of the sources",
        (source, tmp_path / "link"): "which would be overwritten",
        (tmp_path / "up", tmp_path): "is a source, and would be overwritten",
    }.items():
        assert cli.main(["prepare", *map(str, command)]) == 1
        assert reason in capsys.readouterr().err
    assert {name: (tmp_path / "in" / name).read_bytes() for name in before} == before
    write_clip(tmp_path / "two" / "a.avi", codec="mpeg4")
    write_clip(tmp_path / "two" / "a.avi.mp4")
    assert cli.main(["prepare", str(tmp_path / "two"), str(tmp_path / "out")]) == 1
    assert f"{tmp_path}/out/a.avi.mp4: would be made of both " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_values_and_sources_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    video = write_clip(tmp_path / "in" / "a.mp4")
    for arguments, reason in {
        (tmp_path / "gone",): f"{tmp_path}/gone: no such",
        (tmp_path / "empty",): f"{tmp_path}/empty: no video in it",
        (video,): f"{video}: a video, not a list",
        (tmp_path / "in", "--short-side", "8"): "short_side is 8; it must be 16 to 4096",
        (tmp_path / "in", "--gop", "0"): "gop is 0; it must be 1 to 1000",
        (tmp_path / "in", "--crf", "60"): "crf is 60; it must be 0 to 51",
        (tmp_path / "in", "--workers", "0"): "--workers is 0; it must be at least 1",
    }.items():
        source, *options = map(str, arguments)
        assert cli.main(["prepare", source, str(tmp_path / "out"), *options]) == 1
        assert capsys.readouterr().err.startswith(f"everest-hf: error: {reason}")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- interrupted


def test_a_decoder_that_hangs_costs_its_video(tmp_path, capsys, monkeypatch):
    for name in "ab":
        write_clip(tmp_path / "in" / f"{name}.mp4", 12)
    frames = module.even_frames

    def hang_on_a(source, name, max_pixels):
        if name.endswith("a.mp4"):
            time.sleep(600)
        return frames(source, name, max_pixels)

    monkeypatch.setattr(module, "even_frames", hang_on_a)  # in the processes too: they are forked
    assert cli.main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--decode-timeout", "3"]) == 1
    assert f"error: {tmp_path}/in/a.mp4: no answer for 3 s\n" in capsys.readouterr().err
    assert names_below(tmp_path / "out") == ["b.mp4"]


def start(*arguments, limit: int | None = None) -> multiprocessing.Process:
    """Run the command in a process of its own, which can write files of `limit` bytes at most."""

    def run() -> int:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return cli.main([str(argument) for argument in arguments])

    return fork(run)


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A list of clips that take a while."""
    folder = tmp_path_factory.mktemp("sources")
    first = write_clip(folder / "0.mp4", 40, 360, 480)
    for i in range(1, 12):
        (folder / f"{i}.mp4").write_bytes(first.read_bytes())
    return write_list(folder / "list.txt", [(f"{i}.mp4", f"class_{i % 3}") for i in range(12)])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on(source, tmp_path, capfd, how):
    out = tmp_path / "out"
    process = start("prepare", source, out, "--workers", 2)
    wait_until(lambda: len(list(out.glob("*.mp4"))) >= 2)
    os.kill(process.pid, how)
    process.join(PATIENCE)
    assert process.exitcode == (-signal.SIGKILL if how is signal.SIGKILL else 130)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert len(finished) < 12
    assert [probe(path).num_frames for path in finished] == [40] * len(finished)  # what has its name is whole
    assert not (out / "list.txt").exists()
    if how is signal.SIGINT:
        assert capfd.readouterr().err.endswith("everest-hf: error: interrupted\n")
        assert names_below(out) == sorted(path.name for path in finished)
    done = prepare_videos(source, out)
    assert {path for _, path in done.kept} >= set(finished)
    assert len(done.made) + len(done.kept) == 12
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert names_below(out) == sorted(["list.txt", *(f"{i}.mp4" for i in range(12))])
    assert done.new_list.read_text() == source.read_text()


def test_two_into_one_folder_at_once(source, tmp_path, capfd):
    out = tmp_path / "out"
    first = start("prepare", source, out, "--workers", 1)
    wait_until(lambda: len(list(out.glob("*.mp4"))) >= 1)
    assert cli.main(["prepare", str(source), str(out)]) == 1
    assert f"error: {out} is in use by process {first.pid} on " in capfd.readouterr().err
    first.kill()
    first.join(PATIENCE)
    assert cli.main(["prepare", str(source), str(out)]) == 0


def test_what_was_made_of_another_file_or_in_another_way_is_made_anew(tmp_path):
    for name in "abc":
        write_clip(tmp_path / "in" / f"{name}.mp4", 12)
    folders = tmp_path / "in", tmp_path / "out"
    assert len(prepare_videos(*folders).made) == 3
    write_clip(tmp_path / "in" / "b.mp4", 15)
    (tmp_path / "out" / "c.mp4").write_bytes(b"something else")
    again = prepare_videos(*folders)
    assert [path.name for _, path in again.made] == ["b.mp4", "c.mp4"]
    assert [path.name for _, path in again.kept] == ["a.mp4"]
    assert probe(tmp_path / "out" / "b.mp4").num_frames == 15
    assert len(prepare_videos(*folders, encoding=Encoding(crf=30)).made) == 3


def test_a_file_that_cannot_be_written_ends_the_run_and_leaves_none(source, tmp_path, capfd):
    """A limit on the size of files stands for the full disk: both make writing fail in the middle of a file."""
    out = tmp_path / "out"
    process = start("prepare", source, out, "--crf", 10, limit=4000)
    process.join(PATIENCE)
    assert process.exitcode == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"everest-hf: error: {out}/")
    assert error.endswith(".mp4: File too large")
    assert names_below(out) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["prepare", str(source), str(blocked / "out")]) == 1
    assert f"error: {blocked}" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------------- gain


def test_real_clips_are_faster_and_what_cannot_be_read_has_no_gain(tmp_path):
    (tmp_path / "in").mkdir()
    clip = real_clips()["bikes.mp4"]
    (tmp_path / "in" / "a.mp4").symlink_to(clip)
    done = prepare_videos(tmp_path / "in", tmp_path / "out", encoding=Encoding(short_side=64))
    assert probe(tmp_path / "out" / "a.mp4").num_frames == probe(clip).num_frames
    before, after = measure_gain(done.pairs(1), Sampling(16, 4))
    assert before > 0
    assert after > 0
    assert measure_gain([(str(bad_files(tmp_path)["text"]), Path("x"))], Sampling(4)) is None
