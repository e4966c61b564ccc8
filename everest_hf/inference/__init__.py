"""What a trained model is used for, shared by the commands, the page and notebooks.

Load it (loading.py), find the videos that are named (sources.py), read them in batches (batches.py), classify
(classify.py, predictions.py), embed (embed.py, features.py), search (neighbours.py), export (export.py), read a window
of a video (windows.py), run a model over the overlapping windows of a long one (video_windows.py, slots.py,
embed_windows.py, localization.py, timelines.py) or over frames that keep coming (stream.py, watch.py). `predict` and
`embed` of the package do all of it in one call (api.py).
"""

from .classify import classify, evaluation_views, read_view, to_uint8, top_labels
from .embed import embed_videos, feature_function
from .embed_windows import embed_windows
from .features import read_features
from .grid import tokens_to_grid
from .loading import (
    CLASSIFICATION,
    FEATURES,
    PRETRAINING,
    architecture_of,
    check_classifier,
    chosen_model,
    load_checkpoint,
    load_encoder,
    newest_run,
)
from .neighbours import label_figures, search
from .predictions import Prediction, predicting, write_predictions
from .sources import find_videos
from .timelines import Timeline, TimelineSegment, timeline, write_captioned
from .video_windows import VideoWindows, WindowOutput
from .windows import Window, WindowReader, read_window

__all__ = [
    "CLASSIFICATION",
    "FEATURES",
    "PRETRAINING",
    "Prediction",
    "Timeline",
    "TimelineSegment",
    "VideoWindows",
    "Window",
    "WindowOutput",
    "WindowReader",
    "architecture_of",
    "check_classifier",
    "chosen_model",
    "classify",
    "embed_videos",
    "embed_windows",
    "evaluation_views",
    "feature_function",
    "find_videos",
    "label_figures",
    "load_checkpoint",
    "load_encoder",
    "newest_run",
    "predicting",
    "read_features",
    "read_view",
    "read_window",
    "search",
    "timeline",
    "to_uint8",
    "tokens_to_grid",
    "top_labels",
    "write_captioned",
    "write_predictions",
]
