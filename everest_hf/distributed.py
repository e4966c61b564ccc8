"""What the processes of a run do together: one of them first, all or none, and how they end."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

logger = logging.getLogger(__name__)

# How writing fails: the system's errors as Python, as torch.save, as safetensors and as sharded checkpoints put them.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)

# Seconds; without a launcher the other processes end after it.
TIME_TO_SPEAK = 10


def main_first(state: Accelerator | PartialState, function: Callable, *arguments):
    """Call a function on the main process, then on the others, and return what it returns.

    Where it fails on one process with a ValueError or an OSError, or exits, as after --help, all processes end: the
    main process raises the error, and the others say nothing.
    """
    result = failure = None
    if state.is_main_process:
        result, failure = _outcome(function, arguments)
    (code,) = broadcast_object_list([None if failure is None else getattr(failure, "code", 1)])
    if code is not None:
        end_together(failure, code)
    if not state.is_main_process:
        result, failure = _outcome(function, arguments)
    failures = [text for text in gather_object([None if failure is None else str(failure)]) if text is not None]
    if failures:
        end_together(ValueError(failures[0]))
    return result


def _outcome(function: Callable, arguments: tuple) -> tuple[Any, ValueError | OSError | SystemExit | None]:
    """Return what a function returns, or with what it failed."""
    try:
        return function(*arguments), None
    except (ValueError, OSError, SystemExit) as error:
        return None, error


def all_write(what: str, function: Callable, *arguments) -> None:
    """Call a function that writes on all processes; where it fails on one of them, all end.

    Raises:
        OSError: on the main process: `what` could not be written, and why.
    """
    failure = None
    try:
        function(*arguments)
    except WRITE_ERRORS as error:
        logger.debug("%s", what, exc_info=True)
        failure = first_line(error)
    failures = [text for text in gather_object([failure]) if text is not None]
    if failures:
        end_together(OSError(f"cannot write {what}: {failures[0]}"))


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line; PyTorch's go on with traces of C++."""
    return str(error).splitlines()[0]


def end_together(error: BaseException | None, code: int = 1) -> None:
    """Raise the error on the main process and end the others without a word. Every process calls it."""
    if error is not None and PartialState().is_main_process:
        raise error
    sys.exit(code)


def let_main_process_speak(state: PartialState) -> None:
    """Wait on the other processes, before they exit after a shared error, until the main process has said what it is.

    A launcher stops all processes when the first has failed; its SIGTERM ends this wait too.
    """
    if not state.is_main_process:
        time.sleep(TIME_TO_SPEAK)


def tell_launcher(error: str) -> None:
    """Give the launcher of several processes, PyTorch's, the error that its report is to end with.

    It looks for it in a file; without it, the report says that a process failed, and not why.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        Path(path).write_text(json.dumps({"message": error, "timestamp": int(time.time())}))
