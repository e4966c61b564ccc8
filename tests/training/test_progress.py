"""What a person sees of a run: log, bar, trackers, advice, errors that come early and once."""

import json
import logging.handlers
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.commands import PATIENCE, ROOT, Run, train, train_on
from helpers.tiny import tiny_config
from helpers.videos import write_class_folders
from test_distributed import PRETRAIN
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.data import load_videos
from everest_hf.training.build import build_model
from everest_hf.training.logging import Bar, Meter, RunLog, check_tracker, read_log
from everest_hf.training.recipe import load_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos" / "train", ("left", "right", "up"), 3)
    recipe = {name: value for name, value in PRETRAIN.items() if name != "val"} | {"epochs": 2, "batch_size": 2}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(recipe))
    return folder


# ----------------------------------------------------------------------------------------------------------- figures


def test_the_meter_by_hand(monkeypatch):
    """Two steps of 4 clips in 10 seconds, 3 of them waiting; 5 seconds of an evaluation between them do not count."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def batches():
        for waiting in (1, 2):
            now[0] += waiting
            yield {}

    meter = Meter(CPU)
    for loss, _ in zip((0.5, 0.25), meter.timed(batches()), strict=True):
        now[0] += 3.5
        meter.add(torch.tensor(loss), 4)
        with meter.paused():
            now[0] += 2.5
    figures = meter.read(steps_left=6)
    wanted = {"loss": 0.375, "seconds": 10, "clips_per_second": 0.8, "data_wait": 0.3, "eta_seconds": 30}
    assert figures == pytest.approx(wanted)
    now[0] += 1
    meter.add(torch.tensor(8.0), 4)
    assert meter.read(steps_left=0)["loss"] == 8


def test_the_meter_goes_on_from_its_state():
    one, other = Meter(CPU), Meter(CPU)
    one.add(torch.tensor(0.3), 4)
    other.load_state_dict(one.state_dict())
    for meter in (one, other):
        meter.add(torch.tensor(0.4), 4)
    assert one.read(1)["loss"] == other.read(1)["loss"]


def test_the_bar_shows_the_peak_of_gpu_memory(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: {"cuda": 5 * 2**29}[device.type])
    for device, shown in ((torch.device("cuda"), "% waiting for data, 2.5 GiB"), (CPU, "% waiting for data]")):
        meter = Meter(device)
        meter.add(torch.tensor(0.5), 4)
        figures = meter.read(steps_left=1)
        assert figures.get("gpu_memory_gib") == (2.5 if device.type == "cuda" else None)
        with Bar("finetune", 0, 2, hidden=False, advise=str) as bar:
            bar.show({**figures, "lr": 0.1})
        assert shown in capsys.readouterr().err


def test_what_is_no_number_is_null_in_the_log(tmp_path):
    """As a step of fp16 that is left out has it; Infinity and NaN are no JSON."""
    log = RunLog(tmp_path / "log.jsonl", Accelerator())
    log.write(step=1, loss=0.5, grad_norm=math.inf)
    log.write(step=2, loss=0.25, grad_norm=2.0)
    assert log.read() == [{"step": 1, "loss": 0.5, "grad_norm": None}, {"step": 2, "loss": 0.25, "grad_norm": 2.0}]


def test_an_unfinished_last_line_of_a_log_is_none(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def tracked(place):
    """A run without decoding processes, so that it waits for its data, and with tensorboard where there is one."""
    tracker = "tensorboard" if _is_installed("tensorboard") else "none"
    return train("pretrain.yaml", "--output_dir", "tracked", "--report_to", tracker, cwd=place).check()


def _is_installed(name: str) -> bool:
    try:
        check_tracker(name)
    except ValueError:
        return False
    return True


def test_the_bar_and_the_log_say_how_it_goes(place, tracked):
    bar = tracked.stderr.replace("\r", "\n").splitlines()[-1]
    for part in ("8/8", "loss ", "lr ", "clips/s", "waiting for data"):
        assert part in bar
    lines = [json.loads(line) for line in (place / "tracked" / "log.jsonl").read_text().splitlines()]
    keys = {"step", "epoch", "loss", "seconds", "clips_per_second", "data_wait", "eta_seconds", "lr", "grad_norm"}
    assert [set(line) for line in lines] == [keys] * 8
    assert all(0 <= line["data_wait"] <= 1 and line["grad_norm"] > 0 for line in lines)


def test_a_run_that_waits_for_its_data_is_advised_once(tracked):
    assert tracked.stdout.count("of the time is spent waiting for data: ") == 1


def test_the_summary_is_a_table(tracked):
    _, table = tracked.stdout.split("pretrain finished: no validation set\n")
    rows = dict(line.strip().split("  ", 1) for line in table.splitlines())
    assert list(rows) == ["steps", "training loss", "model", "log and pictures"]
    assert rows["steps"].strip().startswith("8 in 0:00:")
    assert rows["model"].strip() == "tracked/model"


def test_tensorboard_has_the_figures(place, tracked):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (place / "tracked" / "everest").glob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = [json.loads(line)["loss"] for line in (place / "tracked" / "log.jsonl").read_text().splitlines()]
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(range(1, 9))
    assert [event.value for event in scalars] == pytest.approx(logged)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epohcs", 3], "did you mean '--epochs'"),
        (["--batch_size", 9], "train has 9 videos, fewer than the 18"),
        (["--report_to", "trackio"], "report_to is 'trackio', which is not installed; pip install trackio"),
    ],
)
def test_what_is_wrong_is_said_once(place, processes, arguments, message):
    if "trackio" in arguments and _is_installed("trackio"):
        pytest.skip("trackio is installed")
    if "--batch_size" in arguments:
        arguments = [*arguments, "--gradient_accumulation_steps", 2 // processes]
    results = train_on(processes, "pretrain.yaml", *arguments, "--output_dir", "no", cwd=place)
    assert [result.returncode for result in results] == [1] * processes
    lines = [line for result in results for line in result.stderr.splitlines()]
    (error,) = [line for line in lines if line.startswith("error")]
    assert message in error
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_the_launcher_of_several_processes_is_told_the_error(place, tmp_path):
    """PyTorch's launcher ends its report with what it finds in this file."""
    told = tmp_path / "error.json"
    train_on(2, "pretrain.yaml", "--epohcs", 3, cwd=place, environment={"TORCHELASTIC_ERROR_FILE": str(told)})
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(told))
    message = "error: command line: unknown key '--epohcs'; did you mean '--epochs'?"
    assert failure.message == message
    assert f"traceback : {message}\n" in str(ChildFailedError("train_accelerate.py", {0: failure}))


def test_what_a_run_does_without_is_said_once(place):
    alone, *others = train_on(2, "pretrain.yaml", "--task", "finetune", "--dry_run", cwd=place)
    warnings = [line for line in alone.check().stderr.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1] for line in warnings] == [" no --model", " no --val"]
    assert not any("warning: " in other.check().stderr for other in others)


@pytest.mark.parametrize("cls", [EverestForPreTraining, EverestForVideoClassification])
def test_of_what_is_new_in_a_model_only_more_than_the_head_is_reported(place, tmp_path, capsys, cls):
    cls(tiny_config()).save_pretrained(tmp_path / "model")
    rows, options = load_videos(place / "videos" / "train"), {"train": "videos", "model": str(tmp_path / "model")}
    reports = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(reports)
    try:
        for task in ("finetune", "probe", "pretrain"):
            build_model(load_recipe(None, {**options, "task": task}), rows)
    finally:
        logger.removeHandler(reports)
    assert not any("LOAD REPORT" in record.getMessage() for record in reports.buffer)
    said = f"model {tmp_path / 'model'} has no decoder: a new one is trained"
    printed = capsys.readouterr().out.splitlines()
    ours = [line for line in printed if "real_accelerator" not in line]  # which DeepSpeed prints when it is imported
    assert ours == [said] * (cls is not EverestForPreTraining)


def test_help_ends_all_processes_well(place):
    results = train_on(2, "--help", cwd=place)
    assert [result.returncode for result in results] == [0, 0]
    assert [bool(result.stdout) for result in results] == [True, False]


@pytest.mark.slow
def test_threads_are_the_users_where_he_chose(tmp_path):
    """Accelerate's launcher sets OMP_NUM_THREADS=1 unasked; the same value set by the user stays."""
    program = tmp_path / "count.py"
    program.write_text(
        "import torch\nfrom everest_hf.training.accelerator import build_accelerator\nfrom everest_hf.training.recipe import load_recipe\n"
        "build_accelerator(load_recipe(None, {'train': 'videos'}))\nprint(torch.get_num_threads())\n"
    )
    unasked = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    unasked |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", str(program)]
    launched = subprocess.run(command, env=unasked, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    # The process that this one is forked from had OMP_NUM_THREADS=1 at its start, as the launcher of such a user has.
    chosen = Run(cwd=tmp_path, script=program, environment={"ACCELERATE_MIXED_PRECISION": "no"}).wait()
    counts = [launched.stdout.strip(), chosen.stdout.strip()]
    assert counts == [str(len(os.sched_getaffinity(0))), "1"]
