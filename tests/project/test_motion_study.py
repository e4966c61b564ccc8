"""The motion study: what its clips tell and what they do not, and that it runs through."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import motion_clips
import motion_report
import motion_runs
import motion_study
import numpy as np
import processes
import pytest
import torch
from motion_clips import CLASSES, CONDITIONS, DIRECTIONS, SPEEDS, MotionClips, Split

ONE_SPRITE = MotionClips(num_frames=32, action_frames=32, num_moving=1, num_still=2, noise=0.0)


def displacement(clip: np.ndarray, frames: int) -> np.ndarray:
    """How far the things that move have gone after so many frames, in y, x, by correlation; frames close at edges."""
    moving = np.abs(clip.astype(float) - np.median(clip, axis=0)).sum(axis=-1)  # (T, H, W)
    first, last = (np.fft.fft2(moving[t]) for t in (0, frames))
    peak = np.unravel_index(np.fft.ifft2(last * first.conj()).real.argmax(), moving.shape[1:])
    return np.array([(at + side // 2) % side - side // 2 for at, side in zip(peak, moving.shape[1:], strict=True)])


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_a_class_is_a_direction_and_a_speed(label):
    y, x = displacement(Split(ONE_SPRITE, "test").draw(label), frames=8) / 8
    speed, direction = divmod(label, DIRECTIONS)
    low, high = list(SPEEDS.values())[speed]
    assert low - 0.2 < np.hypot(x, y) < high + 0.2
    turn = np.angle(np.exp(1j * (np.arctan2(-y, x) - 2 * np.pi * direction / DIRECTIONS)))
    assert abs(turn) < np.pi / DIRECTIONS


def test_a_single_frame_does_not_tell_the_class(monkeypatch):
    split = Split(MotionClips(), "train")
    right = split.draw(0)
    monkeypatch.setattr(motion_clips, "label_of", lambda index: DIRECTIONS // 2)
    left = split.draw(0)
    assert np.array_equal(right[0], left[0])
    assert not np.array_equal(right[-1], left[-1])


def test_the_camera_moves_and_the_light_flickers_in_their_turns():
    spec = MotionClips(num_moving=0, noise=0.0, flicker=0.1)
    split, rounds = Split(spec, "val"), [i * len(CLASSES) for i in range(len(CONDITIONS))]
    clips = {motion_clips.condition_of(i): split.draw(i).astype(float) for i in rounds}
    light = {name: clip.mean(axis=(1, 2, 3)) for name, clip in clips.items()}
    assert (clips["still camera"] == clips["still camera"][0]).all()
    assert not (clips["moving camera"] == clips["moving camera"][0]).all()
    assert light["still camera, flicker"].std() > 4 * light["moving camera"].std()


def test_splits_share_neither_backgrounds_nor_sprites():
    splits = [Split(MotionClips(stock=8), name) for name in motion_clips.SPLITS]
    stocks = [{image.tobytes() for image in (*split.backgrounds, *split.sprites)} for split in splits]
    assert [len(stock) for stock in stocks] == [16] * 3
    assert len(set.union(*stocks)) == 48


def test_arms_of_equal_time_take_it():
    size = motion_runs.SIZES["cpu"]
    kinds = [motion_runs.pretraining_kind(t) for t in motion_runs.TARGETS if t]
    kinds += [motion_runs.finetuning_kind(s, r, 1.0) for s in motion_runs.SELECTIONS for r in motion_runs.RATIOS]
    seconds = {kind: 0.01 * (i + 1) for i, kind in enumerate(kinds)}
    arms = motion_study.plan(size, seconds, seed=0, questions=["tokens", "initialisation"])
    wanted = size.finetuning_steps * seconds[motion_runs.finetuning_kind("motion", 0.6, 1.0)]
    for name in ("motion 1", "motion 0.3", "random 0.3"):
        run = arms["tokens", f"{name}, equal time"]
        step = seconds[motion_runs.finetuning_kind(run.selection, run.keep_ratio, 1.0)]
        assert run.steps * step == pytest.approx(wanted, abs=step)
    # One run where two questions ask for the same.
    assert arms["tokens", "motion 0.6"] == arms["initialisation", "EVEREST"]


def test_a_crop_is_the_clip_moved_by_whole_pixels():
    clip = torch.arange(2 * 3 * 40 * 44).float().view(1, 2, 3, 40, 44)
    crops = motion_runs.random_crops(clip.expand(64, -1, -1, -1, -1))
    assert crops.shape == (64, 2, 3, 40, 44)
    middle, places = clip[0, ..., 16:24, 16:28], set()  # in all crops, and in no mirror
    for crop in crops:
        y, x = (crop[0, 0] == middle[0, 0, 0, 0]).nonzero().squeeze().tolist()
        assert torch.equal(crop[..., y : y + 8, x : x + 12], middle)
        places.add((y - 16, x - 16))
    assert len(places) > 32
    assert all(abs(moved) <= motion_runs.CROP_REACH for place in places for moved in place)


def test_a_step_takes_several_crops_of_a_clip(tmp_path):
    bench = motion_runs.Bench(motion_runs.SIZES["smoke"], tmp_path, torch.device("cpu"))
    draw = Split(bench.size.clips, "train").draw
    motion_clips.write_clips(draw, bench.size.counts["train"], motion_runs.clips_path(tmp_path, "clips", "train"))
    pixels, labels = bench.draw("clips", bench.config(), num_sample=4)
    assert len(pixels) == len(labels) == bench.size.batch
    assert torch.equal(labels[::4].repeat_interleave(4), labels)
    assert not torch.equal(pixels[0], pixels[1])


@pytest.mark.slow
def test_a_study_runs_through_and_goes_on_where_it_was(tmp_path):
    size = motion_runs.SIZES["smoke"]
    make_bench = partial(motion_runs.Bench, size, tmp_path, torch.device("cpu"))
    processes.start_process(make_bench, torch.get_num_threads())
    with ThreadPoolExecutor(1) as executor:
        found = motion_study.study(size, 1, list(motion_study.QUESTIONS), executor)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        again = motion_study.study(size, 1, list(motion_study.QUESTIONS), executor)
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert len(found["arms"]) == 35
    assert all(0 <= arm["top1"]["all"]["mean"] <= 100 for arm in found["arms"])
    assert "| motion 0.3, equal time |" in motion_report.tables(found)
    motion_report.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
