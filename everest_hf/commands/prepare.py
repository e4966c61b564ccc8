"""everest-hf prepare: write videos so that random clips decode fast."""

import argparse
from functools import partial
from typing import Any

from .options import (
    PROGRAM,
    add_command,
    add_shard_option,
    add_source_options,
    check_counts,
    decoding_options,
    print_error,
    print_text,
    source_options,
    workers_of,
)

# Videos that are read before and after their preparation, to tell what it gains.
GAIN_SAMPLE = 8


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "prepare",
        run,
        "Write copies of videos from which random clips decode fast: H.264, small, key frames close together, no sound.",
        f"{PROGRAM} prepare data/motion data/small --short-side 32",
    )
    add_source_options(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; run again, what is finished there stays")
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="of a frame, never enlarged [256]")
    parser.add_argument("--fps", type=float, metavar="N", help="frames a second of folders of frames [none: refused]")
    parser.add_argument(
        "--frame-step",
        type=int,
        metavar="N",
        help="write N phases of every N-th frame, for clips of this frame_step: read faster, larger [1: in order]",
    )
    parser.add_argument(
        "--phases",
        choices=("all", "1"),
        help="of these N phases, keep all, or 1: about an N-th of the size, without the other frames [all]",
    )
    parser.add_argument("--gop", type=int, metavar="FRAMES", help="from key frame to key frame [16, in phases 4]")
    parser.add_argument("--shards", type=int, metavar="N", help="write N parquet files of many videos, to be streamed")
    add_shard_option(parser, "make this part alone, as one of N processes; then run without it once [all]")
    parser.add_argument("--crf", type=int, metavar="N", help="quality: lower is better and larger [20]")


def run(args: argparse.Namespace) -> int:
    """Write smaller copies of videos and print what that gains; the exit code is 1 where a video cannot be read."""
    from ..data.prepare import prepare_videos
    from ..distributed import divide
    from ..video.encoding import Encoding

    check_counts(args, "workers", "shards")
    if args.phases and not args.frame_step:
        raise ValueError(f"--phases is {args.phases}; it belongs to --frame-step, which is not given")
    names = ("short_side", "gop", "crf", "frame_step")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    encoding = Encoding(**chosen, phases=1 if args.phases == "1" else None)  # type: ignore[arg-type]  # None: all
    options = {
        "encoding": encoding,
        "fps": args.fps,
        "workers": workers_of(args),
        **decoding_options(args),
        **source_options(args),
    }
    if args.shards:
        return _pack(args, options)
    prepare = partial(prepare_videos, args.source, args.out, **options)
    made = sum(divide(lambda shard: len(prepare(shard=shard).made), args.shard))
    done = prepare(shard=args.shard)
    for error in done.bad:
        print_error(error)
    print_text(
        f"{args.out}: {len(done.made) + made} videos written, {len(done.kept) - made} there already, "
        f"{len(done.bad)} unreadable"
    )
    if done.new_list:
        print_text(f"list: {done.new_list}")
    _print_gain(done, encoding.frame_step)
    return 1 if done.bad else 0


def _pack(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Write files of many videos; the exit code is 1 where a video cannot be read."""
    from ..data.packing import pack_videos
    from ..distributed import divide

    pack = partial(pack_videos, args.source, args.out, args.shards, **options)
    made = sum(divide(lambda shard: len(pack(shard=shard).made), args.shard))
    done = pack(shard=args.shard)
    for error in done.bad:
        print_error(error)
    print_text(
        f"{args.out}: {len(done.made) + made} files written, {len(done.kept) - made} there already, "
        f"with {done.videos} videos; {len(done.bad)} unreadable"
    )
    return 1 if done.bad else 0


def _print_gain(done, prepared_step: int) -> None:
    """Read clips of some videos before and after, and print how many a second that makes.

    prepared_step: that of the clips that the videos were prepared for, 1 for any.
    """
    from ..data.prepare import measure_gain
    from ..data.sampling import Sampling
    from ..video_processing_everest import EverestVideoProcessor

    frames = EverestVideoProcessor.num_frames
    step = prepared_step if prepared_step > 1 else EverestVideoProcessor.frame_step
    gain = measure_gain(done.pairs(GAIN_SAMPLE), Sampling(frames, step))
    if gain:
        before, after = gain
        print(
            f"random clips of {frames} frames, step {step}, in one process: "
            f"{before:.1f} a second before, {after:.1f} after ({after / before:.1f} times as many)"
        )
