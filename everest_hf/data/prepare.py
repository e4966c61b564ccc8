"""Videos made ready for training: H.264, small, a key frame every few frames, so that a random clip decodes fast."""

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import torch
from datasets import Dataset, LargeList, List
from tqdm.auto import tqdm

from ..files import LOCK, held, part_suffix, put_in_place
from ..video import MAX_PIXELS, TIME_LIMIT, VideoError, open_video, read_clip
from ..video.containers import check_source
from ..video.encoding import DEFAULT_ENCODING, Encoding, check_written, even_frames, frames_of_pictures, transcode
from ..video.pictures import is_folder_of_pictures
from ..video_reading_everest import open_container
from .lists import write_csv
from .rows import VIDEO_SUFFIXES, class_names_of, source_of, video_in
from .sampling import Sampling
from .segments import FRAMES, segments_in
from .sources import frame_folders_below, load_videos, videos_below
from .tables import arguments_of, columns_of, open_table
from .workers import map_videos

SUFFIX = ".mp4"
# Bytes that the name of a file or folder may have on all common file systems.
LONGEST_NAME = 255
MADE, KEPT = "made", "kept"
# Suffixes of lists with columns, of which csv is written.
TABLES = (".csv", ".tsv", ".json", ".jsonl")


@dataclass(frozen=True)
class Prepared:
    """What `prepare_videos` did. made, kept: (row, target) of the videos that were written, and of those that were
    there already; rows: the sources. bad: the videos that cannot be read. new_list: its path, None for a folder.
    url_schemes: with which addresses were fetched.
    """

    rows: Dataset
    made: list[tuple[int, Path]]
    kept: list[tuple[int, Path]]
    bad: list[VideoError]
    new_list: Path | None
    url_schemes: Sequence[str] = ()

    def pairs(self, sample: int) -> list[tuple[str | bytes, Path]]:
        """Return (source, target) of at most `sample` readable videos, evenly spread; a source is a path or bytes."""
        done = sorted(self.made + self.kept)
        count = min(sample, len(done))
        chosen = [done[i * len(done) // count] for i in range(count)]
        return [(self._source(row), target) for row, target in chosen]

    def _source(self, row: int) -> str | bytes:
        return source_of(self.rows[row]["video"], row, url_schemes=self.url_schemes)["source"]


# ---------------------------------------------------------------------- all videos


def prepare_videos(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    encoding: Encoding = DEFAULT_ENCODING,
    fps: float | None = None,
    shard: tuple[int, int] = (0, 1),
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
    url_schemes: Sequence[str] = (),
    split: str | None = None,
    **options,
) -> Prepared:
    """Write the videos of a source below the folder `out`, each as an H.264 file without sound, in parallel processes.

    The frames are those of the source: all of them, in order, upright, scaled, at even distances in time. fps: frames a
    second of the videos that are folders of frames, which do not tell; a video file keeps its own rate.

    `source`, `split` and `options` are those of `everest_hf.data.load_videos`; without a split, a folder is taken with
    all its splits. Folders and names stay, and ".mp4" follows another suffix. For a list, a list of the same name,
    with the same labels and with paths relative to itself, is written when all else is done. The videos of a data set
    become files with the numbers of their rows, in a folder for each class.

    A file has its name when it is whole, and its metadata say what it was made from and how. Called again, the
    function keeps what was made from the same file in the same way. Videos that cannot be read are in the result, and
    missing in the list. shard: (i, n) makes the i-th of n parts of the videos, and no list, so that n processes, on
    machines that share `out`, make all; a call without it then makes what is missing, and the list.

    `workers` processes run at a time, by default one a core; time_limit: seconds after which one that decodes no further
    frame counts as hung (0: never). max_pixels: of a frame, see `everest_hf.video.open_video`. url_schemes: see
    `everest_hf.data.source_of`.

    Raises:
        FileNotFoundError, ValueError: the source is not one; `out` lies in it, or a file of it would be overwritten.
        OSError: a file cannot be written, for instance because the disk is full. What is finished stays.
            BlockingIOError: another process prepares videos into `out`.
    """
    if fps is not None and not 1 <= fps <= 1000:
        raise ValueError(f"fps is {fps:g}; it must be 1 to 1000")
    source, out = Path(source).expanduser(), Path(out).expanduser()
    rows, targets = _plan(source, out, split, options)
    chosen = sorted({target: row for row, target in enumerate(targets)}.values())  # a list may name a video twice
    chosen, part = chosen[shard[0] :: shard[1]], part_suffix(shard)
    with _workplace(out, f".partial-{source.name}{part}", f"{LOCK}{part}") as aside:
        prepare = partial(prepare_row, encoding, fps, max_pixels, targets, aside)
        how: dict[str, Any] = {"workers": workers, "time_limit": time_limit, "url_schemes": url_schemes}
        results = map_videos(prepare, rows, chosen, description=f"prepare {out}", **how)
        bad = {
            targets[row]: result for row, result in zip(chosen, results, strict=True) if isinstance(result, VideoError)
        }
        opening: dict[str, Any] = {"time_limit": time_limit, "max_pixels": max_pixels}
        new_list, wrong = (
            _write_list(source, out, aside, rows, targets, bad, opening)
            if _is_list(source) and not part
            else (None, [])
        )
    made, kept = (
        [(row, targets[row]) for row, result in zip(chosen, results, strict=True) if result == which]
        for which in (MADE, KEPT)
    )
    return Prepared(rows, made, kept, [*bad.values(), *wrong], new_list, url_schemes)


@contextmanager
def _workplace(out: Path, name: str, lock: str) -> Iterator[Path]:
    """Hold the folder `out`, and give one in it for files that grow, which is removed at the end."""
    with held(out, lock):
        aside = out / name
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _is_list(source: Path) -> bool:
    return source.is_file() and arguments_of(str(source)) is None


def _plan(source: Path, out: Path, split: str | None, options: dict[str, Any]) -> tuple[Dataset, list[Path]]:
    """Return the rows of a source, and the target of each."""
    if arguments := arguments_of(str(source)):
        rows = load_videos(source, split=split, labels_required=False, **options)
        if "label" not in rows.column_names:
            _refuse_several_labels(source, arguments, split, **options)
        return rows, [out / name for name in _numbered(rows, source)]
    if source.is_dir():
        if out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{out}: lies in {source}, the folder of the sources; choose a folder outside of it")
        below = str(source / (split or ""))
        videos = [Path(video) for video in videos_below(below) or frame_folders_below(below)]
        if not videos:
            raise ValueError(
                f"{source / (split or '')}: no video in it; expected files ending in one of {', '.join(VIDEO_SUFFIXES)}"
            )
        rows, base = Dataset.from_dict({"video": [str(video) for video in videos]}), source
    else:
        rows = load_videos(source, split=split, labels_required=False, check_files=False, **options)
        videos = [Path(video) for video in rows["video"]]
        base = _base_of(videos, Path(options.get("data_root") or source.parent))
        if source.resolve().parent == out.resolve():
            raise ValueError(f"{out}: is the folder of {source}, which would be overwritten; choose another folder")
    names = [video.relative_to(base) for video in videos]
    targets = [out / _renamed(name) for name in names]
    _refuse_overwriting(base.resolve(), names, out.resolve())
    _refuse_same_name(videos, targets)
    _refuse_long_names(videos, targets)
    return rows, targets


def _refuse_several_labels(
    source: Path,
    arguments: dict[str, Any],
    split: str | None,
    *,
    video_column: str | None = None,
    label_column: str | None = None,
    **_,
) -> None:
    features = open_table(str(source), arguments, split).features
    if isinstance(columns_of(features, video_column, label_column, str(source)).label_feature, (List, LargeList)):
        raise ValueError(
            f"{source}: has several labels a video, which folders of classes cannot hold; "
            "write its videos as files and prepare a list of them, 'path a,b' a line"
        )


def _numbered(rows: Dataset, source: Path) -> list[str]:
    """Return a name for each row of a data set: its number, below the name of its class."""
    labels = _label_texts(rows)
    folders = _folders_of({label for label in labels if label is not None}, source)
    return [f"{folders.get(label, '')}{row:08d}{SUFFIX}" for row, label in enumerate(labels)]


def _folders_of(classes: Iterable[str], source: Path) -> dict[str | None, str]:
    """Return the folder of each class, "name/"; a "/" in a name becomes "_".

    Raises:
        ValueError: a folder cannot have the name, would be left out when it is read, or would be that of two classes.
    """
    class_of_folder: dict[str, str] = {}
    for name in sorted(classes):
        folder = name.replace("/", "_")
        if not folder or folder.startswith(".") or "\0" in folder or len(os.fsencode(folder)) > LONGEST_NAME:
            raise ValueError(
                f"{source}: the class {name[:40]!r} cannot be the name of a folder of videos, which has 1 to "
                f"{LONGEST_NAME} bytes, no NUL, and no dot at its beginning; rename the class"
            )
        other = class_of_folder.setdefault(folder, name)
        if other != name:
            raise ValueError(
                f"{source}: the classes {other!r} and {name!r} would share the folder {folder!r}; rename one"
            )
    return {name: f"{folder}/" for folder, name in class_of_folder.items()}


def _label_texts(rows: Dataset) -> list[str | None]:
    """Return the label of each row as a list file has it."""
    if "label" not in rows.column_names:
        return [None] * len(rows)
    names = class_names_of(rows)
    return [names[label] if names else str(label) for label in rows["label"]]


def _base_of(videos: list[Path], root: Path) -> Path:
    """Return the folder that the names of the targets start from: the root of a list where all videos are below it."""
    root = Path(os.path.abspath(root))
    if all(video.is_relative_to(root) for video in videos):
        return root
    return Path(os.path.commonpath([video.parent for video in videos]))


def _renamed(path: Path) -> Path:
    # With the old suffix in the name, a.avi and a.mkv stay two files, whatever lists they come in.
    return path if path.suffix.lower() == SUFFIX else path.with_name(path.name + SUFFIX)


def _refuse_overwriting(base: Path, names: list[Path], out: Path) -> None:
    sources = {base / name for name in names}
    for name in names:
        if out / _renamed(name) in sources:
            raise ValueError(f"{out / _renamed(name)}: is a source, and would be overwritten; choose another folder")


def _refuse_same_name(videos: list[Path], targets: list[Path]) -> None:
    source_of_target: dict[Path, Path] = {}
    for video, target in zip(videos, targets, strict=True):
        other = source_of_target.setdefault(target, video)
        if other != video:
            raise ValueError(f"{target}: would be made of both {other} and {video}; rename one of them")


def _refuse_long_names(videos: list[Path], targets: list[Path]) -> None:
    for video, target in zip(videos, targets, strict=True):
        if len(os.fsencode(target.name)) > LONGEST_NAME:
            raise ValueError(
                f"{video}: is too long a name: with {SUFFIX} after it, it has more than {LONGEST_NAME} bytes"
            )


def _write_list(
    source: Path,
    out: Path,
    aside: Path,
    rows: Dataset,
    targets: list[Path],
    bad: Container[Path],
    opening: dict[str, Any],
) -> tuple[Path, list[VideoError]]:
    """Write the list of the targets, with the labels and segments of the rows; return its path, and what is wrong.

    Segments are in frames, which stay, while times become even. The list is csv where "path label" would not do, or
    where the source is a table.
    """
    good = [row for row, target in enumerate(targets) if target not in bad]
    columns: dict[str, dict[int, Any]] = {"video": {row: targets[row].relative_to(out).as_posix() for row in good}}
    wrong: list[VideoError] = []
    if segments_in(rows):
        found = {row: _frames_of(rows, row, opening) for row in good}
        wrong = [frames for frames in found.values() if isinstance(frames, VideoError)]
        ends = {row: frames for row, frames in found.items() if not isinstance(frames, VideoError)}
        good = list(ends)
        columns |= {name: {row: ends[row][i] for row in good} for i, name in enumerate(FRAMES)}
    if "label" in rows.column_names:
        columns["label"] = dict(enumerate(_label_texts(rows)))
    lines = [[values[row] for values in columns.values()] for row in good]
    is_table = source.suffix.lower() in TABLES or FRAMES[0] in columns or any(" " in line[-1] for line in lines)
    path = out / (source.with_suffix(".csv") if source.suffix.lower() in TABLES else source).name
    if is_table and (len(columns) > 1 or source.suffix.lower() in TABLES):
        write_csv(aside / path.name, list(columns), lines)
    else:
        (aside / path.name).write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf-8")
    put_in_place(aside / path.name, path)
    return path, wrong


def _frames_of(rows: Dataset, row: int, opening: dict[str, Any]) -> tuple[int | None, int | None] | VideoError:
    """Return the first frame of a row's segment and the one after its last, None for a whole video."""
    arguments = video_in(rows[row], row)
    if arguments["segment"] is None:
        return None, None
    try:
        frames = open_video(**arguments, **opening).frames
    except VideoError as error:
        return error
    return frames.start, frames.stop


# ---------------------------------------------------------------------- one video


def prepare_row(
    encoding: Encoding,
    fps: float | None,
    max_pixels: int,
    targets: list[Path],
    aside: Path,
    row: int,
    source: str | bytes,
    name: str,
    alive: Callable,
) -> str:
    """Make the target of a row where it is not there; return MADE or KEPT."""
    target, growing = targets[row], aside / f"{row}{SUFFIX}"
    if is_folder_of_pictures(source):
        if fps is None:
            raise VideoError(name, "a folder of frames, which does not tell their rate; give --fps, frames a second")
        tag, frames = _tag(source, name, encoding, fps=fps), frames_of_pictures(source, name, fps, max_pixels)
    else:
        check_source(source, name)
        tag, frames = _tag(source, name, encoding), even_frames(source, name, max_pixels)
    if _tag_of(target) == tag:
        return KEPT
    try:
        count = transcode(frames, growing, tag, encoding, alive)
        check_written(growing, count)
        target.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(growing, target)
    except (OSError, av.error.FFmpegError) as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    return MADE


def _tag(source: str | bytes, name: str, encoding: Encoding, **more) -> dict[str, Any]:
    """What a finished file says it was made from, and how."""
    how = asdict(encoding)
    if encoding.frame_step == 1:  # as files say that have their frames in order
        del how["frame_step"], how["phases"]
    return {"source": os.path.basename(name), **identity_of(source), **how, **more}


def identity_of(source: str | bytes) -> dict[str, int]:
    """Return what tells a video from another one under its name: a file, a folder of frames, or the bytes of a file.

    Raises:
        OSError: it is not there.
    """
    if isinstance(source, bytes):
        return {"bytes": len(source), "crc32": zlib.crc32(source)}
    if os.path.isdir(source):
        with os.scandir(source) as entries:
            files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
        return {"files": len(files), "crc32": zlib.crc32(repr(files).encode())}
    status = os.stat(source)
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def _tag_of(path: Path) -> dict[str, Any] | None:
    try:
        with open_container(str(path)) as container:
            tag = json.loads(container.metadata.get("comment", ""))
            return {key: value for key, value in tag.items() if key != "frames"}  # which only the result tells
    except (OSError, av.error.FFmpegError, ValueError, AttributeError):
        return None


# ---------------------------------------------------------------------- what it gains


def measure_gain(
    pairs: list[tuple[str | bytes, Path]], sampling: Sampling, *, rounds: int = 2
) -> tuple[float, float] | None:
    """Return clips a second of one process from the sources and from the targets, read in turn at the same places.

    Clips are drawn at random; each pair is read `rounds` times. None where the training's decoder takes none of the
    sources.
    """
    times = []
    for pair in tqdm(pairs, desc="measure", unit="video"):
        try:
            # The first reading brings the files into memory.
            times += [[_seconds(video, seed, sampling) for video in pair] for seed in range(rounds + 1)][1:]
        except VideoError:
            continue  # made readable by being prepared
    return tuple(len(times) / sum(column) for column in zip(*times, strict=True)) if times else None


def _seconds(source: str | bytes | Path, seed: int, sampling: Sampling) -> float:
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    read_clip(source, lambda count: sampling.drawn(count, generator))
    return time.perf_counter() - start
