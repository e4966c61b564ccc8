"""What a trained model is used for, shared by the commands, the page and notebooks: load it, classify, embed."""

from .classify import classify, evaluation_views, read_view, to_uint8, top_labels
from .embed import embed_videos, feature_function
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

__all__ = [
    "CLASSIFICATION",
    "FEATURES",
    "PRETRAINING",
    "architecture_of",
    "check_classifier",
    "chosen_model",
    "classify",
    "embed_videos",
    "evaluation_views",
    "feature_function",
    "load_checkpoint",
    "load_encoder",
    "newest_run",
    "read_view",
    "to_uint8",
    "top_labels",
]
