"""The threshold of token_budget "batch": the score above which evaluation keeps a token, found on videos."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ..configuration_everest import THRESHOLD_FIELDS, EverestConfig
from ..data import transforms
from ..modeling_everest import EverestForPreTraining, EverestPreTrainedModel
from ..packing_everest import threshold_of
from .evaluate import join, on_device


@torch.no_grad()
def score_tokens(model: EverestPreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the scores (B, N) float32 of clips (B, T, C, H, W), as the model's selection makes them in evaluation."""
    # The whole model is called, since a model in shards must be, and with one token of each clip, which needs no threshold.
    fewest = {} if isinstance(model, EverestForPreTraining) else {"keep_ratio": 1 / model.config.num_tokens}
    return model(pixel_values, output_scores=True, **fewest).scores


def find_threshold(config: EverestConfig, scores: torch.Tensor, keep_ratio: float | None = None) -> dict[str, Any]:
    """Return a `keep_threshold` of the config with which clips like these keep a share of their tokens on the average.

    scores: (clips, N), as `score_tokens` gives them. keep_ratio: the share, by default the config's. Where fewer tokens
    change at all, the threshold is 0.

    Raises:
        ValueError: nothing moves in any clip, or the clips can't share the tokens of the ratio.
    """
    ratio = config.keep_ratio if keep_ratio is None else keep_ratio
    config.check_bounds(ratio)
    changing = scores[scores > 0]
    if not len(changing):
        raise ValueError(f"nothing moves in any of the {len(scores)} clips, so that no threshold can be found")
    threshold = threshold_of(scores, config.num_kept_tokens(ratio), *config.token_bounds())
    median = changing.median().item()
    found_for = {name: getattr(config, name) for name in THRESHOLD_FIELDS}
    return {"medians": threshold / median, "median_score": median, **found_for, "keep_ratio": ratio}


def set_threshold(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> None:
    """Set `keep_threshold` of a prepared model's config by the videos of a loader. Every process must call this.

    loader: this process's batches (`share_of_batches`) of a VideoViews that counts unreadable videos, which are left out.

    Raises:
        ValueError: as `find_threshold`.
    """
    whole = accelerator.unwrap_model(model)
    was_training = whole.training
    whole.eval()
    found = list(_scores_of(accelerator, whole, loader))
    whole.train(was_training)
    joined = dict(zip(("scores", "index"), map(torch.cat, zip(*found, strict=True)), strict=True))
    whole.config.keep_threshold = find_threshold(whole.config, join(accelerator, joined)["scores"])


def _scores_of(accelerator, model, loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the scores (videos, N) of a batch's videos, and their numbers, -1 for those that can't be read."""
    to_pixel_values = partial(transforms.normalize, mean=model.config.image_mean, std=model.config.image_std)
    for batch in on_device(loader, accelerator, {}, "calibration"):
        scores = score_tokens(model, to_pixel_values(batch["pixel_values"].flatten(0, 1)))
        yield scores, batch["index"].masked_fill(batch["unreadable"], -1)
