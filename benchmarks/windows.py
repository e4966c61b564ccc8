"""Overlapping windows of a long video a second, beside scripts that cut windows by hand.

    python benchmarks/windows.py

A video is written in which things move, and a classifier is run over its windows in these ways, in turn:

    everest          everest_hf.windows: each frame is decoded, scaled and embedded once
    everest-batches  the same model in a script that decodes and scales each frame once and encodes batches of clips
    everest-alone    the same model in a script that reads and classifies one window after the other
    videomae-batches, videomae-alone   the same two scripts with Transformers' VideoMAE, which keeps all tokens

All give the same number of windows of the same frames. Models are of one size, with random weights. Then the memory of
everest_hf.windows is measured on a video of --minutes, in a process of its own.

Prints a Markdown table and writes every repetition to a JSON file. The defaults take about ten minutes on two cores.
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import measure
import torch
from steps import SIZES, Case, build_model
from tqdm import tqdm

from everest_hf import EverestConfig, EverestVideoProcessor, windows
from everest_hf.data.synthetic import MotionVideos, render
from everest_hf.video import open_video, read_frames
from everest_hf.video.encoding import write_mp4

FRAME_STEP, FPS, BATCH = 4, 25, 8
WAYS = {
    "everest": "EVEREST, everest_hf.windows",
    "everest-batches": "EVEREST, script: decodes once, batches",
    "everest-alone": "EVEREST, script: one window after the other",
    "videomae-batches": "VideoMAE, script: decodes once, batches",
    "videomae-alone": "VideoMAE, script: one window after the other",
}
# The windows of the measurement of memory, spread over the long video.
WINDOWS_OF_LONG = 16


# ----------------------------------------------------------------------------------------------------------- videos


def write_video(path: Path, num_frames: int, height: int, width: int) -> None:
    """Write a video of this many frames, in which things move."""
    videos = MotionVideos(num_frames=num_frames, height=height, width=width, fps=FPS)
    write_mp4(render(videos, "val", 0), path, Fraction(FPS), crf="23", preset="veryfast", threads="1")


def write_long(path: Path, part: Path, num_frames: int) -> None:
    """Write a video of `num_frames` frames, that of `part` again and again; nothing is encoded for it."""
    with av.open(str(part)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        step = round(1 / FPS / packets[0].time_base)
        places = [(packet.pts, packet.dts) for packet in packets]
        for first in range(0, num_frames - num_frames % len(packets), len(packets)):
            for packet, (pts, dts) in zip(packets, places, strict=True):
                packet.pts, packet.dts, packet.stream = pts + first * step, dts + first * step, stream
                new.mux(packet)


# ------------------------------------------------------------------------------------------------------------- ways


def clips_alone(path: str, processor, starts: list[int], num_frames: int):
    """Yield the pixel values (1, T, C, H, W) of each window, read from the file on its own."""
    for start in starts:
        frames = read_frames(path, [start + i * FRAME_STEP for i in range(num_frames)])
        yield processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"]


def clips_in_batches(path: str, processor, starts: list[int], num_frames: int):
    """Yield the pixel values (BATCH, T, C, H, W) of windows; each frame is decoded and scaled once."""
    offsets = [i * FRAME_STEP for i in range(num_frames)]
    wanted = sorted({start + offset for start in starts for offset in offsets})
    blocks = open_video(path).read_blocks(wanted)
    pixels = torch.cat(
        [processor(block, do_sample_frames=False, return_tensors="pt")["pixel_values"][0] for block in blocks]
    )
    places = {frame: place for place, frame in enumerate(wanted)}
    for i in range(0, len(starts), BATCH):
        part = [[places[start + offset] for offset in offsets] for start in starts[i : i + BATCH]]
        yield pixels[torch.tensor(part)]


def script_way(args: argparse.Namespace, name: str, path: str) -> Callable[..., None]:
    """Return what a script does: the model on the first windows, which it cuts by hand."""
    kind, _, how = name.partition("-")
    model, processor = model_of(args, kind)
    clips = {"alone": clips_alone, "batches": clips_in_batches}[how]

    @torch.inference_mode()
    def run(count: int = args.windows) -> None:
        starts = [i * args.stride for i in range(count)]
        for pixel_values in clips(path, processor, starts, model.config.num_frames):
            model(pixel_values.to(args.device)).logits.float().cpu()

    return run


def windows_way(args: argparse.Namespace, path: str) -> Callable[..., None]:
    """Return what runs everest_hf.windows over the first windows of the video."""
    model, processor = model_of(args, "everest")

    def run(count: int = args.windows) -> None:
        found = sum(1 for _ in islice(windows(model, processor, path, stride=args.stride, batch_size=BATCH), count))
        if found != count:
            raise SystemExit(f"{path}: {found} windows; expected {count}")

    return run


def model_of(args: argparse.Namespace, kind: str):
    """Return a model in evaluation mode, and a processor of EVEREST, whose pixel values fit both."""
    model = build_model(Case(kind, "inference", args.size, "fp32", BATCH, args.keep_ratio, str(args.device), "sdpa"))
    config = EverestConfig(image_size=model.config.image_size, num_frames=model.config.num_frames)
    return model.eval(), EverestVideoProcessor.from_config(config, frame_step=FRAME_STEP)


# ------------------------------------------------------------------------------------------------------ measurement


def run(args: argparse.Namespace) -> dict:
    """Measure all ways in turn on the same file, and memory on a long one."""
    with tempfile.TemporaryDirectory(prefix="everest-windows-") as place:
        path, long = Path(place) / "video.mp4", Path(place) / "long.mp4"
        span = (model_of(args, "everest")[0].config.num_frames - 1) * FRAME_STEP + 1
        write_video(path, span + (args.windows - 1) * args.stride, args.height, args.height * 4 // 3)
        ways = {
            name: windows_way(args, str(path)) if name == "everest" else script_way(args, name, str(path))
            for name in WAYS
        }
        for way in ways.values():
            way(1)  # what is made at the first call counts for nobody
        with tqdm(desc="measuring", total=len(ways) * args.repeats, unit="round") as bar:
            # By the clock also on a GPU: reading is part of the work.
            seconds = measure.interleave(
                ways, args.repeats, torch.device("cpu"), warmup=0, on_call=lambda name: bar.update()
            )
        ways.clear()
        gc.collect()
        write_video(path, 10 * FPS, 240, 320)
        write_long(long, path, args.minutes * 60 * FPS)
        memory = measure.in_child_process(memory_of, args, str(long))
    return {"ways": [_figures(args, seconds, name) for name in seconds], "long": memory}


def _figures(args: argparse.Namespace, seconds: dict[str, list[float]], name: str) -> dict:
    """Return the figures of a way; its speedup is that of everest_hf.windows over it, of each round on its own."""
    ratios = [slow / fast for slow, fast in zip(seconds[name], seconds["everest"], strict=True)]
    return {
        "way": name,
        **measure.summary(seconds[name]),
        "windows_per_second": args.windows / statistics.median(seconds[name]),
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }


def memory_of(args: argparse.Namespace, path: str) -> dict:
    """Return the peak memory of everest_hf.windows, above what this process held before, on windows of a long video."""
    found = 0

    def build():
        model, processor = model_of(args, "everest")
        num_frames = open_video(path).num_frames

        def step() -> None:
            nonlocal found
            stride = num_frames // WINDOWS_OF_LONG
            found = sum(1 for _ in windows(model, processor, path, stride=stride, batch_size=BATCH))

        return step

    peak = measure.peak_bytes(build, torch.device(args.device), warmup=0)
    return {"minutes": args.minutes, "windows": found, "peak_bytes": peak}


def table(results: dict) -> str:
    """Return the results as a Markdown table, and a line on memory."""
    rows = [
        [
            WAYS[way["way"]],
            f"{way['windows_per_second']:.2f}",
            "{:.2f} ({:.2f} to {:.2f})".format(way["speedup"], *way["speedup_range"]),
        ]
        for way in results["ways"]
    ]
    long = results["long"]
    text = measure.markdown_table(["way", "windows/s", "everest_hf.windows is faster by"], rows)
    return f"{text}\n\npeak memory on {long['minutes']} minutes: {long['peak_bytes'] / 2**20:.0f} MiB"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="of both models")
    parser.add_argument("--windows", type=measure.positive_int, default=16, help="of the video")
    parser.add_argument("--stride", type=measure.positive_int, default=4, help="frames from a window to the next")
    parser.add_argument(
        "--height", type=measure.positive_int, default=720, help="of the video, 4 : 3, a multiple of 48"
    )
    parser.add_argument("--keep-ratio", type=measure.share, default=0.6, help="of EVEREST")
    parser.add_argument(
        "--minutes", type=measure.positive_int, default=60, help="of the video that memory is measured on"
    )
    parser.add_argument("--repeats", type=measure.positive_int, default=2, help="timed rounds")
    parser.add_argument("--device", type=measure.device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "windows.json")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    measure.run_and_report(args, torch.device(args.device), run, table)


if __name__ == "__main__":
    main()
