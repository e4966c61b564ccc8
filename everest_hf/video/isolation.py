"""A call that is given up when it takes too long."""

import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

_own = threading.local()


class Overdue(Exception):
    """A call took longer than it may; the message is the time limit."""


def call_within(seconds: float, function: Callable, *args) -> Any:
    """Return function(*args), or raise Overdue when it takes longer than `seconds` (0: no limit).

    Nothing can end a call of native code: an overdue one goes on, in a thread that ends with its process. The function
    must release Python's lock, as decoders do. Each calling thread has a helper thread that does its calls. This costs
    about 0.05 ms a call, and moves what was read into another core's cache: where all cores decode, a clip took a
    twentieth longer.
    """
    if not seconds:
        return function(*args)
    helper = getattr(_own, "helper", None)
    if helper is None or not helper.thread.is_alive():  # a fork leaves the threads behind
        helper = _Helper()
    # Until the answer is here: where this call is interrupted, the next one must not get its answer.
    _own.helper = None
    answer = helper.call(seconds, function, args)
    _own.helper = helper
    value, error = answer
    if error is None:
        return value
    try:
        raise error
    finally:
        del answer, error  # which hold this frame, as its traceback does


class _Helper:
    """A thread that does one call at a time, and ends when this object does."""

    def __init__(self):
        self.calls: SimpleQueue = SimpleQueue()
        self.answers: SimpleQueue = SimpleQueue()
        self.thread = threading.Thread(target=_serve, args=(self.calls, self.answers), daemon=True)
        self.thread.start()
        weakref.finalize(self, self.calls.put, None)

    def call(self, seconds: float, function: Callable, args: tuple) -> tuple[Any, BaseException | None]:
        self.calls.put((function, args))
        try:
            return self.answers.get(timeout=seconds)
        except Empty:
            raise Overdue(f"{seconds:g} s") from None


def _serve(calls: SimpleQueue, answers: SimpleQueue) -> None:
    while call := calls.get():
        function, args = call
        try:
            answer: tuple[Any, BaseException | None] = function(*args), None
        except BaseException as error:
            answer = None, error
        answers.put(answer)
        del call, function, args, answer  # or they would live until the next call
