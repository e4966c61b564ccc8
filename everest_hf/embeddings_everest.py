"""From clips to embedded tokens: the patch projection, the choice of tokens, and their positions.

What is dropped is dropped here, before anything else is computed for it. Letters in shapes as in modeling_everest.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .camera_everest import camera_moves, changes_beside_camera
from .configuration_everest import EverestConfig
from .kernels_everest import (
    EverestPatchProjection,
    project,
    project_for_scores,
    serve_as_tokens,
    working_dtype,
)
from .packing_everest import Packing, choose_above, choose_of_batch, ids_in_clip, packed
from .selection_everest import (
    Grid,
    check_inputs,
    draw_noise,
    gather_tokens,
    motion_scores,
    patchify,
    scores_of_changes,
    select_slots,
    select_tokens,
    split_by_mask,
    take_slots,
    token_grid,
)


def sincos_table(num_positions: int, dim: int) -> torch.Tensor:
    """Return the fixed table (num_positions, dim), float32: sine on even and cosine on odd channels, base 10000."""
    position = torch.arange(num_positions, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # (dim / 2,)
    angle = position[:, None] * frequency  # (num_positions, dim / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class EverestPositionEmbeddings(nn.Module):
    """A sine-cosine table over the flat token index; not stored in checkpoints."""

    table: torch.Tensor

    def __init__(self, grid_size: Grid, dim: int):
        super().__init__()
        self.grid_size = grid_size
        self.dim = dim
        self.register_buffer("table", self.compute(), persistent=False)

    def compute(self) -> torch.Tensor:
        return sincos_table(math.prod(self.grid_size), self.dim)

    def _apply(self, fn, *args, **kwargs):
        # A model may be cast to 16 bits; the table is a constant and stays exact.
        was_meta = self.table.is_meta
        super()._apply(fn, *args, **kwargs)
        if self.table.dtype != torch.float32 or (was_meta and not self.table.is_meta):
            self.table = self.compute().to(self.table.device)
        return self

    def forward(self, grid_size: Grid) -> torch.Tensor:
        """Return the table (N, D) for a grid, interpolated over slot, row and column where it is not its own."""
        if grid_size == self.grid_size:
            return self.table
        volume = self.table.T.reshape(1, self.dim, *self.grid_size)
        volume = F.interpolate(volume, size=grid_size, mode="trilinear", align_corners=False)
        return volume.flatten(2)[0].T  # (N, D)


class EverestEmbeddingOutput(NamedTuple):
    """What the embedding layer hands on.

    hidden_states (B, K, D): embedded tokens with positions. kept_ids (B, K). target_ids (B, M) and targets (B, M, P)
    float32: the tokens to predict and their pixels, in pre-training. slots (B, t): with frame selection. scores (B, N)
    float32: where asked for. packing: of the kept tokens, where clips differ in their number.
    """

    hidden_states: torch.Tensor
    kept_ids: torch.Tensor
    target_ids: torch.Tensor | None
    targets: torch.Tensor | None
    slots: torch.Tensor | None
    scores: torch.Tensor | None
    packing: Packing | None


class EverestEmbeddings(nn.Module):
    """Embeds a clip, chooses slots and tokens, and drops the rest before anything else is computed for them."""

    def __init__(self, config: EverestConfig):
        super().__init__()
        self.config = config
        self.projection = EverestPatchProjection(config.tubelet_dim, config.hidden_size)
        self.position_embeddings = EverestPositionEmbeddings(config.grid_size, config.hidden_size)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pretraining: bool = False,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        frame_noise: torch.Tensor | None = None,
        keep_ratio: float | None = None,
        interpolate_pos_encoding: bool = False,
        output_scores: bool = False,
    ) -> EverestEmbeddingOutput:
        """Embed the kept tokens of clips (B, T, C, H, W). Arguments and errors as in `EverestModel.forward`."""
        config = self.config
        config.check_selection()
        check_inputs(config, pixel_values, bool_masked_pos, frame_noise, keep_ratio, interpolate_pos_encoding)
        grid = token_grid(config, pixel_values, interpolate_pos_encoding)
        ratio = config.keep_ratio if keep_ratio is None else keep_ratio
        keeps_all = ratio == 1 and not pretraining and bool_masked_pos is None
        needs_scores = config.selects_by_motion and bool_masked_pos is None and not keeps_all

        patches = patchify(pixel_values, config.tubelet_size, config.patch_size)  # (B, c * S, P)
        embeddings = scores = slots = target_ids = None
        if needs_scores or config.selects_frames or output_scores:
            num_candidates = pixel_values.shape[1] // config.tubelet_size
            embeddings, scores = self._embed_and_score(pixel_values, patches)  # (B, c * S, D), (B, c * S)
            if config.selects_frames:
                slots = self._select_slots(scores, num_candidates, grid[0], pretraining, frame_noise)  # (B, t)
                patches = take_slots(patches, slots, num_candidates)
                embeddings, scores = self._score_chosen(pixel_values, embeddings, slots)  # (B, N, D), (B, N)

        packing = None
        if bool_masked_pos is not None:
            kept_ids, masked_ids = (ids.to(patches.device) for ids in split_by_mask(bool_masked_pos))
            target_ids = masked_ids if pretraining else None
        elif pretraining:
            draw = partial(draw_noise, noise, self.training, patches.shape[0], patches.device)
            kept_ids, target_ids = select_tokens(config, scores, draw, grid, ratio, pretraining)
        else:
            kept_ids, packing = self.choose(patches, scores, grid, keep_ratio, noise)
            if packing is not None:
                patches, embeddings = packed(patches), None if embeddings is None else packed(embeddings)

        hidden_states = self._embed_kept(patches, embeddings, None if keeps_all else kept_ids)  # (B, K, D)
        kept_ids = ids_in_clip(kept_ids, packing, grid)
        return EverestEmbeddingOutput(
            hidden_states=self.add_positions(hidden_states, kept_ids, grid),
            kept_ids=kept_ids,
            target_ids=target_ids,
            targets=None if target_ids is None else pixel_targets(patches, target_ids, config),
            slots=slots,
            scores=scores if output_scores else None,
            packing=packing,
        )

    def choose(
        self,
        tokens: torch.Tensor,
        scores: torch.Tensor | None,
        grid: Grid,
        keep_ratio: float | None = None,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Packing | None]:
        """Choose of tokens (B, N, any) by scores (B, N): ids (B, K), or packed ids (1, total) among all B * N."""
        config, (batch, num_tokens) = self.config, tokens.shape[:2]
        ratio = config.keep_ratio if keep_ratio is None else keep_ratio
        if ratio == 1:
            return torch.arange(num_tokens, device=tokens.device).expand(batch, -1), None
        if config.token_budget == "clip" or not (self.training or keep_ratio is None):
            draw = partial(draw_noise, noise, self.training, batch, tokens.device)
            return select_tokens(config, scores, draw, grid, ratio, pretraining=False)[0], None
        assert scores is not None  # a budget of the batch is for selections by motion alone
        bounds = config.token_bounds(grid)
        if not self.training:
            return choose_above(scores, config.score_threshold(), *bounds)
        config.check_bounds(ratio, grid)
        return choose_of_batch(scores, batch * config.count_tokens(ratio, grid), *bounds)

    def add_positions(self, tokens: torch.Tensor, ids: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Add the positions of ids (B, K) in a grid to tokens (B, K, D)."""
        return tokens + self.position_embeddings(grid)[ids].to(tokens.dtype)

    @torch.no_grad()
    def _embed_and_score(
        self, pixel_values: torch.Tensor, patches: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Embed all tokens in float32 and score them, so that no other precision changes what is selected.

        Returns no embeddings where the camera's motion is taken off: there the scores are not made of them.
        """
        if self.config.compensates_camera:
            return None, self.score_beside_camera(pixel_values)
        num_slots = pixel_values.shape[1] // self.config.tubelet_size
        embeddings = project_for_scores(self.projection, patches, num_slots)  # (B, t * S, D)
        return embeddings, motion_scores(embeddings.unflatten(1, (num_slots, -1)))

    def _score_chosen(
        self, pixel_values: torch.Tensor, embeddings: torch.Tensor | None, slots: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return what `_embed_and_score` gives of the chosen slots (B, t) alone; embeddings: of all candidates."""
        num_candidates = pixel_values.shape[1] // self.config.tubelet_size
        if embeddings is None:
            chosen = take_slots(pixel_values.flatten(2), slots, num_candidates)  # (B, T, C * H * W)
            return None, self.score_beside_camera(chosen.unflatten(2, pixel_values.shape[2:]))
        embeddings = take_slots(embeddings, slots, num_candidates)
        return embeddings, motion_scores(embeddings.unflatten(1, (slots.shape[1], -1)))

    @torch.no_grad()
    def score_beside_camera(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Score the tokens of clips (B, T, C, H, W) as `motion_scores`, by changes that the camera does not explain.

        Returns (B, t * S) float32. Where no motion of the camera is found, they are those of `motion_scores`.
        """
        config = self.config
        slots = pixel_values.float().unflatten(1, (-1, config.tubelet_size))
        moves = camera_moves(slots, sum(config.image_std) / len(config.image_std))  # (B, t - 1, 2)
        return self.score_changes(changes_beside_camera(slots, moves))

    @torch.no_grad()
    def score_changes(self, changes: torch.Tensor) -> torch.Tensor:
        """Score tokens by the changes of pixels (B, t - 1, tubelet, C, H, W) from slot to slot: (B, t * S) float32."""
        config = self.config
        patches = patchify(changes.float().flatten(1, 2), config.tubelet_size, config.patch_size)
        # The projection adds a bias, which the difference of two embeddings does not have.
        still = project(self.projection, torch.zeros_like(patches[:1, :1]), float32=True)
        moved = project(self.projection, patches, float32=True) - still  # (B, (t - 1) * S, D)
        return scores_of_changes(moved.unflatten(1, (changes.shape[1], -1)))

    def _select_slots(self, scores, num_candidates, num_slots, pretraining, noise) -> torch.Tensor:
        """Choose slots (B, t) by the config's ratio, so that the keep_ratio of a call changes no slot."""
        ratio = self.config.pretraining_keep_ratio if pretraining else self.config.keep_ratio
        if noise is None and self.training:
            noise = torch.rand(scores.shape[0], num_candidates, device=scores.device)
        return select_slots(scores, num_candidates, num_slots, ratio, noise)

    def _embed_kept(self, patches, embeddings, ids) -> torch.Tensor:
        """Embed the kept tokens (all for ids None), or pick them from the embeddings that the scores were made of."""
        if embeddings is None or not serve_as_tokens(self.projection, patches):
            return project(self.projection, patches if ids is None else gather_tokens(patches, ids))
        kept = embeddings if ids is None else gather_tokens(embeddings, ids)
        return kept.to(working_dtype(self.projection, patches.device.type))


@torch.no_grad()
def pixel_targets(patches: torch.Tensor, ids: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Return what pre-training predicts: (B, M, P) float32 in the order frame, row, column, channel.

    Only the targets are touched: gathered first, then brought back from normalised values to [0, 1] and, with
    norm_pix_loss, normalised per tubelet and channel, (x - mean) / (sqrt(unbiased variance) + 1e-6).
    """
    pixels = gather_tokens(patches, ids).float().unflatten(-1, (config.num_channels, -1))  # (B, M, C, P / C)
    statistics = zip(config.image_mean, config.image_std, strict=True)
    channels = [pixels[:, :, i] * std + mean for i, (mean, std) in enumerate(statistics)]
    targets = torch.stack(channels, dim=-1)  # (B, M, P / C, C)
    if config.norm_pix_loss:
        variance, mean = torch.var_mean(targets, dim=-2, keepdim=True)
        targets = (targets - mean) / (variance.sqrt() + 1e-6)
    return targets.flatten(2)  # (B, M, P)
