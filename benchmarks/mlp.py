"""Time of inference on a CPU, by how the widest tensors, the hidden layers of the MLPs, are made.

    python benchmarks/mlp.py

"whole": for all clips of a batch at once, and the activation's output beside its input. "in place": the output takes
the place of the input. "in blocks": that, for a few clips at a time, as the model does it. Page faults are those of a
step: pages that the system maps and clears each time. What comes out decides `mlp_forward` in kernels_everest.py.
"""

import argparse
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from steps import SIZES, Case, Step
from tqdm import tqdm

from everest_hf import kernels_everest

BLOCKS = kernels_everest.TOKENS_AT_A_TIME


def page_faults() -> int:
    """Return how many pages this process has been given, since its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def build_call(step: Step, tokens_at_a_time: int, in_place: bool, faults: list[int]) -> Callable[[], None]:
    """Return a function that runs a step in one way, and notes its page faults."""
    layers = step.model.everest.encoder.layers

    def call() -> None:
        kernels_everest.TOKENS_AT_A_TIME = tokens_at_a_time
        # Where a hook may read the hidden layer, the model leaves it as it is.
        hooks = [] if in_place else [layer.mlp.fc1.register_forward_hook(lambda *_: None) for layer in layers]
        before = page_faults()
        step()
        faults.append(page_faults() - before)
        for hook in hooks:
            hook.remove()

    return call


def measure_case(args: argparse.Namespace, size: str, dtype: str, batch: int) -> dict:
    """Time the ways in turn on one model."""
    step = Step(Case("everest", "inference", size, dtype, batch, args.keep_ratio, "cpu", "sdpa"))
    ways = {"whole": (sys.maxsize, False), "in place": (sys.maxsize, True), "in blocks": (BLOCKS, True)}
    faults: dict[str, list[int]] = {name: [] for name in ways}
    calls = {name: build_call(step, *way, faults[name]) for name, way in ways.items()}
    seconds = measure.interleave(calls, args.repeats, torch.device("cpu"), warmup=2)
    figures = {
        name: {**measure.summary(values), "page_faults": statistics.median_high(faults[name])}
        for name, values in seconds.items()
    }
    return {"size": size, "dtype": dtype, "batch": batch, **figures}


def run(args: argparse.Namespace) -> list[dict]:
    """Time all cases and show the progress."""
    cases = [(size, dtype, batch) for size in args.sizes for dtype in args.dtypes for batch in args.batches]
    return [measure_case(args, *case) for case in tqdm(cases, desc="inference")]


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table: seconds, and thousands of page faults, of a step."""
    ways = [name for name, figures in results[0].items() if isinstance(figures, dict)]
    rows = [
        [*(str(result[name]) for name in ("size", "dtype", "batch"))]
        + [f"{result[way]['seconds']:.3f} s, {result[way]['page_faults'] / 1000:.0f}" for way in ways]
        + [f"{result['in blocks']['seconds'] / result['whole']['seconds']:.2f}"]
        for result in results
    ]
    return measure.markdown_table(["size", "dtype", "clips", *ways, "in blocks / whole"], rows)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--dtypes", nargs="+", choices=measure.DTYPES, default=["fp32"])
    parser.add_argument("--batches", nargs="+", type=measure.positive_int, default=[1, 2, 8], help="clips a step")
    parser.add_argument("--keep-ratio", type=measure.share, default=0.6)
    parser.add_argument("--repeats", type=measure.positive_int, default=7)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "mlp.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    measure.run_and_report(args, torch.device("cpu"), run, table)


if __name__ == "__main__":
    main()
