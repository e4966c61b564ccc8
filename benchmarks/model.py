"""Time and memory of EVEREST beside Transformers' VideoMAE: pre-training, fine-tuning, inference.

    python benchmarks/model.py
    python benchmarks/model.py --sizes base --dtypes bf16 --batch 64 --device cuda --compile

Both models run in one process, in turn, on the same clips; for each size, task and dtype in a new one, since a process
that has held more memory before has less to get from the system, and is faster. A training step is forward, backward and
AdamW; inference is a forward pass. VideoMAE pre-trains with a tube mask over 0.9 of the tokens, and fine-tunes and
infers on all of them; EVEREST pre-trains with its defaults and else keeps --keep-ratio of the tokens. Peak memory is
taken in a process of its own for each case: see `measure.peak_bytes` for what it holds.

The clips are squares that move over a still background. Their content decides which tokens are kept but not how many,
so a step costs the same on any clips; `--clips noise` and `--clips real` show it.

Prints a Markdown table and writes every repetition to a JSON file. The defaults take about ten minutes on two idle
cores.
"""

import argparse
import statistics
from pathlib import Path

import measure
import torch
from steps import (
    CLIPS,
    MODELS,
    SIZES,
    TASKS,
    Case,
    Step,
    num_encoder_tokens,
    num_warmup_steps,
    peak_bytes_of,
    rough_cost,
)
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------ measurement


def time_pair(cases: dict[str, Case], repeats: int, progress: dict) -> dict[str, list[float]]:
    """Return the seconds of each repetition, by model, and show how far it is. To be called in a process of its own.

    The time that the bar says has gone by is that of this pair.
    """
    device, warmup = torch.device(cases["everest"].device), num_warmup_steps(cases["everest"])
    with tqdm(**progress, bar_format=measure.BAR, dynamic_ncols=True) as bar:
        steps = {name: Step(case) for name, case in cases.items()}
        return measure.interleave(
            steps, repeats, device, warmup, on_call=lambda name: bar.update(rough_cost(cases[name]))
        )


def measure_pair(cases: dict[str, Case], repeats: int, memory: bool, progress: dict) -> dict:
    """Measure one case of each model, in turn. progress: what `tqdm` is told of the state of all pairs."""
    peaks = {name: peak_bytes_of(case) if memory else None for name, case in cases.items()}
    seconds = measure.in_child_process(time_pair, cases, repeats, progress)
    figures = {
        name: {
            "tokens": num_encoder_tokens(case),
            **measure.summary(seconds[name]),
            "clips_per_second": case.batch / measure.summary(seconds[name])["seconds"],
            "peak_bytes": peaks[name],
        }
        for name, case in cases.items()
    }
    everest, videomae = figures["everest"], figures["videomae"]
    # Of each round on its own: what slows the machine for a while then slows both.
    rounds = [slow / fast for slow, fast in zip(seconds["videomae"], seconds["everest"], strict=True)]
    case = cases["everest"]
    return {
        "size": case.size,
        "task": case.task,
        "dtype": case.dtype,
        "batch": case.batch,
        **figures,
        "speedup": statistics.median(rounds),
        "speedup_range": [min(rounds), max(rounds)],
        "memory_ratio": videomae["peak_bytes"] / everest["peak_bytes"] if memory else None,
    }


def cost_of(pair: dict[str, Case], repeats: int) -> float:
    """Return a number in proportion to the time of a pair's steps, for the progress bar."""
    return sum((repeats + num_warmup_steps(case)) * rough_cost(case) for case in pair.values())


def pairs_of(args: argparse.Namespace) -> list[dict[str, Case]]:
    """Return what to measure: for every size, task and dtype a case of each model."""
    common = {"batch": args.batch, "keep_ratio": args.keep_ratio, "device": str(args.device), "attn": args.attn}
    common |= {"compile": args.compile, "clips": args.clips}
    return [
        {model: Case(model=model, task=task, size=size, dtype=dtype, **common) for model in MODELS}
        for size in args.sizes
        for task in args.tasks
        for dtype in args.dtypes
    ]


def run(args: argparse.Namespace) -> list[dict]:
    """Measure all pairs and show the progress."""
    pairs = pairs_of(args)
    costs = [cost_of(pair, args.repeats) for pair in pairs]
    results = []
    for i, pair in enumerate(pairs):
        case = pair["everest"]
        progress = {"desc": f"{case.task} {case.size} {case.dtype}: ", "total": sum(costs), "initial": sum(costs[:i])}
        results.append(measure_pair(pair, args.repeats, args.memory, progress))
        print(f"{progress['desc']}{results[-1]['speedup']:.2f} x", flush=True)
    return results


# ----------------------------------------------------------------------------------------------------------- output


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table: seconds a step, peak memory in GiB, and VideoMAE's over EVEREST's.

    The speed-up is the median over the rounds, with the least and the most of them.
    """
    header = ["size", "task", "dtype", "batch", "tokens", "EVEREST s", "VideoMAE s", "speed-up"]
    header += ["EVEREST GiB", "VideoMAE GiB", "memory ratio"]
    return measure.markdown_table(header, [row(result) for result in results])


def row(result: dict) -> list[str]:
    """Return the cells of one result."""
    models = [result[model] for model in MODELS]
    ratio, (low, high) = result["memory_ratio"], result["speedup_range"]
    return [
        *(str(result[name]) for name in ("size", "task", "dtype", "batch")),
        " / ".join(str(figures["tokens"]) for figures in models),
        *(f"{figures['seconds']:.3f}" for figures in models),
        f"{result['speedup']:.2f} ({low:.2f} to {high:.2f}) x",
        *("not measured" if f["peak_bytes"] is None else f"{f['peak_bytes'] / 2**30:.2f}" for f in models),
        "not measured" if ratio is None else f"{ratio:.2f} x",
    ]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--dtypes", nargs="+", choices=measure.DTYPES, default=["fp32", "bf16"], help="bf16: autocast")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch", type=measure.positive_int, default=2, help="clips a step")
    parser.add_argument("--repeats", type=measure.positive_int, default=5, help="timed steps of each case")
    parser.add_argument("--keep-ratio", type=measure.share, default=0.6, help="of EVEREST's fine-tuning and inference")
    parser.add_argument("--device", type=measure.device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--attn", default="sdpa", help="eager, sdpa, flash_attention_2, flex_attention; of both models"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--clips", choices=CLIPS, default="synthetic", help="decides what is kept, not what it costs")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="time only: no process for each case")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "model.json")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    measure.run_and_report(args, args.device, run, table)


if __name__ == "__main__":
    main()
