"""Every command of the README is one that the programs take, and names files that are there."""

import re
import shlex
from pathlib import Path

import pytest

from everest_hf.cli import build_parser
from everest_hf.recipe import load_recipe, parse_command_line

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
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


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "python"])
def test_python_is_python(text):
    compile(text, "README.md", "exec")


def test_files_that_are_named_are_there():
    table = README.split("## What is where")[1].split("## Speed")[0]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    for first, *others in rows:
        folder = (ROOT / first).parent
        for name in (first, *others):
            # After the first name of a row, its folder goes without saying.
            assert (ROOT / name).exists() or (folder / name).exists(), name
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
