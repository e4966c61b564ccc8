"""Clips a second that are classified from video files, beside Transformers' VideoMAE.

    python benchmarks/predict.py

A folder of videos is written, in which things move, and classified in three ways in turn, all from the files:

    everest    as `everest-hf predict` does: batches of clips, decoded by processes
    pipeline   pipeline("video-classification") of VideoMAE, a video after the other
    loop       VideoMAE by hand: a video is read with PyAV, processed, classified, then the next

The models are of one size, with random weights. EVEREST keeps --keep-ratio of the tokens, VideoMAE works on all. Both
take 16 frames of a span of 64, EVEREST from the middle of a video, VideoMAE from its start, as its pipeline does.

Prints a Markdown table and writes every repetition to a JSON file. The defaults take about half an hour on two idle cores.
"""

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import measure
import numpy as np
import torch
from steps import SIZES, Case, build_model
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map
from transformers import VideoMAEImageProcessor, pipeline
from transformers.utils import logging as transformers_logging

from everest_hf import EverestVideoProcessor
from everest_hf.data.synthetic import MotionVideos, render
from everest_hf.inference import find_videos, predicting
from everest_hf.video.encoding import write_mp4

FRAME_STEP = 4
WAYS = {"everest": "EVEREST, predict", "pipeline": "VideoMAE, pipeline", "loop": "VideoMAE, loop"}
# Frames and size of a video: as long as a short clip of the usual data sets, and as large.
VIDEOS = MotionVideos(num_frames=96, height=240, width=320, fps=25)


def write_videos(folder: Path, count: int) -> list[str]:
    """Write `count` videos into a folder and return their paths."""

    def write(index: int) -> str:
        path = folder / f"{index:04d}.mp4"
        options = {"crf": str(VIDEOS.quality), "preset": "veryfast", "threads": "1"}
        write_mp4(render(VIDEOS, "val", index), path, Fraction(VIDEOS.fps), **options)
        return str(path)

    return thread_map(write, range(count), max_workers=2, desc="writing videos", unit="video", leave=False)


# ------------------------------------------------------------------------------------------------------------- ways


def everest_way(args: argparse.Namespace, folder: Path) -> Callable[[], None]:
    """Return what classifies the folder as `everest-hf predict` does."""
    model = build_model(case_of(args, "everest"))
    processor = EverestVideoProcessor.from_config(model.config, frame_step=FRAME_STEP)

    def run() -> None:
        videos = find_videos(str(folder))
        options = {"batch_size": args.batch, "num_workers": args.workers}
        with predicting(model, processor, videos, **options) as answers:
            bad = [answer for answer in answers if answer.error]
        if bad:
            raise SystemExit(f"{bad[0].video}: {bad[0].error}")

    return run


def pipeline_way(args: argparse.Namespace, paths: list[str]) -> Callable[[], None]:
    """Return what gives VideoMAE's pipeline a video after the other.

    Its video processor needs torchcodec; with its image processor it reads the frames with PyAV.
    """
    model = build_model(case_of(args, "videomae"))
    classify = pipeline(
        "video-classification", model=model, image_processor=image_processor_of(model), device=args.device
    )

    def run() -> None:
        for path in paths:
            classify(path, frame_sampling_rate=FRAME_STEP)

    return run


def loop_way(args: argparse.Namespace, paths: list[str]) -> Callable[[], None]:
    """Return what reads, processes and classifies a video after the other."""
    model = build_model(case_of(args, "videomae"))
    processor = image_processor_of(model)
    wanted = range(0, model.config.num_frames * FRAME_STEP, FRAME_STEP)

    @torch.inference_mode()
    def run() -> None:
        for path in paths:
            with av.open(path) as container:
                frames = [
                    frame.to_ndarray(format="rgb24")
                    for i, frame in zip(range(wanted.stop), container.decode(video=0), strict=False)
                    if i in wanted
                ]
            pixel_values = processor(list(np.stack(frames)), return_tensors="pt")["pixel_values"]
            model(pixel_values.to(args.device)).logits.softmax(-1).topk(5).indices.tolist()

    return run


def image_processor_of(model) -> VideoMAEImageProcessor:
    """Return VideoMAE's processor for the size of a model."""
    side = model.config.image_size
    return VideoMAEImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def case_of(args: argparse.Namespace, model: str) -> Case:
    """Return the case whose model is built."""
    return Case(model, "inference", args.size, "fp32", args.batch, args.keep_ratio, str(args.device), "sdpa")


# ------------------------------------------------------------------------------------------------------ measurement


def run(args: argparse.Namespace) -> list[dict]:
    """Measure all ways in turn on the same files and show the progress."""
    with tempfile.TemporaryDirectory(prefix="everest-predict-") as place:
        folder = Path(place)
        paths = write_videos(folder, args.videos)
        ways = {
            "everest": everest_way(args, folder),
            "pipeline": pipeline_way(args, paths),
            "loop": loop_way(args, paths),
        }
        with tqdm(desc="measuring", total=len(ways) * (args.repeats + 1), unit="round") as bar:
            # By the clock also on a GPU: reading is part of the work.
            seconds = measure.interleave(ways, args.repeats, torch.device("cpu"), on_call=lambda name: bar.update())
    ratios = partial(_ratios, seconds)
    return [
        {
            "way": name,
            **measure.summary(times),
            "clips_per_second": args.videos / measure.summary(times)["seconds"],
            "speedup": statistics.median(ratios(name)),
            "speedup_range": [min(ratios(name)), max(ratios(name))],
        }
        for name, times in seconds.items()
    ]


def _ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """Return by how much a way is faster than VideoMAE's pipeline, of each round on its own."""
    return [slow / fast for slow, fast in zip(seconds["pipeline"], seconds[name], strict=True)]


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table."""
    rows = [
        [
            WAYS[result["way"]],
            f"{result['clips_per_second']:.2f}",
            "{:.2f} ({:.2f} to {:.2f}) x".format(result["speedup"], *result["speedup_range"]),
        ]
        for result in results
    ]
    return measure.markdown_table(["way", "clips/s", "against the pipeline"], rows)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="of both models")
    parser.add_argument("--videos", type=measure.positive_int, default=200, help="in the folder, of a clip each")
    parser.add_argument("--keep-ratio", type=measure.share, default=0.6, help="of EVEREST")
    parser.add_argument("--batch", type=measure.positive_int, default=8, help="clips at a time, of EVEREST")
    parser.add_argument("--workers", type=measure.positive_int, help="processes that decode, of EVEREST [one a core]")
    parser.add_argument("--repeats", type=measure.positive_int, default=3, help="timed rounds, after one that is not")
    parser.add_argument("--device", type=measure.device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "predict.json")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    measure.run_and_report(args, torch.device(args.device), run, table)


if __name__ == "__main__":
    main()
