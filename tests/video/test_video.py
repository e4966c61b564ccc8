"""Frame indices, reading, and one clear error for every way in which a video can be bad."""

import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers.videos import (
    BACKENDS,
    FORMATS,
    TORCHCODEC,
    bad_files,
    counting_frames,
    frame_number,
    moving_frames,
    real_clips,
    write_clip,
    write_cut,
    write_turned,
    write_video,
)
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from everest_hf import video_reading_everest
from everest_hf.data import VideoClips, VideoViews, load_videos
from everest_hf.data.transforms import evaluation_crops, finetuning_transform, pretraining_transform
from everest_hf.data.workers import keep_freed_memory, run_in_processes
from everest_hf.training.accelerator import build_accelerator
from everest_hf.training.recipe import Recipe
from everest_hf.video import (
    DECODERS,
    VideoError,
    VideoInfo,
    containers,
    decoders,
    decoders_of,
    frame_indices,
    open_video,
    probe,
    read_clip,
    read_frames,
    segment_indices,
    stride_indices,
)
from everest_hf.video.isolation import Overdue, call_within
from everest_hf.video_reading_everest import SequentialVideo, demuxer, open_container

CODECS = {"clip.mp4": "h264", "clip.avi": "mpeg4", "clip.mkv": "h264", "clip.webm": "vp9"}
# What the decoder prints on its own about a bad file is not ours to check.
BAD_REASONS = {
    "text": "not a video",
    "empty": "the file is empty",
    "truncated": "the file is truncated",
    "missing": "no such file",
}


# Levels by which pixels of two builds of FFmpeg may differ; those here do not.
TOLERANCE = 2
# Hundredths of a second, as irregular as a telephone's.
TIMES = np.cumsum(np.random.default_rng(0).integers(1, 12, size=60)).tolist()
COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- frame indices


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # The clip of 5 frames, every 3rd, covers 13 frames; of 33 that leaves starts 0 to 20.
        ({"num_video_frames": 33, "num_frames": 5, "frame_step": 3}, [10, 13, 16, 19, 22]),
        ({"num_video_frames": 33, "num_frames": 5, "frame_step": 3, "num_segments": 3}, [0, 3, 6, 9, 12]),
        (
            {"num_video_frames": 33, "num_frames": 5, "frame_step": 3, "num_segments": 3, "segment": 2},
            [20, 23, 26, 29, 32],
        ),
        ({"num_video_frames": 13, "num_frames": 5, "frame_step": 3}, [0, 3, 6, 9, 12]),
        ({"num_video_frames": 8, "num_frames": 5, "frame_step": 3}, [0, 3, 6, 7, 7]),
        ({"num_video_frames": 1, "num_frames": 5, "frame_step": 3, "num_segments": 2, "segment": 1}, [0] * 5),
        # Candidates of frame selection: 6 in the span of 4 frames, every 3rd.
        ({"num_video_frames": 11, "num_frames": 4, "frame_step": 3, "num_input_frames": 6}, [0, 2, 4, 6, 8, 10]),
    ],
)
def test_stride_indices_in_evaluation(arguments, expected):
    assert stride_indices(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_video_frames": 30, "num_frames": 5}, [3, 9, 15, 21, 27]),
        ({"num_video_frames": 30, "num_frames": 5, "num_segments": 2}, [1, 7, 13, 19, 25]),
        ({"num_video_frames": 30, "num_frames": 5, "num_segments": 2, "segment": 1}, [4, 10, 16, 22, 28]),
        ({"num_video_frames": 30, "num_frames": 5, "num_input_frames": 10}, [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]),
        ({"num_video_frames": 5, "num_frames": 5}, [0, 1, 2, 3, 4]),
        ({"num_video_frames": 3, "num_frames": 5}, [0, 1, 2, 2, 2]),
    ],
)
def test_segment_indices_in_evaluation(arguments, expected):
    assert segment_indices(**arguments) == expected


def test_random_stride_reaches_every_start_and_keeps_the_step():
    draw = generator()
    clips = [stride_indices(num_video_frames=20, num_frames=4, frame_step=5, generator=draw) for _ in range(200)]
    assert {clip[0] for clip in clips} == {0, 1, 2, 3, 4}
    assert all(np.diff(clip).tolist() == [5, 5, 5] for clip in clips)


def test_random_segment_draws_each_frame_from_its_own_part():
    draw = generator()
    clips = np.array([segment_indices(num_video_frames=21, num_frames=3, generator=draw) for _ in range(300)])
    for part in range(3):
        assert set(clips[:, part]) == set(range(7 * part, 7 * part + 7))
    assert len({tuple(np.diff(clip)) for clip in clips}) > 10  # drawn apart, not one offset for all


@pytest.mark.parametrize("policy", ["stride", "segment"])
def test_random_indices_depend_on_the_generator_alone(policy):
    arguments = {"frame_sampling": policy, "num_video_frames": 90, "num_frames": 6, "frame_step": 2}
    first, again, other = (frame_indices(**arguments, generator=generator(seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_impossible_requests_for_indices_are_named():
    with pytest.raises(ValueError, match=r"frame_sampling is 'dense'.*segment.*stride"):
        frame_indices(frame_sampling="dense", num_video_frames=9, num_frames=3)
    with pytest.raises(ValueError, match="0 frames"):
        frame_indices(num_video_frames=0, num_frames=3)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_those_asked_for(tmp_path, name, backend):
    path = write_video(tmp_path / name, counting_frames(40), fps=20, **FORMATS[name])
    info = VideoInfo(40, fps=20.0, height=32, width=64, codec=CODECS[name], duration=2.0)
    assert probe(path, backend=backend) == probe(path.read_bytes(), backend=backend) == info
    indices = [31, 5, 5, 0, 39, 13]
    frames = read_frames(path, indices, backend=backend)
    assert frames.dtype == torch.uint8
    assert frames.shape == (6, 32, 64, 3)
    assert [frame_number(frame) for frame in frames] == indices
    assert torch.equal(read_frames(path.read_bytes(), indices, backend=backend), frames)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMATS)
def test_frames_equal_those_of_an_independent_decoder(tmp_path, name, backend):
    path = write_video(tmp_path / name, moving_frames(30, 48, 64), **FORMATS[name])
    assert_equal_frames(read_frames(path, range(30), backend=backend), list(decoded(path)))


def decoded(path) -> Iterator[np.ndarray]:
    """All frames of a video, as PyAV decodes them one after the other."""
    with av.open(str(path)) as container:
        yield from (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))


def assert_equal_frames(frames: torch.Tensor, expected: list[np.ndarray]) -> None:
    assert np.abs(frames.numpy().astype(int) - np.stack(expected)).max() <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("bigbuckbunny.mp4", (132, 25.0, 720, 1280, "h264", 5.28)),
        ("bikes.mp4", (250, 25.0, 272, 640, "h264", 10.0)),
        ("carphone_pristine.mp4", (120, 29.97, 144, 176, "h264", 4.004)),
        ("carphone_distorted.mp4", (120, 29.97, 144, 176, "h264", 4.004)),
    ],
)
def test_real_clips(name, info, backend):
    path = real_clips()[name]
    found = probe(path, backend=backend)
    assert astuple(found)[:-1] == pytest.approx(info, abs=0.001)
    indices = [found.num_frames - 1, 0, 50]
    expected = {i: frame for i, frame in enumerate(decoded(path)) if i in indices}
    assert_equal_frames(read_frames(path, indices, backend=backend), [expected[i] for i in indices])


# Files in which a decoder that seeks would give other frames than those asked for, and how they are written.
X264 = "keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
# Key frames in name: a column of each frame is encoded again.
REFRESH = "keyint=12:bframes=0:scenecut=0:qp=20:intra-refresh=1"
HARD = {
    "open_groups.mp4": {"x264-params": f"{X264}:open-gop=1"},
    "open_groups.mkv": {"x264-params": f"{X264}:open-gop=1"},
    "b_frames.avi": {"codec": "mpeg4", "g": 12, "bf": 2},
    "h264.avi": {"x264-params": X264},
    "program.mpg": {"codec": "mpeg2video", "g": 12, "bf": 2},
    "transport.ts": {"x264-params": X264},
    "hevc.mp4": {"codec": "libx265", "x265-params": f"log-level=none:{X264}:open-gop=0"},
    "variable_rate.mp4": {"x264-params": X264, "times": TIMES},
    "variable_rate.mkv": {"x264-params": X264, "times": TIMES},
    "variable_rate.avi": {"codec": "mpeg4", "g": 12, "times": TIMES},
    "late_start.mp4": {"x264-params": X264, "times": range(700, 1000, 5)},
    "interlaced.mp4": {"x264-params": f"{X264}:tff=1"},
    "refreshed.mp4": {"x264-params": REFRESH},
    "refreshed.mkv": {"x264-params": f"{REFRESH}:bframes=2:b-adapt=0"},
    "refreshed.avi": {"x264-params": REFRESH},
    # Of which a time finds a later key frame.
    "flash.flv": {"x264-params": X264},
    "windows.wmv": {"codec": "wmv2", "g": 12},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HARD)
def test_each_frame_is_found_by_its_number(tmp_path, name, backend):
    path = write_video(tmp_path / name, counting_frames(60), **HARD[name])
    assert frame_numbers(path, backend) == list(range(60))


def test_frames_of_h264_that_nobody_needs_are_not_decoded(tmp_path):
    path = write_video(tmp_path / "clip.mp4", counting_frames(60), **{"x264-params": X264})
    times = containers.header_of(str(path)).times
    wanted = {times[i] for i in range(1, 60, 4)}
    with demuxer(str(path)) as (container, stream):
        few = {
            frame.pts: frame.to_ndarray(format="rgb24") for frame in decoders._decode_few(container, stream, wanted)
        }
    assert wanted <= set(few)
    assert len(few) < 48  # without half of the B frames, which are three of four
    assert_equal_frames(read_frames(path, range(1, 60, 4)), [few[time] for time in sorted(wanted)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_that_an_edit_list_hides_are_not_there(tmp_path, backend):
    whole = write_video(tmp_path / "whole.mp4", counting_frames(60), **{"x264-params": X264})
    path = write_cut(tmp_path / "cut.mp4", whole, start=17)
    assert frame_numbers(path, backend) == list(range(17, 60))
    assert frame_numbers(path.read_bytes(), backend) == list(range(17, 60))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [16, 48, 96, 144, 208])
def test_narrow_frames(tmp_path, width, backend):
    path = write_video(tmp_path / "narrow.mp4", moving_frames(9, 32, width))
    assert_equal_frames(read_frames(path, range(9), backend=backend), list(decoded(path)))


def frame_numbers(source, backend) -> list[int]:
    """The numbers written into the frames of a video: each asked for alone; checked to be those of strided clips."""
    count = open_video(source, backend=backend).num_frames
    numbers = [frame_number(read_frames(source, [i], backend=backend)[0]) for i in range(count)]
    for start in (1, 13):
        strided = read_frames(source, range(start, count, 4), backend=backend)
        assert [frame_number(frame) for frame in strided] == numbers[start::4]
    return numbers


# The corners of a frame of four colours, row by row, when it is shown by a matrix.
TURNS = {
    "as it is": ((1, 0, 0, 1), "RGBW"),
    "to the right": ((0, 1, -1, 0), "BRWG"),
    "by half": ((-1, 0, 0, -1), "WBGR"),
    "to the left": ((0, -1, 1, 0), "GWRB"),
    "mirrored": ((-1, 0, 0, 1), "GRWB"),
    "upside down": ((1, 0, 0, -1), "BWRG"),
    "transposed": ((0, 1, 1, 0), "RBGW"),
    "transposed the other way": ((0, -1, -1, 0), "WGBR"),
    "not at all": ((0, 0, 0, 0), "RGBW"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_upright(tmp_path, turn, backend):
    matrix, corners = TURNS[turn]
    path = write_turned(tmp_path / "turned.mp4", four_colours(8, 96, 128), matrix)
    shape = (96, 128) if matrix[0] or not any(matrix) else (128, 96)
    info = probe(path, backend=backend)
    assert (info.height, info.width) == shape
    for frame in read_frames(path, [0, 5], backend=backend):
        assert frame.shape[:2] == shape
        assert "".join(colour_at(frame, row, column) for row in (0.25, 0.75) for column in (0.25, 0.75)) == corners


def test_frames_turned_by_an_angle_are_refused(tmp_path):
    path = write_turned(tmp_path / "turned.mp4", four_colours(8, 96, 128), (0.7, 0.7, -0.7, 0.7))
    with pytest.raises(VideoError, match="no multiple of 90 degrees"):
        probe(path)


def four_colours(num_frames: int, height: int, width: int) -> np.ndarray:
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for i, colour in enumerate(COLOURS.values()):
        top, left = height // 2 * (i // 2), width // 2 * (i % 2)
        frames[:, top : top + height // 2, left : left + width // 2] = colour
    return frames


def colour_at(frame: torch.Tensor, row: float, column: float) -> str:
    pixel = frame[int(row * frame.shape[0]), int(column * frame.shape[1])]
    return next(name for name, colour in COLOURS.items() if (pixel > 127).tolist() == [x > 127 for x in colour])


def test_clip_takes_its_indices_from_the_number_of_frames(tmp_path):
    path = write_video(tmp_path / "clip.mp4", counting_frames(3))
    clip = read_clip(path, lambda count: stride_indices(num_video_frames=count, num_frames=5))
    assert clip.shape == (5, 3, 32, 64)
    assert [frame_number(frame.permute(1, 2, 0)) for frame in clip] == [0, 1, 2, 2, 2]


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", BAD_REASONS)
@pytest.mark.parametrize("read", [probe, open_video, lambda path: read_frames(path, [0])])
def test_bad_file_is_one_line_with_path_and_reason(tmp_path, kind, read):
    path = bad_files(tmp_path)[kind]
    with pytest.raises(VideoError) as caught:
        read(path)
    assert caught.value.path == str(path)
    assert BAD_REASONS[kind] in caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)


def test_folder_is_no_video(tmp_path):
    with pytest.raises(VideoError, match="not a file"):
        probe(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.98])
def test_truncated_file_is_an_error_wherever_it_ends(tmp_path, name, share):
    content = write_video(tmp_path / name, moving_frames(40, 48, 64), **FORMATS[name]).read_bytes()
    with pytest.raises(VideoError, match=r"truncated: \d+ of the \d+ bytes|not a video"):
        probe(content[: int(share * len(content))])


def test_truncated_file_whose_index_comes_first_is_an_error(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in moving_frames(40, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert probe(content).num_frames == 40
    with pytest.raises(VideoError, match="truncated"):
        probe(content[: len(content) * 3 // 4])


def test_bytes_after_the_end_of_a_file_do_no_harm(tmp_path):
    content = write_clip(tmp_path / "clip.mp4", num_frames=12).read_bytes()
    for tail in (b"\0" * 100, b"\x01\x02\x03\x04\x05\x06\x07\x08" * 9):
        assert probe(content + tail).num_frames == 12


def test_header_that_declares_more_frames_than_bytes(tmp_path):
    content = write_clip(tmp_path / "clip.mp4").read_bytes()
    place = content.index(b"stts") + 12  # the number of frames of the first length
    damaged = content[:place] + b"\x7f\xff\xff\xff" + content[place + 4 :]
    shape, error = run_alone(lambda source, alive: clip_or_error(source), damaged)
    assert shape is None
    assert "declares 2147483647 frames in" in error.reason


def test_indices_outside_of_the_video_are_an_error(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", num_frames=9)
    for indices in ([9], [-1], []):
        with pytest.raises(VideoError, match="it has frames 0 to 8"):
            read_frames(path, indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_files_are_errors_with_each_backend(tmp_path, backend):
    for kind, path in bad_files(tmp_path).items():
        with pytest.raises(VideoError, match=BAD_REASONS[kind]):
            probe(path, backend=backend)


# ---------------------------------------------------------------------- backends


def test_unknown_backend_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"video backend is 'tape'; it must be one of auto, decord, pyav, torchcodec"):
        probe(write_clip(tmp_path / "clip.mp4"), backend="tape")


@pytest.fixture
def fresh_backends():
    """What is known of decoders is found out again, in the test and after it."""
    known = decoders.torchcodec_loads, decoders._torchcodec, decoders._reader_class
    [function.cache_clear() for function in known]
    yield
    [function.cache_clear() for function in known]


def test_decord_that_is_not_installed(tmp_path, monkeypatch, fresh_backends):
    monkeypatch.setitem(sys.modules, "decord", None)
    path = write_clip(tmp_path / "clip.mp4")
    with pytest.raises(
        ValueError, match=r"^video backend decord cannot be loaded; .*auto, pyav, torchcodec$"
    ) as caught:
        probe(path, backend="decord")
    assert not isinstance(caught.value, VideoError)  # no fault of the video
    assert probe(path).num_frames == probe(path, backend="pyav").num_frames == 20


def test_torchcodec_that_is_not_installed(tmp_path, monkeypatch, fresh_backends):
    monkeypatch.setitem(sys.modules, "torchcodec", None)  # as where there is none: to import it fails
    path = write_clip(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match=r"torchcodec cannot be loaded; .*pip install torchcodec.*FFmpeg") as caught:
        probe(path, backend="torchcodec")
    assert not isinstance(caught.value, VideoError)  # no fault of the video
    assert decoders_of("auto") == (decoders.PyavDecoder, decoders.SequentialDecoder)
    assert probe(path, backend="auto") == probe(path)


def test_a_run_says_at_once_that_its_decoder_is_not_installed(monkeypatch, fresh_backends):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(ValueError, match="torchcodec cannot be loaded"):
        build_accelerator(Recipe(train="videos", video_backend="torchcodec"))


@pytest.mark.parametrize("backend", [TORCHCODEC])
def test_auto_is_torchcodec_for_videos_that_pyav_cannot_seek_in(tmp_path, backend):
    opened = {}
    for name, is_open in (("closed.mp4", 0), ("open.mp4", 1)):
        options = {"codec": "libx265", "x265-params": f"log-level=none:{X264}:open-gop={is_open}"}
        path = write_video(tmp_path / name, counting_frames(60), **options)
        opened[name] = open_video(path, backend="auto")._decoder
        assert frame_numbers(path, "auto") == list(range(60))
    assert isinstance(opened["closed.mp4"], decoders.PyavDecoder)
    assert isinstance(opened["open.mp4"], DECODERS[backend])


@pytest.mark.slow
@pytest.mark.parametrize("backend", [TORCHCODEC])
def test_decoders_share_a_process(tmp_path, backend):
    path = write_video(tmp_path / "clip.mp4", counting_frames(20, 64, 128), codec="libsvtav1", g=5, preset=12)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # SVT-AV1 makes root's thread one that others wait for
    # In a process that has loaded neither yet: their libraries are of different versions.
    code = (
        "import sys; from everest_hf.video import read_frames\n"
        "for name in sys.argv[2:]: print(name, tuple(read_frames(sys.argv[1], [11], backend=name).shape))"
    )
    command = [sys.executable, "-c", code, str(path), "decord", backend, "decord"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} (1, 64, 128, 3)" for name in ("decord", backend, "decord")]


def run_alone(function, item):
    """Call function(item, alive) in a process of its own."""
    [(_, result)] = run_in_processes(function, [item])
    return result


# ---------------------------------------------------------------------- smaller frames


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_what_is_larger_than_needed_is_scaled(tmp_path, backend):
    path = write_video(tmp_path / "clip.mp4", moving_frames(12, 240, 320), crf=10)
    read = partial(read_clip, path, lambda n: [0, 7], backend=backend)
    whole = read()
    for short_side in (None, 240, 500):
        assert torch.equal(read(short_side=short_side), whole)
    small = read(short_side=99)
    assert small.shape == (2, 3, 99, 132)
    expected = F.resize(whole, [99, 132], antialias=True)
    assert (small.float() - expected.float()).abs().mean() < 4  # of 255; moved by a pixel, it would be above 7
    # To 96 pixels decord cannot.
    assert read(short_side=72).shape[2:] == ((240, 320) if backend == "decord" else (72, 96))


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_a_turned_video_is_scaled_upright(tmp_path, backend):
    path = write_turned(tmp_path / "turned.mp4", four_colours(8, 240, 320), TURNS["to the right"][0])
    frame = read_frames(path, [0], short_side=120, backend=backend)[0]
    assert frame.shape == (160, 120, 3)
    corners = "".join(colour_at(frame, row, column) for row in (0.25, 0.75) for column in (0.25, 0.75))
    assert corners == TURNS["to the right"][1]


@pytest.mark.parametrize("backend", [TORCHCODEC])
def test_torchcodec_scales_nothing(tmp_path, backend):
    path = write_video(tmp_path / "clip.mp4", moving_frames(12, 240, 320))
    assert read_clip(path, lambda n: [0], backend=backend, short_side=99).shape[2:] == (240, 320)


def test_training_lets_the_decoder_scale_and_evaluation_does_not(tmp_path):
    write_video(tmp_path / "clip.mp4", moving_frames(12, 240, 320))
    rows = load_videos(tmp_path, labels_required=False)
    seen = []
    transform = pretraining_transform((24, 40))
    transform.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    VideoClips(rows, transform, num_frames=4)[0]
    assert seen == [(4, 3, transform.short_side, round(transform.short_side * 4 / 3))]
    whole = read_clip(tmp_path / "clip.mp4", lambda n: stride_indices(num_video_frames=n, num_frames=4))
    views = VideoViews(rows, (24, 40), num_frames=4)[0]["pixel_values"]
    assert torch.equal(views, evaluation_crops(whole, (24, 40)))


# ---------------------------------------------------------------------- what is not opened, or too large


REFERRING = {
    "concat": "ffconcat version 1.0\nfile good.mp4\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("kind", REFERRING)
def test_a_file_that_names_others_opens_none_of_them(kind, as_bytes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "good.mp4")
    path = tmp_path / "list.mp4"
    path.write_text(REFERRING[kind])
    with pytest.raises(VideoError, match=r"list.mp4: cannot be decoded: not a video, or its header is damaged"):
        read_frames(path.read_bytes() if as_bytes else path, [0], name="list.mp4", time_limit=20)
    with pytest.raises(av.error.FFmpegError):
        open_container(path.read_bytes() if as_bytes else str(path))
    write_clip(tmp_path / "concat:good.mp4|good.mp4", num_frames=7)  # a name of a file like any other
    assert probe("concat:good.mp4|good.mp4").num_frames == 7
    assert SequentialVideo("concat:good.mp4|good.mp4").num_frames == 7


def first_frames_decoded(monkeypatch) -> list:
    """Return a list that grows with each frame that is decoded for a header."""
    decoded, decode = [], containers._first_frame
    monkeypatch.setattr(containers, "_first_frame", lambda packet: decoded.append(packet) or decode(packet))
    return decoded


def test_the_header_of_bytes_is_read_once_as_long_as_they_are_the_same(tmp_path, monkeypatch):
    one, other = (write_clip(tmp_path / f"{i}.mp4", 20, 48, 64 + 2 * i, seed=i) for i in range(2))
    expected = {path: read_frames(path, [3, 9]) for path in (one, other)}
    decoded = first_frames_decoded(monkeypatch)
    for path, is_new in ((one, True), (other, True), (one, False), (other, False)):
        content = path.read_bytes()
        references = sys.getrefcount(content)
        header = containers.header_of(content)
        assert bool(decoded) is is_new
        decoded.clear()  # a packet holds what it was read from
        assert sys.getrefcount(content) == references  # only their sum is kept
        assert header == containers.header_of(str(path))
        assert torch.equal(read_frames(content, [3, 9], max_pixels=0), expected[path])
        decoded.clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_pixels_are_refused_before_they_are_decoded(backend, tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 20, 48, 64)
    decoded = first_frames_decoded(monkeypatch)
    for source in (str(path), path.read_bytes()):
        with pytest.raises(
            VideoError, match=r"a.mp4: cannot be decoded: 1 x 64 x 48 pixels are 3072, more than max_pix"
        ):
            open_video(source, name="a.mp4", backend=backend, max_pixels=3071)
    assert decoded == []
    options = {"backend": backend, "max_pixels": 4 * 48 * 64}
    assert read_frames(path, [0, 5, 5, 9, 19], **options).shape == (5, 48, 64, 3)
    video = open_video(path, **options)
    monkeypatch.setattr(video._decoder, "read", None)
    with pytest.raises(VideoError, match=r"5 x 64 x 48 pixels are 15360, more than max_pixels=12288$"):
        video.read(range(5))
    with pytest.raises(VideoError, match="15 x 64 x 48 pixels"):
        read_clip(path, lambda count: range(15), **options)
    assert read_frames(path, range(20), backend=backend, max_pixels=0).shape == (20, 48, 64, 3)


def test_so_they_are_where_a_checkpoint_reads_alone(tmp_path, monkeypatch):
    path = str(write_clip(tmp_path / "a.mp4", 20, 48, 64))
    monkeypatch.setattr(video_reading_everest, "MAX_PIXELS", 4 * 48 * 64)
    video = SequentialVideo(path)
    assert video.read([0, 5, 5, 9, 19]).shape == (5, 48, 64, 3)
    monkeypatch.setattr(video_reading_everest, "decode_in_order", None)
    with pytest.raises(ValueError, match=r"^5 x 64 x 48 pixels are 15360, more than max_pixels=12288$"):
        video.read(range(5))
    monkeypatch.setattr(video_reading_everest, "MAX_PIXELS", 3071)
    with pytest.raises(ValueError, match=r"^1 x 64 x 48 pixels are 3072, more than max_pixels=3071$"):
        SequentialVideo(path)


# ---------------------------------------------------------------------- time limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_that_takes_too_long_is_cut_off(backend):
    path = real_clips()["bigbuckbunny.mp4"]
    video = open_video(path, backend=backend)
    video._time_limit = 0.01  # to open it may take longer
    gc.collect()  # which takes as long as the reading, and may otherwise come while this thread is to wait for it
    with pytest.raises(VideoError, match=r"bigbuckbunny.mp4: took longer than 0.01 s$"):
        video.read(range(132))
    assert read_frames(path, [3], backend=backend).shape == (1, 720, 1280, 3)  # the next call is not disturbed


class _Hanging(DECODERS["pyav"]):
    """PyAV, but on the video that is called hang.mp4 it never ends."""

    def __init__(self, source, *args):
        super().__init__(source, *args)
        if source.endswith("hang.mp4"):
            threading.Event().wait()


def test_a_loader_goes_on_where_a_decoder_hangs(tmp_path, monkeypatch):
    monkeypatch.setitem(DECODERS, "pyav", _Hanging)
    paths = [write_clip(tmp_path / name) for name in ("a.mp4", "hang.mp4", "z.mp4")]
    rows = load_videos(tmp_path, labels_required=False)
    clips = VideoClips(rows, finetuning_transform((24, 40)), num_frames=4, time_limit=2)
    for _ in range(2):
        items = list(DataLoader(clips, batch_size=None, num_workers=2))
        assert [list(map(tuple, item["bad"])) for item in items] == [
            [],
            [(str(paths[1]), "took longer than 2 s")],
            [],
        ]
        assert items[1]["index"] in (0, 2)


def test_calls_within_a_time_limit():
    assert call_within(9, max, 3, 5) == call_within(0, max, 3, 5) == 5
    with pytest.raises(ZeroDivisionError):
        call_within(9, divmod, 1, 0)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call_within, [9] * 50, [abs] * 50, range(50))) == list(range(50))


def test_threads_of_a_time_limit(tmp_path):
    def count_threads(item, alive):
        """Return how many threads there are beside the main one, after each of four steps."""
        call_within(9, abs, 1)
        counts = [threading.active_count()]
        with suppress(Overdue):
            call_within(0.1, threading.Event().wait)
        call_within(9, abs, 1)
        counts.append(threading.active_count())
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call_within, [9] * 50, [abs] * 50, range(50)))
        del pool
        deadline = time.monotonic() + 9
        while threading.active_count() > counts[-1] and time.monotonic() < deadline:
            time.sleep(0.01)
        return [*counts, threading.active_count()]

    # One that makes calls; it and one that hangs; and those of other threads end with them.
    assert run_alone(count_threads, None) == [2, 3, 3]


# ---------------------------------------------------------------------- processes


def test_a_forked_process_leaves_the_readers_of_its_parent_alone(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    ring = [open_video(path)]
    ring.append(ring)  # for the collector to find, in whichever process it runs
    del ring

    def collect(source, alive):
        gc.collect()
        return read_frames(source, [3]).shape

    assert run_alone(collect, path) == (1, 48, 64, 3)
    gc.collect()


def used_memory() -> int:
    """Bytes of memory that the process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell the memory in use")
@pytest.mark.parametrize("start", [lambda: None, keep_freed_memory])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_with_the_number_of_videos(tmp_path, backend, start):
    paths = [write_clip(tmp_path / name, height=96, width=128, **FORMATS[name]) for name in FORMATS]
    paths += [bad_files(tmp_path)["text"]]

    def grow(count, alive):
        start()
        before = 0
        for i in range(count):
            if i == count // 4:
                before = used_memory()
            path = paths[i % len(paths)]
            clip_or_error(path if i % 3 else path.read_bytes(), backend=backend)
            alive()
        return used_memory() - before

    # A frame that is left behind by each of the last 900 would be 33 MB.
    assert run_alone(grow, 1200) < 8e6


def stride_indices_of(count: int, **kwargs) -> list[int]:
    return stride_indices(num_video_frames=count, **kwargs)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_bytes_give_frames_or_a_video_error(tmp_path, name):
    content = write_video(tmp_path / name, moving_frames(30, 48, 64), **FORMATS[name]).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(25):
        damaged = np.frombuffer(content, dtype=np.uint8).copy()
        places = rng.integers(len(damaged), size=rng.integers(1, 40))
        damaged[places] = rng.integers(256, size=len(places))
        clip, error = clip_or_error(damaged.tobytes())
        assert (error is None and clip.shape[:2] == (4, 3)) or len(str(error).splitlines()) == 1


def clip_or_error(source, **kwargs):
    try:
        return read_clip(source, partial(stride_indices_of, num_frames=4, frame_step=3), **kwargs), None
    except VideoError as error:
        return None, error


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("/a b/c: d.mp4", "two\n lines")))
    assert (error.path, error.reason) == ("/a b/c: d.mp4", "two lines")
    assert str(error) == "/a b/c: d.mp4: two lines"


class _Failing(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return probe("/nowhere/clip.mp4")


def test_error_of_a_loader_worker_stays_one_line():
    with pytest.raises(VideoError) as caught:
        list(DataLoader(_Failing(), num_workers=1))
    assert str(caught.value) == "/nowhere/clip.mp4: no such file"
    assert (caught.value.path, caught.value.reason) == ("/nowhere/clip.mp4", "no such file")
