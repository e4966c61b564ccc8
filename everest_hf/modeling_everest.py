"""EVEREST: a masked video autoencoder and video classifier that works on the tokens that change over time.

Source: "EVEREST: Efficient Masked Video Autoencoder by Removing Redundant Spatiotemporal Tokens" (ICML 2024,
arXiv 2211.10636). From top to bottom: transformer layers, encoder, pooling and decoder, the three models. Tokens are
dropped in embeddings_everest.py: selection_everest.py says which, camera_everest.py what changes beside the camera's
motion, packing_everest.py which tokens a batch keeps that has one budget for all its clips. attention_everest.py holds
the kinds of attention, kernels_everest.py what only makes this fast.

Letters in shapes: B clips, T frames, C channels, H x W pixels, c candidate slots, t slots, S places in a slot,
N = t * S tokens in slot-major order, K kept tokens, M target tokens, P values in a token's pixels, D hidden size.
Where the budget is the batch's, clips have different numbers of tokens. Shapes (B, K, any) are then (1, total, any), with
a `Packing` that says where each clip begins.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .attention_everest import (
    attend_packed,
    blocked_attention_forward,
    blocks_are_faster,
    eager_attention_forward,
)
from .camera_everest import camera_moves  # noqa: F401  # Transformers 4.57 copies only what this very file imports
from .configuration_everest import EverestConfig, problem_type_of
from .embeddings_everest import EverestEmbeddings, EverestPositionEmbeddings
from .kernels_everest import mlp_forward
from .packing_everest import Packing, mean_of_tokens, packing_of_one
from .selection_everest import Grid, check_shape, token_grid

# One checkpoint serves all of these, with trust_remote_code, where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_everest.EverestConfig",
    "AutoModel": "modeling_everest.EverestModel",
    "AutoModelForPreTraining": "modeling_everest.EverestForPreTraining",
    "AutoModelForVideoClassification": "modeling_everest.EverestForVideoClassification",
}

# Which tokens are read of what a stack of layers gives: the last n, or their mean; None for all.
Read = int | Literal["mean"] | None


# -------------------------------------------------------------------------------------------------- transformer


def attention_function(config: EverestConfig, query: torch.Tensor, output_attentions: bool) -> Callable:
    """Return the implementation that the config names, or the eager one where the caller wants weights.

    Fused kernels return no weights. Transformers lets the attention be set where a model's file looks up the interface.
    """
    if output_attentions:
        return eager_attention_forward
    if config._attn_implementation == "sdpa" and blocks_are_faster(query):
        return blocked_attention_forward
    if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):  # Transformers 5
        return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    return ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, eager_attention_forward)


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

    def forward(
        self,
        hidden_states: torch.Tensor,
        output_attentions: bool = False,
        queries: torch.Tensor | None = None,
        packing: Packing | None = None,
        query_packing: Packing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let `queries` (B, Q, D), by default the tokens themselves, attend to the tokens (B, K, D).

        packing, query_packing: of the tokens and, where it is another, of the queries. Returns (B, Q, D) and, where
        asked for, the weights (B, heads, Q, K).
        """
        queries = hidden_states if queries is None else queries
        query, key, value = (
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, Q or K, d)
            for projection, tokens in ((self.query, queries), (self.key, hidden_states), (self.value, hidden_states))
        )
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attend = attention_function(self.config, query, output_attentions)
        if packing is None:
            options = {"scaling": self.scaling, "dropout": dropout, "is_causal": False}
            attended, weights = attend(self, query, key, value, None, **options)
        else:
            lengths = query_packing or packing, packing
            attended, weights = attend_packed(
                attend, self, query, key, value, *lengths, self.scaling, output_attentions
            )
        return self.output(attended.flatten(2)), weights if output_attentions else None


class EverestMLP(nn.Module):
    """Two linear layers with an activation between them, on each token alone."""

    def __init__(self, config: EverestConfig, dim: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, dim)

    def forward(
        self, hidden_states: torch.Tensor, mean: Callable | None = None, is_packed: bool = False
    ) -> torch.Tensor:
        """Compute fc2(activation(fc1(hidden_states))), (B, K, D), or with `mean` its mean over the tokens, (B, 1, D)."""
        return mlp_forward(self.fc1, self.activation, self.fc2, hidden_states, mean, is_packed, self.training)


class EverestDropPath(nn.Module):
    """Stochastic depth: drops the branch (B, K, D) of a clip with probability p in training (arXiv 1603.09382)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, hidden_states: torch.Tensor, packing: Packing | None = None) -> torch.Tensor:
        if self.p == 0 or not self.training:
            return hidden_states
        clips = hidden_states.shape[0] if packing is None else packing.num_clips
        kept = torch.rand(clips, 1, 1, device=hidden_states.device) >= self.p
        kept = kept if packing is None else packing.spread(kept, hidden_states.shape[1])
        return hidden_states * (kept / (1 - self.p)).to(hidden_states.dtype)

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

    def forward(
        self,
        hidden_states: torch.Tensor,
        output_attentions: bool = False,
        read: Read = None,
        packing: Packing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Transform tokens (B, K, D), and return them with, where asked for, the weights (B, heads, K, K).

        With `read` it returns the last `read` tokens alone, or the mean of the tokens (B, 1, D).
        """
        if packing is not None and isinstance(read, int):
            raise ValueError(f"read is {read}; of packed tokens it must be None or 'mean'")
        first = hidden_states.shape[1] - read if isinstance(read, int) else 0
        normed = self.norm1(hidden_states)
        attended, weights = self.attention(normed, output_attentions, normed[:, first:], packing)
        hidden_states = hidden_states[:, first:] + self.drop_path(self.dropout(attended), packing)
        normed = self.norm2(hidden_states)
        if read == "mean":
            mean = partial(mean_of_tokens, packing=packing)
            return mean(hidden_states) + self.drop_path(self.dropout(self.mlp(normed, mean))), weights
        transformed = self.mlp(normed, is_packed=packing is not None)
        return hidden_states + self.drop_path(self.dropout(transformed), packing), weights


def run_layers(
    layers: nn.ModuleList,
    hidden_states: torch.Tensor,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    read: Read = None,
    packing: Packing | None = None,
):
    """Run layers one after the other on tokens (B, K, D).

    The last layer computes only the tokens that are read. Returns what it gives, the states before each layer and after
    the last, and the attention weights of each layer; the last two are None where they are not asked for.
    """
    all_hidden_states = [hidden_states] if output_hidden_states else []
    all_weights: list[torch.Tensor] = []
    last = len(layers) - 1
    for i, layer in enumerate(layers):
        hidden_states, weights = layer(
            hidden_states, output_attentions, read=read if i == last else None, packing=packing
        )
        if output_hidden_states:
            all_hidden_states.append(hidden_states)
        if output_attentions:
            all_weights.append(weights)
    return hidden_states, tuple(all_hidden_states) or None, tuple(all_weights) or None


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
        self,
        hidden_states: torch.Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        read: Read = None,
        packing: Packing | None = None,
    ):
        """Encode embedded tokens (B, K, D); see `run_layers`."""
        return run_layers(self.layers, hidden_states, output_hidden_states, output_attentions, read, packing)


class EverestAttentivePooling(nn.Module):
    """Makes one vector of a clip's tokens: what a learned query takes from them by attention.

    The probe of "Context Autoencoder for Self-Supervised Representation Learning" (arXiv 2202.03026).
    """

    def __init__(self, config: EverestConfig):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EverestAttention(config, config.hidden_size, config.num_attention_heads)

    def forward(self, hidden_states: torch.Tensor, packing: Packing | None = None) -> torch.Tensor:
        """Pool tokens (B, K, D) to (B, D)."""
        normed = self.norm(hidden_states)
        if packing is None:
            pooled, _ = self.attention(normed, queries=self.query.repeat(normed.shape[0], 1, 1))
            return pooled[:, 0]
        clips = packing.num_clips
        one_each = packing_of_one(clips, normed.device)
        pooled, _ = self.attention(normed, False, self.query.repeat(1, clips, 1), packing, one_each)
        return pooled[0]


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

    def forward(
        self, hidden_states: torch.Tensor, visible_ids: torch.Tensor, target_ids: torch.Tensor, grid_size: Grid
    ) -> torch.Tensor:
        """Predict (B, M, P), channel fastest, from encoded tokens (B, K, D) and the ids (B, K) and (B, M)."""
        visible = self.projection(hidden_states)  # (B, K, D')
        table = self.position_embeddings(grid_size).to(visible.dtype)
        targets = self.mask_token.to(visible.dtype) + table[target_ids]  # (B, M, D')
        hidden_states = torch.cat([visible + table[visible_ids], targets], dim=1)  # (B, K + M, D')
        hidden_states, _, _ = run_layers(self.layers, hidden_states, read=target_ids.shape[1])  # (B, M, D')
        return self.head(self.norm(hidden_states))


# ------------------------------------------------------------------------------------------------------- models


@dataclass
class EverestOutput(ModelOutput):
    """What the models return. Each leaves the fields of the others out, and what was not asked for.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            The loss in float32: of classification where labels are given; of pre-training the mean squared error on
            the targets.
        logits (`torch.FloatTensor` of shape `(B, num_labels)` or `(B, M, P)`, *optional*):
            Scores of the classes before the softmax; or predicted pixels of the target tokens, in the order frame,
            row, column, channel, normalised with `norm_pix_loss`.
        last_hidden_state (`torch.FloatTensor` of shape `(B, K, D)`, *optional*):
            The kept tokens, in the order of `kept_ids`.
        kept_ids (`torch.LongTensor` of shape `(B, K)`, *optional*):
            Ids of the tokens that the encoder saw. In pre-training they are called `visible_ids`. A classifier gives a row
            for each clip in any case, and fills it up with -1 where the budget of tokens is the batch's.
        target_ids (`torch.LongTensor` of shape `(B, M)`, *optional*):
            Ids of the tokens that pre-training predicts.
        targets (`torch.FloatTensor` of shape `(B, M, P)`, *optional*):
            What it is to predict, as the encoder hands it to the loss.
        slots (`torch.LongTensor` of shape `(B, t)`, *optional*):
            The candidate slots that frame selection chose.
        scores (`torch.FloatTensor` of shape `(B, N)`, *optional*):
            The motion scores, with `output_scores`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            The tokens before each layer of the encoder and after the last, with `output_hidden_states`.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            The attention weights `(B, heads, K, K)` of each layer of the encoder, with `output_attentions`.
        packing (`Packing`, *optional*):
            Where the budget of tokens is the batch's; of a classifier with `hidden_states` or `attentions`. Clips then keep different numbers of tokens, and `(B, K, ...)`
            is `(1, total, ...)` in the fields above: clip `i` has the tokens from `packing.cu_seqlens[i]` to
            `packing.cu_seqlens[i + 1]`, and `packing.mean(last_hidden_state)` is each clip's mean, `(B, 1, D)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    kept_ids: torch.Tensor | None = None
    visible_ids: torch.Tensor | None = None
    target_ids: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    packing: Packing | None = None


# The subclasses only say which fields are never None.


class EverestModelOutput(EverestOutput):
    """Output of `EverestModel`; see `EverestOutput`."""

    last_hidden_state: torch.Tensor
    kept_ids: torch.Tensor


class EverestForPreTrainingOutput(EverestOutput):
    """Output of `EverestForPreTraining`; see `EverestOutput`."""

    logits: torch.Tensor
    visible_ids: torch.Tensor
    target_ids: torch.Tensor


class EverestForVideoClassificationOutput(EverestOutput):
    """Output of `EverestForVideoClassification`; see `EverestOutput`."""

    logits: torch.Tensor
    kept_ids: torch.Tensor


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
        """Load a VideoMAE or official EVEREST checkpoint. Needs the package everest_hf.

        Args:
            name_or_path (`str`):
                A .pth file, a Transformers folder or a Hub id.
            config_overrides (*optional*):
                Fields of `EverestConfig`, such as `keep_ratio=0.6`.

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

    def __init__(self, config: EverestConfig, final_norm: bool | None = None):
        super().__init__(config)
        has_norm = not config.use_mean_pooling if final_norm is None else final_norm
        self.embeddings = EverestEmbeddings(config)
        self.encoder = EverestEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch projection, which embeds tokens."""
        return self.embeddings.projection

    def set_input_embeddings(self, value) -> None:
        """Put another linear layer in the place of the patch projection."""
        self.embeddings.projection = value

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
        pretraining: bool = False,
        read: Read = None,
    ) -> EverestModelOutput:
        """Encode clips.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, T, C, H, W)`):
                Clips, normalised with the config's mean and std; T is `config.num_input_frames`.
            bool_masked_pos (`torch.BoolTensor` of shape `(B, N)`, *optional*):
                True for the tokens to drop. It replaces the selection. Each clip must keep the same number. The model
                reads that number from the mask: it waits for the device, and breaks a compiled graph in two.
            noise (`torch.FloatTensor`, *optional*):
                Random numbers, uniform in [0, 1), of the selections "random" `(B, N)` and "tube" `(B, S)`; the others
                use none. By default training draws them, and evaluation uses the same fixed ones for every clip.
            frame_noise (`torch.FloatTensor` of shape `(B, c)`, *optional*):
                Random numbers, uniform in [0, 1), of frame selection. By default training draws them, and evaluation
                uses none.
            keep_ratio (`float`, *optional*):
                The share of tokens to keep, in place of the config's. In evaluation it is that of every clip, since the
                threshold of token_budget "batch" was found for the config's share.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Accept other frame counts and sizes than the config's.
            output_scores (`bool`, *optional*, defaults to `False`):
                Return the motion scores too.
            output_hidden_states (`bool`, *optional*):
                Return the tokens before and after each layer too. By default the config decides.
            output_attentions (`bool`, *optional*):
                Return the attention weights too; this call then uses the eager implementation. By default the config
                decides.
            pretraining (`bool`, *optional*, defaults to `False`):
                Select as in pre-training: encode the visible tokens, and return target ids and targets too.
            read (`int` or `"mean"`, *optional*):
                Return the last `read` tokens alone, or the mean of all `(B, 1, D)`. By default all.

        Raises:
            ValueError: pixel_values, a mask, noise or ratio does not fit; the message says what came and what fits.
        """
        embedded = self.embeddings(
            pixel_values,
            pretraining,
            bool_masked_pos,
            noise,
            frame_noise,
            keep_ratio,
            interpolate_pos_encoding,
            output_scores,
        )
        last_hidden_state, hidden_states, attentions = self.encode(
            embedded.hidden_states,
            self._wanted("output_hidden_states", output_hidden_states),
            self._wanted("output_attentions", output_attentions),
            read,
            embedded.packing,
        )
        return EverestModelOutput(
            last_hidden_state=last_hidden_state,
            kept_ids=embedded.kept_ids,
            target_ids=embedded.target_ids,
            targets=embedded.targets,
            slots=embedded.slots,
            scores=embedded.scores,
            hidden_states=hidden_states,
            attentions=attentions,
            packing=embedded.packing,
        )

    def encode(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Run the layers and, where there is one, the final norm on embedded tokens (B, K, D); see `run_layers`."""
        last_hidden_state, *others = self.encoder(hidden_states, *args, **kwargs)
        return last_hidden_state if self.layernorm is None else self.layernorm(last_hidden_state), *others


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
        """Predict the target tokens of clips. Arguments and errors are as in `EverestModel.forward`, except:

        Args:
            bool_masked_pos (`torch.BoolTensor` of shape `(B, N)`, *optional*):
                True for the tokens to predict, as in VideoMAE. It replaces the selection.
            noise (`torch.FloatTensor`, *optional*):
                Random numbers, uniform in [0, 1), that decide which tokens are visible: `(B, K + M)` for "motion"
                and "compensated", one for each informative token in the order of falling score; `(B, N)` for "random";
                `(B, S)` for "tube".
            return_loss (`bool`, *optional*, defaults to `True`):
                Return the loss too.
        """
        encoded = self.everest(
            pixel_values,
            bool_masked_pos,
            noise,
            frame_noise,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_scores=output_scores,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            pretraining=True,
            return_dict=True,
        )
        grid = token_grid(self.config, pixel_values, interpolate_pos_encoding)
        logits = self.decoder(encoded.last_hidden_state, encoded.kept_ids, encoded.target_ids, grid)
        return EverestForPreTrainingOutput(
            loss=F.mse_loss(logits.float(), encoded.targets) if return_loss else None,  # type: ignore[arg-type]
            logits=logits,
            visible_ids=encoded.kept_ids,
            target_ids=encoded.target_ids,
            slots=encoded.slots,
            scores=encoded.scores,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
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
        """Classify clips. Arguments and errors are as in `EverestModel.forward`, and:

        Args:
            labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`, *optional*):
                For `problem_type` "single_label_classification" class ids `(B,)`, or distributions `(B, num_labels)` as
                mixup and label smoothing make them; for "multi_label_classification" 0/1 floats `(B, num_labels)`; for
                "regression" floats `(B, num_labels)`, or `(B,)` for one label. Without a `problem_type`, one label is
                regression, integers are single-label and floats multi-label; the first labels then set it in the
                config.

        Raises:
            ValueError: as `EverestModel.forward`, and for labels of another shape.
        """
        with_states = self._wanted("output_hidden_states", output_hidden_states)
        reads_mean = reads_mean_alone(self.config, self.everest.training) and not with_states
        encoded = self.everest(
            pixel_values,
            bool_masked_pos,
            noise,
            frame_noise,
            keep_ratio,
            interpolate_pos_encoding,
            output_scores,
            with_states,
            output_attentions,
            read="mean" if reads_mean else None,
            return_dict=True,
        )
        packing = encoded.packing
        pooled = self.pool(encoded.last_hidden_state, None if reads_mean else packing)
        logits = self.classifier(self.dropout(pooled))
        return EverestForVideoClassificationOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            kept_ids=encoded.kept_ids if packing is None else self._kept_of_each_clip(encoded.kept_ids, packing),
            slots=encoded.slots,
            scores=encoded.scores,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            packing=packing if encoded.hidden_states or encoded.attentions else None,
        )

    def _kept_of_each_clip(self, ids: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return packed ids as rows, filled up with -1, so that what a classifier gives has a row for each clip."""
        # In training the width is always the same, and no device is waited for.
        return packing.pad(ids, packing.longest if self.everest.embeddings.training else int(packing.counts.max()))

    def pool(self, hidden_states: torch.Tensor, packing: Packing | None = None) -> torch.Tensor:
        """Make what the classifier sees, (B, D), of the encoder's tokens (B, K, D), or of their mean (B, 1, D)."""
        packing = None if packing is None else packing.to(hidden_states.device)
        if self.fc_norm is None:
            return hidden_states[:, 0] if packing is None else hidden_states[0, packing.cu_seqlens[:-1]]
        if self.pooling is not None:
            return self.fc_norm(self.pooling(hidden_states, packing))
        return self.fc_norm(mean_of_tokens(hidden_states, packing)[:, 0])

    def freeze_encoder(self) -> None:
        """Train the head alone: the encoder gets no gradient, keeps nothing for one, and stays in evaluation mode."""
        self.everest.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> EverestForVideoClassification:
        """Set the mode as in every module, except that a frozen encoder is always in evaluation mode."""
        super().train(mode)
        if not any(weight.requires_grad for weight in self.everest.parameters()):
            self.everest.eval()
        return self


def reads_mean_alone(config: EverestConfig, training: bool) -> bool:
    """Whether a classifier, its encoder in training or not, reads no more than the mean of the encoder's tokens.

    Dropout after the last layer drops numbers of each token, so it must come before the mean.
    """
    has_dropout = training and config.hidden_dropout_prob > 0
    return config.use_mean_pooling and not config.attentive_pooling and not has_dropout


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Return the mean loss of logits (B, num_labels), in float32, by the config's problem_type.

    Where the config has none, it is inferred from the labels, and set. With the config's class_weights w, a clip's loss
    is -sum_c w_c p_c log q_c over the classes, for labels p and predictions q; the mean is over clips, not over weights,
    so that a batch has the same loss in parts.
    """
    logits = logits.float()
    problem_type = problem_type_of(config, labels)
    if config.problem_type is None:
        config.problem_type = problem_type  # as Transformers' own losses do: pipelines read it to make scores
    name = f"labels for problem_type {problem_type!r}"
    weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)  # (num_labels,)
    if problem_type == "single_label_classification" and not labels.is_floating_point():
        check_shape(name, labels.flatten(), logits.shape[:1])
        return _single_label_loss(name, logits, labels.flatten().long(), weights)
    labels = labels.to(logits.dtype)
    if config.num_labels == 1:
        labels = labels.reshape(-1, 1)  # (B,) or (B, 1)
    check_shape(name, labels, tuple(logits.shape))
    if problem_type == "regression":
        return F.mse_loss(logits, labels)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels, weights)


def _single_label_loss(
    name: str, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the mean cross-entropy of logits (B, num_labels) for classes (B,), of which -100 is left out.

    With weights (num_labels,) the mean is over clips.

    Raises:
        ValueError: there is no such class. On a GPU the kernel fails instead: to look there is to wait for it.
    """
    try:
        return F.cross_entropy(logits, labels, weights, reduction="mean" if weights is None else "none").mean()
    except IndexError:
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= logits.shape[-1]))]
        classes = f"expected classes from 0 to {logits.shape[-1] - 1}"
        raise ValueError(f"{name} hold {int(wrong[0])}; {classes}") from None


EverestModel.register_for_auto_class("AutoModel")
EverestForPreTraining.register_for_auto_class("AutoModelForPreTraining")
EverestForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")
