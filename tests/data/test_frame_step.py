"""Videos prepared as runs of every N-th frame: frames, times, segments and clips are those of the source."""

import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.tiny import tiny_config
from helpers.videos import BACKENDS, counting_frames, frame_number, real_clips, write_list, write_video

from everest_hf import EverestVideoProcessor, cli
from everest_hf.data import VideoClips, VideoViews, load_videos
from everest_hf.data.prepare import prepare_videos
from everest_hf.training.loaders import check_videos
from everest_hf.training.recipe import Recipe
from everest_hf.video import NotKeptError, Segment, VideoError, decoders, open_video, probe, read_frames
from everest_hf.video.decoders import PyavDecoder
from everest_hf.video.encoding import Encoding
from everest_hf.video_reading_everest import SequentialVideo

NUM_FRAMES, FPS = 101, 30


def coloured_frames(num_frames: int) -> np.ndarray:
    """Frames (T, 64, 128, 3) that carry their number in their columns, in a colour that their number chooses."""
    frames = counting_frames(num_frames, 64, 128)
    colours = np.array([(255, 160, 160), (160, 255, 160), (160, 160, 255)], np.uint8)
    return np.minimum(frames, colours[np.arange(num_frames) % 3][:, None, None])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("in") / "a.mp4", coloured_frames(NUM_FRAMES), fps=FPS, crf=10)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    """A function of frame_step and phases: the file that is made of the source."""
    made: dict = {}

    def prepare(frame_step: int, phases: int | None = None) -> Path:
        key = frame_step, phases
        if key not in made:
            out = tmp_path_factory.mktemp("out")
            encoding = Encoding(frame_step=frame_step, phases=phases)
            ((_, made[key]),) = prepare_videos(source.parent, out, encoding=encoding, workers=1).made
        return made[key]

    return prepare


def numbers(frames) -> list[int]:
    return [frame_number(frame) for frame in frames]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("frame_step", "phases"), [(4, None), (3, None), (4, 1), (7, 1)])
def test_frames_are_those_of_the_source_by_its_numbers(source, prepared, frame_step, phases, backend):
    target = prepared(frame_step, phases)
    kept = [i if phases is None else i - i % frame_step for i in range(NUM_FRAMES)]
    frames = read_frames(target, range(NUM_FRAMES), backend=backend)
    assert numbers(frames) == kept
    assert (frames.float() - read_frames(source, kept).float()).abs().mean() < 2  # the colours too
    few = [97, 3, 100, 3, 50]
    assert numbers(read_frames(target, few, backend=backend)) == [kept[i] for i in few]


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_frames_come_in_the_order_of_the_source(prepared, backend):
    wanted = list(range(1, 80, 2))
    blocks = list(open_video(prepared(4), backend=backend).read_blocks(wanted))
    assert len(blocks) > 1
    assert numbers(torch.cat(blocks)) == wanted
    assert numbers(torch.cat(list(open_video(prepared(4, 1), backend=backend).read_blocks(range(0, 80, 4))))) == list(
        range(0, 80, 4)
    )
    with pytest.raises(NotKeptError, match="frame_step be a multiple of 4"):
        list(open_video(prepared(4, 1), backend=backend).read_blocks(wanted))


@pytest.mark.parametrize("phases", [None, 1])
def test_times_are_those_of_the_source(prepared, phases):
    target = prepared(4, phases)
    info, video = probe(target), open_video(target)
    assert (info.num_frames, info.fps, info.runs) == (NUM_FRAMES, FPS, (4, phases or 4, NUM_FRAMES))
    assert info.duration == pytest.approx(NUM_FRAMES / FPS)
    first = [0, 4, 40] if phases else [0, 1, 42]
    assert video.seconds_of([0, 5 if phases else 1, 42]) == pytest.approx([i / FPS for i in first])
    assert open_video(target, segment=Segment(0.5, 1.0)).frames == range(15, 30)
    part = open_video(target, segment=Segment(20, 60, True))
    assert numbers(part.read([0, 4, 39])) == [20, 24, 56 if phases else 59]


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("phases", [None, 1])
def test_short_videos_and_odd_rates(tmp_path, num_frames, phases):
    rate = Fraction(30000, 1001)
    write_video(tmp_path / "in" / "a.mp4", counting_frames(num_frames), fps=rate)
    encoding = Encoding(frame_step=4, phases=phases)
    ((_, target),) = prepare_videos(tmp_path / "in", tmp_path / "out", encoding=encoding, workers=1).made
    video = open_video(target)
    assert video.num_frames == num_frames
    assert numbers(video.read(range(num_frames))) == [i if phases is None else i - i % 4 for i in range(num_frames)]
    if num_frames > 4:
        assert video.fps == pytest.approx(float(rate))
        assert video.seconds_of([4]) == pytest.approx([4 / rate])


def test_the_file_has_a_run_after_another_each_with_key_frames_four_apart(prepared):
    with av.open(str(prepared(4))) as container:
        frames = list(container.decode(video=0))
    keys = [i for i, frame in enumerate(frames) if frame.key_frame]
    assert {0, 26, 51, 76} <= set(keys)
    assert np.diff([*keys, NUM_FRAMES]).max() == 4
    assert numbers(frame.to_ndarray(format="rgb24") for frame in frames) == [
        *range(0, NUM_FRAMES, 4),
        *range(1, NUM_FRAMES, 4),
        *range(2, NUM_FRAMES, 4),
        *range(3, NUM_FRAMES, 4),
    ]


@pytest.mark.parametrize("frame_step", [1, 2, 4, 6])
def test_training_clips_and_views_are_those_of_the_source(source, prepared, frame_step):
    rows = [load_videos_of(path) for path in (source, prepared(4))]
    sampling = {"num_frames": 8, "frame_step": frame_step}
    clips = [VideoClips(of, lambda clip: clip, **sampling)[0]["pixel_values"] for of in rows]
    views = [VideoViews(of, (64, 64), num_segments=3, **sampling)[0]["pixel_values"] for of in rows]
    for before, after in (clips, views):
        assert (before.float() - after.float()).abs().mean() < 2


def load_videos_of(path: Path):
    return load_videos(write_list(path.parent / "list.txt", [(path.name,)]), labels_required=False)


def test_of_one_phase_a_clip_is_of_kept_frames_and_another_step_is_refused(prepared):
    target = prepared(4, 1)
    rows = load_videos_of(target)
    for step in (4, 8):
        clip = VideoClips(rows, lambda clip: clip, num_frames=8, frame_step=step)[0]["pixel_values"].permute(
            0, 2, 3, 1
        )
        assert set(np.diff(numbers(clip))) == {step}
    views = VideoViews(rows, (64, 128), num_frames=8, frame_step=4, num_segments=3)[0]["pixel_values"]
    assert [set(np.diff(numbers(view.permute(0, 2, 3, 1)))) for view in views] == [{4}] * 3
    wrong = f"{target}: was prepared with one frame of 4 (--phases 1), and a clip takes the frame 2 after its first"
    with pytest.raises(NotKeptError) as error:
        VideoViews(rows, (64, 128), num_frames=8, frame_step=2)[0]
    assert str(error.value).startswith(wrong)
    with pytest.raises(ValueError, match="takes the frame 2 after its first"):
        EverestVideoProcessor(num_frames=8, frame_step=2)(str(target), return_tensors="pt")
    # A video that is shorter than a clip repeats its last frame, which need not be one of the phase.
    assert open_video(target, segment=Segment(0, 10, True)).read_clip([0, 4, 8, 9, 9]).shape[0] == 5


@pytest.mark.parametrize("phases", [None, 1])
def test_what_travels_with_a_checkpoint_reads_the_same(prepared, phases):
    video = SequentialVideo(str(prepared(4, phases)))
    assert (video.num_frames, video.fps) == (NUM_FRAMES, FPS)
    places = [9, 13, 2, 100]
    assert numbers(video.read(places)) == (places if phases is None else [8, 12, 0, 100])
    if phases:
        with pytest.raises(ValueError, match="one frame of 4"):
            video.read_clip([0, 2])


def test_a_file_that_was_cut_since_is_refused(prepared, tmp_path):
    made = prepared(4)
    with av.open(str(made)) as old, av.open(str(tmp_path / "a.mp4"), "w") as new:
        new.metadata["comment"] = old.metadata["comment"]
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [packet for packet in old.demux(video=0) if packet.size][:60]:
            packet.stream = stream
            new.mux(packet)
    with pytest.raises(VideoError, match=f"has 60 of the {NUM_FRAMES} frames that prepare wrote"):
        open_video(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="has 60 of the"):
        SequentialVideo(str(tmp_path / "a.mp4"))
    assert "its frames are in phases" in str(prepare_videos(made.parent, tmp_path / "out", workers=1).bad[0])


def test_the_command_and_what_check_data_shows(source, tmp_path, capsys):
    listed = write_list(tmp_path / "list.csv", [("video,label,start,end",), (f"{source},a,0.5,1.5",)])
    command = ["prepare", str(listed), str(tmp_path / "out"), "--frame-step", "4", "--workers", "1"]
    assert cli.main(command) == 0
    assert "random clips of 16 frames, step 4" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "0 videos written, 1 there already" in capsys.readouterr().out
    (row,) = load_videos(tmp_path / "out" / "list.csv")
    assert (row["start_frame"], row["end_frame"]) == (15, 45)
    assert cli.main(["check-data", str(tmp_path / "out" / "list.csv"), "--workers", "1"]) == 0
    assert "\nprepared     frame step 4, all phases (1)\n" in capsys.readouterr().out
    assert cli.main([*command, "--phases", "1"]) == 0
    assert "1 videos written" in capsys.readouterr().out
    assert cli.main(["check-data", str(tmp_path / "out" / "list.csv"), "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prepared"] == {"frame step 4, 1 phase": 1}
    assert cli.main([*command[:3], "--phases", "1"]) == 1
    assert "--phases is 1; it belongs to --frame-step" in capsys.readouterr().err
    with pytest.raises(ValueError, match="phases is 2; it must be 1, or frame_step=4"):
        Encoding(frame_step=4, phases=2)


def test_training_with_another_step_is_one_line_before_the_first_step(prepared):
    one, whole = load_videos_of(prepared(4, 1)), load_videos_of(prepared(4))
    check = partial(check_videos, config=tiny_config(), accelerator=Accelerator())
    for step in (3, 4, 8):
        check(Recipe(train="list.txt", frame_step=step), train=whole, val=whole)
    for step in (4, 8):
        check(Recipe(train="list.txt", frame_step=step), train=one, val=one)
    for train, val in ((one, None), (whole, one)):
        with pytest.raises(ValueError, match="was prepared with one frame of 4 ") as error:
            check(Recipe(train="list.txt", frame_step=3), train=train, val=val)
        assert "a clip takes the frame 3 after its first; let frame_step be a multiple of 4, or" in str(error.value)


def ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean structural similarity of frames (T, H, W, C), of their luma in blocks of 8 x 8 (Wang et al. 2004)."""
    luma = torch.tensor([0.299, 0.587, 0.114])
    blocks = [
        (frames.float() @ luma).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3) for frames in (one, other)
    ]  # (T, h, w, 64)
    (a, b), ((var_a, mean_a), (var_b, mean_b)) = blocks, (torch.var_mean(x, -1, correction=0) for x in blocks)
    covariance = ((a - mean_a[..., None]) * (b - mean_b[..., None])).mean(-1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item()


def test_frames_of_a_real_clip_are_as_similar_as_in_order_and_one_phase_is_small(tmp_path):
    frames = read_frames(real_clips()["bikes.mp4"], range(80))[:, :160, :240].numpy()
    clip = write_video(tmp_path / "in" / "a.mp4", frames, crf=10)
    places = list(range(0, 80, 8))
    found, sizes = {}, {}
    for name, how in {"in order": {}, "all": {"frame_step": 4}, "one": {"frame_step": 4, "phases": 1}}.items():
        prepare_videos(tmp_path / "in", tmp_path / name, encoding=Encoding(**how), workers=1)
        found[name] = ssim(read_frames(clip, places), read_frames(tmp_path / name / "a.mp4", places))
        sizes[name] = (tmp_path / name / "a.mp4").stat().st_size
    assert min(found.values()) > 0.97
    assert sizes["one"] < 0.5 * sizes["all"]


def test_frames_far_apart_are_read_without_those_between(prepared, monkeypatch):
    """A decoder seeks where a key frame lies between the frames asked for, and decodes what is between otherwise."""
    decoded = []
    few = decoders._decode_few

    def counted(*args):
        for frame in few(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decoders, "_decode_few", counted)
    places = [0, 1, 2, 40, 41, 90]
    PyavDecoder(str(prepared(4))).read(places)
    assert len(decoded) < 16
