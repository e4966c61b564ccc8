"""Results of a classifier at several keep ratios, the differences between them, and the ratio that they recommend."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from ..configuration_everest import Budget

# In 95 of 100 cases the true value is at most this many standard deviations above a normal estimate.
ONE_SIDED_95 = statistics.NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class RatioResult:
    """What was measured at one keep ratio.

    tokens: of a clip, on the average. tokens_low, tokens_high: the 5th and the 95th percentile of the clips. gflops: of
    the model for a clip, on the average. clips_per_second: of the model alone. loss, top1, top5, mean_class_accuracy: as
    an evaluation has them. difference_points: by how many points top-1 is above that of the most accurate ratio, with
    its standard error; see `paired_difference`.
    """

    keep_ratio: float
    tokens: int
    tokens_low: int
    tokens_high: int
    gflops: float
    clips_per_second: float
    loss: float
    top1: float
    top5: float
    mean_class_accuracy: float
    difference_points: float
    standard_error_points: float

    @property
    def loss_bound_points(self) -> float:
        """The true loss exceeds this in 5 of 100 cases, if the measured one is normally distributed."""
        return ONE_SIDED_95 * self.standard_error_points - self.difference_points


@dataclass(frozen=True)
class Recommendation:
    """Which keep ratio to use, and how certain its loss is; see `recommend`."""

    keep_ratio: float
    difference_points: float
    standard_error_points: float
    reference_keep_ratio: float
    max_loss_points: float
    loss_bound_points: float
    is_certain: bool
    certain_keep_ratio: float
    videos_needed: int


@dataclass(frozen=True)
class Unreadable:
    """A video that was left out, and why."""

    video: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A classifier at several keep ratios: what was run, and what came out.

    model_keep_ratio, model_token_budget: the model's own. budget: the one that was measured. thresholds: with "batch", the
    `keep_threshold` of each ratio, by str(ratio). videos: the number of readable ones. views: segments and crops of each.
    clips_per_second in `ratios` was measured on batches of clips_per_batch; one process decodes read_clips_per_second.
    ratios: from the smallest to the largest.
    """

    source: str
    date: str
    versions: dict[str, str]
    model: str | None
    model_keep_ratio: float
    model_token_budget: Budget
    frame_oversampling: float
    budget: Budget
    thresholds: dict[str, dict[str, float]] | None
    device: str
    threads: int
    dtype: str
    videos: int
    views: list[int]
    clips_per_batch: int
    read_clips_per_second: float
    ratios: list[RatioResult]
    recommended: Recommendation
    unreadable: list[Unreadable]

    def to_json(self) -> dict[str, Any]:
        """Return what keep-ratio.json holds."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Comparison":
        """Return the comparison that keep-ratio.json holds; older ones know one budget, that of the clip."""
        before = {"model_token_budget": "clip", "budget": "clip", "thresholds": None}
        ratios = [
            RatioResult(**{"tokens_low": row["tokens"], "tokens_high": row["tokens"], **row})
            for row in stored["ratios"]
        ]
        recommended = Recommendation(**stored["recommended"])
        unreadable = [Unreadable(**bad) for bad in stored["unreadable"]]
        return cls(**{**before, **stored, "ratios": ratios, "recommended": recommended, "unreadable": unreadable})


def paired_difference(hits: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return by how many points one accuracy is above another on the same videos, and the difference's standard error.

    hits, reference: bool (n,), True for each video that was classified rightly. The standard error adds half a video to
    each of the four outcomes of a pair, so that it is not 0 where all answers agree: Agresti and Min, Simple improved
    confidence intervals for comparing matched proportions, Statistics in Medicine 24 (2005).
    """
    gained, lost = int((hits & ~reference).sum()), int((~hits & reference).sum())
    count = len(hits) + 2
    variance = gained + lost + 1 - (gained - lost) ** 2 / count
    return 100 * (gained - lost) / len(hits), 100 * math.sqrt(variance) / count


def recommend(results: Sequence[RatioResult], num_videos: int, max_loss: float) -> Recommendation:
    """Return the smallest keep ratio that loses at most max_loss points, and how certain that is.

    results: from the smallest ratio to the largest. The most accurate ratio is the reference (`reference_keep_ratio`),
    the largest of equally accurate ones. Every ratio between it and the recommended one loses at most max_loss too.

    `loss_bound_points` is `RatioResult.loss_bound_points`; `is_certain` says whether max_loss covers it. Max_loss
    covers the bounds of all ratios from `certain_keep_ratio` to the reference. Where only the reference is certain,
    `videos_needed` videos would be enough to tell a loss of max_loss from none.

    The reference and the ratio are chosen on the videos that the loss is measured on; on other videos the loss may be
    a little different.
    """
    reference = max(results, key=lambda result: (result.difference_points, result.keep_ratio))
    upward = results[: results.index(reference) + 1]
    chosen = _smallest_of_run(upward, lambda result: -result.difference_points <= max_loss)
    certain = _smallest_of_run(upward, lambda result: result.loss_bound_points <= max_loss)
    return Recommendation(
        keep_ratio=chosen.keep_ratio,
        difference_points=chosen.difference_points,
        standard_error_points=chosen.standard_error_points,
        reference_keep_ratio=reference.keep_ratio,
        max_loss_points=max_loss,
        loss_bound_points=chosen.loss_bound_points,
        is_certain=chosen.loss_bound_points <= max_loss,
        certain_keep_ratio=certain.keep_ratio,
        videos_needed=math.ceil(num_videos * (ONE_SIDED_95 * chosen.standard_error_points / max_loss) ** 2),
    )


def _smallest_of_run(results: Sequence[RatioResult], holds: Callable[[RatioResult], bool]) -> RatioResult:
    """Return the smallest ratio from which `holds` is true of every ratio up to the largest; it is true of the largest."""
    return list(takewhile(holds, reversed(results)))[-1]
