"""everest-hf embed: write one feature vector for each video."""

import argparse
from pathlib import Path

from .options import (
    PROGRAM,
    add_command,
    add_model_options,
    add_source_options,
    add_views_option,
    check_counts,
    check_inputs,
    decoding_options,
    print_error,
    print_text,
    source_options,
)


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "embed",
        run,
        "Write one feature vector for each video; run again after an interruption, it goes on.",
        f"{PROGRAM} embed data/motion/val features.safetensors --model runs/quickstart/finetune/model",
    )
    add_source_options(parser)
    parser.add_argument("out", metavar="OUT", help="file to write: .safetensors or .parquet")
    add_model_options(parser, "share of the tokens to keep, instead of the model's own")
    add_views_option(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="videos at a time [8]")


def run(args: argparse.Namespace) -> int:
    """Write the features of videos; the exit code is 1 where a video cannot be read."""
    from .. import inference
    from ..data import load_videos
    from ..inference.embed import embed_videos, writer_of

    check_counts(args, "workers", "batch_size")
    writer_of(Path(args.out))
    check_inputs([], args.keep_ratio)
    decoding = decoding_options(args)
    rows = load_videos(args.source, labels_required=False, **source_options(args))
    name = inference.chosen_model(args.model, inference.CLASSIFICATION, inference.PRETRAINING, inference.FEATURES)
    model, processor = inference.load_encoder(name)
    views = inference.evaluation_views(rows, model, processor, args.views, count_unreadable=True, **decoding)
    bad = embed_videos(
        model, views, args.out, keep_ratio=args.keep_ratio, batch_size=args.batch_size, num_workers=args.workers
    )
    for error in bad:
        print_error(error)
    print_text(f"{args.out}: {model.config.hidden_size} values for each of {len(rows) - len(bad)} videos")
    return 1 if bad else 0
