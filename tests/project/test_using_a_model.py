"""What docs/using-a-model.md shows is what there is: its commands parse, its program runs."""

import re
import shlex
from pathlib import Path

import pytest
from helpers.tiny import tiny_config
from helpers.videos import write_clip

from everest_hf import EverestForVideoClassification, EverestVideoProcessor
from everest_hf.cli import build_parser

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "using-a-model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
COMMANDS = [line.rpartition("everest-hf ")[2] for line in LINES]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    assert callable(build_parser().parse_args(shlex.split(command)).command)


def test_the_program_runs(tmp_path, monkeypatch, capsys):
    config, saved = tiny_config(), tmp_path / "runs/quickstart/finetune/model"
    EverestForVideoClassification(config).save_pretrained(saved)
    EverestVideoProcessor.from_config(config, frame_step=1).save_pretrained(saved)
    write_clip(tmp_path / "data/motion/val/left/00004.mp4")
    write_clip(tmp_path / "data/motion/val/right/00005.mp4", seed=1)
    monkeypatch.chdir(tmp_path)
    (program,) = [text for kind, text in BLOCKS if kind == "python"]
    exec(compile(program, "using-a-model.md", "exec"), {})
    first, second, last = capsys.readouterr().out.splitlines()
    assert (first.split()[0], second.split()[0]) == tuple(
        f"data/motion/val/{p}" for p in ("left/00004.mp4", "right/00005.mp4")
    )
    assert last.startswith("torch.Size([2, 32]) data/motion/val/left/00004.mp4 []")
