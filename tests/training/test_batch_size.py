"""`batch_size: auto`: the largest that fits, a number from then on."""

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.commands import train_on
from helpers.tiny import TINY, tiny_config
from helpers.videos import write_class_folders

from everest_hf.cost import training_memory
from everest_hf.training import batch_size
from everest_hf.training.batch_size import available_memory, most_by_trial, room_for, try_steps, with_batch_size
from everest_hf.training.options import parse_command_line
from everest_hf.training.recipe import AUTO, load_recipe

MODEL = {k: list(v) if isinstance(v, tuple) else v for k, v in TINY.items() if k != "num_labels"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos", videos_per_class=5)
    return folder


@pytest.fixture
def recipe(place, tmp_path):
    where = {"train": str(place / "videos"), "output_dir": str(tmp_path / "run")}
    return load_recipe(None, {**where, "config": MODEL, "batch_size": AUTO, "epochs": 1, "warmup_epochs": 0})


def test_auto_is_a_word_of_the_option_and_of_the_file():
    assert parse_command_line(["--batch_size", "auto"])[1] == {"batch_size": AUTO}
    assert parse_command_line(["--batch_size", "8"])[1] == {"batch_size": 8}
    with pytest.raises(ValueError, match="--batch_size: invalid int value: 'all'"):
        parse_command_line(["--batch_size", "all"])
    with pytest.raises(ValueError, match="batch_size is 'all'; it must be of the type int, or auto"):
        load_recipe(None, {"train": "videos", "batch_size": "all"})
    with pytest.raises(ValueError, match="batch_size is 'auto'; it must be a number with eval_only"):
        load_recipe(None, {"val": "videos", "batch_size": AUTO, "eval_only": True})


def test_on_a_cpu_the_estimate_fills_the_memory_that_is_free(recipe, monkeypatch):
    """Room for the model and three and a half clips; for all, of which ten fill a step; for less than one."""
    accelerator = Accelerator(cpu=True)
    needed = [training_memory(tiny_config(), "pretrain", n, on_cpu=True).total for n in (0, 1)]
    for clips, size in ((3.5, 3), (1e6, 10)):
        room = (needed[0] + clips * (needed[1] - needed[0])) / batch_size.SHARE
        monkeypatch.setattr(batch_size, "available_memory", lambda room=room: int(room))
        assert with_batch_size(recipe, accelerator).batch_size == size
    monkeypatch.setattr(batch_size, "available_memory", lambda: needed[0])
    with pytest.raises(ValueError, match="batch_size is 'auto', and a batch of 1 video takes about"):
        with_batch_size(recipe, accelerator)


def test_a_run_that_goes_on_keeps_its_number(recipe, tmp_path):
    accelerator, folder = Accelerator(cpu=True), tmp_path / "run"
    folder.mkdir()
    values = {"train": recipe.train, "output_dir": recipe.output_dir, "batch_size": 3}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert with_batch_size(recipe, accelerator).batch_size == 10  # nothing has been trained
    (folder / "log.jsonl").write_text("")
    assert with_batch_size(recipe, accelerator).batch_size == 3
    recipe.overwrite = True
    assert with_batch_size(recipe, accelerator).batch_size == 10


def test_the_memory_of_a_container(tmp_path):
    free = available_memory(tmp_path)  # no files: no container
    assert free > 2**20
    for name, text in (("max", "3000\n"), ("current", "2500\n"), ("stat", "anon 2000\ninactive_file 400\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_memory(tmp_path) == 900
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 2**20


@pytest.mark.parametrize(
    "options",
    [
        {"task": "pretrain", "ema": 0.9},
        {"task": "finetune", "num_sample": 2, "mixup": 0.8, "gradient_checkpointing": True},
        {"task": "finetune", "config": {**MODEL, "problem_type": "regression"}},
        {"task": "finetune", "config": {**MODEL, "problem_type": "multi_label_classification"}},
        {"task": "probe", "model": "encoder"},
    ],
    ids=lambda options: "_".join(map(str, options)),
)
def test_steps_that_are_tried_run_for_every_task_and_draw_nothing(options):
    recipe = load_recipe(None, {"train": "videos", "config": MODEL, **options})
    kind = recipe.config.get("problem_type") or "single_label_classification"
    config = tiny_config(
        problem_type=kind if recipe.has_labels else None, **({"num_labels": 1} if kind == "regression" else {})
    )
    before = torch.get_rng_state()
    try_steps(recipe, config, Accelerator(cpu=True), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("fits", "answer", "attempts"), [(5, 5, [9, 8, 7, 6, 5]), (9, 9, [9]), (0, 0, [9, 8, 7, 6, 5, 4, 3, 2, 1])]
)
def test_the_trial_goes_down_until_a_step_fits(recipe, monkeypatch, fits, answer, attempts):
    """The steps are real; the device that has no more memory is not."""
    real, tried = batch_size.try_steps, []

    def steps(recipe, config, accelerator, size):
        tried.append(size)
        if size > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        real(recipe, config, accelerator, size)

    monkeypatch.setattr(batch_size, "try_steps", steps)
    assert most_by_trial(recipe, tiny_config(), Accelerator(cpu=True), 9) == answer
    assert tried == attempts


def test_processes_share_the_memory_of_a_machine(monkeypatch):
    monkeypatch.setattr(batch_size, "available_memory", lambda: 1001)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert room_for(Accelerator(cpu=True)) == 500


def test_two_processes_train_with_one_number(place):
    """All ten videos fill one step of both; the run's recipe has the number."""
    values = {"train": "videos", "config": MODEL, "frame_step": 1, "epochs": 1, "warmup_epochs": 0, "num_workers": 0}
    (place / "auto.yaml").write_text(yaml.safe_dump({**values, "batch_size": "auto", "output_dir": "auto"}))
    results = [result.check() for result in train_on(2, "auto.yaml", cwd=place)]
    assert [result.stdout.count("batch_size auto: 5 videos a process and step") for result in results] == [1, 0]
    assert yaml.safe_load((place / "auto" / "recipe.yaml").read_text())["batch_size"] == 5
    assert "1 steps of 10 clips" in results[0].stdout
