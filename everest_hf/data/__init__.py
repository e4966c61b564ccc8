"""From a source of videos to uint8 batches.

`load_videos` makes a `datasets.Dataset` of rows (video, label) of whatever holds videos, and refuses what is wrong
with them before any training (sources.py, lists.py, tables.py, shards.py, rows.py, segments.py, labels.py,
checking.py). splits.py and annotations.py write lists. `VideoClips` (training) and `VideoViews` (evaluation) make
tensors of the rows (clips.py, sampling.py), `StreamedClips` of those of a stream (streams.py); `collate` makes batches
(batches.py).
"""

from .batches import BadVideos, collate, share_of_batches
from .checking import Opened, check_readable
from .clips import (
    MAX_REPLACEMENTS,
    ClipReader,
    EpochSampler,
    VideoClips,
    VideoViews,
    balanced_order,
    epoch_order,
    replacements,
    seed_of,
)
from .rows import (
    NAMED_CULPRITS,
    VIDEO_SUFFIXES,
    class_names_of,
    differences,
    head_of,
    identity_of,
    name_of,
    source_of,
)
from .sources import frame_folders_below, load_videos, stream_videos, videos_below
from .streams import StreamedClips

__all__ = [
    "MAX_REPLACEMENTS",
    "NAMED_CULPRITS",
    "VIDEO_SUFFIXES",
    "BadVideos",
    "ClipReader",
    "EpochSampler",
    "Opened",
    "StreamedClips",
    "VideoClips",
    "VideoViews",
    "balanced_order",
    "check_readable",
    "class_names_of",
    "collate",
    "differences",
    "epoch_order",
    "frame_folders_below",
    "head_of",
    "identity_of",
    "load_videos",
    "name_of",
    "replacements",
    "seed_of",
    "share_of_batches",
    "source_of",
    "stream_videos",
    "videos_below",
]
