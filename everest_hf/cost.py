"""What a clip costs, by formula from the configuration: tokens, floating-point operations, memory.

A multiplication with its addition counts as two operations (FLOPs), as in `torch.utils.flop_counter`. Counted are the
matrix products and attention; norms, activations and the selection's distances and sorting are left out (below 1 %).
"""

from dataclasses import dataclass

import torch

from .configuration_everest import EverestConfig
from .modeling_everest import EverestForPreTraining, EverestForVideoClassification

TASKS = ("pretrain", "finetune", "probe", "inference")


@dataclass(frozen=True)
class Cost:
    """What a clip costs. encoder_tokens, decoder_tokens: the tokens that these work on. forward_flops: of a forward
    pass. flops: of a whole step, with the backward pass where there is one.
    """

    encoder_tokens: int
    decoder_tokens: int
    forward_flops: int
    flops: int


def cost_of_clip(config: EverestConfig, task: str, keep_ratio: float | None = None) -> Cost:
    """Return the cost of a clip. task: one of TASKS. keep_ratio: instead of the config's, not for pre-training."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if task == "pretrain":
        return _pretraining_cost(config)
    kept = config.num_kept_tokens(keep_ratio)
    trains_encoder = task == "finetune"
    selects = config.num_input_frames > config.num_frames or (config.uses_motion and kept < config.num_tokens)
    scoring = _projection(config, _num_candidates(config)) if selects else 0
    # Scored tokens are embedded already; training embeds the kept ones again, to have a gradient for them alone.
    embedding = _projection(config, kept) if trains_encoder or not selects else 0
    encoder = config.num_hidden_layers * _layer(kept, config.hidden_size, config.intermediate_size)
    head = _head(config, kept)
    forward = scoring + embedding + encoder + head
    backward = {
        "inference": 0,
        # The gradient of a frozen encoder's output is not wanted.
        "probe": 2 * head,
        # Twice the forward pass, for weights and for inputs; pixels want no gradient, scoring has none.
        "finetune": embedding + 2 * (encoder + head),
    }[task]
    return Cost(kept, 0, forward, forward + backward)


def _pretraining_cost(config: EverestConfig) -> Cost:
    visible, targets = config.num_visible_tokens, config.num_target_tokens
    dim = config.decoder_hidden_size
    scoring = _projection(config, _num_candidates(config)) if config.uses_motion else 0
    embedding = _projection(config, visible)
    encoder = config.num_hidden_layers * _layer(visible, config.hidden_size, config.intermediate_size)
    decoder = config.decoder_num_hidden_layers * _layer(visible + targets, dim, config.decoder_intermediate_size)
    ends = 2 * visible * config.hidden_size * dim + 2 * targets * dim * config.tubelet_dim
    forward = scoring + embedding + encoder + decoder + ends
    return Cost(visible, visible + targets, forward, forward + embedding + 2 * (encoder + decoder + ends))


def _num_candidates(config: EverestConfig) -> int:
    """Return the tokens of all frames that the model takes, before any is dropped."""
    return config.num_input_frames // config.tubelet_size * config.num_tokens_per_slot


def _projection(config: EverestConfig, tokens: int) -> int:
    return 2 * tokens * config.tubelet_dim * config.hidden_size


def _layer(tokens: int, dim: int, intermediate: int) -> int:
    """Query, key, value and output (4 D²), MLP (2 D I), scores and weighted sum of attention (2 K D for each token)."""
    return 2 * tokens * (4 * dim * dim + 2 * dim * intermediate + 2 * tokens * dim)


def _head(config: EverestConfig, tokens: int) -> int:
    dim = config.hidden_size
    pooling = 0
    if config.attentive_pooling:  # one query: its own projections, keys and values of all tokens, attention
        pooling = 2 * (2 * dim * dim + tokens * 2 * dim * dim + 2 * tokens * dim)
    return pooling + 2 * dim * config.num_labels


# ----------------------------------------------------------------------------------------------------------- memory


def num_parameters(config: EverestConfig, task: str) -> tuple[int, int]:
    """Return how many parameters the model of a task has, and how many of them are trained. Nothing is allocated."""
    cls = EverestForPreTraining if task == "pretrain" else EverestForVideoClassification
    with torch.device("meta"):
        model = cls(config)
    count = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.everest.parameters()) if task == "probe" else 0
    return count, 0 if task == "inference" else count - frozen


def training_memory(
    config: EverestConfig, task: str, batch_size: int, *, sixteen_bit: bool = False, checkpointing: bool = False
) -> int:
    """Return roughly the bytes that a training process needs for a batch; the allocator's slack comes on top.

    Weights, gradients and AdamW's two moments are float32. Of a layer the backward pass needs, for each of its K
    tokens, its input, both norms, query, key, value, the attention's output and the MLP's two halves: 8 D + 2 I
    numbers, of which mixed precision halves most; with gradient checkpointing only its input, and one layer whole.
    Attention that stores its weights (eager; 16 bits on a CPU) takes heads · K² more, which is not in here.
    """
    count, trained = num_parameters(config, task)
    cost = cost_of_clip(config, task)
    number = 2.6 if sixteen_bit else 4  # bytes: norms and the residual stream stay float32
    stacks = [(cost.encoder_tokens, config.hidden_size, config.intermediate_size, config.num_hidden_layers)]
    if task == "pretrain":
        dim, inner = config.decoder_hidden_size, config.decoder_intermediate_size
        stacks.append((cost.decoder_tokens, dim, inner, config.decoder_num_hidden_layers))
    if task == "probe":
        stacks = [(cost.encoder_tokens, config.hidden_size, config.intermediate_size, 1)]  # one layer's work space
    activations = 0.0
    for tokens, dim, inner, layers in stacks:
        whole = tokens * (8 * dim + 2 * inner) * number
        activations += layers * tokens * dim * 4 + whole if checkpointing else layers * whole
    height, width = config.frame_size
    pixels = 4 * config.num_channels * config.num_input_frames * height * width
    # The clip, its patches, and where it is scored, all of its tokens.
    inputs = 2 * pixels + (4 * _num_candidates(config) * config.hidden_size if config.uses_motion else 0)
    return int(4 * count + 12 * trained + batch_size * (activations + inputs))
