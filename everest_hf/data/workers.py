"""Processes that read videos: those of a DataLoader, and those that call a function on many videos.

Decoders are native code: a damaged file may crash them, or keep them busy for ever. With `run_in_processes` a process
that is lost in this way costs its own item, which is named, and is replaced.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..video import TIME_LIMIT, VideoError
from .rows import name_of, source_of

_GOING_ON = object()
# Parameters of mallopt(3), of the GNU C library, and the most bytes that all its versions take for the second.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
_MOST_FOR_ALL = 32 * 2**20


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    # Not every system tells which these are.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory(worker: int = 0) -> None:
    """Let this process keep the memory that it frees for what it needs next. A `worker_init_fn` of a DataLoader.

    A clip on its way takes several blocks of some MB. By default the system maps each of them newly and clears it page
    by page, which costs up to a quarter of the time of a clip (benchmarks/loader.py). A process that keeps them holds
    what it has needed at most at a time. Where there is no GNU C library, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        if not mallopt(MMAP_THRESHOLD, 2**30):
            mallopt(MMAP_THRESHOLD, _MOST_FOR_ALL)


# ---------------------------------------------------------------------- of a DataLoader


def start_worker(worker: int) -> None:
    """Prepare a process of a training run's DataLoader: its `worker_init_fn`."""
    keep_freed_memory(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends this one
    sys.excepthook = _without_lost_connections
    _outlive_sigterm()


def _without_lost_connections(kind: type[BaseException], error: BaseException, traceback) -> None:
    """Report an error as Python does, unless it is a connection whose other end has gone.

    The thread that hands tensors over reports so when the training process ends: its own error says why.
    """
    if not issubclass(kind, (OSError, EOFError, multiprocessing.AuthenticationError)):
        sys.__excepthook__(kind, error, traceback)


def _outlive_sigterm() -> None:
    """Let a decoding process live on when SIGTERM goes to the whole run: the training process saves, then ends it."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    if hasattr(signal, "sigwaitinfo"):
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
    else:
        # A Mac does not tell who sends it. The first may be for the whole run; PyTorch, and then Python, ask again.
        for _ in range(2):
            signal.sigwait({signal.SIGTERM})
    os._exit(0)


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Say in one line that a process of a DataLoader was killed.

    PyTorch raises that error in a signal handler, so wherever the main thread is at that moment. In a finalizer, where
    Python would print a traceback and go on, it is left out: the next read of the loader raises it again.

    Raises:
        OSError: a process that decodes was killed.
    """
    report = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None if _is_of_lost_worker(unraisable.exc_value) else report(unraisable)
    try:
        yield
    except RuntimeError as error:
        if not _is_of_lost_worker(error):
            raise
        raise OSError(
            "a process that decodes was killed, for want of memory or by a damaged video; "
            "`everest-hf check-data` names such videos"
        ) from error
    finally:
        sys.unraisablehook = report


def _is_of_lost_worker(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


# ---------------------------------------------------------------------- a function on many items


class LostProcess(Exception):
    """The process that worked on an item crashed, or was ended because it hung; the message says which."""


def run_in_processes(
    function: Callable[[Any, Callable[[], None]], Any],
    items: Sequence,
    *,
    workers: int | None = None,
    patience: float = TIME_LIMIT,
) -> Iterator[tuple[int, Any]]:
    """Yield (i, function(items[i], alive)) as the results come, or (i, LostProcess) where its process was lost.

    `workers` processes run at a time, by default one a core. One that is silent for `patience` seconds (0: for ever)
    counts as hung; a call that may take longer calls alive() in between. The seconds that a process needs to start do
    not count: where it is no fork, it imports PyTorch first. An exception of the function ends all processes and is
    raised here.
    """
    todo = iter(enumerate(items))
    idle: list[_Worker] = []
    busy: dict[Connection, _Worker] = {}
    try:
        while True:
            while len(busy) < (workers or num_cores()) and (job := next(todo, None)):
                worker = idle.pop() if idle else _Worker(function)
                busy[worker.connection] = worker
                worker.give(*job)
            if not busy:
                return
            wait(list(busy), timeout=1)
            for worker in list(busy.values()):
                result = worker.poll(patience)
                if result is _GOING_ON:
                    continue
                del busy[worker.connection]
                if isinstance(result, LostProcess):
                    worker.end()
                else:
                    idle.append(worker)
                yield worker.place, result
    finally:
        for worker in (*idle, *busy.values()):
            worker.end()


def map_videos(
    function: Callable[[int, str | bytes, str, Callable[[], None]], Any],
    rows: Dataset,
    chosen: Sequence[int],
    *,
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    url_schemes: Sequence[str] = (),
    description: str,
) -> list[Any]:
    """Return function(row, source, name, alive) for each chosen row, or the VideoError that it raises, in their order.

    source is the path or the bytes of the row's video, name what errors call it. A lost process is a VideoError too.
    A progress bar has the `description`. workers, time_limit (its patience): of `run_in_processes`. url_schemes: of
    `source_of`.
    """
    fetching = {"url_schemes": url_schemes, "time_limit": time_limit}
    results = run_in_processes(partial(_call, function, rows, fetching), chosen, workers=workers, patience=time_limit)
    found = dict(tqdm(results, total=len(chosen), desc=description, unit="video"))
    return [
        VideoError(name_of(rows[row]["video"], row), str(found[i])) if isinstance(found[i], LostProcess) else found[i]
        for i, row in enumerate(chosen)
    ]


def _call(function: Callable, rows: Dataset, fetching: dict[str, Any], row: int, alive: Callable[[], None]) -> Any:
    try:
        arguments = source_of(rows[row]["video"], row, **fetching)
        alive()
        return function(row, arguments["source"], arguments["name"], alive)
    except VideoError as error:
        return error


class _Worker:
    """A process that answers one item at a time."""

    def __init__(self, function: Callable):
        self.connection, other_end = multiprocessing.Pipe()
        self.has_started = False
        self.process = multiprocessing.Process(target=_serve, args=(function, other_end), daemon=True)
        self.process.start()
        other_end.close()  # so that the end of the process is the end of the connection

    def give(self, place: int, item: Any) -> None:
        self.place, self.heard = place, time.monotonic()
        self.connection.send(item)

    def poll(self, patience: float) -> Any:
        """Return the result if there is one, LostProcess if there will be none, otherwise _GOING_ON."""
        try:
            if not self.connection.poll():
                is_hung = self.has_started and 0 < patience < time.monotonic() - self.heard
                return LostProcess(f"no answer for {patience:g} s") if is_hung else _GOING_ON
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            return LostProcess(f"the process that worked on it {self._how_it_ended()}")
        self.has_started, self.heard = True, time.monotonic()
        if kind == "failed":
            raise value
        return value if kind == "done" else _GOING_ON

    def _how_it_ended(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended (exit code {code})"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(function: Callable, connection: Connection) -> None:
    """Answer items until the process that gives them is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which will end it
    # What a decoder prints would tear the progress bar, and comes back as a reason.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    keep_freed_memory()
    torch.set_num_threads(1)  # a fork has lost the threads of its parent's torch, and would wait for them for ever
    said = 0.0

    def alive() -> None:
        nonlocal said
        if time.monotonic() - said > 1:
            said = time.monotonic()
            connection.send(("alive", None))

    parent = multiprocessing.parent_process()
    try:
        connection.send(("alive", None))  # it has started
        while connection in wait([connection, parent.sentinel]):  # type: ignore[union-attr]  # it has one
            item = connection.recv()
            try:
                answer = "done", function(item, alive)
            except Exception as error:
                answer = "failed", error
            connection.send(answer)
    except (EOFError, OSError):
        return
