"""everest-hf export: write a model as a file that runs without Transformers."""

import argparse
from pathlib import Path

from .options import PROGRAM, add_command, print_text


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "export",
        run,
        "Write a classifier or an encoder as a file for ONNX Runtime or torch alone, checked against the model.",
        f"{PROGRAM} export runs/quickstart/finetune exported --format onnx --dynamic-batch",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint or run folder, or Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")
    parser.add_argument(
        "--format", choices=("onnx", "pt2"), default="onnx", help="ONNX, or a program of torch.export [onnx]"
    )
    parser.add_argument("--dynamic-batch", action="store_true", help="take any number of clips, not one at a time")
    parser.add_argument(
        "--keep-ratio", type=float, metavar="R", help="share of the tokens to keep, instead of the model's own"
    )


def run(args: argparse.Namespace) -> int:
    """Export the model, and say how large the file is and how far from the model."""
    from ..inference.export import check_export, export_model
    from ..inference.loading import model_folder

    out = Path(args.out)
    check_export(out, args.format, args.keep_ratio)
    name = str(model_folder(args.model))
    done = export_model(name, out, args.format, dynamic_batch=args.dynamic_batch, keep_ratio=args.keep_ratio)
    size = f"{done['bytes'] / 2**20:.1f} MiB"
    print_text(f"{out / 'model'}.{args.format}: {size}, at most {done['difference']:.1g} from the model")
    return 0
