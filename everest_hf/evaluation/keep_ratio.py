"""Which keep ratio to run a classifier at: its accuracy and speed over a range of them, on labelled videos."""

import csv
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from ..files import write_whole
from ..modeling_everest import EverestForVideoClassification
from ..visualize import draw_keep_ratios
from .evaluate import figures_of, mean_scores

RATIOS, MAX_LOSS = tuple(tenths / 10 for tenths in range(1, 11)), 1.0
ONE_CLASS = "single_label_classification"
# Times that each keep ratio is timed at least, and seconds that the timing takes at least: small models are timed more
# often, as single times of theirs say little.
LEAST_ROUNDS, LEAST_SECONDS = 5, 3.0
# Standard deviations above a normal estimate below which the true value lies in 95 of 100 cases.
ONE_SIDED_95 = statistics.NormalDist().inv_cdf(0.95)
# The files of a report.
JSON, CSV, PICTURE = "keep-ratio.json", "keep-ratio.csv", "keep-ratio.png"


def tune_keep_ratio(
    model: EverestForVideoClassification,
    views: VideoViews,
    *,
    ratios: Sequence[float] = RATIOS,
    max_loss: float = MAX_LOSS,
    batch_size: int = 8,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Measure a classifier as it is, not trained anew, at several keep ratios, and recommend one of them.

    A ratio is that of the model's forward: where there is frame selection, the configuration's still chooses frames.

    views: of labelled videos, with count_unreadable=True. Each video is read once, by `num_workers` processes (by
    default one a core), and goes through the model at every ratio. max_loss: points, hundredths of the videos, of
    top-1 that may be lost against the most accurate ratio; see `recommend`.

    Returns what JSON can hold: the settings, `ratios` (for each, from small to large, its tokens, GFLOPs a clip, clips
    a second, the figures of an evaluation, and the difference from the most accurate one, see `paired_difference`),
    `recommended`, and `unreadable`, the videos that were left out. Clips a second are those of the model alone on
    batches of `clips_per_batch`; `read_clips_per_second` is what one process decodes.

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
    rows = _compare(config, answers, {ratio: len(clips) / seconds[ratio] for ratio in ratios})
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": model.name_or_path,
        "model_keep_ratio": config.keep_ratio,
        "frame_oversampling": config.frame_oversampling,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "videos": num_videos,
        "views": [views.num_segments, views.num_crops],
        "clips_per_batch": len(clips),
        "read_clips_per_second": read_clips_per_second,
        "ratios": rows,
        "recommended": recommend(rows, num_videos, max_loss),
        "unreadable": [{"video": path, "reason": reason} for path, reason in answers.bad],
    }


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
    """Scores (n, labels) at each ratio, labels (n,) and rows of n readable videos; (path, reason) of the others."""

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
    """Return the clips uint8 (B, T, C, h, w) of some rows, and how many a second this process reads of them."""
    views[indices[0]]  # loads the decoder
    start = time.perf_counter()
    clips = collate([views[index] for index in indices])["pixel_values"].flatten(0, 1)
    return clips, len(clips) / (time.perf_counter() - start)


@torch.inference_mode()
def _time(model: EverestForVideoClassification, pixel_values: torch.Tensor, ratios: list[float]) -> dict[float, float]:
    """Return the median seconds of a batch at each ratio.

    In turn, so that a change in the machine's load meets all of them, and not while videos are decoded, which takes
    cores away from some more than from others. The model has worked at every ratio before.
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


def _compare(config: EverestConfig, answers: _Answers, clips_per_second: dict[float, float]) -> list[dict[str, Any]]:
    """Return what is known of each ratio, from the smallest to the largest.

    The differences are from the most accurate ratio, of equal ones the largest: a model that was fine-tuned at one
    ratio may be worse at a larger one.
    """
    hits = {ratio: scores.numpy().argmax(axis=1) == answers.labels.numpy() for ratio, scores in answers.scores.items()}
    rows, reference = [], max(hits, key=lambda ratio: (hits[ratio].sum(), ratio))
    for ratio in hits:
        cost = clip_cost(config, keep_ratio=ratio)
        difference, error = (0.0, 0.0) if ratio == reference else paired_difference(hits[ratio], hits[reference])
        rows.append(
            {
                "keep_ratio": ratio,
                "tokens": cost.tokens,
                "gflops": cost.forward / 1e9,
                "clips_per_second": clips_per_second[ratio],
                **figures_of(answers.scores[ratio], answers.labels, ONE_CLASS),
                "difference_points": difference,
                "standard_error_points": error,
            }
        )
    return rows


def paired_difference(hits: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return by how many points an accuracy is above another one on the same videos, and the standard error of that.

    hits, reference: bool (n,), whether a video is classified rightly. The standard error counts half a video more for
    each of the four outcomes of a pair, so that it is not 0 where no answer differs: Agresti and Min, Simple improved
    confidence intervals for comparing matched proportions, Statistics in Medicine 24 (2005).
    """
    gained, lost = int((hits & ~reference).sum()), int((~hits & reference).sum())
    count = len(hits) + 2
    variance = gained + lost + 1 - (gained - lost) ** 2 / count
    return 100 * (gained - lost) / len(hits), 100 * math.sqrt(variance) / count


def recommend(rows: Sequence[dict[str, Any]], num_videos: int, max_loss: float) -> dict[str, Any]:
    """Return the smallest keep ratio that loses at most max_loss points, and how sure that is.

    rows: from the smallest ratio to the largest, with their differences from the most accurate one, of equal ones the
    largest: `reference_keep_ratio`. All ratios between that and the recommended one lose at most max_loss, too.
    `loss_bound_points` is what the true loss exceeds in 5 of 100 cases, taking the measured one as normally
    distributed, and `is_certain` says whether that is within max_loss. From `certain_keep_ratio` on it is for every
    ratio up to the reference; where that is the reference, `videos_needed` such videos would tell a loss of max_loss
    from none.

    Reference and ratio are chosen on the videos that the loss is measured on: on others it may be a little different.
    """
    reference = _most_accurate(rows)
    rows = rows[: rows.index(reference) + 1]
    chosen = _smallest_of_run(rows, lambda row: -row["difference_points"] <= max_loss)
    certain = _smallest_of_run(rows, lambda row: _loss_bound(row) <= max_loss)
    return {
        **{key: chosen[key] for key in ("keep_ratio", "difference_points", "standard_error_points")},
        "reference_keep_ratio": reference["keep_ratio"],
        "max_loss_points": max_loss,
        "loss_bound_points": _loss_bound(chosen),
        "is_certain": _loss_bound(chosen) <= max_loss,
        "certain_keep_ratio": certain["keep_ratio"],
        "videos_needed": math.ceil(num_videos * (ONE_SIDED_95 * chosen["standard_error_points"] / max_loss) ** 2),
    }


def _most_accurate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: (row["difference_points"], row["keep_ratio"]))


def _smallest_of_run(rows: Sequence[dict[str, Any]], holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the first row of the last ones that all hold; the very last does."""
    return list(takewhile(holds, reversed(rows)))[-1]


def _loss_bound(row: dict[str, Any]) -> float:
    return ONE_SIDED_95 * row["standard_error_points"] - row["difference_points"]


# ---------------------------------------------------------------------- for people


def as_text(summary: dict[str, Any]) -> str:
    """Return a summary of `tune_keep_ratio` in lines: a table, what is recommended, and how to follow it."""
    rows, bad = summary["ratios"], len(summary["unreadable"])
    segments, crops = summary["views"]
    header = f"{'keep ratio':>10}{'tokens':>8}{'GFLOPs':>9}{'clips/s':>10}{'top-1':>8}{'top-5':>8}"
    return "\n".join(
        [
            f"{summary['videos']} videos of {segments}x{crops} views, {bad} others are unreadable",
            f"{summary['model']}, whose own keep ratio is {summary['model_keep_ratio']:g}",
            f"{summary['device']} in {summary['dtype']}, {summary['clips_per_batch']} clips at a time; one process reads "
            f"{summary['read_clips_per_second']:.0f} clips/s, which is not in the table",
            f"{header}   top-1 against keep ratio {summary['recommended']['reference_keep_ratio']:g}",
            *map(_line_of, rows),
            *_lines_of_recommendation(rows, summary["recommended"]),
            *_lines_of_use(summary),
        ]
    )


def _line_of(row: dict[str, Any]) -> str:
    accuracies = f"{row['top1']:8.1%}{row['top5']:8.1%}"
    difference = f"   {_points(row)}" if row["standard_error_points"] else ""
    gflops = f"{row['gflops']:.3g}" if row["gflops"] < 100 else f"{row['gflops']:.0f}"
    return (
        f"{row['keep_ratio']:10g}{row['tokens']:8}{gflops:>9}{row['clips_per_second']:10.1f}{accuracies}{difference}"
    )


def _points(row: dict[str, Any]) -> str:
    return f"{row['difference_points']:+.2f} ± {row['standard_error_points']:.2f} points"


def _lines_of_recommendation(rows: Sequence[dict[str, Any]], recommended: dict[str, Any]) -> list[str]:
    by_ratio = {row["keep_ratio"]: row for row in rows}
    row, reference = (by_ratio[recommended[key]] for key in ("keep_ratio", "reference_keep_ratio"))
    line = f"recommended    keep ratio {row['keep_ratio']:g}: "
    if row is not reference:
        speed = row["clips_per_second"] / reference["clips_per_second"]
        costs = f"{speed:.2f} times the clips/s, {row['gflops'] / reference['gflops']:.0%} of the GFLOPs"
        return [f"{line}{_points(row)}, {costs}", _certainty(recommended)]
    if row is rows[0]:
        return [f"{line}the smallest of all, and none is more accurate"]
    below = rows[rows.index(row) - 1]
    return [f"{line}at {below['keep_ratio']:g}, {-below['difference_points']:.2f} points are lost"]


def _certainty(recommended: dict[str, Any]) -> str:
    allowed, certain = f"{recommended['max_loss_points']:g}", recommended["certain_keep_ratio"]
    bound = f"{max(recommended['loss_bound_points'], 0):.2f} points at 95 % confidence, {allowed} allowed"
    if recommended["is_certain"]:
        return f"certain        it loses at most {bound}"
    if certain < recommended["reference_keep_ratio"]:
        return f"not certain    it may lose {bound}; from keep ratio {certain:g} on that is certain"
    return f"not certain    it may lose {bound}; about {recommended['videos_needed']} videos tell {allowed} from none"


def _lines_of_use(summary: dict[str, Any]) -> list[str]:
    ratio = f"{summary['recommended']['keep_ratio']:g}"
    lines = [f"to use it      everest-hf predict VIDEO --model {summary['model']} --keep-ratio {ratio}"]
    if summary["frame_oversampling"] == 1:  # otherwise the configuration's ratio helps to choose the frames, too
        lines.append(f"to keep it     model.config.keep_ratio = {ratio}; model.save_pretrained(FOLDER)")
    return lines


def write_report(folder: Path, summary: dict[str, Any]) -> list[Path]:
    """Write a summary of `tune_keep_ratio`, its table and its picture into a folder, each whole; return their paths."""
    writers = {
        JSON: lambda path: path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"),
        CSV: lambda path: _write_csv(path, summary["ratios"]),
        PICTURE: lambda path: draw_keep_ratios(summary["ratios"], summary["recommended"], path),
    }
    for name, write in writers.items():
        write_whole(folder / name, write)
    return [folder / name for name in writers]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
