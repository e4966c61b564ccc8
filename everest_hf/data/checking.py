"""Opening videos before anything is trained."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from datasets import Dataset

from ..video import TIME_LIMIT, VideoError, VideoInfo, probe
from .rows import named, source_of

logger = logging.getLogger(__name__)


def check_readable(
    rows: Dataset,
    *,
    frames_needed: int = 1,
    sample: int | None = 256,
    num_threads: int | None = None,
    backend: str = "decord",
    time_limit: float = TIME_LIMIT,
) -> list[VideoError]:
    """Open the videos of the rows, decode the first frame of each and return one VideoError for each that fails.

    Videos of fewer than `frames_needed` frames are named in a warning. At most `sample` videos are opened, evenly
    spread over the rows; None opens all. backend, time_limit: see `everest_hf.video.open_video`.
    """
    count = len(rows) if sample is None else min(sample, len(rows))
    chosen = [i * len(rows) // count for i in range(count)]
    with ThreadPoolExecutor(num_threads or min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(partial(_try_open, rows, backend=backend, time_limit=time_limit), chosen))
    opened = [(name, info) for name, info in found if isinstance(info, VideoInfo)]
    short = [f"{name} ({info.num_frames})" for name, info in opened if info.num_frames < frames_needed]
    if short:
        what = f"fewer frames than the {frames_needed} that a clip spans; the last one is repeated"
        logger.warning("%s: %s", named(short), what)
    return [info for _, info in found if isinstance(info, VideoError)]


def _try_open(rows: Dataset, index: int, **opening) -> tuple[str, VideoInfo | VideoError]:
    try:
        arguments = source_of(rows[index]["video"], index)
        return arguments["name"], probe(**arguments, **opening)
    except VideoError as error:
        return error.path, error
