"""What the model sees in training, as a picture: clips after crop, flip, RandAugment, erasing and mixing."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..configuration_everest import EverestConfig
from ..data import VideoClips, collate, head_of, transforms
from ..modeling_everest import EverestPreTrainedModel
from ..packing_everest import Packing
from ..video import VideoError
from ..visualize import grey_out, take_slots, token_mask, write_contact_sheet
from .inputs import model_inputs
from .loaders import build_transform, drawing_of, names_of, sampling_of
from .recipe import Recipe

logger = logging.getLogger(__name__)

# Clips in the picture, and the colour that lies over the tokens to predict.
CLIPS, TO_PREDICT = 6, (30, 90, 255)


@torch.no_grad()
def draw_train_clips(
    recipe: Recipe, model: EverestPreTrainedModel, train: Dataset | IterableDataset, path: Path
) -> None:
    """Draw the first training clips of a run, with their labels and below each the tokens that are kept.

    They are those of the first epoch; of a stream, which has no order yet, its first videos. What is drawn for a batch
    (erasing, mixing) is drawn here by the seed, and the run's own random numbers stay as they are. Videos that cannot
    be read leave out the picture, with a warning.
    """
    config = model.config
    with transforms.seeded(recipe.seed):
        try:
            batch = _first_batch(recipe, config, train)
        except VideoError as error:
            logger.warning("%s is not drawn: %s", path, error)
            return
        inputs = model_inputs(batch, recipe, config)
        noise = {name: value for name, value in inputs.items() if name not in ("pixel_values", "labels")}
        encoder: Any = model.everest
        if config.token_budget == "batch":
            encoder.embeddings.train()  # evaluation would go by a threshold
        embedded = encoder.embeddings(inputs["pixel_values"], recipe.task == "pretrain", **noise)
    kept = _by_clip(embedded.kept_ids, embedded.packing)
    targets = embedded.target_ids  # (B, M), of pre-training
    seen = _to_uint8(inputs["pixel_values"], config)  # (B, T, 3, H, W)
    names = names_of(train, batch["index"].tolist())
    clips = []
    for i in range(min(CLIPS, len(seen))):
        worked_on = take_slots(seen[i], None if embedded.slots is None else embedded.slots[i], config)
        strips = [worked_on, _with_tokens(worked_on, kept[i], None if targets is None else targets[i], config)]
        label = f": {_label_in_words(inputs['labels'][i], config)}" if "labels" in inputs else ""
        clips.append((Path(names[i]).name + label, strips))
    below = f"{_mean_length(kept):g} of {config.num_tokens} tokens"
    below += " kept" if targets is None else f" seen, {targets.shape[1]} to predict (blue)"
    below += "" if embedded.packing is None else ", on the average"
    write_contact_sheet(f"training clips; below each: {below}", clips, path, every=config.tubelet_size)


def _by_clip(ids: torch.Tensor, packing: Packing | None) -> Sequence[torch.Tensor]:
    """Return the ids (n,) of each clip, of (B, n) or of packed ones."""
    return ids.unbind() if packing is None else packing.split(ids)


def _mean_length(ids: Sequence[torch.Tensor]) -> float:
    return sum(map(len, ids)) / len(ids)


def _first_batch(recipe: Recipe, config: EverestConfig, train: Dataset | IterableDataset) -> dict:
    """Return CLIPS clips, or what is next to it where num_sample is no divisor, as a batch on the CPU."""
    rows = max(1, CLIPS // recipe.num_sample)
    reading = {**drawing_of(recipe), **sampling_of(recipe, config)}
    videos = head_of(train, rows) if isinstance(train, IterableDataset) else train
    clips = VideoClips(videos, build_transform(recipe, config), balanced=recipe.balanced_sampling, **reading)
    return collate([clips[i] for i in clips.order()[:rows].tolist()])


def _to_uint8(pixel_values: torch.Tensor, config: EverestConfig) -> torch.Tensor:
    """Undo `transforms.normalize`: (..., C, H, W) to uint8."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.image_mean, config.image_std))
    return (255 * (pixel_values * std + mean)).round().clamp(0, 255).to(torch.uint8)


def _with_tokens(clip: torch.Tensor, kept: torch.Tensor, targets: torch.Tensor | None, config) -> torch.Tensor:
    """Return a clip uint8 (T, 3, H, W) with dropped tokens in grey, and those to predict under a colour."""
    if targets is None:
        return grey_out(clip, token_mask(kept, config))
    to_predict = token_mask(targets, config)
    shown = grey_out(clip, token_mask(kept, config) | to_predict)
    colour = torch.tensor(TO_PREDICT).view(3, 1, 1)
    return torch.where(to_predict[:, None], (shown // 4 + 3 * colour // 4).to(torch.uint8), shown)


def _label_in_words(label: torch.Tensor, config: EverestConfig) -> str:
    """Say what a clip is to be taken for: a class (), shares of classes or labels (num_labels,), or a number."""
    if config.problem_type == "regression":
        return f"{float(label):.4g}"
    if label.ndim == 0:
        return config.id2label[int(label)]
    shares = {config.id2label[i]: share for i, share in enumerate(label.tolist()) if share > 0}
    if config.problem_type == "multi_label_classification":
        return ", ".join(shares) or "no label"
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]  # of smoothed labels, all classes have a share
    return ", ".join(f"{name} {share:.2f}" for name, share in largest)
