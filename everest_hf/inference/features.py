"""Files of features: a vector for each video, its path, and its label where there is one."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data import class_names_of
from ..data.rows import paths_of
from ..data.segments import segments_in


@dataclass(frozen=True)
class Features:
    """Features of the videos of some rows: embeddings float32 (n, D), index int64 (n,), the row of each of them, and
    bad, (path, reason) of each video that cannot be read.
    """

    embeddings: torch.Tensor
    index: torch.Tensor
    bad: list[tuple[str, str]]

    @classmethod
    def joined(cls, parts: "Iterable[Features]") -> "Features":
        """Return all of them, in the order of the parts."""
        embeddings, index, bad = zip(*((part.embeddings, part.index, part.bad) for part in parts), strict=True)
        return cls(torch.cat(embeddings), torch.cat(index), [entry for entries in bad for entry in entries])


@dataclass(frozen=True)
class FeatureFile:
    """What a file of features holds: videos, the n paths; embeddings float32 (n, D); labels, the n names of classes, or
    numbers as text, or None; about, how the features were made: the model, its keep ratio, the views.
    """

    videos: list[str]
    embeddings: torch.Tensor
    labels: list[str] | None
    about: dict[str, Any]


# ---------------------------------------------------------------------- writing


def writer_of(out: Path) -> Callable:
    """Return the function that writes the format of a file name.

    Raises:
        ValueError: the suffix is none of FORMATS.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"{out}: cannot tell the format; expected a name ending in {' or '.join(FORMATS)}")
    return FORMATS[out.suffix]


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, as on a full disk, for which safetensors has an error of its own.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_safetensors(path: Path, features: Features, rows: Dataset, about: dict[str, str]) -> None:
    """Write tensors embeddings float32 (n, D), index int64 (n,), and labels int64 (n,) where the rows have them.

    The metadata hold, as JSON, the paths of the n videos, the names of the classes, `about`, and of rows with segments
    the n starts and ends, by the names of their columns.
    """
    names, chosen = paths_of(rows), features.index.tolist()
    videos = [names[row] for row in chosen]
    segments = {name: [values[row] for row in chosen] for name, values in segments_in(rows).items()}
    about = {**about, **{name: json.dumps(values) for name, values in segments.items()}}
    tensors = {"embeddings": features.embeddings, "index": features.index}
    if "label" in rows.column_names:
        tensors["labels"] = torch.tensor(list(rows["label"]))[features.index]
    metadata = {**about, "videos": json.dumps(videos), "class_names": json.dumps(class_names_of(rows))}
    save_tensors(tensors, path, metadata)


def write_parquet(path: Path, features: Features, rows: Dataset, about: dict[str, str]) -> None:
    """Write a table with a row a video: video (path), start and end of a segment (or start_frame and end_frame), label
    (name of the class where known), embedding (D floats).
    """
    names, classes, chosen = paths_of(rows), class_names_of(rows), features.index.tolist()
    columns = {"video": [names[row] for row in chosen]}
    columns |= {name: [values[row] for row in chosen] for name, values in segments_in(rows).items()}
    if "label" in rows.column_names:
        labels = [classes[label] if classes else label for label in rows["label"]]
        columns["label"] = [labels[row] for row in chosen]
    flat = pa.array(features.embeddings.flatten().numpy())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, features.embeddings.shape[1])
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path)


# ---------------------------------------------------------------------- reading


def read_features(path: Path) -> FeatureFile:
    """Return what a file holds that `everest-hf embed` wrote.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is another one, or holds no video.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of features (everest-hf embed writes them)")
    writer_of(path)
    try:
        found = READERS[path.suffix](path)
    except (SafetensorError, pa.ArrowException, AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a file of features that everest-hf embed wrote, or damaged") from None
    if not found.videos:
        raise ValueError(f"{path}: holds no video")
    return found


def _read_safetensors(path: Path) -> FeatureFile:
    with safe_open(path, "pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items()}
        embeddings = file.get_tensor("embeddings")
        labels = file.get_tensor("labels").tolist() if "labels" in file.keys() else None  # noqa: SIM118
    videos, classes = about.pop("videos"), about.pop("class_names")
    if labels is not None:
        labels = [classes[label] if classes else str(label) for label in labels]
    return FeatureFile(videos, embeddings, labels, about)


def _read_parquet(path: Path) -> FeatureFile:
    table = pq.read_table(path)
    about = {name.decode(): json.loads(value) for name, value in table.schema.metadata.items()}
    column = table.column("embedding").combine_chunks()
    embeddings = torch.tensor(column.flatten().to_numpy()).reshape(len(table), column.type.list_size)
    labels = list(map(str, table.column("label").to_pylist())) if "label" in table.column_names else None
    return FeatureFile(table.column("video").to_pylist(), embeddings, labels, about)


FORMATS = {".safetensors": write_safetensors, ".parquet": write_parquet}
READERS = {".safetensors": _read_safetensors, ".parquet": _read_parquet}
