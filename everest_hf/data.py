"""From a list file or a folder of class folders to uint8 batches.

`load_videos` makes a `datasets.Dataset` of rows (path, label) and refuses what is wrong with them before any training.
`VideoClips` (training) and `VideoViews` (evaluation) make tensors of the rows, `collate` makes batches.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.utils.data import Sampler, default_collate

from . import transforms
from .video import VideoError, VideoInfo, frame_indices, probe, read_clip

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
# How many culprits an error names; the count of all comes beside them.
NAMED_CULPRITS = 3
# A run of this many unreadable videos in the order of an epoch is no longer bad luck.
MAX_REPLACEMENTS = 16


# ---------------------------------------------------------------------- rows


class _Row(NamedTuple):
    path: str
    label: str | None
    where: str  # what an error calls the row: file:line, or the path


def load_videos(
    source: str | os.PathLike,
    *,
    data_root: str | os.PathLike | None = None,
    split: str | None = None,
    labels_required: bool = True,
    class_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    problem_type: str = "single_label_classification",
    check_files: bool = True,
) -> Dataset:
    """Return the rows of a source: column `video` (absolute path) and, where every row has one, `label`.

    `source` is a list file with "path label" a line, split at the last blank, so that a path may contain blanks;
    a label is an integer or a class name. Or it is a folder with a folder of videos for each class; `split` then
    names a sub-folder such as "train". Relative paths of a list start at `data_root`, by default at the list's own
    folder. With labels_required=False a list may be paths alone and a folder need not have class folders.
    `class_names` (those of the training set, or of a checkpoint) fixes the order of the classes; otherwise names are
    sorted. `label` is an integer, a ClassLabel where names are known. `num_labels` bounds integer labels. With
    problem_type "multi_label_classification" a list gives several integers or names joined by commas, "path a,b", and
    `label` is a list of ClassLabels; with "regression" a list gives a number, and `label` is a float. With
    check_files=False missing videos stay in the rows, to be found when they are opened.

    Raises:
        FileNotFoundError: source or videos are missing; the first few are named.
        ValueError: no rows, a line without label, a label out of range, unknown or no number, a suffix that is not a
            video's.
    """
    source = Path(source)
    if source.is_dir():
        rows = _rows_of_folder(_split_folder(source, split), labels_required)
    elif not source.is_file():
        raise FileNotFoundError(f"{source}: no such list file or folder of videos")
    elif split is not None:
        raise ValueError(f"split is {split!r}, but {source} is a list file; a list is one split already")
    else:
        rows = _rows_of_list(source, Path(data_root) if data_root else source.parent, labels_required)
    _check_suffixes(rows)
    if check_files:
        _check_files(rows, source)
    return _as_dataset(rows, class_names, num_labels, problem_type)


def class_names_of(rows: Dataset) -> list[str] | None:
    """Return the names of the classes in the order of their integers, or None where they are not known."""
    feature = rows.features.get("label")
    feature = getattr(feature, "feature", feature)  # of several labels a video: what each of them is
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _rows_of_list(path: Path, root: Path, labels_required: bool) -> list[_Row]:
    lines = _text_of(path).splitlines()
    rows = [_row_of_line(line, f"{path}:{i}", root) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: the list is empty; expected lines of the form 'path label'")
    if labels_required:
        unlabelled = [row.where for row in rows if row.label is None]
        _refuse(unlabelled, "line without label; expected 'path label'")
    return rows


def _text_of(path: Path) -> str:
    if _is_video(path.name):
        raise ValueError(f"{path}: a video, not a list of videos; expected a text file with 'path label' a line")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8; expected a list with 'path label' a line") from error


def _row_of_line(line: str, where: str, root: Path) -> _Row:
    path, label = line.strip(), None
    head, *tail = path.rsplit(None, 1)
    # A last word that is itself a video file belongs to a path with blanks: the line has no label.
    if tail and not _is_video(tail[0]):
        path, label = head, tail[0]
    return _Row(os.path.abspath(root / path), label, where)


def _split_folder(folder: Path, split: str | None) -> Path:
    sub_folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if split is not None:
        if split not in sub_folders:
            raise FileNotFoundError(f"{folder}: has no sub-folder {split!r}; it has {sub_folders}")
        return folder / split
    if sub_folders and SPLIT_NAMES.issuperset(sub_folders):
        raise ValueError(f"{folder}: its sub-folders {sub_folders} are splits, not classes; choose one by split=")
    return folder


def _rows_of_folder(folder: Path, labels_required: bool) -> list[_Row]:
    rows, ignored = [], []
    for parent, sub_folders, names in os.walk(os.path.abspath(folder)):
        sub_folders[:] = sorted(name for name in sub_folders if not name.startswith("."))
        parts = Path(parent).relative_to(os.path.abspath(folder)).parts
        label = parts[0] if parts else None
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(parent, name)
            (rows if _is_video(name) else ignored).append(_Row(path, label, path))
    if not rows:
        raise ValueError(f"{folder}: no video in it; expected files ending in one of {', '.join(VIDEO_SUFFIXES)}")
    if ignored:
        logger.warning("%s: %d files that are not videos are ignored, e.g. %s", folder, len(ignored), ignored[0].path)
    if labels_required:
        _refuse([row.where for row in rows if row.label is None], "video outside of a class folder")
    return rows


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


def _check_suffixes(rows: list[_Row]) -> None:
    wrong = [f"{row.where} ({row.path})" for row in rows if not _is_video(row.path)]
    _refuse(wrong, f"not a video; expected a path ending in one of {', '.join(VIDEO_SUFFIXES)}")


def _check_files(rows: list[_Row], source: Path) -> None:
    missing = [row.path for row in rows if not os.path.isfile(row.path)]
    _refuse(missing, f"no such video file (named by {source}, {len(rows)} videos)", FileNotFoundError)


def _refuse(culprits: list[str], reason: str, error: type[Exception] = ValueError) -> None:
    """Raise an error with the reason that names the first culprits and counts all, if there is one."""
    if culprits:
        raise error(f"{_named(culprits)}: {reason}")


def _named(culprits: list[str]) -> str:
    more = f", … {len(culprits)} in all" if len(culprits) > NAMED_CULPRITS else ""
    return f"{', '.join(culprits[:NAMED_CULPRITS])}{more}"


def _as_dataset(
    rows: list[_Row], class_names: Sequence[str] | None, num_labels: int | None, problem_type: str
) -> Dataset:
    columns: dict[str, list] = {"video": [row.path for row in rows]}
    features: dict[str, Any] = {"video": Value("string")}
    if all(row.label is not None for row in rows):
        if problem_type == "regression":
            columns["label"], features["label"] = _numbers(rows), Value("float64")
        elif problem_type == "multi_label_classification":
            columns["label"], names = _label_lists(rows, class_names, num_labels)
            features["label"] = List(ClassLabel(names=names))
        else:
            columns["label"], names = _integer_labels(rows, class_names, num_labels)
            features["label"] = ClassLabel(names=names) if names else Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


def _integer_labels(
    rows: list[_Row], class_names: Sequence[str] | None, num_labels: int | None
) -> tuple[list[int], list[str] | None]:
    """Return the labels as integers, and the names of the classes where known."""
    names = list(class_names) if class_names is not None else None
    known = set(names or ())
    if not all(_is_integer(row.label) for row in rows) or (names and all(row.label in known for row in rows)):
        names = names or sorted({row.label for row in rows})
        place = {name: i for i, name in enumerate(names)}
        _refuse(
            [f"{r.where} ({r.label!r})" for r in rows if r.label not in place],
            f"class not among the {len(place)} known",
        )
        labels = [place[row.label] for row in rows]
    else:
        labels = [int(row.label) for row in rows]
    bounds = [count for count in (num_labels, len(names) if names else None) if count is not None]
    highest = min(bounds, default=max(labels) + 1)
    wrong = [f"{r.where} ({r.label})" for r, label in zip(rows, labels, strict=True) if not 0 <= label < highest]
    _refuse(wrong, f"label out of range; {highest} classes are labelled 0 to {highest - 1}")
    return labels, names


def _label_lists(
    rows: list[_Row], class_names: Sequence[str] | None, num_labels: int | None
) -> tuple[list[list[int]], list[str]]:
    """Return the labels of each row, which are joined by commas, as integers, and the names of all labels."""
    parts = [[row._replace(label=part) for part in row.label.split(",")] for row in rows]
    _refuse([f"{r.where} ({r.label!r})" for r in rows if "" in r.label.split(",")], "an empty name among the labels")
    flat, names = _integer_labels([part for of_row in parts for part in of_row], class_names, num_labels)
    labels = iter(flat)
    of_rows = [sorted({next(labels) for _ in of_row}) for of_row in parts]
    return of_rows, names or [str(i) for i in range(num_labels or max(flat) + 1)]


def _numbers(rows: list[_Row]) -> list[float]:
    wrong = [f"{row.where} ({row.label!r})" for row in rows if not _is_number(row.label)]
    _refuse(wrong, "label is not a finite number; problem_type=regression takes 'path number'")
    return [float(row.label) for row in rows]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_integer(text: str) -> bool:
    return text.lstrip("-").isdecimal()


# ---------------------------------------------------------------------- checking


def check_readable(
    rows: Dataset, *, frames_needed: int = 1, sample: int | None = 256, num_threads: int | None = None
) -> list[VideoError]:
    """Open the videos of the rows, decode the first frame of each and return one VideoError for each that fails.

    Videos of fewer than `frames_needed` frames are named in a warning. At most `sample` videos are opened, evenly
    spread over the rows; None opens all.
    """
    count = len(rows) if sample is None else min(sample, len(rows))
    chosen = rows.select([i * len(rows) // count for i in range(count)])["video"] if count else []
    with ThreadPoolExecutor(num_threads or min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(_try_open, chosen))
    _warn_of_short(chosen, found, frames_needed)
    return [error for error in found if isinstance(error, VideoError)]


def _try_open(video: Any) -> VideoInfo | VideoError:
    try:
        return probe(**_source_of(video))
    except VideoError as error:
        return error


def _warn_of_short(videos: list, found: list[VideoInfo | VideoError], frames_needed: int) -> None:
    lengths = [getattr(info, "num_frames", frames_needed) for info in found]
    short = [
        f"{video['path'] if isinstance(video, dict) else video} ({length})"
        for video, length in zip(videos, lengths, strict=True)
        if length < frames_needed
    ]
    if short:
        what = f"fewer frames than the {frames_needed} that a clip spans; the last one is repeated"
        logger.warning("%s: %s", _named(short), what)


def _source_of(video: Any) -> dict[str, Any]:
    """Arguments of `open_video` for a cell of the column `video`: a path, or {"path", "bytes"} as datasets has it."""
    if isinstance(video, dict):
        return {"source": video["bytes"] or video["path"], "name": video["path"]}
    return {"source": video}


# ---------------------------------------------------------------------- clips


def seed_of(*, seed: int, epoch: int, index: int) -> int:
    """Return the seed of one sample: a function of (seed, epoch, index) and of nothing else."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator))


def epoch_order(*, num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the permutation of the rows (num_rows,) in an epoch."""
    generator = torch.Generator().manual_seed(seed_of(seed=seed, epoch=epoch, index=num_rows))
    return torch.randperm(num_rows, generator=generator)


def replacements(*, index: int, order: torch.Tensor) -> list[int]:
    """Return the indices that stand in for an unreadable video: those that follow it in the epoch's order, cyclically.

    At most MAX_REPLACEMENTS, and never the index itself.
    """
    place = int((order == index).nonzero()[0])
    following = torch.roll(order, -place - 1)[:-1]
    return following[:MAX_REPLACEMENTS].tolist()


class VideoClips(torch.utils.data.Dataset):
    """Training clips: item i is {"pixel_values" uint8 (T, C, h, w), "labels", "index", "seed", "bad"}.

    Frames and augmentation are drawn from (seed, epoch, index) alone: the same for any number of workers and
    processes. `set_epoch` reaches workers that are running already. `labels` is there where the rows have labels.
    A video that cannot be read is replaced by the next one of the epoch's order (see `replacements`) and reported in
    "bad", a list of (path, reason); `index` is that of the row that was read. `seed` is for what else is drawn for the
    clip on its way through the model; it follows from (seed, epoch, index) too.

    Args:
        rows: dataset with `video` and perhaps `label`. transform: clip uint8 (T, C, H, W) -> clip uint8 (T, C, h, w).
        num_frames, frame_step, num_input_frames, frame_sampling: see `everest_hf.video.frame_indices`.
    """

    def __init__(
        self,
        rows: Dataset,
        transform: Callable[[torch.Tensor], torch.Tensor],
        *,
        num_frames: int,
        frame_step: int = 1,
        num_input_frames: int | None = None,
        frame_sampling: str = "stride",
        seed: int = 0,
        backend: str = "decord",
    ):
        self.rows, self.transform, self.seed, self.backend = rows, transform, seed, backend
        self.sampling = {
            "frame_sampling": frame_sampling,
            "num_frames": num_frames,
            "frame_step": frame_step,
            "num_input_frames": num_input_frames,
        }
        # In shared memory, so that a worker that started in an earlier epoch sees the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> int:
        """Epoch that items are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the items of another epoch, also in running workers. Call it between epochs."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {**self._read(index), "bad": []}
        except VideoError as error:
            return self._read_replacement(index, error)

    def _read(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        generator = torch.Generator().manual_seed(seed_of(seed=self.seed, epoch=self.epoch, index=index))
        clip = read_clip(
            **_source_of(row["video"]),
            indices_of=lambda count: frame_indices(num_video_frames=count, generator=generator, **self.sampling),
            backend=self.backend,
        )
        # A seed of its own: from the same one, the place of the crop would follow from the choice of frames.
        with transforms.seeded(_draw_seed(generator)):
            item = _item(self.transform(clip), self.rows, row, index)
        return {**item, "seed": _draw_seed(generator)}

    def _read_replacement(self, index: int, error: VideoError) -> dict[str, Any]:
        bad = [(error.path, error.reason)]
        order = epoch_order(num_rows=len(self), seed=self.seed, epoch=self.epoch)
        for candidate in replacements(index=index, order=order):
            try:
                return {**self._read(candidate), "bad": bad}
            except VideoError as next_error:
                bad.append((next_error.path, next_error.reason))
        raise VideoError(
            error.path, f"{error.reason}; nor could any of the {len(bad) - 1} videos tried in its place be read"
        )


class VideoViews(torch.utils.data.Dataset):
    """Evaluation: item i is {"pixel_values" uint8 (V, T, C, h, w), "labels", "index"}, all V views of one video.

    V = num_segments * num_crops, segment-major. A video is one item, so that it is opened and decoded once and the
    mean over its views needs no other process. A video that cannot be read raises a VideoError, or with
    count_unreadable gives black views, with (path, reason) in "bad": it is never skipped.

    Args: as in `VideoClips`; size: height and width of a view; num_segments, num_crops: views in time and in space.
    """

    def __init__(
        self,
        rows: Dataset,
        size: tuple[int, int],
        *,
        num_frames: int,
        frame_step: int = 1,
        num_input_frames: int | None = None,
        frame_sampling: str = "stride",
        num_segments: int = 1,
        num_crops: int = 1,
        backend: str = "decord",
        count_unreadable: bool = False,
    ):
        self.rows, self.size, self.backend, self.count_unreadable = rows, tuple(size), backend, count_unreadable
        self.num_segments, self.num_crops = num_segments, num_crops
        self.sampling = {
            "frame_sampling": frame_sampling,
            "num_frames": num_frames,
            "frame_step": frame_step,
            "num_input_frames": num_input_frames,
            "num_segments": num_segments,
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, bad = self.rows[index], []
        try:
            views = self._read(row)
        except VideoError as error:
            if not self.count_unreadable:
                raise
            views, bad = self._black(), [(error.path, error.reason)]
        return {**_item(views, self.rows, row, index), "unreadable": bool(bad), "bad": bad}

    def _read(self, row: dict[str, Any]) -> torch.Tensor:
        clip = read_clip(**_source_of(row["video"]), indices_of=self._indices, backend=self.backend)
        crops = transforms.evaluation_crops(clip, self.size, self.num_crops)  # (crops, segments * T, C, h, w)
        return crops.unflatten(1, (self.num_segments, -1)).transpose(0, 1).flatten(0, 1)  # (V, T, C, h, w)

    def _black(self) -> torch.Tensor:
        frames = self.sampling["num_input_frames"] or self.sampling["num_frames"]
        return torch.zeros(self.num_segments * self.num_crops, frames, 3, *self.size, dtype=torch.uint8)

    def _indices(self, num_video_frames: int) -> list[int]:
        segments = range(self.num_segments)
        return [
            i for k in segments for i in frame_indices(num_video_frames=num_video_frames, segment=k, **self.sampling)
        ]


def _item(pixel_values: torch.Tensor, rows: Dataset, row: dict[str, Any], index: int) -> dict[str, Any]:
    item = {"pixel_values": pixel_values.contiguous(), "index": index}
    return item if row.get("label") is None else {**item, "labels": _label_of(row["label"], rows)}


def _label_of(label: int | float | list[int], rows: Dataset) -> int | torch.Tensor:
    """Return a label as the model takes it: a class id, a number (), or 0 and 1 for each label (labels,)."""
    if isinstance(label, list):
        wanted = torch.zeros(len(class_names_of(rows)))
        wanted[label] = 1
        return wanted
    return torch.tensor(label) if isinstance(label, float) else label


# ---------------------------------------------------------------------- batches


class EpochSampler(Sampler[int]):
    """The order of the rows of a VideoClips in its epoch, the same in every process.

    An epoch is whole steps of `total_batch` clips; what is left over, different rows in each epoch, is left out.
    """

    def __init__(self, clips: VideoClips, total_batch: int = 1):
        self.clips, self.start = clips, 0
        self.stop = len(clips) // total_batch * total_batch

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Give the order of an epoch, without the first `start` rows, which all processes together have had of it.

        Without `start`, an epoch that is set already keeps what it has (Accelerate's loaders set it once more
        whenever they are iterated), and another one starts at 0.
        """
        if start is None:
            start = self.start if epoch == self.clips.epoch else 0
        self.start = start
        self.clips.set_epoch(epoch)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self):
        order = epoch_order(num_rows=len(self.clips), seed=self.clips.seed, epoch=self.clips.epoch)
        yield from order[self.start : self.stop].tolist()


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of items: pixel_values uint8 (B, …), labels (B,), index (B,), seed int64 (B,) of training clips.

    "bad" is the list of the (path, reason) of all items.
    """
    bad = [entry for item in items for entry in item.get("bad", ())]
    tensors = [{key: value for key, value in item.items() if key != "bad"} for item in items]
    return {**default_collate(tensors), "bad": bad}


class BadVideos:
    """Counts how often an unreadable video came up in a run, and logs each path once, with its reason."""

    def __init__(self):
        self.reasons: dict[str, str] = {}
        self.count = 0

    def take(self, batch: dict[str, Any]) -> int:
        """Take "bad" out of a batch, so that the rest can go to the model; return how many it reports."""
        bad = batch.pop("bad", [])
        self.count += len(bad)
        for path, reason in bad:
            if path not in self.reasons:
                self.reasons[path] = reason
                logger.warning("unreadable video replaced: %s: %s", path, reason)
        return len(bad)
