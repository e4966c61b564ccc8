"""Does it pay to drop redundant tokens? Learning curves on clips that differ by motion alone (motion_clips.py).

    python benchmarks/motion_study.py --plot docs/motion-study.png
    python benchmarks/motion_study.py --size gpu --device cuda

Three questions, each over --seeds seeds, which draw weights and batches:

initialisation  fine-tuning at keep ratio 0.6 after EVEREST's pre-training, VideoMAE's (tube mask over 0.9 of the
                tokens, all of those predicted), one on tokens chosen at random, and after none.
tokens          fine-tuning and inference at keep ratios 1, 0.6, 0.3 and 0.1, with the tokens chosen by motion, at random
                or as tubes. Also inference alone at these ratios of the models trained at 1 and 0.6.
frames          clips three times as long, of which the action takes a third: evenly spaced frames, beside frame
                selection among 1.5 and 3 times as many candidates.

Arms are compared after equal numbers of steps and, where the name says "equal time", after as many steps as take the
time of EVEREST's pre-training and of fine-tuning at keep ratio 0.6 by motion. How long a step takes is measured before,
for all kinds in turn; time for reading clips and for evaluation does not count.

--size cpu is a tiny model on 8 frames of 64 x 64 pixels, for two cores and half an hour; gpu is ViT-S on 16 frames of
112 x 112, which nobody has run yet; smoke only shows that everything runs. On a CPU each run has a core of its own. What
has finished lies in --work, and the same command goes on from there.
"""

import argparse
import dataclasses
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import measure
import torch
import transformers
from matplotlib import pyplot as plt
from motion_clips import CLASSES, CONDITIONS, SPLITS, MotionClips, condition_of, label_of, open_clips, write_clips
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification
from everest_hf.files import write_whole
from everest_hf.optim import cosine_schedule, parameter_groups
from everest_hf.transforms import normalize

RATIOS, SELECTIONS = (1.0, 0.6, 0.3, 0.1), ("motion", "random", "tube")
TARGETS = {"everest": "EVEREST", "tube": "VideoMAE's tubes", "random": "random tokens", None: "none"}
OVERSAMPLING = (1.0, 1.5, 3.0)
TRAINED_FOR_SWEEP = (1.0, 0.6)
# Of training, as in the recipes; the learning rate rises in this share of the steps, then falls to this share.
WEIGHT_DECAY, WARMUP, FINAL_FACTOR = 0.05, 0.1, 0.02
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


TINY = {
    "image_size": 64,
    "num_frames": 8,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "decoder_hidden_size": 48,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 192,
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
    "cpu": Size(MotionClips(), {"train": 3200, "val": 320, "test": 960}, TINY, 32, 800, 500, 2e-3, 2.5e-3),
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
    "smoke": Size(MotionClips(), {"train": 64, "val": 64, "test": 64}, TINY, 8, 5, 5, 2e-3, 2.5e-3),
}


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Pretraining:
    """A run of pre-training; targets: a key of TARGETS, what it sees and predicts."""

    targets: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"pretrain-{self.targets}-{self.steps}-{self.seed}"


@dataclass(frozen=True)
class Finetuning:
    """A run of fine-tuning and its evaluation; sweep: evaluate it at all other ratios and selections as well."""

    pretraining: Pretraining | None
    seed: int
    steps: int
    selection: str = "motion"
    keep_ratio: float = 0.6
    clips: str = "clips"
    oversampling: float = 1.0
    sweep: bool = False

    @property
    def name(self) -> str:
        start = self.pretraining.name if self.pretraining else "scratch"
        what = f"{self.clips}-{self.oversampling:g}-{self.selection}-{self.keep_ratio:g}-{self.steps}-{self.seed}"
        return f"finetune-{what}-after-{start}"


Seconds = dict[str, float]


def pretraining_kind(targets: str) -> str:
    return f"pre-training, {TARGETS[targets]}"


def finetuning_kind(selection: str, keep_ratio: float, oversampling: float) -> str:
    frames = f", {oversampling:g} times the frames" if oversampling > 1 else ""
    return f"fine-tuning, {selection} {keep_ratio:g}{frames}"


def plan(size: Size, seconds: Seconds, seed: int) -> dict[tuple[str, str], Finetuning]:
    """Return the runs of a seed by question and arm. The same run may answer several questions."""
    first = {targets: Pretraining(targets, seed, size.pretraining_steps) for targets in TARGETS if targets}
    after = partial(Finetuning, first["everest"], seed)
    arms = _initialisations(size, seconds, first)
    for selection in SELECTIONS:
        for ratio in RATIOS if selection == "motion" else RATIOS[1:]:
            sweep = selection == "motion" and ratio in TRAINED_FOR_SWEEP
            run = after(size.finetuning_steps, selection, ratio, sweep=sweep)
            arms["tokens", f"{selection} {ratio:g}"] = run
            if ratio != 0.6 and selection != "tube":
                steps = _steps_of_equal_time(size, seconds, finetuning_kind(selection, ratio, 1.0))
                equal = dataclasses.replace(run, steps=steps, sweep=False)
                arms["tokens", f"{selection} {ratio:g}, equal time"] = equal
    for factor in OVERSAMPLING:
        name = f"selected among {factor:g} times as many" if factor > 1 else "evenly spaced"
        arms["frames", name] = after(size.finetuning_steps, clips="long_clips", oversampling=factor)
    return arms


def _initialisations(size: Size, seconds: Seconds, first: dict[str, Pretraining]) -> dict:
    seed, steps, arms = first["everest"].seed, size.finetuning_steps, {}
    for targets, name in TARGETS.items():
        sweep = targets == "everest"  # the same run as `motion 0.6` of the question of tokens
        arms["initialisation", name] = Finetuning(first.get(targets), seed, steps, sweep=sweep)
    before = size.pretraining_steps * seconds[pretraining_kind("everest")]
    fewer = Pretraining("tube", seed, round(before / seconds[pretraining_kind("tube")]))
    arms["initialisation", f"{TARGETS['tube']}, equal time"] = Finetuning(fewer, seed, steps)
    more = steps + round(before / seconds[finetuning_kind("motion", 0.6, 1.0)])
    arms["initialisation", f"{TARGETS[None]}, equal time"] = Finetuning(None, seed, more)
    return arms


def _steps_of_equal_time(size: Size, seconds: Seconds, kind: str) -> int:
    return round(size.finetuning_steps * seconds[finetuning_kind("motion", 0.6, 1.0)] / seconds[kind])


# --------------------------------------------------------------------------------------------------------- training


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
        pixels = clips[ids][:, frames].to(self.device)
        return normalize(pixels, config.image_mean, config.image_std)

    def config(self, **fields) -> EverestConfig:
        names = dict(enumerate(CLASSES))
        return EverestConfig(**self.size.config, id2label=names, label2id={v: k for k, v in names.items()}, **fields)

    def pretraining_model(self, targets: str) -> EverestForPreTraining:
        # VideoMAE's sees and predicts what a mask says, and that is every token.
        fields = {"everest": {}, "random": {"token_selection": "random"}, "tube": {"pretraining_keep_ratio": 1.0}}
        return EverestForPreTraining(self.config(**fields[targets])).to(self.device)

    def pretraining_loss(self, model: EverestForPreTraining, targets: str, pixels: torch.Tensor) -> torch.Tensor:
        mask = tube_mask(len(pixels), model.config).to(self.device) if targets == "tube" else None
        return model(pixels, bool_masked_pos=mask).loss

    def optimizer(self, model, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        groups = parameter_groups(model, lr=lr, weight_decay=WEIGHT_DECAY, num_layers=model.config.num_hidden_layers)
        return torch.optim.AdamW(groups, betas=betas)

    def precision(self):
        """bfloat16 on a GPU, float32 on a CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def tube_mask(batch: int, config: EverestConfig) -> torch.Tensor:
    """Draw VideoMAE's mask (B, N), True = masked: the same places in every slot."""
    slots, places = config.grid_size[0], config.num_tokens_per_slot
    num_visible = max(1, round((1 - config.mask_ratio) * places))
    masked = torch.rand(batch, places).argsort(dim=1) >= num_visible
    return masked.repeat(1, slots)


def classification_loss(model, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(pixels, labels=labels).loss


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([label_of(i) for i in ids.tolist()])


def train(
    bench: Bench, model, steps: int, lr: float, betas: tuple[float, float], kind: str, loss_of, on_point
) -> None:
    """Train a model; on_point(step) is called NUM_CURVE_POINTS times, last at the end."""
    optimizer = bench.optimizer(model, lr, betas)
    schedule = partial(
        cosine_schedule, total_steps=steps, warmup_steps=round(WARMUP * steps), final_factor=FINAL_FACTOR
    )
    scheduler, count = LambdaLR(optimizer, schedule), bench.size.counts["train"]
    for step in range(1, steps + 1):
        ids = torch.randint(count, (bench.size.batch,))
        pixels = bench.batch(kind, "train", ids, model.config)
        with bench.precision():
            loss = loss_of(model.train(), pixels, labels_of(ids).to(bench.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step * NUM_CURVE_POINTS // steps > (step - 1) * NUM_CURVE_POINTS // steps:
            on_point(step, loss.item())


def pretrain(bench: Bench, run: Pretraining) -> dict:
    """Pre-train and save a model."""
    torch.manual_seed(run.seed)
    model, curve = bench.pretraining_model(run.targets), []

    def loss_of(model, pixels, labels):
        return bench.pretraining_loss(model, run.targets, pixels)

    size, on_point = bench.size, lambda *point: curve.append(point)
    train(bench, model, run.steps, size.pretraining_lr, (0.9, 0.95), "clips", loss_of, on_point)
    model.save_pretrained(bench.work / run.name)
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

    train(bench, model, run.steps, bench.size.finetuning_lr, (0.9, 0.999), run.clips, classification_loss, on_point)
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
    steps = {}
    for targets in filter(None, TARGETS):
        model = bench.pretraining_model(targets)
        loss_of = partial(bench.pretraining_loss, model, targets)
        steps[pretraining_kind(targets)] = _step(bench, model, "clips", lambda x, y, loss_of=loss_of: loss_of(x))
    kinds = [(s, r, 1.0) for s in SELECTIONS for r in RATIOS if s == "motion" or r < 1]
    for selection, ratio, factor in [*kinds, *(("motion", 0.6, f) for f in OVERSAMPLING if f > 1)]:
        fields = {"token_selection": selection, "keep_ratio": ratio, "frame_oversampling": factor}
        model = EverestForVideoClassification(bench.config(**fields)).to(bench.device)
        kind = "clips" if factor == 1 else "long_clips"
        loss_of = partial(classification_loss, model)
        steps[finetuning_kind(selection, ratio, factor)] = _step(bench, model, kind, loss_of)
    seconds = measure.interleave(steps, ROUNDS_OF_TIMING, bench.device)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _step(bench: Bench, model, kind: str, loss_of):
    optimizer, ids = bench.optimizer(model.train(), 1e-4, (0.9, 0.999)), torch.arange(bench.size.batch)
    pixels, labels = bench.batch(kind, "train", ids, model.config), labels_of(ids).to(bench.device)

    def step() -> None:
        with bench.precision():
            loss = loss_of(pixels, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ------------------------------------------------------------------------------------------------------- processes

_bench: Bench


def start_process(size: Size, work: Path, device: torch.device, threads: int) -> None:
    """Prepare a process for the runs that it will be given."""
    global _bench
    torch.set_num_threads(threads)
    # Each run would name the head that it starts anew.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _bench = Bench(size, work, device)


def do_draw(kind: str, split: str) -> None:
    path = clips_path(_bench.work, kind, split)
    if not path.exists():
        spec, count = getattr(_bench.size, kind), _bench.size.counts[split]
        write_whole(path, lambda aside: write_clips(spec, split, count, aside))


def clips_path(work: Path, kind: str, split: str) -> Path:
    return work / f"{kind}-{split}.npy"


def do_time() -> Seconds:
    return time_steps(_bench)


def do_run(run: Pretraining | Finetuning) -> dict:
    """Do a run, or read what it left."""
    path = _bench.work / f"{run.name}.json"
    if not path.exists():
        record = (pretrain if isinstance(run, Pretraining) else finetune)(_bench, run)
        write_whole(path, lambda aside: aside.write_text(json.dumps(record)))
    return json.loads(path.read_text())


def do_all(executor, function, jobs: list[tuple], description: str) -> list:
    """Call function(*job) for each job in the processes, and return the results in order."""
    futures = [executor.submit(function, *job) for job in jobs]
    for future in tqdm(as_completed(futures), total=len(futures), desc=description, unit="run"):
        future.result()
    return [future.result() for future in futures]


def study(size: Size, seeds: int, executor, work: Path) -> dict:
    """Draw the clips, time the steps, do all runs, and return what came out."""
    do_all(executor, do_draw, [(k, s) for k in ("clips", "long_clips") for s in SPLITS], "drawing")
    times = work / "seconds.json"
    if not times.exists():
        seconds = executor.submit(do_time).result()
        write_whole(times, lambda aside: aside.write_text(json.dumps(seconds, indent=2)))
    seconds = json.loads(times.read_text())
    plans = [plan(size, seconds, seed) for seed in range(seeds)]
    runs = dict.fromkeys(run for arms in plans for run in arms.values())
    firsts = list(dict.fromkeys(run.pretraining for run in runs if run.pretraining))
    losses = do_all(executor, do_run, [(run,) for run in firsts], "pre-training")
    longest_first = sorted(runs, key=lambda run: -run.steps)  # so that no process ends long after the others
    records = do_all(executor, do_run, [(run,) for run in longest_first], "fine-tuning")
    found = dict(zip(longest_first, records, strict=True))
    arms = [
        {
            "question": question,
            "arm": arm,
            **_summary([(p[question, arm], found[p[question, arm]]) for p in plans], seconds),
        }
        for question, arm in plans[0]
    ]
    first = [{"name": run.name, **record} for run, record in zip(firsts, losses, strict=True)]
    return {"seconds_a_step": seconds, "arms": arms, "pretraining": first}


def _summary(pairs: list[tuple[Finetuning, dict]], seconds: Seconds) -> dict:
    """Return the figures of an arm over the seeds: time, accuracies with mean and deviation, curves."""
    run, first = pairs[0][0], pairs[0][0].pretraining
    before = first.steps * seconds[pretraining_kind(first.targets)] if first else 0.0
    own = run.steps * seconds[finetuning_kind(run.selection, run.keep_ratio, run.oversampling)]
    summary = {
        "pretraining_steps": first.steps if first else 0,
        "steps": run.steps,
        "pretraining_seconds": before,
        "seconds": own,
        **_accuracies([record["test"] for _, record in pairs]),
        "curves": [record["curve"] for _, record in pairs],
    }
    if run.sweep:
        names = pairs[0][1]["inference"]
        summary["inference"] = {
            name: _accuracies([record["inference"][name] for _, record in pairs]) for name in names
        }
    return summary


def _accuracies(found: list[dict[str, float]]) -> dict:
    """Return mean and standard deviation over the seeds of top-1 in percent, over all clips and by condition."""
    values = {"all": [100 * statistics.fmean(each.values()) for each in found]}
    values |= {condition: [100 * each[condition] for each in found] for condition in CONDITIONS}
    return {
        "top1": {name: {"mean": statistics.fmean(v), "std": _deviation(v), "seeds": v} for name, v in values.items()}
    }


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# ----------------------------------------------------------------------------------------------------------- report


def tables(found: dict) -> str:
    """Return the Markdown tables of a study."""
    parts = []
    for question in dict.fromkeys(arm["question"] for arm in found["arms"]):
        header = [question, "steps before + of it", "seconds before + of it", "top-1 %", *CONDITIONS]
        rows = [_row(arm) for arm in found["arms"] if arm["question"] == question]
        parts.append(measure.markdown_table(header, rows))
    swept = {
        arm["arm"]: arm["inference"] for arm in found["arms"] if arm["question"] == "tokens" and "inference" in arm
    }
    names = list(next(iter(swept.values())))
    rows = [[trained, *(_percent(at[name]) for name in names)] for trained, at in swept.items()]
    parts.append(measure.markdown_table(["fine-tuned at, and inference at", *names], rows))
    return "\n\n".join(parts)


def _row(arm: dict) -> list[str]:
    steps = f"{arm['pretraining_steps']} + {arm['steps']}"
    seconds = f"{arm['pretraining_seconds']:.0f} + {arm['seconds']:.0f}"
    return [arm["arm"], steps, seconds, _percent(arm), *(f"{arm['top1'][name]['mean']:.1f}" for name in CONDITIONS)]


def _percent(figures: dict) -> str:
    return f"{figures['top1']['all']['mean']:.1f} ± {figures['top1']['all']['std']:.1f}"


def draw(found: dict, path: Path) -> None:
    """Draw the three questions, and the tokens by condition."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 9.5), layout="constrained")
    arms = {(arm["question"], arm["arm"]): arm for arm in found["arms"]}
    _draw_tokens(axes[0, 0], arms)
    _draw_curves(axes[0, 1], arms)
    _draw_conditions(axes[1, 0], arms)
    _draw_frames(axes[1, 1], arms)
    for axis in axes.flat:
        axis.set_ylim(0, 100)
        axis.set_ylabel("top-1 %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    write_whole(path, lambda aside: figure.savefig(aside, dpi=110))
    plt.close(figure)


def _draw_tokens(axis, arms: dict) -> None:
    for suffix, line in (("", "-"), (", equal time", ":")):
        for color, selection in enumerate(SELECTIONS):
            names = [(r, "motion" if r == 1 else selection) for r in RATIOS]
            names = [(r, f"{s} {r:g}", suffix if r != 0.6 else "") for r, s in names]
            if suffix and selection == "tube":
                continue
            points = [(ratio, arms["tokens", name + end]["top1"]["all"]) for ratio, name, end in names]
            _errorbar(axis, points, line, f"C{color}", selection + suffix)
    axis.set_title("tokens kept in fine-tuning and inference")
    axis.set_xlabel("keep ratio")


def _errorbar(axis, points: list[tuple[float, dict]], line: str, color: str, label: str) -> None:
    x, y = [at for at, _ in points], [value["mean"] for _, value in points]
    axis.errorbar(
        x, y, [v["std"] for _, v in points], fmt=f"o{line}", color=color, label=label, markersize=4, capsize=3
    )


def _draw_curves(axis, arms: dict) -> None:
    for color, name in enumerate(TARGETS.values()):
        curves = arms["initialisation", name]["curves"]
        steps = [point[0] for point in curves[0]]
        means = [100 * statistics.fmean(curve[i][2] for curve in curves) for i in range(len(steps))]
        deviations = [100 * _deviation([curve[i][2] for curve in curves]) for i in range(len(steps))]
        axis.errorbar(steps, means, deviations, fmt="o-", color=f"C{color}", label=name, markersize=4, capsize=3)
    axis.set_title("after which pre-training (validation, keep ratio 0.6)")
    axis.set_xlabel("steps of fine-tuning")


def _draw_conditions(axis, arms: dict) -> None:
    names = [*(f"motion {r:g}" for r in RATIOS), "random 0.3", "tube 0.3"]
    _draw_bars(axis, {name: arms["tokens", name] for name in names})
    axis.set_title("by what else moves")


def _draw_frames(axis, arms: dict) -> None:
    _draw_bars(axis, {arm: figures for (question, arm), figures in arms.items() if question == "frames"})
    axis.set_title("frames, where the action takes a third of the time")


def _draw_bars(axis, named: dict[str, dict]) -> None:
    width = 0.8 / len(named)
    for i, (name, arm) in enumerate(named.items()):
        places = [at + (i - (len(named) - 1) / 2) * width for at in range(len(CONDITIONS))]
        values = [arm["top1"][condition] for condition in CONDITIONS]
        axis.bar(places, [v["mean"] for v in values], width, yerr=[v["std"] for v in values], label=name, capsize=2)
    axis.set_xticks(range(len(CONDITIONS)), [name.replace(", ", ",\n") for name in CONDITIONS], fontsize=8)


# ------------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=measure.positive_int, default=3)
    parser.add_argument("--device", type=measure.device_of, default="cpu")
    parser.add_argument(
        "--work", type=Path, help="folder for clips, models and finished runs [runs/motion-study-SIZE]"
    )
    parser.add_argument("--out", type=Path, help="[benchmarks/results/motion-study-SIZE.json]")
    parser.add_argument("--plot", type=Path, help="[beside --out]")
    args = parser.parse_args()
    args.work = args.work or Path("runs") / f"motion-study-{args.size}"
    args.out = args.out or measure.RESULTS / f"motion-study-{args.size}.json"
    args.plot = args.plot or args.out.with_suffix(".png")
    return args


def claim(work: Path, size: Size) -> None:
    """Take a folder for a study of this size, or refuse one that holds another."""
    path, settings = work / "study.json", json.dumps(dataclasses.asdict(size), indent=1)
    if path.exists() and path.read_text() != settings:
        raise SystemExit(f"error: {work} holds a study of other settings; remove it or choose another --work")
    write_whole(path, lambda aside: aside.write_text(settings))


def main() -> None:
    args = parse_arguments()
    size, cores = SIZES[args.size], os.cpu_count() or 1
    claim(args.work, size)
    processes, threads = (1, cores) if args.device.type == "cuda" else (cores, 1)
    facts = measure.facts_of_run(args.device)
    start = partial(start_process, size, args.work, args.device, threads)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=start) as executor:
        found = study(size, args.seeds, executor, args.work)
    settings = {"settings": measure.settings_of(args), "size": dataclasses.asdict(size)}
    measure.write_json(args.out, facts | settings | found)
    text = tables(found)
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(found, args.plot)
    print(f"{text}\n\nresults: {args.out}, {args.out.with_suffix('.md')}, {args.plot}")


if __name__ == "__main__":
    main()
