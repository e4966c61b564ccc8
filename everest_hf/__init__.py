"""EVEREST: efficient masked video autoencoding, as a Transformers model.

Importing the package registers its classes with AutoConfig, AutoModel, AutoModelForPreTraining,
AutoModelForVideoClassification and AutoVideoProcessor. What only some programs need is imported when it is first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)

from .configuration_everest import EverestConfig
from .modeling_everest import (
    EverestForPreTraining,
    EverestForVideoClassification,
    EverestModel,
    EverestPreTrainedModel,
)
from .version import __version__
from .video_processing_everest import EverestVideoProcessor

if TYPE_CHECKING:
    from .api import evaluate, train
    from .data import load_videos
    from .inference.api import embed, predict
    from .inference.stream import EverestStream
    from .inference.video_windows import windows
    from .training.recipe import Recipe

__all__ = [
    "EverestConfig",
    "EverestForPreTraining",
    "EverestForVideoClassification",
    "EverestModel",
    "EverestPreTrainedModel",
    "EverestStream",
    "EverestVideoProcessor",
    "Recipe",
    "__version__",
    "embed",
    "evaluate",
    "load_videos",
    "predict",
    "train",
    "windows",
]

# Names that are imported when they are first used, and where from.
_LAZY = {
    "EverestStream": ".inference.stream",
    "Recipe": ".training.recipe",
    "embed": ".inference.api",
    "evaluate": ".api",
    "load_videos": ".data",
    "predict": ".inference.api",
    "train": ".api",
    "windows": ".inference.video_windows",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


AutoConfig.register("everest", EverestConfig, exist_ok=True)
AutoModel.register(EverestConfig, EverestModel, exist_ok=True)
AutoModelForPreTraining.register(EverestConfig, EverestForPreTraining, exist_ok=True)
AutoModelForVideoClassification.register(EverestConfig, EverestForVideoClassification, exist_ok=True)
AutoVideoProcessor.register(EverestConfig, EverestVideoProcessor, exist_ok=True)
