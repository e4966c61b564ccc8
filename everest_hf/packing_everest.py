"""A budget of tokens for the batch, not for each clip: which tokens are taken, and where they lie.

Clips then have different numbers of tokens. They lie one after the other, packed, as (1, total, D), and a `Packing` says
where each clip begins. Letters in shapes as in modeling_everest.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .selection_everest import Grid, sorted_ids


class Packing(NamedTuple):
    """Where each clip of a batch lies among its tokens (1, total, D).

    cu_seqlens: (B + 1,) int32, the first token of each clip and, last, the total. longest: no clip has more tokens.
    """

    cu_seqlens: torch.Tensor
    longest: int

    @property
    def num_clips(self) -> int:
        """The number of clips, B."""
        return len(self.cu_seqlens) - 1

    @property
    def counts(self) -> torch.Tensor:
        """The number of tokens of each clip, (B,)."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device) -> Packing:
        """Return the packing on a device: the layers of a model may lie on several."""
        return self._replace(cu_seqlens=self.cu_seqlens.to(device))

    def clip_of(self, total: int) -> torch.Tensor:
        """Return which clip each token is of, (total,)."""
        tokens = torch.arange(total, device=self.cu_seqlens.device, dtype=self.cu_seqlens.dtype)
        return torch.searchsorted(self.cu_seqlens[1:], tokens, right=True)

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what each clip has of (1, total, any): B tensors (n, any). It waits for the device."""
        return tokens[0].split(self.counts.tolist())

    def pad(self, ids: torch.Tensor, width: int) -> torch.Tensor:
        """Lay the ids (1, total) of each clip in a row of its own, filled up with -1: (B, width)."""
        clip = self.clip_of(ids.shape[1])
        place = torch.arange(ids.shape[1], device=ids.device) - self.cu_seqlens[clip]
        return ids.new_full((self.num_clips, width), -1).index_put((clip, place), ids[0])

    def mean(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean of each clip's tokens: (1, total, D) gives (B, 1, D), added up in float32 or what is finer."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        sums = tokens.new_zeros(self.num_clips, tokens.shape[2], dtype=dtype)
        sums = sums.index_add(0, self.clip_of(tokens.shape[1]), tokens[0].to(dtype))
        return (sums / self.counts[:, None]).to(tokens.dtype)[:, None]

    def spread(self, of_clips: torch.Tensor, total: int) -> torch.Tensor:
        """Give each token what its clip has: (B, 1, D) gives (1, total, D)."""
        return of_clips[:, 0][self.clip_of(total)][None]


def mean_of_tokens(tokens: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """Return the mean of each clip's tokens, packed or (B, K, D): (B, 1, D)."""
    return tokens.mean(dim=1, keepdim=True) if packing is None else packing.mean(tokens)


def packing_of_one(clips: int, device: torch.device) -> Packing:
    """Return the packing of clips that have one token each."""
    return Packing(torch.arange(clips + 1, dtype=torch.int32, device=device), 1)


def ids_in_clip(ids: torch.Tensor, packing: Packing | None, grid: Grid) -> torch.Tensor:
    """Return the ids that tokens have in their own clip; packed ones are numbered over the whole batch."""
    return ids if packing is None else ids % math.prod(grid)


def packed(x: torch.Tensor) -> torch.Tensor:
    """Lay the tokens of clips one after the other: (B, N, any) gives (1, B * N, any)."""
    return x.flatten(0, 1)[None]


# ------------------------------------------------------------------------------------------------------ selection


def choose_of_batch(scores: torch.Tensor, total: int, least: int, most: int) -> tuple[torch.Tensor, Packing]:
    """Take the tokens of highest score (B, N) of a batch, `total` of them, in time order within each clip.

    Each clip has at least `least` and at most `most`; of equals the lower clip, then the lower id comes first. Returns
    their ids (1, total) among all B * N, clip after clip. The shape does not depend on the scores.
    """
    ids, falling = _within_bounds(scores, least, most)
    taken = sorted_ids(falling[None], descending=True)[0, :total]
    return _chosen(ids[taken], scores.shape, most)


def choose_above(scores: torch.Tensor, threshold: float, least: int, most: int) -> tuple[torch.Tensor, Packing]:
    """Take each clip's tokens whose score (B, N) is above the threshold, by the bounds of `choose_of_batch`.

    What is taken of a clip depends on that clip alone.
    """
    ids, falling = _within_bounds(scores, least, most)
    return _chosen(ids[falling > threshold], scores.shape, most)


def _within_bounds(scores: torch.Tensor, least: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids (B * N,) of a batch's tokens, each clip's by falling score, and those scores within the bounds.

    What a clip is to have is infinitely high, what it may not have infinitely low.
    """
    order = sorted_ids(scores, descending=True)  # (B, N)
    falling = scores.gather(1, order)
    falling[:, :least], falling[:, most:] = torch.inf, -torch.inf
    first = torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]
    return (first + order).flatten(), falling.flatten()


def _chosen(ids: torch.Tensor, shape: torch.Size, most: int) -> tuple[torch.Tensor, Packing]:
    """Order ids (total,) of the tokens of a batch, of the shape (B, N), and say where each clip begins."""
    clips, num_tokens = shape
    ids = ids.sort().values
    ends = torch.arange(clips + 1, device=ids.device) * num_tokens
    return ids[None], Packing(torch.searchsorted(ids, ends, out_int32=True), most)


def threshold_of(scores: torch.Tensor, kept: int, least: int, most: int) -> float:
    """Return the threshold with which `choose_above` takes `kept` tokens a clip, on the average of clips (V, N).

    least < kept < most. It is halfway between two scores. Where many tokens have the same score there, such as 0 in clips
    that stand still, none of them is taken, and the average is below `kept`.
    """
    falling = _within_bounds(scores, least, most)[1].sort(descending=True).values
    return falling[kept * len(scores) - 1 :][:2].mean().item()
