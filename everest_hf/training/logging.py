"""The figures of a run as they come: the log, the trackers, and the bar with a word of advice."""

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..files import write_whole

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
# What trackers call the run.
NAME = "tracked_as.txt"
# Share of the time that a run may wait for its data before it is told what helps.
TOLERATED_WAIT = 0.2


# ------------------------------------------------------------------------------------------------------------- log


def read_log(path: Path) -> list[dict]:
    """Return the lines of a run's log; a last line that a killed run left unfinished is none.

    A line that is garbage is left out, with a warning.
    """
    lines = path.read_text(errors="replace").split("\n")
    return [line for number, text in enumerate(lines[:-1], 1) if (line := _line_of(text, f"{path}:{number}"))]


def _line_of(text: str, where: str) -> dict | None:
    try:
        line = json.loads(text)
        if isinstance(line["step"], int):
            return line
    except (ValueError, TypeError, KeyError):
        pass
    logger.warning("%s is damaged and left out: %.60r", where, text)
    return None


class RunLog:
    """The run's figures as they come: JSON lines in a file and the trackers, both by the main process."""

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator

    def start_trackers(self, settings: dict, step: int) -> None:
        """Tell the trackers, if any, of the run and its settings. A run that goes on after `step` keeps its name there."""
        values = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in settings.items()}
        name = self._name(step) if self.accelerator.log_with and self.accelerator.is_main_process else None
        again = {"name": name, "resume": "allow"}
        options = {"trackio": again, "wandb": {**again, "id": name, "dir": str(self.path.parent)}}
        self.accelerator.init_trackers("everest", config=values, init_kwargs=options)

    def _name(self, step: int) -> str:
        """Return what trackers call the run: by its folder, and by a number, as another may follow it there."""
        path = self.path.with_name(NAME)
        if step == 0 or not path.exists():
            path.write_text(f"{path.absolute().parent.name}-{secrets.token_hex(4)}")
        return path.read_text()

    def close(self) -> None:
        """Let the trackers write what they still have."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def write(self, *, step: int, **values) -> None:
        """Write a line; what is not finite, as the gradient norm of a step that fp16 leaves out, is null there."""
        if self.accelerator.is_main_process:
            known = {name: v if not isinstance(v, float) or math.isfinite(v) else None for name, v in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **known}) + "\n")
        self.accelerator.log(values, step=step)

    def read(self) -> list[dict]:
        return read_log(self.path) if self.path.exists() else []

    def cut_after(self, step: int, *, evaluations: int | None = None) -> None:
        """Forget what a killed run logged after the checkpoint that the run goes on from.

        evaluations: where no step is left, how many evaluations after this one stay; the final one is made again.
        """
        if self.accelerator.is_main_process:
            kept = [line for line in self.read() if line["step"] <= step]
            if evaluations is not None:
                places = [i for i, line in enumerate(kept) if line["step"] == step and "val_loss" in line]
                kept = [line for i, line in enumerate(kept) if i not in places[evaluations:]]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_whole(self.path, lambda aside: aside.write_text(text))


def check_tracker(name: str) -> None:
    """Raise a ValueError if the package of a tracker is not installed."""
    if name != "none" and find_spec(name) is None:
        raise ValueError(f"report_to is {name!r}, which is not installed; pip install {name}")


# ---------------------------------------------------------------------------------------------------------- figures


class Meter:
    """What happened since the last line of the log: the loss, which adds up on the device, clips, seconds, waiting.

    The sum of the losses belongs to a checkpoint: the first line of a run that goes on counts the steps before it too.
    device: where the run's tensors are; on a GPU, the peak of their memory is one of the figures.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.loss_sum, self.steps = torch.zeros(()), 0
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.timed_steps, self.clips, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def timed(self, batches: Iterable[dict]) -> Iterator[dict]:
        """Yield the batches and count the time that passes until each is there."""
        batches = iter(batches)
        while True:
            since = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - since
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is not training."""
        since = time.perf_counter()
        yield
        self.since += time.perf_counter() - since

    def add(self, loss: torch.Tensor, clips: int) -> None:
        """Add a step's mean loss (), on the device, and the number of its clips."""
        self.loss_sum = self.loss_sum.to(loss.device) + loss
        self.steps += 1
        self.timed_steps += 1
        self.clips += clips

    def read(self, steps_left: int) -> dict[str, float]:
        """Return the mean loss, clips a second, share of waiting for data, seconds left, GPU memory, and start again.

        This waits for the device.
        """
        loss = (self.loss_sum / self.steps).item()
        seconds = time.perf_counter() - self.since
        figures = {
            "loss": loss,
            "seconds": seconds,
            "clips_per_second": self.clips / seconds,
            "data_wait": self.waited / seconds,
            "eta_seconds": round(seconds / self.timed_steps * steps_left),
            **gpu_memory(self.device),
        }
        self.loss_sum, self.steps = torch.zeros(()), 0
        self._restart_clock()
        return figures

    def state_dict(self) -> dict:
        return {"loss_sum": self.loss_sum.cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.loss_sum, self.steps = state["loss_sum"], state["steps"]


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Return the peak of the memory that tensors took on a GPU, in GiB; nothing elsewhere."""
    return {"gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


class Bar:
    """The progress bar of the main process, with the figures of the last line of the log.

    advise: makes a sentence on what helps of the share of the time that is spent waiting for data.
    """

    def __init__(self, description: str, step: int, total_steps: int, *, hidden: bool, advise: Callable[[float], str]):
        self.advise = advise
        self.bar = tqdm(total=total_steps, initial=step, desc=description, unit="step", disable=hidden)
        self.lines, self.advised = 0, False

    def advance(self) -> None:
        self.bar.update()

    def show(self, figures: dict[str, float]) -> None:
        """Show the figures, and say once what helps when the run waits for its data."""
        memory = figures.get("gpu_memory_gib")
        self.bar.set_postfix_str(
            f"loss {figures['loss']:.3f}, lr {figures['lr']:.2g}, {figures['clips_per_second']:.0f} clips/s, "
            f"{figures['data_wait']:.0%} waiting for data" + (f", {memory:.1f} GiB" if memory else "")
        )
        self.lines += 1  # the first one has the start of the decoding processes in it
        wait_is_long = self.lines > 1 and figures["data_wait"] > TOLERATED_WAIT
        if wait_is_long and not self.advised and not self.bar.disable:
            self.advised = True
            self.bar.write(self.advise(figures["data_wait"]))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()  # so that an error has a line of its own
