"""Publishing: real clients against a Hub on this machine, and a process without the package that loads by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.commands import SCRIPT
from helpers.local_hub import LocalHub, Refused
from helpers.runs import run_of
from helpers.tiny import TINY, tiny_config
from helpers.videos import write_class_folders, write_clip
from huggingface_hub import ModelCard

from everest_hf import EverestForVideoClassification, EverestVideoProcessor, cli, hub
from everest_hf.hub.card import make_card
from everest_hf.training.recipe import Recipe
from everest_hf.training.run import Run

MODEL_FILES = {
    "README.md",
    "attention_everest.py",
    "camera_everest.py",
    "config.json",
    "configuration_everest.py",
    "embeddings_everest.py",
    "kernels_everest.py",
    "model.safetensors",
    "modeling_everest.py",
    "packing_everest.py",
    "selection_everest.py",
    "video_preprocessor_config.json",
    "video_processing_everest.py",
    "video_reading_everest.py",
}
RECORDS = {"curves.png", "log.jsonl", "recipe.yaml", "tokens.png"}


def save_model(folder: Path, seed: int = 0, model_class=EverestForVideoClassification) -> Path:
    """Save a model and its processor, as a run does."""
    torch.manual_seed(seed)
    config = tiny_config(num_hidden_layers=1)
    model_class(config).save_pretrained(folder)
    EverestVideoProcessor.from_config(config, frame_step=1).save_pretrained(folder)
    return folder


def save_run(folder: Path, **values) -> Path:
    """Save a model, and the records of a run that made it, with videos in someone's home."""
    save_model(folder / "model")
    Recipe(train="/home/someone/films/train.txt", output_dir=str(folder), **values).save(folder / "recipe.yaml")
    for name in RECORDS - {"recipe.yaml"}:
        (folder / name).write_text(f"{name}\n")
    (folder / "predictions.csv").write_text("video\n/home/someone/films/a.mp4\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def server():
    with LocalHub(x="tester", y="stranger").running() as running:
        yield running


@pytest.fixture
def online(server, monkeypatch):
    """The Hub that the client in this process talks to, as the user of the token x."""
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "x")
    return server


def run(arguments, server, home, code=None, cwd=None) -> subprocess.CompletedProcess:
    """Run everest-hf, or code, in a process of its own with an empty cache."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "everest_hf.cli"]
    environment = {**os.environ, **server.environment(home)}
    arguments = map(str, arguments)
    return subprocess.run([*command, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)


def refuse(content: bytes) -> bool:
    raise Refused(403, "Forbidden", "storage is full")


# ------------------------------------------------------------------------------------------------------ as processes

BY_NAME = """
import sys
sys.modules["everest_hf"] = None  # importing the package is an ImportError
import json, numpy, torch
from transformers import (AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForVideoClassification,
                          AutoVideoProcessor, pipeline)
name, folder, video, out = sys.argv[1:]
load = {"trust_remote_code": True}
processor = AutoVideoProcessor.from_pretrained(name, **load)
pixel_values = processor(video, return_tensors="pt")["pixel_values"]
model = AutoModelForVideoClassification.from_pretrained(name, **load).eval()
assert AutoConfig.from_pretrained(name, **load).keep_ratio == model.config.keep_ratio
for cls in (AutoModel, AutoModelForPreTraining):
    assert cls.from_pretrained(name, **load).config.model_type == "everest"
with torch.no_grad():
    numpy.save(out, model(pixel_values).logits)
for source in (name, folder):
    print(json.dumps(pipeline("video-classification", model=source, **load)(video, top_k=2)))
with torch.no_grad():
    model.classifier.bias += 1
model.push_to_hub(name)
processor.push_to_hub(name)
"""


@pytest.mark.slow
def test_what_is_pushed_gives_the_same_logits_by_name_where_the_package_is_not(server, model, tmp_path):
    pushed = run(["push", model, "tester/clips", "--private"], server, tmp_path / "home")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.split() == [f"{server.url}/tester/clips"]
    repo = server.repos["tester/clips"]
    assert repo.private
    first = repo.files()
    video, out = write_clip(tmp_path / "clip.mp4"), tmp_path / "logits.npy"
    loaded = run(["tester/clips", model, video, out], server, tmp_path / "elsewhere", code=BY_NAME)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    processor = EverestVideoProcessor.from_pretrained(model)
    with torch.no_grad():
        classifier = EverestForVideoClassification.from_pretrained(model).eval()
        expected = classifier(processor(str(video), return_tensors="pt")["pixel_values"]).logits
    assert np.array_equal(np.load(out), expected.numpy())
    best = expected[0].softmax(-1).topk(2)
    printed = [line for line in loaded.stdout.splitlines() if line.startswith("[{")]  # DeepSpeed, if here, prints too
    assert len(printed) == 2
    for line in printed:
        entries = json.loads(line)
        assert [entry["label"] for entry in entries] == [classifier.config.id2label[i] for i in best.indices.tolist()]
        assert [entry["score"] for entry in entries] == pytest.approx(best.values.tolist(), abs=1e-6)

    # What that process has pushed in its turn is as whole; card and code are as they were.
    assert len(repo.messages) > 2
    assert {name for name, content in repo.files().items() if content != first.get(name)} == {"model.safetensors"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe of three steps, each of them with a checkpoint, and its videos."""
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos", videos_per_class=2)
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
    del config["num_labels"]
    values = {"task": "finetune", "train": "videos", "val": "videos", "frame_step": 1, "epochs": 3, "warmup_epochs": 0}
    values |= {"batch_size": 4, "segments": 2, "crops": 1, "save_every": 1, "num_workers": 0, "config": config}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


TRAIN = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import train_accelerate as t; t.main()"


def train(server, recipe, home, *options) -> subprocess.CompletedProcess:
    return run(["recipe.yaml", *options], server, home, code=TRAIN, cwd=recipe.parent)


@pytest.mark.slow
def test_a_run_pushes_its_checkpoints_and_its_result(server, recipe, tmp_path):
    done = train(server, recipe, tmp_path, "--push_to_hub", "waving", "--output_dir", "runs/pushed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"pushed to {server.url}/tester/waving"
    repo, folder = server.repos["tester/waving"], recipe.parent / "runs" / "pushed"
    assert repo.messages[:2] == ["initial commit", "Step 1"]
    assert repo.messages[-1] == "Result of the run"
    files = repo.files()
    assert set(files) == MODEL_FILES | RECORDS | {".gitattributes"}
    assert files["model.safetensors"] == (folder / "model" / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    figures = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][-1]
    top1 = next(result for result in card.data.eval_results if result.metric_name.startswith("top-1"))
    assert top1.metric_value == figures["val_top1"]
    assert "2 × 1 views" in top1.metric_name
    assert card.data.model_name == "waving"
    assert "| training videos | 4 of `videos` |" in card.text
    assert "| steps | 3 of 4 clips |" in card.text
    for picture in ("curves.png", "tokens.png"):
        assert f"]({picture})" in card.text
        assert f"](../{picture})" in (folder / "model" / "README.md").read_text()
        assert (folder / picture).is_file()


@pytest.mark.slow
def test_a_run_whose_result_cannot_be_pushed_has_it_all_the_same(server, recipe, tmp_path):
    server.uploads = refuse
    failed = train(server, recipe, tmp_path, "--push_to_hub", "waving", "--output_dir", "runs/kept")
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: tester/waving: ")
    assert last.endswith("; all is saved; `everest-hf push runs/kept/model tester/waving` tries again")
    assert "checkpoint not pushed: tester/waving: " in failed.stderr
    folder = recipe.parent / "runs" / "kept"
    assert EverestForVideoClassification.from_pretrained(folder / "model").config.num_labels == 2
    assert (folder / "curves.png").is_file()
    assert (folder / "model" / "README.md").is_file()
    assert server.repos["tester/waving"].messages == ["initial commit"]


# -------------------------------------------------------------------------------------------------- what is published


def test_a_run_is_published_with_its_records_and_nothing_else(online, tmp_path):
    folder = save_run(tmp_path / "run")
    (folder / "model" / "optimizer.bin").write_text("not for others")
    for checkpoint in (folder, folder / "model"):
        hub.push(checkpoint, "clips")
        files = online.repos["tester/clips"].files()
        assert set(files) == MODEL_FILES | RECORDS | {".gitattributes"}
    for name in MODEL_FILES - {"README.md"}:
        assert files[name] == (folder / "model" / name).read_bytes()
    assert files["log.jsonl"] == b"log.jsonl\n"


def test_a_checkpoint_of_a_run_is_published_with_its_records(online, tmp_path):
    folder = save_run(tmp_path / "run")
    checkpoint = shutil.copytree(folder / "model", folder / "checkpoints" / "step-00000003")
    (checkpoint / "state").mkdir()
    (checkpoint / "state" / "model.safetensors").write_text("the optimizer's copy")
    (checkpoint / "progress.json").write_text("{}")
    hub.push(checkpoint, "tester/clips")
    files = online.repos["tester/clips"].files()
    assert set(files) == MODEL_FILES | RECORDS | {".gitattributes"}
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()


def test_what_is_private_in_paths_stays_here(online, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    folder = save_run(tmp_path / "run", push_to_hub="tester/clips", val="lists/val.txt", model="/data/a/b/c")
    hub.push(folder, "tester/clips")
    files = online.repos["tester/clips"].files()
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert (recipe["train"], recipe["val"], recipe["model"]) == ("films/train.txt", "lists/val.txt", "b/c")
    assert "push_to_hub" not in recipe
    for name in set(files) - {"model.safetensors"}:
        assert b"someone" not in files[name], name
        assert str(tmp_path).encode() not in files[name], name


def test_the_card_that_is_there_is_kept_and_names_the_repository(online, tmp_path):
    folder = save_model(tmp_path / "model")
    hub.push(folder, "clips")
    made = online.repos["tester/clips"].files()["README.md"].decode()
    assert ModelCard(made).data.pipeline_tag == "video-classification"
    assert "# clips\n" in made
    assert 'name = "tester/clips"  # ' in made
    (folder / "README.md").write_text(made.replace("## Limits\n", "## Limits\n\n- It has seen nothing but clips.\n"))
    hub.push(folder, "other")
    kept = online.repos["tester/other"].files()["README.md"].decode()
    assert "It has seen nothing but clips." in kept
    assert 'name = "tester/other"  # ' in kept


def test_the_licence_of_a_folder_is_not_asked_of_the_hub(online, model, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "pushed")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    hub.push(folder, "tester/base")
    template = f"{online.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run = run_of(Recipe(train="videos", model="tester/base"), num_videos=1, total_batch=1)
    monkeypatch.chdir(tmp_path)
    assert ModelCard(make_card(model, run)).data.license == "cc-by-nc-4.0"
    save_model(tmp_path / "tester" / "base")
    online.requests.clear()
    assert ModelCard(make_card(model, run)).data.license is None
    assert not online.requests


def test_the_weights_of_the_push_before_are_gone(online, tmp_path):
    """One file of weights would be found before several."""
    folder = save_model(tmp_path / "model")
    hub.push(folder, "clips")
    model = EverestForVideoClassification.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    hub.push(folder, "clips")
    names = {name for name in online.repos["tester/clips"].files() if "safetensors" in name}
    assert len(names) > 2
    assert names == {path.name for path in folder.glob("*safetensors*")}


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("model.safetensors", "weights"),
        ("config.json", "configuration"),
        ("modeling_everest.py", "code of the model"),
        ("kernels_everest.py", "kernels_everest.py, which modeling_everest.py imports"),
        ("selection_everest.py", "selection_everest.py, which modeling_everest.py imports"),
        ("video_preprocessor_config.json", "processor"),
    ],
)
def test_half_a_checkpoint_is_refused_before_anything_is_sent(online, tmp_path, missing, what):
    folder = save_model(tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"model: has no {what}"):
        hub.push(folder, "clips")
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint folder"):
        hub.push(tmp_path / "nowhere", "clips")
    assert online.requests == []


# --------------------------------------------------------------------------------------- repositories and their rights


def test_a_branch_of_its_own_leaves_main_as_it_was(online, model, tmp_path):
    hub.push(model, "clips", message="The first")
    before = dict(online.repos["tester/clips"].files())
    url = hub.push(save_model(tmp_path / "other", seed=1), "clips", revision="seed-1", message="Another seed")
    repo = online.repos["tester/clips"]
    assert url == f"{online.url}/tester/clips/tree/seed-1"
    assert repo.files() == before
    assert repo.files("seed-1")["model.safetensors"] != before["model.safetensors"]
    assert repo.messages == ["initial commit", "The first", "Another seed"]
    hub.push(model, "clips", revision="seed-1")
    assert repo.files("seed-1")["model.safetensors"] == before["model.safetensors"]


def test_private_is_said_of_a_public_repository(online, model):
    hub.push(model, "clips")
    with pytest.raises(ValueError, match=r"tester/clips: is public already; .* --private"):
        hub.push(model, "clips", private=True)
    hub.push(model, "secret", private=True)
    hub.push(model, "secret")  # and stays private
    assert online.repos["tester/secret"].private


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, "tester/clips", "the Hub wants a token"),
        ("old", "tester/clips", "the Hub does not know the token"),
        ("x", "runs/finetune/model", "is no name of a repository; expected name or user/name"),
        ("x", "my clips", "is no name of a repository"),
        ("x", "company/clips", "no right to write there .*under company"),
        ("y", "tester/clips", "no right to write there"),
        ("x", "tester/clips@a..b", "is no name of a repository"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_nothing_is_uploaded(online, model, monkeypatch, token, repo, message):
    hub.push(model, "tester/clips")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    online.requests.clear()
    with pytest.raises(ValueError, match=message) as caught:
        hub.push(model, repo)
    assert str(caught.value).startswith(f"{repo}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert not [request for request in online.requests if "/large/" in request or "/commit/" in request]
    assert list(online.repos) == ["tester/clips"]


def test_the_command_says_it_in_one_line(online, model, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "old")
    assert cli.main(["push", str(model), "tester/clips"]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("everest-hf: error: tester/clips: the Hub does not know the token; `hf auth login`")
    assert printed.out == ""


def test_a_hub_out_of_reach_is_one_line(online, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"^clips: the Hub at http://127.0.0.1:9 cannot be reached: .*$"):
        hub.push(model, "clips")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"^clips: the Hub is out of reach while HF_HUB_OFFLINE is set$"):
        hub.push(model, "clips")


# ---------------------------------------------------------------------------------------------- uploads that break


def test_a_broken_upload_changes_nothing_and_can_be_made_again(online, model, tmp_path):
    hub.push(model, "clips")
    before = dict(online.repos["tester/clips"].files())
    other = save_model(tmp_path / "other", seed=1)
    online.uploads = refuse
    with pytest.raises(ValueError, match=r"^tester/clips: .*storage is full"):
        hub.push(other, "clips")
    assert online.repos["tester/clips"].files() == before
    online.uploads = lambda content: True
    hub.push(other, "clips")
    assert online.repos["tester/clips"].files()["model.safetensors"] == (other / "model.safetensors").read_bytes()


def test_a_connection_that_is_cut_is_tried_again(online, model):
    answers = iter([False, True])
    online.uploads = lambda content: next(answers)
    hub.push(model, "clips")
    assert online.repos["tester/clips"].files()["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert len([request for request in online.requests if "/large/" in request]) == 2


# ------------------------------------------------------------------------------------------------- while a run goes on


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Run]:
    """The folder of a run with two checkpoints, and the run."""
    folder = save_run(tmp_path / "run")
    for step in (1, 2):
        save_model(folder / "checkpoints" / f"step-{step}", seed=step)
    recipe = Recipe(train="/home/someone/films/train.txt", output_dir=str(folder))
    return folder, run_of(recipe, num_videos=10, total_batch=2)


def uploads(folder: Path, repo: str | None = "clips") -> hub.Uploads:
    return hub.Uploads(repo, folder, Accelerator(cpu=True))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_checkpoints_go_up_beside_the_training_and_the_result_at_the_end(online, trained):
    folder, run = trained
    first, second = sorted((folder / "checkpoints").iterdir())
    expected, under_way, go_on = weights(first), Event(), Event()

    def slowly(content: bytes) -> bool:
        under_way.set()
        return go_on.wait(60)

    run_uploads, online.uploads = uploads(folder), slowly
    run_uploads.start(first, run, 1)
    assert under_way.wait(60)
    shutil.rmtree(first)  # as old checkpoints go
    run_uploads.start(second, run, 2)  # one at a time
    go_on.set()
    assert run_uploads.finish(folder / "model") == f"{online.url}/tester/clips"
    repo = online.repos["tester/clips"]
    assert repo.messages == ["initial commit", "Step 1", "Result of the run"]
    early = repo.commits[list(repo.commits)[1]]
    assert early["model.safetensors"] == expected
    assert b"a run that goes on" in early["README.md"]
    assert repo.files()["model.safetensors"] == weights(folder / "model")
    assert not (folder / ".upload").exists()


def test_a_checkpoint_that_does_not_go_up_is_a_warning_and_a_result_an_error(online, trained, caplog):
    folder, run = trained
    run_uploads, online.uploads = uploads(folder), refuse
    run_uploads.start(folder / "checkpoints" / "step-1", run, 1)
    with pytest.raises(ValueError, match=r"storage is full.*; all is saved; `everest-hf push .*model tester/clips`"):
        run_uploads.finish(folder / "model")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "everest_hf.hub.publish"]
    assert warning.startswith("checkpoint not pushed: tester/clips: ")
    assert "storage is full" in warning
    assert online.repos["tester/clips"].messages == ["initial commit"]


def test_without_a_repository_nothing_is_asked_of_the_hub(online, tmp_path):
    assert not uploads(tmp_path, None).repo
    assert online.requests == []


def test_a_run_that_may_not_push_says_so_at_its_start(online, trained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "y")
    with pytest.raises(ValueError, match="tester/clips: the token has no right to write there"):
        uploads(trained[0], "tester/clips")
