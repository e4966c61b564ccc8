"""Configuration of EVEREST: every number that changes a logit or a loss, checked where it is set."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

# What a model is trained for: reconstruction, labels, or labels with the encoder frozen.
Task = Literal["pretrain", "finetune", "probe"]
TASKS: tuple[Task, ...] = get_args(Task)
Selection = Literal["motion", "compensated", "random", "tube"]
Budget = Literal["clip", "batch"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
TOKEN_SELECTIONS: tuple[Selection, ...] = get_args(Selection)
TOKEN_BUDGETS: tuple[Budget, ...] = get_args(Budget)
# What `keep_threshold` holds: the threshold, and the fields for which it was found.
THRESHOLD_VALUES = ("medians", "median_score")
THRESHOLD_FIELDS = ("keep_ratio", "min_keep_ratio", "max_keep_ratio", "token_selection", "frame_oversampling")
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)
# The selections that do not look at the clip.
BLIND_SELECTIONS: tuple[Selection, ...] = ("random", "tube")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# 0.29 * 100 is 28.999999999999996 in floating point. A share of a count is therefore rounded down only after
# this much has been added: far above the rounding error, far below one token.
_FLOAT_DUST = 1e-6


def share_of(ratio: float, count: int) -> int:
    """Return floor(ratio * count) with floating-point dust removed: 0.3 of 1568 is 470, 0.29 of 100 is 29."""
    return int(ratio * count + _FLOAT_DUST)


class EverestConfig(PretrainedConfig):
    """Configuration of the EVEREST models. The defaults are ViT-B/16 on 16 frames of 224 x 224 pixels.

    Sizes of the input
        image_size: height and width of a frame in pixels, one int for a square or a pair (height, width).
        patch_size: side of a token in pixels. tubelet_size: frames of a token.
        num_channels, num_frames: channels of a frame; frames that the encoder works on.
    Encoder
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps, qkv_bias
        (biases on query and value; key never has one), hidden_dropout_prob, attention_probs_dropout_prob,
        drop_path_rate (rises linearly from 0 in the first layer to this in the last), initializer_range.
        head_layer_norm_eps: epsilon of the norms in front of the heads (classification and decoder).
    Decoder of pre-training
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size.
        norm_pix_loss: normalise each target tubelet per channel.
        image_mean, image_std: one value a channel; how `pixel_values` were normalised, undone in the targets.
    Selection of tokens (EVEREST, arXiv 2211.10636)
        token_selection: "motion" keeps the tokens that change most between neighbouring slots. "compensated" takes off
        what the camera's motion explains, found by block matching, before it compares slots. "random" and "tube" (the
        same places in every slot) are baselines.
        keep_ratio: share of the tokens that the encoder sees in fine-tuning and inference; 1 is the dense ViT.
        pretraining_keep_ratio: share of the tokens that are informative in pre-training, seen or to predict.
        mask_ratio: share of all tokens that the encoder does not see in pre-training.
        token_budget: "clip" keeps the same share of every clip. "batch" keeps, in training, the tokens of a batch that
        change most, so that a clip in which much happens has more of them; in evaluation those above a threshold.
        Pre-training keeps the same share of every clip.
        min_keep_ratio, max_keep_ratio: with "batch", the least and the largest share of a clip's tokens.
        keep_threshold: with "batch", what evaluation goes by, as the end of a training and `everest-hf tune-keep-ratio
        --budget batch` find it: a dict of "medians", the threshold as a multiple of the median score, "median_score", that
        median (scores of 0 are left out), and the fields for which it was found, such as "keep_ratio".
        frame_oversampling: the model takes this many times num_frames candidate frames and works on the
        num_frames of them that hold most informative tokens; 1 switches frame selection off.
    Classification
        use_mean_pooling: mean over the tokens, then a LayerNorm; otherwise a LayerNorm over each token, then the
        first token. attentive_pooling: in place of the mean or the first token, what a learned query takes from all
        tokens by attention, then a LayerNorm.
        classifier_dropout: dropout before the head. init_scale: factor on the head's initial weights.
        class_weights: factors on the loss, one a class, of "single_label_classification"; None for 1. They change no
        logit.
        num_labels, id2label, label2id, problem_type: as in every Transformers configuration.

    Raises:
        ValueError: a value or a combination is impossible; the message names field, value and what would be right.

    >>> config = EverestConfig()
    >>> config.num_tokens, config.num_kept_tokens(), config.num_visible_tokens, config.num_target_tokens
    (1568, 940, 156, 314)
    """

    model_type = "everest"
    # These say what the model looked at; the Trainer need not gather them as predictions.
    keys_to_ignore_at_inference = [
        "kept_ids",
        "visible_ids",
        "target_ids",
        "slots",
        "scores",
        "hidden_states",
        "attentions",
        "packing",
    ]

    if TYPE_CHECKING:  # Transformers knows configurations without labels; these always have them
        id2label: dict[int, str]
        label2id: dict[str, int]
        num_labels: int

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        num_frames: int = 16,
        tubelet_size: int = 2,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        head_layer_norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        use_mean_pooling: bool = True,
        attentive_pooling: bool = False,
        decoder_hidden_size: int = 384,
        decoder_num_hidden_layers: int = 4,
        decoder_num_attention_heads: int = 6,
        decoder_intermediate_size: int = 1536,
        norm_pix_loss: bool = True,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        keep_ratio: float = 0.6,
        pretraining_keep_ratio: float = 0.3,
        mask_ratio: float = 0.9,
        token_selection: Selection = "motion",
        frame_oversampling: float = 1.0,
        token_budget: Budget = "clip",
        min_keep_ratio: float = 0.05,
        max_keep_ratio: float = 1.0,
        keep_threshold: dict[str, Any] | None = None,
        init_scale: float = 0.001,
        classifier_dropout: float = 0.0,
        class_weights: Sequence[float] | None = None,
        **kwargs,
    ):
        self.image_size = list(image_size) if isinstance(image_size, (list, tuple)) else image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.num_frames = num_frames
        self.tubelet_size = tubelet_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.head_layer_norm_eps = head_layer_norm_eps
        self.qkv_bias = qkv_bias
        self.use_mean_pooling = use_mean_pooling
        self.attentive_pooling = attentive_pooling
        self.decoder_hidden_size = decoder_hidden_size
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.decoder_num_attention_heads = decoder_num_attention_heads
        self.decoder_intermediate_size = decoder_intermediate_size
        self.norm_pix_loss = norm_pix_loss
        self.image_mean = list(image_mean) if isinstance(image_mean, (list, tuple)) else image_mean
        self.image_std = list(image_std) if isinstance(image_std, (list, tuple)) else image_std
        self.keep_ratio = keep_ratio
        self.pretraining_keep_ratio = pretraining_keep_ratio
        self.mask_ratio = mask_ratio
        self.token_selection = token_selection
        self.frame_oversampling = frame_oversampling
        self.token_budget = token_budget
        self.min_keep_ratio = min_keep_ratio
        self.max_keep_ratio = max_keep_ratio
        self.keep_threshold = keep_threshold
        self.init_scale = init_scale
        self.classifier_dropout = classifier_dropout
        self.class_weights = list(class_weights) if isinstance(class_weights, (list, tuple)) else class_weights
        # Checked here as well because some versions of Transformers raise a TypeError of many lines for it.
        _check_choice("problem_type", kwargs.get("problem_type"), (None, *PROBLEM_TYPES))
        super().__init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build from a dict; overrides, which the library sets after construction, are checked as well.

        Raises:
            ValueError: as the class, or the dict describes another type of model, whose weights would not fit.
        """
        found = config_dict.get("model_type") or cls.model_type
        if found not in (cls.model_type, EverestConfig.model_type):
            hint = "; from_videomae loads it, and everest-hf convert makes a checkpoint" if found == "videomae" else ""
            raise ValueError(f"model_type is {found!r}; {cls.__name__} is for {cls.model_type!r}{hint}")
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).check()
        return result

    # ------------------------------------------------------------------ derived counts

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        height, width = _pair(self.image_size)
        return height, width

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Slots, rows and columns of the token grid."""
        height, width = self.frame_size
        return self.num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    @property
    def num_slots(self) -> int:
        """Number of tubelet slots t."""
        return self.grid_size[0]

    @property
    def num_tokens_per_slot(self) -> int:
        """Number of places S in a slot."""
        return self.grid_size[1] * self.grid_size[2]

    @property
    def num_tokens(self) -> int:
        """Number of tokens N = t * S."""
        return self.num_slots * self.num_tokens_per_slot

    @property
    def tubelet_dim(self) -> int:
        """Number of values in one token's pixels: channels * tubelet * patch * patch."""
        return self.num_channels * self.tubelet_size * self.patch_size**2

    @property
    def num_input_frames(self) -> int:
        """Number of frames that the model takes: the candidates of frame selection, a multiple of the tubelet."""
        return share_of(self.frame_oversampling, self.num_frames) // self.tubelet_size * self.tubelet_size

    @property
    def selects_by_motion(self) -> bool:
        """Whether tokens are chosen by how much they change."""
        return self.token_selection not in BLIND_SELECTIONS

    @property
    def compensates_camera(self) -> bool:
        """Whether what the camera's motion explains is taken off before slots are compared."""
        return self.token_selection == "compensated"

    @property
    def selects_frames(self) -> bool:
        """Whether the model takes more frames than it works on."""
        return self.num_input_frames > self.num_frames

    @property
    def uses_motion(self) -> bool:
        """Whether tokens or frames are chosen by how much they change."""
        return self.selects_by_motion or self.selects_frames

    def num_kept_tokens(self, keep_ratio: float | None = None) -> int:
        """Number of tokens K that the encoder sees in fine-tuning and inference, at `keep_ratio` or the config's."""
        return self.count_tokens(self.keep_ratio if keep_ratio is None else keep_ratio)

    @property
    def num_informative_tokens(self) -> int:
        """Number of tokens that pre-training works on, seen or to predict."""
        return self.count_tokens(self.pretraining_keep_ratio)

    @property
    def num_visible_tokens(self) -> int:
        """Number of tokens that the encoder sees in pre-training."""
        return self.count_tokens(1 - self.mask_ratio)

    @property
    def num_target_tokens(self) -> int:
        """Number of tokens that pre-training predicts."""
        return self.num_informative_tokens - self.num_visible_tokens

    def count_tokens(self, ratio: float, grid_size: tuple[int, int, int] | None = None) -> int:
        """Return the number of tokens in a share of a token grid, the config's own where none is given.

        For "tube" it is the share of the places of a slot, times the slots.
        """
        slots, rows, columns = grid_size or self.grid_size
        if self.token_selection == "tube":
            return share_of(ratio, rows * columns) * slots
        return share_of(ratio, slots * rows * columns)

    def token_bounds(self, grid_size: tuple[int, int, int] | None = None) -> tuple[int, int]:
        """Return the least and the largest number of tokens of a clip of a grid, with token_budget "batch"."""
        least, most = (self.count_tokens(ratio, grid_size) for ratio in (self.min_keep_ratio, self.max_keep_ratio))
        return max(least, 1), max(most, 1)

    def score_threshold(self) -> float:
        """Return the score above which evaluation keeps a token, with token_budget "batch".

        Raises:
            ValueError: none was found yet.
        """
        found = self.keep_threshold
        if found is None:
            raise ValueError(
                "EverestConfig.keep_threshold is None; evaluation with token_budget 'batch' needs it, and "
                "everest-hf tune-keep-ratio --budget batch (or everest_hf.evaluation.threshold) finds it"
            )
        return found["medians"] * found["median_score"]

    # ------------------------------------------------------------------ checks

    def save_pretrained(self, *args, **kwargs):
        """Save as every configuration does, after a check of the fields, since they can be set.

        Raises:
            ValueError: as `check`; nothing is written.
        """
        self.check()
        chosen = self._attn_implementation
        if self.output_attentions:
            # Transformers saves output_attentions only with this one. The models switch to it by themselves.
            self._attn_implementation = "eager"
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self._attn_implementation = chosen

    def check(self) -> None:
        """Raise a ValueError if a value or a combination is impossible. Models check again, since fields can be set."""
        self._check_integers()
        self.check_selection()
        self._check_ratios()
        self._check_names()
        self._check_divisible()
        self._check_channels()
        self._check_token_counts()
        if self.token_budget == "batch":
            self.check_bounds(self.keep_ratio)

    def _check_integers(self) -> None:
        positive = (
            "patch_size num_channels num_frames tubelet_size hidden_size num_hidden_layers num_attention_heads "
            "intermediate_size decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads "
            "decoder_intermediate_size"
        )
        for name in positive.split():
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, name, value, "a positive integer")
        sides = _pair(self.image_size)
        sound = len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)
        _require(sound, "image_size", self.image_size, "a positive integer or a pair (height, width) of them")

    def check_selection(self) -> None:
        """Raise a ValueError if a field that selects tokens is impossible. Each forward checks these again."""
        for name in ("keep_ratio", "pretraining_keep_ratio"):
            check_keep_ratio(getattr(self, name), name)
        _require(
            _is_number(self.mask_ratio) and 0 < self.mask_ratio < 1,
            "mask_ratio",
            self.mask_ratio,
            "a number between 0 and 1, both excluded",
        )
        oversampling = self.frame_oversampling
        sound = _is_number(oversampling) and oversampling >= 1
        _require(sound, "frame_oversampling", oversampling, "a number of at least 1")
        _check_choice("token_selection", self.token_selection, TOKEN_SELECTIONS)
        _check_choice("token_budget", self.token_budget, TOKEN_BUDGETS)
        for name in ("min_keep_ratio", "max_keep_ratio"):
            check_keep_ratio(getattr(self, name), name)
        if self.token_budget == "batch":
            selections = ", ".join(repr(name) for name in TOKEN_SELECTIONS if name not in BLIND_SELECTIONS)
            right = f"one of {selections} with token_budget 'batch'"
            _require(self.selects_by_motion, "token_selection", self.token_selection, right)
            dropout = self.attention_probs_dropout_prob
            _require(dropout == 0, "attention_probs_dropout_prob", dropout, "0 with token_budget 'batch'")
        self._check_threshold()

    def _check_threshold(self) -> None:
        found = self.keep_threshold
        if found is None:
            return
        names = (*THRESHOLD_VALUES, *THRESHOLD_FIELDS)
        sound = isinstance(found, dict) and sorted(found) == sorted(names)
        sound = sound and all(_is_number(found[name]) for name in THRESHOLD_VALUES)
        # 0 keeps what changes at all: where much stands still, that may be less than the share that was asked for.
        sound = sound and found["medians"] >= 0 and found["median_score"] > 0
        right = f"None or a dict of {', '.join(names)}, where medians is at least 0 and median_score above 0"
        _require(sound, "keep_threshold", found, right)
        for name in THRESHOLD_FIELDS if self.token_budget == "batch" else ():
            right = f"{getattr(self, name)!r}, as {name} is, or keep_threshold None"
            _require(found[name] == getattr(self, name), f"keep_threshold[{name!r}]", found[name], right)

    def check_bounds(self, keep_ratio: float, grid_size: tuple[int, int, int] | None = None) -> None:
        """Raise a ValueError unless clips of min_keep_ratio to max_keep_ratio of their tokens can share a keep_ratio."""
        (least, most), count = self.token_bounds(grid_size), self.count_tokens(keep_ratio, grid_size)
        bounds = f"above min_keep_ratio {self.min_keep_ratio} and below max_keep_ratio {self.max_keep_ratio}"
        _require(least < count < most, "keep_ratio", keep_ratio, f"{bounds} with token_budget 'batch'")

    def _check_ratios(self) -> None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "classifier_dropout"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value < 1, name, value, "a probability of at least 0 and below 1")
        for name in ("layer_norm_eps", "head_layer_norm_eps", "initializer_range", "init_scale"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, value, "a positive number")

    def _check_names(self) -> None:
        for name, known in (
            ("problem_type", (None, *PROBLEM_TYPES)),
            ("hidden_act", tuple(ACT2FN)),
        ):
            _check_choice(name, getattr(self, name), known)
        _require(self.num_labels > 0, "num_labels", self.num_labels, "at least 1")
        self._check_class_weights()

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if weights is None:
            return
        sound = isinstance(weights, (list, tuple)) and all(_is_number(weight) and weight > 0 for weight in weights)
        right = f"None or a list of one positive number for each of num_labels={self.num_labels}"
        _require(sound and len(weights) == self.num_labels, "class_weights", weights, right)
        kind = "single_label_classification"
        _require(self.problem_type in (None, kind), "class_weights", weights, f"None with {self.problem_type}")

    def _check_divisible(self) -> None:
        height, width = self.frame_size
        for name, value, divisor_name in (
            ("num_frames", self.num_frames, "tubelet_size"),
            ("image_size", height, "patch_size"),
            ("image_size", width, "patch_size"),
            ("hidden_size", self.hidden_size, "num_attention_heads"),
            ("decoder_hidden_size", self.decoder_hidden_size, "decoder_num_attention_heads"),
        ):
            divisor = getattr(self, divisor_name)
            _require(value % divisor == 0, name, value, f"a multiple of {divisor_name}={divisor}")
        for name in ("hidden_size", "decoder_hidden_size"):
            value = getattr(self, name)
            _require(value % 2 == 0, name, value, "even, for the sine and cosine channels of the positions")

    def _check_channels(self) -> None:
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            sound = (
                isinstance(value, (list, tuple)) and all(map(_is_number, value)) and len(value) == self.num_channels
            )
            _require(sound, name, value, f"a list of one number for each of num_channels={self.num_channels}")
        _require(min(self.image_std) > 0, "image_std", self.image_std, "positive")

    def _check_token_counts(self) -> None:
        tokens = f"of the {self.num_tokens} tokens"
        _require(self.num_kept_tokens() > 0, "keep_ratio", self.keep_ratio, f"large enough to keep one {tokens}")
        _require(self.num_visible_tokens > 0, "mask_ratio", self.mask_ratio, f"small enough to leave one {tokens}")
        _require(
            self.num_target_tokens > 0,
            "pretraining_keep_ratio",
            self.pretraining_keep_ratio,
            f"large enough to leave a token to predict beside the {self.num_visible_tokens} visible ones "
            f"(above 1 - mask_ratio = {1 - self.mask_ratio:g})",
        )
        if self.num_slots == 1:
            # A single slot has no neighbour to differ from.
            _require(not self.uses_motion, "num_frames", self.num_frames, "at least two tubelets for motion selection")
        if self.norm_pix_loss:
            pixels = self.tubelet_size * self.patch_size**2
            _require(pixels > 1, "patch_size", self.patch_size, "above 1 for norm_pix_loss: one pixel has no variance")
        if self.selects_frames:
            # When every token is informative, all slots tie and frame selection has nothing to go by.
            _require(self.keep_ratio < 1, "keep_ratio", self.keep_ratio, "below 1 where frame_oversampling is above 1")


def check_keep_ratio(value: float, name: str = "keep_ratio") -> None:
    """Raise a ValueError unless `value` is a share in (0, 1]."""
    _require(_is_number(value) and 0 < value <= 1, name, value, "a number above 0 and at most 1")


def problem_type_of(config: EverestConfig, labels=None) -> ProblemType:
    """Return the problem type of a classifier: the config's, or else what its loss infers from the tensor `labels`.

    One label means regression. With several, floats mean multi-label; integers, or no labels given, single-label.

    Raises:
        ValueError: the config was set to a problem type that does not exist.
    """
    if config.problem_type is not None:
        _check_choice("problem_type", config.problem_type, PROBLEM_TYPES)
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    has_floats = labels is not None and labels.is_floating_point()
    return "multi_label_classification" if has_floats else "single_label_classification"


def _check_choice(name: str, value, known: tuple) -> None:
    _require(value in known, name, value, f"one of {', '.join(map(repr, known))}")


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return size if isinstance(size, (list, tuple)) else (size, size)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(sound: bool, name: str, value, right: str) -> None:
    if not sound:
        raise ValueError(f"EverestConfig.{name} is {value!r}; it must be {right}")


EverestConfig.register_for_auto_class()
