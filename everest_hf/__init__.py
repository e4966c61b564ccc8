"""EVEREST: efficient masked video autoencoding, as a Transformers model.

Importing the package registers its classes with AutoConfig, AutoModel, AutoModelForPreTraining,
AutoModelForVideoClassification and AutoVideoProcessor. `Recipe`, `train` and `evaluate` are imported when they are
first used, with the libraries that only training needs.
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

__all__ = [
    "EverestConfig",
    "EverestForPreTraining",
    "EverestForVideoClassification",
    "EverestModel",
    "EverestPreTrainedModel",
    "EverestVideoProcessor",
    "Recipe",
    "__version__",
    "evaluate",
    "train",
]

if TYPE_CHECKING:
    from .api import evaluate, train
    from .training.recipe import Recipe

# Names that are imported when they are first used, and where from.
_LAZY = {"Recipe": ".training.recipe", "evaluate": ".api", "train": ".api"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


AutoConfig.register("everest", EverestConfig, exist_ok=True)
AutoModel.register(EverestConfig, EverestModel, exist_ok=True)
AutoModelForPreTraining.register(EverestConfig, EverestForPreTraining, exist_ok=True)
AutoModelForVideoClassification.register(EverestConfig, EverestForVideoClassification, exist_ok=True)
AutoVideoProcessor.register(EverestConfig, EverestVideoProcessor, exist_ok=True)
