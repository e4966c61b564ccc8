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
from budget_runs import LEAST, MOST, Arm, TruthBench
from motion_clips import MotionClips, Split

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.camera_everest import camera_moves, changes_beside_camera

SIZE = motion_runs.SIZES["smoke"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> TruthBench:
    bench = TruthBench(SIZE, tmp_path_factory.mktemp("budget"), torch.device("cpu"))
    budget_runs.prepare(bench, "clips", "test")
    return bench


def test_true_scores_take_the_place_of_the_model_s_own(bench):
    torch.manual_seed(0)
    fields = {"keep_ratio": 0.3, **budget_runs.budget_fields("batch")}
    model = EverestForVideoClassification(bench.config(**fields)).train()
    budget_runs.score_by_truth(model, "true sprites", bench)
    output = model(bench.batch("clips", "test", torch.arange(16), model.config), output_scores=True)
    cover = bench.truth("true sprites")
    assert (output.scores - cover).abs().max() < 1e-3
    taken = torch.cat([cover[i, ids[ids >= 0]] for i, ids in enumerate(output.kept_ids)])
    assert taken.mean() > 3 * cover.mean()


@pytest.mark.parametrize("arm", [Arm("clips", 0, 0.3), Arm("clips", 0, 0.3, budget="batch")])
def test_the_tokens_of_an_arm_are_counted_by_condition(bench, arm):
    torch.manual_seed(0)
    budget_runs.prepare(bench, "clips", "train")
    fields = {"keep_ratio": arm.keep_ratio, **budget_runs.budget_fields(arm.budget)}
    found = budget_runs.evaluate_at(bench, EverestForVideoClassification(bench.config(**fields)), arm, 0.2)
    counts = list(found["tokens"].values())
    assert sum(counts) / len(counts) == pytest.approx(51, abs=0 if arm.budget == "clip" else 8)
    assert (len(set(counts)) == 1) is (arm.budget == "clip")


def test_pretraining_that_shares_is_the_package_s_where_clips_are_alike(bench):
    torch.manual_seed(0)
    ours = budget_runs.SharedPretraining(bench.config(min_keep_ratio=LEAST, max_keep_ratio=MOST))
    theirs = EverestForPreTraining(ours.config)
    theirs.load_state_dict(ours.state_dict())
    pixels = bench.batch("clips", "test", torch.arange(1), ours.config).repeat(3, 1, 1, 1, 1)
    losses = torch.tensor([[model(pixels).loss.item() for model in (ours, theirs)] for _ in range(10)])
    (mean, other), spread = losses.mean(dim=0).tolist(), losses.std()  # the draws differ
    assert mean == pytest.approx(other, abs=2 * spread.item())
    ours(pixels).loss.backward()
    assert all(weight.grad is not None for weight in ours.parameters())


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
