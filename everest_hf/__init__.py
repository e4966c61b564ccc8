"""EVEREST: efficient masked video autoencoding, as a Transformers model.

Importing the package registers its classes with AutoConfig, AutoModel, AutoModelForPreTraining,
AutoModelForVideoClassification and AutoVideoProcessor.
"""

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
    "__version__",
]

AutoConfig.register("everest", EverestConfig, exist_ok=True)
AutoModel.register(EverestConfig, EverestModel, exist_ok=True)
AutoModelForPreTraining.register(EverestConfig, EverestForPreTraining, exist_ok=True)
AutoModelForVideoClassification.register(EverestConfig, EverestForVideoClassification, exist_ok=True)
AutoVideoProcessor.register(EverestConfig, EverestVideoProcessor, exist_ok=True)
