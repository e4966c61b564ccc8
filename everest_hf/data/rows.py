"""Rows of a data set of videos: column `video` and, where every row has one, `label`."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from ..files import is_number, printable
from ..video import TIME_LIMIT, Segment, VideoError
from ..video.isolation import Overdue, call_within
from ..video_processing_everest import read_fetched
from .segments import FEATURES, columns_with, segment_in, segments_in

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts")
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")
# A label beyond this is taken for a mistake, such as the number of a video.
MAX_CLASSES = 1_000_000
# Schemes of addresses that are fetched unless more are allowed; those of archives, which are followed by another one;
# those that never are.
_USUAL_SCHEMES, _ARCHIVES, _LOCAL = {"hf"}, {"zip", "tar"}, {"file", "local"}
# How many culprits an error names; the count of all comes beside them.
NAMED_CULPRITS = 3


class Row(NamedTuple):
    """A video as its source has it: its path, its label or labels as text (or None), what an error calls it, and which
    part of it is meant, where that is not all.
    """

    path: str
    label: Any
    where: str
    segment: Segment | None = None


def class_names_of(rows: Dataset | IterableDataset) -> list[str] | None:
    """Return the names of the classes in the order of their integers, or None where they are not known."""
    return class_names_in((rows.features or {}).get("label"))


def class_names_in(feature: Any) -> list[str] | None:
    """Return the names of the classes that the feature of a label, or of a list of labels, has; None for none."""
    feature = getattr(feature, "feature", feature)  # of several labels a video: what each of them is
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def is_video(name: str) -> bool:
    """Say whether a name ends as those of video files do."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def is_list(name: str) -> bool:
    """Say whether a name ends as those of list files do."""
    return name.lower().endswith(LIST_SUFFIXES)


def as_cell(video: Any) -> dict[str, Any]:
    """Return a cell of a column of videos, a path, bytes, or {"path", "bytes"}, as the last of these."""
    if isinstance(video, dict):
        return {"path": video.get("path"), "bytes": video.get("bytes")}
    is_bytes = isinstance(video, bytes)
    return {"path": None if is_bytes else video, "bytes": video if is_bytes else None}


def name_of(video: Any, index: int) -> str:
    """Return what errors call a cell: its path; of what has no file of its own, its name and its row, `index`."""
    cell = as_cell(video)
    if cell["bytes"] is None and cell["path"]:
        return cell["path"]
    return f"{cell['path']} (row {index})" if cell["path"] else f"row {index}"


def paths_of(rows: Dataset) -> list[str]:
    """Return the path of each video, or where it has none the number of its row; no bytes are read."""
    column = rows.data["video"]
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "path")
    names = column.to_pylist() if _is_text(column) else [None] * len(rows)
    return [name or f"row {row}" for row, name in enumerate(names)]


def identity_of(rows: Dataset | IterableDataset) -> dict[str, Any]:
    """Return what tells a data set from another one, as JSON has it: numbers, and digests of paths, labels and classes.

    Paths count from the folder that all have in common, so that the same videos elsewhere are the same. Of bytes the
    sizes count. Of a stream, which nobody reads beforehand, there are the number of its files and the classes.
    """
    classes = class_names_of(rows)
    known: dict[str, Any] = {"classes": _digest(classes)}
    if isinstance(rows, IterableDataset):
        return {"files": rows.num_shards, **known}
    paths = paths_of(rows)
    common = _common_folder(paths)
    labels = list(rows["label"]) if "label" in rows.column_names else None
    segments = segments_in(rows)
    return {
        "videos": len(rows),
        "paths": _digest([[path[common:] for path in paths], _sizes_of(rows)]),
        "labels": _digest(labels),
        **({"segments": _digest(segments)} if segments else {}),
        **known,
    }


def differences(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Say what differs between two data sets by what `identity_of` returned of them; "" for nothing."""
    if before is None or now is None:
        return "" if before == now else f"there was {'none' if before is None else 'one'}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    counted = [f"{now.get(name)} {name} for {before.get(name)}" for name in names if name in ("videos", "files")]
    named = [f"other {name}" for name in names if name not in ("videos", "files")]
    return ", ".join(counted + named)


def _common_folder(paths: list[str]) -> int:
    """Return the length of the path of the folder that all paths lie in."""
    try:
        return len(os.path.commonpath(map(os.path.dirname, paths)))
    except ValueError:  # absolute ones and others
        return 0


def _sizes_of(rows: Dataset) -> list[int | None] | None:
    """Return the bytes that each row holds of its video, by where they lie; None for paths."""
    column = rows.data["video"]
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return None if _is_text(column) else pc.binary_length(column).to_pylist()


def _is_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def head_of(rows: Dataset | IterableDataset, count: int) -> Dataset:
    """Return the first rows, at most `count`; of a stream too."""
    if isinstance(rows, Dataset):
        return rows.select(range(min(count, len(rows))))
    return Dataset.from_list(list(rows.take(count)), features=rows.features)


def source_of(
    video: Any, index: int | None = None, *, url_schemes: Sequence[str] = (), time_limit: float = TIME_LIMIT
) -> dict[str, Any]:
    """Return the arguments of `open_video` for a cell of the column `video`; with its row, what `name_of` calls it.

    A path may be an address such as hf://…, which is fetched; url_schemes: those that are beside hf, such as "https",
    never "file". time_limit: seconds that this may take (0: no limit).

    Raises:
        VideoError: there is neither a path nor bytes, or an address is of another scheme, cannot be read, takes longer,
            or has more than MAX_DOWNLOAD bytes.
    """
    cell = as_cell(video)
    path, content = cell["path"], cell["bytes"]
    name = path if index is None else name_of(video, index)
    if content is None and path:
        content = _fetch(path, url_schemes, time_limit) if "://" in path else path
    if content is None:
        raise VideoError(name or "a video", "neither a path nor bytes")
    return {"source": content, "name": name}


def video_in(row: dict[str, Any], index: int | None = None, **fetching) -> dict[str, Any]:
    """Return the arguments of `open_video` for a row: those of `source_of`, whose errors it has, and its segment."""
    return {**source_of(row["video"], index, **fetching), "segment": segment_in(row)}


def _fetch(url: str, url_schemes: Sequence[str], time_limit: float) -> bytes:
    allowed = ({*_USUAL_SCHEMES, *url_schemes} - _LOCAL) | _ARCHIVES
    for scheme in _schemes_of(url):
        if scheme not in allowed:
            reason = "never is" if scheme in _LOCAL else f"is not unless url_schemes={scheme} allows it"
            raise VideoError(url, f"hf:// is fetched, {scheme}:// {reason}")
    try:
        return call_within(time_limit, _read_address, url, time_limit)
    except Overdue:
        raise VideoError(url, f"took longer than {time_limit:g} s to fetch") from None
    except Exception as error:  # whatever the file system of the address raises
        raise VideoError(url, f"cannot be fetched: {error or type(error).__name__}") from error


def _schemes_of(url: str) -> Iterable[str]:
    """Yield the schemes of an address, of which fsspec takes several in a row: zip://a.mp4::hf://…"""
    for part in url.split("::"):
        scheme, separator, _ = part.partition("://")
        if separator or not os.path.isabs(part):
            yield scheme


def _read_address(url: str, time_limit: float) -> bytes:
    with fsspec.open(url, "rb") as file:
        return read_fetched(file, time_limit)


# ---------------------------------------------------------------------- errors


def refuse(culprits: list[str], reason: str, error: type[Exception] = ValueError) -> None:
    """Raise an error with the reason that names the first culprits and counts all, if there is one."""
    if culprits:
        raise error(f"{named(culprits)}: {reason}")


def named(culprits: list[str]) -> str:
    """Join the first culprits, and their number where there are more."""
    more = f", … {len(culprits)} in all" if len(culprits) > NAMED_CULPRITS else ""
    return f"{printable(', '.join(culprits[:NAMED_CULPRITS]))}{more}"


# ---------------------------------------------------------------------- labels


def as_dataset(
    rows: list[Row],
    videos: Dataset | None,
    class_names: Sequence[str] | None,
    num_labels: int | None,
    problem_type: str,
) -> Dataset:
    """Return the rows as a data set; `videos` has their column `video` where that is more than their paths."""
    if videos is None:
        videos = Dataset.from_dict({"video": [row.path for row in rows]}, features=Features(video=Value("string")))
    columns, features = columns_with([row.segment for row in rows]), dict(FEATURES)
    if all(row.label is not None for row in rows):
        columns["label"], features["label"] = encode_labels(rows, class_names, num_labels, problem_type)
    if not columns:
        return videos
    beside = Dataset.from_dict(columns, Features({name: features[name] for name in columns}))
    return concatenate_datasets([videos, beside], axis=1)


def encode_labels(
    rows: list[Row], class_names: Sequence[str] | None, num_labels: int | None, problem_type: str
) -> tuple[list, Any]:
    """Return the labels of the rows as a problem type takes them, and their feature.

    Raises:
        ValueError: a label is out of range, an unknown class, not a number, or several where one is due.
    """
    if problem_type == "regression":
        return _numbers(rows), Value("float64")
    if problem_type == "multi_label_classification":
        lists, all_names = _label_lists(rows, class_names, num_labels)
        return lists, List(ClassLabel(names=all_names))
    several = [f"{row.where} ({row.label})" for row in rows if isinstance(row.label, list)]
    refuse(several, "several labels; that is problem_type=multi_label_classification")
    labels, names = _integer_labels(rows, class_names, num_labels)
    return labels, ClassLabel(names=names) if names else Value("int64")


def labels_in(row: Row, problem_type: str) -> list[str]:
    """Return the labels of a row: of several, a list or joined by commas, each."""
    if isinstance(row.label, list):
        return row.label
    return row.label.split(",") if problem_type == "multi_label_classification" else [row.label]


def _integer_labels(
    rows: list[Row], class_names: Sequence[str] | None, num_labels: int | None
) -> tuple[list[int], list[str] | None]:
    """Return the labels as integers, and the names of the classes where known."""
    names = list(class_names) if class_names is not None else None
    known = set(names or ())
    if not all(is_integer(row.label) for row in rows) or (names and all(row.label in known for row in rows)):
        names = names or sorted({row.label for row in rows})
        place = {name: i for i, name in enumerate(names)}
        refuse(
            [f"{r.where} ({r.label!r})" for r in rows if r.label not in place],
            f"class not among the {len(place)} known",
        )
        labels = [place[row.label] for row in rows]
    else:
        # A number of more digits is no index of a class, and too much for int() or Arrow.
        labels = [int(row.label) if len(row.label) < 18 else sys.maxsize for row in rows]
    bounds = [count for count in (num_labels, len(names) if names else None) if count is not None]
    highest = min(bounds, default=min(max(labels, default=0) + 1, MAX_CLASSES))
    wrong = [f"{r.where} ({r.label})" for r, label in zip(rows, labels, strict=True) if not 0 <= label < highest]
    from_one = bool(wrong) and (min(labels), max(labels)) == (1, highest)
    hint = ""
    if from_one:
        hint = (
            "; these seem to count from 1, as UCF101's official lists do: subtract 1 from each, or for those let "
            "`everest-hf make-list ucf101 ANNOTATIONS VIDEOS OUT` write lists"
        )
    refuse(wrong, f"label out of range; {highest} classes are labelled 0 to {highest - 1}{hint}")
    return labels, names


def _label_lists(
    rows: list[Row], class_names: Sequence[str] | None, num_labels: int | None
) -> tuple[list[list[int]], list[str]]:
    """Return the labels of each row as integers, and the names of all labels."""
    of_rows = [labels_in(row, "multi_label_classification") for row in rows]
    empty = [
        f"{row.where} ({row.label!r})" for row, of_row in zip(rows, of_rows, strict=True) if {"", None} & {*of_row}
    ]
    refuse(empty, "an empty name among the labels")
    parts = [row._replace(label=part) for row, of_row in zip(rows, of_rows, strict=True) for part in of_row]
    flat, names = _integer_labels(parts, class_names, num_labels)
    labels = iter(flat)
    lists = [sorted({next(labels) for _ in of_row}) for of_row in of_rows]
    return lists, names or [str(i) for i in range(num_labels or max(flat, default=0) + 1)]


def _numbers(rows: list[Row]) -> list[float]:
    wrong = [f"{row.where} ({row.label!r})" for row in rows if not is_number(row.label)]
    refuse(wrong, "label is not a finite number; problem_type=regression takes 'path number'")
    return [float(row.label) for row in rows]


def is_integer(text: str) -> bool:
    """Say whether a label is an integer, not a name."""
    return text.removeprefix("-").isdecimal()
