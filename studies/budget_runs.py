"""The runs of the budget study: clips with their truth, fine-tunings, and pre-trainings by budget."""

import dataclasses
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from motion_clips import CONDITIONS, MotionClips, Split, condition_of
from motion_runs import Bench, Pretraining, Size, classification_loss, clips_path, evaluate, pretrain, train
from torch.nn import functional as F

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.camera_everest import changes_beside_camera
from everest_hf.embeddings_everest import pixel_targets
from everest_hf.evaluation.threshold import find_threshold, score_tokens
from everest_hf.files import write_whole
from everest_hf.modeling_everest import EverestForPreTrainingOutput
from everest_hf.packing_everest import choose_of_batch
from everest_hf.selection_everest import patchify

LEAST, MOST = 0.05, 0.6
CALIBRATION_CLIPS = 960


# The selection of each kind of scores. What is true is put in the place of those of "motion".
SELECTIONS = {"plain": "motion", "compensated": "compensated", "true camera": "motion", "true sprites": "motion"}


@dataclass(frozen=True)
class BudgetPretraining:
    """A pre-training on varied clips. budget: "clip", or "batch" for `SharedPretraining`."""

    seed: int
    steps: int
    budget: str

    @property
    def name(self) -> str:
        return f"pretrain-varied-{self.budget}-{self.seed}"

    def do(self, bench: "TruthBench") -> dict:
        own = dataclasses.replace(bench, pretraining=PRETRAININGS[self.budget])
        run = Pretraining("everest", self.seed, self.steps)
        return pretrain(own, run, bench.size.pretraining_lr, partial(own.draw, "varied"), self.name)


@dataclass(frozen=True)
class Arm:
    """A fine-tuning.

    clips: a name of `specs`. also: other ratios at which it is evaluated. pretrained: the budget of a pre-training on
    varied clips that it follows; None: it follows the motion study's. labelled: how many training clips it has, if not all.
    """

    clips: str
    seed: int
    keep_ratio: float
    budget: str = "clip"
    scores: str = "plain"
    also: tuple[float, ...] = ()
    pretrained: str | None = None
    labelled: int | None = None

    @property
    def title(self) -> str:
        scores = "" if self.scores == "plain" else f", {self.scores}"
        start = "" if self.pretrained is None else f", pre-trained on such clips by {self.pretrained}"
        few = "" if self.labelled is None else f", {self.labelled} labelled clips"
        return f"{self.budget} {self.keep_ratio:g}{scores}{start}{few}"

    @property
    def name(self) -> str:
        return f"{self.clips}-{self.title}-{self.seed}".replace(" ", "-").replace(",", "")

    def start(self, size: Size) -> Pretraining | BudgetPretraining:
        """Return the pre-training that it follows."""
        if self.pretrained is None:
            return Pretraining("everest", self.seed, size.pretraining_steps)
        return BudgetPretraining(self.seed, size.pretraining_steps, self.pretrained)

    def do(self, bench: "TruthBench") -> dict:
        return finetune(bench, self)


def budget_fields(budget: str) -> dict:
    return {"token_budget": budget, "min_keep_ratio": LEAST, "max_keep_ratio": MOST}


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
    """A bench that also knows the truth about the clips that were read last. pretraining: the class that it pre-trains."""

    truths: dict = field(default_factory=dict)
    last: tuple = ()
    pretraining: type[EverestForPreTraining] = EverestForPreTraining

    def pretraining_model(self, targets: str) -> EverestForPreTraining:
        return self.pretraining(self.config(min_keep_ratio=LEAST, max_keep_ratio=MOST)).to(self.device)

    def batch(self, kind, split, ids, config):
        self.last = kind, split, ids
        return super().batch(kind, split, ids, config)

    def truth(self, what: str) -> torch.Tensor:
        kind, split, ids = self.last
        if (kind, split) not in self.truths:
            self.truths[kind, split] = dict(np.load(truth_path(self.work, kind, split)))
        return torch.from_numpy(self.truths[kind, split][what])[ids]


# ----------------------------------------------------------------------------------------------------- pre-training


class SharedPretraining(EverestForPreTraining):
    """A masked autoencoder of which the clips of a batch share the informative tokens, in training.

    Each clip sees the same part of its own. The package has none, because it does not pay.
    """

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: None = None) -> EverestForPreTrainingOutput:
        config, embeddings = self.config, self.everest.embeddings
        with torch.no_grad():
            scores = embeddings(pixel_values, keep_ratio=1.0, output_scores=True).scores
        total = len(scores) * config.num_informative_tokens
        ids, packing = choose_of_batch(scores, total, *config.token_bounds())
        clips = zip(pixel_values.split(1), packing.split(ids % config.num_tokens), strict=True)
        found = [self.predict(clip, own[torch.randperm(len(own))]) for clip, own in clips]
        predicted, targets = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return EverestForPreTrainingOutput(loss=F.mse_loss(predicted, targets), logits=predicted)

    def predict(self, clip: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a clip (1, T, C, H, W) is predicted to be, (1, M, P), and what it is, of its shuffled ids (n,)."""
        config = self.config
        share = config.num_visible_tokens / config.num_informative_tokens
        visible, hidden = ids.tensor_split((round(share * len(ids)),))
        masked = torch.ones(1, config.num_tokens, dtype=torch.bool).scatter(1, visible[None], False)
        encoded = self.everest(clip, bool_masked_pos=masked)
        predicted = self.decoder(encoded.last_hidden_state, encoded.kept_ids, hidden[None], config.grid_size)
        patches = patchify(clip, config.tubelet_size, config.patch_size)
        return predicted, pixel_targets(patches, hidden[None], config)


PRETRAININGS = {"clip": EverestForPreTraining, "batch": SharedPretraining}


# ------------------------------------------------------------------------------------------------------------- runs


def finetune(bench: TruthBench, arm: Arm) -> dict:
    """Fine-tune a model, and return by ratio its accuracy and mean tokens by condition."""
    torch.manual_seed(arm.seed)
    fields = {"token_selection": SELECTIONS[arm.scores], "keep_ratio": arm.keep_ratio, **budget_fields(arm.budget)}
    config, folder = bench.config(**fields), bench.work / arm.start(bench.size).name
    model = EverestForVideoClassification.from_pretrained(folder, config=config).to(bench.device)
    if arm.scores.startswith("true"):
        score_by_truth(model, arm.scores, bench)
    steps, lr = bench.size.finetuning_steps, bench.size.finetuning_lr
    draw = partial(bench.draw, arm.clips, config, num_clips=arm.labelled)
    train(bench, model, steps, lr, (0.9, 0.999), draw, classification_loss, lambda *point: None)
    return {f"{ratio:g}": evaluate_at(bench, model, arm, ratio) for ratio in (arm.keep_ratio, *arm.also)}


def score_by_truth(model: EverestForVideoClassification, what: str, bench: TruthBench) -> None:
    """Let a model choose by what is true of the clips that the bench has read last."""
    embeddings, config = model.everest.embeddings, model.config

    @torch.no_grad()
    def score(pixels: torch.Tensor, patches: torch.Tensor):
        slots = pixels.unflatten(1, (-1, config.tubelet_size))  # (B, t, tubelet, C, H, W)
        if what == "true camera":
            return None, embeddings.score_changes(changes_beside_camera(slots, bench.truth("true camera")))
        # Motion breaks the ties of sprites.
        return None, bench.truth("true sprites") + 1e-6 * embeddings.score_changes(slots.diff(dim=1))

    embeddings._embed_and_score = score


def evaluate_at(bench: TruthBench, model: EverestForVideoClassification, arm: Arm, ratio: float) -> dict:
    """Return the accuracy at a mean keep ratio, and how many tokens a clip keeps, by condition."""
    counts: list[int] = []

    def count(module, args, output) -> None:
        clips = len(args[0])
        own = [output.kept_ids.shape[1]] * clips if output.packing is None else output.packing.counts.tolist()
        counts.extend(own)

    model.config.keep_threshold, model.config.keep_ratio = None, ratio
    if arm.budget == "batch":
        model.config.keep_threshold = find_threshold(model.config, training_scores(bench, model.eval(), arm.clips))
    hook = model.everest.embeddings.register_forward_hook(count)
    top1 = evaluate(bench, model, arm.clips, "test")
    hook.remove()
    tokens: dict[str, list[int]] = {condition: [] for condition in CONDITIONS}
    for index, kept in enumerate(counts):
        tokens[condition_of(index)].append(kept)
    return {"top1": top1, "tokens": {condition: statistics.fmean(kept) for condition, kept in tokens.items()}}


@torch.inference_mode()
def training_scores(bench: TruthBench, model: EverestForVideoClassification, kind: str) -> torch.Tensor:
    """Return the scores (clips, N) of the first training clips."""
    parts = torch.arange(min(CALIBRATION_CLIPS, bench.size.counts["train"])).split(64)
    return torch.cat([score_tokens(model, bench.batch(kind, "train", ids, model.config)) for ids in parts])
