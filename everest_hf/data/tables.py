"""Data sets that `datasets` opens: parquet, arrow and webdataset files, saved folders, names on the Hub.

A row holds a video in a column of paths, of bytes, or of both ({"bytes", "path"}, the type Video), and perhaps a label.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    Video,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from ..video import Segment, VideoError
from .rows import LIST_SUFFIXES, Row, as_cell, class_names_in, encode_labels, refuse
from .segments import FEATURES, WHERE, columns_with, segment_columns, segment_of, segments_of
from .shards import ShardError, check_shards

# The builders of `datasets` by the suffix of the files.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_HUB_NAME = re.compile(r"(?P<path>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<name>[\w.-]+))?")
# Where a label is looked for: the usual name, then what webdataset makes of .cls, .json and .txt files.
_LABELS, _WEBDATASET_LABELS = ("label",), ("cls", "json.label", "txt")
_BYTES_AND_PATH = {"bytes", "path"}
# Types of a cell, by the names that datasets gives those of Arrow; pandas writes the large ones, polars the views.
_TEXT, _BYTES = ("string", "large_string", "string_view"), ("binary", "large_binary", "binary_view")


# ---------------------------------------------------------------------- opening


def arguments_of(source: str) -> dict[str, Any] | None:
    """Return what `load_dataset` is called with for a source; None for a list file and a folder of videos.

    Raises:
        FileNotFoundError: the source is neither a file or folder nor what can be a name on the Hub.
        ValueError: a pattern matches files of several kinds, or of none that is known.
    """
    if os.path.isdir(source):
        return {"path": source} if is_saved(source) or _holds_data_files(Path(source)) else None
    if os.path.isfile(source) and Path(source).suffix.lower() not in BUILDERS:
        return None
    files = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
    if files:
        return {"path": _builder(source, files), "data_files": [glob.escape(os.path.abspath(file)) for file in files]}
    name = _HUB_NAME.fullmatch(source)
    # A path with a slip in it is not to be looked for on the Hub.
    if name is None or Path(source).suffix in (*LIST_SUFFIXES, *BUILDERS) or Path(source).parent.is_dir():
        raise FileNotFoundError(f"{source}: no such list file, folder of videos or data set")
    return name.groupdict()


def as_table(source: Any, split: str | None) -> tuple[str, Dataset]:
    """Return what errors call an object that holds rows, a Dataset, DatasetDict or pandas DataFrame, and its rows.

    Raises:
        TypeError: it is no such object.
        ValueError: there is no such split, or several and `split` is None; or a column of a DataFrame is of no type
            that Arrow has.
    """
    name = type(source).__name__
    if isinstance(source, DatasetDict):
        return name, source[_chosen(split, list(source), name)].with_format(None)
    if not isinstance(source, (Dataset, pd.DataFrame)):
        raise TypeError(
            f"source is of the type {name}; it must be a path, a name on the Hub, or a datasets.Dataset, "
            "datasets.DatasetDict or pandas.DataFrame in memory"
        )
    if split is not None:
        raise ValueError(f"split is {split!r}, but a {name} is one split already")
    if isinstance(source, Dataset):
        return name, source.with_format(None)
    try:
        return name, Dataset.from_pandas(source, preserve_index=False)
    except pa.ArrowException as error:
        raise ValueError(f"{name}: {' '.join(map(str, error.args))}") from error


def is_saved(source: str) -> bool:
    """Say whether a source is a folder that `save_to_disk` wrote."""
    return any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json"))


def _holds_data_files(folder: Path) -> bool:
    """Say whether a folder, or one in it, holds data files and not videos, as folders of classes do."""
    return any(next(folder.glob(f"{depth}*{suffix}"), None) for suffix in BUILDERS for depth in ("", "*/"))


def _builder(source: str, files: list[str]) -> str:
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in BUILDERS:
        raise ValueError(f"{source}: files ending in {', '.join(suffixes)}; expected one of {', '.join(BUILDERS)}")
    return BUILDERS[suffixes[0]]


def open_table(
    source: str,
    arguments: dict[str, Any],
    split: str | None,
    video_column: str | None = None,
    *,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Return a split of the data set that `load_dataset` opens with the arguments.

    Raises:
        ValueError: it cannot be opened, or there is no such split, or several and `split` is None; or a sample of a
            webdataset file has not one video.
    """
    try:
        if is_saved(source):
            saved = load_from_disk(source)
            splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
            return splits[_chosen(split, list(splits), source)]
        _check_shards(arguments, video_column, streaming)
        splits = load_dataset(**arguments, streaming=True)  # which reads no more than what there is
        split = _chosen(split, list(splits), source)
        # Streams of the Hub decode with torchcodec by themselves, which no change of the columns' types ends.
        if streaming:
            return splits[split] if splits[split].features is None else splits[split].decode(False)
        return load_dataset(**arguments, split=split)
    except (_SplitError, ShardError):
        raise
    except Exception as error:  # of all libraries between the name and the data
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        what = "cannot be opened as a data set" if _is_local(arguments) else "no file or folder here; on the Hub"
        raise ValueError(f"{source}: {what}: {reason}") from error


def _check_shards(arguments: dict[str, Any], video_column: str | None, streaming: bool) -> None:
    """Check webdataset files of this machine, all of them once: what is in the cache of `datasets` was checked."""
    if arguments["path"] in ("parquet", "arrow") or not _is_local(arguments):
        return
    builder = load_dataset_builder(**arguments)
    files = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    shards = [file for file in files if Path(file).suffix.lower() == ".tar"]
    if shards and (streaming or not os.path.isdir(builder.cache_dir)):
        check_shards(shards, video_column, first_only=streaming)


def _is_local(arguments: dict[str, Any]) -> bool:
    return "data_files" in arguments or os.path.isdir(arguments["path"])


class _SplitError(ValueError):
    """The split is to be named."""


def _chosen(split: str | None, splits: list[str], source: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split in splits:
        return split
    what = "several splits" if split is None else f"no split {split!r}"
    raise _SplitError(f"{source}: has {what}; choose one of {splits} (train_split, val_split)")


# ---------------------------------------------------------------------- columns


class Columns(NamedTuple):
    """Where a data set has its videos and labels: a column, and the way to it, ("json", "label"); () for no labels."""

    video: str
    label: tuple[str, ...]
    label_feature: Any

    def label_of(self, cell: Any) -> str | list | None:
        """Return the label in a cell of its column, as text."""
        for field in self.label[1:]:
            cell = (cell or {}).get(field)
        return _as_text(cell, self.label_feature)

    def class_names(self) -> list[str] | None:
        """Return the names of the classes, where the data set has them."""
        return class_names_in(self.label_feature)


def _as_text(label: Any, feature: Any) -> str | list | None:
    if isinstance(label, list):
        return [_as_text(one, feature.feature) for one in label]
    if isinstance(feature, ClassLabel):
        return None if label is None or label < 0 else feature.names[label]  # -1: not told, as in test splits
    return None if label is None else str(int(label) if isinstance(label, bool) else label)


def columns_of(features: Features, video: str | None, label: str | None, source: str) -> Columns:
    """Find the columns of a data set; `video` and `label` name them where their names and types do not.

    Raises:
        ValueError: there is no such column, or none or several that can be the videos'.
    """
    usual = _LABELS + (_WEBDATASET_LABELS if "__key__" in features else ())
    way = next((way for name in usual if (way := _way_to(features, name))), ()) if label is None else ()
    if label is not None and not (way := _way_to(features, label)):
        raise ValueError(f"{source}: has no column {label!r}; it has {list(features)}")
    video = _video_column(features, way, source) if video is None else video
    if video not in features:
        raise ValueError(f"{source}: has no column {video!r}; it has {list(features)}")
    if not (_holds_bytes(features[video]) or _is_one_of(_TEXT, features[video])) or (video,) == way:
        raise ValueError(f"{source}: the column {video!r} does not hold videos; the columns are {list(features)}")
    return Columns(video, way, _at(features, way))


def _way_to(features: Features, name: str) -> tuple[str, ...]:
    """Return the column, or the column and its fields, that a name like "json.label" stands for; () for none."""
    for way in ((name,), tuple(name.split("."))):
        if _at(features, way) is not None:
            return way
    return ()


def _at(features: Any, way: tuple[str, ...]) -> Any:
    for name in way:
        features = features.get(name) if isinstance(features, dict) else None
    return features if way else None


def _video_column(features: Features, label: tuple[str, ...], source: str) -> str:
    if "video" in features:
        return "video"
    sure = [name for name, feature in features.items() if _holds_bytes(feature)]
    texts = [name for name, feature in features.items() if _is_one_of(_TEXT, feature) and (name,) != label]
    texts = [name for name in texts if name == "file_name"] or texts  # as the folders of `datasets` call it
    found = sure or [name for name in texts if not name.startswith("__")]  # webdataset's own begin so
    if len(found) != 1:
        what = f"{', '.join(found)} may be" if found else "none is"
        raise ValueError(f"{source}: has the columns {list(features)}; {what} the videos': name it as video_column")
    return found[0]


def _holds_bytes(feature: Any) -> bool:
    is_both = isinstance(feature, dict) and _BYTES_AND_PATH.issuperset(feature) and "bytes" in feature
    return is_both or isinstance(feature, Video) or _is_one_of(_BYTES, feature)


def _is_one_of(types: tuple[str, ...], feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in types


# ---------------------------------------------------------------------- rows


def rows_of(table: Dataset, columns: Columns, source: str, root: Path) -> tuple[Dataset | None, list[Row]]:
    """Return the column `video`, or None where the rows' paths are all there is of it, and the rows."""
    videos = _as_stored(table, columns).select_columns(["video"])
    paths = _paths(videos, source, root)
    labels: list[Any] = [None] * len(table)
    if columns.label:
        column = columns.label[0]
        labels = [columns.label_of(cell) for cell in table.select_columns([column])[:][column]]
    places = [f"{source} row {i}" for i in range(len(table))]
    pair = segment_columns(table.column_names, source)
    segments: list[Segment | None] = [None] * len(table)
    if pair:
        cells = table.select_columns(list(pair))[:]
        segments = segments_of([cells[name] for name in pair], pair, places)
    rows = [Row(*row) for row in zip(paths or places, labels, places, segments, strict=True)]
    return None if paths else videos, rows


def _as_stored(
    table: Dataset | IterableDataset, columns: Columns, others: Sequence[str] = ()
) -> Dataset | IterableDataset:
    """Return the data set with its videos in `video`, as they are stored: `datasets` is to decode none."""
    names = (name for name in ("__url__", "__key__") if name in table.column_names)  # webdataset's, for errors
    table = table.select_columns([columns.video, *columns.label[:1], *others, *names])
    if isinstance(table.features[columns.video], Video):
        table = table.cast_column(columns.video, Video(decode=False))
    return table if columns.video == "video" else table.rename_column(columns.video, "video")


def _paths(videos: Dataset, source: str, root: Path) -> list[str] | None:
    """Return the paths of the videos, absolute; None where there are bytes."""
    feature = videos.features["video"]
    if _holds_bytes(feature):
        stored = videos.data.column("video")  # of rows that were chosen or shuffled, of all there were before
        if _is_one_of(_BYTES, feature) or pc.struct_field(stored, "bytes").null_count < len(stored):
            return None
    column = videos.with_format("arrow")[:]["video"]
    paths = (pc.struct_field(column, "path") if pa.types.is_struct(column.type) else column).to_pylist()
    refuse([f"{source} row {i}" for i, path in enumerate(paths) if not path], "neither a path nor bytes of a video")
    return [absolute(path, root) for path in paths]


def absolute(path: str, root: Path) -> str:
    """Return a path that starts from `root` where it is relative, or at home for ~; an address, hf://…, as it is."""
    return path if "://" in path else os.path.abspath(root / os.path.expanduser(path))


class _StreamedRow:
    """Makes a row of what a stream has at a time; a class, as workers take it along."""

    def __init__(
        self,
        columns: Columns,
        segments: tuple[str, str] | None,
        source: str,
        root: Path,
        class_names: list[str] | None,
        problem_type: str,
    ):
        self.columns, self.segments, self.source, self.root = columns, segments, source, root
        self.class_names, self.problem_type = class_names, problem_type

    def __call__(self, cells: dict[str, Any]) -> dict[str, Any]:
        cell = as_cell(cells["video"])
        if cell["bytes"] is None and not cell["path"] and "__url__" in cells:
            raise VideoError(cells["__url__"], f"the sample {cells['__key__']} has no video")
        if cell["bytes"] is None and cell["path"]:
            cell["path"] = absolute(cell["path"], self.root)
        name = cell["path"] or "a video"
        try:
            return {"video": cell, **self._segment(cells, name), **self._label(cells, name)}
        except ValueError as error:
            raise VideoError(self.source, str(error)) from error  # which leaves a decoding process as one line

    def _segment(self, cells: dict[str, Any], name: str) -> dict[str, Any]:
        if self.segments is None:
            return {}
        segment = segment_of([cells[column] for column in self.segments], self.segments, name)
        values = {column: cell for column, (cell,) in columns_with([segment]).items()}
        return {column: values.get(column) for column in (*self.segments, WHERE)}

    def _label(self, cells: dict[str, Any], name: str) -> dict[str, Any]:
        if not self.columns.label:
            return {}
        text = self.columns.label_of(cells[self.columns.label[0]])
        refuse([name] * (text is None), "no label")
        (label,), _ = encode_labels([Row("", text, name)], self.class_names, None, self.problem_type)
        return {"label": label}


def stream_rows(
    table: IterableDataset, columns: Columns, source: str, root: Path, num_labels: int | None, problem_type: str
) -> IterableDataset:
    """Return the rows of a stream: column `video`, {"bytes", "path"}, and `label` where there is one.

    Raises:
        ValueError: the number of classes is not known; and while the rows are read, a label is wrong.
    """
    features: dict[str, Any] = {"video": Video(decode=False)}
    class_names = columns.class_names()
    if columns.label:
        if class_names is None and problem_type != "regression":
            if num_labels is None:
                raise ValueError(
                    f"{source}: a stream does not tell its classes beforehand; it needs labels that are a ClassLabel, "
                    "or integers and num_classes"
                )
            class_names = [str(i) for i in range(num_labels)]
        _, features["label"] = encode_labels([], class_names, None, problem_type)
    segments = segment_columns(table.column_names, source)
    features |= {name: FEATURES[name] for name in ((*segments, WHERE) if segments else ())}
    table = _as_stored(table, columns, segments or ())
    row_of = _StreamedRow(columns, segments, source, root, class_names, problem_type)
    return table.map(row_of, remove_columns=table.column_names, features=Features(features))
