"""Windows of a video: which frames a model gets, and when the video shows them."""

import numpy as np
import pytest
from helpers.tiny import tiny_config
from helpers.videos import write_clip, write_video
from PIL import Image

from everest_hf import EverestVideoProcessor
from everest_hf.inference import WindowReader, read_view, read_window
from everest_hf.video import VideoError

FPS = 25


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("windows") / "clip.mp4", num_frames=30, fps=FPS))


def processor(**fields) -> EverestVideoProcessor:
    """A processor for clips of 12 frames, one after another where nothing else is asked for."""
    return EverestVideoProcessor.from_config(tiny_config(), **{"frame_step": 1, **fields})


def test_one_window_is_the_centre_view(video):
    (window,) = WindowReader(processor(), video)
    pixel_values, frames = read_view(processor(), video)
    assert window.frames == frames == list(range(9, 21))
    assert window.pixel_values.equal(pixel_values)
    assert window.seconds == pytest.approx([frame / FPS for frame in frames])


def test_the_whole_video_is_there_once(video):
    windows = WindowReader(processor(), video, whole=True)
    found = list(windows)
    assert len(windows) == len(found) == 3
    assert [window.frames[0] for window in found] == [0, 12, 18]  # the last one moves back
    assert [frame for window in found for frame in window.frames[window.first_new :]] == list(range(30))


def test_windows_of_every_second_frame(video):
    found = list(WindowReader(processor(frame_step=2), video, whole=True))
    assert [window.frames for window in found] == [list(range(0, 24, 2)), list(range(6, 30, 2))]
    assert [window.first_new for window in found] == [0, 9]  # 24 follows 22


@pytest.mark.parametrize(("start", "first"), [(0, 0), (0.2, 5), (0.21, 6), (0.4, 10)])
def test_a_window_begins_at_the_first_frame_from_a_time_on(video, start, first):
    window = read_window(processor(), video, start=start)
    assert window.frames == list(range(first, first + 12))
    assert window.seconds[0] >= start


def test_a_window_at_the_end_repeats_the_last_frame(video):
    window = read_window(processor(), video, start=1.0)
    assert window.frames == [25, 26, 27, 28, *[29] * 8]


def test_frames_that_are_spread_over_the_video_are_spread_over_what_follows(video):
    (window,) = WindowReader(processor(frame_sampling="segment"), video, start=0.24, whole=True)
    assert window.frames == list(range(7, 30, 2))  # the middle of each of twelve parts of frames 6 to 29


def test_candidates_of_frame_selection_cover_the_same_span(video):
    config = tiny_config(frame_oversampling=1.5)
    found = EverestVideoProcessor.from_config(config, frame_step=2)
    first, last = WindowReader(found, video, whole=True)
    assert len(first.frames) == config.num_input_frames == 18
    assert (first.frames[0], first.frames[-1], last.frames[-1]) == (0, 22, 28)


def test_a_start_after_the_end_is_an_error(video):
    with pytest.raises(VideoError, match=r"clip.mp4: shows no frame at 2 s or later; its last is at 1.16 s"):
        WindowReader(processor(), video, start=2)


def test_a_video_without_times_has_numbers_alone(tmp_path):
    for i in range(14):
        Image.fromarray(np.full((48, 64, 3), i, np.uint8)).save(tmp_path / f"{i:03d}.png")
    window = read_window(processor(), str(tmp_path))
    assert (window.frames, window.seconds) == (list(range(1, 13)), None)
    with pytest.raises(VideoError, match="tells no times, so that it can only be read from its first frame on"):
        WindowReader(processor(), str(tmp_path), start=0.5)


def test_times_are_those_of_the_file_where_its_rate_varies(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (14, 48, 64, 3), np.uint8)
    times = [*range(0, 70, 10), *range(70, 105, 5)]  # hundredths of a second
    path = write_video(tmp_path / "clip.mp4", frames, fps=FPS, times=times)
    window = read_window(processor(), str(path))
    assert window.seconds == pytest.approx([time / 100 for time in times[1:13]])
    assert read_window(processor(), str(path), start=0.72).frames[0] == 8
