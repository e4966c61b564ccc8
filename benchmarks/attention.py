"""Time of the fused attention kernel (sdpa) and of two matrix products, at once and in blocks of queries, on a CPU.

    python benchmarks/attention.py

Run through the functions that the model runs, on queries, keys and values laid out as the model lays them out. The
token counts of ViT-B/16 on 16 x 224 x 224: seen in pre-training 156, decoded 470, fine-tuning 940, dense 1568. What
comes out decides `blocks_are_faster` in kernels_everest.py.
"""

import argparse
from pathlib import Path

import measure
import torch
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from everest_hf.attention_everest import blocked_attention_forward, eager_attention_forward

IMPLEMENTATIONS = {
    "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"],
    "matmul": eager_attention_forward,
    "blocks": blocked_attention_forward,
}
PASSES = ("forward", "forward+backward")


class Attention(torch.nn.Module):
    """What an implementation asks of the module that calls it."""

    is_causal = False


def build_call(implementation: str, inputs: list[torch.Tensor], backward: bool):
    """Return a function without arguments that runs an implementation once on query, key and value."""
    attend, module, scaling = IMPLEMENTATIONS[implementation], Attention(), inputs[0].shape[-1] ** -0.5

    def call() -> None:
        with torch.set_grad_enabled(backward):
            out, _ = attend(module, *inputs, None, scaling=scaling, dropout=0.0, is_causal=False)  # (B, K, heads, d)
            if backward:
                torch.autograd.grad(out, inputs, torch.ones_like(out))

    return call


def build_inputs(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Make query, key and value (B, heads, K, d), as views of (B, K, heads * d), as projections give them."""
    generator = torch.Generator().manual_seed(0)
    flat = (torch.randn(batch, tokens, heads * dim, generator=generator).to(dtype) for _ in range(3))
    return [x.unflatten(-1, (heads, dim)).transpose(1, 2).requires_grad_() for x in flat]


def measure_case(args: argparse.Namespace, dtype: str, tokens: int, direction: str) -> dict:
    """Time the implementations in turn on one input."""
    inputs = build_inputs(args.batch, args.heads, tokens, args.head_dim, measure.DTYPES[dtype])
    calls = {name: build_call(name, inputs, direction != "forward") for name in IMPLEMENTATIONS}
    seconds = measure.interleave(calls, args.repeats, torch.device("cpu"), warmup=2)
    figures = {name: measure.summary(values) for name, values in seconds.items()}
    fastest = min(figures, key=lambda name: figures[name]["seconds"])
    return {"dtype": dtype, "tokens": tokens, "pass": direction, **figures, "fastest": fastest}


def run(args: argparse.Namespace) -> list[dict]:
    """Time all cases and show the progress."""
    cases = [(d, n, p) for d in args.dtypes for n in args.tokens for p in PASSES]
    return [measure_case(args, *case) for case in tqdm(cases, desc="attention")]


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table in milliseconds."""
    rows = [
        [result["dtype"], str(result["tokens"]), result["pass"]]
        + [f"{1000 * result[name]['seconds']:.1f}" for name in IMPLEMENTATIONS]
        + [result["fastest"]]
        for result in results
    ]
    return measure.markdown_table(
        ["dtype", "tokens", "pass", *(f"{name} ms" for name in IMPLEMENTATIONS), "fastest"], rows
    )


def arguments() -> argparse.Namespace:
    """Read the command line. Heads and their size are ViT-B's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=measure.positive_int, default=[156, 470, 940, 1568])
    parser.add_argument("--dtypes", nargs="+", choices=measure.DTYPES, default=list(measure.DTYPES))
    parser.add_argument("--batch", type=measure.positive_int, default=2)
    parser.add_argument("--heads", type=measure.positive_int, default=12)
    parser.add_argument("--head-dim", type=measure.positive_int, default=64)
    parser.add_argument("--repeats", type=measure.positive_int, default=9)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "attention.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    measure.run_and_report(args, torch.device("cpu"), run, table)


if __name__ == "__main__":
    main()
