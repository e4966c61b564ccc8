"""Who uses the package with a type checker gets real types, and errors where the use is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="types are checked by mypy")

ROOT = Path(__file__).parents[2]
# What is wrong in it is marked as such; where mypy finds nothing wrong in such a line, it says so.
PROGRAM = """
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BatchFeature
from typing_extensions import assert_type

import everest_hf
from everest_hf import (
    EverestConfig,
    EverestForPreTraining,
    EverestForVideoClassification,
    EverestModel,
    EverestPreTrainedModel,
    EverestVideoProcessor,
    Recipe,
    evaluate,
    train,
)
from everest_hf.data import VideoViews, collate, load_videos
from everest_hf.modeling_everest import (
    EverestForPreTrainingOutput,
    EverestForVideoClassificationOutput,
    EverestModelOutput,
)

config = EverestConfig(image_size=(96, 128), keep_ratio=0.5, id2label={0: "left", 1: "right"})
assert_type(config.keep_ratio, float)
assert_type(config.num_labels, int)
assert_type(config.id2label, dict[int, str])
assert_type(config.frame_size, tuple[int, int])
assert_type(config.num_kept_tokens(0.3), int)
assert_type(EverestConfig.from_pretrained("folder"), EverestConfig)
EverestConfig(keep_ratio="half")  # type: ignore[arg-type]

classifier = EverestForVideoClassification.from_pretrained("folder").eval()
assert_type(classifier, EverestForVideoClassification)
assert_type(classifier.config, EverestConfig)
output = classifier(torch.rand(1, 16, 3, 96, 128), keep_ratio=0.8)
assert_type(output, EverestForVideoClassificationOutput)
assert_type(output.logits, Tensor)
assert_type(output.kept_ids, Tensor)
assert_type(output.loss, Tensor | None)
assert_type(output.hidden_states, tuple[Tensor, ...] | None)
assert_type(classifier.config.id2label[int(output.logits.argmax())], str)
output.logit  # type: ignore[attr-defined]
output.loss.backward()  # type: ignore[union-attr]

pretrained = EverestForPreTraining(config)
reconstruction = pretrained(torch.rand(1, 16, 3, 96, 128))
assert_type(reconstruction, EverestForPreTrainingOutput)
assert_type(reconstruction.logits, Tensor)
assert_type(reconstruction.target_ids, Tensor)
assert_type(EverestForPreTraining.from_videomae("folder", keep_ratio=0.5), EverestForPreTraining)

encoder = EverestModel.from_pretrained("folder", use_mean_pooling=False)
features = encoder(torch.rand(1, 16, 3, 96, 128), output_scores=True)
assert_type(features, EverestModelOutput)
assert_type(features.last_hidden_state, Tensor)
assert_type(features.scores, Tensor | None)


def publish(model: EverestPreTrainedModel, processor: EverestVideoProcessor) -> None:
    model.save_pretrained("folder")
    processor.save_pretrained("folder")
    model.push_to_hub("name/model")


processor = EverestVideoProcessor.from_pretrained("folder")
assert_type(EverestVideoProcessor.from_config(config, frame_step=2), EverestVideoProcessor)
inputs: BatchFeature = processor("clip.mp4", return_tensors="pt")
text: str = processor("clip.mp4")  # type: ignore[assignment]
publish(classifier, processor)
publish(processor, classifier)  # type: ignore[arg-type]

views = VideoViews(load_videos("list.txt"), config.frame_size, num_frames=config.num_frames, num_segments=5)
VideoViews(load_videos("list.txt"), 224, num_frames=16)  # type: ignore[arg-type]
for batch in DataLoader(views, batch_size=2, collate_fn=collate):
    classifier(batch["pixel_values"].flatten(0, 1))

recipe = Recipe(task="finetune", train="list.txt", val="held.txt", epochs=3, config={"keep_ratio": 0.5})
Recipe(task="finetun", train="list.txt")  # type: ignore[arg-type]
Recipe(train="list.txt", epochs="3")  # type: ignore[arg-type]
assert_type(train(recipe), dict[str, float])
assert_type(evaluate(recipe)["val_top1"], float)
train("recipe.yaml")  # type: ignore[arg-type]

assert_type(everest_hf.__version__, str)
"""


@pytest.mark.slow
def test_a_program_over_the_public_names_has_types(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *options, "program.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
