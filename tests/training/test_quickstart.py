"""The quickstart: its recipes, and what it says at its end."""

import json
import shlex
from functools import partial

import pytest
from helpers.tiny import tiny_config

from everest_hf import EverestForVideoClassification, EverestVideoProcessor, cli
from everest_hf.data.synthetic import DIRECTIONS, MotionVideos
from everest_hf.training import quickstart
from everest_hf.training.options import parse_command_line
from everest_hf.training.recipe import load_recipe


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """The recipes of both stages after runs of a few steps, whose folder's name is no word of a shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "MotionVideos", partial(MotionVideos, num_train=8, num_val=8))
    stages = quickstart.load_stages({"output_dir": "runs/my first"})
    lines = {"pretrain": [{"loss": 1.0}, {"loss": 0.5}], "finetune": [{"loss": 2.0}, {"val_top1": 0.75}]}
    for name, recipe in stages.items():
        (tmp_path / recipe.output_dir).mkdir(parents=True)
        log = "".join(json.dumps({"step": i, **line}) + "\n" for i, line in enumerate(lines[name]))
        (tmp_path / recipe.output_dir / "log.jsonl").write_text(log)
    names = dict(enumerate(DIRECTIONS))
    config = tiny_config(num_labels=8, id2label=names, label2id={name: i for i, name in names.items()})
    model = tmp_path / stages["finetune"].output_dir / "model"
    EverestForVideoClassification(config).save_pretrained(model)
    EverestVideoProcessor.from_config(config, frame_step=1).save_pretrained(model)
    return stages


def commands_of(text: str) -> dict[str, list[str]]:
    """The words of what it says, by what they are for."""
    lines = [line for line in text.splitlines() if line[:1].strip() and len(line) > 20]
    return {line[:20].strip(): shlex.split(line[20:]) for line in lines}


def test_its_end_says_how_it_went_and_what_to_type_next(stages, capsys):
    text = quickstart.summarise(stages)
    assert "pre-training loss   1.000 -> 0.500 (50% lower)\nheld-out top-1      0.750 (chance 0.125)\n" in text
    said = commands_of(text)
    program, *arguments = said["predict a clip"]
    assert program == "everest-hf"
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("data/motion/val/down/")
    assert said["try your videos"][:3] == ["accelerate", "launch", "train_accelerate.py"]
    path, options = parse_command_line(said["try your videos"][3:])
    assert load_recipe(path, options).model == f"{stages['pretrain'].output_dir}/model"
    assert load_recipe(path, options).output_dir == "runs/own"
