"""Files that are whole or absent: their permissions, and that they are on the disk before they have their names."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from helpers.tiny import tiny_config
from helpers.videos import write_class_folders
from safetensors.torch import save_file

from everest_hf import EverestForVideoClassification, EverestVideoProcessor, cli
from everest_hf.data.synthetic import MotionVideos, write_motion_videos
from everest_hf.files import PACKAGE, printable, put_in_place, write_whole


@pytest.fixture
def mask():
    """A mask of permissions that is not the usual one."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def permissions(path) -> str:
    return stat.filemode(path.stat().st_mode)


@pytest.fixture
def order(monkeypatch):
    """What is flushed and what is renamed, in that order, as ("flush" or "rename", path)."""
    calls, fsync, replace = [], os.fsync, os.replace

    def flush(number):
        calls.append(("flush", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def rename(old, new):
        calls.append(("rename", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    return calls


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, order, mask):
    path = tmp_path / "weights.safetensors"
    write_whole(path, lambda aside: save_file({"a": torch.ones(3)}, aside))
    aside = str(tmp_path / ".partial-weights.safetensors")
    assert order == [("flush", aside), ("rename", str(path)), ("flush", str(tmp_path))]
    assert permissions(path) == "-rw-r-----"
    assert os.listdir(tmp_path) == [path.name]


def test_what_cannot_be_written_is_named(tmp_path):
    """Not by the name that it has until it is whole, and also where the error names none."""

    def fill_the_disk(aside):
        raise OSError("the disk is full")

    path = tmp_path / "a.json"
    with pytest.raises(OSError, match=f"^{path}: the disk is full$"):
        write_whole(path, fill_the_disk)
    with pytest.raises(OSError, match=f"^{path}: Is a directory$"):
        write_whole(path, lambda aside: tmp_path.read_text())
    assert os.listdir(tmp_path) == []


def test_a_file_may_grow_elsewhere(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    seen = []
    write_whole(tmp_path / "a.txt", lambda aside: seen.append(aside) or aside.write_text("a"), place)
    assert seen == [place / ".partial-a.txt"]
    assert (tmp_path / "a.txt").read_text() == "a"
    assert os.listdir(place) == []


def test_so_are_all_files_of_a_folder(tmp_path, order, mask):
    aside = tmp_path / "aside"
    (aside / "state").mkdir(parents=True)
    save_file({"a": torch.ones(3)}, aside / "state" / "a.safetensors")
    (aside / "b").write_text("b")
    put_in_place(aside, tmp_path / "whole")
    place = order.index(("rename", str(tmp_path / "whole")))
    wanted = {aside, aside / "state", aside / "state" / "a.safetensors", aside / "b"}
    assert {path for _, path in order[:place]} == set(map(str, wanted))
    assert order[-1] == ("flush", str(tmp_path))
    assert permissions(tmp_path / "whole" / "state" / "a.safetensors") == "-rw-r-----"


def test_what_commands_write_has_the_usual_permissions(tmp_path, capsys):
    """Others may read what they may read of any new file."""
    config = tiny_config()
    EverestForVideoClassification(config).save_pretrained(tmp_path / "model")
    EverestVideoProcessor.from_config(config).save_pretrained(tmp_path / "model")
    videos = write_class_folders(tmp_path / "videos", videos_per_class=1)
    out = tmp_path / "features.safetensors"
    assert cli.main(["embed", str(videos), str(out), "--model", str(tmp_path / "model")]) == 0
    assert cli.main(["prepare", str(videos), str(tmp_path / "small")]) == 0
    (tmp_path / "any").touch()
    written = [out, *(path for path in (tmp_path / "small").rglob("*") if path.is_file())]
    assert len(written) == 3
    assert {permissions(path) for path in written} == {permissions(tmp_path / "any")}


def test_a_set_of_videos_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    present, sync = [], os.sync
    monkeypatch.setattr(os, "sync", lambda: present.append((tmp_path / "set").exists()) or sync())
    write_motion_videos(tmp_path / "set", MotionVideos(num_train=2, num_val=1))
    assert present == [False]


def test_what_steers_a_terminal_is_escaped():
    assert printable("é 日本\u3000👩\u200d🔬 a_b") == "é 日本\u3000👩\u200d🔬 a_b"
    assert printable("\x1b[2J\x9b\r\n\t\x7f\0\u2028\u202e\udce9") == r"\x1b[2J\x9b\r\n\t\x7f\x00\u2028\u202e\udce9"


FROM_A_CHECKOUT = """
from everest_hf.hub.card import TEMPLATE
from everest_hf.training.quickstart import RECIPES
from everest_hf.training.recipe import load_recipe
print(load_recipe("recipes/ucf101/pretrain.yaml", {"train": "videos"}).epochs, (RECIPES / "pretrain.yaml").is_file())
print(TEMPLATE.read_text()[:3])
"""


def test_a_checkout_without_links_has_its_recipes(tmp_path):
    """As Git writes it where links do not work: a file with the target in the place of each."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    shutil.copytree(PACKAGE, checkout / "everest_hf", ignore=shutil.ignore_patterns("recipes", "*.md", "__pycache__"))
    shutil.copytree(PACKAGE / "recipes", checkout / "recipes")
    shutil.copy(PACKAGE / "model_card.md", checkout)
    for name in ("recipes", "model_card.md"):
        (checkout / "everest_hf" / name).write_text(f"../{name}")
    elsewhere.mkdir()
    command = [sys.executable, "-c", FROM_A_CHECKOUT]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["3200 True", "---"], done.stderr
