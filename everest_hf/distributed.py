"""What the processes of a run do together: one of them first, all or none, and how they end."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

logger = logging.getLogger(__name__)

# How writing fails: the system's errors as Python, as torch.save, as safetensors and as sharded checkpoints put them.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)

# Seconds; without a launcher the other processes end after it.
TIME_TO_SPEAK = 10
# How long a process that has done its part of a list waits for the others.
PATIENCE = timedelta(days=30)


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


def num_launched() -> int:
    """Return how many processes Accelerate's or PyTorch's launcher has started on all machines, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def divide(work: Callable[[tuple[int, int]], Any], shard: tuple[int, int] = (0, 1)) -> list[Any]:
    """Call work((i, n)) on the i-th of n launched processes, and return what all of them returned on the main one.

    The others end here without a word, and the main process, when all have done their parts, goes on alone. Where the
    work fails on one of them with a ValueError or an OSError, all end. On a single process, which has all of the work
    still to do, nothing is called, and the list is empty.

    shard: the part that the user asked for, which a launcher's processes cannot have besides their own.

    Raises:
        ValueError, OSError: on the main process: the work failed, or a part was asked for.
    """
    count = num_launched()
    if count == 1:
        return []
    if shard[1] > 1:
        raise ValueError(
            f"--shard is given, and {count} processes are launched, which take a part each; leave one out"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    result, failure = _outcome(work, ((int(os.environ["RANK"]), count),))
    # They meet when the work is done: connections that are idle for hours might be lost.
    state = PartialState(cpu=True, backend="gloo", timeout=PATIENCE)
    found = gather_object([(result, None if failure is None else _plain(failure))])
    state.destroy_process_group()
    failures = [error for _, error in found if error is not None]
    if failures:
        end_together(failures[0])
    if not state.is_main_process:
        sys.exit()
    return [result for result, _ in found]


def _plain(error: BaseException) -> ValueError | OSError:
    """Return an error as one that goes from process to process, whatever its class needs to be made."""
    if isinstance(error, OSError) and error.filename:
        return OSError(error.errno, error.strerror, error.filename)
    return ValueError(str(error))


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
