"""One run, described: a dataclass whose values come from defaults, a YAML file and the command line, in that order."""

import copy
import dataclasses
import inspect
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml

from ..configuration_everest import TASKS, EverestConfig, Task
from ..data.rand_augment import MAX_MAGNITUDE
from ..data.transforms import AUGMENTATIONS
from ..inference.loading import model_folder
from ..video import BACKENDS, MAX_PIXELS, TIME_LIMIT
from .names import hint
from .yaml_files import read_yaml

SINGLE_LABEL = "single_label_classification"
# In the place of batch_size, until the run has put a number there.
AUTO = "auto"
CLASS_WEIGHTS = ("none", "balanced")
MONITORS = ("none", "knn")
EVALUATIONS = ("views", "few_shot")
KEPT = ("last", "best")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
_ARGUMENTS = inspect.signature(EverestConfig.__init__).parameters.values()
CONFIG_FIELDS = ["problem_type", *[p.name for p in _ARGUMENTS if p.name != "self" and p.kind is not p.VAR_KEYWORD]]

# Fields that steer a run and may change when it goes on: the trained model is the same to rounding. Of batch_size and
# gradient_accumulation_steps a checkpoint holds the product with the number of processes to what it was.
STEERING = {
    "output_dir",
    "overwrite",
    "eval_only",
    "dry_run",
    "count_bad_as_wrong",
    "num_workers",
    "decode_timeout",
    "max_pixels",
    "url_schemes",
    "batch_size",
    "gradient_accumulation_steps",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "report_to",
    "push_to_hub",
    "compile",
    "gradient_checkpointing",
}


# The value of a field that is left out; the task then says what it is.
_LEFT_OUT: Any = ...


def _option(default, group: str, text: str, choices: tuple | None = None, word: str | None = None) -> Any:
    """A field of the recipe with its default and its help text; `word`: what it may be beside values of its type."""
    metadata = {"default": default, "group": group, "help": text, "choices": choices, "word": word}
    return field(default=_LEFT_OUT, metadata=metadata)


def default_of(option: dataclasses.Field) -> Any:
    """Return the default of a field of the recipe, where a task has no other in TASK_DEFAULTS."""
    return copy.deepcopy(option.metadata["default"])


@dataclass
class Recipe:
    """Everything about a run that is not in the model's configuration; `train` and `evaluate` take one.

    A field that is left out has the default of the task, as `train_accelerate.py --help` lists them, and so has a field
    of EverestConfig that `config` leaves out. The help has the meaning of each field too.

    Raises:
        ValueError: a value has the wrong type or range, or does not fit the others.
    """

    task: Task = _option("pretrain", "What to do", "pretrain, finetune, or probe (a head on a frozen encoder)", TASKS)
    output_dir: str = _option("runs/everest", "What to do", "folder for checkpoints, log, recipe and pictures")
    model: str | None = _option(None, "What to do", "checkpoint, run folder or Hub id to start from")
    config: dict = _option({}, "What to do", "fields of EverestConfig that differ, as KEY=VALUE ...")
    overwrite: bool = _option(False, "What to do", "start again where output_dir holds a run")
    eval_only: bool = _option(False, "What to do", "evaluate model, or the finished run of output_dir, on val")
    dry_run: bool = _option(False, "What to do", "show and check what would run; train and write nothing")

    train: str | None = _option(
        None, "Data", "list file, folder of class folders, parquet or .tar files, or data set on the Hub"
    )
    val: str | None = _option(None, "Data", "the same for held-out videos; classes must be those of train")
    data_root: str | None = _option(
        None, "Data", "folder that relative paths of lists start from (default: the list's)"
    )
    train_split: str | None = _option(None, "Data", "split of train, where it has several")
    val_split: str | None = _option(None, "Data", "split of val, where it has several")
    video_column: str | None = _option(None, "Data", "column of the videos, where it is not plain")
    label_column: str | None = _option(None, "Data", "column of the labels (default: label)")
    streaming: bool = _option(False, "Data", "read train as a stream, not kept on the disk")
    steps_per_epoch: int = _option(0, "Data", "steps of an epoch of a stream")
    num_classes: int = _option(0, "Data", "classes of a stream with integer labels")
    shuffle_buffer: int = _option(100, "Data", "videos of a stream to draw the next one from")
    frame_sampling: str = _option(
        "stride", "Data", "stride (every frame_step-th frame) or segment", ("stride", "segment")
    )
    frame_step: int = _option(4, "Data", "frames from one sampled frame to the next, for stride")
    num_workers: int = _option(2, "Data", "decoding processes for each training process")
    video_backend: str = _option("auto", "Data", "decoder; auto: the fastest that is right for each video", BACKENDS)
    decode_timeout: float = _option(TIME_LIMIT, "Data", "seconds after which a decoder counts as hung (0: never)")
    max_pixels: int = _option(MAX_PIXELS, "Data", "frames x height x width decoded of a video at a time (0: any)")
    url_schemes: str | None = _option(None, "Data", "of addresses that are fetched beside hf, as https,s3; never file")
    max_bad_fraction: float = _option(0.01, "Data", "share of unreadable training videos that stops the run")
    balanced_sampling: bool = _option(False, "Data", "draw each class equally often in an epoch")

    crop_scale: list = _option([1.0, 0.875, 0.75, 0.66], "Augmentation", "sides (pretrain) or area range (finetune)")
    crop_ratio: list = _option([0.75, 4 / 3], "Augmentation", "range of aspect ratios of random resized crops")
    flip: bool = _option(False, "Augmentation", "mirror clips at random; wrong where left and right differ in class")
    rand_augment: int = _option(0, "Augmentation", "magnitude of RandAugment (0: off)")
    augmentation: str = _option(
        "fast", "Augmentation", "fast (crop, then RandAugment) or release (its order, bicubic)", AUGMENTATIONS
    )
    num_sample: int = _option(1, "Augmentation", "clips cut from a video that is decoded once")
    sample_shift: int = _option(0, "Augmentation", "sampled frames from a clip of num_sample to the next")
    erasing: float = _option(0.0, "Augmentation", "probability of random erasing")
    label_smoothing: float = _option(0.0, "Augmentation", "share of the target spread over all classes")
    mixup: float = _option(0.0, "Augmentation", "alpha of mixup (0: off); with cutmix, one of them a batch")
    cutmix: float = _option(0.0, "Augmentation", "alpha of cutmix (0: off)")

    epochs: int = _option(800, "Optimisation", "passes over the training videos")
    warmup_epochs: float = _option(40, "Optimisation", "epochs of linear warm-up from 0")
    batch_size: int = _option(
        24, "Optimisation", "videos a process and step, each for num_sample clips; auto: all that fit", word=AUTO
    )
    gradient_accumulation_steps: int = _option(1, "Optimisation", "batches to a step of the optimizer")
    base_lr: float = _option(1e-3, "Optimisation", "peak learning rate for a total batch of 256, scaled linearly")
    min_lr: float = _option(1e-5, "Optimisation", "final learning rate for a total batch of 256, scaled linearly")
    betas: list = _option([0.9, 0.95], "Optimisation", "betas of AdamW")
    weight_decay: float = _option(0.05, "Optimisation", "weight decay, none on biases and norms")
    layer_decay: float = _option(1.0, "Optimisation", "factor on the learning rate from each layer to the one below")
    clip_grad: float = _option(0.0, "Optimisation", "largest norm of the gradient (0: no clipping)")
    class_weights: str = _option(
        "none",
        "Optimisation",
        "factors on the loss: none or balanced",
        CLASS_WEIGHTS,
    )
    ema: float = _option(0.0, "Optimisation", "decay of a moving average of the weights, the result (0: off)")

    eval_every: int = _option(1, "Evaluation", "epochs between evaluations on val, one view a video")
    segments: int = _option(5, "Evaluation", "clips a video in the final evaluation")
    crops: int = _option(3, "Evaluation", "crops a clip in the final evaluation")
    count_bad_as_wrong: bool = _option(False, "Evaluation", "count unreadable videos of val as wrong, do not stop")

    evaluation: str = _option("views", "Evaluation", "the last one: views, or few_shot (few labels)", EVALUATIONS)
    monitor: str = _option(
        "none", "Evaluation", "in pre-training: none, or knn (top-1 of neighbours on val)", MONITORS
    )
    monitor_every: int = _option(1, "Evaluation", "epochs between figures of the monitor")
    patience: int = _option(0, "Evaluation", "evaluations without a better figure that stop the run (0: off)")
    keep: str = _option("last", "Evaluation", "which checkpoint is the result: last, or best on val", KEPT)

    seed: int = _option(0, "Run", "seed of weights, order, crops and selection")
    log_every: int = _option(10, "Run", "steps between lines of the log")
    save_every: float = _option(10.0, "Run", "epochs between checkpoints; 0.1: ten an epoch")
    keep_checkpoints: int = _option(2, "Run", "newest checkpoints to keep, beside the best on val")
    report_to: str = _option("none", "Run", "tracker: none, tensorboard, trackio or wandb", TRACKERS)
    push_to_hub: str | None = _option(None, "Run", "repository on the Hub for checkpoints, as they come, and result")
    compile: bool = _option(False, "Run", "compile the model: slower start, faster steps")
    gradient_checkpointing: bool = _option(False, "Run", "recompute layers for the gradient: less memory, slower")

    def __post_init__(self):
        self._fill_in()
        for option in fields(self):
            _check_type(option, getattr(self, option.name))
            _require_finite(option.name, getattr(self, option.name))
        self.output_dir = os.path.expanduser(self.output_dir)  # which no shell has done in a file
        self.model = self.model and os.path.expanduser(self.model)
        check_names(self.config, CONFIG_FIELDS, "config")
        if self.batch_size == AUTO:
            _require(not self.eval_only, "batch_size", AUTO, "a number with eval_only")
        else:
            _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        for name in ("epochs", "gradient_accumulation_steps", "frame_step", "segments", "crops"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("monitor_every", "eval_every", "log_every", "keep_checkpoints", "shuffle_buffer", "num_sample"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_workers", "warmup_epochs", "min_lr", "weight_decay", "clip_grad"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("sample_shift", "patience", "rand_augment", "mixup", "cutmix", "decode_timeout", "max_pixels"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("erasing", "label_smoothing", "max_bad_fraction", "ema"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        _require(self.rand_augment <= MAX_MAGNITUDE, "rand_augment", self.rand_augment, f"at most {MAX_MAGNITUDE}")
        self._check_lists()
        for name in ("base_lr", "save_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0 and at most 1")
        _require(
            self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs, f"at most {self.epochs} epochs"
        )
        if self.num_sample == 1 or self.frame_sampling != "stride":
            right = "0 unless num_sample is 2 or more and frame_sampling stride"
            _require(self.sample_shift == 0, "sample_shift", self.sample_shift, right)
        self._check_stream()
        self._check_balance()
        _require(not (self.dry_run and self.eval_only), "dry_run", True, "left out with eval_only")
        needed = "val" if self.eval_only else "train"
        source = getattr(self, needed)
        _require(source is not None, needed, source, "a list file or a folder of class folders")
        self._check_evaluation()
        if self.count_bad_as_wrong:
            _require(self.has_labels, "count_bad_as_wrong", True, "false: in pre-training no video is wrong")
            _require(self.problem_type != "regression", "count_bad_as_wrong", True, "false: no number is wrong")
        if self.problem_type != SINGLE_LABEL:
            right = f"0 with problem_type={self.problem_type}"
            for name in ("label_smoothing", "mixup", "cutmix"):
                _require(getattr(self, name) == 0, name, getattr(self, name), right)

    def _fill_in(self) -> None:
        """Give the fields that were left out the defaults of the task."""
        if self.task is _LEFT_OUT:
            self.task = "pretrain"
        _require(self.task in TASKS, "task", self.task, f"one of {', '.join(TASKS)}")
        given = {} if self.config is _LEFT_OUT else self.config
        _require(isinstance(given, dict), "config", given, "fields of EverestConfig and their values")
        defaults = copy.deepcopy(TASK_DEFAULTS[self.task])
        self.config = {**defaults.pop("config", {}), **given}
        if self.problem_type != SINGLE_LABEL:
            defaults["label_smoothing"] = 0.0  # it spreads one label over all classes
        for option in fields(self):
            if getattr(self, option.name) is _LEFT_OUT:
                setattr(self, option.name, defaults.get(option.name, default_of(option)))

    @property
    def has_labels(self) -> bool:
        """Whether the task learns labels, in fine-tuning and probing."""
        return self.task != "pretrain"

    @property
    def needs_labels(self) -> bool:
        """Whether the videos must have labels, for the task or for its evaluation."""
        return self.has_labels or self.evaluation == "few_shot"

    @property
    def problem_type(self) -> str:
        """What fine-tuning learns: a class, several labels or a number for each video."""
        return self.config.get("problem_type") or SINGLE_LABEL

    def warnings(self) -> list[str]:
        """Say, a line each, what it means that a run that learns labels does without a model or held-out videos."""
        if not self.has_labels or self.eval_only:
            return []
        meanings = {
            "model": "the encoder starts from random weights, not from a pre-trained model",
            "val": "nothing is evaluated, so there is no accuracy and no best checkpoint",
        }
        return [f"no --{name}: {meaning}" for name, meaning in meanings.items() if getattr(self, name) is None]

    def _check_stream(self) -> None:
        if self.streaming:
            _require(self.steps_per_epoch >= 1, "steps_per_epoch", self.steps_per_epoch, "at least 1 with streaming")
        for name in ("steps_per_epoch", "num_classes"):
            right = "0 or more with streaming, left out otherwise"
            value = getattr(self, name)
            _require(value >= 0 if self.streaming else value == 0, name, value, right)

    def _check_evaluation(self) -> None:
        for name, off in (("patience", 0), ("keep", "last"), ("monitor", "none")):
            value = getattr(self, name)
            _require(value == off or self.val is not None, name, value, f"{off} without val")
        if self.monitor != "none":
            _require(not self.has_labels, "monitor", self.monitor, f"none with task={self.task}")
            kind = self.problem_type
            _require(kind == SINGLE_LABEL, "monitor", self.monitor, f"none with problem_type={kind}")
        if self.evaluation == "few_shot":
            self._check_few_shot()

    def _check_few_shot(self) -> None:
        """Check that there are labelled videos to draw from, which have not shaped the features by their labels."""
        for name in ("train", "val"):
            _require(getattr(self, name) is not None, name, None, "labelled videos with evaluation=few_shot")
        _require(not self.streaming, "evaluation", "few_shot", "views with streaming: a stream's videos are not drawn")
        kind = self.problem_type
        _require(kind == SINGLE_LABEL, "evaluation", "few_shot", f"views with problem_type={kind}")
        right = (
            f"views with task={self.task}, which learns all labels of train (add eval_only to measure a checkpoint)"
        )
        _require(self.eval_only or not self.has_labels, "evaluation", "few_shot", right)

    def _check_balance(self) -> None:
        """Check that there are classes to balance, and that their videos can be counted."""
        for name, off in (("class_weights", "none"), ("balanced_sampling", False)):
            value = getattr(self, name)
            if value == off:
                continue
            _require(self.has_labels, name, value, f"{off} in pre-training, which has no classes")
            kind = self.problem_type
            _require(kind == SINGLE_LABEL, name, value, f"{off} with problem_type={kind}")
            _require(not self.streaming, name, value, f"{off} with streaming: a stream's videos are not counted")
        if self.class_weights != "none":
            right = "none where config has class_weights"
            _require(self.config.get("class_weights") is None, "class_weights", self.class_weights, right)

    def _check_lists(self) -> None:
        scale, ratio, betas = self.crop_scale, self.crop_ratio, self.betas
        _require(bool(scale) and all(0 < x <= 1 for x in scale), "crop_scale", scale, "numbers above 0 and at most 1")
        if self.has_labels:
            _require(len(scale) == 2 and scale[0] <= scale[1], "crop_scale", scale, "a range, two rising numbers")
        _require(len(ratio) == 2 and 0 < ratio[0] <= ratio[1], "crop_ratio", ratio, "two rising numbers above 0")
        _require(len(betas) == 2 and all(0 <= x < 1 for x in betas), "betas", betas, "two numbers from 0 to below 1")

    def settings(self) -> dict:
        """Return the values that differ from the defaults of the task."""
        kind = {name: value for name, value in self.config.items() if name == "problem_type"}
        default = load_recipe(None, {"task": self.task, "train": "any", "config": kind})
        names = (option.name for option in fields(self))
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}

    def save(self, path: Path) -> None:
        """Write all values as YAML, as a recipe that repeats the run (and does not overwrite it)."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "overwrite"}
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def differences(self, other: "Recipe") -> list[str]:
        """Name the fields whose values differ from another recipe's, those that only steer the run left out."""
        names = (option.name for option in fields(self) if option.name not in STEERING)
        return [name for name in names if getattr(self, name) != getattr(other, name)]


# Tasks start from these where the recipe says nothing. Fine-tuning: the values of the release (method: its recipes).
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "finetune": {
        "epochs": 100,
        "warmup_epochs": 5,
        "batch_size": 16,
        "min_lr": 1e-6,
        "betas": [0.9, 0.999],
        "layer_decay": 0.75,
        "crop_scale": [0.08, 1.0],
        "flip": True,
        "rand_augment": 7,
        "erasing": 0.25,
        "label_smoothing": 0.1,
        "config": {"drop_path_rate": 0.1},
    },
    # As in linear probing (MAE, arXiv 2111.06377, A.1): no weight decay, no augmentation but crops and mirror images;
    # with AdamW in place of LARS.
    "probe": {
        "epochs": 50,
        "warmup_epochs": 5,
        "batch_size": 32,
        "min_lr": 0.0,
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
        "crop_scale": [0.08, 1.0],
        "flip": True,
    },
}


def load_recipe(path: str | Path | None = None, options: dict | None = None) -> Recipe:
    """Build a recipe from the defaults, the YAML file `path` and `options`, each over the one before.

    The project's own recipes (recipes/ucf101/pretrain.yaml, …) come with the package; a file of that path goes first.

    Raises:
        ValueError: a key is unknown (the nearest valid name is given) or a value has the wrong type or range.
    """
    values = read_yaml(path) if path else {}
    options = options or {}
    names = [option.name for option in fields(Recipe)]
    check_names(values, names, str(path))
    check_names(options, names, "command line")
    where = path or "command line"
    task = options.get("task", values.get("task", "pretrain"))
    if task not in TASKS:
        raise ValueError(f"{where}: task is {task!r}; it must be one of {', '.join(TASKS)}")
    try:
        configs = [layer.get("config") or {} for layer in (values, options)]
        for config in configs:
            _require(isinstance(config, dict), "config", config, "fields of EverestConfig and their values")
        merged = {**values, **options, "config": {name: value for layer in configs for name, value in layer.items()}}
        if isinstance(merged.get("model"), str):
            merged["model"] = str(model_folder(merged["model"]))
        return Recipe(**merged)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_names(values: Iterable, names: Sequence[str], where: str) -> None:
    """Raise a ValueError if a name is not among `names`, which says what it may have been meant as."""
    for name in values:
        if name not in names:
            meanings = {option.name: option.metadata["help"] for option in fields(Recipe)}
            raise ValueError(f"{where}: unknown key {name!r}; {hint(str(name), names, meanings, CONFIG_FIELDS)}")


def _check_type(option: dataclasses.Field, value) -> None:
    """Check a value against the field's annotation; whole numbers pass as floats."""
    allowed: Any = str if get_origin(option.type) is Literal else option.type
    if allowed is float and isinstance(value, int) and not isinstance(value, bool):
        return
    word = option.metadata["word"]
    if word is not None and value == word:
        return
    sound = isinstance(value, allowed) and not (allowed is int and isinstance(value, bool))
    right = f"of the type {getattr(allowed, '__name__', allowed)}" + (f", or {word}" if word else "")
    _require(sound, option.name, value, right)
    choices = option.metadata["choices"]
    _require(choices is None or value in choices, option.name, value, f"one of {choices}")


def _require_finite(name: str, value) -> None:
    """Check that the numbers of a value are finite, and that a list is one of numbers."""
    for number in value if isinstance(value, list) else [value] if isinstance(value, float) else []:
        sound = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        _require(sound, name, value, "of finite numbers" if isinstance(value, list) else "a finite number")


def _require(sound: bool, name: str, value, right: str) -> None:
    if not sound:
        raise ValueError(f"{name} is {value!r}; it must be {right}")
