"""everest-hf compare: curves and figures of several runs."""

import argparse
from pathlib import Path

from .options import PICTURE_SUFFIXES, PROGRAM, add_command, print_json, print_text


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "compare",
        run,
        "Compare runs, finished or not: a table of their figures, and a picture of their curves.",
        f"{PROGRAM} compare runs/pretrain runs/finetune -o compare.png",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("-o", "--out", default="compare.png", metavar="OUT", help="picture to write [compare.png]")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, one for each run")


def run(args: argparse.Namespace) -> int:
    """Print what each run has come to, and draw their curves."""
    if Path(args.out).suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"{args.out}: not a picture; expected a name ending in {', '.join(PICTURE_SUFFIXES)}")
    from ..training.comparison import read_run, table_of
    from ..visualize import draw_comparison

    runs = [read_run(folder) for folder in dict.fromkeys(args.runs)]
    draw_comparison([(logged.name, logged.task, logged.log) for logged in runs], args.out)
    if args.json:
        for logged in runs:
            print_json(logged.summary())
    else:
        print_text(f"{table_of(runs)}\n{args.out}: curves")
    return 0
