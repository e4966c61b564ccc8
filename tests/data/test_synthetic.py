import numpy as np
import pytest

from everest_hf.data import class_names_of, load_videos, synthetic
from everest_hf.data.synthetic import DIRECTIONS, MotionVideos, label_of, render, write_motion_videos
from everest_hf.video import probe, read_frames

SPEC = MotionVideos(num_train=16, num_val=8, num_frames=7, height=48, width=80, fps=10, num_sprites=6)
SPLITS = {"train": 16, "val": 8}


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.mp4")}


def frames_and_labels(folder, spec):
    """All videos of a split's folder, decoded: uint8 (V, T, H, W, 3), and their classes (V,)."""
    paths = sorted(folder.glob("*/*.mp4"))
    frames = np.stack([np.asarray(read_frames(path, range(spec.num_frames))) for path in paths])
    return frames, np.array([DIRECTIONS.index(path.parent.name) for path in paths])


def seen_direction(frames):
    """The direction in which frames (T, H, W, 3) look most like themselves two frames later."""
    frames = frames.astype(float)
    errors = []
    for k in range(len(DIRECTIONS)):
        angle = 2 * np.pi * k / len(DIRECTIONS)
        shift = round(-4.5 * np.sin(angle)), round(4.5 * np.cos(angle))
        errors.append(np.abs(frames[2:] - np.roll(frames[:-2], shift, axis=(1, 2))).mean())
    return int(np.argmin(errors))


def linear_accuracy(train, train_labels, val, val_labels):
    """Top-1 of ridge regression from features (V, F) to classes."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, val = (train - mean) / scale, (val - mean) / scale
    targets = np.eye(len(DIRECTIONS))[train_labels] - 1 / len(DIRECTIONS)
    weights = np.linalg.solve(train.T @ train + len(train) * np.eye(train.shape[1]), train.T @ targets)
    return float(((val @ weights).argmax(1) == val_labels).mean())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_motion_videos(tmp_path_factory.mktemp("motion") / "set", SPEC)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Decoded videos and classes of both splits, of the default kind."""
    spec = MotionVideos(num_train=320, num_val=160, num_frames=6)
    folder = write_motion_videos(tmp_path_factory.mktemp("motion") / "many", spec)
    return {split: frames_and_labels(folder / split, spec) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_every_video_is_there_with_its_class_and_sizes(written, split):
    rows = load_videos(str(written / split))
    assert sorted(class_names_of(rows)) == sorted(DIRECTIONS)
    assert len(rows) == SPLITS[split]
    assert np.bincount(rows["label"]).tolist() == [SPLITS[split] // 8] * 8
    for path in (written / split).glob("*/*.mp4"):
        info = probe(path)
        assert (info.num_frames, info.height, info.width, info.fps) == (7, 48, 80, 10)
        assert path.parent.name == label_of(int(path.stem))


@pytest.mark.parametrize("split", SPLITS)
def test_files_hold_what_was_drawn(written, split):
    for index in range(8):
        path = written / split / label_of(index) / f"{index:05d}.mp4"
        error = np.abs(np.asarray(read_frames(path, range(7)), int) - render(SPEC, split, index))
        assert error.mean() < 5  # of 256: colour at half resolution and compression


def test_a_video_depends_on_seed_split_and_index_alone(written, tmp_path):
    fewer = MotionVideos(num_train=8, num_val=8, num_frames=7, height=48, width=80, fps=10, num_sprites=6)
    files, all_files = files_of(write_motion_videos(tmp_path / "fewer", fewer)), files_of(written)
    assert len(files) == 16
    assert all(all_files[name] == content for name, content in files.items())
    drawn = [render(SPEC, "train", 0), render(SPEC, "val", 0), render(SPEC, "train", 8)]
    drawn.append(render(MotionVideos(num_frames=7, height=48, width=80, num_sprites=6, seed=1), "train", 0))
    for i, one in enumerate(drawn):
        assert not any(np.array_equal(one[0], other[0]) for other in drawn[:i])


def test_a_finished_set_is_kept(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert write_motion_videos(written, SPEC) == written
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_a_folder_with_something_else_is_refused(written, tmp_path):
    with pytest.raises(ValueError, match=r"another specification.*manifest\.json"):
        write_motion_videos(written, MotionVideos(num_train=16, num_val=8, seed=1))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than motion videos"):
        write_motion_videos(tmp_path, SPEC)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"notes\.txt"):
        write_motion_videos(tmp_path / "notes.txt" / "set", SPEC)


def test_an_interrupted_set_never_has_its_final_name(written, tmp_path, monkeypatch):
    encode, count = synthetic._encode, iter(range(100))

    def fail_at_the_tenth(frames, path, spec):
        if next(count) == 10:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        encode(frames, path, spec)

    monkeypatch.setattr(synthetic, "_encode", fail_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        write_motion_videos(tmp_path / "set", SPEC)
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    assert files_of(write_motion_videos(tmp_path / "set", SPEC)) == files_of(written)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# ------------------------------------------------------------------------------ the class is the motion, nothing else


def test_what_is_drawn_does_not_depend_on_the_class():
    first = [synthetic._draw(SPEC, np.random.default_rng(3), k) for k in range(len(DIRECTIONS))]
    assert all(np.array_equal(frames[0], first[0][0]) for frames in first)
    assert len({frames[1].tobytes() for frames in first}) == len(DIRECTIONS)


def test_frames_close_at_their_edges():
    """Moving sprites is rolling the frame, so that a uniform start makes every frame of a clip as likely as any."""

    def painted(x, y):
        frames = np.zeros((1, SPEC.height, SPEC.width, 3))
        synthetic._paint_formation(frames, np.array([[x, y]]), np.random.default_rng(4), SPEC)
        return frames[0]

    still = painted(2.25, 5.5)
    assert still.any()
    for dx, dy in ((1, 0), (0, 1), (-3, 7), (SPEC.width, -SPEC.height), (41, 29)):
        np.testing.assert_allclose(painted(2.25 + dx, 5.5 + dy), np.roll(still, (dy, dx), axis=(0, 1)), atol=1e-9)


def test_the_motion_survives_compression_and_tells_the_class(many):
    frames, labels = many["val"]
    assert np.mean([seen_direction(clip) == label for clip, label in zip(frames, labels, strict=True)]) > 0.97
    opposite = (labels + len(DIRECTIONS) // 2) % len(DIRECTIONS)
    backwards = [seen_direction(clip[::-1]) for clip in frames]
    assert np.mean(backwards == opposite) > 0.97


@pytest.mark.parametrize("position", [0, -1])
def test_a_single_frame_does_not_tell_the_class(many, position):
    def features(frames):  # (V, T, H, W, 3) to grey (V, 16 * 16)
        return frames[:, position].reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4, 5)).reshape(len(frames), -1)

    (train, train_labels), (val, val_labels) = many["train"], many["val"]
    found = linear_accuracy(features(train), train_labels, features(val), val_labels)
    assert found < 0.25  # chance is 0.125 with a standard deviation of 0.026


def test_colours_and_brightness_do_not_tell_the_class(many):
    frames, labels = map(np.concatenate, zip(*many.values(), strict=True))
    looks = np.concatenate([frames.mean(axis=(1, 2, 3)), frames.std(axis=(1, 2, 3))], axis=1)  # (V, 6)
    means = np.stack([looks[labels == k].mean(0) for k in range(len(DIRECTIONS))])
    deviation = looks.std(0) / np.sqrt(len(labels) / len(DIRECTIONS))
    assert (np.abs(means - looks.mean(0)) < 4 * deviation).all()


# ------------------------------------------------------------------------------------------------------ wrong values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_train": 0}, "num_train=0 must be at least 1"),
        ({"num_val": -1}, "num_val=-1"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"height": 60}, "height=60 must be an even multiple of spacing=16"),
        ({"width": 45, "spacing": 15, "height": 60}, "width=45 must be an even multiple"),
        ({"num_sprites": 17}, "num_sprites=17 must be at most the 16 places"),
        ({"radius": (5.0, 8.0)}, r"radius=\(5.0, 8.0\)"),
        ({"radius": (6.0, 5.0)}, "radius"),
        ({"speed": (0.0, 1.0)}, "speed"),
        ({"noise": -1.0}, "noise=-1.0 must be 0 or more"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_an_impossible_specification_names_the_field(values, message):
    with pytest.raises(ValueError, match=message):
        MotionVideos(**values)
