"""A page to try a classifier on: drop a video, drag the keep ratio, see labels and kept tokens. Also a Space.

    pip install -e ".[demo]"
    python app.py                      the newest finished run below ./runs
    python app.py --model PATH_OR_ID   a checkpoint or run folder, or a name on the Hub

As a Space: this file, a requirements.txt that names the package with its extra `demo`, the variable EVEREST_MODEL,
and a folder `examples` of videos to choose from; without it, those of the quickstart are offered.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import gradio as gr
import torch

from everest_hf.cost import clip_cost
from everest_hf.data import VIDEO_SUFFIXES
from everest_hf.data.synthetic import DIRECTIONS, MotionVideos, write_motion_videos
from everest_hf.inference import CLASSIFICATION, chosen_model, load_checkpoint, read_view, to_uint8, top_labels
from everest_hf.visualize import kept_token_panels, write_animation

LARGEST_FILE = 200 * 2**20  # bytes
SHOWN_LABELS = 5
# Rounds of a measurement: those that do not count, and how many do, by how long they take.
WARM_UP, LEAST_ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 1, 1, 10, 2.0


class Demo:
    """A model with its processor, and what the page asks of them."""

    def __init__(self, name: str):
        self.name = name
        self.model, self.processor = load_checkpoint(name, CLASSIFICATION)

    def run(self, video: str | None, keep_ratio: float):
        """Return labels and scores at the keep ratio, the same of the dense model, the animation, and the figures."""
        if video is None:
            raise gr.Error("Choose a video first.", print_exception=False)
        pixel_values = self._read(video)
        sparse, dense = self._measure(pixel_values, (keep_ratio, 1.0))
        return self._labels(sparse), self._labels(dense), self._animation(pixel_values, sparse), _table(sparse, dense)

    def _read(self, video: str) -> torch.Tensor:
        """Return pixel values (1, T, C, H, W); what is wrong with the file is a message on the page."""
        if os.path.getsize(video) > LARGEST_FILE:
            raise gr.Error(f"This file is larger than {LARGEST_FILE >> 20} MiB.", print_exception=False)
        try:
            return read_view(self.processor, video)[0]
        except (ValueError, OSError) as error:
            reason = str(error).replace(f"{Path(video).parent}{os.sep}", "")
            raise gr.Error(f"This is not a video that can be read. {reason}", print_exception=False) from error

    @torch.inference_mode()
    def _measure(self, pixel_values: torch.Tensor, keep_ratios: tuple[float, ...]) -> list[dict]:
        """Classify at each keep ratio in turn, again and again, and say what it took: of the time, the median."""
        pixel_values = pixel_values.to(self.model.device)
        seconds: list[list[float]] = []
        while len(seconds) < WARM_UP + LEAST_ROUNDS or (
            len(seconds) < MOST_ROUNDS and sum(map(sum, seconds)) < ENOUGH_SECONDS
        ):
            outputs, times = zip(*(self._timed(pixel_values, ratio) for ratio in keep_ratios), strict=True)
            seconds.append(list(times))
        medians = [statistics.median(times) for times in zip(*seconds[WARM_UP:], strict=True)]
        return [
            {
                "logits": output.logits.float().cpu(),
                "keep_ratio": ratio,
                "tokens": output.kept_ids.shape[1],
                "gflops": clip_cost(self.model.config, "inference", keep_ratio=ratio).total / 1e9,
                "milliseconds": 1000 * median,
            }
            for ratio, output, median in zip(keep_ratios, outputs, medians, strict=True)
        ]

    def _timed(self, pixel_values: torch.Tensor, keep_ratio: float):
        """Return the output and the seconds that it took; a transfer waits for the device."""
        start = time.perf_counter()
        output = self.model(pixel_values, keep_ratio=keep_ratio)
        output.logits.cpu()
        return output, time.perf_counter() - start

    def _labels(self, measured: dict) -> dict[str, float]:
        return dict(top_labels(measured["logits"], self.model.config, SHOWN_LABELS))

    @torch.inference_mode()
    def _animation(self, pixel_values: torch.Tensor, sparse: dict) -> str:
        """Write the kept tokens as a video and return its path."""
        embeddings = self.model.everest.embeddings
        embedded = embeddings(pixel_values.to(self.model.device), keep_ratio=sparse["keep_ratio"], output_scores=True)
        slots = None if embedded.slots is None else embedded.slots[0]
        panels = kept_token_panels(
            to_uint8(pixel_values[0], self.processor),
            embedded.kept_ids[0],
            embedded.scores[0],
            self.model.config,
            slots,
        )
        path = Path(tempfile.mkdtemp(prefix="everest-")) / "kept-tokens.mp4"
        write_animation(panels, path)
        return str(path)


def _table(sparse: dict, dense: dict) -> str:
    """Return both measurements as a Markdown table."""
    lines = ["| | tokens | GFLOPs | milliseconds |", "|---|---|---|---|"]
    for name, row in ((f"keep ratio {sparse['keep_ratio']:g}", sparse), ("dense", dense)):
        lines.append(f"| {name} | {row['tokens']} | {row['gflops']:.3g} | {row['milliseconds']:.0f} |")
    speed = dense["milliseconds"] / sparse["milliseconds"]
    return "\n".join([*lines, "", f"**{speed:.1f} × as fast as dense**, measured on this clip."])


def example_videos(folder: Path) -> dict[str, str]:
    """Return the videos to choose from, by name: those of a folder; where it is not there, the quickstart's kind."""
    if folder.is_dir():
        return {path.name: str(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEO_SUFFIXES}
    spec = MotionVideos(num_train=1, num_val=len(DIRECTIONS))
    made = write_motion_videos(Path(tempfile.mkdtemp(prefix="everest-")) / "motion", spec)
    return {path.parent.name: str(path) for path in sorted(made.glob("val/*/*.mp4"))}


def build_page(demo: Demo, examples: dict[str, str]) -> gr.Blocks:
    """Return the page; examples: paths of videos by name."""
    ratio = demo.model.config.keep_ratio
    with gr.Blocks(title="EVEREST") as page:
        gr.Markdown(
            f"# EVEREST\nA video classifier that works on the tokens that change over time. Model: `{demo.name}`."
        )
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Video", sources=["upload"])
                keep_ratio = gr.Slider(0.05, 1.0, value=ratio, step=0.05, label="Keep ratio")
                button = gr.Button("Classify", variant="primary")
                if examples:
                    gr.Examples([[path] for path in examples.values()], [video], example_labels=list(examples))
            with gr.Column():
                with gr.Row():
                    sparse = gr.Label(label="With the kept tokens", num_top_classes=SHOWN_LABELS)
                    dense = gr.Label(label="Dense", num_top_classes=SHOWN_LABELS)
                figures = gr.Markdown()
        gr.Markdown("### Kept tokens and motion scores")
        kept = gr.Video(show_label=False, autoplay=True, loop=True)
        inputs, outputs = [video, keep_ratio], [sparse, dense, kept, figures]
        button.click(demo.run, inputs, outputs)
        # While it is dragged, only the last value waits for its turn.
        keep_ratio.input(demo.run, inputs, outputs, trigger_mode="always_last", show_progress="hidden")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Try a video classifier in the browser.")
    parser.add_argument("--model", default=os.environ.get("EVEREST_MODEL"), help="checkpoint or run folder, or Hub id")
    parser.add_argument("--examples", type=Path, help="folder of videos to choose from [examples, beside this file]")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    demo = Demo(chosen_model(args.model, CLASSIFICATION))
    examples = example_videos(args.examples or Path(__file__).with_name("examples"))
    build_page(demo, examples).launch(server_port=args.port)


if __name__ == "__main__":
    main()
