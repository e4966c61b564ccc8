"""Both columns of the table for users of VideoMAE in docs/compatibility.md give the same."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VideoMAEModel,
)

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel, EverestVideoProcessor
from everest_hf.convert import convert_checkpoint
from everest_hf.inference import tokens_to_grid

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(VideoMAE.+?)` \| `(.+?)` \|$", PAGE, flags=re.MULTILINE)
SIZES = {
    "image_size": [24, 40],
    "patch_size": 8,
    "num_frames": 12,
    "tubelet_size": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "decoder_hidden_size": 20,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 28,
    "num_labels": 5,
}


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict:
    """What the table's programs use."""
    torch.manual_seed(0)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("videomae", "pretrained")}
    heads = (VideoMAEForVideoClassification, True), (VideoMAEForPreTraining, False)
    for folder, (cls, use_mean_pooling) in zip(folders.values(), heads, strict=True):
        model = cls(VideoMAEConfig(**SIZES, use_mean_pooling=use_mean_pooling))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        model.save_pretrained(folder)
    size = {"height": 24, "width": 40}
    VideoMAEImageProcessor(size=size, crop_size=size).save_pretrained(folders["videomae"])
    converted = tmp_path_factory.mktemp("everest") / "converted"
    convert_checkpoint(str(folders["videomae"]), converted)
    order = torch.rand(2, 60).argsort(dim=1)
    return {
        **folders,
        "everest": converted,
        "frames": list(np.random.default_rng(0).integers(0, 256, (12, 72, 120, 3), dtype=np.uint8)),
        **{cls.__name__: cls for cls in (VideoMAEImageProcessor, EverestVideoProcessor)},
        **{cls.__name__: cls for cls in (VideoMAEModel, VideoMAEForVideoClassification, VideoMAEForPreTraining)},
        **{cls.__name__: cls for cls in (EverestModel, EverestForVideoClassification, EverestForPreTraining)},
        "tokens_to_grid": tokens_to_grid,
        "pixel_values": torch.randn(2, 12, 3, 24, 40),
        "labels": torch.tensor([1, 4]),
        "mask": order >= 17,
    }


def test_the_table_has_rows():
    assert len(ROWS) == 10


@pytest.mark.parametrize(("theirs", "ours"), ROWS)
def test_both_give_the_same(theirs, ours, names):
    with torch.no_grad():
        expected, found = eval(theirs, dict(names)), eval(ours, dict(names))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
