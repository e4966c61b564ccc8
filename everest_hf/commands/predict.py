"""everest-hf predict: classify videos."""

import argparse

from .options import (
    PROGRAM,
    add_command,
    add_decoding_options,
    add_model_options,
    add_views_option,
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
        "predict",
        run,
        "Classify videos, each by its centre clip or by the mean over several views.",
        f"{PROGRAM} predict clip.mp4 --model runs/quickstart/finetune/model --keep-ratio 0.4",
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video file or URL, or a list file of videos")
    add_model_options(parser, "share of the tokens to keep, instead of the model's own")
    add_views_option(parser)
    add_decoding_options(parser)
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels to show of each video [5]")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, one for each video")


def run(args: argparse.Namespace) -> int:
    """Print the most probable labels of each video. A video that cannot be read is named, and the others go on."""
    from tqdm.auto import tqdm

    from .. import inference

    check_counts(args, "top_k")
    check_inputs(args.videos, args.keep_ratio)
    decoding = decoding_options(args)
    videos = [part for video in args.videos for part in _videos_of(video)]
    name = inference.chosen_model(args.model, inference.CLASSIFICATION)
    inference.check_classifier(name)
    model, processor = inference.load_checkpoint(name, inference.CLASSIFICATION)
    failures = 0
    for video, segment in tqdm(videos, desc="predict", unit="video", disable=len(videos) == 1):
        try:
            logits = inference.classify(
                model, processor, video, args.keep_ratio, args.views, segment=segment, **decoding
            )
        except (ValueError, OSError) as error:
            print_error(error)
            failures += 1
            continue
        _print_labels(video, segment, inference.top_labels(logits, model.config, args.top_k), args.json)
    return 1 if failures else 0


def _videos_of(video: str) -> list:
    """Return (path, segment or None) of a video, or of each row of a list file."""
    from ..data import load_videos
    from ..data.rows import is_list
    from ..data.segments import segment_in

    if not is_list(video):
        return [(video, None)]
    return [(row["video"], segment_in(row)) for row in load_videos(video, labels_required=False, check_files=False)]


def _print_labels(video: str, segment, labels: list[tuple[str, float]], as_json: bool) -> None:
    if as_json:
        part = {} if segment is None else dict(zip(segment.columns, (segment.start, segment.end), strict=True))
        print_json({"video": video, **part, "labels": [{"label": label, "score": score} for label, score in labels]})
    else:
        name = video if segment is None else f"{video}, {segment}"
        print_text("\n".join([name, *(f"  {score:6.4f}  {label}" for label, score in labels)]))
