"""`everest_hf.train` and `everest_hf.evaluate`: runs in the process that calls them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.commands import ROOT, log_of
from helpers.tiny import TINY
from helpers.videos import write_class_folders

import everest_hf
from everest_hf import EverestForVideoClassification, Recipe, evaluate, train

MODEL = {name: value for name, value in TINY.items() if name != "num_labels"}
SHORT = {
    "frame_step": 1,
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 2,
    "num_workers": 0,
    "segments": 1,
    "crops": 1,
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> str:
    return str(write_class_folders(tmp_path_factory.mktemp("place") / "videos", videos_per_class=2))


def test_runs_and_an_evaluation_in_one_process(videos, tmp_path):
    """Pre-training after a run that failed, fine-tuning after that, and its evaluation: none feels those before it."""
    shared, handler = {"train": videos, "val": videos, **SHORT}, signal.getsignal(signal.SIGTERM)
    first = Recipe(output_dir=str(tmp_path / "first"), config=MODEL, gradient_accumulation_steps=2, **shared)
    with pytest.raises(ValueError, match=r"step 2 is not finite"):
        train(replace(first, base_lr=1e30, epochs=2, val=None, output_dir=str(tmp_path / "failed")))
    assert train(first) == {"val_loss": log_of(tmp_path / "first")[-1]["val_loss"]}
    second = Recipe(
        task="finetune", model=str(tmp_path / "first/model"), output_dir=str(tmp_path / "second"), **shared
    )
    figures = train(second)
    lines = log_of(tmp_path / "second")
    assert [line["step"] for line in lines] == [2, 2]  # the accumulation of the first run is not the second's
    assert figures == {name: value for name, value in lines[-1].items() if name.startswith("val_")}
    assert EverestForVideoClassification.from_pretrained(tmp_path / "second" / "model").config.drop_path_rate == 0.1
    assert evaluate(second) == figures
    assert json.loads((tmp_path / "second/evaluation/figures.json").read_text()) == figures
    assert signal.getsignal(signal.SIGTERM) is handler


def test_errors_are_exceptions(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such list file, folder of videos or data set"):
        train(Recipe(train="nowhere", output_dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="val is None; it must be a list file or a folder of class folders"):
        evaluate(Recipe(train="nowhere", output_dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="train is None"):
        train(Recipe(val="nowhere", eval_only=True, output_dir=str(tmp_path / "run")))


def test_importing_the_package_imports_nothing_that_only_training_needs():
    heavy = ("datasets", "evaluate", "matplotlib", "train_accelerate", "everest_hf.training", "everest_hf.data")
    program = f"import sys, everest_hf; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n", done.stderr


def test_there_are_no_other_names():
    assert {"Recipe", "train", "evaluate"} <= set(everest_hf.__all__)
    with pytest.raises(AttributeError, match="module 'everest_hf' has no attribute 'trian'"):
        everest_hf.trian  # noqa: B018
