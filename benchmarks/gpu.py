"""Pre-training at the limit of a GPU, in one call: the table, what could make it faster, and where its time goes.

    python benchmarks/gpu.py --minutes 8

Runs the commands below one after the other, compile times included, and writes their results into --folder. When the
time is up, the command that runs is stopped and the others are named; what a stopped command has finished is in its file.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import measure

HERE = Path(__file__).parent
ON_A_GPU = ["--device", "cuda", "--batch", "256"]
# By the name of the result: a script and its options, the most telling first.
COMMANDS = {
    "efficiency-pretraining-cuda": [
        *("efficiency.py", *ON_A_GPU, "--compile", "--sizes", "base", "--dtypes", "bf16"),
        *("--ratios", "0.6", "--tasks", "pretraining"),
    ],
    "pretraining-leads-cuda": ["pretraining_leads.py", *ON_A_GPU, "--size", "base"],
    "profile-pretraining-cuda": [
        *("profile_steps.py", *ON_A_GPU, "--compile", "--sizes", "base", "--dtypes", "bf16", "--tasks", "pretraining"),
    ],
}


def run_within(command: list[str], seconds: float) -> str:
    """Run a command for at most so long, and say how it ended."""
    start = time.monotonic()
    try:
        code = subprocess.run(command, timeout=max(seconds, 0.0)).returncode
    except subprocess.TimeoutExpired:
        return "stopped, the time was up"
    return f"{'done' if code == 0 else f'failed with code {code}'} in {time.monotonic() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=measure.positive_int, default=8, help="for all commands together")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="for the results [runs/gpu]")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    endings = {}
    for name, (script, *options) in COMMANDS.items():
        command = [sys.executable, str(HERE / script), *options, "--out", str(args.folder / f"{name}.json")]
        print(shlex.join(command), flush=True)
        left = end - time.monotonic()
        endings[name] = run_within(command, left) if left > 0 else "not run, the time was up"
    for name, ending in endings.items():
        print(f"{args.folder / name}.json: {ending}")
    sys.exit(0 if all(ending.startswith("done") for ending in endings.values()) else 1)


if __name__ == "__main__":
    main()
