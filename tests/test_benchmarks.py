"""The benchmarks run as commands; what they report has the fields that tables and documents are made from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_benchmark(name: str, *options: str) -> subprocess.CompletedProcess:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def result_of(name: str, out: Path, *options: str) -> tuple[dict, str]:
    """Run a benchmark into a folder that does not exist yet; return its JSON and what it printed."""
    done = run_benchmark(name, *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
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
        assert cell["speedup"] == pytest.approx(cell["videomae"]["seconds"] / cell["everest"]["seconds"])
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


def test_model_names_a_bad_option():
    done = run_benchmark("model.py", "--keep-ratio", "1.5")
    assert done.returncode == 2
    assert "'1.5' is not a share above 0 and at most 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_loader_compares_raw_decoding_pipelines_and_prepared_videos(tmp_path):
    options = ["--videos", "ucf101", "hd", "--backends", "decord", "--files", "2", "--seconds", "1"]
    options += ["--repeats", "2", "--image-size", "64"]
    result, printed = result_of("loader.py", tmp_path / "loader.json", *options)
    check_facts(result)
    cells = {cell["task"]: cell for cell in result["results"]["tasks"]}
    assert set(cells) == {"pre-training", "fine-tuning", "fine-tuning, RandAugment"}
    for cell in cells.values():
        assert (cell["videos"], cell["backend"]) == ("ucf101", "decord")
        for name in ("raw", "pipeline", "conventional"):
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


def test_loader_names_a_backend_that_there_is_not():
    done = run_benchmark("loader.py", "--backends", "opencv")
    assert done.returncode == 2
    assert "video backend is 'opencv'; it must be one of" in done.stderr
