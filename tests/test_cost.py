"""The cost of a clip by formula, against what PyTorch counts while the models run."""

import pytest
import torch
from tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification
from everest_hf.cost import cost_of_clip, num_parameters, training_memory

# Sizes that cost enough for what the formula leaves out to be small, and still little time.
SMALL = {
    "image_size": (64, 96),
    "num_frames": 8,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "decoder_hidden_size": 96,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 384,
}


def counted(config: EverestConfig, task: str, keep_ratio: float | None = None) -> int:
    """FLOPs of a clip as PyTorch counts them in a step."""
    config._attn_implementation = "eager"
    batch, channels = 2, config.num_channels
    clips = torch.randn(batch, config.num_input_frames, channels, *config.frame_size)
    cls = EverestForPreTraining if task == "pretrain" else EverestForVideoClassification
    model = cls(config).train(task != "inference")
    model.requires_grad_(task != "inference")
    if task == "probe":
        model.everest.requires_grad_(False)
    arguments = (
        {} if task == "pretrain" else {"labels": torch.zeros(batch, dtype=torch.long), "keep_ratio": keep_ratio}
    )
    with FlopCounterMode(display=False) as counter:
        loss = model(clips, **arguments).loss
        if task != "inference":
            loss.backward()
    return counter.get_total_flops() // batch


@pytest.mark.parametrize("task", ["pretrain", "finetune", "probe", "inference"])
@pytest.mark.parametrize(
    "fields",
    [
        SMALL,
        SMALL | {"token_selection": "random"},
        SMALL | {"token_selection": "tube"},
        SMALL | {"frame_oversampling": 1.5},
        SMALL | {"attentive_pooling": True},
        None,
    ],
    ids=["motion", "random", "tube", "oversampled", "attentive", "tiny"],
)
def test_the_formula_agrees_with_what_is_counted(task, fields):
    config = tiny_config() if fields is None else EverestConfig(**fields)
    assert cost_of_clip(config, task).flops == pytest.approx(counted(config, task), rel=0.01)


@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 1.0])
def test_the_keep_ratio_of_a_call(keep_ratio):
    config = EverestConfig(**SMALL)
    cost = cost_of_clip(config, "inference", keep_ratio)
    assert cost.encoder_tokens == config.num_kept_tokens(keep_ratio)
    assert cost.flops == pytest.approx(counted(config, "inference", keep_ratio), rel=0.01)


def test_base_by_hand():
    config = EverestConfig()
    cost = cost_of_clip(config, "inference", 1.0)
    projection = 1568 * 1536 * 768
    layer = 1568 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 1568**2 * 768
    assert cost.forward_flops == 2 * (projection + 12 * layer + 768 * config.num_labels)
    pretraining = cost_of_clip(config, "pretrain")
    assert (pretraining.encoder_tokens, pretraining.decoder_tokens) == (156, 470)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"'train'.*pretrain, finetune, probe, inference"):
        cost_of_clip(tiny_config(), "train")


def test_parameters():
    config = tiny_config()
    model = EverestForVideoClassification(config)
    count = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("everest."))
    assert num_parameters(config, "finetune") == (count, count)
    assert num_parameters(config, "probe") == (count, head)
    assert num_parameters(config, "inference") == (count, 0)


def saved_bytes(config: EverestConfig, task: str, batch: int) -> int:
    """Bytes of a batch and of what autograd keeps of it for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    cls = EverestForPreTraining if task == "pretrain" else EverestForVideoClassification
    model = cls(config).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    clips = torch.randn(batch, config.num_input_frames, config.num_channels, *config.frame_size)
    labels = {} if task == "pretrain" else {"labels": torch.zeros(batch, dtype=torch.long)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(clips, **labels).loss
    assert loss.requires_grad
    return clips.nbytes + sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_memory_grows_with_the_batch_as_what_is_saved(task):
    config = EverestConfig(**SMALL, attn_implementation="sdpa")
    measured = saved_bytes(config, task, 8) - saved_bytes(config, task, 4)
    expected = training_memory(config, task, 8) - training_memory(config, task, 4)
    assert 0.7 < expected / measured < 1.4


def test_what_saves_memory_does():
    config = EverestConfig()
    plain = training_memory(config, "finetune", 16)
    assert training_memory(config, "finetune", 16, checkpointing=True) < 0.4 * plain
    assert training_memory(config, "finetune", 16, sixteen_bit=True) < 0.8 * plain
    assert training_memory(config, "probe", 16) < 0.3 * plain
