"""everest-hf predict: classify videos."""

import argparse
from pathlib import Path

from .options import (
    PICTURE_SUFFIXES,
    PROGRAM,
    add_command,
    add_model_options,
    add_reading_options,
    add_rows_options,
    add_timeline_options,
    add_views_option,
    check_counts,
    check_inputs,
    decoding_options,
    print_error,
    print_json,
    print_text,
    timeline_options,
)

# Formats of a timeline, and of the video that shows it.
TIMELINE_SUFFIXES, OVERLAY_SUFFIXES = (".json", ".csv", ".srt"), (".mp4", ".mkv")
# Options that belong to one of the two uses of the command alone.
TIMELINE_OPTIONS = ("stride", "threshold", "smooth")
LIST_OPTIONS = ("csv", "json", "views", "data_root", "split", "video_column", "workers", "url_schemes")


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "predict",
        run,
        "Classify videos, each by its centre clip or by the mean over several views.",
        f"{PROGRAM} predict clip.mp4 --model runs/quickstart/finetune/model --keep-ratio 0.4",
    )
    parser.add_argument(
        "videos", nargs="+", metavar="VIDEO", help="video file, folder of videos, pattern, list file, data set or URL"
    )
    add_model_options(parser, "share of the tokens to keep, instead of the model's own")
    add_views_option(parser)
    add_rows_options(parser, labels=False)
    add_reading_options(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="clips at a time [8]")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels to show of each video [5]")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, one for each video")
    parser.add_argument("--csv", metavar="FILE", help="write a table with a row for each video, and print no labels")
    group = parser.add_argument_group("classes over the time of one long video")
    group.add_argument(
        "--timeline",
        action="append",
        default=[],
        metavar="OUT",
        help="write them: .json (windows and segments), .csv or .srt (segments), .png, .jpg, .pdf or .svg (a heat map)",
    )
    group.add_argument("--overlay", metavar="OUT.mp4", help="write the video with the segments' labels burnt in")
    add_timeline_options(group)
    parser.set_defaults(defaults={name: parser.get_default(name) for name in (*TIMELINE_OPTIONS, *LIST_OPTIONS)})


def run(args: argparse.Namespace) -> int:
    """Print or write the most probable labels of each video. Videos that cannot be read are named at the end."""
    from .. import inference

    check_counts(args, "top_k", "batch_size", "workers", "stride")
    check_inputs([], args.keep_ratio)
    if args.timeline or args.overlay:
        return _run_timeline(args)
    _refuse(args, TIMELINE_OPTIONS, "is only for --timeline and --overlay")
    table = None if args.csv is None else _checked_table(args.csv)
    opening = decoding_options(args)
    rows = {name: getattr(args, name) for name in ("data_root", "split", "video_column")}
    videos = inference.find_videos(args.videos, url_schemes=opening.pop("url_schemes", ()), **rows)
    name = inference.chosen_model(args.model, inference.CLASSIFICATION)
    inference.check_classifier(name)
    model, processor = inference.load_checkpoint(name, inference.CLASSIFICATION)
    how = {"keep_ratio": args.keep_ratio, "views": args.views, "top_k": args.top_k, "batch_size": args.batch_size}
    answers = []
    with inference.predicting(model, processor, videos, num_workers=args.workers, **how, **opening) as found:
        for answer in found:
            answers.append(answer)
            if answer.error is None:
                _show(answer, args)
    if table:
        inference.write_predictions(table, answers)
        print_text(f"{table}: {sum(answer.error is None for answer in answers)} of {len(answers)} videos")
    bad = [answer for answer in answers if answer.error is not None]
    for answer in bad:
        print_error(f"{answer.video}: {answer.error}")
    return 1 if bad else 0


def _run_timeline(args: argparse.Namespace) -> int:
    """Write the classes of one video over its time, and print its segments."""
    outs = [Path(out) for out in args.timeline]
    _check_timeline(args, outs)
    from .. import inference

    name = inference.chosen_model(args.model, inference.CLASSIFICATION)
    inference.check_classifier(name)
    model, processor = inference.load_checkpoint(name, inference.CLASSIFICATION)
    (video,), opening = args.videos, decoding_options(args)
    line = inference.timeline(model, processor, video, **timeline_options(args), **opening)
    for out in outs:
        _write_timeline(out, line, args.top_k)
    if args.overlay:
        inference.write_captioned(line, Path(args.overlay), **opening)
    for segment in line.segments:
        print_text(f"{segment.start:8.2f} {segment.end:8.2f}  {segment.score:6.4f}  {segment.label}")
    print_text("\n".join([*map(str, outs), *([args.overlay] if args.overlay else [])]))
    return 0


def _check_timeline(args: argparse.Namespace, outs: list[Path]) -> None:
    """Refuse what can be known to be wrong before a model is loaded."""
    if len(args.videos) != 1:
        raise ValueError(f"{len(args.videos)} videos; --timeline and --overlay take one video at a time")
    check_inputs(args.videos, args.keep_ratio)
    _refuse(
        args, LIST_OPTIONS, "is not for --timeline and --overlay, which have files of their own and read one video"
    )
    known = (*TIMELINE_SUFFIXES, *PICTURE_SUFFIXES)
    for out in outs:
        if out.suffix.lower() not in known:
            raise ValueError(f"{out}: cannot tell the format; expected a name ending in {', '.join(known)}")
    if args.overlay and Path(args.overlay).suffix.lower() not in OVERLAY_SUFFIXES:
        raise ValueError(f"{args.overlay}: not a video; expected a name ending in {' or '.join(OVERLAY_SUFFIXES)}")
    for out in [*outs, *([Path(args.overlay)] if args.overlay else [])]:
        if _checked_table(str(out)).resolve() == Path(args.videos[0]).resolve():
            raise ValueError(f"{out}: is the video itself; choose another file")


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """Raise a ValueError for an option that is given and would do nothing."""
    for name in names:
        if getattr(args, name) != args.defaults[name]:
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def _write_timeline(out: Path, line, top_k: int) -> None:
    from ..inference.timelines import TIMELINE_FORMATS
    from ..visualize import draw_timeline

    if write := TIMELINE_FORMATS.get(out.suffix.lower()):
        write(out, line, top_k)
    else:
        draw_timeline(line.labels, line.edges, line.scores, line.segments, out)


def _checked_table(name: str) -> Path:
    """Return the path of a file that can be written, as far as that can be known; its folder is made."""
    path = Path(name)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; expected the name of a {path.suffix or '.csv'} file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _show(answer, args: argparse.Namespace) -> None:
    if args.json:
        labels = [{"label": label, "score": score} for label, score in answer.top]
        print_json({"video": answer.video, **answer.bounds, "labels": labels})
    elif args.csv is None:
        name = answer.video if answer.segment is None else f"{answer.video}, {answer.segment}"
        print_text("\n".join([name, *(f"  {score:6.4f}  {label}" for label, score in answer.top)]))
