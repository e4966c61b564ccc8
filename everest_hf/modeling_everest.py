"""EVEREST: a masked video autoencoder and video classifier that works on the tokens that change over time.

Source: "EVEREST: Efficient Masked Video Autoencoder by Removing Redundant Spatiotemporal Tokens" (ICML 2024,
arXiv 2211.10636). From top to bottom: selection of tokens (pure functions on tensors), embeddings (where tokens are
dropped), transformer layers, the three models.

Letters in shapes: B clips, T frames, C channels, H x W pixels, c candidate slots, t slots, S places in a slot,
N = t * S tokens in slot-major order, K kept tokens, M target tokens, P values in a token's pixels, D hidden size.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN, GELUActivation
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_everest import EverestConfig, check_keep_ratio, problem_type_of, share_of

# One checkpoint serves all of these, with trust_remote_code, where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_everest.EverestConfig",
    "AutoModel": "modeling_everest.EverestModel",
    "AutoModelForPreTraining": "modeling_everest.EverestForPreTraining",
    "AutoModelForVideoClassification": "modeling_everest.EverestForVideoClassification",
}

# Default of the fields that every output has: `ModelOutput` wants one.
GIVEN: Any = None


# ---------------------------------------------------------------------------------------------- selection of tokens


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pick tokens by id: x (B, N, D) and ids (B, K) give (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def sorted_ids(x: torch.Tensor, descending: bool = False) -> torch.Tensor:
    """Return the ids (B, N) that put x (B, N) in order, the lower id first among equals."""
    if torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, but its TopK promises just this; torch's own breaks ties as it likes.
        return x.topk(x.shape[-1], dim=-1, largest=descending).indices
    return x.sort(dim=-1, descending=descending, stable=True).indices


def top_ids(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ids (B, k) of the k largest of scores (B, N), largest first, the lower id first among equals.

    Slots 0 and 1 always tie.
    """
    return sorted_ids(scores, descending=True)[:, :k]


def motion_scores(embeddings: torch.Tensor) -> torch.Tensor:
    """Score each token by its L2 distance from the same place in the slot before (EVEREST, equation 1).

    embeddings: (B, t, S, D) before positions, t >= 2. Returns (B, t * S) float32. Slot 0 takes the scores of slot 1.
    """
    distance = torch.linalg.vector_norm(embeddings.float().diff(dim=1), dim=-1)  # (B, t - 1, S)
    return torch.cat([distance[:, :1], distance], dim=1).flatten(1)  # (B, t * S)


def select_slots(scores: torch.Tensor, num_candidates: int, num_slots: int, k: int, noise: torch.Tensor | None):
    """Choose the slots that hold most informative tokens (EVEREST, information-intensive frame selection).

    scores: (B, c * S) of all candidates, of which the k largest are informative; p of a slot is its share of them.
    noise: (B, c) uniform in [0, 1) draws slots without replacement with probability p; without it the slots of
    largest p are taken, the lower first among equals. Returns slot ids (B, num_slots) in time order.
    """
    num_places = scores.shape[1] // num_candidates
    slot_of_token = top_ids(scores, k) // num_places  # (B, k)
    counts = scores.new_zeros(scores.shape[0], num_candidates)
    counts = counts.scatter_add(1, slot_of_token, torch.ones_like(slot_of_token, dtype=counts.dtype))
    if noise is not None:
        # An exponential race: the first of waiting times with rates p to end is a draw with probability p, the
        # second a draw from the rest, and so on. Waiting times are -log(1 - noise) / p; the shortest is sought.
        waiting = -torch.log1p(-noise.to(counts.dtype))
        counts = counts / waiting.clamp_min(torch.finfo(counts.dtype).tiny)
    return top_ids(counts, num_slots).sort(dim=-1).values


def split_by_mask(bool_masked_pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a mask (B, N), True = masked, into ids of the visible and of the masked tokens, each in time order.

    Raises:
        ValueError: the clips of the batch do not have the same number of masked tokens, or all or none is masked.
    """
    masked = bool_masked_pos.bool()
    counts = masked.sum(dim=1).tolist()  # the number of tokens is a shape, so the host must know it
    if len(set(counts)) != 1 or not 0 < counts[0] < masked.shape[1]:
        raise ValueError(
            f"bool_masked_pos masks {counts} of the {masked.shape[1]} tokens of the clips; every clip of a batch "
            "must have the same number, with at least one token masked and one visible"
        )
    order = sorted_ids(masked.to(torch.uint8))  # (B, N), visible first
    num_visible = masked.shape[1] - counts[0]
    return order[:, :num_visible], order[:, num_visible:]


def fixed_noise(batch_size: int, n: int, device: torch.device) -> torch.Tensor:
    """Return (batch_size, n) pseudo-random numbers in [0, 1): always the same, and the same for each clip.

    Evaluation uses it in place of a random draw, so that a clip's result depends on nothing but the clip. The mix is
    a multiplicative hash of the index with Knuth's constant, done in integers so that all devices agree.
    """
    x = torch.arange(1, n + 1, device=device) ^ 0  # which keeps compilers from doing the rest as an index, in 32 bits
    x = x * 2654435761 % 2**32
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    x = x ^ (x >> 13)
    return (x.float() / 2**32).expand(batch_size, n)


def tube_ids(place_ids: torch.Tensor, num_slots: int, num_places: int) -> torch.Tensor:
    """Repeat places (B, k) in every slot: token ids (B, num_slots * k) in slot-major order."""
    first = torch.arange(num_slots, device=place_ids.device) * num_places  # (t,)
    return (first[:, None] + place_ids[:, None, :]).flatten(1)


# ------------------------------------------------------------------------------------------------------- embeddings


def patchify(pixel_values: torch.Tensor, tubelet_size: int, patch_size: int) -> torch.Tensor:
    """Cut clips (B, T, C, H, W) into tokens' pixels (B, N, P), each in the order channel, frame, row, column."""
    batch, frames, channels, height, width = pixel_values.shape
    x = pixel_values.reshape(
        batch,
        frames // tubelet_size,
        tubelet_size,
        channels,
        height // patch_size,
        patch_size,
        width // patch_size,
        patch_size,
    )
    x = x.permute(0, 1, 4, 6, 3, 2, 5, 7)  # (B, t, rows, columns, C, tubelet, patch, patch)
    return x.flatten(4).flatten(1, 3)  # (B, N, P)


def sincos_table(num_positions: int, dim: int) -> torch.Tensor:
    """Return the fixed table (num_positions, dim), float32: sine on even and cosine on odd channels, base 10000."""
    position = torch.arange(num_positions, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # (dim / 2,)
    angle = position[:, None] * frequency  # (num_positions, dim / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class EverestPositionEmbeddings(nn.Module):
    """A sine-cosine table over the flat token index; not stored in checkpoints."""

    table: torch.Tensor

    def __init__(self, grid_size: tuple[int, int, int], dim: int):
        super().__init__()
        self.grid_size = grid_size
        self.dim = dim
        self.register_buffer("table", self.compute(), persistent=False)

    def compute(self) -> torch.Tensor:
        slots, rows, columns = self.grid_size
        return sincos_table(slots * rows * columns, self.dim)

    def _apply(self, fn, *args, **kwargs):
        # A model may be cast to 16 bits; the table is a constant and stays exact.
        was_meta = self.table.is_meta
        super()._apply(fn, *args, **kwargs)
        if self.table.dtype != torch.float32 or (was_meta and not self.table.is_meta):
            self.table = self.compute().to(self.table.device)
        return self

    def forward(self, grid_size: tuple[int, int, int]) -> torch.Tensor:
        """Return the table (N, D) for a grid, interpolated over slot, row and column where it is not its own."""
        if grid_size == self.grid_size:
            return self.table
        volume = self.table.T.reshape(1, self.dim, *self.grid_size)
        volume = F.interpolate(volume, size=grid_size, mode="trilinear", align_corners=False)
        return volume.flatten(2)[0].T  # (N, D)


def without_autocast(device_type: str):
    """Return a context that computes in the precision that is written; the meta device knows no autocast."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def splits_products(device: torch.device) -> bool:
    """Whether products in float32 are made of three in bf16 there: on NVIDIA's GPUs that have matrix units for it."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def split_float(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors in bf16 whose sum is x (float32) to 16 bits.

    The first is x cut off after 8 bits, so that no cast rounds it: a compiler is free to leave out casts there and back.
    """
    first = (x.view(torch.int32) & -(2**16)).view(torch.float32)
    return first.bfloat16(), (x - first).bfloat16()


def split_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (..., P) times weight (D, P) as (..., D), all float32, by matrix units for bf16.

    With x = x1 + x2 and weight = w1 + w2 in bf16 it is x1 w1 + x1 w2 + x2 w1, added up in float32. It errs by 1e-5
    of the result.
    """
    (x1, x2), (w1, w2) = split_float(x.flatten(0, -2)), split_float(weight)
    first = torch.mm(x1, torch.cat([w1, w2]).T, out_dtype=torch.float32)  # (rows, 2 * D)
    second = torch.mm(x2, w1.T, out_dtype=torch.float32)  # (rows, D)
    first, between = first.chunk(2, dim=-1)
    return (first + (between + second)).unflatten(0, x.shape[:-1])


class EverestPatchProjection(nn.Linear):
    """The 3-D patch projection as a matrix product over a token's pixels."""

    def forward(self, patches: torch.Tensor, float32: bool = False) -> torch.Tensor:
        """Project (..., P) to (..., D); with `float32` in that precision, whatever the weights' and autocast's.

        Selection compares embeddings, so it must not change with the precision of the rest. The cast is made here,
        inside the module, because hooks of offloading bring the weights in only while the module is called.
        """
        if not float32:
            return super().forward(patches.to(self.weight.dtype))
        with without_autocast(patches.device.type):
            if splits_products(patches.device):
                return split_linear(patches.float(), self.weight.float()) + self.bias.float()
            return F.linear(patches.float(), self.weight.float(), self.bias.float())


@dataclass
class EverestEmbeddingOutput(ModelOutput):
    """What the embedding layer hands on.

    hidden_states (B, K, D): embedded tokens with positions. kept_ids (B, K). target_ids (B, M), pre-training only.
    targets (B, M, P) float32: what to predict of them. slots (B, t): with frame selection only.
    scores (B, N) float32: where asked for. grid_size: slots, rows, columns.
    """

    hidden_states: torch.Tensor = GIVEN
    kept_ids: torch.Tensor = GIVEN
    target_ids: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    grid_size: tuple[int, int, int] = GIVEN


class EverestEmbeddings(nn.Module):
    """Embeds a clip, chooses slots and tokens, and drops the rest before anything is computed for them."""

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
        """Embed the kept tokens of clips (B, T, C, H, W).

        pretraining: choose visible and target tokens, and return the targets. The other arguments as in
        `EverestModel.forward` and `EverestForPreTraining.forward`.

        Raises:
            ValueError: as `EverestModel.forward`.
        """
        config = self.config
        config.check_selection()
        grid_size = self._checked_grid(pixel_values, interpolate_pos_encoding)
        num_candidates = pixel_values.shape[1] // config.tubelet_size
        patches = patchify(pixel_values, config.tubelet_size, config.patch_size)  # (B, c * S, P)

        keep_ratio = self._keep_ratio(keep_ratio)
        keeps_all = keep_ratio == 1 and not pretraining and bool_masked_pos is None
        by_motion = config.token_selection == "motion" and bool_masked_pos is None and not keeps_all
        oversampled = config.num_input_frames > config.num_frames

        embeddings = scores = slots = None
        if by_motion or oversampled or output_scores:
            embeddings = self._embed_all(patches, num_candidates)  # (B, c * S, D)
            scores = motion_scores(embeddings.unflatten(1, (num_candidates, -1)))  # (B, c * S)
            if oversampled:
                slots = self._select_slots(scores, num_candidates, grid_size, pretraining, frame_noise)  # (B, t)
                patches, embeddings = (self._take_slots(x, slots, num_candidates) for x in (patches, embeddings))
                scores = motion_scores(embeddings.unflatten(1, (grid_size[0], -1)))  # (B, N)

        target_ids = None
        if bool_masked_pos is not None:
            kept_ids, masked_ids = self._ids_of_mask(bool_masked_pos, patches)
            target_ids = masked_ids if pretraining else None
        elif pretraining:
            kept_ids, target_ids = self._select_for_pretraining(scores, patches, grid_size, noise)
        elif keeps_all:
            kept_ids = torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[0], -1)
        else:
            kept_ids = self._select(scores, patches, grid_size, keep_ratio, noise)

        hidden_states = self._embed_kept(patches, embeddings, None if keeps_all else kept_ids)  # (B, K, D)
        positions = self.position_embeddings(grid_size)[kept_ids]  # (B, K, D)
        return EverestEmbeddingOutput(
            hidden_states=hidden_states + positions.to(hidden_states.dtype),
            kept_ids=kept_ids,
            target_ids=target_ids,
            targets=None if target_ids is None else pixel_targets(patches, target_ids, config),
            slots=slots,
            scores=scores if output_scores else None,
            grid_size=grid_size,
        )

    # -------------------------------------------------------------------------------------------- embedding

    @torch.no_grad()
    def _embed_all(self, patches: torch.Tensor, num_candidates: int) -> torch.Tensor:
        """Embed every token in float32, for the scores; no gradient, so nothing is kept for the backward pass.

        Where products are split, tokens are embedded as they differ from the first slot: their distances are the same,
        and the error of a small one is as small as itself.
        """
        if splits_products(patches.device):
            slots = patches.unflatten(1, (num_candidates, -1))  # (B, c, S, P)
            patches = (slots.float() - slots[:, :1].float()).flatten(1, 2)
        return self._project(patches, float32=True)

    def _embed_kept(self, patches, embeddings, ids) -> torch.Tensor:
        """Embed the kept tokens (all for ids None).

        In training they are projected again, from their own pixels: that costs a share of one projection, and what
        the backward pass stores and computes is then proportional to the kept tokens, not to all. So they are where
        products are split, and the embeddings not those of the tokens alone.
        """
        needs_gradient = torch.is_grad_enabled() and (
            patches.requires_grad or any(weight.requires_grad for weight in self.projection.parameters())
        )
        if embeddings is None or needs_gradient or splits_products(patches.device):
            return self._project(patches if ids is None else gather_tokens(patches, ids))
        kept = embeddings if ids is None else gather_tokens(embeddings, ids)
        return kept.to(self._working_dtype(patches.device.type))

    def _project(self, patches: torch.Tensor, float32: bool = False) -> torch.Tensor:
        """Call the projection. Quantisation puts another linear layer in its place, which takes its input alone; what
        it gives is then float32 to its own precision.
        """
        if any(isinstance(part, EverestPatchProjection) for part in self.projection.modules()):
            return self.projection(patches, float32=True) if float32 else self.projection(patches)
        if not float32:
            return self.projection(patches.to(self._projection_dtype()))
        with without_autocast(patches.device.type):
            return self.projection(patches.to(self._projection_dtype())).float()

    def _projection_dtype(self) -> torch.dtype:
        """Return the precision that the projection works in; quantised weights may hide theirs, or be no parameters."""
        dtypes = (weight.dtype for weight in self.projection.parameters() if weight.is_floating_point())
        return next(dtypes, torch.float32)

    def _working_dtype(self, device_type: str) -> torch.dtype:
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self._projection_dtype()

    # -------------------------------------------------------------------------------------------- selection

    def _select(self, scores, patches, grid_size, keep_ratio, noise) -> torch.Tensor:
        """Choose the tokens of fine-tuning and inference: ids (B, K) in time order."""
        config, (slots, rows, columns) = self.config, grid_size
        k = config.count_tokens(keep_ratio, grid_size)
        self._check_count("keep_ratio", keep_ratio, k, grid_size)
        if config.token_selection == "motion":
            return top_ids(scores, k).sort(dim=-1).values
        if config.token_selection == "random":
            order = sorted_ids(self._noise(noise, patches, slots * rows * columns))
            return order[:, :k].sort(dim=-1).values
        places = sorted_ids(self._noise(noise, patches, rows * columns))
        return tube_ids(places[:, : k // slots].sort(dim=-1).values, slots, rows * columns)

    def _select_for_pretraining(self, scores, patches, grid_size, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose visible tokens (B, K) and tokens to predict (B, M), both in the order of the draw."""
        config, (slots, rows, columns) = self.config, grid_size
        num_informative = config.count_tokens(config.pretraining_keep_ratio, grid_size)
        num_visible = config.count_tokens(1 - config.mask_ratio, grid_size)
        self._check_count("mask_ratio", config.mask_ratio, num_visible, grid_size)
        num_targets = num_informative - num_visible
        self._check_count("pretraining_keep_ratio", config.pretraining_keep_ratio, num_targets, grid_size)
        if config.token_selection == "motion":
            informative = top_ids(scores, num_informative)  # (B, K + M), by falling score
            shuffle = sorted_ids(self._noise(noise, patches, num_informative))
            order = informative.gather(1, shuffle)
        elif config.token_selection == "random":
            order = sorted_ids(self._noise(noise, patches, slots * rows * columns))
        else:
            places = sorted_ids(self._noise(noise, patches, rows * columns))
            seen, used = num_visible // slots, num_informative // slots
            parts = places[:, :seen], places[:, seen:used]
            visible, targets = (tube_ids(part, slots, rows * columns) for part in parts)
            return visible, targets
        return order[:, :num_visible], order[:, num_visible:num_informative]

    def _select_slots(self, scores, num_candidates, grid_size, pretraining, noise) -> torch.Tensor:
        """Choose slots (B, t) by motion. The config's ratio counts, so that the keep_ratio of a call moves none."""
        config, (slots, rows, columns) = self.config, grid_size
        ratio = config.pretraining_keep_ratio if pretraining else config.keep_ratio
        shape = (scores.shape[0], num_candidates)
        if noise is None and self.training:
            noise = torch.rand(shape, device=scores.device)
        if noise is not None:
            _check_shape("frame_noise", noise, shape)
            noise = noise.to(scores.device)
        k = share_of(ratio, num_candidates * rows * columns)
        return select_slots(scores, num_candidates, slots, k, noise)

    @staticmethod
    def _take_slots(x: torch.Tensor, slots: torch.Tensor, num_candidates: int) -> torch.Tensor:
        """Keep the tokens of the chosen slots (B, t): (B, c * S, D) becomes (B, t * S, D)."""
        by_slot = x.unflatten(1, (num_candidates, -1)).flatten(2)  # (B, c, S * D)
        return gather_tokens(by_slot, slots).reshape(x.shape[0], -1, x.shape[2])

    def _noise(self, noise: torch.Tensor | None, patches: torch.Tensor, n: int) -> torch.Tensor:
        """Return the caller's noise (B, n), or a fresh draw in training, or the fixed draw of evaluation."""
        batch_size = patches.shape[0]
        if noise is None:
            if self.training:
                return torch.rand(batch_size, n, device=patches.device)
            return fixed_noise(batch_size, n, patches.device)
        _check_shape("noise", noise, (batch_size, n))
        return noise.to(patches.device)

    @staticmethod
    def _ids_of_mask(bool_masked_pos: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _check_shape("bool_masked_pos", bool_masked_pos, tuple(patches.shape[:2]))
        visible, masked = (ids.to(patches.device) for ids in split_by_mask(bool_masked_pos))
        return visible, masked

    # ----------------------------------------------------------------------------------------------- checks

    def _keep_ratio(self, keep_ratio: float | None) -> float:
        if keep_ratio is None:
            return self.config.keep_ratio
        check_keep_ratio(keep_ratio)
        return keep_ratio

    def _checked_grid(self, pixel_values: torch.Tensor, interpolate: bool) -> tuple[int, int, int]:
        """Return the token grid that the model works on, or raise a ValueError that says what does not fit."""
        config = self.config
        if pixel_values.ndim != 5:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; "
                "expected five dimensions (clips, frames, channels, height, width)"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values is {pixel_values.dtype}; expected normalised floating-point frames")
        _, frames, channels, height, width = pixel_values.shape
        if channels != config.num_channels:
            raise ValueError(f"pixel_values has {channels} channels; expected num_channels={config.num_channels}")
        if not interpolate:
            self._check_same("frames", frames, config.num_input_frames)
            self._check_same("height and width", (height, width), config.frame_size)
            return config.grid_size
        for name, value, divisor in (
            ("frames", frames, config.tubelet_size),
            ("height", height, config.patch_size),
            ("width", width, config.patch_size),
        ):
            # Motion needs a neighbouring slot.
            least = 2 * divisor if name == "frames" and config.uses_motion else divisor
            if value % divisor or value < least:
                raise ValueError(f"pixel_values has {name} {value}; expected a multiple of {divisor}, {least} or more")
        candidates = frames // config.tubelet_size
        slots = round(candidates * config.num_frames / config.num_input_frames)
        slots = min(candidates, max(slots, 2 if config.uses_motion else 1))
        return slots, height // config.patch_size, width // config.patch_size

    @staticmethod
    def _check_count(name: str, value: float, count: int, grid_size: tuple[int, int, int]) -> None:
        if count <= 0:
            raise ValueError(f"{name} {value} leaves no token of the grid (slots, rows, columns) {grid_size} to use")

    @staticmethod
    def _check_same(name: str, value, expected) -> None:
        if value != expected:
            raise ValueError(
                f"pixel_values has {name} {value}; expected {expected} "
                "(interpolate_pos_encoding=True takes other sizes)"
            )


def _check_shape(name: str, x: torch.Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has the shape {tuple(x.shape)}; expected {expected}")


# -------------------------------------------------------------------------------------------------- transformer


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as two matrix products: (B, heads, K, d) each; returns (B, K, heads, d) and the weights."""
    weights = (query * scaling) @ key.transpose(2, 3)  # (B, heads, K, K)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(weights.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


# Queries of one block below: a block of weights then stays in the cache of a CPU core (benchmarks/attention.py).
_BLOCK = 256


def blocked_attention_forward(module, query, key, value, attention_mask, **kwargs):
    """As `eager_attention_forward`, a block of queries at a time; returns no weights."""
    blocks = query.split(_BLOCK, dim=2)
    outputs = [eager_attention_forward(module, block, key, value, attention_mask, **kwargs)[0] for block in blocks]
    return torch.cat(outputs, dim=1), None


def attention_function(config: EverestConfig, query: torch.Tensor, output_attentions: bool):
    """Return the implementation that gives what is asked for (fused kernels give no weights), the fastest one.

    In 16 bits on a CPU, matrix products in blocks are up to twice as fast as the fused kernel; they store the weights
    for the backward pass, which the fused kernel does not.
    """
    if output_attentions:
        return eager_attention_forward
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    if config._attn_implementation == "sdpa" and query.device.type == "cpu" and is_16_bit:
        return blocked_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)


class EverestAttention(nn.Module):
    """Multi-head attention; query and value have biases, key has none."""

    def __init__(self, config: EverestConfig, dim: int, num_heads: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (dim // num_heads) ** -0.5
        self.is_causal = False
        self.query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, output_attentions: bool = False, queries: torch.Tensor | None = None):
        """x (B, K, D) gives (B, K, D) and, where asked for, the weights (B, heads, K, K).

        The tokens of x attend to each other; where `queries` (B, Q, D) are given, these attend to x, and Q stands for
        the first K.
        """
        inputs = (self.query, x if queries is None else queries), (self.key, x), (self.value, x)
        query, key, value = (
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, K, d)
            for projection, tokens in inputs
        )
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attend = attention_function(self.config, query, output_attentions)
        x, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, is_causal=False)
        return self.output(x.flatten(2)), weights if output_attentions else None


# Tokens whose hidden layer a CPU makes at a time in inference. One of all tokens of a batch is so large that the system
# maps and clears it anew in each layer, which takes longer than the activation (benchmarks/mlp.py).
_TOKENS_AT_A_TIME = 2048


def has_hooks(*modules: nn.Module) -> bool:
    """Whether anyone listens to what these modules take or give: a hook of one of them or of all modules, or a
    forward that was put in the place of a module's own, as hooks of other libraries do.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)


class EverestMLP(nn.Module):
    """Two linear layers with an activation between them, on each token (B, K, D) alone."""

    def __init__(self, config: EverestConfig, dim: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, dim)

    def forward(self, x: torch.Tensor, mean: bool = False) -> torch.Tensor:
        """x (B, K, D) gives (B, K, D), or with `mean` its mean over the tokens (B, 1, D)."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._transform(x, mean)
        clips = max(1, _TOKENS_AT_A_TIME // x.shape[1])
        if x.shape[0] <= clips:
            return self._transform(x, mean)
        return torch.cat([self._transform(part, mean) for part in x.split(clips)])

    def _transform(self, x: torch.Tensor, mean: bool) -> torch.Tensor:
        hidden = self.fc1(x)
        if self.training and torch.is_grad_enabled() and hidden.device.type != "cpu" and not mean:
            # The backward pass computes the activation anew, at little cost: else it would be a quarter of all that is
            # kept for it, and on a GPU memory is what limits a batch.
            return checkpoint(self._activate_and_project, hidden, use_reentrant=False, preserve_rng_state=False)
        return self._activate_and_project(hidden, mean)

    def _activate_and_project(self, hidden: torch.Tensor, mean: bool = False) -> torch.Tensor:
        hidden = self._activate(hidden)
        # The mean of a linear layer's outputs is its output for the mean, at 1 / K of the work.
        return self.fc2(hidden.mean(dim=1, keepdim=True) if mean else hidden)

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the activation to what fc1 gave; in its place, where neither a backward pass nor a hook reads that."""
        if hidden.requires_grad or torch.compiler.is_compiling() or not isinstance(self.activation, GELUActivation):
            return self.activation(hidden)
        if has_hooks(*self.fc1.modules(), self.activation):
            return self.activation(hidden)
        return torch.ops.aten.gelu_(hidden)


class EverestDropPath(nn.Module):
    """Stochastic depth: drops the branch (B, K, D) of a clip with probability p in training (arXiv 1603.09382)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.p == 0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return x * (kept / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class EverestLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer."""

    def __init__(self, config: EverestConfig, dim: int, num_heads: int, intermediate_size: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = EverestAttention(config, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = EverestMLP(config, dim, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = EverestDropPath(drop_path)

    def forward(self, x: torch.Tensor, output_attentions: bool = False, first: int = 0, mean: bool = False):
        """x (B, K, D) gives (B, K, D) and, where asked for, the weights (B, heads, K, K).

        The tokens before `first` are attended to, and left out of what is given. With `mean`, the tokens' mean
        (B, 1, D) is given.
        """
        tokens = self.norm1(x)
        attended, weights = self.attention(tokens, output_attentions, queries=tokens[:, first:])
        x = x[:, first:] + self.drop_path(self.dropout(attended))
        transformed = self.drop_path(self.dropout(self.mlp(self.norm2(x), mean)))
        return (x.mean(dim=1, keepdim=True) if mean else x) + transformed, weights


class EverestEncoder(nn.Module):
    """The layers of the encoder."""

    def __init__(self, config: EverestConfig):
        super().__init__()
        depth, sizes = config.num_hidden_layers, (config.hidden_size, config.num_attention_heads)
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(
            EverestLayer(config, *sizes, config.intermediate_size, drop_path=rate) for rate in rates
        )

    def forward(
        self, x: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False, mean: bool = False
    ):
        """x (B, K, D) gives (B, K, D), then the states before each layer and after the last, and the attentions.

        With `mean`, the tokens' mean (B, 1, D) comes first.
        """
        hidden_states = [x] if output_hidden_states else []
        attentions: list[torch.Tensor] = []
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x, weights = layer(x, output_attentions, mean=mean and i == last)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(weights)
        return x, tuple(hidden_states) or None, tuple(attentions) or None


class EverestAttentivePooling(nn.Module):
    """Makes one vector of a clip's tokens: what a learned query takes from them by attention.

    The probe of "Context Autoencoder for Self-Supervised Representation Learning" (arXiv 2202.03026).
    """

    def __init__(self, config: EverestConfig):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EverestAttention(config, config.hidden_size, config.num_attention_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, K, D) gives (B, D)."""
        query = self.query.repeat(x.shape[0], 1, 1)  # (B, 1, D)
        pooled, _ = self.attention(self.norm(x), queries=query)
        return pooled[:, 0]


class EverestDecoder(nn.Module):
    """Predicts the pixels of the target tokens from the encoded visible ones."""

    def __init__(self, config: EverestConfig):
        super().__init__()
        dim = config.decoder_hidden_size
        self.projection = nn.Linear(config.hidden_size, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embeddings = EverestPositionEmbeddings(config.grid_size, dim)
        sizes = dim, config.decoder_num_attention_heads, config.decoder_intermediate_size
        self.layers = nn.ModuleList(
            EverestLayer(config, *sizes, drop_path=0.0) for _ in range(config.decoder_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=config.head_layer_norm_eps)
        self.head = nn.Linear(dim, config.tubelet_dim)

    def forward(self, encoded, visible_ids, target_ids, grid_size) -> torch.Tensor:
        """encoded (B, K, D), ids (B, K) and (B, M) give the predicted pixels (B, M, P), channel fastest."""
        visible = self.projection(encoded)  # (B, K, D')
        table = self.position_embeddings(grid_size).to(visible.dtype)
        targets = self.mask_token.to(visible.dtype) + table[target_ids]  # (B, M, D')
        x = torch.cat([visible + table[visible_ids], targets], dim=1)  # (B, K + M, D')
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            # The last layer computes no more than what is read of it.
            x, _ = layer(x, first=visible_ids.shape[1] if i == last else 0)
        return self.head(self.norm(x))


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


# ------------------------------------------------------------------------------------------------------- models


@dataclass
class EverestModelOutput(ModelOutput):
    """Output of `EverestModel`.

    last_hidden_state (B, K, D): the kept tokens, in the order of kept_ids (B, K). slots (B, t): the candidate slots
    that frame selection chose, None without it. scores (B, N): with output_scores. hidden_states and attentions:
    tuples over the layers, where asked for.
    """

    last_hidden_state: torch.Tensor = GIVEN
    kept_ids: torch.Tensor = GIVEN
    slots: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class EverestForPreTrainingOutput(ModelOutput):
    """Output of `EverestForPreTraining`.

    loss: mean squared error on the targets. logits (B, M, P): predicted pixels of the tokens target_ids (B, M), in
    the order frame, row, column, channel; normalised with norm_pix_loss. visible_ids (B, K): what the encoder saw.
    The rest as in `EverestModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor = GIVEN
    visible_ids: torch.Tensor = GIVEN
    target_ids: torch.Tensor = GIVEN
    slots: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class EverestForVideoClassificationOutput(ModelOutput):
    """Output of `EverestForVideoClassification`: loss, logits (B, num_labels), the rest as in `EverestModelOutput`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor = GIVEN
    kept_ids: torch.Tensor = GIVEN
    slots: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


Model = TypeVar("Model", bound="EverestPreTrainedModel")


class EverestPreTrainedModel(PreTrainedModel):
    """Weight initialisation, saving and the facts that Transformers asks of a model."""

    config: EverestConfig
    config_class = EverestConfig
    base_model_prefix = "everest"
    main_input_name = "pixel_values"
    input_modalities = ["video"]
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["EverestEmbeddings", "EverestLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    if TYPE_CHECKING:  # Transformers does not tell what these return

        def train(self: Model, mode: bool = True) -> Model: ...

        def eval(self: Model) -> Model: ...

        push_to_hub: Callable[..., str]  # type: ignore[assignment]  # annotated as what it wraps

    def __init__(self, config: EverestConfig, *args, **kwargs):
        config.check()  # fields may have been set, or overridden in from_pretrained, since the config was made
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            if module is getattr(self, "classifier", None):
                std = std * self.config.init_scale
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, EverestDecoder):
            nn.init.trunc_normal_(module.mask_token, std=std)
        elif isinstance(module, EverestAttentivePooling):
            nn.init.trunc_normal_(module.query, std=std)
        elif isinstance(module, EverestPositionEmbeddings):
            # Not in the checkpoint, and empty after a start on the meta device.
            module.table.copy_(module.compute())

    def save_pretrained(self, *args, **kwargs):
        """Save as every Transformers model, with the whole auto_map, so that one folder serves all Auto classes.

        A class of another file is saved with that file, if it is not __main__, and with what it imports as .name.

        Raises:
            ValueError: a field of the config has become impossible; nothing is written.
        """
        self.config.check()
        self.config.auto_map = {name: path for name, path in AUTO_MAP.items() if self._is_saved_with(path)}
        return super().save_pretrained(*args, **kwargs)

    def _is_saved_with(self, path: str) -> bool:
        """Whether Transformers copies the file of a class, module.Class, beside the weights."""
        own, module = type(self).__module__, path.split(".")[0]
        if own == __name__ or module == type(self.config).__module__.rpartition(".")[2]:
            return True
        if own == "__main__":
            return False
        file = sys.modules[own].__file__
        return file is not None and any(Path(needed).stem == module for needed in get_relative_import_files(file))

    @classmethod
    def from_videomae(cls: type[Model], name_or_path: str, **config_overrides) -> Model:
        """Load a VideoMAE or official EVEREST checkpoint: a .pth file, a Transformers folder or a Hub id.

        config_overrides: fields of `EverestConfig`, such as keep_ratio=0.6. Needs the package everest_hf.

        Raises:
            FileNotFoundError, ValueError: there is no such checkpoint, or not one that this class can take; the
                message names what is missing or not understood.
        """
        try:
            # By its name: this file also travels without the package, and the package's conversion is built on it.
            convert = importlib.import_module("everest_hf.convert")
        except ImportError as error:
            raise ImportError("from_videomae needs the package: pip install everest-hf") from error
        return convert.load_converted(cls, name_or_path, **config_overrides)

    def _wanted(self, name: str, value: bool | None) -> bool:
        """Resolve an output_* argument: the caller's, or the config's."""
        return bool(getattr(self.config, name, False) if value is None else value)


# Names of what `EverestForVideoClassification` has beside the encoder.
HEAD_OF_CLASSIFIER = [r"^pooling\.", r"^fc_norm\.", r"^classifier\."]


class EverestModel(EverestPreTrainedModel):
    """The encoder on the tokens that change over time.

    With config.use_mean_pooling (the default, as in fine-tuning) the tokens come out as the last layer leaves them;
    without it a final LayerNorm follows, as in pre-training. `AutoModel.from_pretrained(PRE_TRAINED,
    use_mean_pooling=False)` therefore gives normalised features. `final_norm` overrides that.
    """

    # Heads and the norm that the other pooling has are left out without a word.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^(everest\.)?layernorm\.", *HEAD_OF_CLASSIFIER]
    __call__: Callable[..., EverestModelOutput]

    # The mode of the classifier that holds a frozen encoder in evaluation mode; None for every other encoder.
    thawed_mode: bool | None = None

    def __init__(self, config: EverestConfig, final_norm: bool | None = None):
        super().__init__(config)
        has_norm = not config.use_mean_pooling if final_norm is None else final_norm
        self.embeddings = EverestEmbeddings(config)
        self.encoder = EverestEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else None
        self.post_init()

    def train(self, mode: bool = True) -> EverestModel:
        """Set the mode as in every module."""
        self.thawed_mode = None
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> EverestModel:
        """Set it as in every module. An encoder that was frozen in a classifier takes the classifier's mode again."""
        super().requires_grad_(requires_grad)
        if requires_grad and self.thawed_mode is not None:
            self.train(self.thawed_mode)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch projection, which embeds tokens."""
        return self.embeddings.projection

    def set_input_embeddings(self, value) -> None:
        """Put another linear layer in the place of the patch projection."""
        self.embeddings.projection = value

    def encode(
        self, hidden_states, output_hidden_states: bool = False, output_attentions: bool = False, mean: bool = False
    ):
        """Run layers and final norm on embedded tokens (B, K, D), or on the mean (B, 1, D) that the layers give."""
        x, hidden_states, attentions = self.encoder(hidden_states, output_hidden_states, output_attentions, mean)
        return x if self.layernorm is None else self.layernorm(x), hidden_states, attentions

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        bool_masked_pos: torch.BoolTensor | None = None,
        noise: torch.FloatTensor | None = None,
        frame_noise: torch.FloatTensor | None = None,
        keep_ratio: float | None = None,
        interpolate_pos_encoding: bool = False,
        output_scores: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EverestModelOutput:
        """Encode clips.

        pixel_values: (B, T, C, H, W) float, normalised with the config's mean and std; T = config.num_input_frames.
        bool_masked_pos: (B, N), True = dropped; replaces the selection. Each clip must keep the same number. Reads
            the count from the mask, which waits for the device and breaks a compiled graph in two.
        noise: the randomness of the "random" (B, N) and "tube" (B, S) selections, uniform in [0, 1). Without it
            training draws, and evaluation uses one fixed draw. "motion" uses none.
        frame_noise: (B, c) for frame selection; without it training draws, and evaluation is deterministic.
        keep_ratio: share of tokens to keep, instead of the config's.
        interpolate_pos_encoding: accept other frame counts and sizes than the config's.
        output_scores: also return the motion scores.
        output_attentions: also return the weights; this call then uses the eager implementation.

        Raises:
            ValueError: pixel_values, a mask, noise or ratio does not fit; the message says what came and what fits.
        """
        embedded = self.embeddings(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            noise=noise,
            frame_noise=frame_noise,
            keep_ratio=keep_ratio,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_scores=output_scores,
        )
        x, hidden_states, attentions = self.encode(
            embedded.hidden_states,
            self._wanted("output_hidden_states", output_hidden_states),
            self._wanted("output_attentions", output_attentions),
        )
        return EverestModelOutput(
            last_hidden_state=x,
            kept_ids=embedded.kept_ids,
            slots=embedded.slots,
            scores=embedded.scores,
            hidden_states=hidden_states,
            attentions=attentions,
        )


class EverestForPreTraining(EverestPreTrainedModel):
    """The masked autoencoder: sees some of the informative tokens and predicts the pixels of the others."""

    _keys_to_ignore_on_load_unexpected = HEAD_OF_CLASSIFIER
    __call__: Callable[..., EverestForPreTrainingOutput]

    def __init__(self, config: EverestConfig):
        super().__init__(config)
        self.everest = EverestModel(config, final_norm=True)
        self.decoder = EverestDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        bool_masked_pos: torch.BoolTensor | None = None,
        noise: torch.FloatTensor | None = None,
        frame_noise: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_scores: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_loss: bool = True,
    ) -> EverestForPreTrainingOutput:
        """Predict the target tokens of clips (B, T, C, H, W) and return the loss.

        bool_masked_pos: (B, N), True = to predict, as in VideoMAE; replaces the selection.
        noise: uniform in [0, 1), decides which informative tokens are visible: (B, K + M) for "motion", applied to
            them in order of falling score; (B, N) for "random"; (B, S) for "tube".
        return_loss: False leaves the loss out.
        The other arguments, and what is raised, as in `EverestModel.forward`.
        """
        embedded = self.everest.embeddings(
            pixel_values,
            pretraining=True,
            bool_masked_pos=bool_masked_pos,
            noise=noise,
            frame_noise=frame_noise,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_scores=output_scores,
        )
        x, hidden_states, attentions = self.everest.encode(
            embedded.hidden_states,
            self._wanted("output_hidden_states", output_hidden_states),
            self._wanted("output_attentions", output_attentions),
        )
        logits = self.decoder(x, embedded.kept_ids, embedded.target_ids, embedded.grid_size)
        return EverestForPreTrainingOutput(
            loss=F.mse_loss(logits.float(), embedded.targets) if return_loss else None,
            logits=logits,
            visible_ids=embedded.kept_ids,
            target_ids=embedded.target_ids,
            slots=embedded.slots,
            scores=embedded.scores,
            hidden_states=hidden_states,
            attentions=attentions,
        )


class EverestForVideoClassification(EverestPreTrainedModel):
    """The encoder with a classification (or regression, or multi-label) head on the kept tokens."""

    # What a pre-trained checkpoint has beside the encoder.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^everest\.layernorm\."]
    __call__: Callable[..., EverestForVideoClassificationOutput]

    def __init__(self, config: EverestConfig):
        super().__init__(config)
        self.everest = EverestModel(config)
        self.pooling = EverestAttentivePooling(config) if config.attentive_pooling else None
        has_norm = config.use_mean_pooling or config.attentive_pooling
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.head_layer_norm_eps) if has_norm else None
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        noise: torch.FloatTensor | None = None,
        frame_noise: torch.FloatTensor | None = None,
        keep_ratio: float | None = None,
        interpolate_pos_encoding: bool = False,
        output_scores: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EverestForVideoClassificationOutput:
        """Classify clips (B, T, C, H, W).

        labels: class ids (B,), or for problem_type "single_label_classification" also distributions (B, num_labels)
            as mixup and label smoothing make them; 0/1 floats (B, num_labels) for "multi_label_classification";
            floats (B, num_labels), or (B,) for one label, for "regression". Without a problem_type: one label is regression,
            integers are single-label, floats multi-label; the first labels then set it in the config.
        The other arguments as in `EverestModel.forward`.

        Raises:
            ValueError: as `EverestModel.forward`, and for labels of another shape.
        """
        embedded = self.everest.embeddings(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            noise=noise,
            frame_noise=frame_noise,
            keep_ratio=keep_ratio,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_scores=output_scores,
        )
        with_states = self._wanted("output_hidden_states", output_hidden_states)
        mean_alone = self.config.reads_mean_alone(self.everest.training) and not with_states
        x, hidden_states, attentions = self.everest.encode(
            embedded.hidden_states,
            with_states,
            self._wanted("output_attentions", output_attentions),
            mean=mean_alone,
        )
        logits = self.classifier(self.dropout(self._pool(x)))
        return EverestForVideoClassificationOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            kept_ids=embedded.kept_ids,
            slots=embedded.slots,
            scores=embedded.scores,
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """Make what the classifier sees, (B, D), of the encoder's tokens (B, K, D), or of their mean (B, 1, D)."""
        if self.fc_norm is None:
            return x[:, 0]
        return self.fc_norm(x.mean(dim=1) if self.pooling is None else self.pooling(x))

    def freeze_encoder(self) -> None:
        """Train the head alone: the encoder gets no gradient, keeps nothing for one, and stays in evaluation mode."""
        self.everest.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> EverestForVideoClassification:
        """Set the mode as in every module; a frozen encoder has no dropout or drop path in any."""
        super().train(mode)
        if not any(weight.requires_grad for weight in self.everest.parameters()):
            self.everest.eval()
            self.everest.thawed_mode = mode
        return self

    def requires_grad_(self, requires_grad: bool = True) -> EverestForVideoClassification:
        """Set it as in every module; the encoder's mode follows, see `EverestModel.requires_grad_`."""
        super().requires_grad_(requires_grad)
        self.everest.requires_grad_(requires_grad)
        return self


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Return the mean loss of logits (B, num_labels), in float32, by the config's problem_type.

    Where the config has none, it is inferred from the labels, and set.
    """
    logits = logits.float()
    problem_type = problem_type_of(config, labels)
    if config.problem_type is None:
        # As Transformers' own losses do: pipelines read it to make scores.
        config.problem_type = problem_type  # type: ignore[assignment]
    name = f"labels for problem_type {problem_type!r}"
    if problem_type == "single_label_classification" and not labels.is_floating_point():
        _check_shape(name, labels.flatten(), logits.shape[:1])
        return F.cross_entropy(logits, labels.flatten().long())
    labels = labels.to(logits.dtype)
    if config.num_labels == 1:
        labels = labels.reshape(-1, 1)  # (B,) or (B, 1)
    _check_shape(name, labels, tuple(logits.shape))
    if problem_type == "regression":
        return F.mse_loss(logits, labels)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels)


EverestModel.register_for_auto_class("AutoModel")
EverestForPreTraining.register_for_auto_class("AutoModelForPreTraining")
EverestForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")
