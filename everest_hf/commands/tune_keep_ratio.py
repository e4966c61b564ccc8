"""everest-hf tune-keep-ratio: find the keep ratio to run a classifier at."""

import argparse
import sys
from pathlib import Path

from ..files import RUNS, printable
from .options import (
    PROGRAM,
    add_command,
    add_source_options,
    add_views_option,
    check_counts,
    decoding_options,
    print_error,
    print_json,
    print_text,
    source_options,
)


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "tune-keep-ratio",
        run,
        "Measure accuracy and speed of a classifier at several keep ratios, without training it again, and recommend one.",
        f"{PROGRAM} tune-keep-ratio runs/quickstart/finetune data/motion/val",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a classifier or of its run, or Hub id")
    add_source_options(parser)
    parser.add_argument(
        "-o", "--out", default=str(RUNS / "keep-ratio"), metavar="OUT", help="folder of the report [%(default)s]"
    )
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        metavar="R",
        help="keep ratios to compare [0.1 0.2 … 1; with batch those between min_keep_ratio and max_keep_ratio]",
    )
    parser.add_argument(
        "--budget",
        choices=("clip", "batch"),
        help="whether a ratio is the share of each clip's tokens or of the clips' mean [the checkpoint's token_budget]",
    )
    parser.add_argument(
        "--save", action="store_true", help="write what is recommended into config.json of CHECKPOINT, a folder"
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        metavar="POINTS",
        help="how many points of top-1 may be lost against the best ratio [1]",
    )
    add_views_option(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="videos at a time [8]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compare keep ratios, write the report, and keep the choice if asked to; return 1 if a video cannot be read."""
    from .. import inference
    from ..configuration_everest import EverestConfig
    from ..data import load_videos
    from ..evaluation import keep_ratio, keep_ratio_report
    from ..inference.loading import loaded, model_folder

    check_counts(args, "workers", "batch_size")
    decoding = decoding_options(args)
    name = str(model_folder(args.checkpoint))
    if args.save:
        keep_ratio_report.check_folder(Path(name))
    inference.check_classifier(name)
    config = loaded(name, EverestConfig.from_pretrained, name)
    options = ("ratios", "max_loss", "budget")
    chosen = {key: getattr(args, key) for key in options if getattr(args, key) is not None}
    keep_ratio.check_request(config, **chosen)
    if args.save:
        keep_ratio_report.check_saving(config)
    names = [config.id2label[i] for i in range(config.num_labels)]
    rows = load_videos(args.source, class_names=names, **source_options(args))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    model, processor = inference.load_checkpoint(name, inference.CLASSIFICATION)
    views = inference.evaluation_views(rows, model, processor, args.views, count_unreadable=True, **decoding)
    reading = {"source": args.source, "batch_size": args.batch_size, "num_workers": args.workers}
    found = keep_ratio.tune_keep_ratio(model, views, **reading, **chosen)
    files = keep_ratio_report.write_report(Path(args.out), found)
    kept_in = keep_ratio_report.save_recommended(Path(name), found) if args.save else None
    for bad in found.unreadable:
        print_error(f"{bad.video}: {bad.reason}")
    if args.json:
        print_json(found.to_json())
        if kept_in is not None:
            print(printable(keep_ratio_report.kept_line(found, kept_in)), file=sys.stderr)
    else:
        text = keep_ratio_report.as_text(found, kept_in)
        print_text(f"{text}\nreport         {', '.join(map(str, files))}")
    return 1 if found.unreadable else 0
