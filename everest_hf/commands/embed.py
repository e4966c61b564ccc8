"""everest-hf embed: write one feature vector for each video, or for each window of a long video."""

import argparse
from pathlib import Path

from .options import (
    PROGRAM,
    add_command,
    add_model_options,
    add_shard_option,
    add_source_options,
    add_views_option,
    check_counts,
    check_inputs,
    decoding_options,
    print_error,
    print_text,
    source_options,
    workers_of,
)

# What only --windows takes, by the names of the arguments.
PLACING = ("stride", "frame_step", "fps", "subset")


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "embed",
        run,
        "Write one feature vector for each video, or window; run again after an interruption, it goes on.",
        f"{PROGRAM} embed data/motion/val features.safetensors --model runs/quickstart/finetune/model",
    )
    add_source_options(parser)
    parser.add_argument("out", metavar="OUT", help="file to write: .safetensors or .parquet; with --windows, a folder")
    add_model_options(parser, "share of the tokens to keep, instead of the model's own")
    add_views_option(parser)
    add_shard_option(parser, "make this part alone, as one of N processes; then run without it once [all]")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="videos, or windows, at a time [8]")
    group = parser.add_argument_group("long videos")
    group.add_argument("--windows", action="store_true", help="write a .npy file for each video, a vector a window")
    group.add_argument("--stride", type=int, metavar="FRAMES", help="from a window to the next [a quarter of a clip]")
    group.add_argument(
        "--frame-step", type=int, metavar="N", help="from a frame of a window to the next [processor's]"
    )
    group.add_argument("--fps", type=float, metavar="F", help="frames a second to read, which the two count [all]")
    group.add_argument("--subset", metavar="NAME", help="what annotations.json calls these videos [training]")


def run(args: argparse.Namespace) -> int:
    """Write the features of videos; the exit code is 1 where a video cannot be read."""
    from ..distributed import divide

    check_counts(args, "workers", "batch_size")
    _check_out(args)
    check_inputs([], args.keep_ratio)
    decoding = decoding_options(args)
    divide(lambda shard: _embed(args, decoding, shard)[1], args.shard)
    bad, text = _embed(args, decoding, args.shard)
    for error in bad:
        print_error(error)
    print_text(f"{args.out}: {text}")
    return 1 if bad else 0


def _embed(args: argparse.Namespace, decoding: dict, shard: tuple[int, int]) -> tuple[list, str]:
    """Write the features, or a part of them; return the videos that cannot be read, and what there is now in words."""
    from .. import inference
    from ..data import load_videos
    from ..data.rows import paths_of

    rows = load_videos(args.source, labels_required=False, **source_options(args))
    name = inference.chosen_model(args.model, inference.CLASSIFICATION, inference.PRETRAINING, inference.FEATURES)
    model, processor = inference.load_encoder(name)
    if args.windows:
        bad = _embed_windows(args, rows, model, processor, decoding)
    else:
        bad = _embed_videos(args, rows, model, processor, decoding, shard)
    if shard[1] > 1:
        return bad, f"part {shard[0] + 1} of {shard[1]} is made; when all are, run without --shard"
    each, count = ("each window", len(set(paths_of(rows)))) if args.windows else ("each", len(rows))
    return bad, f"{model.config.hidden_size} values for {each} of {count - len(bad)} videos"


def _check_out(args: argparse.Namespace) -> None:
    from ..distributed import num_launched
    from ..inference.features import FORMATS, writer_of

    if not args.windows:
        for name in PLACING:
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is of windows; give --windows too")
        writer_of(Path(args.out))
        return
    if args.workers is not None or args.views != (1, 1) or args.shard != (0, 1):
        raise ValueError("--workers, --views and --shard have no meaning with --windows")
    if num_launched() > 1:
        raise ValueError(
            f"--windows is for one process, and {num_launched()} are launched; start it without a launcher"
        )
    if Path(args.out).is_file() or Path(args.out).suffix in FORMATS:
        raise ValueError(f"{args.out}: with --windows the output is a folder; give the name of one")


def _embed_videos(args: argparse.Namespace, rows, model, processor, decoding: dict, shard: tuple[int, int]) -> list:
    from .. import inference

    views = inference.evaluation_views(rows, model, processor, args.views, count_unreadable=True, **decoding)
    return inference.embed_videos(
        model,
        views,
        args.out,
        keep_ratio=args.keep_ratio,
        batch_size=args.batch_size,
        num_workers=workers_of(args),
        shard=shard,
    )


def _embed_windows(args: argparse.Namespace, rows, model, processor, decoding: dict) -> list:
    from .. import inference

    given = {name: getattr(args, name) for name in (*PLACING, "keep_ratio", "batch_size")}
    given = {name: value for name, value in given.items() if value is not None}
    return inference.embed_windows(model, processor, rows, args.out, **given, **decoding)
