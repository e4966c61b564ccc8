"""everest-hf split: divide labelled videos into training, validation and test."""

import argparse

from .options import PROGRAM, add_command, add_rows_options, print_text, source_options

# Classes of which the table has a line.
SHOWN = 20


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "split",
        run,
        "Write train.csv and val.csv, and perhaps test.csv: lists with an equal share of each class.",
        f"{PROGRAM} split videos --val 0.2 --group '_(g[0-9]+)_'",
    )
    parser.add_argument("source", metavar="SOURCE", help="list file, folder of class folders, or what training takes")
    add_rows_options(parser)
    parser.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="of the videos for validation [0.2]")
    parser.add_argument("--test", type=float, default=0.0, metavar="SHARE", help="of the videos for a test [none]")
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="what is the same in the paths of videos that stay together, of one scene or person [none]",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same split [0]")
    parser.add_argument("--out", metavar="DIR", help="folder of the lists [SOURCE, or that of the list]")
    parser.add_argument("--overwrite", action="store_true", help="replace lists that are there")


def run(args: argparse.Namespace) -> int:
    """Write the lists and print how many videos of each class they have."""
    from ..data.splits import split_videos

    chosen = {name: getattr(args, name) for name in ("val", "test", "group", "seed", "out", "overwrite")}
    done = split_videos(args.source, **chosen, **source_options(args))
    print_text("\n".join([*_table(done.counts), *(f"{part:<6}{path}" for part, path in done.files.items())]))
    return 0


def _table(counts: dict[str, dict[str, int]]) -> list[str]:
    parts = list(next(iter(counts.values())))
    total = {part: sum(of_class[part] for of_class in counts.values()) for part in parts}
    shown = dict(list(counts.items())[:SHOWN])
    width = max(len(name) for name in (*shown, "all classes")) + 2
    lines = [f"{name:<{width}}{''.join(f'{of[part]:>8}' for part in parts)}" for name, of in shown.items()]
    if len(counts) > SHOWN:
        lines.append(f"… and {len(counts) - SHOWN} others")
    header = f"{'class':<{width}}{''.join(f'{part:>8}' for part in parts)}"
    return [header, *lines, f"{'all classes':<{width}}{''.join(f'{total[part]:>8}' for part in parts)}"]
