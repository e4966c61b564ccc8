"""How a process gets its memory from the system."""

import ctypes
import sys

# Parameters of mallopt(3), of the GNU C library, and the most bytes that all its versions take for the second.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
_MOST_FOR_ALL = 32 * 2**20


def keep_freed_memory(worker: int = 0) -> None:
    """Let this process keep the memory that it frees for what it needs next. A `worker_init_fn` of a DataLoader.

    A clip on its way takes several blocks of some MB. By default the system maps each of them anew and clears it page
    by page, which costs up to a quarter of the time of a clip (benchmarks/loader.py). A process that keeps them holds
    what it has needed at most at a time. Where there is no GNU C library, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        if not mallopt(MMAP_THRESHOLD, 2**30):
            mallopt(MMAP_THRESHOLD, _MOST_FOR_ALL)
