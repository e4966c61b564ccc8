"""Lists from the annotation files that data sets are published with."""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_whole
from ..video.pictures import is_picture
from .lists import write_csv
from .rows import is_video
from .sources import walk

# What Kinetics calls its parts, and what our lists are called.
KINETICS_PARTS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
# The classes of Ego4D's OSCC; in the order of their names, 0 and 1.
NO_CHANGE, CHANGE = "no state change", "state change"


class Entry(NamedTuple):
    """A labelled video: the names that its file may have, without suffix, each with the seconds that are meant of it
    (None: all).
    """

    files: tuple[tuple[str, tuple[float, float] | None], ...]
    label: str


@dataclass(frozen=True)
class Made:
    """What `make_lists` wrote. files: the list of each part. counts: the videos in it. missing: the names of those that
    are not there.
    """

    files: dict[str, Path]
    counts: dict[str, int]
    missing: dict[str, list[str]]


def make_lists(
    kind: str,
    annotations: str | os.PathLike,
    videos: str | os.PathLike,
    out: str | os.PathLike,
    *,
    split: int | None = None,
    overwrite: bool = False,
) -> Made:
    """Write train.csv, val.csv and, where there is one with labels, test.csv for a data set's official annotations.

    kind: a key of READERS. annotations: the folder of the official files; of Kinetics also one csv. videos: the folder
    below which files lie, in whatever folders and with whatever suffix of a video; those that are missing are left out.
    split: of UCF101 and HMDB51, 1 to 3. The lists lie in `out`; their paths are relative to it.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not of the official form; or no video of a part is there.
        FileExistsError: a list is there already, and `overwrite` is not given.
    """
    annotations, videos, out = (Path(path).expanduser() for path in (annotations, videos, out))
    if split is not None and kind not in WITH_SPLITS:
        raise ValueError(f"split is {split}, but {kind} has one split alone; {' and '.join(WITH_SPLITS)} have three")
    for folder in (annotations, videos):
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder")
    arguments = (annotations, split or 1) if kind in WITH_SPLITS else (annotations,)
    parts = READERS[kind](*arguments)
    files = {part: out / f"{part}.csv" for part in parts}
    for path in files.values():
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path}: is there already; overwrite replaces it")
    there = _files_below(videos)
    found = {part: _lines_of(entries, there, out) for part, entries in parts.items()}
    for part, (lines, _) in found.items():
        if not lines:
            names = (
                f"the {len(parts[part])} videos of {part}, such as {parts[part][0].files[-1][0]}"
                if parts[part]
                else f"any video of {part}"
            )
            raise ValueError(f"{videos}: has none of {names}")
    for part, (lines, _) in found.items():
        write_whole(files[part], partial(_write, lines))
    counts = {part: len(lines) for part, (lines, _) in found.items()}
    return Made(files, counts, {part: missing for part, (_, missing) in found.items()})


def _write(lines: list[tuple[str, float | None, float | None, str]], path: Path) -> None:
    if all(start is None for _, start, _, _ in lines):
        write_csv(path, ["video", "label"], [(video, label) for video, _, _, label in lines])
    else:
        write_csv(path, ["video", "start", "end", "label"], lines)


def _files_below(videos: Path) -> dict[str, list[str]]:
    """Return the paths of the videos below a folder, files and folders of frames, by their names without suffix."""
    there = defaultdict(list)
    for parent, _, names in walk(os.path.abspath(videos)):
        for name in filter(is_video, names):
            there[os.path.splitext(name)[0]].append(os.path.join(parent, name))
        if any(map(is_picture, names)):
            there[os.path.basename(parent)].append(parent)
    return there


def _lines_of(
    entries: Iterable[Entry], there: dict[str, list[str]], out: Path
) -> tuple[list[tuple[str, float | None, float | None, str]], list[str]]:
    """Return (path, start, end, label) of the entries whose files are there, and the names of the others."""
    lines, missing = [], []
    for files, label in entries:
        name, seconds = next((file for file in files if file[0] in there), (None, None))
        if name is None:
            missing.append(files[-1][0])
            continue
        start, end = seconds or (None, None)
        lines.append((os.path.relpath(_one_of(there[name], label), out.absolute()), start, end, label))
    return lines, missing


def _one_of(paths: list[str], label: str) -> str:
    """Return the path of several files of one name that lies in a folder of its class; of one, that."""
    alike = [
        path for path in paths if os.path.basename(os.path.dirname(path)).replace(" ", "_") == label.replace(" ", "_")
    ]
    found = alike or paths
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]}: have one name, and nothing tells which is meant; remove one")
    return found[0]


# ---------------------------------------------------------------------- reading


def _file_of(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; expected the folder with {name}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder}: has no {name}")
    return folder / name


def _matches(path: Path, form: str, right: str) -> Iterator[tuple[str, re.Match]]:
    """Yield "file:line" and the match of each line that is not empty."""
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if line.strip():
            match = re.fullmatch(form, line.strip())
            if match is None:
                raise ValueError(f"{path}:{number}: {line.strip()[:60]!r} is not {right}")
            yield f"{path}:{number}", match


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8") from error


def _json_of(path: Path) -> Any:
    try:
        return json.loads(_text_of(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}, in column {error.colno}") from None


def _field(item: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(item, dict) or name not in item:
        there = f"; it has {', '.join(item)}" if isinstance(item, dict) else ""
        raise ValueError(f"{where}: has no field {name}{there}")
    if not isinstance(item[name], kind) or (isinstance(item[name], bool) and kind is not bool):
        right = {str: "text", bool: "true or false", list: "a list", (int, float): "a number"}[kind]
        raise ValueError(f"{where}: {name} is {item[name]!r}; it must be {right}")
    return item[name]


# ---------------------------------------------------------------------- UCF101, HMDB51


def _ucf101(folder: Path, split: int) -> dict[str, list[Entry]]:
    names = {}
    for _, match in _matches(_file_of(folder, "classInd.txt"), r"(\d+)\s+(\S+)", "'1 ApplyEyeMakeup'"):
        names[int(match[1])] = match[2]
    form = r"(\w+)/(\S+)\.\w+(?:\s+(\d+))?"
    right = "'ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1' (of testlists, the path alone)"
    parts = {}
    for part, name in (("train", "trainlist"), ("val", "testlist")):
        entries = []
        for where, (label, video, number) in (
            (where, match.groups())
            for where, match in _matches(_file_of(folder, f"{name}{split:02}.txt"), form, right)
        ):
            if label not in names.values():
                raise ValueError(f"{where}: the class {label!r} is not in classInd.txt")
            if number is not None and names.get(int(number)) != label:
                there = names.get(int(number))
                raise ValueError(
                    f"{where}: the label {number} is {there!r} in classInd.txt, whose numbers count from 1, and not {label!r}"
                )
            entries.append(Entry(((video, None),), label))
        parts[part] = entries
    return parts


def _hmdb51(folder: Path, split: int) -> dict[str, list[Entry]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; expected the folder with brush_hair_test_split{split}.txt and so on")
    files = sorted(folder.glob(f"*_test_split{split}.txt"))
    if not files:
        raise FileNotFoundError(f"{folder}: has no file such as brush_hair_test_split{split}.txt")
    parts: dict[str, list[Entry]] = {"train": [], "val": []}
    for path in files:
        label = path.name.removesuffix(f"_test_split{split}.txt")
        right = "'name.avi 1', with 0 for unused, 1 for training and 2 for test"
        for _, match in _matches(path, r"(\S.*)\.\w+\s+([012])", right):
            if match[2] != "0":
                parts["train" if match[2] == "1" else "val"].append(Entry(((match[1], None),), label))
    return parts


# ---------------------------------------------------------------------- Kinetics


def _kinetics(source: Path) -> dict[str, list[Entry]]:
    files = sorted(source.glob("*.csv")) if source.is_dir() else [source]
    if not files:
        raise FileNotFoundError(f"{source}: has no csv file, such as train.csv")
    parts: dict[str, list[Entry]] = {}
    for path in files:
        reader = csv.DictReader(_text_of(path).splitlines())
        lacking = [
            n for n in ("label", "youtube_id", "time_start", "time_end", "split") if n not in (reader.fieldnames or ())
        ]
        if lacking:
            raise ValueError(
                f"{path}:1: has no field {lacking[0]}; Kinetics' csv begins with label,youtube_id,time_start,time_end,split"
            )
        for item in reader:
            part, entry = _kinetics_entry(item, f"{path}:{reader.line_num}")
            parts.setdefault(part, []).append(entry)
    if not parts:
        raise ValueError(f"{source}: names no video")
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


def _kinetics_entry(item: dict[str, str], where: str) -> tuple[str, Entry]:
    if item["split"] not in KINETICS_PARTS:
        raise ValueError(f"{where}: split is {item['split']!r}; it must be one of {', '.join(KINETICS_PARTS)}")
    for name in ("time_start", "time_end"):
        if not re.fullmatch(r"\d+(\.0*)?", item[name] or ""):
            raise ValueError(f"{where}: {name} is {item[name]!r}; it must be whole seconds")
    if not item["label"]:
        raise ValueError(f"{where}: label is empty; leave a file without labels out of the folder")
    start, end = (int(float(item[name])) for name in ("time_start", "time_end"))
    return KINETICS_PARTS[item["split"]], Entry(((f"{item['youtube_id']}_{start:06}_{end:06}", None),), item["label"])


# ---------------------------------------------------------------------- Something-Something, Ego4D


def _ssv2(folder: Path) -> dict[str, list[Entry]]:
    known = _json_of(_only(folder, "*labels.json"))
    parts: dict[str, list[Entry]] = {}
    for part, pattern in (("train", "*train.json"), ("val", "*validation.json")):
        path, parts[part] = _only(folder, pattern), []
        for item in _items_of(path):
            name = _field(item, "id", str, str(path))
            label = re.sub(r"[\[\]]", "", _field(item, "template", str, f"{path}: id {name}"))
            if label not in known:
                raise ValueError(
                    f"{path}: id {name}: the template {label!r} is not in {_only(folder, '*labels.json').name}"
                )
            parts[part].append(Entry(((name, None),), label))
    return parts


def _oscc(folder: Path) -> dict[str, list[Entry]]:
    parts = {}
    for part in ("train", "val"):
        path = _only(folder, f"*oscc-pnr_{part}.json")
        found = _json_of(path)
        clips = found if isinstance(found, list) else _field(found, "clips", list, str(path))
        parts[part] = [_oscc_entry(clip, f"{path}: clip {number}") for number, clip in enumerate(clips)]
    return parts


def _oscc_entry(clip: Any, where: str) -> Entry:
    """Return a clip: a file of its own, part of the video that it is from, or part of a longer clip."""
    name = _field(clip, "unique_id", str, where)
    label = CHANGE if _field(clip, "state_change", bool, where) else NO_CHANGE
    files: list[tuple[str, tuple[float, float] | None]] = [(name, None)]
    if "clip_uid" in clip and "clip_start_sec" in clip:
        files.append((_field(clip, "clip_uid", str, where), _seconds(clip, "clip", where)))
    files.append((_field(clip, "video_uid", str, where), _seconds(clip, "parent", where)))
    return Entry(tuple(files), label)


def _seconds(clip: Any, of: str, where: str) -> tuple[float, float]:
    start, end = (float(_field(clip, f"{of}_{name}_sec", (int, float), where)) for name in ("start", "end"))
    if not 0 <= start < end:
        raise ValueError(
            f"{where}: {of}_start_sec is {start:g} and {of}_end_sec {end:g}; the end must come after the start"
        )
    return start, end


def _only(folder: Path, pattern: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; expected the folder with {pattern}")
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        there = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: has {there or 'no file'} for {pattern}; there must be one")
    return found[0]


def _items_of(path: Path) -> list:
    items = _json_of(path)
    if not isinstance(items, list):
        raise ValueError(f"{path}: is no list of objects with id and template")
    return items


# From the official files to the entries of each part.
READERS: dict[str, Callable[..., dict[str, list[Entry]]]] = {
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
    "kinetics": _kinetics,
    "ssv2": _ssv2,
    "oscc": _oscc,
}
WITH_SPLITS = ("ucf101", "hmdb51")
