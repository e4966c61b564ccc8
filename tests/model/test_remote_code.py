"""Checkpoints that bring their code: which files are saved, and a process without the package."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.models import MODELS, build, clips
from helpers.tiny import TINY, tiny_config
from transformers.dynamic_module_utils import get_relative_imports

from everest_hf import EverestForVideoClassification

CODE = (
    "attention_everest",
    "camera_everest",
    "configuration_everest",
    "embeddings_everest",
    "kernels_everest",
    "modeling_everest",
    "packing_everest",
    "selection_everest",
)

SUBCLASS = """
from {origin} import EverestForVideoClassification


class Recogniser(EverestForVideoClassification):
    pass
"""


def test_the_model_s_file_itself_imports_all_files_that_it_needs():
    """Transformers 4.57 copies no file that only an imported file imports."""
    imported = get_relative_imports(sys.modules["everest_hf.modeling_everest"].__file__)
    assert sorted(["modeling_everest", *imported]) == list(CODE)


@pytest.mark.parametrize("origin", ["everest_hf.modeling_everest", ".modeling_everest"])
def test_a_class_of_another_file_is_saved_with_the_files_that_are_named(origin, tmp_path, monkeypatch):
    package = tmp_path / f"own_{origin.count('.')}{len(origin)}"
    package.mkdir()
    for name in CODE:
        shutil.copy(sys.modules[f"everest_hf.{name}"].__file__, package)
    (package / "recogniser.py").write_text(SUBCLASS.format(origin=origin))
    monkeypatch.syspath_prepend(tmp_path)
    recogniser = importlib.import_module(f"{package.name}.recogniser").Recogniser
    model = recogniser(recogniser.config_class(**TINY))
    model.save_pretrained(tmp_path / "model")
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForVideoClassification"] == "recogniser.Recogniser"
    assert ("AutoModel" in auto_map) == (origin == ".modeling_everest")
    for path in auto_map.values():
        assert (tmp_path / "model" / f"{path.split('.')[0]}.py").is_file(), path
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert recogniser.from_pretrained(tmp_path / "model").config.num_labels == 5


def test_a_class_of_the_session_is_saved_without_code_of_models(tmp_path):
    model_class = type("Recogniser", (EverestForVideoClassification,), {"__module__": "__main__"})
    model_class(tiny_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_everest.EverestConfig"}
    assert sorted(path.name for path in tmp_path.glob("*.py")) == ["configuration_everest.py"]


CHILD = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "everest_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())

import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForVideoClassification

root, folders = sys.argv[1], sys.argv[2].split(",")
pixel_values = torch.load(f"{root}/clips.pt")
classes = {"base": AutoModel, "pretraining": AutoModelForPreTraining, "classes": AutoModelForVideoClassification}
results = {}
for folder in folders:
    path = f"{root}/{folder}"
    assert AutoConfig.from_pretrained(path, trust_remote_code=True).num_tokens == 60
    for name, auto_class in classes.items():
        model = auto_class.from_pretrained(path, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
        with torch.no_grad():
            output = model(pixel_values, output_hidden_states=True)
        results[folder, name] = {"states": output.hidden_states[-1]}
        if name == folder.split("-")[0] and name != "base":
            results[folder, name]["logits"] = output.logits
            if "-" not in folder:
                model.save_pretrained(f"{root}/{name}-again")
torch.save(results, f"{root}/results.pt")
"""


def run_without_the_package(root, folders):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-I", "-c", CHILD, str(root), ",".join(folders)]
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return torch.load(root / "results.pt")


@pytest.mark.slow
def test_a_folder_serves_a_process_that_cannot_import_the_package(tmp_path):
    pixel_values = clips()
    torch.save(pixel_values, tmp_path / "clips.pt")
    models = dict(zip(("base", "pretraining", "classes"), (build(each) for each in MODELS), strict=True))
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    results = run_without_the_package(tmp_path, models)
    assert len(results) == 9
    for (folder, name), result in results.items():
        loaded = MODELS[list(models).index(name)].from_pretrained(tmp_path / folder)
        with torch.no_grad():
            output = loaded(pixel_values, output_hidden_states=True)
        assert torch.equal(result["states"], output.hidden_states[-1]), (folder, name)
        if "logits" in result:
            assert torch.equal(result["logits"], output.logits)

    # What such a process saves again serves the next one.
    again = ["pretraining-again", "classes-again"]
    for folder in again:
        before, after = (
            json.loads((tmp_path / name / "config.json").read_text()) for name in (folder.split("-")[0], folder)
        )
        assert after == before
        for name in CODE:
            source = tmp_path / folder.split("-")[0] / f"{name}.py"
            assert (tmp_path / folder / source.name).read_text() == source.read_text()
    results_again = run_without_the_package(tmp_path, again)
    for folder in again:
        name = folder.split("-")[0]
        assert torch.equal(results_again[folder, name]["logits"], results[name, name]["logits"])
