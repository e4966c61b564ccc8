"""Options that several commands have, checks of their values, and how errors are printed.

Neither this file nor that of a command imports anything heavy before its arguments are parsed.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..files import RUNS, printable

PROGRAM = "everest-hf"
# Names of pictures that Matplotlib writes.
PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def print_error(error: Exception | str) -> None:
    """Print one line on stderr."""
    from tqdm.auto import tqdm

    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    line = printable(" ".join(text.split())) or type(error).__name__
    tqdm.write(f"{PROGRAM}: error: {line}", file=sys.stderr)


def print_text(text: str) -> None:
    """Print lines on stdout; what would steer the terminal in the names of files and classes is shown as escapes."""
    from tqdm.auto import tqdm

    tqdm.write("\n".join(printable(line) for line in text.split("\n")), file=sys.stdout)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print one line of JSON on stdout, in which every character that would steer the terminal is an escape."""
    from tqdm.auto import tqdm

    text = json.dumps(value, ensure_ascii=False)
    tqdm.write("".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in text), file=sys.stdout)
    sys.stdout.flush()


def add_command(commands, name: str, function, text: str, example: str) -> Parser:
    parser = commands.add_parser(
        name,
        help=text[0].lower() + text[1:].rstrip("."),
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="list file, folder of class folders, or what training takes")
    add_rows_options(parser)
    add_reading_options(parser)


def add_rows_options(parser: argparse.ArgumentParser, labels: bool = True) -> None:
    """Add how lists and data sets are read; labels: where theirs are, too."""
    parser.add_argument("--data-root", metavar="DIR", help="where the paths of a list start [the list's folder]")
    parser.add_argument("--split", metavar="NAME", help="split of the source, such as train")
    parser.add_argument("--video-column", metavar="NAME", help="column of a data set with the videos [by its type]")
    if labels:
        parser.add_argument("--label-column", metavar="NAME", help="column of a data set with the labels [label]")


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add how videos are fetched and decoded."""
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode [one a core]")
    parser.add_argument(
        "--url-schemes",
        metavar="NAMES",
        help="of addresses in a data set that are fetched beside hf://, such as https,s3; never file [none]",
    )
    add_decoding_options(parser)


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decode-timeout",
        type=float,
        metavar="SECONDS",
        help="after which fetching or decoding a video counts as hung (0: never) [60]",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="frames x height x width that may be decoded of a video at a time (0: any) [536870912]",
    )


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what is given of how videos are opened, as arguments of `everest_hf.data.VideoViews`.

    Raises:
        ValueError: a value is out of range.
    """
    chosen: dict[str, Any] = {"time_limit": args.decode_timeout, "max_pixels": args.max_pixels}
    for name, value in zip(("decode-timeout", "max-pixels"), chosen.values(), strict=True):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"--{name} is {value:g}; it must be 0 or more")
    if getattr(args, "url_schemes", None):
        chosen["url_schemes"] = args.url_schemes.split(",")
    return {name: value for name, value in chosen.items() if value is not None}


def add_views_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--views", type=_views, default=(1, 1), metavar="SxC", help="segments x crops to average over, as 5x3 [1x1]"
    )


def add_shard_option(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help=text)


def workers_of(args: argparse.Namespace) -> int | None:
    """Return --workers; without it, the share of the cores that each of the processes launched on this machine has."""
    from ..data.workers import num_cores

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return args.workers or (max(1, num_cores() // local) if local > 1 else None)


def _shard(text: str) -> tuple[int, int]:
    """Return the number of a part from 0, and how many there are."""
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N with I from 1 to N, such as 3/16")
    return int(part) - 1, int(count)


def _views(text: str) -> tuple[int, int]:
    segments, _, crops = text.partition("x")
    if not (segments.isdecimal() and crops.isdecimal() and int(segments) and int(crops)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form SEGMENTSxCROPS, such as 5x3")
    return int(segments), int(crops)


def add_timeline_options(parser: argparse._ActionsContainer) -> None:
    """Add how the classes of a long video over its time are found."""
    parser.add_argument("--stride", type=int, metavar="FRAMES", help="from a window to the next [a quarter of a clip]")
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="P", help="least score of a segment's windows [0.5]"
    )
    parser.add_argument(
        "--smooth", type=float, default=0.0, metavar="SECONDS", help="over which scores are averaged [0: not]"
    )


def timeline_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `everest_hf.inference.timeline` beside model, video and decoding."""
    names = ("stride", "threshold", "smooth", "keep_ratio", "batch_size")
    return {name: getattr(args, name) for name in names}


def add_model_options(parser: argparse.ArgumentParser, keep_ratio: str) -> None:
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help=f"checkpoint or run folder, or Hub id [the newest finished run below ./{RUNS}]",
    )
    parser.add_argument("--keep-ratio", type=float, metavar="R", help=keep_ratio)


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `load_videos` takes beside the source."""
    return {name: getattr(args, name) for name in ("data_root", "split", "video_column", "label_column")}


def check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def check_inputs(videos: list[str], keep_ratio: float | None) -> None:
    """Refuse what can be known to be wrong before a model is loaded."""
    from ..configuration_everest import check_keep_ratio

    if keep_ratio is not None:
        check_keep_ratio(keep_ratio)
    for video in videos:
        if not video.startswith(("http://", "https://")) and not Path(video).exists():
            raise FileNotFoundError(f"{video}: no such video file")
