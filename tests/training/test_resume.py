"""Runs that are killed, stopped or cannot write, and go on: to the bit as if nothing had happened."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers.commands import PATIENCE, ROOT, SCRIPT, Run, log_of, start_ranks, train, train_on
from helpers.tiny import TINY
from helpers.videos import write_class_folders, write_list
from safetensors.torch import load_file

from everest_hf.files import held

CLASSES = ("left", "right", "up")
MODEL = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
# Nine videos in steps of two batches of one clip: four steps an epoch, twelve in all, a checkpoint every second one.
# log_every divides neither, so that a checkpoint is in the middle of a line of the log.
RECIPE = {
    "train": "videos/train",
    "val": "videos/val",
    "config": {**MODEL, "drop_path_rate": 0.2},
    "frame_step": 1,
    "epochs": 3,
    "warmup_epochs": 0.5,
    "batch_size": 1,
    "gradient_accumulation_steps": 2,
    "base_lr": 0.3,
    "ema": 0.8,
    "log_every": 3,
    "save_every": 0.5,
    "num_workers": 1,
}
FINETUNE = {
    **RECIPE,
    "task": "finetune",
    "gradient_accumulation_steps": 1,
    "erasing": 0.5,
    "config": {**RECIPE["config"], "token_selection": "random"},
    "segments": 1,
    "crops": 1,
}
FINETUNE["config"].pop("num_labels")


def write_place(folder: Path, **values) -> Path:
    """Write videos and the recipes of both tasks, in which `values` differ, into a folder and return it."""
    write_class_folders(folder / "videos" / "train", CLASSES, 3)
    write_class_folders(folder / "videos" / "val", CLASSES, 1)
    pretrain = {**RECIPE, "config": {k: v for k, v in RECIPE["config"].items() if k != "num_labels"}}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump({**pretrain, **values}))
    (folder / "finetune.yaml").write_text(yaml.safe_dump({**FINETUNE, **values}))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def steady(place) -> Path:
    """The run that nobody disturbs."""
    train("pretrain.yaml", "--output_dir", "steady", cwd=place).check()
    return place / "steady"


def steps_of(folder: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*"))


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / f"step-{steps_of(folder)[-1]:08d}"


def assert_same_end(one: Path, other: Path) -> None:
    """The same log, result (the moving average) and last weights, to the bit."""
    assert log_of(one) == log_of(other)
    for file in ("model/model.safetensors", f"checkpoints/{newest(other).name}/state/model.safetensors"):
        left, right = load_file(one / file), load_file(other / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


def has_logged(folder: Path, step: int):
    log = folder / "log.jsonl"
    return lambda: log.exists() and f'"step": {step},' in log.read_text()


# ------------------------------------------------------------------------------------------------------------ killed


def test_what_a_steady_run_leaves(steady):
    lines = [line for line in log_of(steady) if "loss" in line]
    assert [(line["step"], line["epoch"]) for line in lines] == [(3, 0), (6, 1), (9, 2), (12, 2)]
    result, last = load_file(steady / "model/model.safetensors"), load_file(newest(steady) / "state/model.safetensors")
    assert not all(torch.equal(result[name], last[name]) for name in last)  # the average is not the weights
    assert len((steady / "opened_videos.jsonl").read_text().splitlines()) == 12  # of train and val
    kept = load_file(newest(steady) / "model.safetensors")
    assert all(torch.equal(result[name], kept[name]) for name in result)


def test_killed_in_a_step_of_the_middle_of_an_epoch(place, steady):
    folder = place / "in_a_step"
    Run("pretrain.yaml", "--output_dir", folder, cwd=place).kill_when(folder / "checkpoints" / "step-00000006")
    assert steps_of(folder)[-1] % 4 == 2
    train("pretrain.yaml", "--output_dir", folder, cwd=place).check()
    assert_same_end(folder, steady)


def test_killed_in_a_save(place, steady):
    folder = place / "in_a_save"
    partial = folder / "checkpoints" / ".partial-00000006"
    Run("pretrain.yaml", "--output_dir", folder, cwd=place).kill_when(partial)
    assert partial.exists()
    assert steps_of(folder) == [2, 4]
    with (folder / "log.jsonl").open("a") as log:  # a line that was being written
        log.write('{"step": 6, "lo')
    train("pretrain.yaml", "--output_dir", folder, cwd=place).check()
    assert_same_end(folder, steady)


def test_killed_while_it_balances_unequal_classes(place):
    videos = [(f"videos/train/{name}/{name}_{i}.mp4", name) for n, name in enumerate(CLASSES) for i in range(3 - n)]
    write_list(place / "unequal.txt", videos)
    arguments = ["finetune.yaml", "--train", "unequal.txt", "--epochs", 2, "--class_weights", "balanced"]
    arguments += ["--balanced_sampling", "--output_dir"]
    steady, folder = place / "balanced_steady", place / "balanced"
    train(*arguments, steady, cwd=place).check()
    weights = json.loads((steady / "model" / "config.json").read_text())["class_weights"]
    assert weights == pytest.approx([2 / 3, 1, 2])
    Run(*arguments, folder, cwd=place).kill_when(folder / "checkpoints" / "step-00000009")
    assert steps_of(folder)[-1] < 12
    train(*arguments, folder, cwd=place).check()
    assert_same_end(folder, steady)


def test_sigterm_saves_and_the_run_goes_on(place, steady):
    folder = place / "terminated"
    stopped = Run("pretrain.yaml", "--output_dir", folder, cwd=place).terminate_when(has_logged(folder, 3))
    assert stopped.returncode == 143, stopped.stderr
    step = steps_of(folder)[-1]
    assert stopped.stdout.count(f"stopped by SIGTERM after step {step}; the same command goes on from there") == 1
    assert "Traceback" not in stopped.stderr
    assert 3 <= step < 12
    train("pretrain.yaml", "--output_dir", folder, cwd=place).check()
    assert_same_end(folder, steady)


@pytest.mark.slow
def test_two_processes_go_on_after_sigterm_to_one_of_them(place):
    """Fine-tuning with drop path and erasing: each process has random states of its own."""
    arguments = ["finetune.yaml", "--epochs", 2]
    steady, folder = place / "two_steady", place / "two_terminated"
    for result in train_on(2, *arguments, "--output_dir", steady, cwd=place):
        result.check()
    runs = start_ranks(2, *arguments, "--output_dir", folder, cwd=place)
    stopped = [runs[1].terminate_when(has_logged(folder, 3)), runs[0].wait()]
    assert [result.returncode for result in stopped] == [143, 143], stopped
    assert sum(result.stdout.count("stopped by SIGTERM") for result in stopped) == 1
    assert 3 <= steps_of(folder)[-1] < 8
    for result in train_on(2, *arguments, "--output_dir", folder, cwd=place):
        result.check()
    assert_same_end(folder, steady)


LONG = ["--epochs", 300, "--save_every", 100]


@pytest.mark.slow
def test_the_end_of_the_launcher_counts_as_sigterm(place):
    """As Docker, Kubernetes and systemd send it: to the launcher alone, which passes nothing on."""
    folder = place / "launched"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1", SCRIPT]
    command += ["pretrain.yaml", "--output_dir", folder, *LONG]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        list(map(str, command)), cwd=place, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(has_logged(folder, 3))
        launcher.terminate()
        out, _ = launcher.communicate(timeout=PATIENCE)  # until nothing has this end of the pipe any more
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    step = steps_of(folder)[-1]
    assert f"stopped by SIGTERM after step {step}; the same command goes on from there" in out


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_ctrl_c_is_one_line(place):
    folder = place / "interrupted"
    result = Run("pretrain.yaml", "--output_dir", folder, *LONG, cwd=place).terminate_when(
        has_logged(folder, 3), signal.SIGINT
    )
    assert result.returncode == 130
    wanted = "interrupted; the same command goes on from the last checkpoint, if there is one"
    assert result.stderr.splitlines()[-1] == wanted
    assert "Traceback" not in result.stderr


def kill_decoders(pid: int) -> None:
    """Kill the forks of a run, if it has any now: libraries start other processes."""
    with suppress(psutil.NoSuchProcess):
        run = psutil.Process(pid)
        for child in run.children():
            with suppress(psutil.ZombieProcess):  # of those that have ended already
                if child.cmdline() == run.cmdline():
                    child.kill()


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_decoding_process_that_is_killed_is_one_line(place, steady, evaluates):
    """A kernel without memory kills the largest process, which may be one of those."""
    folder = place / f"starved_{evaluates}"
    options = LONG
    if evaluates:
        videos = sorted((place / "videos" / "train").rglob("*.mp4"))
        write_list(place / "many.txt", [(video,) for video in videos * 200])
        options = ["--eval_only", "--model", steady / "model", "--val", "many.txt"]
    run = Run("pretrain.yaml", "--output_dir", folder, *options, cwd=place)
    run.wait_until((lambda: True) if evaluates else has_logged(folder, 3))
    run.wait_until(lambda: kill_decoders(run.process.pid))
    result = run.wait()
    assert result.returncode == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert error.startswith("error: a process that decodes was killed, for want of memory or by a damaged video;")
    assert "Traceback" not in result.stderr


def test_two_runs_in_one_folder(place):
    """The second one names the first, and goes on as soon as that was killed."""
    folder = place / "shared"
    first = Run("pretrain.yaml", "--output_dir", folder, *LONG, cwd=place)
    first.wait_until(has_logged(folder, 3))
    for options in ([], ["--overwrite"], ["--dry_run"]):
        second = train("pretrain.yaml", "--output_dir", folder, *LONG, *options, cwd=place)
        assert second.returncode == 1
        (error,) = [line for line in second.stderr.splitlines() if line.startswith("error")]
        assert error.startswith(f"error: {folder} is in use by process {first.process.pid} on {socket.gethostname()};")
    first.process.kill()
    first.wait()
    train("pretrain.yaml", "--output_dir", folder, "--overwrite", "--epochs", 1, cwd=place).check()
    assert not (folder / ".lock").exists()


def test_two_quickstarts_in_one_folder(place):
    with held(place / "quick"):
        second = train("--output_dir", place / "quick", cwd=place)
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith(
        f"error: {place / 'quick'} is in use by process {os.getpid()} on "
    )


# ------------------------------------------------------------------------------------------- what stays, what is refused


def test_the_newest_and_the_best_are_kept(place):
    """The best is that of validation, however old it is: here the first, as the learning rate is then absurd."""
    arguments = ["--output_dir", "best", "--keep_checkpoints", 1, "--warmup_epochs", 2.9, "--base_lr", 30, "--ema", 0]
    train("pretrain.yaml", *arguments, "--save_every", 1, "--epochs", 3, cwd=place).check()
    losses = {line["step"]: line["val_loss"] for line in log_of(place / "best") if "val_loss" in line}
    assert min((4, 8), key=losses.get) == 4
    assert steps_of(place / "best") == [4, 12]


def test_a_better_evaluation_is_saved_between_the_intervals(place):
    train("pretrain.yaml", "--output_dir", "rare", "--save_every", 99, "--epochs", 2, cwd=place).check()
    assert steps_of(place / "rare") == [4, 8]


def test_the_same_total_batch_goes_on_with_other_batches(place, steady):
    folder = place / "other_batches"
    shutil.copytree(steady, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step-00000010":
            shutil.rmtree(path)
    options = ["--output_dir", folder, "--batch_size", 2, "--gradient_accumulation_steps", 1, "--num_workers", 0]
    train("pretrain.yaml", *options, cwd=place).check()
    assert log_of(folder)[-1]["step"] == 12


def test_another_total_batch_is_refused(place, steady):
    result = train("pretrain.yaml", "--output_dir", steady, "--batch_size", 2, cwd=place)
    assert result.returncode == 1
    assert "step-00000012 was trained with total_batch=2, which is now 4" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(place, steady, processes):
    """The system refuses files above a size: the optimizer's of the next checkpoint fits no more."""
    folder = place / f"full_{processes}"
    Run("pretrain.yaml", "--output_dir", folder, cwd=place).kill_when(folder / "checkpoints" / "step-00000002")
    (folder / "checkpoints" / ".partial-00000099").mkdir()
    before = {path: path.read_bytes() for path in newest(folder).rglob("*") if path.is_file()}
    largest = max(len(content) for content in before.values()) // 2
    arguments = ["--output_dir", folder, "--gradient_accumulation_steps", 2 // processes]
    results = train_on(processes, "pretrain.yaml", *arguments, cwd=place, largest_file=largest)
    assert [result.returncode for result in results] == [1] * processes
    errors = [line for result in results for line in result.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, errors
    assert "cannot write checkpoint" in errors[0]
    assert "Traceback" not in results[0].stderr
    assert {path: path.read_bytes() for path in before} == before
    assert steps_of(folder) == [2]
    assert not (folder / "checkpoints" / ".partial-00000004").exists()


def test_a_folder_that_cannot_be_written_is_one_error(place):
    folder = place / "unwritable"
    folder.mkdir()
    (folder / "checkpoints").write_text("a file where the folder has to be")
    result = train("pretrain.yaml", "--output_dir", folder, cwd=place)
    assert result.returncode == 1
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error"))
    assert "checkpoints" in error
    assert "Traceback" not in result.stderr
