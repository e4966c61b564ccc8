"""What benchmarks/efficiency.py has found, as a table and a picture."""

from functools import partial
from pathlib import Path

import matplotlib
import measure
from steps import SIZES

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HEADER = ["size", "task", "dtype", "model", "keep ratio", "tokens", "parameters (M)", "GFLOPs", "by formula"]
HEADER += ["rounds", "s / step", "clips / s", "× VideoMAE", "peak GiB", "utilisation", "largest batch"]
UNKNOWN = "not measured"


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table; × VideoMAE are its seconds over those of the case."""
    return measure.markdown_table(HEADER, [row(group, case) for group in results for case in group["cases"]])


def row(group: dict, case: dict) -> list[str]:
    """Return the cells of one case."""
    speedup, largest = speedup_of(group, case), case.get("largest_batch")
    return [
        *(group[name] for name in ("size", "task", "dtype")),
        case["model"],
        f"{case['keep_ratio']:g}" if case["model"] == "everest" else "",
        str(case["tokens"]),
        cell(case.get("parameters"), 1e-6, ".1f"),
        cell(case.get("flops"), 1e-9, ".4g"),
        cell(case.get("flops_by_formula"), 1e-9, ".4g") if case["model"] == "everest" else "",
        str(len(case.get("seconds_all", ()))),
        case["error"] if "error" in case else f"{case['seconds']:.3f}",
        cell(case.get("clips_per_second"), 1, ".2f"),
        cell(speedup, 1, ".2f"),
        cell(case.get("peak_bytes"), 2**-30, ".2f"),
        cell(case.get("utilisation"), 1, ".0%"),
        UNKNOWN if largest is None else str(largest["batch"]),
    ]


def cell(value: float | None, factor: float, form: str) -> str:
    """Return a figure in its unit, or that it was not measured."""
    return UNKNOWN if value is None else format(value * factor, form)


def speedup_of(group: dict, case: dict) -> float | None:
    """Return the seconds of the group's VideoMAE over those of a case, None where one of them failed."""
    videomae = next(other for other in group["cases"] if other["model"] == "videomae")
    return videomae["seconds"] / case["seconds"] if "seconds" in videomae and "seconds" in case else None


def draw(results: list[dict], path: Path) -> None:
    """Draw GFLOPs of a clip, and clips a second relative to VideoMAE, over the keep ratio."""
    tasks = [task for task in ("finetuning", "inference") if any(group["task"] == task for group in results)]
    figure, axes = plt.subplots(1, 1 + len(tasks), figsize=(4 * (1 + len(tasks)), 3.6), layout="constrained")
    axes = axes if tasks else [axes]
    draw_operations(results, axes[0])
    for task, axis in zip(tasks, axes[1:], strict=True):
        draw_speed([group for group in results if group["task"] == task], axis, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curve(group: dict, value) -> tuple[list[float], list[float]]:
    """Return keep ratios and value(case) of those cases of EVEREST that have one."""
    points = [(c["keep_ratio"], value(c)) for c in group["cases"] if c["model"] == "everest" and "flops" in c]
    points = [(ratio, y) for ratio, y in points if y is not None]
    return [ratio for ratio, _ in points], [y for _, y in points]


def draw_operations(results: list[dict], axis) -> None:
    """Draw the operations of inference (of the first task where it was left out), by size."""
    task = "inference" if any(group["task"] == "inference" for group in results) else results[0]["task"]
    for size in SIZES:
        for group in [g for g in results if (g["size"], g["task"]) == (size, task)][:1]:
            axis.plot(*curve(group, lambda case: case["flops"] / 1e9), marker="o", markersize=3, label=size)
    axis.set(title=f"GFLOPs a clip, {task}", xlabel="keep ratio")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def draw_speed(groups: list[dict], axis, task: str) -> None:
    """Draw how many times the clips a second of VideoMAE: a colour for a size, dashes for 16 bits."""
    colours = {size: f"C{i}" for i, size in enumerate(dict.fromkeys(group["size"] for group in groups))}
    for group in groups:
        style = {"color": colours[group["size"]], "linestyle": "-" if group["dtype"] == "fp32" else "--"}
        speed = curve(group, partial(speedup_of, group))
        axis.plot(*speed, marker="o", markersize=3, label=f"{group['size']} {group['dtype']}", **style)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(title=f"clips / s over VideoMAE's, {task}", xlabel="keep ratio", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="upper right")
