"""Segments: a row is a part of its video, in training, evaluation, check-data, predict, embed and prepare."""

import json
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers.tiny import tiny_config
from helpers.videos import counting_frames, frame_number, write_video

from everest_hf import EverestForVideoClassification, EverestVideoProcessor, cli, inference
from everest_hf.data import VideoClips, VideoViews, check_readable, identity_of, load_videos, stream_videos
from everest_hf.data.sampling import Sampling
from everest_hf.evaluation.report import write_predictions
from everest_hf.video import Segment, VideoError, open_video, probe, read_frames

SIZE = (32, 64)
FRAMES = 100  # at 25 frames a second: 4 seconds


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A video of which each frame shows its number."""
    return write_video(tmp_path_factory.mktemp("video") / "count.mp4", counting_frames(FRAMES), crf=10, g=10)


def numbers(clip: torch.Tensor) -> list[int]:
    """The numbers that the frames of a clip (T, C, H, W) show."""
    return [frame_number(frame) for frame in clip.permute(0, 2, 3, 1)]


def listed(tmp_path, video, *lines, header="video,start,end,label"):
    path = tmp_path / "list.csv"
    path.write_text("\n".join([header, *(f"{video},{line}" for line in lines)]))
    return path


# ---------------------------------------------------------------------- of one video


@pytest.mark.parametrize(
    ("segment", "frames"),
    [
        (Segment(1, 2), range(25, 50)),
        (Segment(0.04, 0.08), range(1, 2)),
        (Segment(0, 4), range(100)),
        (Segment(3.8, 4.9), range(95, 100)),  # annotations are rounded
        (Segment(1, 2, in_frames=True), range(1, 2)),
        (Segment(90, 100, in_frames=True), range(90, 100)),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_a_segment_is_a_video_of_its_own(video, tmp_path, segment, frames, suffix):
    path = video
    if suffix != "mp4":
        codec = {"codec": "mpeg4"} if suffix == "avi" else {}
        path = write_video(tmp_path / f"count.{suffix}", counting_frames(FRAMES), g=10, **codec)
    opened = open_video(path, segment=segment)
    assert opened.frames == frames
    assert opened.num_frames == len(frames)
    shown = opened.read([0, len(frames) - 1, 0])
    assert [frame_number(frame) for frame in shown] == [frames[0], frames[-1], frames[0]]
    with pytest.raises(VideoError, match=r"it has frames 0 to"):
        opened.read([len(frames)])
    info = probe(path, segment=segment)
    assert (info.num_frames, info.duration) == (len(frames), pytest.approx(len(frames) / 25))


def test_times_are_those_of_the_container(tmp_path):
    """At a variable rate, seconds are no multiples of frames: ten frames in the first second, forty in the next two."""
    times = [10 * i for i in range(10)] + [100 + 5 * i for i in range(40)]
    path = write_video(tmp_path / "a.mp4", counting_frames(50), times=times)
    assert open_video(path, segment=Segment(0, 1)).frames == range(10)
    assert open_video(path, segment=Segment(1, 2)).frames == range(10, 30)
    assert [frame_number(f) for f in read_frames(path, [0], segment=Segment(2.5, 2.6))] == [40]


@pytest.mark.parametrize(
    ("segment", "reason"),
    [
        (Segment(4, 4.5), "the segment 4 to 4.5 s is not in the video, which has 4 s"),
        (Segment(3, 5.1), "the segment 3 to 5.1 s is not in the video, which has 4 s"),
        (Segment(1.01, 1.02), "the segment 1.01 to 1.02 s holds no frame; make it longer"),
        (Segment(90, 101, True, "l.csv:7"), "l.csv:7: the segment 90 to 101 (frames) is not in the video, which has 100 frames"),
    ],
)  # fmt: skip
def test_a_segment_that_is_not_in_the_video(video, segment, reason):
    with pytest.raises(VideoError) as caught:
        open_video(video, segment=segment)
    assert str(caught.value) == f"{video}: {reason}"


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("header", ["video,start,end,label", "video,start_frame,end_frame,label"])
def test_training_and_evaluation_see_the_segment_alone(video, tmp_path, header):
    parts = ("1,2,a", "3,4,b", ",,a") if "frame" not in header else ("25,50,a", "75,100,b", ",,a")
    rows = load_videos(listed(tmp_path, video, *parts, header=header))
    spans = [range(25, 50), range(75, 100), range(100)]
    clips = VideoClips(rows, torch.nn.Identity(), num_frames=4, frame_step=5)
    views = VideoViews(rows, SIZE, num_frames=4, frame_step=5, num_segments=3)
    for row, span in enumerate(spans):
        starts = set()
        for epoch in range(30):
            clips.set_epoch(epoch)
            shown = numbers(clips[row]["pixel_values"])
            assert {b - a for a, b in pairwise(shown)} == {5}
            assert span[0] <= shown[0]
            assert shown[-1] <= span[-1]
            starts.add(shown[0])
        assert len(starts) > 5
        first, middle, last = (numbers(view) for view in views[row]["pixel_values"])
        assert first[0] == span[0]
        assert last[-1] == span[-1]
        assert middle[0] == span[0] + round((len(span) - 16) / 2)


def test_a_short_segment_repeats_its_last_frame(video, tmp_path, caplog):
    rows = load_videos(listed(tmp_path, video, "1,1.12,a", "0,4,b"))
    view = VideoViews(rows, SIZE, num_frames=4, frame_step=2)[0]["pixel_values"][0]
    assert numbers(view) == [25, 27, 27, 27]
    assert check_readable(rows, frames_needed=Sampling(4, 2).span) == []
    assert f"{video} (3): fewer frames than the 7 that a clip spans" in caplog.text


def test_rows_of_data_sets_have_segments(video, tmp_path):
    columns = {"video": [str(video)] * 2, "start": [1, 3], "end": [2.0, 4.0], "label": ["a", "b"]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "set.parquet")
    rows = load_videos(tmp_path / "set.parquet")
    assert numbers(VideoViews(rows, SIZE, num_frames=25)[1]["pixel_values"][0]) == list(range(75, 100))
    again = load_videos(rows)
    assert again["start"][:] == [1.0, 3.0]
    (tmp_path / "list.json").write_text(json.dumps([{"video": str(video), "start_frame": 5, "end_frame": 9}]))
    rows = load_videos(tmp_path / "list.json", labels_required=False)
    assert rows[0] == {"video": str(video), "start_frame": 5, "end_frame": 9, "where": f"{tmp_path}/list.json:1"}


def test_streams_have_segments(video, tmp_path):
    columns = {"video": [str(video)] * 2, "start_frame": [10, None], "end_frame": [20, None]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "set.parquet")
    found = list(stream_videos(tmp_path / "set.parquet", labels_required=False))
    assert [(row["start_frame"], row["end_frame"]) for row in found] == [(10, 20), (None, None)]
    Dataset.from_dict({"video": ["a.mp4"], "start": [2], "end": [1]}).to_parquet(tmp_path / "wrong.parquet")
    with pytest.raises(VideoError, match=r"wrong\.parquet: \S+a\.mp4: end is 1; it must be more than start, 2"):
        list(stream_videos(tmp_path / "wrong.parquet", labels_required=False))


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("video,start,end,label", "2,1,a", r"list\.csv:2: end is 1; it must be more than start, 2"),
        ("video,start,end,label", "1,1,a", r"list\.csv:2: end is 1; it must be more than start, 1"),
        ("video,start,end,label", "-1,1,a", r"list\.csv:2: start is '-1'; it must be a number of seconds from 0"),
        ("video,start,end,label", "0:01,1,a", r"list\.csv:2: start is '0:01'; it must be a number of seconds"),
        ("video,start,end,label", "1,,a", r"list\.csv:2: end is None; it must be a number of seconds"),
        ("video,start_frame,end_frame,label", "1.5,3,a", r"list\.csv:2: start_frame is '1\.5'; it must be a whole number"),
        ("video,start,label", "1,a", r"list\.csv: has of a segment's columns start; it must have start and end"),
        ("video,start,end_frame,label", "1,2,a", r"list\.csv: has of a segment's columns start, end_frame; it must"),
    ],
)  # fmt: skip
def test_impossible_segments_are_refused_before_a_video_is_opened(video, tmp_path, header, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_videos(listed(tmp_path, video, line, header=header))
    assert len(str(caught.value).splitlines()) == 1


def test_segments_are_part_of_what_a_set_is(video, tmp_path):
    one, other = (load_videos(listed(tmp_path, video, f"{start},3,a")) for start in (1, 2))
    assert {**identity_of(one), "segments": 0} == {**identity_of(other), "segments": 0}
    assert identity_of(one) != identity_of(other)
    assert "segments" not in identity_of(load_videos(listed(tmp_path, video, "a", header="video,label")))
    two = load_videos(listed(tmp_path, video, "0,1,a", "1,2,b"))  # two labels of one video, of two parts of it
    assert len(two) == 2
    with pytest.raises(ValueError, match=r"list\.csv:2 \('a'\) and \S+list\.csv:3 \('b'\): one video with two labels"):
        load_videos(listed(tmp_path, video, "0,1,a", "0,1,b"))


# ---------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier's folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tiny_config()
    EverestForVideoClassification(config).save_pretrained(folder)
    EverestVideoProcessor.from_config(config, frame_step=2).save_pretrained(folder)
    return str(folder)


def test_check_data_counts_the_frames_of_segments_and_names_what_is_wrong(video, tmp_path, capsys):
    path = listed(tmp_path, video, "1,2,a", "0,4,b", "5,9,b")
    assert cli.main(["check-data", str(path), "--json", "--clip-frames", "26"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["frames"]["min"] == 25
    assert report["total_seconds"] == pytest.approx(5)
    assert report["short"] == [{"video": str(video), "frames": 25}]
    reason = f"{path}:4: the segment 5 to 9 s is not in the video, which has 4 s"
    assert report["unreadable"] == [{"video": str(video), "reason": reason}]
    rows = load_videos(path)
    assert [error.reason for error in check_readable(rows)] == [reason]


def test_predict_takes_lists_with_segments(video, model, tmp_path, capsys):
    path = listed(tmp_path, video, "1,2", "7,9", ",", header="video,start,end")
    assert cli.main(["predict", str(path), "--model", model, "--json"]) == 1
    out, err = capsys.readouterr()
    assert f"{video}: {path}:3: the segment 7 to 9 s is not in the video, which has 4 s" in err
    part, whole = (json.loads(line) for line in out.splitlines())
    assert (part["start"], part["end"]) == (1, 2)
    assert whole.keys() == {"video", "labels"}
    classifier, processor = inference.load_checkpoint(model, inference.CLASSIFICATION)
    rows = load_videos(path, labels_required=False)
    view = inference.evaluation_views(rows, classifier, processor, (1, 1))[0]["pixel_values"]
    assert numbers(view[0])[0] >= 25
    segment = Segment(1, 2)
    for views in ((1, 1), (2, 1)):
        logits = inference.classify(classifier, processor, str(video), views=views, segment=segment)
        scores = dict(inference.top_labels(logits, classifier.config, 5))
        if views == (1, 1):
            assert part["labels"] == [{"label": label, "score": score} for label, score in scores.items()]
        assert list(scores.values()) != [entry["score"] for entry in whole["labels"]]


def test_embed_writes_where_segments_start_and_end(video, model, tmp_path):
    path = listed(tmp_path, video, "1,2,a", "2,4,b")
    assert cli.main(["embed", str(path), str(tmp_path / "out.parquet"), "--model", model]) == 0
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert (table["start"], table["end"], table["label"]) == ([1, 2], [2, 4], ["a", "b"])
    assert table["embedding"][0] != table["embedding"][1]


def test_predictions_say_which_segment(video, tmp_path):
    rows = load_videos(listed(tmp_path, video, "1,2.5,a", ",,b"))
    scores, labels = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
    write_predictions(tmp_path, "single_label_classification", ["a", "b"], rows, scores, labels)
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines == ["video,start,end,label,predicted,score,top2", f"{video},1,2.5,a,a,0.9,b", f"{video},,,b,b,0.8,a"]


def test_prepare_keeps_segments_by_their_frames(video, tmp_path):
    path = listed(tmp_path, video.name, "1,2,a", ",,b", "8,9,b")
    assert cli.main(["prepare", str(path), str(tmp_path / "out"), "--data-root", str(video.parent)]) == 1
    new = tmp_path / "out" / "list.csv"
    assert new.read_text() == "video,start_frame,end_frame,label\ncount.mp4,25,50,a\ncount.mp4,,,b\n"
    assert numbers(VideoViews(load_videos(new), SIZE, num_frames=25)[0]["pixel_values"][0]) == list(range(25, 50))
