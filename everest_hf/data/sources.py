"""A source of videos by its name: list files and folders here, what `datasets` opens in tables.py."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, IterableDataset

from . import tables
from .rows import VIDEO_SUFFIXES, Row, as_dataset, is_video, refuse

logger = logging.getLogger(__name__)

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


def load_videos(
    source: str | os.PathLike,
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

    - a list file with "path label" a line, split at the last blank, so that a path may contain blanks; a label is an
      integer or a class name. Relative paths start at `data_root`, by default at the list's own folder;
    - a folder with a folder of videos for each class; `split` then names a sub-folder such as "train";
    - a data set (see `everest_hf.data.tables`): parquet, arrow or webdataset .tar files by path or pattern, a
      folder of them, a folder of `save_to_disk`, or a name on the Hub, "owner/name" or "owner/name:config". `split`
      is needed where there are several, `video_column` and `label_column` where the columns are not told by their
      names and types; "json.label" is a field of a column.

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
            a suffix that is not a video's.
    """
    source, videos = os.fspath(source), None
    root = _root(source, data_root)
    if arguments := tables.arguments_of(source):
        table = tables.open_table(source, arguments, split, video_column)
        columns = tables.columns_of(table.features, video_column, label_column, source)
        videos, rows = tables.rows_of(table, columns, source, root)
        rows = _checked(rows, table.column_names, source, labels_required)
        class_names = class_names or columns.class_names()
    elif os.path.isdir(source):
        rows = _rows_of_folder(_split_folder(Path(source), split), labels_required)
    elif split is not None:
        raise ValueError(f"split is {split!r}, but {source} is a list file; a list is one split already")
    else:
        rows = _rows_of_list(Path(source), root, labels_required)
    if check_files and videos is None:
        _check_files(rows, source)
    return as_dataset(rows, videos, class_names, num_labels, problem_type)


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
    source = os.fspath(source)
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
    return Path(data_root) if data_root else path if path.is_dir() else path.parent


# ---------------------------------------------------------------------- lists


def _rows_of_list(path: Path, root: Path, labels_required: bool) -> list[Row]:
    lines = _text_of(path).splitlines()
    rows = [_row_of_line(line, f"{path}:{i}", root) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: the list is empty; expected lines of the form 'path label'")
    if labels_required:
        unlabelled = [row.where for row in rows if row.label is None]
        refuse(unlabelled, "line without label; expected 'path label'")
    wrong = [f"{row.where} ({row.path})" for row in rows if not is_video(row.path)]
    refuse(wrong, f"not a video; expected a path ending in one of {', '.join(VIDEO_SUFFIXES)}")
    return rows


def _text_of(path: Path) -> str:
    if is_video(path.name):
        raise ValueError(f"{path}: a video, not a list of videos; expected a text file with 'path label' a line")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8; expected a list with 'path label' a line") from error


def _row_of_line(line: str, where: str, root: Path) -> Row:
    path, label = line.strip(), None
    head, *tail = path.rsplit(None, 1)
    # A last word that is itself a video file belongs to a path with blanks: the line has no label.
    if tail and not is_video(tail[0]):
        path, label = head, tail[0]
    return Row(os.path.abspath(root / path), label, where)


# ---------------------------------------------------------------------- folders


def _split_folder(folder: Path, split: str | None) -> Path:
    sub_folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if split is not None:
        if split not in sub_folders:
            raise FileNotFoundError(f"{folder}: has no sub-folder {split!r}; it has {sub_folders}")
        return folder / split
    if sub_folders and SPLIT_NAMES.issuperset(sub_folders):
        raise ValueError(f"{folder}: its sub-folders {sub_folders} are splits, not classes; choose one by split=")
    return folder


def _rows_of_folder(folder: Path, labels_required: bool) -> list[Row]:
    rows: list[Row] = []
    ignored: list[Row] = []
    for parent, sub_folders, names in os.walk(os.path.abspath(folder)):
        sub_folders[:] = sorted(name for name in sub_folders if not name.startswith("."))
        parts = Path(parent).relative_to(os.path.abspath(folder)).parts
        label = parts[0] if parts else None
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(parent, name)
            (rows if is_video(name) else ignored).append(Row(path, label, path))
    if not rows:
        raise ValueError(f"{folder}: no video in it; expected files ending in one of {', '.join(VIDEO_SUFFIXES)}")
    if ignored:
        logger.warning("%s: %d files that are not videos are ignored, e.g. %s", folder, len(ignored), ignored[0].path)
    if labels_required:
        refuse([row.where for row in rows if row.label is None], "video outside of a class folder")
    return rows


def _check_files(rows: list[Row], source: str) -> None:
    missing = [row.path for row in rows if "://" not in row.path and not os.path.isfile(row.path)]
    refuse(missing, f"no such video file (named by {source}, {len(rows)} videos)", FileNotFoundError)
