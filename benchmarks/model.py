"""Time and memory of EVEREST beside Transformers' VideoMAE: pre-training, fine-tuning, inference.

    python benchmarks/model.py
    python benchmarks/model.py --sizes base --dtypes bf16 --batch 64 --device cuda --compile

Both models run in one process, in turn, on the same clips. A training step is forward, backward and AdamW; inference
is a forward pass. VideoMAE pre-trains with a tube mask over 0.9 of the tokens, and fine-tunes and infers on all of
them; EVEREST pre-trains with its defaults and else keeps --keep-ratio of the tokens. Peak memory is taken in a
process of its own for each case: see `measure.peak_bytes` for what it holds.

The clips are squares that move over a still background. Their content decides which tokens are kept but not how many,
so a step costs the same on any clips; `--clips noise` shows it.

Prints a Markdown table and writes every repetition to a JSON file. The defaults take about ten minutes on two idle
cores.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import measure
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification

# Encoder and decoder of each size; the decoder has 4 layers, and a hidden layer is 4 times as wide as its input.
SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"decoder_hidden_size": 32, "decoder_num_attention_heads": 1}
    | {"image_size": 48, "num_frames": 8},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    | {"decoder_hidden_size": 192, "decoder_num_attention_heads": 3},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"decoder_hidden_size": 384, "decoder_num_attention_heads": 6},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"decoder_hidden_size": 512, "decoder_num_attention_heads": 8},
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
    | {"decoder_hidden_size": 640, "decoder_num_attention_heads": 8},
}
TASKS = ("pretraining", "finetuning", "inference")
MODELS = ("everest", "videomae")
NUM_LABELS = 101
VIDEOMAE_MASK_RATIO = 0.9


@dataclass(frozen=True)
class Case:
    """One step to measure. Everything in it can be sent to another process and written to a file."""

    model: str
    task: str
    size: str
    dtype: str
    batch: int
    keep_ratio: float
    device: str
    attn: str
    compile: bool = False
    clips: str = "synthetic"


# ------------------------------------------------------------------------------------------------------------ clips


def moving_clips(batch: int, config: EverestConfig, generator: torch.Generator) -> torch.Tensor:
    """Make clips (B, T, C, H, W): smooth squares that move over a smooth still background, with camera noise."""
    height, width = config.frame_size
    frames, side = config.num_input_frames, min(height, width) // 3
    background, sprite = (
        F.interpolate(torch.randn(batch, config.num_channels, 6, 6, generator=generator), size, mode="bicubic")
        for size in ((height, width), (side, side))
    )
    clips = background[:, None].repeat(1, frames, 1, 1, 1)
    for t in range(frames):
        top, left = (round((limit - side) * t / max(1, frames - 1)) for limit in (height, width))
        clips[:, t, :, top : top + side, left : left + side] = sprite
    return clips + 0.05 * torch.randn(clips.shape, generator=generator)


def noise_clips(batch: int, config: EverestConfig, generator: torch.Generator) -> torch.Tensor:
    """Make clips (B, T, C, H, W) of noise, in which no token is more informative than another."""
    height, width = config.frame_size
    return torch.randn(batch, config.num_input_frames, config.num_channels, height, width, generator=generator)


CLIPS = {"synthetic": moving_clips, "noise": noise_clips}


# ------------------------------------------------------------------------------------------------- models and steps


def config_of(case: Case):
    """Return the configuration of a case. Attention is resolved as `from_pretrained` resolves it."""
    sizes = SIZES[case.size]
    sizes = sizes | {
        "intermediate_size": 4 * sizes["hidden_size"],
        "decoder_intermediate_size": 4 * sizes["decoder_hidden_size"],
        "decoder_num_hidden_layers": 4,
        "num_labels": NUM_LABELS,
        "attn_implementation": case.attn,
    }
    if case.model == "everest":
        return EverestConfig(**sizes, keep_ratio=case.keep_ratio)
    return VideoMAEConfig(**sizes)


def everest_config(case: Case) -> EverestConfig:
    """Return the EVEREST configuration of a case, also for VideoMAE: the clips and the token grid follow it."""
    return config_of(replace(case, model="everest"))


def tube_mask(batch: int, config: EverestConfig, generator: torch.Generator) -> torch.Tensor:
    """Return VideoMAE's mask (B, N), True = masked: for each clip the same places in every slot."""
    places = config.num_tokens_per_slot
    order = torch.rand(batch, places, generator=generator).argsort(dim=1)
    return (order < int(VIDEOMAE_MASK_RATIO * places)).repeat(1, config.num_slots)


def num_encoder_tokens(case: Case) -> int:
    """Return the number of tokens that the encoder works on."""
    config = everest_config(case)
    if case.model == "everest":
        return config.num_visible_tokens if case.task == "pretraining" else config.num_kept_tokens()
    if case.task == "pretraining":
        return int((~tube_mask(1, config, torch.Generator())).sum())
    return config.num_tokens


def build_model(case: Case) -> torch.nn.Module:
    """Build a model with random weights on its device, in the mode of its task."""
    classes = {
        ("everest", True): EverestForPreTraining,
        ("everest", False): EverestForVideoClassification,
        ("videomae", True): VideoMAEForPreTraining,
        ("videomae", False): VideoMAEForVideoClassification,
    }
    model = classes[case.model, case.task == "pretraining"](config_of(case)).to(case.device)
    return model.train(case.task != "inference")


def build_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Make the inputs of a step on its device: the same clips for both models."""
    config, generator = everest_config(case), torch.Generator().manual_seed(0)
    inputs = {"pixel_values": CLIPS[case.clips](case.batch, config, generator)}
    if case.task == "finetuning":
        inputs["labels"] = torch.randint(NUM_LABELS, (case.batch,), generator=generator)
    if case.task == "pretraining" and case.model == "videomae":
        inputs["bool_masked_pos"] = tube_mask(case.batch, config, generator)
    return {name: value.to(case.device) for name, value in inputs.items()}


def build_step(case: Case):
    """Return a function without arguments that does one step of a case: training, or a forward pass."""
    torch.manual_seed(0)
    model, inputs = build_model(case), build_inputs(case)
    forward = torch.compile(model) if case.compile else model
    autocast = partial(
        torch.autocast, torch.device(case.device).type, measure.DTYPES[case.dtype], enabled=case.dtype != "fp32"
    )
    if case.task == "inference":

        @torch.inference_mode()
        def infer() -> None:
            with autocast():
                forward(**inputs)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def train() -> None:
        with autocast():
            loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


# ------------------------------------------------------------------------------------------------------ measurement


def rough_cost(case: Case) -> float:
    """Return a number in proportion to the work of a step, for the estimate of the time that is left."""
    config = everest_config(case)
    cost = config.num_hidden_layers * config.hidden_size**2 * num_encoder_tokens(case)
    if case.task == "pretraining":
        # VideoMAE decodes every token, EVEREST the informative ones.
        decoded = config.num_informative_tokens if case.model == "everest" else config.num_tokens
        cost += config.decoder_num_hidden_layers * config.decoder_hidden_size**2 * decoded
    return case.batch * cost * (1 if case.task == "inference" else 3)


def num_warmup_steps(case: Case) -> int:
    """Return the number of steps before the first that counts: a compiled step may compile again on later calls."""
    return 3 if case.compile else 1


def peak_bytes_of(case: Case) -> int:
    """Return the peak memory of a case, measured in a fresh process."""
    build, device = partial(build_step, case), torch.device(case.device)
    return measure.in_child_process(measure.peak_bytes, build, device, num_warmup_steps(case))


def measure_pair(cases: dict[str, Case], repeats: int, memory: bool, on_step) -> dict:
    """Measure one case of each model, in turn; on_step(case, steps=1) is told of the steps done."""
    peaks = dict.fromkeys(cases)
    if memory:
        for name, case in cases.items():
            peaks[name] = peak_bytes_of(case)
            on_step(case, steps=num_warmup_steps(case) + 1)
    device, warmup = torch.device(cases["everest"].device), num_warmup_steps(cases["everest"])
    steps = {name: build_step(case) for name, case in cases.items()}
    seconds = measure.interleave(steps, repeats, device, warmup, on_call=lambda name: on_step(cases[name]))
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
    case = cases["everest"]
    return {
        "size": case.size,
        "task": case.task,
        "dtype": case.dtype,
        "batch": case.batch,
        **figures,
        "speedup": videomae["seconds"] / everest["seconds"],
        "memory_ratio": videomae["peak_bytes"] / everest["peak_bytes"] if memory else None,
    }


def num_steps(args: argparse.Namespace, case: Case) -> int:
    """Return the number of steps that a case takes, for the progress bar."""
    return args.repeats + num_warmup_steps(case) + (num_warmup_steps(case) + 1 if args.memory else 0)


def advance(bar: tqdm, case: Case, steps: int = 1) -> None:
    """Move the progress bar on by steps of a case."""
    bar.update(steps * rough_cost(case))


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
    total = sum(num_steps(args, case) * rough_cost(case) for pair in pairs for case in pair.values())
    results = []
    bar_format = "{desc}{percentage:3.0f}% |{bar}| {elapsed} elapsed, about {remaining} left"
    with tqdm(total=total, bar_format=bar_format, dynamic_ncols=True) as bar:
        for pair in pairs:
            case = pair["everest"]
            bar.set_description(f"{case.task} {case.size} {case.dtype}")
            results.append(measure_pair(pair, args.repeats, args.memory, partial(advance, bar)))
            bar.write(f"{bar.desc}{results[-1]['speedup']:.2f} x")
            measure.forget()
    return results


# ----------------------------------------------------------------------------------------------------------- output


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table: seconds a step, peak memory in GiB, and VideoMAE's over EVEREST's."""
    header = ["size", "task", "dtype", "batch", "tokens", "EVEREST s", "VideoMAE s", "speed-up"]
    header += ["EVEREST GiB", "VideoMAE GiB", "memory ratio"]
    return measure.markdown_table(header, [row(result) for result in results])


def row(result: dict) -> list[str]:
    """Return the cells of one result."""
    models = [result[model] for model in MODELS]
    ratio = result["memory_ratio"]
    return [
        *(str(result[name]) for name in ("size", "task", "dtype", "batch")),
        " / ".join(str(figures["tokens"]) for figures in models),
        *(f"{figures['seconds']:.3f}" for figures in models),
        f"{result['speedup']:.2f} x",
        *("not measured" if f["peak_bytes"] is None else f"{f['peak_bytes'] / 2**30:.2f}" for f in models),
        "not measured" if ratio is None else f"{ratio:.2f} x",
    ]


def keep_ratio(text: str) -> float:
    """Read --keep-ratio."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1")
    return value


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--dtypes", nargs="+", choices=measure.DTYPES, default=["fp32", "bf16"], help="bf16: autocast")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch", type=measure.positive_int, default=2, help="clips a step")
    parser.add_argument("--repeats", type=measure.positive_int, default=5, help="timed steps of each case")
    parser.add_argument("--keep-ratio", type=keep_ratio, default=0.6, help="of EVEREST's fine-tuning and inference")
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
    facts = measure.facts_of_run(args.device)
    results = run(args)
    settings = {
        name: str(value) if isinstance(value, (Path, torch.device)) else value
        for name, value in vars(args).items()
        if name != "out"
    }
    measure.write_json(args.out, {**facts, "settings": settings, "results": results})
    print(table(results))
    print(f"\n{facts['hardware']}\nwritten to {args.out}")


if __name__ == "__main__":
    main()
