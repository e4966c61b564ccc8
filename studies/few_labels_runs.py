"""The runs of the study of few labels: their sizes, clips, pre-training, fine-tuning, probes and the time of steps."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import motion_runs
import numpy as np
import torch
import torch.nn.functional as F
from motion_clips import CLASSES, MotionClips, Split, open_clips, write_clips
from motion_runs import (
    SMALL,
    TINY,
    Seconds,
    classification_loss,
    median_seconds,
    pretrain,
    pretraining_steps,
    train,
    training_step,
)

from everest_hf import EverestConfig, EverestForVideoClassification
from everest_hf.data.synthetic import DIRECTIONS, MotionVideos, render
from everest_hf.data.transforms import normalize
from everest_hf.evaluation.few_shot import draw_videos, few_shot_figures
from everest_hf.files import write_whole
from everest_hf.training.yaml_files import read_yaml

SPLITS = ("train", "val", "test")
QUICKSTART = Path(__file__).parents[1] / "recipes/quickstart/pretrain.yaml"
# The share of the tokens that fine-tuning and features use. The motion study found it as accurate as 0.6, at half the cost.
KEEP_RATIO = 0.3
# The classes take turns, so these first clips of training hold as many of each. Labels are drawn from them.
LABELLED = 1024
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Size:
    """How large a study is.

    clips: what to draw. counts: clips by split; those of "train" are the unlabelled ones. batch: clips of a step of
    pre-training; finetuning_batch: of one of fine-tuning and of the attentive probe. labels: numbers of labels a class;
    labels_of_long_runs: those of the arm that is fine-tuned for the time of a pre-training too.
    pretraining_rates, finetuning_rates, probe_rates: learning rates that are tried on validation clips.
    """

    clips: MotionVideos | MotionClips
    counts: dict[str, int]
    config: dict
    pretraining_steps: int
    pretraining_rates: tuple[float, ...]
    batch: int = 32
    finetuning_batch: int = 16
    finetuning_steps: int = 200
    probe_steps: int = 100
    labels: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    labels_of_long_runs: tuple[int, ...] = (8,)
    finetuning_rates: tuple[float, ...] = (1e-3, 3e-3, 6e-3)
    probe_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)

    @property
    def classes(self) -> tuple[str, ...]:
        return DIRECTIONS if isinstance(self.clips, MotionVideos) else CLASSES


COUNTS = {"train": 12800, "val": 240, "test": 480}
SIZES = {
    "cpu": Size(MotionVideos(), COUNTS, read_yaml(QUICKSTART)["config"], 2500, (1e-3, 2e-3, 5e-3)),
    "cpu-clutter": Size(MotionClips(num_frames=12, action_frames=12), COUNTS, TINY, 2500, (2e-3, 4e-3, 1e-2)),
    "gpu": Size(
        MotionVideos(num_frames=20, height=112, width=112, spacing=28, radius=(8.0, 12.0), speed=(2.5, 5.0)),
        COUNTS | {"train": 51200},
        SMALL,
        4000,
        (5e-4, 1e-3, 2e-3),
        batch=128,
        finetuning_rates=(1e-4, 3e-4, 1e-3),
    ),
    "smoke": Size(
        MotionVideos(),
        {"train": 2 * LABELLED, "val": 16, "test": 16},
        read_yaml(QUICKSTART)["config"],
        3,
        (1e-3, 2e-3),
        batch=4,
        finetuning_batch=4,
        finetuning_steps=2,
        probe_steps=2,
        labels=(1, 2),
        labels_of_long_runs=(2,),
        finetuning_rates=(1e-3, 3e-3),
        probe_rates=(1e-3,),
    ),
}


# ----------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Pretraining(motion_runs.Pretraining):
    """A run of pre-training at a learning rate of its own."""

    lr: float

    @property
    def name(self) -> str:
        return f"pretrain-{self.targets}-{self.steps}-{self.lr:g}-{self.seed}"

    def do(self, bench: "Bench") -> dict:
        return pretrain(bench, self, self.lr, bench.draw_unlabelled)


@dataclass(frozen=True)
class Finetuning:
    """A run of fine-tuning on a draw of labels, and its evaluation. labels: of each class."""

    pretraining: Pretraining | None
    labels: int
    draw: int
    seed: int
    steps: int
    lr: float

    @property
    def name(self) -> str:
        start = self.pretraining.name if self.pretraining else "scratch"
        return f"finetune-{self.labels}-{self.draw}-{self.seed}-{self.steps}-{self.lr:g}-after-{start}"

    def do(self, bench: "Bench") -> dict:
        return finetune(bench, self)


@dataclass(frozen=True)
class Probing:
    """Probes of the frozen features of an encoder, or of one with random weights."""

    pretraining: Pretraining | None
    seed: int
    draws: int

    @property
    def name(self) -> str:
        start = self.pretraining.name if self.pretraining else f"scratch-{self.seed}"
        return f"probe-{self.draws}-{start}"

    def do(self, bench: "Bench") -> dict:
        return probe(bench, self)


FINETUNING_KIND = "fine-tuning"


# ---------------------------------------------------------------------------------------------------------- clips


def draw_clip(spec: MotionVideos | MotionClips, split: str) -> Callable[[int], np.ndarray]:
    """Return what draws the clips of a split by their numbers: uint8 (T, H, W, 3)."""
    if isinstance(spec, MotionClips):
        return Split(spec, split).draw
    # The quickstart knows training and validation videos; the test clips are validation videos that it never writes.
    first, name = (10**6, "val") if split == "test" else (0, split)
    return lambda index: render(spec, name, first + index)


class Bench(motion_runs.Bench):
    """What a process needs for the runs: sizes, clips and where finished runs lie."""

    size: Size

    def clips_of(self, split: str) -> torch.Tensor:
        """Open the clips of a split, and draw them first where that has not been done: uint8 (count, T, 3, H, W)."""
        path = self.work / f"{split}.npy"
        if not path.exists():
            write_whole(
                path, lambda aside: write_clips(draw_clip(self.size.clips, split), self.size.counts[split], aside)
            )
        if split not in self.opened:
            self.opened[split] = open_clips(path)
        return self.opened[split]

    def read(self, split: str, ids: torch.Tensor, config: EverestConfig, at_random: bool = False) -> torch.Tensor:
        """Read frames of clips in a row, from their middle or at random: float32 (B, T, C, H, W), normalised."""
        clips = self.clips_of(split)
        starts = 1 + clips.shape[1] - config.num_frames
        firsts = torch.randint(starts, (len(ids),)) if at_random else torch.full((len(ids),), starts // 2)
        frames = [clips[i, a : a + config.num_frames] for i, a in zip(ids.tolist(), firsts.tolist(), strict=True)]
        return normalize(torch.stack(frames).to(self.device), config.image_mean, config.image_std)

    def labels_of(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids % len(self.size.classes)).to(self.device)

    def draw(self, ids: torch.Tensor, batch: int, config: EverestConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch of training clips among those with these numbers."""
        drawn = ids[torch.randint(len(ids), (batch,))]
        return self.read("train", drawn, config, at_random=True), self.labels_of(drawn)

    def draw_unlabelled(self, config: EverestConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch of pre-training among all training clips."""
        return self.draw(torch.arange(self.size.counts["train"]), self.size.batch, config)

    def labelled(self, draw: int, labels: int) -> torch.Tensor:
        """Return the clips of a draw of labels, so many of each class; more labels are added to the same ones."""
        classes = self.labels_of(torch.arange(LABELLED)).cpu()
        *_, order = draw_videos(classes, draw + 1, seed=0)  # (classes, clips)
        return order[:, :labels].flatten()

    def config(self, **fields) -> EverestConfig:
        names = dict(enumerate(self.size.classes))
        fields = {"drop_path_rate": 0.0, "keep_ratio": KEEP_RATIO, **self.size.config, **fields}
        return EverestConfig(**fields, id2label=names, label2id={v: k for k, v in names.items()})

    def classifier(self, first: Pretraining | None, **fields) -> EverestForVideoClassification:
        """Build a classifier, on a pre-trained encoder where there is one."""
        config = self.config(**fields)
        if first is None:
            return EverestForVideoClassification(config).to(self.device)
        folder = self.work / first.name
        return EverestForVideoClassification.from_pretrained(folder, config=config).to(self.device)


# ------------------------------------------------------------------------------------------------------- training


def finetune(bench: Bench, run: Finetuning) -> dict:
    """Fine-tune a model on few labels, and return its accuracy on validation and on test clips."""
    torch.manual_seed(1000 * run.seed + run.draw)
    model, size = bench.classifier(run.pretraining), bench.size
    ids = bench.labelled(run.draw, run.labels)
    draw = partial(bench.draw, ids, size.finetuning_batch, model.config)
    train(bench, model, run.steps, run.lr, (0.9, 0.999), draw, classification_loss, lambda *point: None)
    return {split: accuracy(bench, model, split) for split in ("val", "test")}


@torch.inference_mode()
def accuracy(bench: Bench, model, split: str) -> float:
    """Return the share of a split's clips that a classifier is right about."""
    ids, hits = torch.arange(bench.size.counts[split]), 0
    model.eval()
    for some in ids.split(EVALUATION_BATCH):
        with bench.precision():
            logits = model(bench.read(split, some, model.config)).logits
        hits += int((logits.argmax(dim=1) == bench.labels_of(some)).sum())
    return hits / len(ids)


# --------------------------------------------------------------------------------------------------------- probes


def probe(bench: Bench, run: Probing) -> dict:
    """Return the accuracies of probes on frozen features by number of labels and kind, each the mean over the draws.

    Linear classifiers and nearest neighbours are those of `evaluation: few_shot`; the rate of the attentive probe is
    chosen on validation clips, with the first draw.
    """
    torch.manual_seed(run.seed)
    model, numbers = bench.classifier(run.pretraining, attentive_pooling=True), bench.size.labels
    model.freeze_encoder()
    model.eval()
    tokens = {split: _tokens(bench, model, split) for split in SPLITS}  # (n, K, D)
    labels = {split: bench.labels_of(torch.arange(len(x))) for split, x in tokens.items()}
    features = [x for split in ("train", "test") for x in (tokens[split].mean(dim=1).cpu(), labels[split].cpu())]
    found = few_shot_figures(*features, numbers=list(numbers), seed=0, draws=run.draws)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}

    def attend(number: int, draw: int, lr: float, split: str) -> float:
        model.load_state_dict(start)
        _train_head(bench, model, tokens["train"], bench.labelled(draw, number), lr)
        with torch.no_grad():
            predicted = model.eval().classifier(model.pool(tokens[split])).argmax(dim=1)
        return (predicted == labels[split]).double().mean().item()

    figures = {}
    for number in numbers:
        best = max(bench.size.probe_rates, key=lambda lr: attend(number, 0, lr, "val"))
        attentive = statistics.fmean(attend(number, draw, best, "test") for draw in range(run.draws))
        figures[number] = {"linear": found[f"linear_{number}"], "knn": found[f"knn_{number}"], "attentive": attentive}
    return figures


def _train_head(bench: Bench, model, tokens: torch.Tensor, ids: torch.Tensor, lr: float) -> None:
    """Train pooling and classifier on the encoder's tokens (n, K, D) of the clips with these numbers."""

    def draw():
        drawn = ids[torch.randint(len(ids), (bench.size.finetuning_batch,))]
        return tokens[drawn], bench.labels_of(drawn)

    def loss_of(model, tokens, labels):
        return F.cross_entropy(model.classifier(model.pool(tokens)), labels)

    train(bench, model, bench.size.probe_steps, lr, (0.9, 0.999), draw, loss_of, lambda *point: None)


@torch.no_grad()
def _tokens(bench: Bench, model, split: str) -> torch.Tensor:
    """Return the encoder's tokens (n, K, D) float32 of a split's clips; of training only the labelled ones."""
    count = LABELLED if split == "train" else bench.size.counts[split]
    with bench.precision():
        parts = [
            model.everest(bench.read(split, ids, model.config)).last_hidden_state.float()
            for ids in torch.arange(count).split(EVALUATION_BATCH)
        ]
    return torch.cat(parts)


# ----------------------------------------------------------------------------------------------------- time of steps


def time_steps(bench: Bench) -> Seconds:
    """Return the seconds of a training step of every kind, with the reading of its clips."""
    steps = pretraining_steps(bench, lambda config: partial(bench.draw_unlabelled, config))
    model = bench.classifier(None)
    draw = partial(bench.draw, torch.arange(LABELLED), bench.size.finetuning_batch, model.config)
    steps[FINETUNING_KIND] = training_step(bench, model, draw, classification_loss)
    return median_seconds(steps, bench.device, warmup=3)
