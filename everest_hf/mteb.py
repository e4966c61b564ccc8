"""A checkpoint as a model of mteb, whose tasks then run on it (`pip install everest-hf[mteb]`)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from tqdm.auto import tqdm
from transformers.video_utils import VideoMetadata

from .inference import feature_function
from .inference.loading import load_encoder, model_folder


class EverestEncoder(AbsEncoder):
    """The loader of `model_meta`: videos as mteb's tasks give them in, features out, see `encode`."""

    def __init__(self, model_name: str, revision: str | None = None, *, checkpoint: str, device: str | None = None):
        self.model, self.processor = load_encoder(checkpoint)
        self.model.to(device or self.model.device)
        self._features_of = feature_function(self.model)

    @torch.inference_mode()
    def encode(self, inputs, *, show_progress_bar: bool = True, **kwargs: Any) -> np.ndarray:
        """Return the features (n, D) float32 of n videos, each of its centre clip, as `everest-hf embed` has them.

        inputs: a loader of mteb's, of rows with `video`, a decoder of torchcodec. What comes with it, as sound, is left
        out. kwargs: what mteb says of the task, which changes nothing.
        """
        inputs.collate_fn = self._clips
        batches = tqdm(inputs, "embed", disable=not show_progress_bar)
        return torch.cat([self._features_of(clips.to(self.model.device)).cpu() for clips in batches]).numpy()

    def _clips(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """Return the pixel values (B, T, C, H, W) of videos."""
        return torch.cat([self._clip(row["video"]) for row in rows])

    def _clip(self, video) -> torch.Tensor:
        """Return the pixel values (1, T, C, H, W) of the centre clip of a video."""
        metadata = video.metadata
        about = VideoMetadata(metadata.num_frames, fps=metadata.average_fps, video_backend="torchcodec")
        frames = video.get_frames_at(self.processor.sample_frames(about)).data  # (T, C, H, W)
        return self.processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"]


def model_meta(checkpoint: str | Path) -> ModelMeta:
    """Return what mteb needs to know of a checkpoint, a folder, a run or a name on the Hub, to load and to list it.

    >>> mteb.evaluate(model_meta("runs/pretrain"), mteb.get_tasks(["HMDB51Clustering"]))  # doctest: +SKIP

    The name of a folder is "everest_hf/" and its last part. What only its maker knows (licence, training data, date) is
    None; `model_meta(...).model_copy(update={...})` says it.

    Raises:
        ValueError: there is no such checkpoint.
    """
    folder = model_folder(checkpoint)
    model, _ = load_encoder(str(folder))
    weights = {name: weight.numel() for name, weight in model.named_parameters() if not name.startswith("classifier.")}
    parameters = sum(weights.values())
    return ModelMeta(
        loader=EverestEncoder,
        loader_kwargs={"checkpoint": str(folder)},
        name=f"everest_hf/{Path(checkpoint).resolve().name}" if folder.is_dir() else str(checkpoint),
        revision=None,
        release_date=None,
        languages=None,
        n_parameters=parameters,
        memory_usage_mb=round(4 * parameters / 2**20),
        max_tokens=None,
        embed_dim=model.config.hidden_size,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["Transformers", "PyTorch", "safetensors"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["video"],
        model_type=["dense"],
    )
