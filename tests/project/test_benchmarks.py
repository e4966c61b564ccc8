"""The benchmarks run as commands; what they report has the fields that tables and documents are made from."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT, Result, Run
from helpers.videos import real_clips

from everest_hf.selection_everest import patchify


def run_benchmark(name: str, *options, cwd: Path) -> Result:
    return Run(*options, cwd=cwd, script=ROOT / "benchmarks" / name).wait()


def result_of(name: str, out: Path, *options: str) -> tuple[dict, str]:
    """Run a benchmark into a folder that does not exist yet; return its JSON and what it printed."""
    done = run_benchmark(name, *options, "--out", out, cwd=next(path for path in out.parents if path.exists())).check()
    assert "100%" in done.stderr  # the progress bar reached its end
    return json.loads(out.read_text()), done.stdout


def check_facts(result: dict) -> None:
    assert set(result["versions"]) == {"python", "torch", "transformers", "everest-hf"}
    assert result["hardware"]["threads"] == 1
    assert result["hardware"]["cpu"]
    assert result["date"][:2] == "20"
    assert "--out" in result["command"]


def check_timing(figures: dict, repeats: int) -> None:
    assert len(figures["seconds_all"]) == repeats
    assert 0 < figures["seconds_min"] <= figures["seconds"] <= max(figures["seconds_all"])


@pytest.mark.slow
def test_model_measures_every_task_beside_videomae(tmp_path):
    options = ["--sizes", "tiny", "--dtypes", "bf16", "--repeats", "3", "--keep-ratio", "0.5", "--device", "cpu"]
    result, printed = result_of("model.py", tmp_path / "new" / "model.json", *options)
    check_facts(result)
    assert result["settings"]["keep_ratio"] == 0.5
    assert result["settings"]["batch"] == 2
    cells = {(r["size"], r["task"], r["dtype"]): r for r in result["results"]}
    tasks = ("pretraining", "finetuning", "inference")
    assert set(cells) == {("tiny", task, "bf16") for task in tasks}
    for cell in cells.values():
        for model in ("everest", "videomae"):
            check_timing(cell[model], repeats=3)
            # Two clips of 8 frames of 3 x 48 x 48 in float32 are the least that a step holds.
            assert 2 * 8 * 3 * 48 * 48 * 4 < cell[model]["peak_bytes"] < 2**30
            assert cell[model]["clips_per_second"] == pytest.approx(2 / cell[model]["seconds"])
        low, high = cell["speedup_range"]
        assert low <= cell["speedup"] <= high
        assert cell["memory_ratio"] == pytest.approx(cell["videomae"]["peak_bytes"] / cell["everest"]["peak_bytes"])
    # 4 slots of 9 places: VideoMAE's tube leaves 1 place in each slot; EVEREST sees 0.1 of 36 and keeps half of them.
    tokens = {task: [cells["tiny", task, "bf16"][m]["tokens"] for m in ("everest", "videomae")] for task in tasks}
    assert tokens == {"pretraining": [3, 4], "finetuning": [18, 36], "inference": [18, 36]}
    assert sum(line.startswith("| tiny") for line in printed.splitlines()) == len(cells)


def test_attention_compares_both_implementations(tmp_path):
    options = ["--tokens", "12", "40", "--heads", "2", "--head-dim", "8", "--repeats", "3"]
    result, printed = result_of("attention.py", tmp_path / "attention.json", *options)
    check_facts(result)
    cells = {(r["dtype"], r["tokens"], r["pass"]): r for r in result["results"]}
    passes = ("forward", "forward+backward")
    assert set(cells) == {(dtype, n, p) for dtype in ("fp32", "bf16") for n in (12, 40) for p in passes}
    for cell in cells.values():
        for name in ("sdpa", "matmul", "blocks"):
            check_timing(cell[name], repeats=3)
            assert cell[cell["fastest"]]["seconds"] <= cell[name]["seconds"]
    assert sum(line.startswith(("| fp32", "| bf16")) for line in printed.splitlines()) == len(cells)


def test_mlp_compares_the_ways_of_inference(tmp_path):
    options = ["--sizes", "tiny", "--batches", "1", "3", "--repeats", "2"]
    result, printed = result_of("mlp.py", tmp_path / "mlp.json", *options)
    check_facts(result)
    assert [(r["size"], r["dtype"], r["batch"]) for r in result["results"]] == [("tiny", "fp32", n) for n in (1, 3)]
    for cell in result["results"]:
        for way in ("whole", "in place", "in blocks"):
            check_timing(cell[way], repeats=2)
            assert cell[way]["page_faults"] >= 0
    assert sum(line.startswith("| tiny") for line in printed.splitlines()) == 2


def test_compensation_compares_both_selections(tmp_path):
    options = ["--sizes", "tiny", "--batch", "1", "--repeats", "2", "--device", "cpu"]
    result, printed = result_of("compensation.py", tmp_path / "compensation.json", *options)
    check_facts(result)
    assert [case["task"] for case in result["results"]] == ["pretraining", "finetuning", "inference"]
    for case in result["results"]:
        for selection in ("motion", "compensated"):
            check_timing(case[selection], repeats=2)
        assert case["ratio"] > 0
    assert sum(line.startswith("| tiny") for line in printed.splitlines()) == 3


def test_packing_compares_both_budgets_of_equal_and_unequal_clips(tmp_path):
    options = ["--sizes", "tiny", "--batch", "3", "--repeats", "2", "--device", "cpu"]
    result, printed = result_of("packing.py", tmp_path / "packing.json", *options)
    check_facts(result)
    tasks = ["finetuning", "inference"]
    cases = [(case["task"], case["content"]) for case in result["results"]]
    assert cases == [(task, content) for task in tasks for content in ("equal", "unequal")]
    for case in result["results"]:
        for budget in ("clip", "batch"):
            check_timing(case[budget], repeats=2)
        assert case["ratio"] > 0
    assert sum(line.startswith("| tiny") for line in printed.splitlines()) == 4


EFFICIENCY = ["--sizes", "tiny", "--dtypes", "fp32", "--ratios", "1", "0.5", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def efficiency(tmp_path_factory):
    """A whole run: its result file, and what it printed."""
    real_clips()
    out = tmp_path_factory.mktemp("efficiency") / "new" / "efficiency.json"
    _, printed = result_of("efficiency.py", out, *EFFICIENCY)
    return out, printed


@pytest.mark.slow
def test_efficiency_measures_every_keep_ratio_beside_videomae(efficiency):
    out, printed = efficiency
    result = json.loads(out.read_text())
    check_facts(result)
    assert result["complete"]
    assert [clip["video"] for clip in result["clips"]] == [min(real_clips())]
    groups = {group["task"]: {(c["model"], c["keep_ratio"]): c for c in group["cases"]} for group in result["results"]}
    dense, kept, videomae = ("everest", 1.0), ("everest", 0.5), ("videomae", 1.0)
    # 4 slots of 9 places, as in the test of model.py.
    tokens = {task: {key: case["tokens"] for key, case in cases.items()} for task, cases in groups.items()}
    classifier = {kept: 18, dense: 36, videomae: 36}
    pretraining = {("everest", 0.3): 3, videomae: 4}
    assert tokens == {"pretraining": pretraining, "finetuning": classifier, "inference": classifier}
    for group in result["results"]:
        for case in group["cases"]:
            check_timing(case, repeats=2)
            assert case["clips_per_second"] == pytest.approx(1 / case["seconds"])
            achieved = case["flops"] / case["seconds"]
            assert case["utilisation"] == pytest.approx(achieved / group["product"]["flops_per_second"])
            assert 8 * 3 * 48 * 48 * 4 < case["peak_bytes"] < 2**30
            if case["model"] == "everest":
                assert case["flops"] == pytest.approx(case["flops_by_formula"], rel=0.01)
    for task in ("finetuning", "inference"):
        # The same network: the last product of ours is of the tokens' mean, the head's norm and what embeds differ little.
        assert 0.85 < groups[task][dense]["flops"] / groups[task][videomae]["flops"] < 1
        assert groups[task][dense]["parameters"] == pytest.approx(groups[task][videomae]["parameters"], rel=0.02)
        assert groups[task][kept]["flops"] < 0.8 * groups[task][dense]["flops"]
    assert out.with_suffix(".md").read_text() in printed
    assert printed.count("| tiny |") == 8
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_efficiency_goes_on_where_it_was_stopped(efficiency, tmp_path):
    result = json.loads(efficiency[0].read_text())
    last = result["results"].pop()
    out = tmp_path / "efficiency.json"
    out.write_text(json.dumps(result | {"complete": False}))
    resumed, _ = result_of("efficiency.py", out, *EFFICIENCY)
    assert resumed["complete"]
    assert resumed["results"][:-1] == result["results"]
    assert resumed["results"][-1]["task"] == last["task"] == "inference"
    assert resumed["results"][-1] != last


@pytest.mark.slow
def test_efficiency_finds_the_largest_batch_that_fits(tmp_path):
    real_clips()
    limit = 0.1
    options = ["--sizes", "tiny", "--dtypes", "fp32", "--ratios", "0.5", "--repeats", "1", "--device", "cpu"]
    options += ["--tasks", "finetuning", "--memory", str(limit)]
    result, printed = result_of("efficiency.py", tmp_path / "efficiency.json", *options)
    for case in result["results"][0]["cases"]:
        largest = case["largest_batch"]
        fits = {int(batch): peak for batch, peak in largest["tried"].items() if peak <= limit * 2**30}
        assert largest["batch"] == max(fits) > 2
        assert largest["peak_bytes"] == fits[largest["batch"]]
        assert f" {largest['batch']} |" in printed
        assert largest["peak_bytes"] > 0.8 * limit * 2**30


def test_efficiency_estimates_the_largest_batch(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import efficiency

    peaks = {1: 140, 2: 180}  # 40 a clip above 100
    assert efficiency.estimated_batch(peaks, 1000, low=2, high=math.inf) == 22
    assert (
        efficiency.estimated_batch(peaks | {22: 900}, 1000, low=22, high=math.inf) == 24
    )  # 36 a clip since the second
    assert efficiency.estimated_batch(peaks | {22: 1180}, 1000, low=2, high=22) == 18  # 50 a clip
    assert efficiency.estimated_batch(peaks | {22: None}, 1000, low=2, high=22) == 12  # it failed: half-way
    assert efficiency.estimated_batch({1: None}, 1000, low=0, high=1) == 1  # none left between them


def test_efficiency_writes_a_failure_down_and_goes_on(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import efficiency
    import efficiency_report

    attempt = efficiency.Attempts()
    assert attempt("small", torch.zeros, 2).tolist() == [0, 0]
    assert attempt("huge", torch.empty, 2**60) is None
    assert attempt("huge", torch.zeros, 2) is None
    (error,) = attempt.errors.values()
    assert "memory" in error
    assert "\n" not in error
    args = efficiency.arguments(["--sizes", "tiny", "--device", "cpu", "--ratios", "0.5"])
    case = efficiency.cases_of(args, "tiny", "inference", "fp32")["everest 0.5"]
    result = efficiency.result_of(case, {"peak_bytes": None}, {}, error)
    assert result == {"model": "everest", "keep_ratio": 0.5, "tokens": 18, "peak_bytes": None, "error": error}
    group = {"size": "tiny", "task": "inference", "dtype": "fp32", "cases": [result | {"model": "videomae"}, result]}
    assert error in efficiency_report.table([group])


def test_efficiency_ends_where_the_counts_differ(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import efficiency

    efficiency.check_agreement("small", 1009, 1000)
    with pytest.raises(
        SystemExit, match=r"small: torch counts 1\.02e-06 GFLOPs a clip, and everest_hf\.cost gives 1e-06"
    ):
        efficiency.check_agreement("small", 1020, 1000)


def test_leads_select_nearly_the_same_tokens_and_leave_the_model_as_it_was():
    import pretraining_leads as leads

    own = leads.EverestEmbeddings._embed_and_score
    case = leads.Case("everest", "pretraining", "tiny", "bf16", 2, 0.6, "cpu", "sdpa")
    as_it_is, wanted = leads.measure_idea(case, (), 1, None)
    assert wanted.sum() == 2 * int(0.3 * wanted.shape[1])
    results = [{"idea": leads.AS_IT_IS, **as_it_is}]
    for idea in ("scores", "half", leads.ALL):
        figures, chosen = leads.measure_idea(case, leads.IDEAS[idea], 1, wanted)
        assert 0.9 <= figures["same_tokens"] <= 1
        assert chosen.shape == wanted.shape
        results.append({"idea": idea, **figures})
    assert leads.EverestEmbeddings._embed_and_score is own
    assert "| all |" in leads.table(results)


def test_scores_in_16_bits_are_those_of_the_model_but_for_their_precision():
    import pretraining_leads as leads

    step = leads.Step(leads.Case("everest", "pretraining", "tiny", "fp32", 2, 0.6, "cpu", "sdpa"))
    embeddings, pixels = step.model.everest.embeddings, step.inputs["pixel_values"]
    patches = patchify(pixels, step.model.config.tubelet_size, step.model.config.patch_size)
    _, exact = embeddings._embed_and_score(pixels, patches)
    _, rough = leads.embed_and_score_in_bf16(embeddings, pixels, patches)
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0)


def test_a_command_on_a_gpu_gets_the_time_that_is_left():
    import gpu

    assert gpu.run_within([sys.executable, "-c", ""], 60).startswith("done")
    assert gpu.run_within([sys.executable, "-c", "raise SystemExit(3)"], 60).startswith("failed with code 3")
    assert gpu.run_within([sys.executable, "-c", "import time; time.sleep(60)"], 0.2) == "stopped, the time was up"


def test_profile_names_where_the_time_goes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import profile_steps

    case = profile_steps.Case("everest", "pretraining", "tiny", "fp32", 1, 0.6, "cpu", "sdpa")
    result = profile_steps.profile_case(case, repeats=2)
    check_timing(result, repeats=2)
    shares = result["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares) == [*profile_steps.CLASSES, "rest"]
    assert min(shares.values()) > 0
    assert set(result["operators"]) & {"aten::addmm", "aten::mm"}
    assert "| everest | tiny | fp32 | eager | pretraining |" in profile_steps.table([result])
    names = {
        "aten::addmm": "matrix products",
        "aten::bmm": "attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "aten::gelu_backward": "GELU",
        "aten::native_layer_norm": "LayerNorm",
        "aten::_fused_adamw_": "optimizer",
        "aten::_to_copy": "selection and data movement",
        "aten::add_": "rest",
    }
    assert {name: profile_steps.class_of(name) for name in names} == names


@pytest.mark.slow
def test_loader_compares_raw_decoding_pipelines_and_prepared_videos(tmp_path):
    options = ["--videos", "ucf101", "hd", "--backends", "decord", "--files", "2", "--seconds", "1"]
    options += ["--repeats", "2", "--image-size", "64"]
    result, printed = result_of("loader.py", tmp_path / "loader.json", *options)
    check_facts(result)
    cells = {cell["task"]: cell for cell in result["results"]["tasks"]}
    assert set(cells) == {"pre-training", "fine-tuning", "fine-tuning, RandAugment"}
    for cell in cells.values():
        assert (cell["videos"], cell["backend"]) == ("ucf101", "decord")
        for name in ("raw", "raw in a worker", "pipeline", "conventional"):
            check_timing(cell[name], repeats=4)  # of each of two videos
            assert cell[name]["clips_per_second"] == pytest.approx(4 / sum(cell[name]["seconds_all"]))
        assert cell["ratio"] == pytest.approx(cell["pipeline"]["clips_per_second"] / cell["raw"]["clips_per_second"])
    assert cells["pre-training"]["floors"] == {"ratio": 0.85, "speedup": 2.3}
    assert cells["fine-tuning"]["floors"] == {"ratio": None, "speedup": None}
    (prepared,) = result["results"]["prepared"]
    before, after = (prepared[state]["clips_per_second"] for state in ("before", "after"))
    assert prepared["speedup"] == pytest.approx(after / before)
    assert printed.count("| 320x240 MPEG-4 AVI | decord |") == 3
    assert printed.count("| 1280x720 H.264 | decord |") == 1


@pytest.mark.slow
def test_loader_scaling_measures_each_way_with_each_number_of_processes(tmp_path):
    options = ["--scaling", "--videos", "ucf101", "--files", "2", "--seconds", "3", "--workers", "1", "2"]
    options += ["--clips", "8", "--batch", "4", "--step-ms", "20", "--image-size", "64"]
    result, printed = result_of("loader.py", tmp_path / "scaling.json", *options)
    check_facts(result)
    cells = {(cell["way"], cell["workers"]): cell for cell in result["results"]["scaling"]}
    ways = list(dict.fromkeys(way for way, _ in cells))
    assert ways[:4] == ["raw", "prepared", "prepared, frame step", "prepared, frame step, 1 phase"]
    assert {"raw, decord", "raw, transformers", "raw, 4 clips of a video"} <= set(ways)
    assert set(cells) == {(way, workers) for way in ways for workers in (1, 2)}
    for cell in cells.values():
        assert cell["clips_per_second"] > 0
        assert cell["clips_per_processor_second"] > 0
        assert 0 <= cell["wait"] < 1
    prepared = {cell["way"]: cell for cell in result["results"]["prepared"]}
    assert list(prepared) == ways[1:4]
    assert all(0.8 < cell["ssim"] < 1 and cell["processor_seconds_per_1000"] > 0 for cell in prepared.values())
    sizes = [cell["bytes"] for cell in prepared.values()]
    assert sizes[2] < sizes[0] < sizes[1]
    assert printed.count("| 320x240 MPEG-4 AVI | ") == len(ways) + len(prepared)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.py", ["--keep-ratio", "1.5"], "'1.5' is not a share above 0 and at most 1"),
        ("loader.py", ["--backends", "opencv"], "video backend is 'opencv'; it must be one of"),
        ("loader.py", ["--scaling", "--batch", "6"], "--batch must be a multiple of 4, and --clips of --batch"),
    ],
)
def test_a_bad_option_is_named(tmp_path, name, options, message):
    done = run_benchmark(name, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_windows_are_measured_in_each_way(tmp_path):
    options = ["--size", "tiny", "--windows", "3", "--height", "96", "--minutes", "1", "--repeats", "2"]
    result, printed = result_of("windows.py", tmp_path / "windows.json", *options, "--device", "cpu")
    check_facts(result)
    cells = {cell["way"]: cell for cell in result["results"]["ways"]}
    assert list(cells) == ["everest", "everest-batches", "everest-alone", "videomae-batches", "videomae-alone"]
    for cell in cells.values():
        check_timing(cell, repeats=2)
        assert cell["windows_per_second"] == pytest.approx(3 / cell["seconds"])
        low, high = cell["speedup_range"]
        assert low <= cell["speedup"] <= high
    assert cells["everest"]["speedup_range"] == [1, 1]
    long = result["results"]["long"]
    assert (long["minutes"], long["windows"]) == (1, 16)
    assert 0 < long["peak_bytes"] < 2**29
    assert printed.count("script: ") == 4


@pytest.mark.slow
def test_predict_classifies_a_folder_in_each_way(tmp_path):
    options = ["--size", "tiny", "--videos", "3", "--repeats", "2", "--workers", "1", "--device", "cpu"]
    result, printed = result_of("predict.py", tmp_path / "predict.json", *options)
    check_facts(result)
    assert result["settings"]["keep_ratio"] == 0.6
    cells = {cell["way"]: cell for cell in result["results"]}
    assert list(cells) == ["everest", "pipeline", "loop"]
    for cell in cells.values():
        check_timing(cell, repeats=2)
        assert cell["clips_per_second"] == pytest.approx(3 / cell["seconds"])
        low, high = cell["speedup_range"]
        assert low <= cell["speedup"] <= high
    assert cells["pipeline"]["speedup_range"] == [1, 1]
    assert printed.count("VideoMAE, ") == 2
