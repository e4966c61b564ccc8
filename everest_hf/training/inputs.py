"""From a batch on the device to what the model takes: normalised, erased and mixed pixels, and the draws of selection."""

import torch

from ..configuration_everest import EverestConfig
from ..data import transforms
from .recipe import Recipe

# The constants of SplitMix64, as signed numbers.
_GOLDEN, _MIX_1, _MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def model_inputs(batch: dict, recipe: Recipe, config: EverestConfig) -> dict:
    """Turn a uint8 batch on the device into what the model takes: normalised, erased, mixed, with noise."""
    pixel_values = transforms.normalize(batch["pixel_values"], config.image_mean, config.image_std)
    noise = selection_noise(batch["seed"], config, pretraining=recipe.task == "pretrain")
    if recipe.erasing:
        pixel_values = transforms.random_erasing(pixel_values, recipe.erasing)
    if recipe.task == "pretrain":
        return {"pixel_values": pixel_values, **noise}
    labels = batch["labels"]
    if recipe.label_smoothing or recipe.mixup or recipe.cutmix:
        one_hot = torch.nn.functional.one_hot(labels, config.num_labels).float()
        labels = torch.lerp(one_hot, torch.full_like(one_hot, 1 / config.num_labels), recipe.label_smoothing)
        pixel_values, labels = transforms.mix(pixel_values, labels, mixup=recipe.mixup, cutmix=recipe.cutmix)
    return {"pixel_values": pixel_values, "labels": labels, **noise}


def selection_noise(seeds: torch.Tensor, config: EverestConfig, *, pretraining: bool) -> dict[str, torch.Tensor]:
    """Return what the model's selection draws for clips, as arguments of its forward: `noise`, `frame_noise`.

    seeds: int64 (B,). A clip's draw follows from its seed alone, not from its place in a batch or its process. What
    the configuration has no draw for is left out.
    """
    draws = {}
    if not config.selects_by_motion:
        tokens = {"random": config.num_tokens, "tube": config.num_tokens_per_slot}
        draws["noise"] = uniform(seeds, tokens[config.token_selection])
    elif pretraining:
        draws["noise"] = uniform(seeds, config.num_informative_tokens)
    if config.num_input_frames > config.num_frames:
        draws["frame_noise"] = uniform(~seeds, config.num_input_frames // config.tubelet_size)
    return draws


def uniform(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """Return (B, n) pseudo-random float32 in [0, 1), row i a function of seeds[i] alone, the same on every device.

    seeds: int64 (B,). SplitMix64 (Steele, Lea and Flood 2014), its n first numbers for each seed; integers wrap.
    """
    x = seeds[:, None] + torch.arange(1, n + 1, device=seeds.device) * _GOLDEN  # (B, n)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x = (x ^ _shift_right(x, shift)) * factor
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 40).float() / 2**24  # the 24 bits that float32 holds


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 as if it were unsigned."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
