"""everest-hf prepare: write videos so that random clips decode fast."""

import argparse

from .options import (
    PROGRAM,
    add_command,
    add_source_options,
    check_counts,
    decoding_options,
    print_error,
    print_text,
    source_options,
)

# Videos that are read before and after their preparation, to tell what it gains.
GAIN_SAMPLE = 8


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "prepare",
        run,
        "Write videos anew so that random clips decode fast: H.264, small, key frames close together, no sound.",
        f"{PROGRAM} prepare data/motion data/small --short-side 32",
    )
    add_source_options(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; run again, what is finished there stays")
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="of a frame, never enlarged [256]")
    parser.add_argument("--gop", type=int, metavar="FRAMES", help="from key frame to key frame [16]")
    parser.add_argument("--fps", type=float, metavar="N", help="frames a second of folders of frames [none: refused]")
    parser.add_argument("--crf", type=int, metavar="N", help="quality: lower is better and larger [20]")


def run(args: argparse.Namespace) -> int:
    """Write videos anew and print what that gains; the exit code is 1 where a video cannot be read."""
    from ..data.prepare import prepare_videos
    from ..video.encoding import Encoding

    check_counts(args, "workers")
    chosen = {name: getattr(args, name) for name in ("short_side", "gop", "crf") if getattr(args, name) is not None}
    options = {**decoding_options(args), **source_options(args)}
    encoding = Encoding(**chosen)
    done = prepare_videos(args.source, args.out, encoding=encoding, fps=args.fps, workers=args.workers, **options)
    for error in done.bad:
        print_error(error)
    print_text(
        f"{args.out}: {len(done.made)} videos written, {len(done.kept)} there already, {len(done.bad)} unreadable"
    )
    if done.new_list:
        print_text(f"list: {done.new_list}")
    _print_gain(done)
    return 1 if done.bad else 0


def _print_gain(done) -> None:
    """Read clips of some videos before and after, and print how many a second that makes."""
    from ..data.prepare import measure_gain
    from ..data.sampling import Sampling
    from ..video_processing_everest import EverestVideoProcessor

    frames, step = EverestVideoProcessor.num_frames, EverestVideoProcessor.frame_step
    gain = measure_gain(done.pairs(GAIN_SAMPLE), Sampling(frames, step))
    if gain:
        before, after = gain
        print(
            f"random clips of {frames} frames, step {step}, in one process: "
            f"{before:.1f} a second before, {after:.1f} after ({after / before:.1f} times as many)"
        )
