"""The parser of both programs, everest-hf and train_accelerate.py. It imports nothing heavy."""

import argparse
import sys
from collections.abc import Sequence


class Parser(argparse.ArgumentParser):
    """A parser to which - and _ are the same in the names of options, also in those of its commands.

    passes_on: it leaves all arguments to another parser, as the list `arguments` of its result.
    """

    passes_on = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):  # type: ignore[override]
        arguments = sys.argv[1:] if args is None else args
        if self.passes_on:
            result, _ = super().parse_known_args([], namespace)
            result.arguments = list(arguments)
            return result, []
        return super().parse_known_args([self._as_declared(argument) for argument in arguments], namespace)

    def _as_declared(self, argument: str) -> str:
        """Return an argument with the - and _ of the option that it names, or begins to name."""
        name, *value = argument.split("=", 1)
        if name.startswith("--"):
            options = (option for action in self._actions for option in action.option_strings)
            alike = (option for option in options if option.replace("_", "-").startswith(name.replace("_", "-")))
            name = next(alike, name)[: len(name)]
        return "=".join((name, *value))
