"""Where the time of a step goes: matrix products, attention, and what is neither.

    python benchmarks/profile_steps.py --sizes small --dtypes fp32 --device cpu
    python benchmarks/profile_steps.py --sizes base --dtypes bf16 --device cpu --compile
    python benchmarks/profile_steps.py --sizes base --dtypes bf16 --batch 64 --device cuda
    python benchmarks/profile_steps.py --sizes base --dtypes bf16 --batch 64 --device cuda --compile

The steps are those of efficiency.py. torch.profiler gives the time that each operator takes itself, without those that
it calls: on a CPU the processor's, on a GPU the device's. An operator is put into the first class that its name
fits; a compiled kernel has the names of what is fused in it. Products of batches and softmax are attention's: nothing
else in these models uses them. The profiler itself slows a step of many small operators down; the seconds are of steps
without it. Prints a Markdown table, and writes it with the twenty longest operators of each step to a JSON file. The
defaults take about three minutes on two idle cores.
"""

import argparse
import re
from pathlib import Path

import measure
import torch
from steps import MODELS, SIZES, TASKS, Case, Step, num_warmup_steps
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

CLASSES = {
    "attention": r"scaled_dot_product|attention|flash|fmha|bmm|softmax",
    "matrix products": r"addmm|\bmm\b|_mm\b|linear|gemm|conv",
    "GELU": r"gelu|erf",
    "LayerNorm": r"layer_?norm",
    "optimizer": r"adam|optimizer",
    "selection and data movement": r"copy|clone|\bto\b|cat|stack|gather|scatter|index|sort|diff|vector_norm|fill|zero",
}
REST = "rest"
LONGEST = 20


def class_of(operator: str) -> str:
    """Return the class of an operator by its name."""
    fitting = (name for name, pattern in CLASSES.items() if re.search(pattern, operator, re.IGNORECASE))
    return next(fitting, REST)


def times_of(events, device: torch.device) -> dict[str, float]:
    """Return the microseconds that each operator took itself; on a GPU those of the kernels that it started.

    The kernels have rows of their own beside the operators', which hold their time already.
    """
    times: dict[str, float] = {}
    for event in events:
        if event.device_type == DeviceType.CPU:
            own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + own
    return times


def profile_case(case: Case, repeats: int) -> dict:
    """Return the seconds of a step, and the share of each class in the time of its operators."""
    device = torch.device(case.device)
    step = Step(case)
    seconds = measure.interleave({"step": step}, repeats, device, num_warmup_steps(case))["step"]
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
    times = times_of(profiler.key_averages(), device)
    total = sum(times.values())
    shares = dict.fromkeys([*CLASSES, REST], 0.0)
    for operator, time in times.items():
        shares[class_of(operator)] += time / total
    longest = sorted(times, key=times.get, reverse=True)[:LONGEST]
    return {
        **{field: getattr(case, field) for field in ("model", "size", "task", "dtype", "compile")},
        **measure.summary(seconds),
        "shares": shares,
        "operators": {name: times[name] / total for name in longest},
    }


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Return what to profile."""
    common = {"batch": args.batch, "keep_ratio": args.keep_ratio, "device": str(args.device), "attn": "sdpa"}
    common |= {"compile": args.compile, "clips": "real"}
    return [
        Case(model=model, size=size, task=task, dtype=dtype, **common)
        for size in args.sizes
        for dtype in args.dtypes
        for task in args.tasks
        for model in args.models
    ]


def run(args: argparse.Namespace) -> list[dict]:
    """Profile all cases and show the progress."""
    results = []
    for case in tqdm(cases_of(args), desc="profile", dynamic_ncols=True):
        results.append(profile_case(case, args.repeats))
        measure.forget()
    return results


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table of shares in percent."""
    header = ["model", "size", "dtype", "", "task", "s / step", *CLASSES, REST]
    rows = [
        [
            *(result[name] for name in ("model", "size", "dtype")),
            "compiled" if result["compile"] else "eager",
            result["task"],
            f"{result['seconds']:.3f}",
            *(f"{share:.1%}" for share in result["shares"].values()),
        ]
        for result in results
    ]
    return measure.markdown_table(header, rows)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["everest"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--dtypes", nargs="+", choices=measure.DTYPES, default=["fp32", "bf16"], help="bf16: autocast")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--keep-ratio", type=measure.share, default=0.6, help="of EVEREST's fine-tuning and inference")
    parser.add_argument("--batch", type=measure.positive_int, default=2, help="clips a step")
    parser.add_argument("--repeats", type=measure.positive_int, default=3, help="steps timed, and steps profiled")
    parser.add_argument("--device", type=measure.device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/profile-DEVICE.json")
    args = parser.parse_args()
    args.out = args.out or measure.RESULTS / f"profile-{args.device.type}.json"
    return args


def main() -> None:
    args = arguments()
    # Without this the kernels that are compiled for a CPU leave no trace in a profile.
    torch._inductor.config.cpp.enable_kernel_profile = True
    measure.run_and_report(args, args.device, run, table)


if __name__ == "__main__":
    main()
