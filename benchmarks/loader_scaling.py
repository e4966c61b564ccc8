"""How many clips a second a loader's processes read, and what share of the time a model waits for them.

`python benchmarks/loader.py --scaling` measures, on the same files in the same run: the loader on raw and on prepared
videos, and data sets that are written as usual with other libraries. Each is read twice by a `DataLoader`, after a first
time that is not counted: as fast as it can, and with a pause of `--step-ms` after each batch, which stands for a model.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import psutil
import torch
from datasets import Dataset
from loader_videos import name_of
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm
from transformers import VideoMAEVideoProcessor
from transformers.video_utils import load_video

from everest_hf.data import VideoClips, collate, transforms
from everest_hf.data.prepare import prepare_videos
from everest_hf.data.workers import keep_freed_memory
from everest_hf.video import decoders_of, probe, read_frames
from everest_hf.video.decoders import torchcodec_loads
from everest_hf.video.encoding import Encoding

SAMPLING = {"num_frames": 16, "frame_step": 4}
SPAN = (SAMPLING["num_frames"] - 1) * SAMPLING["frame_step"] + 1
# How the videos are prepared, by the name of the way to read them.
PREPARED = {
    "prepared": {},
    "prepared, frame step": {"frame_step": SAMPLING["frame_step"]},
    "prepared, frame step, 1 phase": {"frame_step": SAMPLING["frame_step"], "phases": 1},
}


# How many clips are cut from a video that is decoded once, and the sampled frames by which they may lie apart.
NUM_SAMPLE, SHIFT = 4, 4


# ---------------------------------------------------------------------------------------------------- ways of reading


@dataclass
class Way:
    """A data set, how a batch is made of its items, and how many clips an item is."""

    items: Any
    collate_fn: Callable
    clips_of_item: int = 1


class Clips(torch.utils.data.Dataset):
    """Clips, as `read` makes them of a path: uint8 or float (T, C, h, w)."""

    def __init__(self, paths: list[Path], read: Callable[[str], torch.Tensor]):
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(str(self.paths[index]))


def start_of(num_frames: int) -> int:
    """Draw the first frame of a clip."""
    return int(torch.randint(max(1, num_frames - SPAN + 1), ()))


def indices_of(num_frames: int) -> list[int]:
    """Draw the frames of a clip."""
    start = start_of(num_frames)
    return [min(start + i, num_frames - 1) for i in range(0, SPAN, SAMPLING["frame_step"])]


def by_decord(transform: Callable, path: str) -> torch.Tensor:
    """Read a clip with decord, in a data set as one writes it."""
    decoder = decoders_of("decord")[0](path)
    return transform(decoder.read(indices_of(decoder.num_frames)).permute(0, 3, 1, 2)).contiguous()


def by_torchcodec(transform: Callable, path: str) -> torch.Tensor:
    """Read a clip with torchcodec's own sampler."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.samplers import clips_at_random_indices

    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    step, count = SAMPLING["frame_step"], SAMPLING["num_frames"]
    clips = clips_at_random_indices(decoder, num_indices_between_frames=step, num_frames_per_clip=count)
    return transform(clips.data[0]).contiguous()


def by_transformers(processor: VideoMAEVideoProcessor, path: str) -> torch.Tensor:
    """Read a clip with PyAV and a processor of Transformers: the centre crop, normalised."""
    frames, _ = load_video(
        path, backend="pyav", sample_indices_fn=lambda metadata, **_: indices_of(metadata.total_num_frames)
    )
    return processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"][0]


def ways_of(paths: list[Path], folder: Path, args: argparse.Namespace) -> dict[str, Way]:
    """Return the data sets of `args.clips` clips, by what the table calls them."""
    size = (args.image_size, args.image_size)
    transform = transforms.pretraining_transform(size)
    stored = {"raw": paths, **{name: sorted((folder / name).iterdir()) for name in PREPARED}}

    def ours(videos: list[Path], num_sample: int = 1, **how) -> Way:
        rows = Dataset.from_dict({"video": repeated(list(map(str, videos)), args.clips // num_sample)})
        return Way(VideoClips(rows, transform, num_sample=num_sample, **SAMPLING, **how), collate, num_sample)

    ways = {name: ours(videos) for name, videos in stored.items()}
    several = f"raw, {NUM_SAMPLE} clips of a video"
    ways |= {several: ours(paths, NUM_SAMPLE), f"{several}, shifted": ours(paths, NUM_SAMPLE, sample_shift=SHIFT)}
    processor = VideoMAEVideoProcessor(
        size={"shortest_edge": args.image_size}, crop_size={"height": args.image_size, "width": args.image_size}
    )
    others = {"decord": partial(by_decord, transform), "transformers": partial(by_transformers, processor)}
    if torchcodec_loads():
        others["torchcodec's sampler"] = partial(by_torchcodec, transform)
    for name, read in others.items():
        ways[f"raw, {name}"] = Way(Clips(repeated(paths, args.clips), read), default_collate)
    return ways


def repeated(paths: list, count: int) -> list:
    """Return `count` of the paths, over and over."""
    return [paths[i % len(paths)] for i in range(count)]


# --------------------------------------------------------------------------------------------------------- measurement


def prepare_each(videos: str, paths: list[Path], folder: Path) -> list[dict]:
    """Prepare the videos in each way; return what that takes, and how alike the frames stay."""
    results = []
    for name, how in PREPARED.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        made = sorted(prepare_videos(paths[0].parent, folder / name, encoding=Encoding(**how), workers=1).made)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        sizes = [sum(path.stat().st_size for path in each) for each in (paths, [target for _, target in made])]
        results.append(
            {
                "videos": videos,
                "way": name,
                "bytes": sizes[1] / sizes[0],
                "megabytes_per_1000": sizes[1] / len(paths) / 1000,
                "processor_seconds_per_1000": (
                    1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(paths)
                ),
                "ssim": sum(similarity(path, target) for path, (_, target) in zip(paths, made, strict=True))
                / len(paths),
            }
        )
    return results


def similarity(source: Path, target: Path) -> float:
    """Return the mean structural similarity (SSIM) of some frames that both have, NaN where the sizes differ.

    It is that of luma in blocks of 8 x 8. Source: Wang et al. 2004, Image Quality Assessment.
    """
    places = range(0, probe(source).num_frames, 8 * SAMPLING["frame_step"])
    luma = torch.tensor([0.299, 0.587, 0.114])
    both = [read_frames(path, places).float() @ luma for path in (source, target)]  # (T, H, W)
    if both[0].shape != both[1].shape:
        return float("nan")
    a, b = (frames.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3) for frames in both)  # (T, h, w, 64)
    (var_a, mean_a), (var_b, mean_b) = (torch.var_mean(blocks, -1, correction=0) for blocks in (a, b))
    covariance = (a * b).mean(-1) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item()


def measure_scaling(videos: str, ways: dict[str, Way], args: argparse.Namespace, bar: tqdm) -> list[dict]:
    """Measure each way with each number of processes."""
    results = []
    for name, way in ways.items():
        for workers in args.workers:
            bar.set_description(f"{name}, {workers}")
            figures = figures_of(way, workers, args)
            results.append({"videos": videos, "way": name, "workers": workers, **figures})
            bar.update()
    return results


def figures_of(way: Way, workers: int, args: argparse.Namespace) -> dict[str, float]:
    """Return clips a second of all processes and of the processor, and the share of waiting beside a model."""
    clips = len(way.items) * way.clips_of_item
    loader = DataLoader(
        way.items,
        batch_size=args.batch // way.clips_of_item,
        num_workers=workers,
        collate_fn=way.collate_fn,
        worker_init_fn=keep_freed_memory,
        persistent_workers=True,
    )
    read(loader, 0)  # headers are read for the first time
    processes = [psutil.Process(child.pid) for child in loader._iterator._workers]
    before = sum(map(seconds_of, processes))
    seconds, _ = read(loader, 0)
    processor = sum(map(seconds_of, processes)) - before
    _, wait = read(loader, args.step_ms / 1000)
    return {
        "clips_per_second": clips / seconds,
        "clips_per_processor_second": clips / processor,
        "wait": wait,
    }


def seconds_of(process: psutil.Process) -> float:
    """Return the seconds of the processor that a process has had."""
    times = process.cpu_times()
    return times.user + times.system


def read(batches: Iterable, pause: float) -> tuple[float, float]:
    """Take all batches with a pause after each; return the seconds, and the share of waiting since the first batch."""
    start, waited, since = time.perf_counter(), 0.0, None
    left = iter(batches)
    while True:
        asked = time.perf_counter()
        batch = next(left, None)
        if batch is None:
            break
        waited += time.perf_counter() - asked if since else 0.0
        since = since or time.perf_counter()
        time.sleep(pause)
    end = time.perf_counter()
    return end - start, waited / (end - since)


# -------------------------------------------------------------------------------------------------------------- output


def scaling_tables(results: dict[str, list[dict]], args: argparse.Namespace) -> str:
    """Return the results as Markdown tables."""
    header = ["videos", "prepared", "bytes, x source", "MB for 1,000", "s of a core for 1,000", "SSIM"]
    rows = [
        [
            name_of(row["videos"]),
            row["way"],
            f"{row['bytes']:.2f}",
            f"{row['megabytes_per_1000']:.0f}",
            f"{row['processor_seconds_per_1000']:.0f}",
            f"{row['ssim']:.3f}",
        ]
        for row in results["prepared"]
    ]
    return f"{measure.markdown_table(header, rows)}\n\n{scaling_table(results['scaling'], args)}"


def scaling_table(results: list[dict], args: argparse.Namespace) -> str:
    """Return clips a second and shares of waiting as a Markdown table."""
    first, *more = args.workers
    header = ["videos", "read", "clips/s of a core", f"clips/s, {first} workers", *(str(n) for n in more)]
    header += [f"waits, {first} workers", *(str(n) for n in more)]
    ways = dict.fromkeys((result["videos"], result["way"]) for result in results)
    rows = []
    for videos, way in ways:
        found = [result for result in results if (result["videos"], result["way"]) == (videos, way)]
        core = len(found) / sum(1 / result["clips_per_processor_second"] for result in found)
        cells = [name_of(videos), way, f"{core:.0f}", *(f"{result['clips_per_second']:.0f}" for result in found)]
        rows.append([*cells, *(f"{result['wait']:.0%}" for result in found)])
    return measure.markdown_table(header, rows)
