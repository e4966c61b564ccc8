"""Between steps: is the run sound, and is it asked to stop? All processes get the same answer at the same step."""

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

# Exit codes of a run that SIGTERM or Ctrl-C ended: 128 and the signal, as the shell counts.
STOPPED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
# The figures of a step, in the order in which they travel.
_FIGURES = ("loss", "stop", "own_loss", "grad_norm")


def end_with_launcher(launcher: int) -> None:
    """Let the end of the launcher, the parent process, count as SIGTERM to this one, if there is a launcher.

    `accelerate launch` for one process passes no signal on: its end alone would leave the run to itself, unseen.
    """
    if {"ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"} & os.environ.keys():  # which launchers always set
        threading.Thread(target=_end_after, args=(launcher,), daemon=True).start()


def _end_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


class NotFinite(ValueError):
    """The loss or the gradient of a step is not a finite number."""


class _Step(NamedTuple):
    number: int
    lr: float
    indices: list[torch.Tensor]
    figures: torch.Tensor  # on the host, valid after the event
    copied: torch.Event | None


class Watch:
    """Looks at the loss and the gradient norm of each step, and within `with` listens for SIGTERM.

    A step's figures are summed over the processes on the device, copied to the host without waiting, and read when
    the step after it has been queued; on a CPU at once. So the device always has work, no process runs ahead by more
    than a step, and all of them stop at the same one. `settle` reads what is under way, before anything is saved.

    For the error: names_of, row numbers of training videos to names, and standing, a sentence about the checkpoints.
    With a gradient scaler (fp16) a gradient that is not finite is normal: the scaler leaves that step out.
    """

    def __init__(
        self, accelerator: Accelerator, names_of: Callable[[list[int]], list[str]], standing: Callable[[], str]
    ):
        self.accelerator, self.names_of, self.standing = accelerator, names_of, standing
        self.stopping = False
        self.grad_norm = math.nan
        self._asked_to_stop = False
        self._lag = 0 if accelerator.device.type == "cpu" else 1
        self._pending: deque[_Step] = deque()
        self._start_step()

    def __enter__(self) -> "Watch":
        self._handler = signal.signal(signal.SIGTERM, self._ask_to_stop)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._handler)

    def _ask_to_stop(self, *_) -> None:
        self._asked_to_stop = True

    def _start_step(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._indices: list[torch.Tensor] = []

    def add_batch(self, loss: torch.Tensor, indices: torch.Tensor) -> None:
        """Take the loss () of one of a step's batches and the row numbers (B,) of its clips."""
        self._losses.append(loss.detach().float())
        self._indices.append(indices)

    def end_step(self, number: int, lr: float, grad_norm: torch.Tensor | float | None) -> torch.Tensor:
        """Return the step's mean loss () over its batches and processes, on the device.

        Raises:
            NotFinite: this step or, on a GPU, the one before was not finite. On the main process; the others end.
        """
        own_loss = torch.stack(self._losses).mean()
        stop = own_loss.new_full((), float(self._asked_to_stop))
        loss, stop = self.accelerator.reduce(torch.stack([own_loss, stop]), reduction="mean").unbind()
        norm = own_loss.new_zeros(()) if grad_norm is None else _local(grad_norm).to(own_loss)
        # Without waiting for it, into memory that the device can write to.
        figures = torch.stack([loss, stop, own_loss, norm]).to("cpu", non_blocking=True)
        self._pending.append(_Step(number, lr, self._indices, figures, self._event()))
        self._start_step()
        while len(self._pending) > self._lag:
            self._read(self._pending.popleft())
        return loss

    def settle(self) -> None:
        """Wait for the figures of all steps so far. Raises as `end_step`."""
        while self._pending:
            self._read(self._pending.popleft())

    def _event(self) -> torch.Event | None:
        if self.accelerator.device.type == "cpu":
            return None
        event = torch.Event(self.accelerator.device.type)
        event.record()
        return event

    def _read(self, step: _Step) -> None:
        if step.copied is not None:
            step.copied.synchronize()
        figures = dict(zip(_FIGURES, step.figures.tolist(), strict=True))
        self.grad_norm = figures["grad_norm"]
        self.stopping = self.stopping or figures["stop"] > 0
        scaled = self.accelerator.scaler is not None
        if not math.isfinite(figures["loss"]) or not (scaled or math.isfinite(self.grad_norm)):
            self._fail(step, figures)

    def _fail(self, step: _Step, figures: dict[str, float]) -> None:
        """Say on the main process what is not finite and with which videos, end the others."""
        own = self.names_of(torch.cat(step.indices).tolist())
        culprits = gather_object([(math.isfinite(figures["own_loss"]), own)])
        if not self.accelerator.is_main_process:
            raise SystemExit(1)
        guilty = [names for sound, names in culprits if not sound] or [names for _, names in culprits]
        names = [name for some in guilty for name in some]
        raise NotFinite(
            f"step {step.number} is not finite: loss {figures['loss']:g}, gradient norm {figures['grad_norm']:g}, "
            f"learning rate {step.lr:g}; clips of {', '.join(names)}. {self.standing()}; lower base_lr, set "
            "clip_grad, or look at these videos"
        )


def _local(norm: torch.Tensor | float) -> torch.Tensor:
    """Return the norm as a plain tensor: a sharded model gives a DTensor, DeepSpeed a number."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
