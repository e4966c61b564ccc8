"""The runs of the motion study: how large they are, pre-training, fine-tuning, evaluation, and the time of their steps."""

import dataclasses
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import measure
import torch
from motion_clips import CLASSES, CONDITIONS, MotionClips, condition_of, label_of, open_clips
from steps import tube_mask
from torch.nn import functional as F
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification
from everest_hf.data.transforms import normalize
from everest_hf.training.optim import parameter_groups

RATIOS, SELECTIONS = (1.0, 0.6, 0.3, 0.1), ("motion", "random", "tube")
TARGETS = {"everest": "EVEREST", "tube": "VideoMAE's tubes", "random": "random tokens", None: "none"}
OVERSAMPLING = (1.0, 1.5, 3.0)
# Clips cut from a video that is read once, and how many times as fast so many clips are read. `benchmarks/loader.py
# --scaling` measures that of 4; that of 2 follows, as what is shared is read once.
NUM_SAMPLES, READ_FASTER = (1, 2, 4), {2: 1.7, 4: 3.0}
# Pixels by which a crop may lie elsewhere than the clip; what is outside the clip is what mirrors show.
CROP_REACH = 8
TRAINED_FOR_SWEEP = (1.0, 0.6)
# Of training, as in the recipes; the learning rate rises in this share of the steps, then falls to this share.
WEIGHT_DECAY, WARMUP, FINAL_FACTOR = 0.05, 0.1, 0.02
# Keep ratios that are also given the time of 0.6 by motion, and how many times longer the longest runs are.
EQUAL_TIME = (("motion", 1.0), ("motion", 0.3), ("motion", 0.1), ("random", 0.3))
LONGER = 4
NUM_CURVE_POINTS = 5
ROUNDS_OF_TIMING = 7
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Size:
    """How large a study is. long_clips: those of which the action takes a third, for the question of frames."""

    clips: MotionClips
    counts: dict[str, int]
    config: dict
    batch: int
    pretraining_steps: int
    finetuning_steps: int
    pretraining_lr: float
    finetuning_lr: float

    @property
    def long_clips(self) -> MotionClips:
        frames = self.clips.num_frames
        return dataclasses.replace(self.clips, num_frames=3 * frames, action_frames=frames)


# Small patches, so that most of the work is that on tokens, as in the real models. The initial weights are those of
# variance 1 / width: from the 0.02 of models eight times as wide, such a narrow one learns nothing for hundreds of steps.
TINY = {
    "image_size": 64,
    "num_frames": 8,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
    "initializer_range": 0.14,
}
SMALL = {
    "image_size": 112,
    "num_frames": 16,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "decoder_hidden_size": 192,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 768,
}
SIZES = {
    "cpu": Size(MotionClips(), {"train": 3200, "val": 320, "test": 960}, TINY, 16, 1200, 600, 4e-3, 3e-3),
    "gpu": Size(
        MotionClips(num_frames=16, action_frames=16, side=112, num_moving=6, num_still=5, sprite=22),
        {"train": 12800, "val": 640, "test": 1920},
        SMALL,
        64,
        10000,
        4000,
        1e-3,
        1e-3,
    ),
    "smoke": Size(MotionClips(), {"train": 64, "val": 64, "test": 64}, TINY, 8, 5, 5, 4e-3, 3e-3),
}


# -------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Pretraining:
    """A run of pre-training; targets: a key of TARGETS, what it sees and predicts."""

    targets: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"pretrain-{self.targets}-{self.steps}-{self.seed}"

    def do(self, bench: "Bench") -> dict:
        return pretrain(bench, self, bench.size.pretraining_lr, partial(bench.draw, "clips"))


@dataclass(frozen=True)
class Finetuning:
    """A run of fine-tuning and its evaluation.

    sweep: evaluate it at all other ratios and selections as well. num_sample: crops of a clip that a step takes; None:
    whole clips.
    """

    pretraining: Pretraining | None
    seed: int
    steps: int
    selection: str = "motion"
    keep_ratio: float = 0.6
    clips: str = "clips"
    oversampling: float = 1.0
    sweep: bool = False
    num_sample: int | None = None

    @property
    def name(self) -> str:
        start = self.pretraining.name if self.pretraining else "scratch"
        what = f"{self.clips}-{self.oversampling:g}-{self.selection}-{self.keep_ratio:g}-{self.steps}-{self.seed}"
        crops = f"-{self.num_sample}-crops" if self.num_sample else ""
        return f"finetune-{what}{crops}-after-{start}"

    def do(self, bench: "Bench") -> dict:
        return finetune(bench, self)


Seconds = dict[str, float]


def pretraining_kind(targets: str) -> str:
    return f"pre-training, {TARGETS[targets]}"


def finetuning_kind(selection: str, keep_ratio: float, oversampling: float) -> str:
    frames = f", {oversampling:g} times the frames" if oversampling > 1 else ""
    return f"fine-tuning, {selection} {keep_ratio:g}{frames}"


# --------------------------------------------------------------------------------------------------------- training


def clips_path(work: Path, kind: str, split: str) -> Path:
    return work / f"{kind}-{split}.npy"


@dataclass
class Bench:
    """What a process needs for the runs: sizes, clips and where finished runs lie."""

    size: Size
    work: Path
    device: torch.device
    opened: dict = field(default_factory=dict)

    def clips(self, kind: str, split: str) -> torch.Tensor:
        """Open the clips of a split: uint8 (count, T, 3, H, W)."""
        if (kind, split) not in self.opened:
            self.opened[kind, split] = open_clips(clips_path(self.work, kind, split))
        return self.opened[kind, split]

    def batch(self, kind: str, split: str, ids: torch.Tensor, config: EverestConfig) -> torch.Tensor:
        """Read clips with as many frames, evenly spaced, as the model takes: float32 (B, T, C, H, W), normalised."""
        clips = self.clips(kind, split)
        frames = torch.linspace(0, clips.shape[1] - 1, config.num_input_frames).round().long()
        pixels = clips.index_select(0, ids).index_select(1, frames).to(self.device)
        return normalize(pixels, config.image_mean, config.image_std)

    def draw(
        self, kind: str, config: EverestConfig, num_sample: int | None = None, num_clips: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch of training clips: as `batch` gives them, and their classes (B,).

        With num_sample they are crops, so many of each clip. num_clips: how many clips there are to draw from, if not all.
        """
        count = self.size.counts["train"]
        ids = torch.randint(min(num_clips or count, count), (self.size.batch // (num_sample or 1),))
        ids = ids.repeat_interleave(num_sample or 1)
        pixels = self.batch(kind, "train", ids, config)
        return random_crops(pixels) if num_sample else pixels, labels_of(ids).to(self.device)

    def config(self, **fields) -> EverestConfig:
        names = dict(enumerate(CLASSES))
        return EverestConfig(**self.size.config, id2label=names, label2id={v: k for k, v in names.items()}, **fields)

    def pretraining_model(self, targets: str) -> EverestForPreTraining:
        # VideoMAE's sees and predicts what a mask says, and that is every token.
        fields = {"everest": {}, "random": {"token_selection": "random"}, "tube": {"pretraining_keep_ratio": 1.0}}
        return EverestForPreTraining(self.config(**fields[targets])).to(self.device)

    def pretraining_loss(self, model: EverestForPreTraining, targets: str, pixels: torch.Tensor) -> torch.Tensor:
        mask = None
        if targets == "tube":
            mask = tube_mask(len(pixels), model.config, torch.default_generator).to(self.device)
        return model(pixels, bool_masked_pos=mask).loss

    def optimizer(self, model, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        groups = parameter_groups(model, lr=lr, weight_decay=WEIGHT_DECAY, num_layers=model.config.num_hidden_layers)
        return torch.optim.AdamW(groups, betas=betas, fused=True)

    def precision(self):
        """bfloat16 on a GPU, float32 on a CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def classification_loss(model, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(pixels, labels=labels).loss


def random_crops(clips: torch.Tensor) -> torch.Tensor:
    """Move each clip (B, T, C, H, W) by at most CROP_REACH pixels in y and x; what is new at its edges is mirrored."""
    wider = F.pad(clips.flatten(1, 2), (CROP_REACH,) * 4, mode="reflect").unflatten(1, clips.shape[1:3])
    places = torch.randint(2 * CROP_REACH + 1, (len(clips), 2)).tolist()
    height, width = clips.shape[-2:]
    crops = [clip[..., y : y + height, x : x + width] for clip, (y, x) in zip(wider, places, strict=True)]
    return torch.stack(crops)


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([label_of(i) for i in ids.tolist()])


def train(bench: Bench, model, steps: int, lr: float, betas: tuple[float, float], draw, loss_of, on_point) -> None:
    """Train a model on what draw() gives for each step, clips and their classes.

    on_point(step, loss) is called NUM_CURVE_POINTS times, last at the end.
    """
    optimizer = bench.optimizer(model, lr, betas)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(WARMUP * steps), steps, min_lr_rate=FINAL_FACTOR
    )
    for step in range(1, steps + 1):
        pixels, labels = draw()
        with bench.precision():
            loss = loss_of(model.train(), pixels, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step * NUM_CURVE_POINTS // steps > (step - 1) * NUM_CURVE_POINTS // steps:
            on_point(step, loss.item())


def pretrain(bench: Bench, run: Pretraining, lr: float, draw, name: str | None = None) -> dict:
    """Pre-train and save a model; draw(config) gives the clips of a step, and their classes, which are not used.

    name: of its folder, by default the run's.
    """
    torch.manual_seed(run.seed)
    model, curve = bench.pretraining_model(run.targets), []

    def loss_of(model, pixels, labels):
        return bench.pretraining_loss(model, run.targets, pixels)

    draw = partial(draw, model.config)
    train(bench, model, run.steps, lr, (0.9, 0.95), draw, loss_of, lambda *point: curve.append(point))
    model.save_pretrained(bench.work / (name or run.name))
    return {"loss": curve}


def finetune(bench: Bench, run: Finetuning) -> dict:
    """Fine-tune a model and return its accuracies: on validation clips while it learns, on test clips at the end."""
    torch.manual_seed(run.seed)
    fields = {"token_selection": run.selection, "keep_ratio": run.keep_ratio, "frame_oversampling": run.oversampling}
    config, curve = bench.config(**fields), []
    if run.pretraining:
        folder = bench.work / run.pretraining.name
        model = EverestForVideoClassification.from_pretrained(folder, config=config).to(bench.device)
    else:
        model = EverestForVideoClassification(config).to(bench.device)

    def on_point(step: int, loss: float) -> None:
        accuracy = statistics.fmean(evaluate(bench, model, run.clips, "val").values())
        curve.append((step, loss, accuracy))

    draw, lr = partial(bench.draw, run.clips, config, run.num_sample), bench.size.finetuning_lr
    train(bench, model, run.steps, lr, (0.9, 0.999), draw, classification_loss, on_point)
    record = {"curve": curve, "test": evaluate(bench, model, run.clips, "test")}
    if run.sweep:
        record["inference"] = {
            f"{selection} {ratio:g}": evaluate(bench, model, run.clips, "test", selection, ratio)
            for selection in SELECTIONS
            for ratio in (RATIOS if selection == "motion" else RATIOS[1:])
        }
    return record


@torch.inference_mode()
def evaluate(
    bench: Bench, model, kind: str, split: str, selection: str | None = None, keep_ratio: float | None = None
) -> dict[str, float]:
    """Return the accuracy by condition, of which each has as many clips."""
    own, model.config.token_selection = model.config.token_selection, selection or model.config.token_selection
    hits: dict[str, list[bool]] = {condition: [] for condition in CONDITIONS}
    for ids in torch.arange(bench.size.counts[split]).split(EVALUATION_BATCH):
        with bench.precision():
            logits = model.eval()(bench.batch(kind, split, ids, model.config), keep_ratio=keep_ratio).logits
        for i, hit in zip(ids.tolist(), (logits.argmax(dim=1).cpu() == labels_of(ids)).tolist(), strict=True):
            hits[condition_of(i)].append(hit)
    model.config.token_selection = own
    return {condition: statistics.fmean(values) for condition, values in hits.items()}


# ----------------------------------------------------------------------------------------------------- time of steps


def time_steps(bench: Bench) -> Seconds:
    """Return the seconds of a training step of every kind, each on the clips of a batch: forward, backward, AdamW."""

    def drawn(kind: str, config: EverestConfig):
        ids = torch.arange(bench.size.batch)
        batch = bench.batch(kind, "train", ids, config), labels_of(ids).to(bench.device)
        return lambda: batch

    steps = pretraining_steps(bench, partial(drawn, "clips"))
    kinds = [(s, r, 1.0) for s in SELECTIONS for r in RATIOS if s == "motion" or r < 1]
    for selection, ratio, factor in [*kinds, *(("motion", 0.6, f) for f in OVERSAMPLING if f > 1)]:
        fields = {"token_selection": selection, "keep_ratio": ratio, "frame_oversampling": factor}
        model = EverestForVideoClassification(bench.config(**fields)).to(bench.device)
        kind = "clips" if factor == 1 else "long_clips"
        draw = drawn(kind, model.config)
        steps[finetuning_kind(selection, ratio, factor)] = training_step(bench, model, draw, classification_loss)
    return median_seconds(steps, bench.device)


def pretraining_steps(bench: Bench, make_draw) -> dict[str, Callable[[], None]]:
    """Return a step of each pre-training by its kind; make_draw(config) returns what gives the clips of a step."""
    steps = {}
    for targets in filter(None, TARGETS):
        model = bench.pretraining_model(targets)

        def loss_of(model, pixels, labels, targets=targets):
            return bench.pretraining_loss(model, targets, pixels)

        steps[pretraining_kind(targets)] = training_step(bench, model, make_draw(model.config), loss_of)
    return steps


def median_seconds(steps: dict[str, Callable[[], None]], device: torch.device, warmup: int = 1) -> Seconds:
    seconds = measure.interleave(steps, ROUNDS_OF_TIMING, device, warmup)
    return {name: statistics.median(values) for name, values in seconds.items()}


def training_step(bench: Bench, model, draw, loss_of) -> Callable[[], None]:
    """Return a step of `train`, without its schedule."""
    optimizer = bench.optimizer(model.train(), 1e-4, (0.9, 0.999))

    def step() -> None:
        pixels, labels = draw()
        with bench.precision():
            loss = loss_of(model, pixels, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
