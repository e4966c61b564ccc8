"""everest-hf watch: classify a camera, a network camera, a pipe, or a file as it is shown."""

import argparse
import sys

from ..files import printable
from .options import (
    PROGRAM,
    add_command,
    add_decoding_options,
    add_model_options,
    check_counts,
    check_inputs,
    decoding_options,
    print_error,
    print_json,
    print_text,
)


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "watch",
        run,
        "Classify what a camera, a pipe or a file shows, while it shows it.",
        f"{PROGRAM} watch camera --model runs/quickstart/finetune/model --every 0.5",
    )
    parser.add_argument("source", metavar="SOURCE", help="camera, camera:1, rtsp://…, - (a video on stdin), or a file")
    add_model_options(parser, "share of the tokens to keep, instead of the model's own")
    parser.add_argument(
        "--frame-step", type=int, metavar="N", help="from a frame that is used to the next [processor's]"
    )
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two outputs [1]")
    parser.add_argument("--top-k", type=int, default=3, metavar="K", help="labels to show [3]")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, one for each output")
    add_decoding_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is seen, and a summary on stderr; the exit code is 1 where the source fails or hangs."""
    from .. import inference
    from ..inference.stream import EverestStream
    from ..inference.video_windows import checked_windows
    from ..inference.watch import Tally, watch
    from ..video import VideoError
    from ..video.live import LiveVideo

    check_counts(args, "frame_step", "top_k")
    check_inputs([], args.keep_ratio)
    if not 0 <= args.every < float("inf"):
        raise ValueError(f"--every is {args.every:g}; it must be 0 seconds or more")
    opening = decoding_options(args)
    name = inference.chosen_model(args.model, inference.CLASSIFICATION)
    inference.check_classifier(name)
    model, processor = inference.load_checkpoint(name, inference.CLASSIFICATION)
    step = checked_windows(model, processor, frame_step=args.frame_step)["frame_step"]
    stream = EverestStream(model, processor, frame_step=1, keep_ratio=args.keep_ratio)
    video, tally = LiveVideo(args.source, step=step, **opening), Tally()
    try:
        for seen in watch(stream, video, model.config, every=args.every, top_k=args.top_k, tally=tally):
            _print(seen, args.json)
    except VideoError as error:
        print_error(error)
        return 1
    finally:
        _end_line(args.json)
        print(printable(f"{PROGRAM}: {args.source}: {tally}"), file=sys.stderr)
    return 0


def _print(seen, as_json: bool) -> None:
    """Print an output: on a terminal in place of the one before."""
    if as_json:
        top = [{"label": label, "score": score} for label, score in seen.top]
        places = {"start": seen.start, "end": seen.end}
        print_json({**places, **top[0], "top": top, "latency": seen.latency, "dropped": seen.dropped})
        return
    labels = "  ".join(f"{label} {score:.3f}" for label, score in seen.top)
    text = f"{seen.end:8.1f} s  {labels}"
    if sys.stdout.isatty():
        print(f"\r\x1b[K{printable(text)}", end="", flush=True)
    else:
        print_text(text)


def _end_line(as_json: bool) -> None:
    if not as_json and sys.stdout.isatty():
        print(flush=True)
