"""What README, card and contribution guide show is what there is: commands, files, and programs, which are run."""

import re
import shlex
from pathlib import Path

import pytest
from helpers.tiny import tiny_config
from helpers.videos import write_clip

from everest_hf import EverestForVideoClassification, EverestVideoProcessor
from everest_hf.cli import build_parser
from everest_hf.training.options import parse_command_line
from everest_hf.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks_of(name: str) -> list[tuple[str, str]]:
    """The blocks of code of a file, each with its language."""
    return re.findall(r"```(\w+)\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


BLOCKS = blocks_of("README.md")
PYTHON = [text for kind, text in BLOCKS + blocks_of("model_card.md") if kind == "python"]
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def parts(program: str) -> list[list[str]]:
    """The arguments of each command that runs a program."""
    commands = [shlex.split(command) for line in COMMANDS for command in line.split(" && ")]
    return [words[words.index(program) + 1 :] for words in commands if program in words]


def test_there_are_commands():
    assert len(parts("train_accelerate.py")) >= 7
    assert len(parts("everest-hf")) >= 8


@pytest.mark.parametrize("arguments", parts("train_accelerate.py"), ids=" ".join)
def test_commands_of_the_training(arguments):
    path, options = parse_command_line(arguments)
    if path is not None and path.startswith("recipes/"):
        path = ROOT / path
        assert load_recipe(path, options).task in path.stem or path.stem not in ("pretrain", "finetune")
    elif path is None and options:
        load_recipe(None, options)


@pytest.mark.parametrize("arguments", parts("everest-hf"), ids=" ".join)
def test_commands_of_everest_hf(arguments):
    assert callable(build_parser().parse_args(arguments).command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and videos where those of the quickstart are."""
    folder = tmp_path_factory.mktemp("readme")
    config, saved = tiny_config(), folder / "runs/quickstart/finetune/model"
    EverestForVideoClassification(config).save_pretrained(saved)
    EverestVideoProcessor.from_config(config, frame_step=1).save_pretrained(saved)
    for i, name in enumerate(("left/1", "left/2", "right/3", "right/4")):
        write_clip(folder / f"data/motion/train/{name}.mp4", num_frames=6, seed=i)
    write_clip(folder / "data/motion/val/left/00004.mp4")
    write_clip(folder / "clip.mp4")
    return folder


@pytest.mark.parametrize("text", PYTHON)
def test_python_runs(text, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(text, "README.md", "exec"), {})


def test_the_checks_of_contributors_are_those_of_ci():
    commands = [
        command
        for kind, text in blocks_of("CONTRIBUTING.md")
        for line in text.splitlines()
        for command in line.split("#")[0].strip().split(" && ")
    ]
    run = (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install").splitlines()
    assert commands[:2] == ["python -m venv env", "source env/bin/activate"]
    assert len(commands) >= 7
    assert set(commands[2:]) <= set(run)


def test_files_that_are_named_are_there():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things are")[1].split("## Rules")[0]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    for first, *others in rows:
        folder = (ROOT / first).parent
        for name in (first, *others):
            # After the first name of a row, its folder goes without saying.
            assert (ROOT / name).exists() or (folder / name).exists(), name
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
