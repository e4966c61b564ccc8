"""What could make pre-training on a GPU faster: each idea beside the model as it is, on the same clips, in turn.

    python benchmarks/pretraining_leads.py --device cuda --size base --batch 256

The model scores tokens in float32, which a GPU makes of three products in bf16, keeps its clips in float32, and computes
the activation a second time in the backward pass. Training needs no more of the scores than their order. The ideas:

scores     one product in bf16 of the differences between neighbouring slots. Evaluation would stay as it is
half       clips in float16, which holds the 256 levels of a pixel: half of what is moved
memory     the activation is kept for the backward pass
graphs     the compiled step as a CUDA graph (mode="reduce-overhead"); on a GPU alone
all        all of these

Each is put in the place of the model's own functions for its run alone. Beside its time stands the share of tokens that
it selects as the model does. None is in the package: nobody has measured them on a GPU. Prints a Markdown table, and
writes it to a JSON file after each idea; each takes about a minute to compile.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import measure
import torch
from steps import SIZES, Case, Step, num_warmup_steps
from torch.nn import functional as F
from tqdm import tqdm

from everest_hf import kernels_everest
from everest_hf.embeddings_everest import EverestEmbeddings

PARTS = ("scores", "half", "memory", "graphs")
AS_IT_IS, ALL = "as it is", "all"
IDEAS = {AS_IT_IS: (), **{part: (part,) for part in PARTS}, ALL: PARTS}


@torch.no_grad()
def embed_and_score_in_bf16(embeddings: EverestEmbeddings, pixel_values: torch.Tensor, patches: torch.Tensor):
    """Score tokens (B, t * S, P) by one product in bf16, as `motion_scores` does of float32: None and (B, t * S)."""
    num_slots = pixel_values.shape[1] // embeddings.config.tubelet_size
    change = patches.unflatten(1, (num_slots, -1)).diff(dim=1)  # (B, t - 1, S, P)
    with kernels_everest.without_autocast(patches.device.type):
        moved = F.linear(change.bfloat16(), embeddings.projection.weight.bfloat16())  # (B, t - 1, S, D)
    distance = torch.linalg.vector_norm(moved, dim=-1, dtype=torch.float32)
    return None, torch.cat([distance[:, :1], distance], dim=1).flatten(1)


def call_once(function, *args, **kwargs):
    """Do without the second computation that `checkpoint` makes in the backward pass."""
    return function(*args)


PATCHES = {
    "scores": partial(patch.object, EverestEmbeddings, "_embed_and_score", embed_and_score_in_bf16),
    "memory": partial(patch.object, kernels_everest, "checkpoint", call_once),
}


def build_step(case: Case, parts: tuple[str, ...]) -> Step:
    """Build a step with these ideas; those in PATCHES must also be active while it runs."""
    step = Step(case)
    if "half" in parts:
        step.inputs["pixel_values"] = step.inputs["pixel_values"].half()
    if "graphs" in parts and case.compile and case.device != "cpu":
        step.forward = torch.compile(step.model, dynamic=False, mode="reduce-overhead")
    return step


@torch.no_grad()
def informative_tokens(step: Step) -> torch.Tensor:
    """Return a mask (B, N) of the tokens that pre-training sees or predicts."""
    with torch.autocast(torch.device(step.case.device).type, measure.DTYPES[step.case.dtype]):
        output = step.model(**step.inputs)
    mask = torch.zeros(step.case.batch, step.model.config.num_tokens, dtype=torch.bool, device=step.case.device)
    return mask.scatter(1, torch.cat([output.visible_ids, output.target_ids], dim=1), True)


def measure_idea(
    case: Case, parts: tuple[str, ...], repeats: int, wanted: torch.Tensor | None
) -> tuple[dict, torch.Tensor]:
    """Return the figures of a step with these ideas, and its tokens; wanted: the tokens of the model as it is."""
    device = torch.device(case.device)
    with ExitStack() as stack:
        for part in parts:
            if part in PATCHES:
                stack.enter_context(PATCHES[part]())
        step = build_step(case, parts)
        chosen = informative_tokens(step)
        seconds = measure.interleave({"step": step}, repeats, device, num_warmup_steps(case))["step"]
        peak = measure.gpu_peak_bytes(step, device) if device.type == "cuda" else None
    same = 1.0 if wanted is None else ((chosen & wanted).sum() / wanted.sum()).item()
    figures = {**measure.summary(seconds), "peak_bytes": peak, "same_tokens": same}
    return figures | {"clips_per_second": case.batch / figures["seconds"]}, chosen


def run(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Measure all ideas in turn; after each give what is known so far."""
    results, wanted = [], None
    common = {"dtype": "bf16", "batch": args.batch, "keep_ratio": 0.6, "device": str(args.device), "attn": "sdpa"}
    case = Case(model="everest", task="pretraining", size=args.size, **common, compile=args.compile)
    for idea, parts in tqdm(IDEAS.items(), desc="ideas", dynamic_ncols=True):
        figures, chosen = measure_idea(case, parts, args.repeats, wanted)
        wanted = chosen if wanted is None else wanted
        results.append({"idea": idea, **figures})
        measure.forget()
        yield results


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table."""
    own = results[0]["seconds"]
    rows = [
        [
            result["idea"],
            f"{1000 * result['seconds']:.1f}",
            f"{result['clips_per_second']:.0f}",
            f"{own / result['seconds']:.2f}",
            "" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f}",
            f"{result['same_tokens']:.2%}",
        ]
        for result in results
    ]
    header = ["idea", "ms / step", "clips/s", "times as fast", "peak GiB", "tokens as the model selects"]
    return measure.markdown_table(header, rows)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=measure.positive_int, default=256, help="clips a step")
    parser.add_argument("--repeats", type=measure.positive_int, default=10, help="steps timed")
    parser.add_argument("--device", type=measure.device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/pretraining-leads-DEVICE.json")
    args = parser.parse_args()
    args.out = args.out or measure.RESULTS / f"pretraining-leads-{args.device.type}.json"
    return args


def main() -> None:
    args = arguments()
    facts = measure.facts_of_run(args.device)
    for results in run(args):
        measure.write_json(args.out, {**facts, "settings": measure.settings_of(args), "results": results})
    print(f"{table(results)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
