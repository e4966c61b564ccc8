"""everest-hf check-data: look at every video before anything is trained on it."""

import argparse

from .options import (
    PROGRAM,
    add_command,
    add_source_options,
    check_counts,
    decoding_options,
    print_json,
    print_text,
    source_options,
)


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "check-data",
        run,
        "Decode the first, middle and last frame of every video, and say what there is and what cannot be read.",
        f"{PROGRAM} check-data data/motion/train --clip-frames 12",
    )
    add_source_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--min-videos", type=int, default=10, metavar="K", help="list classes of fewer videos [10]")
    parser.add_argument(
        "--clip-frames", type=int, metavar="N", help="list videos of fewer frames [what a clip spans by default]"
    )


def run(args: argparse.Namespace) -> int:
    """Decode frames of every video and print what there is; the exit code is 1 where a video cannot be read."""
    from ..data import load_videos
    from ..data.checking import as_text, check_videos, summarize

    check_counts(args, "workers", "min_videos", "clip_frames")
    decoding = decoding_options(args)
    rows = load_videos(args.source, labels_required=False, check_files=False, **source_options(args))
    found = check_videos(rows, workers=args.workers, **decoding)
    summary = summarize(rows, found, clip_frames=args.clip_frames or default_clip_frames(), min_videos=args.min_videos)
    if args.json:
        print_json(summary)
    else:
        print_text(as_text(summary))
    return 1 if summary["unreadable"] else 0


def default_clip_frames() -> int:
    """Return how many frames of a long video a clip of the defaults spans."""
    from ..data.sampling import Sampling
    from ..video_processing_everest import EverestVideoProcessor as Defaults

    return Sampling(Defaults.num_frames, Defaults.frame_step, frame_sampling=Defaults.frame_sampling).span
