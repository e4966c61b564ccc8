"""Damaged videos: frames or one clear error, whatever is damaged; never a crash, never a hang."""

from functools import partial

import numpy as np
import pytest
from helpers.videos import BACKENDS, FORMATS, moving_frames, write_video

from everest_hf.data.workers import run_in_processes
from everest_hf.video import VideoError, probe, read_clip, stride_indices

CASES_PER_FORMAT = 120
NUM_FRAMES = 4
# Seconds after which a decoder that does not answer is a failure.
PATIENCE = 30


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a video of each format, by file name."""
    folder = tmp_path_factory.mktemp("valid")
    frames = moving_frames(30, 48, 64)
    return {name: write_video(folder / name, frames, **options).read_bytes() for name, options in FORMATS.items()}


def flip(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    places = rng.integers(len(data), size=rng.integers(1, 40))
    data[places] = rng.integers(256, size=len(places))
    return data


def flip_header(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flip bits of a few bytes at the start or at the end, where containers have their tables."""
    length = min(len(data), 600)
    part = data[:length] if rng.random() < 0.5 else data[-length:]
    places = rng.integers(length, size=rng.integers(1, 6))
    part[places] ^= (1 << rng.integers(8, size=len(places))).astype(np.uint8)
    return data


def truncate(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return data[: rng.integers(len(data))]


def splice(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put a piece of the file in another place of it: instead of what is there, before it, or with nothing for it."""
    start, at = rng.integers(len(data), size=2)
    length = int(rng.integers(1, 1 + len(data) // 4))
    piece = data[start : start + length]
    how = rng.integers(3)
    if how == 0:
        return np.concatenate([data[:at], piece, data[at + len(piece) :]])
    if how == 1:
        return np.concatenate([data[:at], piece, data[at:]])
    return np.concatenate([data[:at], data[at + length :]])


DAMAGES = (flip, flip_header, truncate, splice)


def damaged(content: bytes, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(content, dtype=np.uint8).copy()
    return DAMAGES[seed % len(DAMAGES)](data, rng).tobytes()


def read(case: tuple[str, int, str], alive, *, contents: dict[str, bytes], folder) -> str | tuple[int, ...]:
    """Probe a damaged file and return the shape of a clip of it, or the message of its VideoError."""
    name, seed, backend = case
    path = folder / f"{seed}-{backend}-{name}"
    path.write_bytes(damaged(contents[name], seed))
    try:
        indices_of = partial(stride_indices_of, seed=seed)
        probe(path, backend=backend, time_limit=PATIENCE / 2)
        return tuple(read_clip(path, indices_of, backend=backend, time_limit=PATIENCE / 2).shape)
    except VideoError as error:
        return str(error)
    finally:
        path.unlink()


def stride_indices_of(num_video_frames: int, seed: int) -> list[int]:
    return stride_indices(
        num_video_frames=num_video_frames, num_frames=NUM_FRAMES, frame_step=3, segment=seed % 3, num_segments=3
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_files_give_frames_or_one_error(backend, name, contents, tmp_path):
    cases = [(name, seed, backend) for seed in range(CASES_PER_FORMAT)]
    seen = {"frames": 0, "error": 0}
    for place, result in run_in_processes(partial(read, contents=contents, folder=tmp_path), cases, patience=PATIENCE):
        case = cases[place]
        if isinstance(result, tuple):
            assert result[:2] == (NUM_FRAMES, 3), case
            seen["frames"] += 1
        else:
            assert isinstance(result, str), (case, result)  # otherwise the process was lost
            assert result.startswith(f"{tmp_path / f'{case[1]}-{backend}-{name}'}: "), case
            assert len(result.splitlines()) == 1, case
            assert "took longer" not in result, case
            seen["error"] += 1
    assert min(seen.values()) > 0, seen
