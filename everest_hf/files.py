"""Files that are whole or absent, folders that one process holds, names as people may see them, and the folders of the
package and of runs.
"""

import csv
import logging
import math
import os
import socket
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
# Where a run is by default, and is looked for.
RUNS = Path("runs")
# The file in a folder that says which process holds it.
LOCK = ".lock"
# Characters that steer a terminal or a log, by category and by what they do to the direction of a text (Unicode).
_STEERING = {"Cc", "Cs", "Zl", "Zp"}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # of a cell that a table program takes for a formula
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def packaged(name: str | Path) -> Path:
    """Return the path of a file or folder that comes with the package: a recipe, the template of the model card.

    In a checkout they lie beside the package, and in it are links to them. Where there are no links, Git puts a file
    with the target in the place of each.
    """
    link = PACKAGE / Path(name).parts[0]
    target = f"../{link.name}"
    if link.is_file() and link.stat().st_size == len(target) and link.read_text() == target:
        return PACKAGE.parent / name
    return PACKAGE / name


# ---------------------------------------------------------------------- whole or absent


def write_whole(path: Path, write: Callable[[Path], object], place: Path | None = None) -> None:
    """Write a file under another name of the same suffix, by `write` of that name, then rename it.

    place: the folder that it grows in, on the same disk, by default its own.

    Raises:
        OSError: it cannot be written; the message names it, and why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = (place or path.parent) / f".partial-{path.name}"
        write(aside)
        put_in_place(aside, path)
    except OSError as error:  # a full disk, for instance, whose error may not name the file
        raise OSError(f"{path}: {error.strerror or error}") from error


def write_table(path: Path, lines: Iterable[Sequence]) -> None:
    """Write lines of cells as a .csv file, whole or not at all. A cell that begins as a formula does gets a ' before it."""

    def write(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([_as_cell(value) for value in line] for line in lines)

    write_whole(path, write)


def _as_cell(value):
    """Return a value that a table program does not take for a formula: texts that look like one get a ' before them."""
    looks_like_one = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if looks_like_one and not is_number(value) else value


def is_number(text) -> bool:
    """Say whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def put_in_place(aside: Path, path: Path) -> None:
    """Give a file or folder that is whole its name, after all of it is on the disk, where it outlives a loss of power.

    Its files get the permissions of any new file here: some writers, as that of safetensors, let their owner alone read.
    """
    mode = _usual_mode(aside.parent)
    for file in [aside] if aside.is_file() else [file for file in aside.rglob("*") if file.is_file()]:
        file.chmod(mode)
        _flush(file)
    for folder in [aside, *aside.rglob("*")] if aside.is_dir() else []:
        if folder.is_dir():
            _flush(folder)
    os.replace(aside, path)
    _flush(path.parent)


def _usual_mode(folder: Path) -> int:
    """Return the permissions of a new file. To ask for the mask of the process would be to set it, for all threads."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mode-") as place:
        probe = Path(place) / "file"
        probe.touch()
        return probe.stat().st_mode & 0o777


def _flush(path: Path) -> None:
    if os.name == "nt":  # Windows flushes neither folders nor files that are open for reading
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# ---------------------------------------------------------------------- held by one process


def part_suffix(shard: tuple[int, int]) -> str:
    """Return how the names of what belongs to the i-th of n parts end, "-i-of-n"; "" for a whole. shard: (i, n)."""
    return "" if shard[1] == 1 else f"-{shard[0]}-of-{shard[1]}"


@contextmanager
def held(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, so that no other process works in it at the same time.

    The lock is the system's, on the file `name` in the folder: it ends with the process, however that ends, and on a
    network disk it counts on all machines. A disk without locks gets a warning. Processes that are forked do not
    inherit it.

    Raises:
        BlockingIOError: another process holds the folder; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _lock(folder, folder / name)
    try:
        yield
    finally:
        (folder / name).unlink(missing_ok=True)  # while it is locked
        file.close()


def _lock(folder: Path, path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            # Not flock: the processes that decode would inherit it, and hold it for a while after a run was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "another process"
            raise BlockingIOError(
                f"{folder} is in use by {holder}; wait for its end, or choose another folder"
            ) from None
        except (OSError, AttributeError):
            logger.warning("%s: locks do not work here; see that nothing else writes there at the same time", folder)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the one that held it has just removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


# ---------------------------------------------------------------------- names


def printable(text: str) -> str:
    """Return a line of text with the characters that steer a terminal as escapes, such as \\x1b.

    File names and class names come from others, and may hold any.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _STEERING or unicodedata.bidirectional(character) in _TURNING
