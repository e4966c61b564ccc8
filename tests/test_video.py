"""Frame indices, reading, and one clear error for every way in which a video can be bad."""

import pickle

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from videos import (
    FORMATS,
    bad_files,
    counting_frames,
    frame_number,
    moving_frames,
    real_clips,
    write_clip,
    write_video,
)

from everest_hf.video import (
    VideoError,
    VideoInfo,
    frame_indices,
    open_video,
    probe,
    read_clip,
    read_frames,
    segment_indices,
    stride_indices,
)

CODECS = {"clip.mp4": "h264", "clip.avi": "mpeg4", "clip.mkv": "h264", "clip.webm": "vp9"}
# What the decoder prints on its own about a bad file is not ours to check.
BAD_REASONS = {
    "text": "not a video",
    "empty": "the file is empty",
    "truncated": "the file is truncated",
    "missing": "no such file",
}


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


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_those_asked_for(tmp_path, name):
    path = write_video(tmp_path / name, counting_frames(40), fps=20, **FORMATS[name])
    assert probe(path) == VideoInfo(40, fps=20.0, height=32, width=64, codec=CODECS[name], duration=2.0)
    assert probe(path.read_bytes()) == probe(path)
    indices = [31, 5, 5, 0, 39, 13]
    frames = read_frames(path, indices)
    assert frames.dtype == torch.uint8
    assert frames.shape == (6, 32, 64, 3)
    assert [frame_number(frame) for frame in frames] == indices
    assert torch.equal(read_frames(path.read_bytes(), indices), frames)


def test_frames_equal_those_of_an_independent_decoder(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", num_frames=30, g=12)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(read_frames(path, range(30)), np.stack(expected))


@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("bigbuckbunny.mp4", (132, 25.0, 720, 1280)),
        ("bikes.mp4", (250, 25.0, 272, 640)),
        ("carphone_pristine.mp4", (120, 30000 / 1001, 144, 176)),
        ("carphone_distorted.mp4", (120, 30000 / 1001, 144, 176)),
    ],
)
def test_real_clips(name, info):
    path = real_clips()[name]
    found = probe(path)
    assert (found.num_frames, round(found.fps, 3), found.height, found.width) == (
        info[0],
        round(info[1], 3),
        *info[2:],
    )
    indices = [found.num_frames - 1, 0, 50]
    with av.open(str(path)) as container:
        expected = {i: f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in indices}
    for frame, index in zip(read_frames(path, indices), indices, strict=True):
        assert np.array_equal(frame, expected[index])


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


def test_indices_outside_of_the_video_are_an_error(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", num_frames=9)
    for indices in ([9], [-1], []):
        with pytest.raises(VideoError, match="it has frames 0 to 8"):
            read_frames(path, indices)


def test_unknown_backend_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"video backend is 'tape'.*decord"):
        probe(write_clip(tmp_path / "clip.mp4"), backend="tape")


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


def clip_or_error(content: bytes):
    try:
        return read_clip(content, lambda n: stride_indices(num_video_frames=n, num_frames=4, frame_step=3)), None
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
