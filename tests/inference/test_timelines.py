"""The classes of a long video over its time: segments, files, pictures, captions burnt in."""

import csv
import json
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from helpers.models import save_classifier
from helpers.videos import counting_frames, moving_frames, write_list, write_turned, write_video
from PIL import Image

import everest_hf
from everest_hf import cli
from everest_hf.inference import load_checkpoint, timeline
from everest_hf.inference.timelines import edges_of, segments_of, smoothed
from everest_hf.video.overlay import write_overlay
from everest_hf.visualize import draw_timeline
from everest_hf.visualize.timeline import COLUMNS, _columns

LABELS = ["climb", "dive", "jump", "run, fast", "swim"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A classifier whose answers differ from window to window."""
    return save_classifier(tmp_path_factory.mktemp("checkpoint"), LABELS, frame_step=1)


def add_sound(path, source, seconds: float):
    """Write a video with the frames of `source` and a tone as AAC; return the file."""
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        video, sound = out.add_stream_from_template(given.streams.video[0]), out.add_stream("aac", rate=16000)
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                out.mux(packet)
        samples = (0.3 * np.sin(np.arange(int(16000 * seconds)) / 10)).astype(np.float32)[None]
        for start in range(0, samples.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(samples[:, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """4 seconds whose brightness changes in the middle, 25 frames a second, with sound."""
    folder = tmp_path_factory.mktemp("clip")
    frames = moving_frames(100, 48, 80, seed=3).astype(float)
    frames[50:] *= 0.3
    return add_sound(folder / "clip.mp4", write_video(folder / "silent.mp4", frames.astype("uint8")), 4)


# ------------------------------------------------------------------ by hand


def test_windows_stand_for_the_time_around_their_middles():
    assert edges_of([1.0, 2.0, 4.0], 7.0).tolist() == [0, 1.5, 3.0, 7.0]
    assert edges_of([0.5], 0.3).tolist() == [0, 0.3]  # shorter than a window


def test_smoothing_is_a_mean_over_the_windows_that_there_are():
    scores = np.array([[3.0], [6.0], [0.0], [9.0]], np.float32)
    assert smoothed(scores, 3).tolist() == [[4.5], [3], [5], [4.5]]
    assert smoothed(scores, 1).tolist() == scores.tolist()


def test_segments_by_hand():
    """ "a" has 0.5 or more in windows 0 and 1, and in 3; "b" in window 2. Each window is two seconds long."""
    scores = np.array([[0.6, 0.1], [0.5, 0.4], [0.2, 0.7], [0.9, 0.1]], np.float32)
    found = segments_of(scores, np.arange(0, 10, 2), ["a", "b"], 0.5, across_classes=True)
    assert [(s.label, s.start, s.end) for s in found] == [("a", 0, 4), ("b", 4, 6), ("a", 6, 8)]
    assert [s.score for s in found] == pytest.approx([0.55, 0.7, 0.9])


def test_of_overlapping_segments_the_better_one_stays():
    """At 0.4 "b" has windows 0 to 2 and "a" windows 1 to 2: 2/3 of their union. Two labels at a time are no fault."""
    scores = np.array([[0.1, 0.5], [0.5, 0.42], [0.5, 0.42], [0.1, 0.1]], np.float32)
    places = np.arange(5)
    both = segments_of(scores, places, ["a", "b"], 0.4, across_classes=False)
    assert [(s.label, s.start, s.end) for s in both] == [("b", 0, 3), ("a", 1, 3)]
    (one,) = segments_of(scores, places, ["a", "b"], 0.4, across_classes=True)
    assert (one.label, one.start, one.end) == ("a", 1, 3)


# ------------------------------------------------------------------ of a video


@pytest.fixture(scope="module")
def written(checkpoint, clip, tmp_path_factory):
    """The folder with the files of a timeline."""
    folder = tmp_path_factory.mktemp("out")
    outs = [str(folder / "deeper" / f"line.{suffix}") for suffix in ("json", "csv", "srt", "png")]
    arguments = ["predict", str(clip), "--model", checkpoint, "--stride", "5", "--threshold", "0.9", "--top-k", "2"]
    arguments += [part for out in outs for part in ("--timeline", out)]
    assert cli.main([*arguments, "--overlay", str(folder / "deeper" / "over.mp4")]) == 0
    return folder / "deeper"


def test_scores_are_those_of_the_windows(checkpoint, clip, written):
    model, processor = load_checkpoint(checkpoint, "EverestForVideoClassification")
    found = list(everest_hf.windows(model, processor, str(clip), stride=5))
    line = timeline(model, processor, str(clip), stride=5, threshold=0.9)
    assert line.scores.shape == (len(found), 5) == ((100 - 12) // 5 + 1, 5)
    torch.testing.assert_close(torch.tensor(line.scores), torch.stack([w.logits for w in found]).softmax(dim=1))
    assert line.edges[0] == 0
    assert line.duration == 4
    assert all(a < window.center < b for (a, b), window in zip(pairwise(line.edges), found, strict=True))
    assert len({segment.label for segment in line.segments}) > 1
    table = json.loads((written / "line.json").read_text())
    assert [s["label"] for s in table["segments"]] == [s.label for s in line.segments]
    assert len(table["windows"]) == len(found)
    for i, window in enumerate(table["windows"]):
        best = np.argsort(-line.scores[i])[:2]
        assert [label["label"] for label in window["labels"]] == [LABELS[c] for c in best]
        assert [label["score"] for label in window["labels"]] == pytest.approx(line.scores[i, best], abs=1e-4)


def test_files_hold_the_same_segments(written):
    segments = json.loads((written / "line.json").read_text())["segments"]
    rows = list(csv.DictReader((written / "line.csv").open()))
    assert [[row["label"], *(float(row[n]) for n in ("start", "end", "score"))] for row in rows] == [
        list(segment.values()) for segment in segments
    ]
    blocks = (written / "line.srt").read_text().strip().split("\n\n")
    assert len(blocks) == len(segments)
    for i, (block, segment) in enumerate(zip(blocks, segments, strict=True), 1):
        number, times, text = block.split("\n")
        assert number == str(i)
        begins, ends = (float(t[6:].replace(",", ".")) for t in times.split(" --> "))
        assert (begins, ends) == (segment["start"], segment["end"])
        assert text.startswith(segment["label"] + " 0.")
    with Image.open(written / "line.png") as picture:
        assert picture.width > 1000


def test_smoothing_is_in_seconds(checkpoint, clip):
    """Windows are 0.2 s apart: 0.6 s are three of them."""
    model, processor = load_checkpoint(checkpoint, "EverestForVideoClassification")
    plain = timeline(model, processor, str(clip), stride=5)
    smooth = timeline(model, processor, str(clip), stride=5, smooth=0.6)
    np.testing.assert_allclose(smooth.scores, smoothed(plain.scores, 3))


def packets_of(path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(**{kind: 0}) if packet.size]


def test_captions_are_burnt_in_while_their_segments_last(clip, written):
    segments = json.loads((written / "line.json").read_text())["segments"]
    with av.open(str(clip)) as given, av.open(str(written / "over.mp4")) as made:
        pairs = list(zip(given.decode(video=0), made.decode(video=0), strict=True))
    assert len(pairs) == 100
    shown = []
    for before, after in pairs:
        assert before.time == pytest.approx(after.time, abs=1e-6)
        old, new = (frame.to_ndarray(format="gray").astype(int) for frame in (before, after))
        assert np.abs(old - new)[:24].mean() < 6  # above captions only the encoding differs
        covered = any(s["start"] <= before.time < s["end"] for s in segments)
        changed = np.abs(old - new)[-12:, :40].mean() > 15
        shown.append((covered, changed))
    assert all(covered == changed for covered, changed in shown)
    assert {covered for covered, _ in shown} == {True, False}


def test_sound_is_copied(clip, written):
    assert packets_of(written / "over.mp4", "audio") == packets_of(clip, "audio") != []
    with av.open(str(written / "over.mp4")) as made:
        assert [stream.type for stream in made.streams] == ["video", "audio"]
        assert made.streams.video[0].average_rate == 25


def test_a_video_that_is_turned_stays_upright_and_has_no_sound(checkpoint, tmp_path):
    turn = (0, 1, -1, 0)
    path = write_turned(tmp_path / "turned.mp4", counting_frames(30, 32, 64), turn)
    out = tmp_path / "over.mkv"
    assert cli.main(["predict", str(path), "--model", checkpoint, "--overlay", str(out)]) == 0
    with av.open(str(out)) as made:
        assert (made.streams.video[0].width, made.streams.video[0].height) == (32, 64)
        assert not made.streams.audio
        assert sum(1 for _ in made.decode(video=0)) == 30


def test_frames_without_times_of_their_own_follow_each_other(tmp_path):
    """In .avi with B-frames, packets have no times of showing, so that a decoder cannot tell those of all frames."""
    path = write_video(tmp_path / "clip.avi", moving_frames(30, 48, 80), bf=2)
    write_overlay(str(path), "clip.avi", tmp_path / "over.mp4", lambda seconds: f"{seconds:.2f}")
    with av.open(str(tmp_path / "over.mp4")) as made:
        times = [frame.time for frame in made.decode(video=0)]
    assert np.diff(times) == pytest.approx(np.full(29, 1 / 25), abs=1e-3)


# ------------------------------------------------------------------ pictures


def test_a_short_peak_is_seen_in_a_long_video(tmp_path):
    """10,800 windows of a second, of which one has the class: it is in its column of the picture."""
    scores = np.zeros((10_800, 1), np.float32)
    scores[4321] = 0.9
    columns = _columns(np.arange(10_801.0), scores)
    assert columns.shape == (COLUMNS, 1)
    assert np.flatnonzero(columns).tolist() == [4321 * COLUMNS // 10_800]


@pytest.mark.parametrize("seconds", [0.4, 3, 59, 600, 10_800, 200_000])
def test_pictures_of_any_length(tmp_path, seconds):
    scores = np.random.default_rng(0).random((7, 30)).astype(np.float32)
    draw_timeline([f"class {i}" for i in range(30)], np.linspace(0, seconds, 8), scores, [], tmp_path / "line.png")
    with Image.open(tmp_path / "line.png") as picture:
        assert picture.height < 1200


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--timeline", "line.doc"],
            "line.doc: cannot tell the format; expected a name ending in .json, .csv, .srt, .png",
        ),
        (["--overlay", "over.avi"], "over.avi: not a video; expected a name ending in .mp4 or .mkv"),
        (["--timeline", "line.csv", "--csv", "table.csv"], "--csv is not for --timeline and --overlay"),
        (["--overlay", "over.mp4", "--workers", "2"], "--workers is not for --timeline and --overlay"),
        (["--smooth", "1"], "--smooth is only for --timeline and --overlay"),
        (["other.mp4", "--timeline", "line.csv"], "2 videos; --timeline and --overlay take one video at a time"),
        (["--timeline", "line.csv", "--threshold", "1"], "threshold is 1; it must be above 0 and below 1"),
        (["--timeline", "line.csv", "--smooth", "-1"], "smooth is -1; it must be 0 seconds or more"),
        (["--timeline", "line.csv", "--stride", "0"], "--stride is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_asked_for(checkpoint, clip, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", str(clip), *arguments, "--model", checkpoint]) == 1
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_video_itself_is_not_overwritten(checkpoint, clip, capsys):
    before = clip.read_bytes()
    assert cli.main(["predict", str(clip), "--model", checkpoint, "--overlay", str(clip)]) == 1
    assert "clip.mp4: is the video itself; choose another file" in capsys.readouterr().err
    assert clip.read_bytes() == before


def test_sound_that_has_no_place_is_named(checkpoint, clip, tmp_path, capsys):
    with av.open(str(clip)) as given, av.open(str(tmp_path / "tta.mkv"), "w") as out:
        video, sound = out.add_stream_from_template(given.streams.video[0]), out.add_stream("tta", rate=16000)
        sound.layout = "mono"
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                out.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        out.mux(sound.encode(frame))
        out.mux(sound.encode())
    arguments = ["predict", str(tmp_path / "tta.mkv"), "--model", checkpoint, "--overlay"]
    assert cli.main([*arguments, str(tmp_path / "over.mp4")]) == 1
    assert "has sound (tta) for which .mp4 has no place; a name ending in .mkv may have" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"tta.mkv"}
    assert cli.main([*arguments, str(tmp_path / "over.mkv")]) == 0


def test_a_list_is_evaluated(checkpoint, clip, tmp_path, capsys):
    rows = ["video,label,start,end", f"{clip},climb,0,2", f"{clip},dive,2,4"]
    (tmp_path / "val.csv").write_text("\n".join(rows) + "\n")
    arguments = ["--model", checkpoint, "--stride", "5", "--threshold", "0.3"]
    assert (
        cli.main(["eval-timeline", str(tmp_path / "val.csv"), *arguments, "--csv", str(tmp_path / "found.csv")]) == 0
    )
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["map_0.3", "map_0.4", "map_0.5", "map_0.6", "map_0.7", "map"]
    found = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert {row["video"] for row in found} == {str(clip)}
    write_list(tmp_path / "list.txt", [(clip, "climb")])
    assert cli.main(["eval-timeline", str(tmp_path / "list.txt"), *arguments]) == 1
    assert "list.txt: each row must be a segment in seconds" in capsys.readouterr().err
