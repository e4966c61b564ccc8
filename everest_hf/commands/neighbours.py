"""everest-hf neighbours: how well the nearest neighbours of videos tell their labels."""

import argparse
from dataclasses import asdict
from pathlib import Path

from .options import PROGRAM, add_command, check_counts, print_json, print_text


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "neighbours",
        run,
        "Measure features by the labels of nearest neighbours: k-NN accuracy and mean reciprocal rank.",
        f"{PROGRAM} neighbours features.safetensors --k 20",
    )
    parser.add_argument("features", metavar="FEATURES", help=f"file that {PROGRAM} embed wrote of labelled videos")
    parser.add_argument("--k", type=int, default=20, metavar="K", help="neighbours that vote [20]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the figures over all videos, and for each label."""
    from ..inference.features import read_features
    from ..inference.neighbours import label_figures

    check_counts(args, "k")
    path = Path(args.features)
    features = read_features(path)
    try:
        total, *of_labels = label_figures(features, args.k)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if args.json:
        figures = {name: value for name, value in asdict(total).items() if name != "label"}
        print_json({"features": args.features, "k": args.k, **figures, "labels": list(map(asdict, of_labels))})
        return 0
    print_text(f"{total.videos} videos of {len(of_labels)} labels, each by its nearest others")
    print_text(f"{args.k}-NN accuracy  mean reciprocal rank  videos  label")
    width = len(f"{args.k}-NN accuracy")
    for row in (*of_labels, total):
        name = "all" if row.label is None else row.label
        print_text(f"{row.accuracy:{width}.1%}  {row.reciprocal_rank:20.3f}  {row.videos:6}  {name}")
    return 0
