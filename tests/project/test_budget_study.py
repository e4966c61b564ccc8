"""The budget study: that its model is the package's, that its budgets add up, and that it runs through."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import budget_runs
import budget_study
import motion_runs
import numpy as np
import processes
import pytest
import torch
from budget_runs import LEAST, MOST, Arm, BudgetModel, TruthBench
from motion_clips import MotionClips, Split

from everest_hf import EverestForVideoClassification
from everest_hf.camera_everest import camera_moves, changes_beside_camera
from everest_hf.configuration_everest import share_of

SIZE = motion_runs.SIZES["smoke"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> TruthBench:
    bench = TruthBench(SIZE, tmp_path_factory.mktemp("budget"), torch.device("cpu"))
    budget_runs.prepare(bench, "clips", "test")
    return bench


def pixels_and_model(bench: TruthBench, arm: Arm) -> tuple[torch.Tensor, BudgetModel]:
    torch.manual_seed(0)
    config = bench.config(keep_ratio=arm.keep_ratio)
    model = BudgetModel._from_config(config, attn_implementation="masked").eval()
    model.set_up(arm, bench)
    return bench.batch("clips", "test", torch.arange(32), config), model


def test_with_the_same_share_of_every_clip_the_model_is_the_package_s(bench):
    pixels, model = pixels_and_model(bench, Arm("clips", 0, 0.3))
    plain = EverestForVideoClassification(model.config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels).logits, plain(pixels).logits, rtol=1e-4, atol=1e-6)


def test_by_threshold_a_clip_s_logits_depend_on_the_clip_alone(bench):
    pixels, model = pixels_and_model(bench, Arm("clips", 0, 0.3, budget="batch"))
    with torch.inference_mode():
        model.thresholds[0.3] = model.score(pixels).quantile(0.7).item()
        together = model(pixels).logits
        counts = model.counts.pop()
        alone = torch.cat([model(clip).logits for clip in pixels.split(1)])
    assert len(counts.unique()) > 4
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_a_batch_takes_its_highest_scores_within_the_bounds_of_a_clip(ratio):
    scores = torch.rand(6, 100) * torch.tensor([0.01, 0.5, 1, 1, 2, 9])[:, None]
    least, most = share_of(LEAST, 100), share_of(MOST, 100)
    counts, rest = [least] * 6, []
    for clip, row in enumerate(scores.tolist()):
        rest += [(score, clip) for score in sorted(row, reverse=True)[least:most]]
    for _, clip in sorted(rest, reverse=True)[: share_of(ratio, 600) - 6 * least]:
        counts[clip] += 1
    assert budget_runs.counts_of_batch(scores, ratio).tolist() == counts


def test_the_true_move_of_a_camera_takes_the_background_away_and_is_found():
    spec = MotionClips(num_frames=4, action_frames=4, num_moving=2, noise=0.0, pan=4.0, shake=0.0)
    split, index = Split(spec, "val"), 16  # the camera moves in the second round of the classes
    clip = torch.from_numpy(split.draw(index)).permute(0, 3, 1, 2)[None]  # (1, T, C, H, W)
    cover, camera = split.draw_truth(index)
    moves = torch.from_numpy(-np.diff(camera, axis=0).round().astype(int))[None]
    assert moves.any()
    assert 0 < cover.mean() < 0.3
    slots = clip[:, :, None].float() / 255
    background = cover[1:] + cover[:-1] == 0
    changes = [slots.diff(dim=1), changes_beside_camera(slots, moves)]
    plain, compensated = (change.abs().mean(3)[0, :, 0].numpy()[background] for change in changes)
    assert np.median(compensated) < np.median(plain) / 2
    assert (camera_moves(slots) - moves).abs().max() <= 1


def test_more_sprites_cover_more_where_their_number_is_drawn():
    split = Split(MotionClips(num_moving=8, fewest_moving=1), "val")
    cover = [split.draw_truth(index)[0].mean() for index in range(16)]
    assert max(cover) > 3 * min(cover) > 0


@pytest.mark.slow
def test_a_study_runs_through_and_goes_on_where_it_was(tmp_path):
    size = dataclasses.replace(SIZE, counts={"train": 16, "test": 64}, pretraining_steps=2, finetuning_steps=2)
    processes.start_process(partial(TruthBench, size, tmp_path, torch.device("cpu")), torch.get_num_threads())
    with ThreadPoolExecutor(1) as executor:
        found = budget_study.study(size, 1, executor)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert budget_study.study(size, 1, executor) == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert len(found["arms"]) == len(budget_study.plan(0))
    assert all(0 <= f["top1"]["all"]["mean"] <= 100 for arm in found["arms"] for f in arm["figures"].values())
    assert "| batch 0.3 | 0.2 |" in budget_study.tables(found["arms"])
