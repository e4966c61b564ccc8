"""What tokens cost: operations, time and memory of EVEREST over the keep ratio, beside Transformers' VideoMAE.

    python benchmarks/efficiency.py --device cpu --plot docs/efficiency.png
    python benchmarks/efficiency.py --device cpu --sizes small --dtypes bf16 --tasks pretraining finetuning \\
        --ratios 0.6 1 --memory 4 --patience 10 --out benchmarks/results/efficiency-memory-cpu.json
    python benchmarks/efficiency.py --device cuda --batch 64 --dtypes bf16 --compile --plot docs/efficiency-cuda.png
    python benchmarks/efficiency.py --device cuda --batch 8 --ratios 0.6 1 --memory 24 \\
        --out benchmarks/results/efficiency-memory-cuda.json

For each size, task and dtype one group of cases: EVEREST at every keep ratio (in pre-training at its own), and
VideoMAE, which pre-trains with a tube mask over 0.9 of the tokens and else works on all. A training step is forward,
backward and AdamW; inference is a forward pass of a classifier. The clips are real, read from videos at several places
by the package's own reader; the result file names them.

seconds         of a step; the cases of a group take turns. A group ends after --repeats rounds, or with the round in
                which it has taken --patience seconds.
GFLOPs          of a clip: as torch.utils.flop_counter counts them, and by the formula of everest_hf/cost.py. Where the
                two are more than 1 % apart, the run ends with an error. Both take attention as one fused kernel.
utilisation     counted operations a second over those of a large matrix product in the same dtype, which takes turns
                with the steps.
peak memory     on a CPU of a process of its own for each case, whose clips are made, not read: see
                `measure.peak_bytes`. On a GPU the most that tensors hold during a step, without those of other cases.
largest batch   with --memory: the most clips whose peak stays within so many GiB. It is estimated from the peaks of two
                batches, run, and corrected by what the runs show; on a GPU they get no more memory than that.

A case that fails, for want of memory say, is written as such, and the others go on. The result file is written after
each group; the same command goes on with the one that a stopped run has left. Prints a Markdown table, and writes it
and a plot beside the result file. The defaults take about 25 minutes on two idle cores, most of them for large.
"""

import argparse
import json
import math
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import measure
import torch
from efficiency_report import draw, table
from steps import (
    SIZES,
    TASKS,
    Case,
    Step,
    everest_config,
    num_encoder_tokens,
    num_warmup_steps,
    peak_bytes_of,
    real_views,
    rough_cost,
)
from tqdm import tqdm

from everest_hf.cost import clip_cost

COST_TASKS = {"pretraining": "pretrain", "finetuning": "finetune", "inference": "inference"}
RATIOS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
# Rows and columns of the matrix product that stands for what a device can do, and how often it is done at a time.
PRODUCT_SIZES, PRODUCTS = {"cpu": 2048, "cuda": 8192}, 5
# Share by which the two ways to count operations may differ.
TOLERANCE = 0.01
# An estimated batch is run, and estimated again from what it took, at most so many times.
LARGEST_BATCH_TRIES = 8
# What a step raises where memory is not enough, in this process or in one of its own.
FAILURES = (RuntimeError, MemoryError, BrokenProcessPool)


# ------------------------------------------------------------------------------------------------------------ cases


def groups_of(args: argparse.Namespace) -> list[dict[str, Case]]:
    """Return what to measure: cases by name, those of one size, task and dtype together."""
    return [cases_of(args, size, task, dtype) for size in args.sizes for task in args.tasks for dtype in args.dtypes]


def cases_of(args: argparse.Namespace, size: str, task: str, dtype: str) -> dict[str, Case]:
    """Return the cases of a group by name, EVEREST's by rising keep ratio."""
    common = {"task": task, "size": size, "dtype": dtype, "batch": args.batch, "device": str(args.device)}
    common |= {"attn": "sdpa", "compile": args.compile, "clips": "real"}
    videomae = Case(model="videomae", keep_ratio=1.0, **common)
    if task == "pretraining":
        ratios = [everest_config(videomae).pretraining_keep_ratio]
    else:
        ratios = sorted(set(args.ratios))
    everest = {f"everest {ratio:g}": Case(model="everest", keep_ratio=ratio, **common) for ratio in ratios}
    return everest | {"videomae": videomae}


def overrides_of(case: Case) -> dict[str, float]:
    """Return what a call of the model must be told: one model serves all keep ratios."""
    return {"keep_ratio": case.keep_ratio} if case.model == "everest" and case.task != "pretraining" else {}


class Attempts:
    """Makes calls by name and keeps why they failed; a call of a name that has failed is not made again."""

    def __init__(self):
        self.errors: dict[str, str] = {}

    def __call__(self, name: str, function, *args, **kwargs):
        if name in self.errors:
            return None
        try:
            return function(*args, **kwargs)
        except FAILURES as error:
            self.errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return None


# ------------------------------------------------------------------------------------------------------- operations


def counted_flops(case: Case, step: Step, known: dict) -> int:
    """Return what torch counts of a clip, and keep it in `known`: it is the same for every dtype."""
    key = case.model, case.size, case.task, case.keep_ratio
    if key not in known:
        known[key] = step.count_flops(**overrides_of(case))
    return known[key]


def formula_flops(case: Case) -> int:
    """Return what the formula gives for a clip of EVEREST."""
    ratio = overrides_of(case).get("keep_ratio")
    return clip_cost(everest_config(case), COST_TASKS[case.task], keep_ratio=ratio).total


def check_agreement(name: str, counted: int, formula: int) -> None:
    """End the run where torch's count and the formula differ."""
    if not math.isclose(counted, formula, rel_tol=TOLERANCE):
        raise SystemExit(
            f"error: {name}: torch counts {counted / 1e9:.4g} GFLOPs a clip, and everest_hf.cost gives "
            f"{formula / 1e9:.4g}: more than {TOLERANCE:.0%} apart"
        )


# ----------------------------------------------------------------------------------------------------------- memory


def largest_batch(case: Case, limit: int) -> dict:
    """Return the largest batch whose peak stays within `limit` bytes, with its peak, and the peak of each batch tried.

    Peaks grow by the same for each clip, so two of them give an estimate of the third; what that one took corrects the line. A
    batch that fails counts as too large. batch 0: not even one clip fits.
    """
    attempt, peaks = Attempts(), {}

    def fits(batch: int) -> bool:
        peaks[batch] = attempt(str(batch), peak_bytes_of, replace(case, batch=batch), limit)
        return peaks[batch] is not None and peaks[batch] <= limit

    low, high = 0, math.inf  # the largest batch that fits, and the smallest that does not
    following = 1
    for _ in range(2 + LARGEST_BATCH_TRIES):
        low, high = (following, high) if fits(following) else (low, following)
        following = estimated_batch(peaks, limit, low, high)
        if following <= low or following >= high:
            break
    return {"limit_bytes": limit, "batch": low, "peak_bytes": peaks.get(low), "tried": peaks}


def estimated_batch(peaks: dict[int, int | None], limit: int, low: int, high: float) -> int:
    """Return the batch to try next, between `low` and `high` where one is left between them.

    It lies on the line through the two that enclose it or, while none was too large, through the two largest.
    """
    if peaks.get(high, high) is None:  # it failed, so that nothing says by how much it was too large
        return max(low + 1, (low + int(high)) // 2)
    known = sorted(batch for batch, peak in peaks.items() if peak is not None)
    if len(known) < 2:
        return low + 1
    at = min(max(1, known.index(low) + 1), len(known) - 1) if low in known else 1
    first, last = known[at - 1], known[at]
    clip = max(1.0, (peaks[last] - peaks[first]) / (last - first))
    estimate = first + int((limit - peaks[first]) / clip)
    return int(max(low + 1, min(estimate, high - 1)))


# ------------------------------------------------------------------------------------------------------ measurement


def build_product(dtype: str, device: torch.device):
    """Return a function that multiplies large matrices, and the operations that it does."""
    n = PRODUCT_SIZES[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=measure.DTYPES[dtype]) for _ in range(2))

    def multiply() -> None:
        for _ in range(PRODUCTS):
            a @ b

    return multiply, PRODUCTS * 2 * n**3


def measure_memory(cases: dict[str, Case], memory: float | None, attempt: Attempts, bar: tqdm) -> dict[str, dict]:
    """Return each case's peak memory (a GPU's is taken with the times) and, for `memory` GiB, its largest batch."""
    figures = {}
    for name, case in cases.items():
        on_gpu = torch.device(case.device).type == "cuda"
        figures[name] = {"peak_bytes": None if on_gpu else attempt(name, peak_bytes_of, case)}
        if memory is not None:
            figures[name]["largest_batch"] = largest_batch(case, int(memory * 2**30))
        bar.update(rough_cost(case))
    return figures


def build_steps(cases: dict[str, Case], attempt: Attempts) -> dict[str, Step]:
    """Return the step of each case that has not failed: one for each model."""
    built = {}
    for name, case in cases.items():
        if name not in attempt.errors and case.model not in built:
            built[case.model] = attempt(name, Step, case)
    return {name: built[case.model] for name, case in cases.items() if built.get(case.model) is not None}


def measure_times(cases: dict[str, Case], args: argparse.Namespace, attempt: Attempts, known: dict) -> dict[str, dict]:
    """Return each case's operations and seconds, and under "product" those of the matrix product."""
    steps = build_steps(cases, attempt)
    figures = {}
    for name, step in steps.items():
        counted = counted_flops(cases[name], step, known)
        figures[name] = {"parameters": step.model.num_parameters(), "flops": counted}
        if cases[name].model == "everest":
            figures[name]["flops_by_formula"] = formula_flops(cases[name])
            check_agreement(name, counted, figures[name]["flops_by_formula"])
    multiply, operations = build_product(next(iter(cases.values())).dtype, args.device)
    calls = {name: partial(attempt, name, step, **overrides_of(cases[name])) for name, step in steps.items()}
    calls["product"] = multiply
    warm_up(calls, cases, args)
    if args.device.type == "cuda":
        # By model, whose cases share a step.
        held = {cases[name].model: step.held_bytes for name, step in steps.items()}
        for name in steps:
            of_others = sum(held.values()) - held[cases[name].model]
            figures[name]["peak_bytes"] = measure.gpu_peak_bytes(calls[name], args.device) - of_others
    seconds = measure.interleave(calls, args.repeats, args.device, warmup=0, patience=args.patience)
    for name in figures:
        figures[name] |= measure.summary(seconds[name])
    figures["product"] = measure.summary(seconds["product"])
    figures["product"]["flops_per_second"] = operations / figures["product"]["seconds"]
    return figures


def warm_up(calls: dict, cases: dict[str, Case], args: argparse.Namespace) -> None:
    """Call what has a first time: on a GPU and compiled each case, else one of each model, the cheapest."""
    each = args.compile or args.device.type == "cuda"
    models = {case.model: name for name, case in reversed(cases.items())}
    for name in calls if each else ["product", *set(models.values()) & set(calls)]:
        for _ in range(num_warmup_steps(cases["videomae"])):
            calls[name]()


def measure_group(cases: dict[str, Case], args: argparse.Namespace, known: dict, bar: tqdm) -> dict:
    """Measure the cases of a group: memory in processes of their own, then operations and time here, in turn."""
    attempt = Attempts()
    memory = measure_memory(cases, args.memory, attempt, bar)
    times = measure_times(cases, args, attempt, known)
    bar.update(sum(map(rough_cost, cases.values())))
    product = times.pop("product")
    results = {name: memory[name] | times.get(name, {}) for name in cases}
    case = cases["videomae"]
    return {
        **{field: getattr(case, field) for field in ("size", "task", "dtype")},
        "product": product,
        "cases": [
            result_of(cases[name], figures, product, attempt.errors.get(name)) for name, figures in results.items()
        ],
    }


def result_of(case: Case, figures: dict, product: dict, error: str | None) -> dict:
    """Return the fields of one case; of one that failed, the reason in place of its times."""
    head = {"model": case.model, "keep_ratio": case.keep_ratio, "tokens": num_encoder_tokens(case)}
    if error is None and "seconds" not in figures:
        error = "not built: another case of the model failed"
    if error is not None:
        times = ("seconds", "seconds_min", "seconds_all")
        return head | {name: value for name, value in figures.items() if name not in times} | {"error": error}
    rate = case.batch * figures["flops"] / figures["seconds"]
    return {
        **head,
        **figures,
        "clips_per_second": case.batch / figures["seconds"],
        "utilisation": rate / product["flops_per_second"],
    }


def run(args: argparse.Namespace) -> list[dict]:
    """Measure all groups that a stopped run has not, show the progress, and write the results after each."""
    groups, content = groups_of(args), resumed(args)
    known: dict = {}
    total = sum(2 * rough_cost(case) for cases in groups for case in cases.values())
    with tqdm(total=total, bar_format=measure.BAR, dynamic_ncols=True) as bar:
        for number, cases in enumerate(groups):
            case = cases["videomae"]
            bar.set_description(f"{case.task} {case.size} {case.dtype}")
            if number < len(content["results"]):
                bar.update(sum(2 * rough_cost(case) for case in cases.values()))
                continue
            content["results"].append(measure_group(cases, args, known, bar))
            content["complete"] = number + 1 == len(groups)
            measure.write_json(args.out, content)
            measure.forget()
    return content["results"]


def resumed(args: argparse.Namespace) -> dict:
    """Return the content of the result file: that of a stopped run on this machine with these options, or a new one."""
    facts = measure.facts_of_run(args.device)
    settings = measure.settings_of(args)
    new = {**facts, "settings": settings, "clips": real_views()[: args.batch], "complete": False, "results": []}
    try:
        old = json.loads(args.out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return new
    same = all(old.get(name) == new[name] for name in ("versions", "hardware", "settings", "clips"))
    return old if same and not old.get("complete", True) else new


# -------------------------------------------------------------------------------------------------------- arguments


def positive(text: str) -> float:
    """Read an argument that measures something."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base", "large"])
    parser.add_argument("--ratios", nargs="+", type=measure.share, default=RATIOS, help="of fine-tuning, inference")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", choices=measure.DTYPES, default=["fp32", "bf16"], help="bf16: autocast")
    parser.add_argument("--batch", type=measure.positive_int, default=1, help="clips a step")
    parser.add_argument("--repeats", type=measure.positive_int, default=5, help="rounds of a group at most")
    parser.add_argument("--patience", type=positive, default=40.0, help="seconds after which no round begins")
    parser.add_argument("--memory", type=positive, metavar="GIB", help="also seek the largest batch within it")
    parser.add_argument("--device", type=measure.device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument(
        "--matmul-precision",
        choices=["highest", "high", "medium"],
        default=torch.get_float32_matmul_precision(),
        help="torch.set_float32_matmul_precision, of fp32: high is TF32 on a GPU",
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/efficiency-DEVICE.json")
    parser.add_argument("--plot", type=Path, help="default: beside the result file")
    args = parser.parse_args(argv)
    args.out = args.out or measure.RESULTS / f"efficiency-{args.device.type}.json"
    args.plot = args.plot or args.out.with_suffix(".png")
    return args


def main() -> None:
    args = arguments()
    torch.set_float32_matmul_precision(args.matmul_precision)
    try:
        results = run(args)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped: what was measured is in {args.out}, and the same command goes on") from None
    args.out.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")
    draw(results, args.plot)
    print(table(results))
    print(f"\n{measure.hardware(args.device)}\nwritten to {args.out}, {args.out.with_suffix('.md')} and {args.plot}")


if __name__ == "__main__":
    main()
