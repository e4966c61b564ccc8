"""The errors of docs/troubleshooting.md are those that there are: each command is run, and fails as the page says."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate import PartialState
from helpers.tiny import TINY, tiny_config
from helpers.videos import write_class_folders, write_clip, write_list
from transformers import VideoMAEConfig, VideoMAEForPreTraining

import train_accelerate
from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestVideoProcessor, cli
from everest_hf.training.options import parse_command_line
from everest_hf.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
RUN = re.findall(r"```bash\n(.*)\n```\n\n```console\n(.*)\n```", PAGE)
# What no single command provokes; … stands for what differs.
OTHERS = re.findall(r"(?<!```\n)\n```console\n(.*)\n```", PAGE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the page's commands name and that is there."""
    place = tmp_path_factory.mktemp("place")
    config = tiny_config()
    for name, cls in (("base", EverestForPreTraining), ("classifier", EverestForVideoClassification)):
        cls(config).save_pretrained(place / name)
        EverestVideoProcessor.from_config(config).save_pretrained(place / name)
    sizes = {name: value for name, value in TINY.items() if name in VideoMAEConfig().to_dict()}
    VideoMAEForPreTraining(VideoMAEConfig(**sizes | {"image_size": 24})).save_pretrained(place / "videomae")
    (place / "checkpoint.pth").write_text("<!DOCTYPE html>\n")

    write_class_folders(place / "my_videos" / "train", ("jump", "run"), num_frames=12)
    write_class_folders(place / "my_videos" / "val", ("jump", "run"), videos_per_class=1, num_frames=12)
    write_clip(place / "new_video.mp4")
    write_class_folders(place / "damaged", ("jump", "run"), videos_per_class=1, num_frames=12)
    (place / "damaged" / "run" / "run_0.mp4").write_text("moved to another server\n")
    videos = [(f"../my_videos/train/{name}/{name}_0.mp4", label) for label, name in enumerate(("jump", "run"), 1)]
    write_list(place / "lists" / "from_one.txt", videos)
    write_list(place / "lists" / "moved.txt", [("jump/jump_0.mp4", 0), ("run/run_0.mp4", 1)])
    write_list(place / "lists" / "comma.txt", [("jump/jump_0.mp4,jump",)])

    for name in ("unfinished", "other"):
        (place / "runs" / name).mkdir(parents=True)
        recipe = load_recipe(None, {"train": "my_videos/train", "output_dir": f"runs/{name}"})
        recipe.save(place / "runs" / name / "recipe.yaml")
        (place / "runs" / name / "log.jsonl").write_text("{}\n")
    return place


@pytest.mark.parametrize(("command", "error"), RUN, ids=[command for command, _ in RUN])
def test_a_command_fails_as_the_page_says(command, error, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(place / "no-token"))
    words = shlex.split(command)
    if words[0] == "everest-hf":
        assert cli.main(words[1:]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
    else:
        assert words[:3] == ["accelerate", "launch", "train_accelerate.py"]
        with pytest.raises((ValueError, OSError)) as raised:
            train_accelerate.start(*parse_command_line(words[3:]), PartialState(cpu=True))
        said = f"error: {raised.value}"
    assert said.replace(str(place), "/home/you") == error


def test_other_messages_are_those_of_the_code():
    files = [*(ROOT / "everest_hf").rglob("*.py"), ROOT / "train_accelerate.py"]
    # Messages are written in pieces, one a line.
    code = re.sub(r'"\s+f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    pieces = [piece.strip() for message in OTHERS for piece in message.split("…") if len(piece.strip()) > 10]
    assert len(pieces) >= len(OTHERS) >= 5
    assert [piece for piece in pieces if piece not in code] == []


def test_there_are_twenty_errors():
    assert len(re.findall(r"^### ", PAGE, flags=re.MULTILINE)) >= 20
    assert len(RUN) >= 15
