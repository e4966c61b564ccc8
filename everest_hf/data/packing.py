"""Prepared videos in parquet files, many in each, for sets that are larger than a disk."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value

from ..files import held, write_whole
from ..video import MAX_PIXELS, TIME_LIMIT, VideoError
from ..video.encoding import DEFAULT_ENCODING, Encoding
from .prepare import SUFFIX, identity_of, prepare_row
from .rows import as_cell, name_of
from .segments import segments_in
from .sources import load_videos
from .workers import map_videos

# The key of the metadata of a file under which it says what it was made from, and how.
MADE_OF = b"everest_hf"
# Videos that a reader of a file has in memory at a time.
ROW_GROUP = 16


@dataclass(frozen=True)
class Packed:
    """What `pack_videos` did. made, kept: the files that were written, and that were there already. videos: in both.
    bad: the videos that cannot be read.
    """

    made: list[Path]
    kept: list[Path]
    videos: int
    bad: list[VideoError]


def pack_videos(
    source: str | os.PathLike,
    out: str | os.PathLike,
    count: int,
    *,
    shard: tuple[int, int] = (0, 1),
    encoding: Encoding = DEFAULT_ENCODING,
    fps: float | None = None,
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
    url_schemes: Sequence[str] = (),
    **options,
) -> Packed:
    """Write the videos of a source, prepared as by `prepare_videos`, into `count` parquet files in the folder `out`.

    The order of the videos is random, the same each time. A file has the columns video {"bytes", "path"} and label,
    where there are labels. It appears when it is whole; called again, the function keeps what was made of the same
    videos in the same way. shard: (i, n) writes the files i, i + n … alone, so that n processes, on machines that share
    `out`, write all. Beside the files, a process needs room for the single videos that one file is made of.

    The other arguments, and what is raised, are those of `prepare_videos`.

    Raises:
        ValueError: there are fewer videos than files, or rows are segments of videos.
    """
    out = Path(out).expanduser()
    rows = load_videos(source, labels_required=False, check_files=False, **options)
    if segments_in(rows):
        raise ValueError(f"{source}: has segments of videos; --shards takes whole videos: prepare them as files")
    if count > len(rows):
        raise ValueError(f"--shards is {count}; it must be at most {len(rows)}, the videos of {source}")
    rows = rows.shuffle(seed=0)
    reading: dict[str, Any] = {"workers": workers, "time_limit": time_limit, "url_schemes": url_schemes}
    made, kept, videos, bad = [], [], 0, []
    for number in range(shard[0], count, shard[1]):
        path, part = out / f"part-{number:05d}-of-{count:05d}.parquet", rows.shard(count, number)
        tag = _tag_of(part, encoding, fps)
        if _read_tag(path).get("of") != tag:
            with held(out / f".{path.stem}"):
                _pack(part, path, tag, partial(prepare_row, encoding, fps, max_pixels), reading)
            shutil.rmtree(out / f".{path.stem}")
            made.append(path)
        else:
            kept.append(path)
        bad += [VideoError(*error) for error in _read_tag(path)["bad"]]
        videos += pq.read_metadata(path).num_rows
    return Packed(made, kept, videos, bad)


def _tag_of(rows: Dataset, encoding: Encoding, fps: float | None) -> str:
    """Return what tells the rows of a file, and how they are prepared, from others."""
    labels = list(rows["label"]) if "label" in rows.column_names else None
    known = [[_version_of(cell) for cell in rows["video"]], labels, asdict(encoding), fps]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()


def _version_of(video: Any) -> list:
    cell = as_cell(video)
    try:
        return [cell["path"], identity_of(cell["path"] if cell["bytes"] is None else cell["bytes"])]
    except OSError:  # which reading it will say, or an address
        return [cell["path"]]


def _read_tag(path: Path) -> dict[str, Any]:
    """Return what a file says it was made of and which videos of it are bad; {} where there is no such file."""
    try:
        return json.loads((pq.read_schema(path).metadata or {})[MADE_OF])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return {}


def _pack(rows: Dataset, path: Path, tag: str, prepare: Any, reading: dict[str, Any]) -> None:
    """Prepare the videos of a file beside it, and write it."""
    folder = path.with_name(f".{path.stem}")
    targets = [folder / f"{row:08d}{SUFFIX}" for row in range(len(rows))]
    aside = folder / "growing"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir()
    found = map_videos(
        partial(prepare, targets, aside), rows, range(len(rows)), description=f"prepare {path.name}", **reading
    )
    bad = {row: error for row, error in enumerate(found) if isinstance(error, VideoError)}
    about = {"of": tag, "bad": [(error.path, error.reason) for error in bad.values()]}
    good = [row for row in range(len(rows)) if row not in bad]
    write_whole(path, partial(_write, rows, good, targets, about), folder)


def _write(rows: Dataset, good: list[int], targets: list[Path], about: dict[str, Any], path: Path) -> None:
    features = Features(video={"bytes": Value("large_binary"), "path": Value("string")})
    if "label" in rows.column_names:
        features["label"] = rows.features["label"]
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, MADE_OF: json.dumps(about).encode()})
    with pq.ParquetWriter(path, schema, compression="none") as file:  # videos are compressed already
        for start in range(0, len(good), ROW_GROUP):
            lines = list(_lines(rows, good[start : start + ROW_GROUP], targets))
            file.write_table(pa.Table.from_pylist(lines, schema))


def _lines(rows: Dataset, chosen: list[int], targets: list[Path]) -> Iterator[dict[str, Any]]:
    for row in chosen:
        cells = rows[row]
        name = Path(as_cell(cells["video"])["path"] or name_of(cells["video"], row)).name
        line = {"video": {"bytes": targets[row].read_bytes(), "path": name}}
        yield line | ({"label": cells["label"]} if "label" in rows.column_names else {})
