"""The command everest-hf: the list of its commands, and how it ends. everest_hf_cli.py is where it starts."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from .arguments import Parser
from .commands import (
    check_data,
    compare,
    convert,
    embed,
    eval_timeline,
    export,
    make_list,
    neighbours,
    predict,
    prepare,
    push,
    search,
    split,
    train,
    tune_keep_ratio,
    visualize,
    watch,
)
from .commands.options import PROGRAM, print_error
from .version import __version__

# In the order of the help.
COMMANDS = (
    make_list,
    split,
    check_data,
    prepare,
    convert,
    train,
    predict,
    watch,
    eval_timeline,
    embed,
    search,
    neighbours,
    tune_keep_ratio,
    visualize,
    export,
    compare,
    push,
)


def main(arguments: list[str] | None = None, *, load: Callable[[], object] | None = None) -> int:
    """Run the command line `arguments` (default: the process's) and return the exit code.

    load: what there is to do when the command line is right and the command has not begun.

    0: done. 1: it failed, and stderr says in a line why. A wrong command line raises SystemExit(2), as argparse does.
    Of the processes that a launcher starts, the main one alone writes to stdout and stderr.
    """
    if os.environ.get("RANK", "0") == "0":
        return _main(arguments, load)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")  # warnings are of what this process alone has met
    with open(os.devnull, "w") as nowhere:
        try:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                code: Any = _main(arguments, load)
        except SystemExit as end:
            code = end.code
    if code:
        from .distributed import TIME_TO_SPEAK

        time.sleep(TIME_TO_SPEAK)  # a launcher that sees this process fail stops the one that says why
    sys.exit(code)


def _main(arguments: list[str] | None, load: Callable[[], object] | None) -> int:
    args = build_parser().parse_args(arguments)
    if args.command is train.run:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch is imported, as in train_accelerate.py
    try:
        if load:
            load()
        return args.command(args)
    except BrokenPipeError:
        # The reader of our output has gone (as in `| head`). What is still buffered must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130  # as a shell counts a process that ended by this signal


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; `command` of its result is the function to call with the result."""
    parser = Parser(prog=PROGRAM, description="EVEREST: video models that work on the tokens that change over time.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
