"""everest-hf eval-timeline: how well the timelines of a classifier find labelled segments of videos."""

import argparse
from pathlib import Path

from .options import (
    PROGRAM,
    add_command,
    add_decoding_options,
    add_model_options,
    add_rows_options,
    add_timeline_options,
    check_counts,
    check_inputs,
    decoding_options,
    print_json,
    print_text,
    source_options,
    timeline_options,
)


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "eval-timeline",
        run,
        "Find labelled segments of untrimmed videos, and print the mean average precision at several overlaps.",
        f"{PROGRAM} eval-timeline val.csv --model runs/mine --threshold 0.4",
    )
    parser.add_argument("source", metavar="SOURCE", help="list or data set with the columns video, label, start, end")
    add_model_options(parser, "share of the tokens to keep, instead of the model's own")
    add_timeline_options(parser)
    add_rows_options(parser)
    add_decoding_options(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at a time [8]")
    parser.add_argument(
        "--csv", metavar="FILE", help="write the segments that were found: video, label, start, end, score"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")


def run(args: argparse.Namespace) -> int:
    """Print mAP at overlaps (intersection over union) of 0.3 to 0.7, and their mean."""
    from .. import inference
    from ..data import load_videos
    from ..evaluation.localization import evaluate_timelines
    from ..files import write_table

    check_counts(args, "batch_size", "stride")
    check_inputs([], args.keep_ratio)
    name = inference.chosen_model(args.model, inference.CLASSIFICATION)
    inference.check_classifier(name)
    model, processor = inference.load_checkpoint(name, inference.CLASSIFICATION)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    rows = load_videos(args.source, class_names=names, **source_options(args))
    options = {**timeline_options(args), **decoding_options(args)}
    try:
        figures, found = evaluate_timelines(model, processor, rows, **options)
    except ValueError as error:
        raise ValueError(f"{args.source}: {error}") from error
    if args.csv:
        lines = [[s.video, s.label, f"{s.start:.3f}", f"{s.end:.3f}", f"{s.score:.4f}"] for s in found]
        write_table(Path(args.csv), [["video", "label", "start", "end", "score"], *lines])
    if args.json:
        print_json(figures)
    else:
        print_text("\n".join(f"{name:<8} {value:.4f}" for name, value in figures.items()))
    return 0
