"""What a run does between its steps: figures for the log, the bar, the count of bad videos, and whether to stop."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data import BadVideos
from ..distributed import end_together
from . import loaders
from .early_stopping import Patience
from .folder import BAD_VIDEOS
from .guard import STOPPED, Watch
from .logging import LOG, Bar, Meter, RunLog
from .run import Run
from .summary import describe
from .waiting import reading_of


class Progress:
    """The figures of a run as its steps are taken. Every process has one.

    parts: by name, what has a state that belongs to a checkpoint. log: of the run's folder.
    """

    def __init__(self, run: Run, accelerator: Accelerator):
        self.run, self.accelerator = run, accelerator
        self.log = RunLog(run.folder / LOG, accelerator)
        self.meter, self.patience = Meter(accelerator.device), Patience(run.recipe.patience)
        # Without patience there is no part of it: checkpoints of earlier versions have none.
        self.parts = {"meter": self.meter, **({"patience": self.patience} if run.recipe.patience else {})}
        self.bad = BadVideos(run.folder / BAD_VIDEOS)

    @contextmanager
    def started(self, step: int, standing: Callable[[], str]) -> Iterator[None]:
        """Say what is about to run after `step` steps; within `with`, show the bar and listen for SIGTERM.

        standing: says, for an error, what there is of checkpoints.
        """
        run, accelerator = self.run, self.accelerator
        self.log.cut_after(step, evaluations=int(run.is_evaluated_after(step)) if self.is_over(step) else None)
        self.log.start_trackers(vars(run.recipe), step)
        accelerator.print(describe(run))
        if self.patience.is_over:
            accelerator.print(f"the run has stopped early, after step {step}: nothing is left to train")
        self.bar = Bar(
            run.recipe.task, step, run.total_steps, hidden=not accelerator.is_main_process, advise=self._advise
        )
        self.watch = Watch(accelerator, lambda indices: loaders.names_of(run.train, indices), standing)
        with self.bar, self.watch:
            yield

    def _advise(self, wait: float) -> str:
        return reading_of(self.run.recipe, self.run.train, self.accelerator).advice(wait)

    def epochs(self, step: int) -> Iterator[int]:
        """Yield the epochs that are left after `step` steps, until the patience is over: at the end of an epoch."""
        for epoch in range(step // self.run.steps_per_epoch, self.run.recipe.epochs):
            if self.patience.is_over:
                return
            yield epoch

    def is_over(self, step: int) -> bool:
        """Say whether no step is left after `step` steps."""
        return step == self.run.total_steps or self.patience.is_over

    def batches(self, loader: Iterable[dict]) -> Iterator[dict]:
        """Yield the batches of a loader, without what they report of bad videos, and count the wait for each."""
        for batch in self.meter.timed(loader):
            self.bad.take(batch)
            yield batch

    def end_batch(self, loss: torch.Tensor, batch: dict) -> None:
        """Take the loss () of a batch."""
        self.watch.add_batch(loss, batch["index"])

    def end_step(self, step: int, lr: float, grad_norm: torch.Tensor | float | None) -> None:
        """Take what a step of the optimizer came to, and write a line of the log where one is due.

        Raises:
            ValueError: the loss is not finite, or too many videos are bad. On the main process; the others end.
        """
        run = self.run
        self.meter.add(self.watch.end_step(step, lr, grad_norm), run.total_batch)
        self.bar.advance()
        is_due, ends_epoch = step % run.recipe.log_every == 0, step % run.steps_per_epoch == 0
        if is_due or ends_epoch:
            self._share_bad()
        if ends_epoch and self.bad.count:
            self.write(step, {"bad_videos": len(self.bad.reasons), "replaced": self.bad.count})
        if is_due or step == run.total_steps:
            self.watch.settle()
            line = {**self.meter.read(run.total_steps - step), "lr": lr, "grad_norm": self.watch.grad_norm}
            self.bar.show(line)
            self.write(step, line)

    def _share_bad(self) -> None:
        """Let all processes know the bad videos of each, and end them where there are too many."""
        bad, most = self.bad, self.run.recipe.max_bad_fraction
        bad.share(gather=gather_object, is_main=self.accelerator.is_main_process)
        if len(bad.reasons) > most * self.run.num_videos:
            path, reason = next(iter(bad.reasons.items()))
            end_together(
                ValueError(
                    f"{len(bad.reasons)} of {self.run.num_videos} training videos are unreadable, more than "
                    f"max_bad_fraction={most}; the first is {path}: {reason}; all are in {bad.path}"
                )
            )

    def end_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures of an evaluation during the run."""
        self.patience.take(figures)
        self.write(step, figures)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Write a line of the log."""
        self.log.write(step=step, epoch=(step - 1) // self.run.steps_per_epoch, **figures)

    def paused(self) -> AbstractContextManager:
        """Leave out the time of what is not training."""
        return self.meter.paused()

    def settle(self) -> None:
        """Wait for the figures of all steps so far, before anything is saved. Raises as `end_step`."""
        self.watch.settle()

    @property
    def stopping(self) -> bool:
        """Whether SIGTERM has asked the run to stop; all processes get the same answer."""
        return self.watch.stopping

    def stop(self, step: int) -> NoReturn:
        """Exit, after `step` steps, which are saved."""
        self.accelerator.print(f"stopped by SIGTERM after step {step}; the same command goes on from there")
        self.log.close()
        sys.exit(STOPPED)
