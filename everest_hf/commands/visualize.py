"""everest-hf visualize: draw the tokens that a model keeps, and what it reconstructs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    PICTURE_SUFFIXES,
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

    from ..configuration_everest import EverestConfig
    from ..inference import WindowReader

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
    parser.add_argument(
        "--start", type=float, metavar="SECONDS", help="draw the clip that begins there [the centre clip]"
    )
    parser.add_argument(
        "--all", action="store_true", help="in a moving picture, draw one clip after another, up to the video's end"
    )
    add_model_options(
        parser, "share of the tokens to keep (for a pre-training checkpoint: seen and predicted), instead of its own"
    )
    add_decoding_options(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the tokens that a model keeps of a video, and the reconstruction where the checkpoint has a decoder."""
    from .. import inference

    _check(args)
    check_inputs([args.video], args.keep_ratio)
    decoding = decoding_options(args)
    name = inference.chosen_model(args.model, inference.CLASSIFICATION, inference.PRETRAINING)
    drawing = Reconstruction if inference.architecture_of(name) == inference.PRETRAINING else KeptTokens
    drawn = drawing(name, args.keep_ratio)
    windows = inference.WindowReader(drawn.processor, args.video, start=args.start, whole=args.all, **decoding)
    if _is_animation(args.out):
        _animate(drawn, windows, args.out)
    else:
        window = next(iter(windows))
        drawn.look(window.pixel_values)
        drawn.draw(args.out, frame_numbers=window.frames, seconds=window.seconds)
    number = f"{len(windows)} clips, of each " if args.all else ""
    print_text(f"{args.out}: {number}{drawn}")
    return 0


def _check(args: argparse.Namespace) -> None:
    known = PICTURE_SUFFIXES + ANIMATION_SUFFIXES
    if Path(args.out).suffix.lower() not in known:
        raise ValueError(f"{args.out}: not a picture; expected a name ending in {', '.join(known)}")
    if args.all and not _is_animation(args.out):
        raise ValueError(
            f"{args.out}: a picture shows one clip; with --all, end it in {', '.join(ANIMATION_SUFFIXES)}"
        )
    if args.start is not None and not 0 <= args.start < math.inf:
        raise ValueError(f"--start is {args.start:g}; it must be 0 seconds or more")


def _is_animation(out: str) -> bool:
    return Path(out).suffix.lower() in ANIMATION_SUFFIXES


def _animate(drawn: KeptTokens | Reconstruction, windows: WindowReader, out: str) -> None:
    """Write the frames of each window that no window before it has."""
    from tqdm.auto import tqdm

    from ..visualize import frame_titles, write_windows

    def pictures():
        for window in tqdm(windows, "visualize", unit="clip", disable=len(windows) == 1):
            drawn.look(window.pixel_values)
            new = slice(window.first_new, None)
            panels = {caption: frames[new] for caption, frames in drawn.panels().items()}
            yield panels, frame_titles(window.frames, window.seconds)[new]

    write_windows(pictures(), out)


class KeptTokens:
    """The tokens that a model keeps of the clip that it looked at last."""

    def __init__(self, name: str, keep_ratio: float | None):
        from .. import inference

        self.model, self.processor = inference.load_checkpoint(name, inference.FEATURES)
        self.keep_ratio = keep_ratio

    def look(self, pixel_values: torch.Tensor) -> None:
        """Select the tokens of a clip (1, T, C, H, W)."""
        import torch

        from .. import inference

        with torch.inference_mode():
            self.kept = self.model.embeddings(
                pixel_values.to(self.model.device), keep_ratio=self.keep_ratio, output_scores=True
            )
        self.clip = inference.to_uint8(pixel_values[0], self.processor)
        self.slots = _first(self.kept.slots)

    def panels(self) -> dict[str, torch.Tensor]:
        from ..visualize import kept_token_panels

        return kept_token_panels(self.clip, self.kept.kept_ids[0], self.kept.scores[0], self.model.config, self.slots)

    def draw(self, out: str, **titles: Any) -> None:
        from ..visualize import draw_kept_tokens

        draw_kept_tokens(self.clip, self.kept.kept_ids[0], self.model.config, out, slots=self.slots, **titles)

    def __str__(self) -> str:
        return f"{self.kept.kept_ids.shape[1]} of {self.model.config.num_tokens} tokens kept"


class Reconstruction:
    """What a pre-trained model sees and predicts of the clip that it looked at last; its mean loss over all clips."""

    def __init__(self, name: str, keep_ratio: float | None):
        from .. import inference

        overrides = {} if keep_ratio is None else {"pretraining_keep_ratio": keep_ratio}
        self.model, self.processor = inference.load_checkpoint(name, inference.PRETRAINING, **overrides)
        self.losses: list[float] = []

    def look(self, pixel_values: torch.Tensor) -> None:
        """Predict the masked tokens of a clip (1, T, C, H, W)."""
        import torch

        from .. import inference

        with torch.inference_mode():
            self.output = self.model(pixel_values.to(self.model.device))
        self.losses.append(float(self.output.loss))
        self.clip = inference.to_uint8(pixel_values[0], self.processor)
        self.slots = _first(self.output.slots)

    def _rebuilt(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, EverestConfig]:
        output = self.output
        return self.clip, output.visible_ids[0], output.target_ids[0], output.logits[0], self.model.config

    def panels(self) -> dict[str, torch.Tensor]:
        from ..visualize import reconstruction_panels

        return reconstruction_panels(*self._rebuilt(), self.slots)

    def draw(self, out: str, **titles: Any) -> None:
        from ..visualize import draw_reconstruction

        draw_reconstruction(*self._rebuilt(), out, slots=self.slots, **titles)

    def __str__(self) -> str:
        seen, predicted = self.output.visible_ids.shape[1], self.output.target_ids.shape[1]
        loss = sum(self.losses) / len(self.losses)
        return f"{seen} of {self.model.config.num_tokens} tokens seen, {predicted} predicted, loss {loss:.4f}"


def _first(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[0]
