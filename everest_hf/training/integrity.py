"""Which checkpoints of a run are whole: progress.json has the size and a checksum of each file, and one of its own."""

import json
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d+)")
# Bytes that are read at a time.
_BLOCK = 2**20


class Damaged(ValueError):
    """A checkpoint is not what was written; the message says why."""


@dataclass(frozen=True)
class Found:
    """newest: the newest checkpoint that is whole, if any, and its progress. damaged: others, and why; newest first."""

    newest: Path | None
    progress: dict[str, Any]
    damaged: list[tuple[Path, str]]


def step_of(checkpoint: Path) -> int:
    """Return the number of steps in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the oldest first; what else is there is nobody's business."""
    named = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named) if path.is_dir()]


def find_checkpoint(folder: Path) -> Found:
    """Look for the newest checkpoint whose files are all as they were written.

    Raises:
        ValueError: there are checkpoints, and none is whole; or one is of a version that could not tell.
    """
    newest, progress, damaged = None, {}, []
    for path in reversed(checkpoints_in(folder)):
        try:
            read = read_progress(path)
            if newest is None:
                check_files(path, read["files"])
                newest, progress = path, read
        except Damaged as error:
            damaged.append((path, str(error)))
    if damaged and newest is None:
        path, reason = damaged[0]
        raise ValueError(f"checkpoint {path} is damaged ({reason}), and none is whole; --overwrite starts again")
    return Found(newest, progress, damaged)


# ---------------------------------------------------------------------- progress


def files_in(checkpoint: Path) -> list[str]:
    """Return the names of the files that this process sees in a checkpoint: on a network disk its own, and others."""
    return [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]


def write_progress(checkpoint: Path, progress: dict[str, Any], files: Iterable[str]) -> None:
    """Write progress.json, the last file of a checkpoint, with what tells whether the others are whole."""
    progress = {**progress, "files": _marks(checkpoint, sorted(set(files)))}
    (checkpoint / PROGRESS).write_text(json.dumps({**progress, "crc32": _crc32_of(progress)}))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return what `write_progress` wrote.

    Raises:
        Damaged: it is missing or garbage. ValueError: an earlier version wrote it, without checksums.
    """
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text())
        crc32 = progress.pop("crc32", None)
    except FileNotFoundError:
        raise Damaged(f"{PROGRESS} is missing") from None
    except (ValueError, AttributeError, TypeError):  # no JSON, or none of an object
        raise Damaged(f"{PROGRESS} is garbage") from None
    if crc32 is None and "files" not in progress and "step" in progress:
        raise ValueError(
            f"{checkpoint} was written by an earlier version, whose checkpoints could be damaged, or run code, unnoticed; "
            "finish the run with that version, or take it as --model of a run in another output_dir"
        )
    if crc32 != _crc32_of(progress):
        raise Damaged(f"{PROGRESS} is not as it was written")
    if checkpoint.name != f"step-{progress['step']:08d}":
        raise Damaged(f"its {PROGRESS} is that of step {progress['step']}")
    return progress


def _crc32_of(progress: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(progress).encode())


# ---------------------------------------------------------------------- files


def check_files(checkpoint: Path, files: dict[str, list[int]]) -> None:
    """Compare the files of a checkpoint with their sizes and checksums.

    Raises:
        Damaged: one is missing or not as it was written.
    """
    for name, (size, _) in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size} bytes of {size}")
    for name, mark in _marks(checkpoint, files).items():
        if mark != files[name]:
            raise Damaged(f"the checksum of {name} is not that of what was written")


def _marks(checkpoint: Path, names: Iterable[str]) -> dict[str, list[int]]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(_mark, [checkpoint / name for name in names]), strict=True))


def _mark(path: Path) -> list[int]:
    """Return the size of a file and its CRC-32: some GB/s, as damage is to be found and not forgery."""
    size = crc32 = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc32 = size + len(block), zlib.crc32(block, crc32)
    return [size, crc32]
