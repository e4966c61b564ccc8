"""A source of videos: list files and folders here, what `datasets` opens or holds in tables.py."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset

from ..files import printable
from ..video.pictures import is_folder_of_pictures, is_picture
from . import labels, tables
from .lists import read_list
from .rows import VIDEO_SUFFIXES, Row, as_dataset, class_names_of, is_video, refuse

logger = logging.getLogger(__name__)

# The files in which folders of `datasets` name their videos.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


def load_videos(
    source: str | os.PathLike | Dataset | DatasetDict | pd.DataFrame,
    *,
    data_root: str | os.PathLike | None = None,
    split: str | None = None,
    video_column: str | None = None,
    label_column: str | None = None,
    labels_required: bool = True,
    class_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    problem_type: str = "single_label_classification",
    check_files: bool = True,
) -> Dataset:
    """Return the rows of a source: column `video` (absolute path, or what holds the bytes) and perhaps `label`.

    `source` is one of

    - a list file (see `everest_hf.data.lists`): "path label" a line, split at the last blank, so that a path may
      contain blanks; csv or tsv, whose first line names the columns or is a video and its label; json or jsonl. A label
      is an integer or a class name. Relative paths start at `data_root`, by default at the list's own folder;
    - a folder with metadata.csv, .jsonl or .parquet, whose column file_name names its videos;
    - a folder with a folder of videos (files, or folders of frames) for each class, links followed; `split` then names a
      sub-folder such as "train";
    - a data set (see `everest_hf.data.tables`): parquet, arrow or webdataset .tar files by path or pattern, a
      folder of them, a folder of `save_to_disk`, or a name on the Hub, "owner/name" or "owner/name:config". `split`
      is needed where there are several, `video_column` and `label_column` where the columns are not told by their
      names and types; "json.label" is a field of a column;
    - a data set in memory: a datasets.Dataset or DatasetDict, or a pandas DataFrame.

    What has columns may have `start` and `end`, in seconds, or `start_frame` and `end_frame`: a row is then this segment
    of its video, and the result has these columns, and `where`, which names the row for errors.

    With labels_required=False a list may be paths alone, a folder need not have class folders, a data set no labels;
    `label` is there where every row has one. `class_names` (those of the training set, or of a checkpoint) fixes the
    order of the classes; otherwise it is the data set's, or names are sorted. `label` is an integer, a ClassLabel
    where names are known. `num_labels` bounds integer labels. With problem_type "multi_label_classification" a list
    gives several integers or names joined by commas, "path a,b", and `label` is a list of ClassLabels; with
    "regression" a list gives a number, and `label` is a float. With check_files=False missing videos stay in the
    rows, to be found when they are opened.

    Raises:
        FileNotFoundError: source or videos are missing; the first few are named.
        ValueError: no rows, no such split or column, a row without label, a label out of range, unknown or no number,
            a suffix that is not a video's. With labels_required also labels that cannot be meant (see
            `everest_hf.data.labels`) and, without class_names, an empty class folder; otherwise these are warnings.
        TypeError: source is none of these.
    """
    name, root, table = _open(source, data_root, split, video_column)
    videos, declared, is_folder = None, class_names, table is None and os.path.isdir(name)
    if table is not None:
        columns = tables.columns_of(table.features, video_column, label_column, name)
        videos, rows = tables.rows_of(table, columns, name, root)
        rows = _checked(rows, table.column_names, name, labels_required)
        declared = class_names or columns.class_names()
    elif is_folder:
        rows = _rows_of_folder(name, split, labels_required, class_names)
    else:
        rows = read_list(
            Path(name), root, video_column=video_column, label_column=label_column, labels_required=labels_required
        )
    if check_files and videos is None:
        _check_files(rows, name)
    has_classes = problem_type != "regression" and all(row.label is not None for row in rows)
    if has_classes and declared is None and not is_folder:
        labels.check_texts(rows, problem_type, learned=labels_required)
    dataset = as_dataset(rows, videos, declared, num_labels, problem_type)
    if has_classes and videos is None:
        labels.check_contradictions(rows, problem_type, learned=labels_required)
    if class_names is None:
        labels.warn_of_similar(class_names_of(dataset), name)
    return dataset


def _open(
    source: Any, data_root: str | os.PathLike | None, split: str | None, video_column: str | None
) -> tuple[str, Path, Dataset | None]:
    """Return what errors call a source, the folder of relative paths, and the data set if it is one."""
    if not isinstance(source, (str, os.PathLike)):
        name, table = tables.as_table(source, split)
        return name, _root("", data_root), table
    name = os.path.expanduser(source)
    if os.path.isdir(name) and (described := described_folder(name, split)):
        name, split = str(described), None
    arguments = tables.arguments_of(name)
    table = tables.open_table(name, arguments, split, video_column) if arguments else None
    if table is None and split is not None and not os.path.isdir(name):
        raise ValueError(f"split is {split!r}, but {name} is a list file; a list is one split already")
    return name, _root(name, data_root), table


def _checked(rows: list[Row], columns: list[str], source: str, labels_required: bool) -> list[Row]:
    """Return the rows of a data set if there are any and they have the labels that are required."""
    if not rows:
        raise ValueError(f"{source}: the data set is empty")
    if not labels_required:
        # Several labels a row would be refused where one is due; here none is.
        return [row._replace(label=None) if isinstance(row.label, list) else row for row in rows]
    unlabelled = [row.where for row in rows if row.label is None]
    refuse(unlabelled, _no_label(columns))
    return rows


def _no_label(columns: list[str]) -> str:
    return f"no label; the columns are {columns}, and label_column names the one with labels"


def stream_videos(
    source: str | os.PathLike,
    *,
    data_root: str | os.PathLike | None = None,
    split: str | None = None,
    video_column: str | None = None,
    label_column: str | None = None,
    labels_required: bool = True,
    num_labels: int | None = None,
    problem_type: str = "single_label_classification",
) -> IterableDataset:
    """Return the rows of a data set as a stream, for sets larger than the disk: nothing is copied, no length is known.

    Arguments, columns and errors as in `load_videos`, but `label` is there only if labels_required. Lists, folders of
    videos and saved folders are not streamed: they are read where they lie. As nobody counts the classes beforehand,
    class names come from the data set's ClassLabel, and integers need `num_labels`.
    """
    source = os.path.expanduser(source)
    arguments = tables.arguments_of(source)
    if arguments is None or tables.is_saved(source):
        raise ValueError(f"{source}: is read where it lies, nothing is copied; leave out streaming")
    table = tables.open_table(source, arguments, split, video_column, streaming=True)
    if table.features is None:
        raise ValueError(f"{source}: its columns are not known before it is read; leave out streaming")
    columns = tables.columns_of(table.features, video_column, label_column, source)
    if not labels_required:
        columns = columns._replace(label=())
    elif not columns.label:
        raise ValueError(f"{source}: {_no_label(table.column_names)}")
    return tables.stream_rows(table, columns, source, _root(source, data_root), num_labels, problem_type)


def _root(source: str, data_root: str | os.PathLike | None) -> Path:
    """Folder that relative paths of a source start from."""
    path = Path(source)
    return Path(data_root).expanduser() if data_root else path if path.is_dir() else path.parent


# ---------------------------------------------------------------------- folders


def described_folder(folder: str, split: str | None) -> Path | None:
    """Return the file that names the videos of a folder as `datasets` has it (VideoFolder), None where there is none.

    It is called metadata.csv, .jsonl or .parquet, and has a column file_name.
    """
    where = Path(folder, split or "")
    there = [where / name for name in METADATA if (where / name).is_file()]
    return next((path for path in there if "file_name" in _columns_of(path)), None)


def _columns_of(path: Path) -> str | list[str]:
    """Return the columns of a file, or the line that names them."""
    if path.suffix == ".parquet":
        return pq.read_schema(path).names
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.readline()


def _rows_of_folder(
    source: str, split: str | None, labels_required: bool, class_names: Sequence[str] | None
) -> list[Row]:
    folder = str(_split_folder(Path(source), split))
    rows: list[Row] = []
    frames: list[Row] = []
    ignored: list[str] = []
    classes: dict[str, int] = {}
    for parent, sub_folders, names in walk(os.path.abspath(folder)):
        parts = Path(parent).relative_to(os.path.abspath(folder)).parts
        label = parts[0] if parts else None
        if label is None:
            classes = dict.fromkeys(sub_folders, 0)
        paths = [os.path.join(parent, name) for name in names]
        videos = [Row(path, label, path) for path in paths if is_video(path)]
        ignored += [path for path in paths if not is_video(path)]
        rows += videos
        if label is not None:
            classes[label] += len(videos)
        if any(map(is_picture, names)):
            frames.append(Row(parent, parts[0] if len(parts) > 1 else None, parent))
    if not rows:  # where there are video files, pictures beside them are none
        rows, ignored = frames, [path for path in ignored if not is_picture(os.path.basename(path))]
        classes |= Counter(row.label for row in rows if row.label is not None)
    if not rows:
        raise ValueError(
            f"{folder}: no video in it; expected files ending in one of {', '.join(VIDEO_SUFFIXES)}, or folders of frames"
        )
    if ignored:
        logger.warning(
            "%s: %d files that are not videos are ignored, e.g. %s", folder, len(ignored), printable(ignored[0])
        )
    outside = [row.where for row in rows if row.label is None]
    if split is None and not outside:
        _refuse_splits(folder, {name for name, count in classes.items() if count}, classes)
    if labels_required:
        refuse(outside, "video outside of a class folder")
    if not outside:
        _tell_empty_classes(folder, classes, labels_required and class_names is None)
    return rows


def _tell_empty_classes(folder: str, classes: dict[str, int], must_have_videos: bool) -> None:
    """Tell of class folders without a video; where the folders are what says which classes there are, refuse them."""
    empty = [os.path.join(folder, name) for name, count in classes.items() if not count]
    tell = refuse if must_have_videos else labels.warn
    tell(empty, "a class folder without a video; put videos into it, or take it away if it is no class")


def _split_folder(folder: Path, split: str | None) -> Path:
    sub_folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if split is not None:
        if split not in sub_folders:
            raise FileNotFoundError(f"{folder}: has no sub-folder {split!r}; it has {sub_folders}")
        return folder / split
    splits = SPLIT_NAMES.intersection(sub_folders)
    # A class may be called "train", but hardly two as splits are.
    _refuse_splits(str(folder), splits if len(splits) > 1 else set(sub_folders), sub_folders)
    return folder


def _refuse_splits(folder: str, names: set[str], sub_folders: Iterable[str]) -> None:
    if names and SPLIT_NAMES.issuperset(names):
        raise ValueError(
            f"{folder}: its sub-folders {list(sub_folders)} are splits, not classes; choose one by split= "
            "(train_split, val_split)"
        )


def walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield a folder and all in it, each with its folders and files in order, without those whose names begin with a
    dot. Links are followed; one that leads back to a folder above it is named in a warning and left out.

    Raises:
        OSError: a folder cannot be read.
    """
    real = os.path.realpath(folder)
    if real in above:
        logger.warning("%s: a link to %s, which it lies in itself; it is left out", folder, real)
        return
    with os.scandir(folder) as entries:
        shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        folders = [entry.name for entry in shown if entry.is_dir()]
        files = [entry.name for entry in shown if not entry.is_dir()]
    yield folder, folders, files
    for name in folders:
        yield from walk(os.path.join(folder, name), (*above, real))


def videos_below(folder: str) -> list[str]:
    """Return the paths of the videos in a folder and all in it, sorted; hidden ones are left out, as in training."""
    paths = [os.path.join(parent, name) for parent, _, names in walk(folder) for name in names if is_video(name)]
    return sorted(paths, key=lambda path: path.split(os.sep))


def frame_folders_below(folder: str) -> list[str]:
    """Return the paths of the folders of frames in a folder and all in it, or its own, sorted."""
    paths = [parent for parent, _, names in walk(folder) if any(map(is_picture, names))]
    return sorted(paths, key=lambda path: path.split(os.sep))


def _check_files(rows: list[Row], source: str) -> None:
    paths = [row.path for row in rows if "://" not in row.path and not os.path.isfile(row.path)]
    missing = [path for path in paths if not is_folder_of_pictures(path)]
    refuse(missing, f"no such video file (named by {source}, {len(rows)} videos)", FileNotFoundError)
