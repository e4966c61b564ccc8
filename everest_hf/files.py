"""Files that are whole or absent, folders that one process holds, and the folders of the package and of runs."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Where recipes and the template of the model card lie; in a checkout both are links to those beside the package.
PACKAGE = Path(__file__).parent
# Where a run is by default, and is looked for.
RUNS = Path("runs")
# The file in a folder that says which process holds it.
LOCK = ".lock"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name of the same suffix, by `write` of that name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".partial-{path.name}")
    write(aside)
    os.replace(aside, path)


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
