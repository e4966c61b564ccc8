"""The choice of a keep ratio: a classifier's accuracy and speed at several ratios, measured on labelled videos."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..configuration_everest import Budget, EverestConfig, check_keep_ratio, problem_type_of
from ..cost import clip_cost
from ..data import VideoViews, collate, transforms
from ..data.workers import keep_freed_memory, naming_lost_workers, num_cores
from ..modeling_everest import EverestForVideoClassification, EverestForVideoClassificationOutput
from .evaluate import figures_of, mean_scores
from .keep_ratio_results import Comparison, RatioResult, Unreadable, paired_difference, recommend
from .threshold import find_threshold, score_tokens

RATIOS, MAX_LOSS = tuple(tenths / 10 for tenths in range(1, 11)), 1.0
ONE_CLASS = "single_label_classification"
# Each keep ratio is timed at least so many times, and until so many seconds have passed. Small models run more often
# in that time, which they need: one of their runs is too short to measure.
LEAST_ROUNDS, LEAST_SECONDS = 5, 3.0
# By keep ratio, the `keep_threshold` that was found for it with the budget "batch"; None with "clip".
Thresholds = dict[float, dict[str, float] | None]
# Gives the batches of all videos under the title of a progress bar.
Reading = Callable[[str], Iterator[dict[str, Any]]]


def tune_keep_ratio(
    model: EverestForVideoClassification,
    views: VideoViews,
    *,
    source: str = "",
    ratios: Sequence[float] | None = None,
    max_loss: float = MAX_LOSS,
    budget: Budget | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
) -> Comparison:
    """Measure a classifier at several keep ratios, without training it again, and recommend one of them.

    budget: "clip" or "batch", by default the model's own `token_budget`. With "clip" the model's forward gets the ratio.
    Where a model selects frames, the ratio of its configuration still chooses them. With "batch" the ratio is the mean
    share of the tokens: a threshold is found for it on these videos, then the model answers them with that threshold,
    and the ratio also chooses frames. The configuration is in the end what it was.

    views: of labelled videos, with count_unreadable=True. `num_workers` processes (by default one a core) read each
    video once, with "batch" twice, and the model answers it at every ratio. source: what the report calls the videos.
    ratios: by default 0.1, 0.2 … 1; with "batch" those between the config's min_keep_ratio and max_keep_ratio.
    max_loss: how many points of top-1, hundredths of the videos, may be lost against the most accurate ratio; see
    `recommend`.

    Raises:
        ValueError: see `check_request`; no video can be read; or nothing moves in any, where a threshold is sought.
    """
    config, budget = model.config, budget or model.config.token_budget
    check_request(config, ratios=ratios, max_loss=max_loss, budget=budget)
    chosen = _default_ratios(config, budget) if ratios is None else sorted(set(ratios))
    reading = partial(_read, views, batch_size, num_workers or num_cores())
    with naming_lost_workers():
        thresholds = _find_thresholds(model.eval(), reading, chosen) if budget == "batch" else dict.fromkeys(chosen)
        answers = _answer(model.eval(), reading, thresholds)
    num_videos = len(answers.index)
    # Evenly spread, since rows are often in the order of their classes.
    step = max(1, num_videos // batch_size)
    clips, read_clips_per_second = _read_again(views, answers.index[::step][:batch_size])
    seconds = _time(model, _pixel_values(model, clips), thresholds)
    results = _compare(config, answers, {ratio: len(clips) / seconds[ratio] for ratio in chosen})
    return Comparison(
        source=source,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        model=model.name_or_path,
        model_keep_ratio=config.keep_ratio,
        model_token_budget=config.token_budget,
        frame_oversampling=config.frame_oversampling,
        budget=budget,
        thresholds={str(ratio): found for ratio, found in thresholds.items() if found} or None,
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


def check_request(
    config: EverestConfig,
    *,
    ratios: Sequence[float] | None = None,
    max_loss: float = MAX_LOSS,
    budget: Budget | None = None,
) -> None:
    """Raise a ValueError unless models of this configuration can be compared so; arguments as in `tune_keep_ratio`."""
    problem_type = problem_type_of(config)
    if problem_type != ONE_CLASS:
        raise ValueError(f"the model is one of {problem_type}; keep ratios are compared by top-1, of {ONE_CLASS}")
    tried = copy.deepcopy(config)
    tried.token_budget, tried.keep_threshold = budget or config.token_budget, None
    tried.check_selection()
    chosen = _default_ratios(config, tried.token_budget) if ratios is None else ratios
    for ratio in chosen:
        check_keep_ratio(ratio)
        if config.num_kept_tokens(ratio) == 0:
            raise ValueError(f"keep ratio {ratio:g} leaves none of the model's {config.num_tokens} tokens")
        if tried.token_budget == "batch":
            tried.keep_ratio = ratio
            tried.check()
    if tried.token_budget == "clip" and len(set(chosen)) < 2:
        raise ValueError("there is one keep ratio; it takes two or more to compare")
    if not chosen:
        bounds = f"min_keep_ratio {config.min_keep_ratio:g} and max_keep_ratio {config.max_keep_ratio:g}"
        raise ValueError(f"none of the keep ratios 0.1, 0.2 … 1 lies between {bounds}; say which to measure")
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise ValueError(
            f"the loss allowed is {max_loss:g} points; it must be above 0, as nothing can show a loss of 0"
        )


def _default_ratios(config: EverestConfig, budget: Budget) -> Sequence[float]:
    least, most = config.token_bounds()
    return [ratio for ratio in RATIOS if budget == "clip" or least < config.num_kept_tokens(ratio) < most]


# ---------------------------------------------------------------------- measuring


@contextmanager
def batch_budget(
    config: EverestConfig, keep_ratio: float, threshold: dict[str, float] | None = None
) -> Iterator[None]:
    """Give a configuration token_budget "batch" with a keep ratio and its `keep_threshold`, and in the end its own."""
    before = {name: getattr(config, name) for name in ("token_budget", "keep_ratio", "keep_threshold")}
    config.token_budget, config.keep_ratio, config.keep_threshold = "batch", keep_ratio, threshold
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _run(
    model: EverestForVideoClassification,
    pixel_values: torch.Tensor,
    ratio: float,
    threshold: dict[str, float] | None,
) -> EverestForVideoClassificationOutput:
    """Answer clips at a keep ratio: the share of each clip's tokens, or with a threshold of the clips' mean."""
    if threshold is None:
        return model(pixel_values, keep_ratio=ratio)
    with batch_budget(model.config, ratio, threshold):
        return model(pixel_values)


def _read(views: VideoViews, batch_size: int, num_workers: int, title: str) -> Iterator[dict[str, Any]]:
    """Yield the batches of all videos, with progress; raise a ValueError in the end if none could be read."""
    loader = DataLoader(
        views, batch_size, num_workers=num_workers, collate_fn=collate, worker_init_fn=keep_freed_memory
    )
    num_readable, bad = 0, []
    with tqdm(total=len(views), desc=title, unit="video") as bar:
        for batch in loader:
            num_readable += int((~batch["unreadable"]).sum())
            bad += batch["bad"]
            yield batch
            bar.update(len(batch["index"]))
    if not num_readable:
        raise ValueError(f"none of the {len(views)} videos can be read; the first is {bad[0][0]}: {bad[0][1]}")


def _find_thresholds(model: EverestForVideoClassification, reading: Reading, ratios: Sequence[float]) -> Thresholds:
    """Return the threshold at each ratio with which all views of the videos keep that share on the average."""
    config = model.config
    # Where frames are selected, the ratio chooses them too, so that each ratio has scores of its own.
    scored = ratios if config.selects_frames else ratios[:1]
    scores: dict[float, list[torch.Tensor]] = {ratio: [] for ratio in scored}
    for batch in reading("thresholds"):
        pixel_values = _pixel_values(model, batch["pixel_values"].flatten(0, 1))
        readable = (~batch["unreadable"]).repeat_interleave(batch["pixel_values"].shape[1])
        for ratio in scored:
            with batch_budget(config, ratio):
                scores[ratio].append(score_tokens(model, pixel_values).cpu()[readable])
    joined = {ratio: torch.cat(found) for ratio, found in scores.items()}
    return {ratio: find_threshold(config, joined.get(ratio, joined[scored[0]]), ratio) for ratio in ratios}


@dataclass
class _Answers:
    """Of n readable videos: scores (n, labels) at each ratio, labels (n,), row numbers; (path, reason) of the others.

    counts: with the budget "batch", the tokens of each view (n * V,) at each ratio.
    """

    scores: dict[float, torch.Tensor]
    counts: dict[float, np.ndarray]
    labels: torch.Tensor
    index: list[int]
    bad: list[tuple[str, str]]


@torch.inference_mode()
def _answer(model: EverestForVideoClassification, reading: Reading, thresholds: Thresholds) -> _Answers:
    scores: dict[float, list[torch.Tensor]] = {ratio: [] for ratio in thresholds}
    counts: dict[float, list[np.ndarray]] = {ratio: [] for ratio, threshold in thresholds.items() if threshold}
    labels: list[torch.Tensor] = []
    index: list[int] = []
    bad: list[tuple[str, str]] = []
    for batch in reading("tune-keep-ratio"):
        readable, num_views = ~batch["unreadable"], batch["pixel_values"].shape[1]
        pixel_values = _pixel_values(model, batch["pixel_values"].flatten(0, 1))
        for ratio, threshold in thresholds.items():
            output = _run(model, pixel_values, ratio, threshold)
            scores[ratio].append(mean_scores(output.logits, num_views, ONE_CLASS).cpu()[readable])
            if threshold is not None:
                kept = (output.kept_ids >= 0).sum(dim=1).cpu()  # rows are filled up with -1
                counts[ratio].append(kept[readable.repeat_interleave(num_views)].numpy())
        labels.append(batch["labels"][readable])
        index += batch["index"][readable].tolist()
        bad += batch["bad"]
    return _Answers(
        {ratio: torch.cat(found) for ratio, found in scores.items()},
        {ratio: np.concatenate(found) for ratio, found in counts.items()},
        torch.cat(labels),
        index,
        bad,
    )


def _pixel_values(model: EverestForVideoClassification, clips: torch.Tensor) -> torch.Tensor:
    return transforms.normalize(clips.to(model.device), model.config.image_mean, model.config.image_std)


def _read_again(views: VideoViews, indices: list[int]) -> tuple[torch.Tensor, float]:
    """Return the clips uint8 (B, T, C, h, w) of some rows, and how many clips a second this process reads."""
    views[indices[0]]  # loads the decoder, which would count otherwise
    start = time.perf_counter()
    clips = collate([views[index] for index in indices])["pixel_values"].flatten(0, 1)
    return clips, len(clips) / (time.perf_counter() - start)


@torch.inference_mode()
def _time(
    model: EverestForVideoClassification, pixel_values: torch.Tensor, thresholds: Thresholds
) -> dict[float, float]:
    """Return the median seconds of a batch at each ratio.

    The ratios take turns, so that a change in the machine's load meets all of them. No video is decoded meanwhile:
    decoding would slow down some ratios more than others. The model has run at every ratio before, so it is warm.
    """
    seconds: dict[float, list[float]] = {ratio: [] for ratio in thresholds}
    start = time.perf_counter()
    with tqdm(total=LEAST_ROUNDS, desc="timing", unit="round", leave=False) as bar:
        while bar.n < LEAST_ROUNDS or time.perf_counter() - start < LEAST_SECONDS:
            for ratio, threshold in thresholds.items():
                seconds[ratio].append(_seconds(model, pixel_values, ratio, threshold))
            bar.update()
    return {ratio: statistics.median(times) for ratio, times in seconds.items()}


def _seconds(
    model: EverestForVideoClassification,
    pixel_values: torch.Tensor,
    ratio: float,
    threshold: dict[str, float] | None,
) -> float:
    start = time.perf_counter()
    _run(model, pixel_values, ratio, threshold)
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
        difference, error = (0.0, 0.0) if ratio == reference else paired_difference(hits[ratio], hits[reference])
        measured: dict[str, Any] = {
            **_costs(config, ratio, answers.counts.get(ratio)),
            **figures_of(answers.scores[ratio], answers.labels, ONE_CLASS),
        }
        results.append(
            RatioResult(
                keep_ratio=ratio,
                clips_per_second=clips_per_second[ratio],
                **measured,
                difference_points=difference,
                standard_error_points=error,
            )
        )
    return results


def _costs(config: EverestConfig, ratio: float, counts: np.ndarray | None) -> dict[str, Any]:
    """Return the tokens of a clip, their range and GFLOPs; counts: the tokens of clips, where these differ."""
    if counts is None:
        cost = clip_cost(config, keep_ratio=ratio)
        return {**dict.fromkeys(("tokens", "tokens_low", "tokens_high"), cost.tokens), "gflops": cost.forward / 1e9}
    numbers, clips = np.unique(counts, return_counts=True)
    # A clip may keep all its tokens, but is scored all the same, which a clip at the ratio 1 is not.
    below_1 = math.nextafter(1, 0)
    shares = [min(int(number) / config.num_tokens, below_1) for number in numbers]
    forward = [clip_cost(config, keep_ratio=share).forward for share in shares]
    low, high = np.percentile(counts, (5, 95))
    return {
        "tokens": round(counts.mean()),
        "tokens_low": round(low),
        "tokens_high": round(high),
        "gflops": float(np.average(forward, weights=clips)) / 1e9,
    }
