"""What a comparison of keep ratios is reported as: text for people, files, and the checkpoint that takes the choice over."""

import json
import os
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from ..configuration_everest import Budget, EverestConfig
from ..files import write_table, write_whole
from ..visualize import draw_keep_ratios
from .keep_ratio_results import Comparison, RatioResult, Recommendation

# The files of a report.
JSON, CSV, PICTURE = "keep-ratio.json", "keep-ratio.csv", "keep-ratio.png"
CONFIG = "config.json"  # of a checkpoint


def as_text(found: Comparison, kept_in: Path | None = None) -> str:
    """Return a table of the results, what is recommended, and how to use it, in lines.

    kept_in: the file that `save_recommended` wrote.
    """
    (segments, crops), is_batch = found.views, found.budget == "batch"
    tokens = f"{'tokens':>8}{'5-95 %':>11}" if is_batch else f"{'tokens':>8}"
    header = f"{'keep ratio':>10}{tokens}{'GFLOPs':>9}{'clips/s':>10}{'top-1':>8}{'top-5':>8}"
    shared = "the clips share the budget: tokens are their mean, and their 5th and 95th percentile"
    return "\n".join(
        [
            f"{found.videos} videos of {segments}x{crops} views, {len(found.unreadable)} others are unreadable",
            f"{found.model}, whose own keep ratio is {found.model_keep_ratio:g}",
            f"{found.device} in {found.dtype}, {found.clips_per_batch} clips at a time; one process reads "
            f"{found.read_clips_per_second:.0f} clips/s, which is not in the table",
            *([shared] if is_batch else []),
            f"{header}   top-1 against keep ratio {found.recommended.reference_keep_ratio:g}",
            *(_line_of(result, found.budget) for result in found.ratios),
            *_lines_of_recommendation(found.ratios, found.recommended),
            *_lines_of_use(found, kept_in),
        ]
    )


def _line_of(result: RatioResult, budget: Budget) -> str:
    gflops = f"{result.gflops:.3g}" if result.gflops < 100 else f"{result.gflops:.0f}"
    spread = f"{f'{result.tokens_low}-{result.tokens_high}':>11}" if budget == "batch" else ""
    costs = f"{result.keep_ratio:10g}{result.tokens:8}{spread}{gflops:>9}{result.clips_per_second:10.1f}"
    difference = f"   {_points(result)}" if result.standard_error_points else ""
    return f"{costs}{result.top1:8.1%}{result.top5:8.1%}{difference}"


def _points(result: RatioResult) -> str:
    return f"{result.difference_points:+.2f} ± {result.standard_error_points:.2f} points"


def _lines_of_recommendation(results: Sequence[RatioResult], recommended: Recommendation) -> list[str]:
    by_ratio = {result.keep_ratio: result for result in results}
    chosen, reference = by_ratio[recommended.keep_ratio], by_ratio[recommended.reference_keep_ratio]
    line = f"recommended    keep ratio {chosen.keep_ratio:g}: "
    if len(results) == 1:
        return [f"{line}the only one that was measured"]
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


def _lines_of_use(found: Comparison, kept_in: Path | None) -> list[str]:
    ratio = f"{found.recommended.keep_ratio:g}"
    command = f"everest-hf predict VIDEO --model {found.model}"
    if kept_in is not None:
        return [f"to use it      {command}", kept_line(found, kept_in)]
    if found.budget == "clip":
        lines = [f"to use it      {command} --keep-ratio {ratio}"]
    else:
        values = ", ".join(f"{name}={value!r}" for name, value in recommended_fields(found).items())
        lines = [f"to use it      from_pretrained({found.model!r}, {values})"]
    if found.frame_oversampling > 1:  # the configuration's ratio helps to choose the frames, too
        return lines
    if found.budget == found.model_token_budget == "clip":
        return [*lines, f"to keep it     model.config.keep_ratio = {ratio}; model.save_pretrained(FOLDER)"]
    return [*lines, "to keep it     the same command with --save"]


def write_report(folder: Path, found: Comparison) -> list[Path]:
    """Write keep-ratio.json, its table as CSV and its picture into a folder, each whole or not; return their paths."""
    text = json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n"
    table = [[field.name for field in fields(RatioResult)], *map(astuple, found.ratios)]
    write_whole(folder / JSON, lambda path: path.write_text(text, encoding="utf-8"))
    write_table(folder / CSV, table)
    write_whole(folder / PICTURE, lambda path: draw_keep_ratios(found.ratios, found.recommended, path))
    return [folder / name for name in (JSON, CSV, PICTURE)]


# ---------------------------------------------------------------------- into the checkpoint


def recommended_fields(found: Comparison) -> dict[str, Any]:
    """Return the fields of a configuration that have the model keep the tokens that are recommended."""
    ratio = found.recommended.keep_ratio
    threshold = None if found.thresholds is None else found.thresholds[str(ratio)]
    return {"keep_ratio": ratio, "token_budget": found.budget, "keep_threshold": threshold}


def check_folder(folder: Path) -> None:
    """Raise a ValueError unless `save_recommended` can write into this folder."""
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{folder}: --save needs a checkpoint in a folder here that can be written")


def check_saving(config: EverestConfig) -> None:
    """Raise a ValueError if to save what is recommended would change more than was measured."""
    if config.frame_oversampling > 1:
        value = config.frame_oversampling
        raise ValueError(
            f"with frame_oversampling {value:g} the saved keep_ratio also chooses frames; leave --save out"
        )


def save_recommended(folder: Path, found: Comparison) -> Path:
    """Write what is recommended into a checkpoint's config.json, whole or not at all, and nothing else; return its path."""
    path = folder / CONFIG
    stored = {**json.loads(path.read_text(encoding="utf-8")), **recommended_fields(found)}
    text = json.dumps(stored, indent=2) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return path


def kept_line(found: Comparison, path: Path) -> str:
    """Say in a line what `save_recommended` wrote."""
    ratio, budget, threshold = recommended_fields(found).values()
    kept = "" if threshold is None else f", keep_threshold {threshold['medians']:.3g} medians"
    card = "; README.md there still describes what was before" if path.with_name("README.md").exists() else ""
    return f"kept           keep_ratio {ratio:g}, token_budget {budget}{kept}, in {path}{card}"
