"""everest-hf search: the videos that are most like another."""

import argparse
from dataclasses import asdict
from pathlib import Path

from .options import (
    PROGRAM,
    add_command,
    add_decoding_options,
    check_counts,
    check_inputs,
    decoding_options,
    print_json,
    print_text,
)


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "search",
        run,
        "Find the videos whose features are nearest to those of a video.",
        f"{PROGRAM} search clip.mp4 features.safetensors",
    )
    parser.add_argument("query", metavar="QUERY", help="video file or URL")
    parser.add_argument("features", metavar="FEATURES", help=f"file that {PROGRAM} embed wrote")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="where the model of the features is now [where it was]")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="videos to show [5]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_decoding_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the nearest videos with their similarities and labels."""
    from ..inference.features import read_features
    from ..inference.neighbours import search

    check_counts(args, "top_k")
    check_inputs([args.query], None)
    opening = decoding_options(args)
    features = read_features(Path(args.features))
    matches = search(args.query, features, top_k=args.top_k, model=args.model, **opening)
    if args.json:
        print_json({"query": args.query, "matches": [asdict(match) for match in matches]})
    else:
        lines = (f"  {m.similarity:6.4f}  {m.video}{'' if m.label is None else f'  {m.label}'}" for m in matches)
        print_text("\n".join([args.query, *lines]))
    return 0
