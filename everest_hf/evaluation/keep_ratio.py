"""The choice of a keep ratio: a classifier's accuracy and speed at several ratios, measured on labelled videos."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from datetime import datetime, timezone
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..configuration_everest import EverestConfig, check_keep_ratio, problem_type_of
from ..cost import clip_cost
from ..data import VideoViews, collate, transforms
from ..data.workers import keep_freed_memory, naming_lost_workers, num_cores
from ..files import write_table, write_whole
from ..modeling_everest import EverestForVideoClassification
from ..visualize import draw_keep_ratios
from .evaluate import figures_of, mean_scores

RATIOS, MAX_LOSS = tuple(tenths / 10 for tenths in range(1, 11)), 1.0
ONE_CLASS = "single_label_classification"
# Each keep ratio is timed at least so many times, and until so many seconds have passed. Small models run more often
# in that time, which they need: one of their runs is too short to measure.
LEAST_ROUNDS, LEAST_SECONDS = 5, 3.0
# In 95 of 100 cases the true value is at most this many standard deviations above a normal estimate.
ONE_SIDED_95 = statistics.NormalDist().inv_cdf(0.95)
# The files of a report.
JSON, CSV, PICTURE = "keep-ratio.json", "keep-ratio.csv", "keep-ratio.png"


@dataclass(frozen=True)
class RatioResult:
    """What was measured at one keep ratio.

    tokens: of a clip. gflops: of the model for a clip. clips_per_second: of the model alone. loss, top1, top5,
    mean_class_accuracy: as an evaluation has them. difference_points: by how many points top-1 is above that of the
    most accurate ratio, with its standard error; see `paired_difference`.
    """

    keep_ratio: float
    tokens: int
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

    model_keep_ratio: the model's own. videos: the number of readable ones. views: segments and crops of each.
    clips_per_second in `ratios` was measured on batches of clips_per_batch; one process decodes read_clips_per_second.
    ratios: from the smallest to the largest.
    """

    source: str
    date: str
    versions: dict[str, str]
    model: str | None
    model_keep_ratio: float
    frame_oversampling: float
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
        """Return the comparison that keep-ratio.json holds."""
        ratios = [RatioResult(**row) for row in stored["ratios"]]
        recommended = Recommendation(**stored["recommended"])
        unreadable = [Unreadable(**bad) for bad in stored["unreadable"]]
        return cls(**{**stored, "ratios": ratios, "recommended": recommended, "unreadable": unreadable})


def tune_keep_ratio(
    model: EverestForVideoClassification,
    views: VideoViews,
    *,
    source: str = "",
    ratios: Sequence[float] = RATIOS,
    max_loss: float = MAX_LOSS,
    batch_size: int = 8,
    num_workers: int | None = None,
) -> Comparison:
    """Measure a classifier at several keep ratios, without training it again, and recommend one of them.

    The model's forward gets the ratio. Where a model selects frames, the ratio of its configuration still chooses them.

    views: of labelled videos, with count_unreadable=True. `num_workers` processes (by default one a core) read each
    video once, and the model answers it at every ratio. source: what the report calls the videos. max_loss: how many
    points of top-1, hundredths of the videos, may be lost against the most accurate ratio; see `recommend`.

    Raises:
        ValueError: see `check_request`; or no video can be read.
    """
    config = model.config
    check_request(config, ratios=ratios, max_loss=max_loss)
    ratios = sorted(set(ratios))
    answers = _answer(model.eval(), views, ratios, batch_size, num_workers or num_cores())
    num_videos = len(answers.index)
    clips, read_clips_per_second = _read_again(views, answers.index[:batch_size])
    seconds = _time(model, _pixel_values(model, clips), ratios)
    results = _compare(config, answers, {ratio: len(clips) / seconds[ratio] for ratio in ratios})
    return Comparison(
        source=source,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        model=model.name_or_path,
        model_keep_ratio=config.keep_ratio,
        frame_oversampling=config.frame_oversampling,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        videos=num_videos,
        views=[views.num_segments, views.num_crops],
        clips_per_batch=len(clips),
        read_clips_per_second=read_clips_per_second,
        ratios=results,
        recommended=recommend(results, num_videos, max_loss),
        unreadable=[Unreadable(path, reason) for path, reason in answers.bad],
    )


def check_request(config: EverestConfig, *, ratios: Sequence[float] = RATIOS, max_loss: float = MAX_LOSS) -> None:
    """Raise a ValueError unless models of this configuration can be compared at these ratios."""
    problem_type = problem_type_of(config)
    if problem_type != ONE_CLASS:
        raise ValueError(f"the model is one of {problem_type}; keep ratios are compared by top-1, of {ONE_CLASS}")
    for ratio in ratios:
        check_keep_ratio(ratio)
        if config.num_kept_tokens(ratio) == 0:
            raise ValueError(f"keep ratio {ratio:g} leaves none of the model's {config.num_tokens} tokens")
    if len(set(ratios)) < 2:
        raise ValueError("there is one keep ratio; it takes two or more to compare")
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise ValueError(
            f"the loss allowed is {max_loss:g} points; it must be above 0, as nothing can show a loss of 0"
        )


# ---------------------------------------------------------------------- measuring


@dataclass
class _Answers:
    """Of n readable videos: scores (n, labels) at each ratio, labels (n,), row numbers; (path, reason) of the others."""

    scores: dict[float, torch.Tensor]
    labels: torch.Tensor
    index: list[int]
    bad: list[tuple[str, str]]


@torch.inference_mode()
def _answer(
    model: EverestForVideoClassification, views: VideoViews, ratios: list[float], batch_size: int, num_workers: int
) -> _Answers:
    loader = DataLoader(
        views, batch_size, num_workers=num_workers, collate_fn=collate, worker_init_fn=keep_freed_memory
    )
    scores: dict[float, list[torch.Tensor]] = {ratio: [] for ratio in ratios}
    labels: list[torch.Tensor] = []
    index: list[int] = []
    bad: list[tuple[str, str]] = []
    with tqdm(total=len(views), desc="tune-keep-ratio", unit="video") as bar, naming_lost_workers():
        for batch in loader:
            readable, (size, num_views) = ~batch["unreadable"], batch["pixel_values"].shape[:2]
            pixel_values = _pixel_values(model, batch["pixel_values"].flatten(0, 1))
            for ratio in ratios:
                logits = model(pixel_values, keep_ratio=ratio).logits
                scores[ratio].append(mean_scores(logits, num_views, ONE_CLASS).cpu()[readable])
            labels.append(batch["labels"][readable])
            index += batch["index"][readable].tolist()
            bad += batch["bad"]
            bar.update(size)
    if not index:
        raise ValueError(f"none of the {len(views)} videos can be read; the first is {bad[0][0]}: {bad[0][1]}")
    return _Answers({ratio: torch.cat(found) for ratio, found in scores.items()}, torch.cat(labels), index, bad)


def _pixel_values(model: EverestForVideoClassification, clips: torch.Tensor) -> torch.Tensor:
    return transforms.normalize(clips.to(model.device), model.config.image_mean, model.config.image_std)


def _read_again(views: VideoViews, indices: list[int]) -> tuple[torch.Tensor, float]:
    """Return the clips uint8 (B, T, C, h, w) of some rows, and how many clips a second this process reads."""
    views[indices[0]]  # loads the decoder, which would count otherwise
    start = time.perf_counter()
    clips = collate([views[index] for index in indices])["pixel_values"].flatten(0, 1)
    return clips, len(clips) / (time.perf_counter() - start)


@torch.inference_mode()
def _time(model: EverestForVideoClassification, pixel_values: torch.Tensor, ratios: list[float]) -> dict[float, float]:
    """Return the median seconds of a batch at each ratio.

    The ratios take turns, so that a change in the machine's load meets all of them. No video is decoded meanwhile:
    decoding would slow down some ratios more than others. The model has run at every ratio before, so it is warm.
    """
    seconds: dict[float, list[float]] = {ratio: [] for ratio in ratios}
    start = time.perf_counter()
    with tqdm(total=LEAST_ROUNDS, desc="timing", unit="round", leave=False) as bar:
        while bar.n < LEAST_ROUNDS or time.perf_counter() - start < LEAST_SECONDS:
            for ratio in ratios:
                seconds[ratio].append(_seconds(model, pixel_values, ratio))
            bar.update()
    return {ratio: statistics.median(times) for ratio, times in seconds.items()}


def _seconds(model: EverestForVideoClassification, pixel_values: torch.Tensor, ratio: float) -> float:
    start = time.perf_counter()
    model(pixel_values, keep_ratio=ratio)
    if pixel_values.is_cuda:
        torch.cuda.synchronize(pixel_values.device)
    return time.perf_counter() - start


# ---------------------------------------------------------------------- comparing


def _compare(config: EverestConfig, answers: _Answers, clips_per_second: dict[float, float]) -> list[RatioResult]:
    """Return the result at each ratio, from the smallest to the largest.

    The differences are from the most accurate ratio, which need not be the largest: a model that was fine-tuned at one
    ratio may be worse at a larger one. Of equally accurate ratios the largest is the reference.
    """
    hits = {ratio: scores.numpy().argmax(axis=1) == answers.labels.numpy() for ratio, scores in answers.scores.items()}
    results, reference = [], max(hits, key=lambda ratio: (hits[ratio].sum(), ratio))
    for ratio in hits:
        cost = clip_cost(config, keep_ratio=ratio)
        difference, error = (0.0, 0.0) if ratio == reference else paired_difference(hits[ratio], hits[reference])
        results.append(
            RatioResult(
                keep_ratio=ratio,
                tokens=cost.tokens,
                gflops=cost.forward / 1e9,
                clips_per_second=clips_per_second[ratio],
                **figures_of(answers.scores[ratio], answers.labels, ONE_CLASS),
                difference_points=difference,
                standard_error_points=error,
            )
        )
    return results


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


# ---------------------------------------------------------------------- for people


def as_text(found: Comparison) -> str:
    """Return a table of the results, what is recommended, and how to use it, in lines."""
    segments, crops = found.views
    header = f"{'keep ratio':>10}{'tokens':>8}{'GFLOPs':>9}{'clips/s':>10}{'top-1':>8}{'top-5':>8}"
    return "\n".join(
        [
            f"{found.videos} videos of {segments}x{crops} views, {len(found.unreadable)} others are unreadable",
            f"{found.model}, whose own keep ratio is {found.model_keep_ratio:g}",
            f"{found.device} in {found.dtype}, {found.clips_per_batch} clips at a time; one process reads "
            f"{found.read_clips_per_second:.0f} clips/s, which is not in the table",
            f"{header}   top-1 against keep ratio {found.recommended.reference_keep_ratio:g}",
            *map(_line_of, found.ratios),
            *_lines_of_recommendation(found.ratios, found.recommended),
            *_lines_of_use(found),
        ]
    )


def _line_of(result: RatioResult) -> str:
    gflops = f"{result.gflops:.3g}" if result.gflops < 100 else f"{result.gflops:.0f}"
    costs = f"{result.keep_ratio:10g}{result.tokens:8}{gflops:>9}{result.clips_per_second:10.1f}"
    difference = f"   {_points(result)}" if result.standard_error_points else ""
    return f"{costs}{result.top1:8.1%}{result.top5:8.1%}{difference}"


def _points(result: RatioResult) -> str:
    return f"{result.difference_points:+.2f} ± {result.standard_error_points:.2f} points"


def _lines_of_recommendation(results: Sequence[RatioResult], recommended: Recommendation) -> list[str]:
    by_ratio = {result.keep_ratio: result for result in results}
    chosen, reference = by_ratio[recommended.keep_ratio], by_ratio[recommended.reference_keep_ratio]
    line = f"recommended    keep ratio {chosen.keep_ratio:g}: "
    if chosen is not reference:
        speed = chosen.clips_per_second / reference.clips_per_second
        costs = f"{speed:.2f} times the clips/s, {chosen.gflops / reference.gflops:.0%} of the GFLOPs"
        return [f"{line}{_points(chosen)}, {costs}", _certainty(recommended)]
    if chosen is results[0]:
        return [f"{line}the smallest of all, and none is more accurate"]
    below = results[results.index(chosen) - 1]
    return [f"{line}at {below.keep_ratio:g}, {-below.difference_points:.2f} points are lost"]


def _certainty(recommended: Recommendation) -> str:
    allowed, certain = f"{recommended.max_loss_points:g}", recommended.certain_keep_ratio
    bound = f"{max(recommended.loss_bound_points, 0):.2f} points at 95 % confidence, {allowed} allowed"
    if recommended.is_certain:
        return f"certain        it loses at most {bound}"
    if certain < recommended.reference_keep_ratio:
        return f"not certain    it may lose {bound}; from keep ratio {certain:g} on that is certain"
    return f"not certain    it may lose {bound}; about {recommended.videos_needed} videos tell {allowed} from none"


def _lines_of_use(found: Comparison) -> list[str]:
    ratio = f"{found.recommended.keep_ratio:g}"
    lines = [f"to use it      everest-hf predict VIDEO --model {found.model} --keep-ratio {ratio}"]
    if found.frame_oversampling == 1:  # otherwise the configuration's ratio helps to choose the frames, too
        lines.append(f"to keep it     model.config.keep_ratio = {ratio}; model.save_pretrained(FOLDER)")
    return lines


def write_report(folder: Path, found: Comparison) -> list[Path]:
    """Write keep-ratio.json, its table as CSV and its picture into a folder, each whole or not; return their paths."""
    text = json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n"
    table = [[field.name for field in fields(RatioResult)], *map(astuple, found.ratios)]
    write_whole(folder / JSON, lambda path: path.write_text(text, encoding="utf-8"))
    write_table(folder / CSV, table)
    write_whole(folder / PICTURE, lambda path: draw_keep_ratios(found.ratios, found.recommended, path))
    return [folder / name for name in (JSON, CSV, PICTURE)]
