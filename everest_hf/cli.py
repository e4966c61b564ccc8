"""The command everest-hf: check and prepare videos, convert a checkpoint, classify and embed videos, tune, draw.

From top to bottom: the command line, the commands, what they share. Whatever is heavy is imported inside the commands,
so that this file costs nothing where it only prints its help.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    import torch

PROGRAM = "everest-hf"
RUNS = Path("runs")
PRETRAINING, CLASSIFICATION, FEATURES = "EverestForPreTraining", "EverestForVideoClassification", "EverestModel"
CONVERT_FIELDS = (
    "keep_ratio",
    "num_frames",
    "image_size",
    "token_selection",
    "num_attention_heads",
    "decoder_num_attention_heads",
)
# Videos that are read before and after their preparation, to tell what it gains.
GAIN_SAMPLE = 8
PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
ANIMATION_SUFFIXES = (".mp4", ".gif")
# Of a moving picture: slow enough to follow single tubelets.
FRAMES_PER_SECOND = 6


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's) and return the exit code.

    0: done. 1: it failed, and stderr says in a line why. A wrong command line raises SystemExit(2), as argparse does.
    """
    args = build_parser().parse_args(arguments)
    try:
        return args.command(args)
    except BrokenPipeError:
        # The reader of our output has gone (as in `| head`). What is still buffered must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130  # as a shell counts a process that ended by this signal


def print_error(error: Exception | str) -> None:
    """Print one line on stderr."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    tqdm.write(f"{PROGRAM}: error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; `command` of its result is the function to call with the result."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="EVEREST: video models that work on the tokens that change over time."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check_data(commands)
    _add_prepare(commands)
    _add_convert(commands)
    _add_predict(commands)
    _add_embed(commands)
    _add_tune_keep_ratio(commands)
    _add_visualize(commands)
    _add_push(commands)
    return parser


def _add_command(commands, name: str, function, text: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text[0].lower() + text[1:].rstrip("."),
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    return parser


def _add_check_data(commands) -> None:
    parser = _add_command(
        commands,
        "check-data",
        check_data,
        "Decode the first, middle and last frame of every video, and say what there is and what cannot be read.",
        f"{PROGRAM} check-data data/motion/train --clip-frames 12",
    )
    _add_source_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--min-videos", type=int, default=10, metavar="K", help="list classes of fewer videos [10]")
    parser.add_argument(
        "--clip-frames", type=int, metavar="N", help="list videos of fewer frames [what a clip spans by default]"
    )


def _add_prepare(commands) -> None:
    parser = _add_command(
        commands,
        "prepare",
        prepare,
        "Write videos anew so that random clips decode fast: H.264, small, key frames close together, no sound.",
        f"{PROGRAM} prepare data/motion data/small --short-side 32",
    )
    _add_source_options(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; run again, what is finished there stays")
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="of a frame, never enlarged [256]")
    parser.add_argument("--gop", type=int, metavar="FRAMES", help="from key frame to key frame [16]")
    parser.add_argument("--crf", type=int, metavar="N", help="quality: lower is better and larger [20]")


def _add_embed(commands) -> None:
    parser = _add_command(
        commands,
        "embed",
        embed,
        "Write one feature vector for each video; run again after an interruption, it goes on.",
        f"{PROGRAM} embed data/motion/val features.safetensors --model runs/quickstart/finetune/model",
    )
    _add_source_options(parser)
    parser.add_argument("out", metavar="OUT", help="file to write: .safetensors or .parquet")
    _add_model_options(parser, "share of the tokens to keep, instead of the model's own")
    _add_views_option(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="videos at a time [8]")


def _add_tune_keep_ratio(commands) -> None:
    parser = _add_command(
        commands,
        "tune-keep-ratio",
        tune_keep_ratio,
        "Measure accuracy and speed of a classifier over keep ratios, without training it anew, and recommend one.",
        f"{PROGRAM} tune-keep-ratio runs/quickstart/finetune data/motion/val",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a classifier or of its run, or Hub id")
    _add_source_options(parser)
    parser.add_argument(
        "-o", "--out", default=str(RUNS / "keep-ratio"), metavar="OUT", help="folder of the report [%(default)s]"
    )
    parser.add_argument("--ratios", type=float, nargs="+", metavar="R", help="keep ratios to compare [0.1 0.2 … 1]")
    parser.add_argument(
        "--max-loss", type=float, metavar="POINTS", help="points of top-1 that may be lost to the best ratio [1]"
    )
    _add_views_option(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="videos at a time [8]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="list file, folder of class folders, or what training takes")
    parser.add_argument("--data-root", metavar="DIR", help="where the paths of a list start [the list's folder]")
    parser.add_argument("--split", metavar="NAME", help="split of the source, such as train")
    parser.add_argument("--video-column", metavar="NAME", help="column of a data set with the videos [by its type]")
    parser.add_argument("--label-column", metavar="NAME", help="column of a data set with the labels [label]")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode [one a core]")


def _add_views_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--views", type=_views, default=(1, 1), metavar="SxC", help="segments x crops to average over, as 5x3 [1x1]"
    )


def _views(text: str) -> tuple[int, int]:
    segments, _, crops = text.partition("x")
    if not (segments.isdecimal() and crops.isdecimal() and int(segments) and int(crops)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form SEGMENTSxCROPS, such as 5x3")
    return int(segments), int(crops)


def _add_convert(commands) -> None:
    parser = _add_command(
        commands,
        "convert",
        convert,
        "Convert VideoMAE or official EVEREST weights into a checkpoint for Transformers.",
        f"{PROGRAM} convert MCG-NJU/videomae-base-finetuned-kinetics everest-base --keep-ratio 0.6",
    )
    parser.add_argument("source", metavar="SOURCE", help=".pth file, folder of a Transformers VideoMAE, or Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")
    parser.add_argument("--keep-ratio", type=float, metavar="R", help="share of the tokens kept in inference")
    parser.add_argument("--num-frames", type=int, metavar="T", help="frames of a clip, where the source does not tell")
    parser.add_argument("--image-size", type=int, nargs="+", metavar=("H", "W"), help="height and width in pixels")
    parser.add_argument("--token-selection", metavar="NAME", help="motion, random or tube")
    parser.add_argument("--num-attention-heads", type=int, metavar="N", help="heads of the encoder")
    parser.add_argument("--decoder-num-attention-heads", type=int, metavar="N", help="heads of the decoder")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line, in the order of the head")


def _add_predict(commands) -> None:
    parser = _add_command(
        commands,
        "predict",
        predict,
        "Classify videos, each by its centre clip or by the mean over several views.",
        f"{PROGRAM} predict clip.mp4 --model runs/quickstart/finetune/model --keep-ratio 0.4",
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video file or URL")
    _add_model_options(parser, "share of the tokens to keep, instead of the model's own")
    _add_views_option(parser)
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels to show of each video [5]")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, one for each video")


def _add_visualize(commands) -> None:
    parser = _add_command(
        commands,
        "visualize",
        visualize,
        "Draw the tokens that a model keeps of a video and, for a pre-trained model, what it makes of the others.",
        f"{PROGRAM} visualize clip.mp4 -o tokens.png --model runs/quickstart/finetune/model --keep-ratio 0.4",
    )
    parser.add_argument("video", metavar="VIDEO", help="video file or URL")
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="OUT",
        help=f"picture ({', '.join(PICTURE_SUFFIXES)}) or moving picture ({', '.join(ANIMATION_SUFFIXES)}) to write",
    )
    _add_model_options(
        parser, "share of the tokens to keep (for a pre-training checkpoint: seen and predicted), instead of its own"
    )


def _add_push(commands) -> None:
    parser = _add_command(
        commands,
        "push",
        push,
        "Publish a checkpoint on the Hub: weights, configuration, code, processor, model card, and the run's records.",
        f"{PROGRAM} push runs/quickstart/finetune your-name/your-model",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a model, or of a run: its result")
    parser.add_argument("repo", metavar="REPO", help="repository on the Hub, user/name; created where there is none")
    parser.add_argument("--private", action="store_true", help="for no one else to see")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created where there is none [main]")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")


def _add_model_options(parser: argparse.ArgumentParser, keep_ratio: str) -> None:
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help=f"checkpoint folder or Hub id [the newest finished run below ./{RUNS}]"
    )
    parser.add_argument("--keep-ratio", type=float, metavar="R", help=keep_ratio)


# --------------------------------------------------------------------------------------------------------- commands


def check_data(args: argparse.Namespace) -> int:
    """Decode frames of every video and print what there is; the exit code is 1 where a video cannot be read."""
    from .check import as_text, check_videos, summarize
    from .data import load_videos

    _check_counts(args, "workers", "min_videos", "clip_frames")
    rows = load_videos(args.source, labels_required=False, check_files=False, **_source_options(args))
    found = check_videos(rows, workers=args.workers)
    summary = summarize(rows, found, clip_frames=args.clip_frames or default_clip_frames(), min_videos=args.min_videos)
    print(json.dumps(summary, ensure_ascii=False) if args.json else as_text(summary))
    return 1 if summary["unreadable"] else 0


def default_clip_frames() -> int:
    """Return how many frames of a long video a clip of the defaults spans."""
    from .video_processing_everest import EverestVideoProcessor, frame_indices

    sampling = {name: getattr(EverestVideoProcessor, name) for name in ("num_frames", "frame_step", "frame_sampling")}
    indices = frame_indices(num_video_frames=sys.maxsize, **sampling)
    return indices[-1] - indices[0] + 1


def prepare(args: argparse.Namespace) -> int:
    """Write videos anew and print what that gains; the exit code is 1 where a video cannot be read."""
    from .prepare import Encoding, prepare_videos

    _check_counts(args, "workers")
    chosen = {name: getattr(args, name) for name in ("short_side", "gop", "crf") if getattr(args, name) is not None}
    done = prepare_videos(
        args.source, args.out, encoding=Encoding(**chosen), workers=args.workers, **_source_options(args)
    )
    for error in done.bad:
        print_error(error)
    print(f"{args.out}: {len(done.made)} videos written, {len(done.kept)} there already, {len(done.bad)} unreadable")
    if done.new_list:
        print(f"list: {done.new_list}")
    _print_gain(done)
    return 1 if done.bad else 0


def _print_gain(done) -> None:
    """Read clips of some videos before and after, and print how many a second that makes."""
    from . import EverestVideoProcessor
    from .prepare import measure_gain

    frames, step = EverestVideoProcessor.num_frames, EverestVideoProcessor.frame_step
    gain = measure_gain(done.pairs(GAIN_SAMPLE), num_frames=frames, frame_step=step)
    if gain:
        before, after = gain
        print(
            f"random clips of {frames} frames, step {step}, in one process: "
            f"{before:.1f} a second before, {after:.1f} after ({after / before:.1f} times as many)"
        )


def embed(args: argparse.Namespace) -> int:
    """Write the features of videos; the exit code is 1 where a video cannot be read."""
    from .data import load_videos
    from .embed import embed_videos, writer_of

    _check_counts(args, "workers", "batch_size")
    writer_of(Path(args.out))
    _check_arguments([], args.keep_ratio)
    rows = load_videos(args.source, labels_required=False, **_source_options(args))
    name = args.model or newest_run(CLASSIFICATION, PRETRAINING, FEATURES)
    model, processor = load_encoder(name)
    views = evaluation_views(rows, model, processor, args.views, count_unreadable=True)
    bad = embed_videos(
        model, views, args.out, keep_ratio=args.keep_ratio, batch_size=args.batch_size, num_workers=args.workers
    )
    for error in bad:
        print_error(error)
    print(f"{args.out}: {model.config.hidden_size} values for each of {len(rows) - len(bad)} videos")
    return 1 if bad else 0


def tune_keep_ratio(args: argparse.Namespace) -> int:
    """Compare keep ratios and write the report; the exit code is 1 where a video cannot be read."""
    from . import EverestConfig, tune
    from .data import load_videos
    from .hub import model_folder

    _check_counts(args, "workers", "batch_size")
    name = str(model_folder(args.checkpoint))
    check_classifier(name)
    config = _loaded(name, EverestConfig.from_pretrained, name)
    chosen = {key: getattr(args, key) for key in ("ratios", "max_loss") if getattr(args, key) is not None}
    tune.check_request(config, **chosen)
    names = [config.id2label[i] for i in range(config.num_labels)]
    rows = load_videos(args.source, class_names=names, **_source_options(args))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    model, processor = load_checkpoint(name, CLASSIFICATION)
    views = evaluation_views(rows, model, processor, args.views, count_unreadable=True)
    found = tune.tune_keep_ratio(model, views, batch_size=args.batch_size, num_workers=args.workers, **chosen)
    summary = {"source": args.source, **found}
    files = tune.write_report(Path(args.out), summary)
    for bad in summary["unreadable"]:
        print_error(f"{bad['video']}: {bad['reason']}")
    print(json.dumps(summary, ensure_ascii=False) if args.json else tune.as_text(summary))
    if not args.json:
        print(f"report         {', '.join(map(str, files))}")
    return 1 if summary["unreadable"] else 0


def load_encoder(name: str):
    """Return the model whose features are taken of a checkpoint, ready for inference, and the processor."""
    architecture = architecture_of(name)
    if architecture == PRETRAINING:
        return load_checkpoint(name, FEATURES, use_mean_pooling=False)  # so that it has the encoder's final norm
    return load_checkpoint(name, architecture)


def convert(args: argparse.Namespace) -> int:
    """Convert a checkpoint and print the report."""
    from .convert import convert_checkpoint

    overrides = {name: getattr(args, name) for name in CONVERT_FIELDS if getattr(args, name) is not None}
    if args.image_size and len(args.image_size) == 1:
        overrides["image_size"] = args.image_size[0]
    if args.labels:
        overrides["id2label"] = read_labels(args.labels, args.source)
    print(convert_checkpoint(args.source, args.out, **overrides))
    return 0


def read_labels(path: str, source: str) -> list[str]:
    """Return the names in a file, one a line; a ValueError if they are not those of the classifier in `source`."""
    from .convert import read_source

    try:
        labels = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8; expected the name of a class a line") from None
    labels = [label.strip() for label in labels]
    while labels and not labels[-1]:
        labels.pop()
    for line, label in enumerate(labels, 1):
        if not label or label in labels[: line - 1]:
            raise ValueError(f"{path}:{line}: {'a class twice: ' + label if label else 'no name of a class'}")
    head = read_source(source).state.get("classifier.weight")
    if head is None or len(head) != len(labels):
        wanted = f"a classifier of {len(head)} classes" if head is not None else "no classifier"
        raise ValueError(f"{path}: names {len(labels)} classes, but {source} has {wanted}")
    return labels


def predict(args: argparse.Namespace) -> int:
    """Print the most probable labels of each video. A video that cannot be read is named, and the others go on."""
    _check_counts(args, "top_k")
    _check_arguments(args.videos, args.keep_ratio)
    name = args.model or newest_run(CLASSIFICATION)
    check_classifier(name)
    model, processor = load_checkpoint(name, CLASSIFICATION)
    failures = 0
    for video in tqdm(args.videos, desc="predict", unit="video", disable=len(args.videos) == 1):
        try:
            logits = classify(model, processor, video, args.keep_ratio, args.views)
        except (ValueError, OSError) as error:
            print_error(error)
            failures += 1
            continue
        labels = top_labels(logits, model.config, args.top_k)
        tqdm.write(_as_json(video, labels) if args.json else _as_text(video, labels), file=sys.stdout)
        sys.stdout.flush()
    return 1 if failures else 0


def classify(
    model, processor, video: str, keep_ratio: float | None = None, views: tuple[int, int] = (1, 1)
) -> torch.Tensor:
    """Return the logits (views, num_labels) float32 of a video: of its centre clip, or of `views`, segments x crops.

    The video is a file; for its centre clip it may be a URL.
    """
    import torch

    if views == (1, 1):
        pixel_values = processor(video, return_tensors="pt")["pixel_values"]  # (1, T, C, H, W)
    else:
        pixel_values = _read_views(model, processor, video, views)  # (V, T, C, H, W)
    with torch.inference_mode():
        return model(pixel_values.to(model.device), keep_ratio=keep_ratio).logits.float().cpu()


def _read_views(model, processor, video: str, views: tuple[int, int]) -> torch.Tensor:
    from datasets import Dataset

    from .transforms import normalize

    clips = evaluation_views(Dataset.from_dict({"video": [video]}), model, processor, views)[0]["pixel_values"]
    return normalize(clips, model.config.image_mean, model.config.image_std)


def top_labels(logits: torch.Tensor, config, k: int) -> list[tuple[str, float]]:
    """Return the k labels (at most all) of largest score, with it: a probability, or for regression the value.

    logits: (views, num_labels); the score is the mean over the views.
    """
    scores = _scores(logits, config).mean(dim=0).topk(min(k, config.num_labels))
    return [(config.id2label[i], s) for i, s in zip(scores.indices.tolist(), scores.values.tolist(), strict=True)]


def _scores(logits: torch.Tensor, config) -> torch.Tensor:
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return logits
    return logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(dim=-1)


def _as_text(video: str, labels: list[tuple[str, float]]) -> str:
    return "\n".join([video, *(f"  {score:6.4f}  {label}" for label, score in labels)])


def _as_json(video: str, labels: list[tuple[str, float]]) -> str:
    entries = [{"label": label, "score": score} for label, score in labels]
    return json.dumps({"video": video, "labels": entries}, ensure_ascii=False)


def visualize(args: argparse.Namespace) -> int:
    """Draw the tokens that a model keeps of a video, and the reconstruction where the checkpoint has a decoder."""
    known = PICTURE_SUFFIXES + ANIMATION_SUFFIXES
    if Path(args.out).suffix.lower() not in known:
        raise ValueError(f"{args.out}: not a picture; expected a name ending in {', '.join(known)}")
    _check_arguments([args.video], args.keep_ratio)
    name = args.model or newest_run(CLASSIFICATION, PRETRAINING)
    draw = _draw_reconstruction if architecture_of(name) == PRETRAINING else _draw_kept_tokens
    print(f"{args.out}: {draw(name, args.video, args.keep_ratio, args.out)}")
    return 0


def _is_animation(out: str) -> bool:
    return Path(out).suffix.lower() in ANIMATION_SUFFIXES


def _draw_kept_tokens(name: str, video: str, keep_ratio: float | None, out: str) -> str:
    """Draw the kept tokens, as a moving picture with their scores, and say how many they are."""
    import torch

    from .animate import kept_token_panels, write_animation
    from .visualize import draw_kept_tokens

    model, processor = load_checkpoint(name, FEATURES)
    pixel_values, frames = read_clip(processor, video)
    with torch.inference_mode():
        kept = model.embeddings(pixel_values.to(model.device), keep_ratio=keep_ratio, output_scores=_is_animation(out))
    clip, ids, slots = to_uint8(pixel_values[0], processor), kept.kept_ids[0], _first(kept.slots)
    if _is_animation(out):
        write_animation(kept_token_panels(clip, ids, kept.scores[0], model.config, slots), out, FRAMES_PER_SECOND)
    else:
        draw_kept_tokens(clip, ids, model.config, out, slots=slots, frame_numbers=frames)
    return f"{len(ids)} of {model.config.num_tokens} tokens kept"


def _draw_reconstruction(name: str, video: str, keep_ratio: float | None, out: str) -> str:
    """Draw visible tokens and predictions, and say how many they are and how far off."""
    import torch

    from .animate import reconstruction_panels, write_animation
    from .visualize import draw_reconstruction

    overrides = {} if keep_ratio is None else {"pretraining_keep_ratio": keep_ratio}
    model, processor = load_checkpoint(name, PRETRAINING, **overrides)
    pixel_values, frames = read_clip(processor, video)
    with torch.inference_mode():
        output = model(pixel_values.to(model.device))
    clip, slots = to_uint8(pixel_values[0], processor), _first(output.slots)
    rebuilt = clip, output.visible_ids[0], output.target_ids[0], output.logits[0], model.config
    if _is_animation(out):
        write_animation(reconstruction_panels(*rebuilt, slots), out, FRAMES_PER_SECOND)
    else:
        draw_reconstruction(*rebuilt, out, slots=slots, frame_numbers=frames)
    seen, predicted = output.visible_ids.shape[1], output.target_ids.shape[1]
    return f"{seen} of {model.config.num_tokens} tokens seen, {predicted} predicted, loss {output.loss:.4f}"


def _first(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[0]


def read_clip(processor, video: str) -> tuple[torch.Tensor, list[int]]:
    """Return pixel values (1, T, C, H, W) and the places of these frames in the video."""
    batch = processor(video, return_tensors="pt", return_metadata=True)
    return batch["pixel_values"], list(batch["video_metadata"][0].frames_indices)


def to_uint8(pixel_values: torch.Tensor, processor) -> torch.Tensor:
    """Undo the normalisation of frames (T, C, H, W): uint8, as they were scaled and cropped."""
    import torch

    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (processor.image_mean, processor.image_std))  # (C, 1, 1)
    return ((pixel_values.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def push(args: argparse.Namespace) -> int:
    """Publish a checkpoint and print where it is."""
    from . import hub

    print(hub.push(args.checkpoint, args.repo, private=args.private, revision=args.revision, message=args.message))
    return 0


# ---------------------------------------------------------------------------------------------------- what they share


def _source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `load_videos` takes beside the source."""
    return {name: getattr(args, name) for name in ("data_root", "split", "video_column", "label_column")}


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def _check_arguments(videos: list[str], keep_ratio: float | None) -> None:
    """Refuse what can be known to be wrong before a model is loaded."""
    from .configuration_everest import check_keep_ratio

    if keep_ratio is not None:
        check_keep_ratio(keep_ratio)
    for video in videos:
        if not video.startswith(("http://", "https://")) and not Path(video).is_file():
            raise FileNotFoundError(f"{video}: no such video file")


def evaluation_views(rows, model, processor, views: tuple[int, int], **options):
    """Return the `VideoViews` of rows as the model's training evaluated them; views: segments x crops."""
    from .data import VideoViews

    return VideoViews(
        rows,
        model.config.frame_size,
        num_frames=model.config.num_frames,
        num_input_frames=model.config.num_input_frames,
        frame_step=processor.frame_step,
        frame_sampling=processor.frame_sampling,
        num_segments=views[0],
        num_crops=views[1],
        **options,
    )


def newest_run(*architectures: str) -> str:
    """Return the folder of the newest finished run below ./runs with one of these architectures, and name it on stderr.

    Raises:
        FileNotFoundError: there is none.
    """
    finished = [path for path in RUNS.rglob("model/config.json") if _stored_architecture(path) in architectures]
    if not finished:
        raise FileNotFoundError(
            f"a model is needed: give --model PATH_OR_ID (there is no finished run of {' or '.join(architectures)} "
            f"below ./{RUNS}; `accelerate launch train_accelerate.py` makes one)"
        )
    folder = max(finished, key=lambda path: path.stat().st_mtime_ns).parent
    print(f"{PROGRAM}: model {folder}", file=sys.stderr)
    return str(folder)


def _stored_architecture(path: Path) -> str | None:
    try:
        return (json.loads(path.read_text(encoding="utf-8")).get("architectures") or [None])[0]
    except (OSError, ValueError, AttributeError):
        return None  # half a run, or another program's folder


def architecture_of(name: str) -> str:
    """Return the class that a checkpoint, a folder or a Hub id, was saved from.

    Raises:
        ValueError: there is none, or it is not one of EVEREST.
    """
    from transformers import PretrainedConfig

    _check_checkpoint_name(name)
    config = _loaded(name, PretrainedConfig.get_config_dict, name)[0]
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in (PRETRAINING, CLASSIFICATION, FEATURES):
        kind = architecture or config.get("model_type") or "unknown kind"
        raise ValueError(f"{name}: is a checkpoint of {kind}, not of EVEREST ({PROGRAM} convert takes VideoMAE's)")
    return architecture


def check_classifier(name: str) -> None:
    """Raise a ValueError unless a checkpoint is that of a classifier."""
    architecture = architecture_of(name)
    if architecture != CLASSIFICATION:
        raise ValueError(
            f"{name}: is a checkpoint of {architecture}, which knows no labels; fine-tune it first: "
            f"accelerate launch train_accelerate.py --task finetune --model {name} --train VIDEOS"
        )


def _check_checkpoint_name(name: str) -> None:
    """Refuse what is neither a checkpoint folder nor can be a Hub id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name}: is a file; expected a checkpoint folder or Hub id ({PROGRAM} convert makes one)")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name}: is no checkpoint; there is no config.json in this folder")
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{name}: no such checkpoint folder") from None


def load_checkpoint(name: str, architecture: str, **overrides):
    """Return a model of the class `architecture`, ready for inference on the GPU if there is one, and the processor."""
    import torch
    from transformers.utils import logging

    import everest_hf

    logging.disable_progress_bar()
    model = _loaded(name, getattr(everest_hf, architecture).from_pretrained, name, **overrides)
    processor = _loaded(name, everest_hf.EverestVideoProcessor.from_pretrained, name)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def _loaded(name: str, load, *args, **kwargs):
    try:
        return load(*args, **kwargs)
    except Exception as error:  # safetensors, torch and the Hub's client have errors of their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{name}: cannot be loaded: {reason}") from error


if __name__ == "__main__":
    sys.exit(main())
