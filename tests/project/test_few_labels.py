"""The study of few labels: its arms, its draws of labels, and that it runs through."""

from concurrent.futures import ThreadPoolExecutor

import few_labels
import few_labels_report
import few_labels_runs
import pytest
import torch
from few_labels_report import EVEREST, NONE, NONE_LONGER, TUBES_SHORTER
from few_labels_runs import FINETUNING_KIND, SIZES, Bench, pretraining_kind
from motion_clips import MotionClips

from everest_hf.data.synthetic import DIRECTIONS, MotionVideos

SECONDS = {
    pretraining_kind("everest"): 0.02,
    pretraining_kind("tube"): 0.05,
    pretraining_kind("random"): 0.018,
    FINETUNING_KIND: 0.01,
}


def test_arms_of_equal_time_take_it():
    size = SIZES["cpu"]
    before = size.pretraining_steps * SECONDS[pretraining_kind("everest")]
    shorter = few_labels.pretrainings(size, SECONDS, seed=0)[TUBES_SHORTER]
    assert shorter.steps * SECONDS[pretraining_kind("tube")] == pytest.approx(before, abs=0.05)
    rates = {(arm, n): 1e-3 for arm in few_labels.pretrainings(size, SECONDS, seed=0) for n in size.labels}
    runs = few_labels.finetunings(size, SECONDS, draws=5, seeds=3, rates=rates)
    long_run = runs[NONE_LONGER, 8][0]
    assert (long_run.steps - size.finetuning_steps) * SECONDS[FINETUNING_KIND] == pytest.approx(before, abs=0.01)
    assert {len(arms) for (arm, _), arms in runs.items() if arm != NONE_LONGER} == {15}


def test_every_arm_has_the_same_trials_and_draws():
    size = SIZES["cpu"]
    tried = few_labels.trials(size, SECONDS)
    arms = {arm for arm, _, _ in tried}
    assert {sum(key[0] == arm for key in tried) for arm in arms} == {len(size.labels) * len(size.learning_rates)}
    assert {NONE, EVEREST} <= arms


@pytest.mark.parametrize("spec", [MotionVideos(), MotionClips()], ids=["quickstart", "clutter"])
def test_clips_of_the_splits_differ_and_repeat(tmp_path, spec):
    clips = {split: few_labels_runs.draw_clip(spec, split)(3) for split in few_labels_runs.SPLITS}
    assert len({clip.tobytes() for clip in clips.values()}) == 3
    assert (few_labels_runs.draw_clip(spec, "test")(3) == clips["test"]).all()


def test_a_draw_has_as_many_of_each_class_and_more_labels_add_to_it(tmp_path):
    orders = Bench(SIZES["cpu"], tmp_path, torch.device("cpu")).labelled
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(
        orders[0] % len(DIRECTIONS), torch.arange(len(DIRECTIONS))[:, None].expand(-1, orders[0].shape[1])
    )
    assert orders[0].unique().numel() == orders[0].numel() == few_labels_runs.LABELLED


def test_leads_are_of_pairs_of_draw_and_seed():
    def arm(name, tops):
        runs = [{"draw": draw, "seed": seed, "top1": top1} for (draw, seed), top1 in tops.items()]
        return {"arm": name, "labels": 8, "runs": runs}

    found = {"finetuning": [arm(EVEREST, {(0, 0): 80.0, (1, 1): 90.0}), arm(NONE, {(1, 1): 70.0, (0, 0): 50.0})]}
    (lead,) = few_labels_report.gains(found)
    assert lead == {"arm": NONE, "labels": 8, "mean": 25.0, "error": pytest.approx(5.0), "pairs": 2}


@pytest.mark.slow
def test_a_study_runs_through_and_goes_on_where_it_was(tmp_path):
    size = SIZES["smoke"]
    few_labels.start_process(size, tmp_path, torch.device("cpu"), torch.get_num_threads())
    with ThreadPoolExecutor(1) as executor:
        found = few_labels.study(size, 2, 2, executor)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        again = few_labels.study(size, 2, 2, executor)
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert len(found["finetuning"]) == 5 * 2 + 1
    assert all(0 <= figures["top1"]["mean"] <= 100 for figures in found["finetuning"])
    assert f"| {NONE_LONGER} |" in few_labels_report.tables(found)
    few_labels_report.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
