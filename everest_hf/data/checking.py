"""Videos looked at before anything is trained on them: a glance at a run's, or three frames of every one, with a report."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..video import MAX_PIXELS, TIME_LIMIT, Segment, VideoError, VideoInfo, check_kept, probe, read_frames
from ..video_reading_everest import FrameRuns
from .rows import class_names_of, name_of, named, video_in
from .sampling import Sampling
from .segments import segment_in
from .workers import map_videos

logger = logging.getLogger(__name__)

QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
# How many kinds of something, or culprits, a line of the report names.
NAMED = 5
# Seconds of a check before its progress is shown.
PROGRESS_AFTER = 5


def check_readable(
    rows: Dataset,
    *,
    frames_needed: int = 1,
    sampling: Sampling | None = None,
    sample: int | None = 256,
    num_threads: int | None = None,
    backend: str = "auto",
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
    url_schemes: Sequence[str] = (),
    opened: "Opened | None" = None,
) -> list[VideoError]:
    """Open the videos of the rows, decode the first frame of each and return one VideoError for each that fails.

    Videos of fewer than `frames_needed` frames are named in a warning. At most `sample` videos are opened, evenly
    spread over the rows; None opens all. backend, time_limit, max_pixels: see `everest_hf.video.open_video`.
    url_schemes: of `source_of`. sampling: how clips are taken; a prepared video without their frames is a NotKeptError.
    opened: those that were opened before, which are not opened again; what is opened now is added.
    """
    count = len(rows) if sample is None else min(sample, len(rows))
    chosen = [i * len(rows) // count for i in range(count)]
    opened = Opened(None) if opened is None else opened
    opening: dict[str, Any] = {"backend": backend, "time_limit": time_limit, "max_pixels": max_pixels}
    look = partial(_try_open, rows, opened, url_schemes, opening, sampling)
    with ThreadPoolExecutor(num_threads or min(8, os.cpu_count() or 1)) as pool, opened.adding():
        shown = tqdm(pool.map(look, chosen), "check", count, unit="video", leave=False, delay=PROGRESS_AFTER)
        found = [opened.add(*looked) for looked in shown]
    short = [f"{name} ({frames})" for name, frames in found if isinstance(frames, int) and frames < frames_needed]
    if short:
        what = f"fewer frames than the {frames_needed} that a clip spans; the last one is repeated"
        logger.warning("%s: %s", named(short), what)
    return [frames for _, frames in found if isinstance(frames, VideoError)]


def _try_open(
    rows: Dataset,
    opened: "Opened",
    url_schemes: Sequence[str],
    opening: dict[str, Any],
    sampling: Sampling | None,
    index: int,
) -> tuple[str, tuple | None, int | VideoError]:
    """Return what errors call a row's video, its key, and its frames or why it cannot be read."""
    try:
        arguments = video_in(rows[index], index, url_schemes=url_schemes, time_limit=opening["time_limit"])
        key = opened.key_of(arguments["source"], opening["backend"], opening["max_pixels"], arguments["segment"])
        frames = opened.frames.get(key) or _frames_of(arguments, opening, sampling)
        return arguments["name"], key, frames
    except VideoError as error:
        return error.path, None, error


def _frames_of(arguments: dict[str, Any], opening: dict[str, Any], sampling: Sampling | None) -> int:
    """Return how many frames a video has."""
    info = probe(**arguments, **opening)
    if info.runs and sampling:
        check_kept(arguments["name"], info.runs, sampling.views(info.num_frames, 1), info.num_frames - 1)
    return info.num_frames


class Opened:
    """The videos that were opened before, and how many frames each has.

    A video is known by its path, size and time of change, its segment, and by the decoder and max_pixels that it was
    opened with.
    path: the file that remembers them, a JSON list a line, or None. What is in no file of its own is not remembered.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.frames: dict[tuple | None, int] = {}
        self._file: IO[str] | None = None
        for line in path.read_text(errors="replace").splitlines() if path is not None and path.exists() else ():
            try:
                *key, frames = json.loads(line)
                self.frames[tuple(key)] = int(frames)
            except (ValueError, TypeError):  # a line that was being written: its video is opened again
                continue

    @staticmethod
    def key_of(source: str | bytes, backend: str, max_pixels: int, segment: Segment | None = None) -> tuple | None:
        try:
            status = os.stat(source) if isinstance(source, str) else None
        except OSError:  # which opening it will say
            status = None
        part = () if segment is None else (str(segment),)
        return status and (source, status.st_size, status.st_mtime_ns, backend, max_pixels, *part)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Within this, what is added goes to the file."""
        with nullcontext() if self.path is None else self.path.open("a") as self._file:
            yield

    def add(self, name: str, key: tuple | None, frames: int | VideoError) -> tuple[str, int | VideoError]:
        """Remember the frames of a key, if it has one; return the others."""
        if key is not None and isinstance(frames, int) and self.frames.get(key) != frames:
            self.frames[key] = frames
            if self._file is not None:
                self._file.write(json.dumps([*key, frames]) + "\n")
        return name, frames


# ---------------------------------------------------------------------- every video


def check_videos(
    rows: Dataset, *, workers: int | None = None, max_pixels: int = MAX_PIXELS, **options
) -> list[VideoInfo | VideoError]:
    """Decode the first, the middle and the last frame of every video; return what each is, or why it cannot be read.

    `workers` processes decode, by default one a core. A video on which the decoder crashes, or hangs for `time_limit`
    seconds (0: no limit), costs its process and nothing else. max_pixels: see `everest_hf.video.open_video`; options:
    time_limit and url_schemes of `map_videos`.
    """
    # Without a time limit of their own: a process that hangs is ended.
    check = partial(_check_video, rows, {"time_limit": 0, "max_pixels": max_pixels})
    return map_videos(check, rows, range(len(rows)), workers=workers, description="check", **options)


def _check_video(
    rows: Dataset, opening: dict[str, Any], row: int, source: str | bytes, name: str, alive: Callable[[], None]
) -> VideoInfo:
    opening = {**opening, "segment": segment_in(rows[row])}
    info = probe(source, name=name, **opening)  # decodes the first frame
    alive()
    read_frames(source, [info.num_frames // 2, info.num_frames - 1], name=name, **opening)
    return info


def summarize(
    rows: Dataset, found: Sequence[VideoInfo | VideoError], *, clip_frames: int, min_videos: int
) -> dict[str, Any]:
    """Return what is worth knowing of the videos of the rows, as JSON has it; found: of `check_videos`.

    clip_frames: frames of a video that a clip spans; shorter videos are listed. Classes of fewer than min_videos
    readable videos are listed. Durations are in seconds, sizes "width x height" in pixels. prepared: how the files that
    `prepare --frame-step` wrote hold the frames.
    """
    infos = [info for info in found if isinstance(info, VideoInfo)]
    short = [
        {"video": name_of(rows[row]["video"], row), "frames": info.num_frames}
        for row, info in enumerate(found)
        if isinstance(info, VideoInfo) and info.num_frames < clip_frames
    ]
    classes = _videos_of_classes(rows, found)
    return {
        "videos": len(found),
        "readable": len(infos),
        "unreadable": [{"video": e.path, "reason": e.reason} for e in found if isinstance(e, VideoError)],
        "codecs": _counts(info.codec for info in infos),
        "sizes": _counts(f"{info.width}x{info.height}" for info in infos),
        "fps": _counts(f"{info.fps:.4g}" for info in infos),
        "prepared": _counts(_in_words(info.runs) for info in infos if info.runs),
        "seconds": _quantiles([info.duration for info in infos]),
        "total_seconds": sum(info.duration for info in infos),
        "frames": _quantiles([info.num_frames for info in infos]),
        "clip_frames": clip_frames,
        "short": short,
        "classes": classes,
        "min_videos": min_videos,
        "small_classes": {name: count for name, count in (classes or {}).items() if count < min_videos},
    }


def _in_words(runs: FrameRuns) -> str:
    return f"frame step {runs.step}, {'1 phase' if runs.phases == 1 else 'all phases'}"


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _quantiles(values: list[float]) -> dict[str, float]:
    """Return values of the list itself, so that the extremes can be looked for."""
    ordered = sorted(values)
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items() if ordered}


def _videos_of_classes(rows: Dataset, found: Sequence[VideoInfo | VideoError]) -> dict[str, int] | None:
    """Return the number of readable videos of each class, None without labels."""
    if "label" not in rows.column_names:
        return None
    labels = list(rows["label"])
    names = class_names_of(rows) or [str(label) for label in range(max(labels) + 1)]
    readable = Counter(label for label, info in zip(labels, found, strict=True) if isinstance(info, VideoInfo))
    return {name: readable[label] for label, name in enumerate(names)}


# ---------------------------------------------------------------------- for people


def as_text(summary: dict[str, Any]) -> str:
    """Return a summary of `summarize` in lines; of the unreadable videos every one."""
    unreadable = summary["unreadable"]
    lines = [f"{summary['videos']} videos, {summary['readable']} readable, {len(unreadable)} unreadable"]
    if summary["readable"]:
        lines += _lines_of_videos(summary)
    if summary["classes"] is not None:
        lines += _lines_of_classes(summary)
    return "\n".join(lines + [f"unreadable   {bad['video']}: {bad['reason']}" for bad in unreadable])


def _lines_of_videos(summary: dict[str, Any]) -> list[str]:
    short = [f"{video['video']} ({video['frames']})" for video in summary["short"]]
    return [
        f"codecs       {_most_frequent(summary['codecs'])}",
        f"sizes        {_most_frequent(summary['sizes'])}",
        f"frames/s     {_most_frequent(summary['fps'])}",
        *([f"prepared     {_most_frequent(summary['prepared'])}"] if summary["prepared"] else []),
        f"             {''.join(f'{name:>10}' for name in QUANTILES)}",
        f"frames       {''.join(f'{value:>10}' for value in summary['frames'].values())}",
        f"seconds      {''.join(f'{value:>10.2f}' for value in summary['seconds'].values())}"
        f"   {summary['total_seconds'] / 3600:.2f} hours in all",
        f"short        {len(short)} videos of fewer than the {summary['clip_frames']} frames that a clip spans"
        + _listed(short),
    ]


def _lines_of_classes(summary: dict[str, Any]) -> list[str]:
    counts = sorted(summary["classes"].values())
    small = [f"{name} ({count})" for name, count in summary["small_classes"].items()]
    return [
        f"classes      {len(counts)}, of {counts[0]} to {counts[-1]} readable videos, median {counts[len(counts) // 2]}",
        f"too few      {len(small)} classes of fewer than {summary['min_videos']} readable videos" + _listed(small),
    ]


def _most_frequent(counts: dict[str, int]) -> str:
    """Return the most frequent kinds, and how many others there are."""
    named = [f"{kind} ({count})" for kind, count in list(counts.items())[:NAMED]]
    others = len(counts) - len(named)
    return ", ".join(named) + (f" and {others} others" if others else "")


def _listed(culprits: list[str]) -> str:
    more = ", …" if len(culprits) > NAMED else ""
    return f": {', '.join(culprits[:NAMED])}{more}" if culprits else ""
