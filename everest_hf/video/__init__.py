"""Video files: from a path or bytes to frames. The only place that opens one.

`open_video`, `probe`, `read_frames` and `read_clip` read (reading.py) with a decoder (decoders.py) that finds the frames
of this file by their numbers (containers.py), within a time limit (isolation.py). Whatever goes wrong is a `VideoError`.
"""

from ..video_processing_everest import FRAME_SAMPLINGS, frame_indices, segment_indices, stride_indices
from ..video_reading_everest import MAX_PIXELS, TIME_LIMIT
from .decoders import BACKENDS, DECODERS, Decoder, decoders_of
from .errors import NotKeptError, VideoError
from .reading import VideoInfo, check_kept, open_video, probe, read_clip, read_frames
from .segments import Segment

__all__ = [
    "BACKENDS",
    "DECODERS",
    "FRAME_SAMPLINGS",
    "MAX_PIXELS",
    "TIME_LIMIT",
    "Decoder",
    "NotKeptError",
    "Segment",
    "VideoError",
    "VideoInfo",
    "check_kept",
    "decoders_of",
    "frame_indices",
    "open_video",
    "probe",
    "read_clip",
    "read_frames",
    "segment_indices",
    "stride_indices",
]
