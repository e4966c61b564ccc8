"""Clips that overlap, through a model that embeds what they share once.

A slot's tokens depend on its own frames, and its scores on the slot before it (`motion_scores`). What a clip adds are
the choice among its tokens, their positions, and the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..configuration_everest import check_keep_ratio
from ..kernels_everest import project, project_for_scores, serve_as_tokens, working_dtype
from ..modeling_everest import (
    EverestForVideoClassification,
    EverestModel,
    EverestPreTrainedModel,
    reads_mean_alone,
)
from ..packing_everest import ids_in_clip, mean_of_tokens, packed
from ..selection_everest import check_inputs, gather_tokens, motion_scores, patchify


@dataclass(frozen=True)
class Slot:
    """The S tokens of a slot.

    tokens: (S, D), embedded, without positions. scores: (S,) float32, None where there is no slot before it. source:
    (1, S, any), of which the scores of the slot after it are made; compensated ones of pixels, (1, tubelet_size, C, H, W).
    """

    tokens: torch.Tensor
    scores: torch.Tensor | None
    source: torch.Tensor


class SlotEncoder:
    """Embeds and scores slots, and encodes clips of them, with the results of the model on each clip alone.

    model: an `EverestForVideoClassification` or `EverestModel` in evaluation mode. keep_ratio: as in its forward.

    Raises:
        ValueError: it is another model, in training, or one that chooses frames; or the ratio is impossible.
    """

    def __init__(self, model: EverestPreTrainedModel, keep_ratio: float | None = None):
        config = model.config
        _check_model(model)
        if keep_ratio is not None:
            check_keep_ratio(keep_ratio)
        config.check_selection()
        self.config, self._model = config, model
        self._encoder: EverestModel = model.base_model  # type: ignore[assignment]  # of either class
        self._embeddings = self._encoder.embeddings
        self._ratio = keep_ratio
        ratio = config.keep_ratio if keep_ratio is None else keep_ratio
        self._needs_scores = config.selects_by_motion and ratio != 1

    @property
    def num_slots(self) -> int:
        """How many slots a clip has."""
        return self.config.grid_size[0]

    @torch.no_grad()
    def embed(self, frames: torch.Tensor, before: Slot | None) -> Slot:
        """Embed the slot of frames (tubelet_size, C, H, W), and score it against the slot before it.

        Raises:
            ValueError: the frames do not fit the model.
        """
        config, projection = self.config, self._embeddings.projection
        check_inputs(config, frames[None, :1].expand(-1, config.num_frames, -1, -1, -1), None, None, None, False)
        frames = frames[None].to(self._model.device)
        patches = patchify(frames, config.tubelet_size, config.patch_size)  # (1, S, P)
        # One slot at a time: then the same pixels give the same embeddings to the bit, and tokens that do not change
        # tie as they do in the model.
        if config.compensates_camera:
            source, tokens = frames, project(projection, patches)
        elif serve_as_tokens(projection, patches):
            source = project(projection, patches, float32=True)  # (1, S, D)
            tokens = source.to(working_dtype(projection, patches.device.type))
        else:
            source, tokens = patches, project(projection, patches)
        scores = None
        if self._needs_scores and before is not None:
            pair = torch.cat([before.source, source], dim=1)  # (1, 2 * S, any) or (1, 2 * tubelet_size, C, H, W)
            scores = self._score(pair)[0, patches.shape[1] :]
        return Slot(tokens[0], scores, source)

    def _score(self, pair: torch.Tensor) -> torch.Tensor:
        """Score the tokens (1, 2 * S) of two slots by their sources."""
        projection = self._embeddings.projection
        if self.config.compensates_camera:
            return self._embeddings.score_beside_camera(pair)
        if not serve_as_tokens(projection, pair):
            pair = project_for_scores(projection, pair, 2)
        return motion_scores(pair.unflatten(1, (2, -1)))

    @torch.no_grad()
    def encode(self, clips: Sequence[Sequence[Slot]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the features (B, D) of clips, each of `num_slots` slots, and a classifier's logits (B, num_labels).

        They are float32 and on the CPU. See `feature_function` for what features are.
        """
        grid, encoder = self.config.grid_size, self._encoder
        tokens = torch.stack([torch.cat([slot.tokens for slot in slots]) for slots in clips])  # (B, N, D)
        scores = torch.stack([_scores_of(slots) for slots in clips]) if self._needs_scores else None  # (B, N)
        ids, packing = self._embeddings.choose(tokens, scores, grid, self._ratio)  # (B, K)
        if packing is not None:
            tokens = packed(tokens)
        tokens, model = gather_tokens(tokens, ids), self._model  # (B, K, D)
        tokens = self._embeddings.add_positions(tokens, ids_in_clip(ids, packing, grid), grid)
        if not isinstance(model, EverestForVideoClassification):
            encoded = encoder.encode(tokens, packing=packing)[0].float()
            return mean_of_tokens(encoded, packing)[:, 0].cpu(), None
        read = "mean" if reads_mean_alone(self.config, training=False) else None
        encoded = encoder.encode(tokens, read=read, packing=packing)[0]
        features = model.pool(encoded, None if read else packing)
        return features.float().cpu(), model.classifier(features).float().cpu()


def _scores_of(slots: Sequence[Slot]) -> torch.Tensor:
    """Return the scores (N,) of a clip, in which its first slot takes those of the second."""
    return torch.cat([slot.scores for slot in (slots[1], *slots[1:])])  # type: ignore[misc]  # only a first has none


def _check_model(model: EverestPreTrainedModel) -> None:
    if not isinstance(model, (EverestModel, EverestForVideoClassification)):
        raise ValueError(
            f"the model is {type(model).__name__}; expected EverestForVideoClassification or EverestModel, which loads "
            "a pre-training checkpoint too"
        )
    if model.training:
        raise ValueError("the model is in training mode, in which no two results are the same; call model.eval()")
    if model.config.selects_frames:
        raise ValueError(
            f"frame_oversampling is {model.config.frame_oversampling:g}: the model chooses frames of each clip, so that "
            "overlapping clips have no slots in common; load it with frame_oversampling=1"
        )
