"""The programs in examples/, run on small videos."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_config
from helpers.videos import write_class_folders
from safetensors.torch import load_file

from everest_hf import EverestForPreTraining, EverestForVideoClassification

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a pre-trained model and videos of two classes."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    EverestForPreTraining(tiny_config()).save_pretrained(folder / "pretrained")
    write_class_folders(folder / "videos", videos_per_class=1)
    return folder


@pytest.fixture
def arguments(place, tmp_path, monkeypatch) -> list[str]:
    """The command line of a short training, with the examples where Python finds them."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("trainer", "lora"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    options = {"model": place / "pretrained", "train": place / "videos", "val": place / "videos", "frame_step": 1}
    options |= {"output_dir": tmp_path / "run", "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none"}
    options |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01}
    return [f"--{name}={value}" for name, value in options.items()]


def test_trainer(place, arguments, tmp_path):
    import trainer

    figures = trainer.main(command_line=arguments)
    assert figures["eval_top1"] in (0, 0.5, 1)
    model = EverestForVideoClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "left", 1: "right"}
    before, after = load_file(place / "pretrained" / "model.safetensors"), model.state_dict()
    shared = [name for name in before if name.startswith("everest.encoder.") and name in after]
    assert shared
    assert not any(torch.equal(before[name], after[name]) for name in shared)


def test_lora(place, arguments, tmp_path):
    peft = pytest.importorskip("peft")
    import lora

    figures = lora.main(lora.add_adapters, command_line=arguments)
    base = EverestForVideoClassification.from_pretrained(
        place / "pretrained", id2label={0: "left", 1: "right"}, ignore_mismatched_sizes=True
    )
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run")
    learned = {name: weight for name, weight in adapted.named_parameters() if "lora_B" in name}
    assert len(learned) == 2 * base.config.num_hidden_layers
    assert all(weight.any() for weight in learned.values())  # it starts as zeros
    assert set(figures) >= {"eval_loss", "eval_top1"}
