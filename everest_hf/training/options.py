"""The options of a run on the command line: one for each field of the recipe."""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import yaml

from ..arguments import Parser
from .recipe import TASK_DEFAULTS, Recipe, check_names, default_of
from .yaml_files import YamlLoader


class OneLineParser(Parser):
    """A parser whose errors are one line, as those of a recipe are, without the usage of all options."""

    def error(self, message: str):
        raise ValueError(f"command line: {message}")


def parse_command_line(
    arguments: list[str] | None = None, *, program: str = "train_accelerate.py", parent: Parser | None = None
) -> tuple[str | None, dict]:
    """Return the path of the recipe, if any, and the options given on the command line.

    arguments: by default the process's. program: its name in the help. parent: a parser whose options are in the help
    too.

    Raises:
        ValueError: an option is unknown (the nearest valid one is given) or a value has the wrong type.
    """
    parser = OneLineParser(
        usage=f"{program} [RECIPE.yaml] [--option VALUE ...]",
        parents=[parent] if parent else [],
        formatter_class=partial(argparse.HelpFormatter, max_help_position=38),
        description="Pre-train, fine-tune or probe EVEREST. Without a recipe: the quickstart, on videos that it makes.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", default=None, help="YAML file; see recipes/")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in fields(Recipe):
        group = option.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group))
        groups[group].add_argument(f"--{option.name}", **_argument(option))
    known, unknown = parser.parse_known_args(arguments)
    names = [f"--{option.name}" for option in fields(Recipe)]
    check_names([argument.split("=")[0] for argument in unknown[:1]], names, "command line")
    options = vars(known)
    path = options.pop("recipe")
    if "config" in options:
        options["config"] = dict(_key_value(text) for text in options["config"])
    return path, options


def _argument(option: dataclasses.Field) -> dict:
    """Return argparse's description of a field."""
    default = default_of(option)
    text = option.metadata["help"] + _defaults_in_words(option)
    if isinstance(default, dict):
        return {"nargs": "+", "metavar": "KEY=VALUE", "help": text}
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if isinstance(default, list):
        return {"type": float, "nargs": "+", "metavar": "X", "help": text}
    kind = option.type if isinstance(option.type, type) else str  # "str | None" is no type
    if word := option.metadata["word"]:
        return {"type": _or_word(kind, word), "metavar": f"{kind.__name__.upper()}|{word}", "help": text}
    return {"type": kind, "choices": option.metadata["choices"], "metavar": kind.__name__.upper(), "help": text}


def _or_word(kind: type, word: str) -> Callable[[str], Any]:
    """Return what reads a value of a type, or a word; argparse calls it by the type's name."""

    def read(text: str) -> Any:
        return text if text == word else kind(text)

    read.__name__ = kind.__name__
    return read


def _defaults_in_words(option: dataclasses.Field) -> str:
    """Return the default of a field, after which come the tasks that have another, in brackets."""
    default = default_of(option)
    others = {task: values.get(option.name, default) for task, values in TASK_DEFAULTS.items()}
    words = [] if default in (None, {}) else [_shown(default)]
    words += [f"{task}: {_shown(value)}" for task, value in others.items() if value != default]
    return f" [{'; '.join(words)}]" if words else ""


def _shown(value) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={x}" for name, x in value.items())
    return " ".join(f"{x:g}" for x in value) if isinstance(value, list) else str(value)


def _key_value(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"command line: --config takes KEY=VALUE, not {text!r}")
    try:
        return name, yaml.load(value, YamlLoader)
    except yaml.YAMLError:
        raise ValueError(f"command line: --config {text!r}: the value is not readable YAML") from None
