"""What somebody names to be answered: files, folders, patterns, lists, data sets, addresses."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd
from datasets import Dataset, DatasetDict, Features

from ..data import VIDEO_SUFFIXES, frame_folders_below, load_videos, tables, videos_below
from ..data.rows import is_list, is_video, paths_of
from ..data.segments import segment_in, segments_in
from ..video import Segment

# What a video that somebody names may be beside a file.
WEB = ("http", "https")
# The name of a data set in its address on the Hub.
_HUB_SET = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)/?")

Source: TypeAlias = str | os.PathLike | Dataset | DatasetDict | pd.DataFrame


class NamedVideos(Sequence):
    """Rows of videos that are named one by one. Names of files need not be UTF-8, as a `Dataset` has them."""

    features = Features()

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        return {"video": self.paths[index]}


@dataclass(frozen=True)
class Videos:
    """Some of the videos to answer: rows with a column `video`, what each is called, the schemes of addresses that are
    fetched, and of each the segment that is meant, or None for the whole video.
    """

    rows: Dataset | NamedVideos
    names: list[str]
    url_schemes: tuple[str, ...]
    segments: list[Segment | None]


def find_videos(
    sources: Source | Iterable[Source],
    *,
    data_root: str | os.PathLike | None = None,
    split: str | None = None,
    video_column: str | None = None,
    url_schemes: Sequence[str] = (),
) -> list[Videos]:
    """Return the videos that are named, in this order.

    A source is a video file; an http:// or https:// address; a folder, for all videos in it and in the folders in it; a
    pattern, for the videos and folders that it matches; a list file (.txt, .csv, .tsv) or data set, as `load_videos`
    takes them, of which labels are not read; hf://datasets/owner/name; or an object that holds rows.

    data_root, split, video_column: as in `load_videos`; split is also a folder in a folder. url_schemes: of addresses in
    lists and data sets, see `everest_hf.data.source_of`.

    Raises:
        FileNotFoundError: a file or folder that is named is missing. ValueError: a folder or a pattern has no video, or as
            in `load_videos`. A video that a list or data set names is not looked for.
    """
    options = {"data_root": data_root, "split": split, "video_column": video_column}
    found: list[Videos] = []
    named: list[str] = []
    for source in _each(sources):
        paths = _named_by(source, split) if isinstance(source, str) else None
        if paths is not None:
            named += paths
            continue
        found += _of_paths(named)
        named = []
        found.append(_of_table(source, tuple(url_schemes), options))
    found += _of_paths(named)
    if not found:
        raise ValueError("no video is named; give a file, folder, pattern, list, data set or URL")
    return found


def _each(sources: Source | Iterable[Source]) -> Iterator[Any]:
    """Yield each source; a path is text, from home where it begins with ~."""
    alone = isinstance(sources, (str, os.PathLike, Dataset, DatasetDict, pd.DataFrame))
    each: Any = [sources] if alone else sources
    for source in each:
        yield os.path.expanduser(source) if isinstance(source, (str, os.PathLike)) else source


def _of_paths(paths: list[str]) -> list[Videos]:
    return [Videos(NamedVideos(paths), paths, WEB, [None] * len(paths))] if paths else []


def _of_table(source: Any, url_schemes: tuple[str, ...], options: dict[str, Any]) -> Videos:
    rows = load_videos(_without_address(source), labels_required=False, check_files=False, **options)
    title = source if isinstance(source, str) else type(source).__name__
    paths = enumerate(paths_of(rows))
    names = [f"{title} {path}" if path == f"row {row}" else path for row, path in paths]
    if "label" in rows.column_names:
        rows = rows.remove_columns("label")
    parts = rows.select_columns(list(segments_in(rows)))
    segments: list[Segment | None] = [segment_in(row) for row in parts] if parts.column_names else [None] * len(rows)
    return Videos(rows, names, url_schemes, segments)


def _without_address(source: Any) -> Any:
    """Return what `load_videos` calls a data set on the Hub that is given by its address."""
    match = _HUB_SET.fullmatch(source) if isinstance(source, str) else None
    if match is None:
        return source
    if os.path.exists(match["name"]):
        raise ValueError(f"{source}: there is a file or folder {match['name']} here, which would be read in its place")
    return match["name"]


def _named_by(source: str, split: str | None) -> list[str] | None:
    """Return the paths and addresses of the videos that a source names; None for a list or data set."""
    if source.startswith(("http://", "https://", "hf://")):
        return None if _HUB_SET.fullmatch(source) else [source]
    if os.path.isdir(source):
        return _in_folder(source, split)
    if os.path.isfile(source):
        return None if is_list(source) or source.lower().endswith(tuple(tables.BUILDERS)) else [source]
    if glob.has_magic(source):
        return _matches(source, split)
    try:
        tables.arguments_of(source)  # a name on the Hub
    except FileNotFoundError:
        what = "video file" if is_video(source) else "video file, folder, list or data set"
        raise FileNotFoundError(f"{source}: no such {what}") from None
    return None


def _in_folder(source: str, split: str | None) -> list[str] | None:
    """Return the videos in a folder; None where it holds a data set and no video."""
    if tables.is_saved(source):
        return None
    folder = os.path.join(source, split) if split else source
    paths = _videos_in(folder) if os.path.isdir(folder) else []
    if paths:
        return paths
    if tables.arguments_of(source):
        return None
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    raise ValueError(
        f"{folder}: no video in it; expected files ending in one of {', '.join(VIDEO_SUFFIXES)}, or folders of frames"
    )


def _videos_in(folder: str) -> list[str]:
    """Return the videos below a folder; where there are video files, pictures beside them are none."""
    return videos_below(folder) or frame_folders_below(folder)


def _matches(pattern: str, split: str | None) -> list[str] | None:
    """Return the videos that a pattern matches, with those in folders; None where it matches files of a data set."""
    matched = sorted(glob.glob(pattern, recursive=True))
    if matched and all(path.lower().endswith(tuple(tables.BUILDERS)) for path in matched):
        return None
    paths: list[str] = []
    for path in matched:
        if os.path.isdir(path):
            paths += _videos_in(os.path.join(path, split or ""))
        elif is_video(path):
            paths.append(path)
    if not paths:
        raise FileNotFoundError(f"{pattern}: matches no video; expected names ending in {', '.join(VIDEO_SUFFIXES)}")
    return sorted(set(paths))
