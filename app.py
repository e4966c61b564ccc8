"""A page to try a classifier on: a video, its labels, kept tokens and timeline at any keep ratio. Also a Space.

    pip install -e ".[demo]"
    python app.py                      the newest finished run below ./runs
    python app.py --model PATH_OR_ID   a checkpoint or run folder, or a name on the Hub

As a Space: this file, a requirements.txt that names the package with its extra `demo`, the variable EVEREST_MODEL,
and a folder `examples` of videos to choose from; without it, those of the quickstart are offered.
"""

import argparse
import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import torch

from everest_hf.cost import clip_cost
from everest_hf.data import VIDEO_SUFFIXES
from everest_hf.data.synthetic import DIRECTIONS, MotionVideos, write_motion_videos
from everest_hf.inference import (
    CLASSIFICATION,
    Window,
    chosen_model,
    load_checkpoint,
    read_window,
    timeline,
    to_uint8,
    top_labels,
)
from everest_hf.video import open_video, probe
from everest_hf.video.encoding import Encoding, even_frames, transcode
from everest_hf.video.isolation import Overdue, call_within
from everest_hf.visualize import draw_timeline, frame_titles, kept_token_panels, write_animation

LARGEST_FILE = 200 * 2**20  # bytes
# Seconds that a request may take, and how many may wait for their turn.
REQUEST_SECONDS, LONGEST_QUEUE = 60.0, 20
# So often, in seconds, the page looks for its old files, and deletes those of this age.
CACHE_SECONDS = (600, 3600)
# Browsers play these suffixes and codecs. The page shows other videos as H.264 of this size.
PLAYED = {(".mp4", "h264"), (".m4v", "h264"), *((".webm", codec) for codec in ("vp8", "vp9", "av1"))}
SHOWN = Encoding(short_side=360)
SHOWN_LABELS = 5
# Windows of a timeline at most: of long videos, the distance between them grows.
MOST_WINDOWS = 120
# Rounds of a measurement: the first do not count; then come at least and at most so many, fewer once this time is up.
WARM_UP, LEAST_ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 1, 3, 10, 2.0


class Demo:
    """A model with its processor, and what the page asks of them."""

    def __init__(self, name: str):
        self.name = name
        self.model, self.processor = load_checkpoint(name, CLASSIFICATION)

    def run(self, video: str | None, keep_ratio: float) -> Iterator[tuple]:
        """Yield once: labels and scores at the keep ratio, those of the dense model, the animation, and the figures.

        Without a result, a message takes the place of the figures, and the others are None. This is a generator, so
        that the page copies the animation before its folder is removed.
        """
        yield from _answer_with_files(video, self._classify, keep_ratio)

    def _classify(self, video: str, keep_ratio: float, folder: Path) -> tuple:
        window = read_window(self.processor, video)
        sparse, dense = self._measure(window.pixel_values, (keep_ratio, 1.0))
        animation = self._animation(window, sparse, folder)
        figures = f"{_looked_at(window)}\n\n{_table(sparse, dense)}"
        return self._labels(sparse), self._labels(dense), animation, figures

    def over_time(self, video: str | None, keep_ratio: float) -> Iterator[tuple]:
        """Yield once: a picture of the classes over the video's time, its segments as rows, no frame, and a message."""
        yield from _answer_with_files(video, self._over_time, keep_ratio)

    def _over_time(self, video: str, keep_ratio: float, folder: Path) -> tuple:
        stride = max(self.model.config.tubelet_size, probe(video).num_frames // MOST_WINDOWS)
        found = timeline(self.model, self.processor, video, keep_ratio=keep_ratio, stride=stride)
        path = folder / "timeline.png"
        draw_timeline(found.labels, found.edges, found.scores, found.segments, path)
        rows = [[round(s.start, 2), round(s.end, 2), s.label, round(s.score, 2)] for s in found.segments]
        message = "Choose a segment to see its middle frame." if rows else "No class is seen for sure."
        return str(path), rows, None, message

    @torch.inference_mode()
    def _measure(self, pixel_values: torch.Tensor, keep_ratios: tuple[float, ...]) -> list[dict]:
        """Classify at each keep ratio in turn, round by round, and return the logits, costs and median times."""
        pixel_values = pixel_values.to(self.model.device)
        for _ in range(WARM_UP):
            outputs = [self._timed(pixel_values, ratio)[0] for ratio in keep_ratios]
        rounds: list[list[float]] = []
        while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and sum(map(sum, rounds)) < ENOUGH_SECONDS):
            rounds.append([self._timed(pixel_values, ratio)[1] for ratio in keep_ratios])
        medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
        return [
            {
                "logits": output.logits.float().cpu(),
                "keep_ratio": ratio,
                "tokens": output.kept_ids.shape[1],
                "gflops": clip_cost(self.model.config, "inference", keep_ratio=ratio).total / 1e9,
                "milliseconds": 1000 * median,
                "rounds": len(rounds),
            }
            for ratio, output, median in zip(keep_ratios, outputs, medians, strict=True)
        ]

    def _timed(self, pixel_values: torch.Tensor, keep_ratio: float):
        """Return the output and the seconds that it took; copying the logits waits for the device."""
        start = time.perf_counter()
        output = self.model(pixel_values, keep_ratio=keep_ratio)
        output.logits.cpu()
        return output, time.perf_counter() - start

    def _labels(self, measured: dict) -> dict[str, float]:
        return dict(top_labels(measured["logits"], self.model.config, SHOWN_LABELS))

    @torch.inference_mode()
    def _animation(self, window: Window, sparse: dict, folder: Path) -> str:
        """Write the kept tokens as a video into a folder and return its path."""
        embeddings = self.model.everest.embeddings
        pixel_values = window.pixel_values.to(self.model.device)
        embedded = embeddings(pixel_values, keep_ratio=sparse["keep_ratio"], output_scores=True)
        slots = None if embedded.slots is None else embedded.slots[0]
        panels = kept_token_panels(
            to_uint8(window.pixel_values[0], self.processor),
            embedded.kept_ids[0],
            embedded.scores[0],
            self.model.config,
            slots,
        )
        path = folder / "kept-tokens.mp4"
        write_animation(panels, path, titles=frame_titles(window.frames, window.seconds))
        return str(path)


def frame_of(video: str, event: gr.SelectData) -> np.ndarray:
    """Return the frame (H, W, C) in the middle of the segment whose row was chosen."""
    start, end, *_ = event.row_value
    opened = open_video(video)
    middle = min(round((start + end) / 2 * opened.fps), opened.num_frames - 1)
    return opened.read([middle])[0].numpy()


def show(video: str | None) -> Iterator[tuple[str | None, str]]:
    """Yield once the path of a copy of `video` that browsers play, and a message, which is empty unless it failed."""
    with tempfile.TemporaryDirectory(prefix="everest-", ignore_cleanup_errors=True) as folder:
        yield (None, "") if video is None else _answer(video, _playable, video, Path(folder))


def _playable(video: str, folder: Path) -> str:
    """Return the path of a video, or of a copy in the folder if browsers do not play the video itself."""
    if (Path(video).suffix.lower(), probe(video).codec) in PLAYED:
        return video
    path, start = folder / "shown.mp4", time.monotonic()

    def check_time() -> None:
        if time.monotonic() - start > REQUEST_SECONDS:
            raise Overdue  # nobody waits any more

    transcode(even_frames(video, video), path, {}, SHOWN, check_time)
    return str(path)


def _answer(video: str, function: Callable, *args) -> tuple:
    """Return function(*args) and "", or None and a message if the video is bad or takes too long."""
    try:
        return call_within(REQUEST_SECONDS, function, *args), ""
    except Overdue:
        return None, f"This takes longer than {REQUEST_SECONDS:g} seconds; choose a shorter or smaller video."
    except (ValueError, OSError) as error:
        reason = str(error).replace(f"{Path(video).parent}{os.sep}", "")
        return None, f"This is not a video that can be read. {reason}"


def _answer_with_files(video: str | None, function: Callable, keep_ratio: float) -> Iterator[tuple]:
    """Yield once the four results of function(video, keep_ratio, folder), or three times None and a message."""
    with tempfile.TemporaryDirectory(prefix="everest-", ignore_cleanup_errors=True) as folder:
        if video is None:
            yield None, None, None, "Choose a video first."
            return
        result, message = _answer(video, function, video, keep_ratio, Path(folder))
        yield result or (None, None, None, message)


def _looked_at(window: Window) -> str:
    """Say which part of the video the model saw."""
    number = len(window.frames)
    if window.seconds is None:
        return f"The model looked at {number} frames, from frame {window.frames[0]} to {window.frames[-1]}."
    return f"The model looked at {number} frames, from {window.seconds[0]:.2f} s to {window.seconds[-1]:.2f} s."


def _table(sparse: dict, dense: dict) -> str:
    """Return both measurements as a Markdown table, and below it what they say about speed."""
    # Three columns, so that no word is broken on a telephone.
    lines = [f"| | keep ratio {sparse['keep_ratio']:g} | dense |", "|---|---|---|"]
    for name, shown in {"tokens": "d", "GFLOPs": ".3g", "milliseconds": ".3g"}.items():
        lines.append(f"| {name} | {sparse[name.lower()]:{shown}} | {dense[name.lower()]:{shown}} |")
    speed = dense["milliseconds"] / sparse["milliseconds"]
    verdict = f"**{speed:.2f} × as fast as dense**, by the medians of {sparse['rounds']} runs each on this clip."
    if speed < 1 and sparse["tokens"] < dense["tokens"]:
        verdict += " Here it takes longer to select the tokens than dropping the others saves."
    return "\n".join([*lines, "", verdict])


def example_videos(folder: Path, place: Path) -> dict[str, str]:
    """Return the paths of the videos to choose from, by name: those in `folder`.

    Where there is no such folder, videos like the quickstart's are written into `place`.
    """
    if folder.is_dir():
        return {path.name: str(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEO_SUFFIXES}
    spec = MotionVideos(num_train=1, num_val=len(DIRECTIONS))
    made = write_motion_videos(place / "motion", spec)
    return {path.parent.name: str(path) for path in sorted(made.glob("val/*/*.mp4"))}


def build_page(demo: Demo, examples: dict[str, str]) -> gr.Blocks:
    """Return the page; examples: paths of videos by name."""
    ratio = demo.model.config.keep_ratio
    with gr.Blocks(title="EVEREST", delete_cache=CACHE_SECONDS) as page:
        name = re.sub(r"([^\w\s/.])", r"\\\1", demo.name)  # plain text wraps after a slash, code does not
        gr.Markdown(f"# EVEREST\nA video classifier that works on the tokens that change over time. Model: {name}")
        with gr.Row():
            with gr.Column():
                video = gr.File(label="Video", file_types=list(VIDEO_SUFFIXES), height=120)
                shown = gr.Video(show_label=False, interactive=False)
                keep_ratio = gr.Slider(0.05, 1.0, value=ratio, step=0.05, label="Keep ratio")
                button = gr.Button("Classify", variant="primary")
                over_time = gr.Button("Timeline")
                if examples:
                    gr.Examples([[path] for path in examples.values()], [video], example_labels=list(examples))
            with gr.Column():
                with gr.Row():
                    sparse = gr.Label(label="With the kept tokens", num_top_classes=SHOWN_LABELS)
                    dense = gr.Label(label="Dense", num_top_classes=SHOWN_LABELS)
                figures = gr.Markdown()
        gr.Markdown("### Kept tokens and motion scores")
        kept = gr.Video(show_label=False, autoplay=True, loop=True)
        with gr.Column(visible=False) as later:
            gr.Markdown("### Classes over time")
            drawn = gr.Image(show_label=False, interactive=False)
            message = gr.Markdown()
            with gr.Row():
                columns = ["from (s)", "to (s)", "class", "score"]
                segments = gr.Dataframe(headers=columns, interactive=False, type="array", show_label=False)
                frame = gr.Image(show_label=False, interactive=False)
        over_time.click(lambda: gr.Column(visible=True), None, later).then(
            demo.over_time, [video, keep_ratio], [drawn, segments, frame, message]
        )
        segments.select(frame_of, video, frame)
        video.change(show, video, [shown, figures])
        inputs, outputs = [video, keep_ratio], [sparse, dense, kept, figures]
        button.click(demo.run, inputs, outputs)
        # While it is dragged, only the last value waits for its turn.
        keep_ratio.input(demo.run, inputs, outputs, trigger_mode="always_last", show_progress="hidden")
    return page.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Try a video classifier in the browser.")
    parser.add_argument("--model", default=os.environ.get("EVEREST_MODEL"), help="checkpoint or run folder, or Hub id")
    parser.add_argument("--examples", type=Path, help="folder of videos to choose from [examples, beside this file]")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: temporary files are removed
    demo = Demo(chosen_model(args.model, CLASSIFICATION))
    with tempfile.TemporaryDirectory(prefix="everest-") as place:
        examples = example_videos(args.examples or Path(__file__).with_name("examples"), Path(place))
        build_page(demo, examples).launch(server_port=args.port, max_file_size=LARGEST_FILE)


if __name__ == "__main__":
    main()
