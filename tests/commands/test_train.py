"""`everest-hf train`: the same run as by train_accelerate.py, on one process or several, and its exit codes."""

import os
import signal
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from helpers.commands import ROOT, log_of
from helpers.tiny import TINY
from helpers.videos import write_class_folders

from everest_hf import cli
from everest_hf.commands.train import _launch, _plan_launch

MODEL = {name: list(v) if isinstance(v, tuple) else v for name, v in TINY.items() if name != "num_labels"}
RECIPE = {"train": "videos", "config": MODEL, "frame_step": 1, "epochs": 9, "warmup_epochs": 0, "num_workers": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with videos of two classes and a recipe."""
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos", videos_per_class=2)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture
def own_signals():
    """What signals did before: the launcher of several processes puts handlers of its own in their place."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def launch(script: str, folder, monkeypatch) -> int:
    """Return the exit code of a script that runs in two processes, in a folder that is made the current one."""
    monkeypatch.chdir(folder)
    (folder / "script.py").write_text(script)
    arguments = ["--multi_gpu", "--num_processes=2", "--quiet", "script.py"]
    return _launch(launch_command_parser().parse_args(arguments))


def run(*arguments, cwd) -> subprocess.CompletedProcess:
    """Run everest-hf in a process of its own."""
    command = [sys.executable, "-m", "everest_hf_cli", "train", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_a_recipe_trains_in_this_process(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = cli.main(
        [
            "train",
            "recipe.yaml",
            "--batch-size",
            "2",
            "--epochs",
            "1",
            "--log-every",
            "1",
            "--output-dir",
            "one",
            "--num-processes",
            "1",
        ]
    )
    assert code == 0
    assert "pretrain finished" in capsys.readouterr().out
    assert [line["step"] for line in log_of(place / "one")] == [1, 2]


@pytest.mark.slow
def test_several_processes_share_the_batch_and_an_error_is_one_line_and_its_exit_code(place):
    options = ["--batch_size", 1, "--epochs", 1, "--base_lr", 1e30, "--num_processes", 2, "--output_dir", "two"]
    done = run("recipe.yaml", *options, cwd=place)
    assert "2 steps of 2 clips" in done.stdout
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "not finite" in line]
    assert line.startswith("error: step 2 is not finite")


def test_the_exit_code_is_of_a_process_that_failed_and_not_of_one_that_was_stopped_for_it(
    tmp_path, monkeypatch, own_signals
):
    script = (
        "import json, os, sys, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    with open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w') as file:\n"
        "        json.dump({'message': 'error: it is said', 'timestamp': 1}, file)\n"
        "    open('said', 'w').close()\n"
        "    time.sleep(100)\n"
        "while not os.path.exists('said'):\n"
        "    time.sleep(0.01)\n"
        "sys.exit(7)\n"
    )
    assert launch(script, tmp_path, monkeypatch) == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epohcs", "3"], "command line: unknown key '--epohcs'; did you mean '--epochs'"),
        (["--num_processes", "0"], "--num_processes is 0; it must be at least 1"),
        (["--num_processes", "many"], "--num_processes: invalid int value: 'many'"),
        (["--mixed_precision", "int8"], "--mixed_precision: invalid choice: 'int8'"),
        (["--config_file", "nowhere.yaml", "--train", "videos"], "nowhere.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, words, capsys):
    assert cli.main(["train", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("everest-hf: error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_run_that_fails_exits_as_the_script_does(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", "--train", "nowhere", "--num_processes", "1"])
    assert raised.value.code == "error: nowhere: no such list file, folder of videos or data set"


@pytest.mark.parametrize(
    ("config", "chosen", "several", "variables"),
    [
        ({"distributed_type": "MULTI_GPU", "num_processes": 2}, {}, True, None),
        ({"distributed_type": "FSDP", "num_processes": 1}, {}, True, None),
        (
            {"distributed_type": "NO", "num_processes": 1, "dynamo_config": {"dynamo_backend": "INDUCTOR"}},
            {},
            True,
            None,
        ),
        (
            {"distributed_type": "NO", "num_processes": 1, "mixed_precision": "bf16"},
            {},
            False,
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
        ),
        ({"distributed_type": "NO", "num_processes": 1, "use_cpu": True}, {}, False, {"ACCELERATE_USE_CPU": "True"}),
        ({"distributed_type": "NO", "num_processes": 1}, {"num_processes": 2}, True, None),
        (None, {"num_processes": 1}, False, {}),
        (None, {"num_processes": 2}, True, None),
        (None, {"num_processes": 1, "mixed_precision": "bf16"}, False, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    ],
)
def test_processes_are_those_of_the_option_or_the_configuration(
    config, chosen, several, variables, tmp_path, monkeypatch
):
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(tmp_path / "none.yaml"))
    if config is not None:
        path = tmp_path / "accelerate.yaml"
        path.write_text(
            yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, **config})
        )
        chosen = {**chosen, "config_file": path}
    launch, found = _plan_launch(chosen, ["recipe.yaml", "--epochs", "3"])
    assert launch.training_script == str(ROOT / "train_accelerate.py")
    assert launch.training_script_args == ["recipe.yaml", "--epochs", "3"]
    assert (found is None) == several
    if not several:
        kept = {name: value for name, value in found.items() if name != "CUDA_VISIBLE_DEVICES"}
        assert kept == variables


def test_help_has_the_options_of_recipe_and_processes(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for words in ("everest-hf train [RECIPE.yaml]", "--num_processes INT", "--base_lr FLOAT", "--mixed_precision"):
        assert words in text


@pytest.mark.slow
def test_the_main_process_says_what_failed_before_the_others_are_gone(tmp_path, monkeypatch, capfd, own_signals):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = (
        "import time, train_accelerate\n"
        "from everest_hf.distributed import end_together\n"
        "def start(path, options, state):\n"
        "    state.wait_for_everyone()\n"
        "    try:\n"
        "        end_together(ValueError('it is said'))\n"
        "    finally:\n"
        "        time.sleep(3 * state.is_main_process)\n"
        "train_accelerate.start = start\n"
        "train_accelerate.main([])\n"
    )
    assert launch(script, tmp_path, monkeypatch) == 1
    assert capfd.readouterr().err.count("error: it is said") == 1
