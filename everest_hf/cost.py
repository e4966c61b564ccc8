"""What a configuration costs, by formula: parameters, tokens, operations of a clip, memory of training.

A multiplication and the addition of its product count as two floating-point operations, and only matrix products and
attention are counted, both as torch.utils.flop_counter does. Attention is taken as fused: its backward pass computes
the weights a second time, two and a half times the work of its forward pass.
"""

from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch.utils import flop_counter

from .configuration_everest import TASKS, EverestConfig, Task
from .modeling_everest import EverestForPreTraining, EverestForVideoClassification, reads_mean_alone

# What a clip has a cost for.
Use = Task | Literal["inference"]
USES: tuple[Use, ...] = (*TASKS, "inference")

# Times the work of the forward pass. A matrix product has two gradients, of its input and of its weights.
_LINEAR_BACKWARD, _ATTENTION_BACKWARD = 2, 2.5
_FLOAT32 = 4


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: all, and those that a task trains."""

    total: int
    trained: int


@dataclass(frozen=True)
class ClipCost:
    """What one clip costs: tokens that the encoder works on, floating-point operations of forward and backward pass."""

    tokens: int
    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Operations of a training step for a clip; for inference, of the forward pass."""
        return self.forward + self.backward


@dataclass(frozen=True)
class TrainingMemory:
    """Expected memory of one training process, in bytes.

    weights: with their 16-bit copy in mixed precision, and the moving average. gradients. moments: AdamW's two.
    activations: what the forward pass keeps for the backward pass, one layer's workspace, and the clips.
    total: the sum of all. A step that creates its gradients frees activations while gradients grow. Its peak is then
    lower, by up to the smaller of the two.
    """

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


# ------------------------------------------------------------------------------------------------------- parameters


def count_parameters(config: EverestConfig, task: Use) -> Parameters:
    """Count the parameters of a task's model. Building that model takes no memory: it is on the meta device.

    Raises:
        ValueError: the task is none of USES.
    """
    _check_task(task)
    with torch.device("meta"):
        model = (EverestForPreTraining if task == "pretrain" else EverestForVideoClassification)(config)
    if task == "probe":
        model.freeze_encoder()  # type: ignore[operator]  # a classifier
    weights = list(model.parameters())
    return Parameters(
        total=sum(w.numel() for w in weights),
        trained=0 if task == "inference" else sum(w.numel() for w in weights if w.requires_grad),
    )


# ------------------------------------------------------------------------------------------------------- operations


@dataclass
class _Work:
    """Multiply-adds of matrix products and of attention, in the forward and in the backward pass."""

    forward: float = 0
    backward: float = 0

    def add(self, linear: int = 0, attention: int = 0, trained: bool = True, again: int = 0) -> None:
        """Add work of the forward pass and, if trained, of the backward pass, which also repeats `again`."""
        self.forward += linear + attention
        self.backward += (_LINEAR_BACKWARD * linear + _ATTENTION_BACKWARD * attention + again) if trained else 0


def clip_cost(
    config: EverestConfig,
    task: Use = "inference",
    *,
    keep_ratio: float | None = None,
    gradient_checkpointing: bool = False,
) -> ClipCost:
    """Return what a clip costs in a training step of a task, or in inference.

    task: pretrain, finetune, probe (frozen encoder) or inference (of a classifier). keep_ratio: instead of the
    config's, not for pretrain. gradient_checkpointing: the backward pass computes the layers a second time.
    With token_budget "batch" it is the cost of a clip that keeps the average; unequal clips take a little more attention.

    Raises:
        ValueError: the task is none of USES.
    """
    _check_task(task)
    tokens = _encoder_tokens(config, task, keep_ratio)
    encoder_trained = task in ("pretrain", "finetune")
    work = _Work()
    _add_embedding(work, config, task, keep_ratio, encoder_trained)
    sizes = config.hidden_size, config.intermediate_size
    checkpointed = gradient_checkpointing and encoder_trained
    for i in range(config.num_hidden_layers):
        mean = i == config.num_hidden_layers - 1 and _gives_mean(config, task)
        _add_layer(work, tokens, *sizes, mean=mean, trained=encoder_trained, checkpointed=checkpointed)
    if task == "pretrain":
        _add_decoder(work, config, checkpointed)
    else:
        _add_head(work, config, tokens, trained=task != "inference")
    return ClipCost(tokens, forward=round(2 * work.forward), backward=round(2 * work.backward))


def _check_task(task: Use) -> None:
    if task not in USES:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(USES)}")


def _encoder_tokens(config: EverestConfig, task: Use, keep_ratio: float | None) -> int:
    return config.num_visible_tokens if task == "pretrain" else config.num_kept_tokens(keep_ratio)


def _gives_mean(config: EverestConfig, task: Use) -> bool:
    """Whether the encoder's last layer computes only the mean of its tokens."""
    return task != "pretrain" and reads_mean_alone(config, training=task == "finetune")


def _add_embedding(work: _Work, config: EverestConfig, task: Use, keep_ratio: float | None, trained: bool) -> None:
    """Add the patch projection: of every candidate for its score, and of the kept tokens again if it is trained.

    Compensated scores are made of changes, one slot less, and of one token that does not change.
    """
    tokens, product = _encoder_tokens(config, task, keep_ratio), config.tubelet_dim * config.hidden_size
    dense = task != "pretrain" and (config.keep_ratio if keep_ratio is None else keep_ratio) == 1
    scored = 0
    if config.selects_frames or (config.selects_by_motion and not dense):
        scored = _scored_tokens(config, config.num_input_frames // config.tubelet_size)
        if config.compensates_camera and config.selects_frames:  # once more, of the slots that are chosen
            scored += _scored_tokens(config, config.num_slots)
    work.forward += scored * product
    if trained or config.compensates_camera or not scored:
        work.forward += tokens * product
    if trained:
        work.backward += tokens * product  # the pixels need no gradient


def _scored_tokens(config: EverestConfig, slots: int) -> int:
    """Return how many tokens are projected for the scores of slots."""
    if config.compensates_camera:
        return (slots - 1) * config.num_tokens_per_slot + 1
    return slots * config.num_tokens_per_slot


def _add_layer(
    work: _Work,
    tokens: int,
    dim: int,
    intermediate_size: int,
    *,
    given: int | None = None,
    mean: bool = False,
    trained: bool = True,
    checkpointed: bool = False,
) -> None:
    """Add a transformer layer: query, key, value and output, then the two products of the MLP.

    The layer computes key and value for all tokens. It computes the rest for the tokens that it returns: `given`, by
    default all. If it returns their mean, it computes the last product for the mean alone.
    """
    given = tokens if given is None else given
    square, attention, product = 2 * (tokens + given) * dim**2, 2 * given * tokens * dim, dim * intermediate_size
    # The backward pass needs no result of a layer's last product, and does not repeat it.
    again = square + given * product + attention if checkpointed else 0
    linear = square + (given + (1 if mean else given)) * product
    work.add(linear=linear, attention=attention, trained=trained, again=again)


def _add_decoder(work: _Work, config: EverestConfig, checkpointed: bool) -> None:
    dim, targets = config.decoder_hidden_size, config.num_target_tokens
    work.add(linear=config.num_visible_tokens * config.hidden_size * dim)
    tokens, layers = config.num_informative_tokens, config.decoder_num_hidden_layers
    for i in range(layers):
        given = targets if i == layers - 1 else tokens
        _add_layer(work, tokens, dim, config.decoder_intermediate_size, given=given, checkpointed=checkpointed)
    work.add(linear=targets * dim * config.tubelet_dim)


def _add_head(work: _Work, config: EverestConfig, tokens: int, trained: bool) -> None:
    dim = config.hidden_size
    if config.attentive_pooling:  # query and output of one vector, key and value of all tokens
        work.add(linear=(2 + 2 * tokens) * dim**2, attention=2 * tokens * dim, trained=trained)
    work.add(linear=dim * config.num_labels, trained=trained)


def operations_counter() -> flop_counter.FlopCounterMode:
    """Return torch's counter of operations, which also counts fused attention on a CPU: before torch 2.15 it does not."""

    def forward(query, key, value, *args, **kwargs) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *args, **kwargs) -> int:
        return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flop_counter.FlopCounterMode(display=False, custom_mapping={fused: forward, fused_backward: backward})


# ----------------------------------------------------------------------------------------------------------- memory


def training_memory(
    config: EverestConfig,
    task: Use,
    batch_size: int,
    *,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    moving_average: bool = False,
    num_processes: int = 1,
    sharded: bool = False,
    on_cpu: bool = False,
) -> TrainingMemory:
    """Estimate the memory of one process that trains with AdamW on batches of `batch_size` clips.

    mixed_precision: "no" (float32), or another of Accelerate's, taken as 16 bits over weights of 32. num_processes:
    of the run; without `sharded` (FSDP2, ZeRO 3) each holds everything, and a bucket of gradients to exchange. on_cpu:
    a CPU keeps the outputs of the activation, which a GPU computes a second time.

    Not in it: the runtime of the device (on a GPU a few hundred MB), what its allocator leaves unused, and the weights
    of attention where it is not fused, as in 16 bits on a CPU.

    Raises:
        ValueError: the task is none of USES, or inference.
    """
    if task == "inference":
        raise ValueError("task is 'inference'; training_memory takes pretrain, finetune or probe")
    parameters, half = count_parameters(config, task), mixed_precision != "no"
    shards = num_processes if sharded else 1
    copies = 2 if num_processes > 1 and not sharded else 1
    width = 2 if half else _FLOAT32
    weights = _FLOAT32 * parameters.total + (_FLOAT32 * parameters.trained if moving_average else 0)
    return TrainingMemory(
        weights=weights // shards + (2 * parameters.total // shards if half else 0),
        gradients=_FLOAT32 * copies * parameters.trained // shards,
        moments=2 * _FLOAT32 * parameters.trained // shards,
        activations=batch_size * clip_activations(config, task, width, gradient_checkpointing, on_cpu),
    )


def clip_activations(
    config: EverestConfig, task: Use, width: int = _FLOAT32, checkpointing: bool = False, on_cpu: bool = False
) -> int:
    """Estimate the bytes that a clip takes in a training step, for numbers of `width` bytes (4, or 2 for autocast)."""
    tokens, dim = _encoder_tokens(config, task, None), config.hidden_size
    frames, (height, width_of_frame) = config.num_input_frames, config.frame_size
    clip = (1 + _FLOAT32) * frames * config.num_channels * height * width_of_frame  # as it came, and normalised
    sizes, sides = (dim, config.intermediate_size, config.num_attention_heads), 2 if on_cpu else 1
    kept = tokens * dim * width if checkpointing else _layer_activations(tokens, *sizes, width, sides=sides)
    total = clip + _layer_activations(tokens, *sizes, width)  # the layer at work
    if task != "probe":
        total += tokens * config.tubelet_dim * width + config.num_hidden_layers * kept
        if _gives_mean(config, task) and not checkpointing and on_cpu:
            total -= tokens * config.intermediate_size * width  # the last product reads one mean, not each token
    if task == "pretrain":
        total += _norm_activations(tokens, dim, width) + _decoder_activations(config, width, checkpointing, sides)
    elif config.attentive_pooling:
        # In 16 bits also a second cast of the norm's output.
        key_and_value = (3 if width < _FLOAT32 else 2) * tokens * dim * width
        total += _norm_activations(tokens, dim, width) + key_and_value
    return total


def _norm_activations(tokens: int, dim: int, width: int) -> int:
    """A LayerNorm keeps its input in float32, with mean and deviation; the next product keeps its output."""
    return tokens * dim * (_FLOAT32 + width) + 2 * tokens * _FLOAT32


def _layer_activations(
    tokens: int,
    dim: int,
    intermediate_size: int,
    num_heads: int,
    width: int,
    given: int | None = None,
    sides: int = 2,
) -> int:
    """What a transformer layer keeps: two norms, query, key, value and output of attention, one side of the GELU or both.

    The first norm, key and value are kept for all tokens, the rest for the tokens that the layer returns: `given`, by
    default all.
    """
    some, is_half = tokens if given is None else given, width < _FLOAT32
    # Copies of the first norm's output. In 16 bits autocast casts it for query, key and value each. In 32 bits there is
    # one for the query if it takes only a part of the tokens.
    copies = (tokens if is_half else 0) + (some if is_half or some < tokens else 0)
    attention = (2 * tokens + 2 * some + copies) * dim * width + num_heads * some * _FLOAT32
    norms = _norm_activations(tokens, dim, width) + _norm_activations(some, dim, width)
    return norms + attention + sides * some * intermediate_size * width


def _decoder_activations(config: EverestConfig, width: int, checkpointing: bool, sides: int) -> int:
    tokens, targets, dim = config.num_informative_tokens, config.num_target_tokens, config.decoder_hidden_size
    sizes = dim, config.decoder_intermediate_size, config.decoder_num_attention_heads
    kept = last = tokens * dim * width
    if not checkpointing:
        kept, last = (_layer_activations(tokens, *sizes, width, given, sides) for given in (None, targets))
    pixels = targets * config.tubelet_dim * (2 * _FLOAT32 + (width if width < _FLOAT32 else 0))
    return (config.decoder_num_hidden_layers - 1) * kept + last + _norm_activations(targets, dim, width) + pixels
