"""When a run stops before its last epoch: `patience`."""

import math

from .checkpoints import score


class Patience:
    """Counts the evaluations since the one with the best figure. Its state belongs to a checkpoint.

    The figure is the one by which checkpoints are the best, see `score`; one that is equal is not better. Every process
    counts the same, as all have the same figures.

    most: evaluations without a better figure after which the run stops; 0: it never does.
    """

    def __init__(self, most: int):
        self.most, self.best, self.waited = most, -math.inf, 0

    def take(self, figures: dict[str, float]) -> None:
        """Count an evaluation."""
        value = score(figures)
        self.waited = 0 if value > self.best else self.waited + 1
        self.best = max(self.best, value)

    @property
    def is_over(self) -> bool:
        """Whether the run is to stop."""
        return 0 < self.most <= self.waited

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.waited = state["best"], int(state["waited"])
