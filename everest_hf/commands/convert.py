"""everest-hf convert: VideoMAE or official EVEREST weights to a checkpoint."""

import argparse
from pathlib import Path

from .options import PROGRAM, add_command, print_text

CONVERT_FIELDS = (
    "keep_ratio",
    "num_frames",
    "image_size",
    "token_selection",
    "num_attention_heads",
    "decoder_num_attention_heads",
)


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "convert",
        run,
        "Convert VideoMAE or official EVEREST weights into a checkpoint for Transformers.",
        f"{PROGRAM} convert MCG-NJU/videomae-base-finetuned-kinetics everest-base --keep-ratio 0.6",
    )
    parser.add_argument("source", metavar="SOURCE", help=".pth file, folder of a Transformers VideoMAE, or Hub id")
    parser.add_argument(
        "--to", choices=("everest", "videomae"), default="everest", help="videomae: SOURCE is a checkpoint of EVEREST"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")
    parser.add_argument("--keep-ratio", type=float, metavar="R", help="share of the tokens kept in inference")
    parser.add_argument("--num-frames", type=int, metavar="T", help="frames of a clip, if the source does not tell")
    parser.add_argument("--image-size", type=int, nargs="+", metavar=("H", "W"), help="height and width in pixels")
    parser.add_argument("--token-selection", metavar="NAME", help="motion, random or tube")
    parser.add_argument("--num-attention-heads", type=int, metavar="N", help="heads of the encoder")
    parser.add_argument("--decoder-num-attention-heads", type=int, metavar="N", help="heads of the decoder")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line, in the order of the head")


def run(args: argparse.Namespace) -> int:
    """Convert a checkpoint and print the report."""
    from ..convert import convert_checkpoint, convert_to_videomae
    from ..inference.loading import model_folder

    source = str(model_folder(args.source))
    if args.to == "videomae":
        given = [name for name in (*CONVERT_FIELDS, "labels") if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for a conversion to everest, not --to videomae")
        print_text(str(convert_to_videomae(source, args.out)))
        return 0
    overrides = {name: getattr(args, name) for name in CONVERT_FIELDS if getattr(args, name) is not None}
    if args.image_size and len(args.image_size) == 1:
        overrides["image_size"] = args.image_size[0]
    if args.labels:
        overrides["id2label"] = read_labels(args.labels, source)
    print_text(str(convert_checkpoint(source, args.out, **overrides)))
    return 0


def read_labels(path: str, source: str) -> list[str]:
    """Return the names in a file, one a line; raise a ValueError unless the classifier in `source` has as many classes."""
    from ..convert import read_source

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
