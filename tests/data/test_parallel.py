"""Work in processes of its own: results, crashes, hangs, errors."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

from everest_hf.data.workers import (
    LostProcess,
    map_videos,
    naming_lost_workers,
    num_cores,
    run_in_processes,
    start_worker,
)
from everest_hf.video import VideoError


def square(x, alive):
    return x * x


def misbehave(x, alive):
    """Do to the process what damaged videos do to it."""
    if x == "crash":
        faulthandler.disable()  # pytest's, which would print pages
        os.kill(os.getpid(), signal.SIGSEGV)
    if x == "leave":
        os._exit(3)
    if x == "hang":
        time.sleep(600)
    if x == "slow":
        for _ in range(4):
            time.sleep(0.8)
            alive()
    return os.getpid()


def fail(x, alive):
    raise OSError(28, "No space left on device", "out.mp4")


def test_every_item_is_answered_once():
    assert dict(run_in_processes(square, range(50), workers=3)) == {i: i * i for i in range(50)}
    assert list(run_in_processes(square, [], workers=3)) == []
    assert len(os.sched_getaffinity(0)) == num_cores()


def test_a_lost_process_costs_its_own_item_and_is_replaced():
    items = ["fine", "crash", "slow", "hang", "leave", "fine"]
    results = dict(run_in_processes(misbehave, items, workers=2, patience=2))
    reasons = {items[i]: str(result) for i, result in results.items() if isinstance(result, LostProcess)}
    assert reasons == {
        "crash": "the process that worked on it crashed (SIGSEGV)",
        "hang": "no answer for 2 s",
        "leave": "the process that worked on it ended (exit code 3)",
    }
    assert len(results) == len(items)


def test_the_start_of_a_process_is_no_silence(monkeypatch):
    """As on Windows and on a Mac, where processes are spawned: each imports PyTorch before it can answer."""
    monkeypatch.setattr(multiprocessing, "Process", multiprocessing.get_context("spawn").Process)
    assert dict(run_in_processes(square, [7], patience=0.5)) == {0: 49}


def test_an_error_of_the_function_ends_all_and_leaves_no_process():
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(run_in_processes(fail, range(5), workers=2))
    assert caught.value.filename == "out.mp4"
    results = run_in_processes(misbehave, ["fine", "hang"], workers=2)
    _, finished = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(finished, 0)


def read_name(row, source, name, alive):
    if row == 1:
        raise VideoError(name, "it is bad")
    if row == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return row, source, name


def test_videos_are_answered_in_their_order_and_errors_name_them():
    cells = [{"path": f"{name}.mp4", "bytes": name.encode() if name == "c" else None} for name in "abcd"]
    rows = Dataset.from_dict({"video": cells})
    found = map_videos(read_name, rows, [3, 2, 1, 0], workers=2, description="test")
    assert found[0] == (3, "d.mp4", "d.mp4")
    assert [str(error) for error in found[1:3]] == [
        "c.mp4 (row 2): the process that worked on it crashed (SIGKILL)",
        "b.mp4: it is bad",
    ]
    assert found[3] == (0, "a.mp4", "a.mp4")


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def touch(folder, x, alive):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(0.5)


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    work = partial(touch, str(tmp_path))
    parent = multiprocessing.get_context("fork").Process(
        target=lambda: list(run_in_processes(work, range(1000), workers=3))
    )
    parent.start()
    wait_for(lambda: len(list(tmp_path.iterdir())) == 3)
    parent.kill()
    parent.join()
    wait_for(lambda: not any(is_running(int(path.name)) for path in tmp_path.iterdir()))


def test_work_goes_to_several_processes(tmp_path):
    list(run_in_processes(partial(touch, str(tmp_path)), range(4), workers=2))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_worker_that_is_lost_while_an_object_is_deleted_prints_nothing(monkeypatch):
    """PyTorch's signal handler raises in whatever runs; what a finalizer raises, Python only reports."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))

    class Interrupted:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    with naming_lost_workers():
        Interrupted("DataLoader worker (pid 1) is killed by signal: Killed.")
        Interrupted("another fault")
    assert reported == ["another fault"]


def start_and_wait(ready) -> None:
    start_worker(0)
    ready.send(True)
    time.sleep(120)


def test_where_nobody_tells_who_sends_sigterm_the_second_ends_a_decoding_process(monkeypatch):
    """As on a Mac. The first may go to the whole run, which then needs its clips to save."""
    monkeypatch.delattr(signal, "sigwaitinfo")
    mine, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=start_and_wait, args=(other,), daemon=True)
    process.start()
    assert mine.poll(120)
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.5)
    assert process.is_alive()
    while process.is_alive():  # signals that wait are one
        os.kill(process.pid, signal.SIGTERM)
        process.join(0.1)
    assert process.exitcode == 0
