"""everest-hf visualize: draw the tokens that a model keeps, and what it reconstructs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    PROGRAM,
    add_command,
    add_decoding_options,
    add_model_options,
    check_inputs,
    decoding_options,
    print_text,
)

if TYPE_CHECKING:
    import torch

PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
ANIMATION_SUFFIXES = (".mp4", ".gif")


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "visualize",
        run,
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
    add_model_options(
        parser, "share of the tokens to keep (for a pre-training checkpoint: seen and predicted), instead of its own"
    )
    add_decoding_options(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the tokens that a model keeps of a video, and the reconstruction where the checkpoint has a decoder."""
    from .. import inference

    known = PICTURE_SUFFIXES + ANIMATION_SUFFIXES
    if Path(args.out).suffix.lower() not in known:
        raise ValueError(f"{args.out}: not a picture; expected a name ending in {', '.join(known)}")
    check_inputs([args.video], args.keep_ratio)
    decoding = decoding_options(args)
    name = inference.chosen_model(args.model, inference.CLASSIFICATION, inference.PRETRAINING)
    draw = _draw_reconstruction if inference.architecture_of(name) == inference.PRETRAINING else _draw_kept_tokens
    print_text(f"{args.out}: {draw(name, args.video, args.keep_ratio, args.out, decoding)}")
    return 0


def _is_animation(out: str) -> bool:
    return Path(out).suffix.lower() in ANIMATION_SUFFIXES


def _draw_kept_tokens(name: str, video: str, keep_ratio: float | None, out: str, decoding: dict[str, Any]) -> str:
    """Draw the kept tokens, as a moving picture with their scores, and say how many they are."""
    import torch

    from .. import inference
    from ..visualize import draw_kept_tokens, kept_token_panels, write_animation

    model, processor = inference.load_checkpoint(name, inference.FEATURES)
    pixel_values, frames = inference.read_view(processor, video, **decoding)
    with torch.inference_mode():
        kept = model.embeddings(pixel_values.to(model.device), keep_ratio=keep_ratio, output_scores=_is_animation(out))
    clip, ids, slots = inference.to_uint8(pixel_values[0], processor), kept.kept_ids[0], _first(kept.slots)
    if _is_animation(out):
        write_animation(kept_token_panels(clip, ids, kept.scores[0], model.config, slots), out)
    else:
        draw_kept_tokens(clip, ids, model.config, out, slots=slots, frame_numbers=frames)
    return f"{len(ids)} of {model.config.num_tokens} tokens kept"


def _draw_reconstruction(name: str, video: str, keep_ratio: float | None, out: str, decoding: dict[str, Any]) -> str:
    """Draw visible tokens and predictions, and say how many they are and how far off."""
    import torch

    from .. import inference
    from ..visualize import draw_reconstruction, reconstruction_panels, write_animation

    overrides = {} if keep_ratio is None else {"pretraining_keep_ratio": keep_ratio}
    model, processor = inference.load_checkpoint(name, inference.PRETRAINING, **overrides)
    pixel_values, frames = inference.read_view(processor, video, **decoding)
    with torch.inference_mode():
        output = model(pixel_values.to(model.device))
    clip, slots = inference.to_uint8(pixel_values[0], processor), _first(output.slots)
    rebuilt = clip, output.visible_ids[0], output.target_ids[0], output.logits[0], model.config
    if _is_animation(out):
        write_animation(reconstruction_panels(*rebuilt, slots), out)
    else:
        draw_reconstruction(*rebuilt, out, slots=slots, frame_numbers=frames)
    seen, predicted = output.visible_ids.shape[1], output.target_ids.shape[1]
    return f"{seen} of {model.config.num_tokens} tokens seen, {predicted} predicted, loss {output.loss:.4f}"


def _first(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[0]
