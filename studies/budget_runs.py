"""The runs of the budget study: clips with their truth, a model that gives each clip a number of tokens of its own."""

import dataclasses
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from motion_clips import CONDITIONS, MotionClips, Split, condition_of
from motion_runs import Bench, Pretraining, Size, classification_loss, clips_path, evaluate, train
from torch.nn import functional as F
from transformers import AttentionInterface

from everest_hf import EverestForVideoClassification
from everest_hf.camera_everest import changes_beside_camera
from everest_hf.configuration_everest import share_of
from everest_hf.files import write_whole
from everest_hf.kernels_everest import project
from everest_hf.modeling_everest import EverestForVideoClassificationOutput
from everest_hf.selection_everest import gather_tokens, patchify, sorted_ids

LEAST, MOST = 0.05, 0.6
CALIBRATION_CLIPS = 960


@dataclass(frozen=True)
class Arm:
    """A fine-tuning. clips: a name of `specs`; also: other ratios at which it is evaluated."""

    clips: str
    seed: int
    keep_ratio: float
    budget: str = "clip"
    scores: str = "plain"
    also: tuple[float, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.budget} {self.keep_ratio:g}" + ("" if self.scores == "plain" else f", {self.scores}")

    @property
    def name(self) -> str:
        return f"{self.clips}-{self.title}-{self.seed}".replace(" ", "-").replace(",", "")

    def do(self, bench: "TruthBench") -> dict:
        return finetune(bench, self)


# ------------------------------------------------------------------------------------------------------------ clips


def specs(size: Size) -> dict[str, MotionClips]:
    """Return what to draw, by the name of a set."""
    return {"clips": size.clips, "varied": dataclasses.replace(size.clips, num_moving=8, fewest_moving=1)}


def truth_path(work: Path, kind: str, split: str) -> Path:
    return clips_path(work, kind, split).with_suffix(".npz")


def prepare(bench: Bench, kind: str, split: str) -> None:
    """Write the clips of a split, and beside them what `TruthBench` tells about each.

    That is how much of each token moving sprites cover (N,), and the whole pixels (t - 1, 2) by which the background
    moves from slot to slot.
    """
    spec, count, config = specs(bench.size)[kind], bench.size.counts[split], bench.config()
    drawn, cover, camera = Split(spec, split), [], []
    clips = np.empty((count, spec.num_frames, 3, spec.side, spec.side), np.uint8)
    for index in range(count):
        clips[index] = drawn.draw(index).transpose(0, 3, 1, 2)
        pixels, path = drawn.draw_truth(index)
        cover.append(
            patchify(torch.from_numpy(pixels)[None, :, None], config.tubelet_size, config.patch_size).mean(-1)
        )
        camera.append(path.reshape(-1, config.tubelet_size, 2).mean(axis=1))
    truth = {"true sprites": torch.cat(cover).float().numpy()}
    truth["true camera"] = -np.diff(np.stack(camera), axis=1).round().astype(int)
    write_whole(truth_path(bench.work, kind, split), lambda aside: _save(aside, np.savez, **truth))
    write_whole(clips_path(bench.work, kind, split), lambda aside: _save(aside, np.save, clips))


def _save(path: Path, save, *args, **kwargs) -> None:
    with path.open("wb") as file:
        save(file, *args, **kwargs)


@dataclass
class TruthBench(Bench):
    """A bench that also knows the truth about the clips that were read last."""

    truths: dict = field(default_factory=dict)
    last: tuple = ()

    def batch(self, kind, split, ids, config):
        self.last = kind, split, ids
        return super().batch(kind, split, ids, config)

    def truth(self, what: str) -> torch.Tensor:
        kind, split, ids = self.last
        if (kind, split) not in self.truths:
            self.truths[kind, split] = dict(np.load(truth_path(self.work, kind, split)))
        return torch.from_numpy(self.truths[kind, split][what])[ids]


# ------------------------------------------------------------------------------------------------------------ model

_key_mask: list[torch.Tensor | None] = [None]  # (B, 1, 1, K) of the tokens that are encoded now


def masked_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    attended = F.scaled_dot_product_attention(query, key, value, _key_mask[0], dropout, scale=scaling)
    return attended.transpose(1, 2), None


AttentionInterface.register("masked", masked_attention)


class BudgetModel(EverestForVideoClassification):
    """A classifier that gives each clip a number of tokens of its own, padded and masked."""

    def set_up(self, arm: Arm, bench: TruthBench) -> None:
        self.arm, self.bench = arm, bench
        self.thresholds: dict[float, float] = {}
        self.counts: list[torch.Tensor] = []

    def forward(self, pixel_values, labels=None, keep_ratio=None):
        scores = self.score(pixel_values)  # (B, N)
        counts = self.count(scores, keep_ratio or self.arm.keep_ratio)  # (B,)
        self.counts.append(counts)
        ids = sorted_ids(scores, descending=True)[:, : int(counts.max())]
        keys = torch.arange(ids.shape[1]) < counts[:, None]  # (B, K)
        _key_mask[0] = None if keys.all() else keys[:, None, None]
        config, embeddings = self.config, self.everest.embeddings
        patches = gather_tokens(patchify(pixel_values, config.tubelet_size, config.patch_size), ids)
        tokens = embeddings.add_positions(project(embeddings.projection, patches), ids, config.grid_size)
        encoded = self.everest.encode(tokens)[0] * keys[..., None]
        logits = self.classifier(self.fc_norm(encoded.sum(1) / counts[:, None]))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return EverestForVideoClassificationOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def score(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score the tokens (B, N) of clips as the arm does."""
        embeddings = self.everest.embeddings
        if self.arm.scores == "compensated":
            return embeddings.score_beside_camera(pixels)
        slots = pixels.unflatten(1, (-1, self.config.tubelet_size))  # (B, t, tubelet, C, H, W)
        if self.arm.scores == "true camera":
            return embeddings.score_changes(changes_beside_camera(slots, self.bench.truth("true camera")))
        scores = embeddings.score_changes(slots.diff(dim=1))
        # Motion breaks the ties of sprites.
        return self.bench.truth("true sprites") + 1e-6 * scores if self.arm.scores == "true sprites" else scores

    def count(self, scores: torch.Tensor, ratio: float) -> torch.Tensor:
        """Return how many tokens (B,) each clip keeps."""
        num_tokens = scores.shape[1]
        if self.arm.budget == "clip":
            return torch.full(scores.shape[:1], share_of(ratio, num_tokens))
        if self.training:
            return counts_of_batch(scores, ratio)
        return counts_above(scores, self.thresholds[ratio])

    @torch.inference_mode()
    def calibrate(self, ratio: float) -> None:
        """Find the threshold that keeps this share of the tokens of training clips, by bisection."""
        parts = torch.arange(min(CALIBRATION_CLIPS, self.bench.size.counts["train"])).split(64)
        scores = torch.cat([self.score(self.bench.batch(self.arm.clips, "train", i, self.config)) for i in parts])
        low, high = 0.0, scores.max().item()
        for _ in range(40):
            middle = (low + high) / 2
            share = counts_above(scores, middle).float().mean().item() / scores.shape[1]
            low, high = (middle, high) if share > ratio else (low, middle)
        self.thresholds[ratio] = high


def counts_of_batch(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return how many tokens (B,) each clip has among the highest scores (B, N) of the batch, within LEAST and MOST."""
    batch, num_tokens = scores.shape
    falling = scores.sort(dim=1, descending=True).values
    falling[:, : share_of(LEAST, num_tokens)] = torch.inf
    falling[:, share_of(MOST, num_tokens) :] = -torch.inf
    taken = falling.flatten().topk(share_of(ratio, batch * num_tokens)).indices // num_tokens
    return torch.bincount(taken, minlength=batch)


def counts_above(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return how many tokens (B,) of each clip have a score (B, N) above the threshold, within LEAST and MOST."""
    num_tokens = scores.shape[1]
    return (scores > threshold).sum(1).clamp(share_of(LEAST, num_tokens), share_of(MOST, num_tokens))


# ------------------------------------------------------------------------------------------------------------- runs


def finetune(bench: TruthBench, arm: Arm) -> dict:
    """Fine-tune a model, and return by ratio its accuracy and mean tokens by condition."""
    torch.manual_seed(arm.seed)
    config, folder = bench.config(keep_ratio=arm.keep_ratio), bench.work / first_run(bench.size, arm.seed).name
    model = BudgetModel.from_pretrained(folder, config=config, attn_implementation="masked").to(bench.device)
    model.set_up(arm, bench)
    steps, lr = bench.size.finetuning_steps, bench.size.finetuning_lr
    draw = partial(bench.draw, arm.clips, config)
    train(bench, model, steps, lr, (0.9, 0.999), draw, classification_loss, lambda *point: None)
    return {f"{ratio:g}": _evaluate(bench, model, ratio) for ratio in (arm.keep_ratio, *arm.also)}


def first_run(size: Size, seed: int) -> Pretraining:
    return Pretraining("everest", seed, size.pretraining_steps)


def _evaluate(bench: TruthBench, model: BudgetModel, ratio: float) -> dict:
    if model.arm.budget == "batch":
        model.eval().calibrate(ratio)
    model.counts = []
    top1 = evaluate(bench, model, model.arm.clips, "test", keep_ratio=ratio)
    tokens: dict[str, list[int]] = {condition: [] for condition in CONDITIONS}
    for index, count in enumerate(torch.cat(model.counts).tolist()):
        tokens[condition_of(index)].append(count)
    return {"top1": top1, "tokens": {condition: statistics.fmean(counts) for condition, counts in tokens.items()}}
