"""The study of few labels: its arms, its draws of labels, and that it runs through."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import few_labels
import few_labels_report
import few_labels_runs
import processes
import pytest
import torch
from few_labels_report import EVEREST, NONE, NONE_LONGER, RANDOM_LONGER, TUBES_SHORTER
from few_labels_runs import FINETUNING_KIND, SIZES, Bench
from motion_clips import MotionClips
from motion_runs import pretraining_kind

from everest_hf.data.synthetic import DIRECTIONS, MotionVideos

SECONDS = {
    pretraining_kind("everest"): 0.02,
    pretraining_kind("tube"): 0.05,
    pretraining_kind("random"): 0.018,
    FINETUNING_KIND: 0.01,
}


LRS = {"everest": 5e-3, "tube": 2e-3, "random": 2e-3}


def firsts_of(size, seeds=3):
    return [few_labels.pretrainings(size, SECONDS, seed, LRS) for seed in range(seeds)]


def test_arms_of_equal_time_take_it():
    size = SIZES["cpu"]
    before = size.pretraining_steps * SECONDS[pretraining_kind("everest")]
    firsts = firsts_of(size)
    rates = {(arm, labels): 1e-3 for arm in firsts[0] for labels in size.labels}
    longer = [few_labels.in_equal_time("random", size, SECONDS, seed, LRS) for seed in range(3)]
    runs = few_labels.finetunings(size, SECONDS, 5, firsts, longer, rates)
    for arm in (TUBES_SHORTER, RANDOM_LONGER):
        first = runs[arm, 8][0].pretraining
        step = SECONDS[pretraining_kind(first.targets)]
        assert first.steps * step == pytest.approx(before, abs=step)
    long_run = runs[NONE_LONGER, 8][0]
    assert (long_run.steps - size.finetuning_steps) * SECONDS[FINETUNING_KIND] == pytest.approx(before, abs=0.01)
    assert {len(each) for (arm, _), each in runs.items() if arm != NONE_LONGER} == {15}


def test_every_arm_has_the_same_trials():
    size, (firsts,) = SIZES["cpu"], firsts_of(SIZES["cpu"], seeds=1)
    tried = few_labels.trials(size, firsts, size.labels)
    trials_of = {arm: sum(key[0] == arm for key in tried) for arm in firsts}
    assert set(trials_of.values()) == {len(size.labels) * len(size.finetuning_rates)}
    assert {NONE, EVEREST, TUBES_SHORTER} < set(trials_of)
    rates = {targets: [lr for other, lr in few_labels.first_trials(size) if other == targets] for targets in LRS}
    assert set(map(tuple, rates.values())) == {size.pretraining_rates}


def test_the_rate_of_a_pretraining_is_the_one_that_fine_tunes_best_on_validation_clips(monkeypatch):
    def results(executor, runs, description):
        worth = {1e-3: 0.2, 2e-3: 0.5, 5e-3: 0.4}  # as if the middle one were best, at one rate of fine-tuning
        return {run: {"val": worth[run.pretraining.lr] * (run.lr == 3e-3)} for run in runs if hasattr(run, "draw")}

    monkeypatch.setattr(few_labels, "run_all", results)
    assert few_labels.choose_pretraining_rates(SIZES["cpu"], None) == dict.fromkeys(LRS, 2e-3)


@pytest.mark.parametrize("spec", [MotionVideos(), MotionClips()], ids=["quickstart", "clutter"])
def test_clips_of_the_splits_differ_and_repeat(tmp_path, spec):
    clips = {split: few_labels_runs.draw_clip(spec, split)(3) for split in few_labels_runs.SPLITS}
    assert len({clip.tobytes() for clip in clips.values()}) == 3
    assert (few_labels_runs.draw_clip(spec, "test")(3) == clips["test"]).all()


def test_a_draw_has_as_many_of_each_class_and_more_labels_add_to_it(tmp_path):
    bench = Bench(SIZES["cpu"], tmp_path, torch.device("cpu"))
    each = few_labels_runs.LABELLED // len(DIRECTIONS)
    clips = bench.labelled(0, each)
    assert torch.equal(clips % len(DIRECTIONS), torch.arange(len(DIRECTIONS)).repeat_interleave(each))
    assert clips.unique().numel() == clips.numel() == few_labels_runs.LABELLED
    assert set(bench.labelled(0, 4).tolist()) < set(bench.labelled(0, 8).tolist())
    assert not torch.equal(bench.labelled(0, 8), bench.labelled(1, 8))


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
    processes.start_process(partial(Bench, size, tmp_path, torch.device("cpu")), torch.get_num_threads())
    with ThreadPoolExecutor(1) as executor:
        found = few_labels.study(size, 2, 2, executor)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        again = few_labels.study(size, 2, 2, executor)
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert len(found["finetuning"]) == 5 * 2 + 2
    assert all(0 <= figures["top1"]["mean"] <= 100 for figures in found["finetuning"])
    assert f"| {NONE_LONGER} |" in few_labels_report.tables(found)
    few_labels_report.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
