"""Model cards: what they claim comes from the run, and the Hub can read their metadata."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from helpers.runs import run_of
from helpers.tiny import tiny_config
from helpers.videos import write_clip
from huggingface_hub import ModelCard

from everest_hf import (
    EverestForPreTraining,
    EverestForVideoClassification,
    EverestModel,
    EverestVideoProcessor,
)
from everest_hf.cost import operations_counter
from everest_hf.hub import card
from everest_hf.hub.card import make_card, named_for_hub, public_path, write_card
from everest_hf.training.accelerator import hardware_of
from everest_hf.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
FIGURES = {"val_loss": 0.51234, "val_top1": 0.875, "val_top5": 1.0, "val_mean_class_accuracy": 0.84}


def save(folder: Path, model_class=EverestForVideoClassification, **overrides) -> Path:
    model_class(tiny_config(num_hidden_layers=1, **overrides)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("classifier") / "model")


def facts(task: str = "finetune", figures=FIGURES, **options) -> dict:
    """What `make_card` takes of a run of 60 epochs with 5 x 3 views of val, whose lists lie in someone's home."""
    options = {"train": "/home/someone/films/train.txt", "val": "val.txt", "epochs": 60, **options}
    recipe = load_recipe(None, {"task": task, "output_dir": "runs/waving", **options})
    val = None if recipe.val is None else Dataset.from_dict({"video": ["clip.mp4"] * 56})
    run = run_of(recipe, val=val, hardware="2 × TPU, bf16", num_videos=1234, total_batch=32)
    return {"run": run, "steps": 777, "figures": figures}


def rows_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.MULTILINE))


# ------------------------------------------------------------------------------------------------- what a run measured


def test_a_card_holds_what_the_run_measured_and_how(classifier):
    text = make_card(classifier, **facts())
    rows = rows_of(text)
    assert rows["top-1 accuracy"] == "0.875"
    assert rows["loss"] == "0.5123"
    assert rows["mean accuracy over the classes"] == "0.84"
    assert rows["training videos"] == "1,234 of `films/train.txt`"
    assert rows["held-out videos"] == "56 of `val.txt`"
    assert rows["steps"] == "777 of 32 clips"
    assert rows["hardware"] == "2 × TPU, bf16"
    assert rows["started from"] == "random weights"
    assert f"torch {torch.__version__}" in rows["software"]
    assert "On the held-out videos, 5 × 3 views of each (segments × crops), scores averaged:" in text
    assert "27 of a clip's 60 tokens (`keep_ratio` 0.45, `token_selection` motion)" in text
    assert "someone" not in text


def test_a_card_holds_the_values_of_the_recipe_that_differ(classifier):
    options = {"base_lr": 0.02, "flip": False, "layer_decay": 0.75, "config": {"keep_ratio": 0.45}}
    text = make_card(classifier, **facts(**options))
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    config = {"drop_path_rate": 0.1, "keep_ratio": 0.45}
    assert yaml.safe_load(block) == {"epochs": 60, "base_lr": 0.02, "flip": False, "config": config}


def test_the_figures_are_in_the_metadata_that_the_hub_reads(classifier):
    data = ModelCard(make_card(classifier, **facts())).data
    assert data.pipeline_tag == "video-classification"
    assert (data.library_name, data.license) == ("transformers", "apache-2.0")
    assert {"video", "everest"} <= set(data.tags)
    assert data.model_name == "waving"
    results = {result.metric_name.split(",")[0]: result for result in data.eval_results}
    assert [result.metric_value for result in results.values()] == list(FIGURES.values())
    top1 = results["top-1 accuracy"]
    assert (top1.task_type, top1.metric_type) == ("video-classification", "accuracy")
    assert top1.dataset_name == "val.txt"
    assert "5 × 3 views" in top1.metric_name


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (facts(figures={}, val=None), "No videos were held out, so nothing was measured."),
        (facts(figures=None), "This is a checkpoint of a run that goes on"),
    ],
)
def test_what_was_not_measured_is_not_claimed(classifier, run, words):
    text = make_card(classifier, **run)
    assert words in text
    assert "accuracy" not in text
    assert "model-index" not in ModelCard(text).data.to_dict()
    assert "model_name" not in ModelCard(text).data.to_dict()


def test_without_a_run_a_card_tells_the_configuration_alone(classifier):
    text = make_card(classifier, name="waving")
    assert "\n# waving\n" in text
    assert "27 of a clip's 60 tokens" in text
    for word in ("Training", "Evaluation", "hardware", "license:"):
        assert word not in text
    assert "The licence of the weights has not been named." in text


def test_a_card_of_pretraining_claims_no_classifier(tmp_path):
    folder = save(tmp_path / "model", EverestForPreTraining)
    text = make_card(folder, **facts("pretrain", {"val_loss": 0.4}, config={"mask_ratio": 0.85}))
    data = ModelCard(text).data
    assert data.pipeline_tag is None
    assert data.eval_results[0].task_type != "video-classification"
    assert "sees 9 of a clip's 60 tokens and predicts 15 (`mask_ratio` 0.85, `pretraining_keep_ratio` 0.4" in text
    assert "On the held-out videos, the centre clip of each:" in text
    assert "AutoModelForVideoClassification" not in text


# --------------------------------------------------------------------------------------------------- where it is from


def test_weights_that_come_from_others_keep_their_licence(classifier, tmp_path):
    source = save(tmp_path / "source")
    assert ModelCard(make_card(classifier, **facts(model=str(source)))).data.license is None
    assert "`source`" not in make_card(classifier, **facts(model=None))
    text = make_card(source).replace("---\nlibrary_name", "---\nlicense: cc-by-nc-4.0\nlibrary_name", 1)
    (source / "README.md").write_text(text)
    filled = make_card(classifier, **facts(model=str(source)))
    assert ModelCard(filled).data.license == "cc-by-nc-4.0"
    assert "Weights: cc-by-nc-4.0." in filled


def test_names_on_the_hub_are_metadata(classifier):
    """Nobody can be asked for the licence here: it is not claimed."""
    text = make_card(classifier, **facts(model="MCG-NJU/videomae-base", train="someone/waving:small"))
    data = ModelCard(text).data
    assert data.datasets == ["someone/waving"]
    assert rows_of(text)["training videos"] == "1,234 of `someone/waving`"
    assert (data.base_model, data.license) == ("MCG-NJU/videomae-base", None)
    assert rows_of(text)["started from"] == "`MCG-NJU/videomae-base`"
    assert "The weights come from `MCG-NJU/videomae-base`, whose licence holds for them too." in text


def test_paths_are_for_everyone_to_read(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = {
        "data/train.txt": "data/train.txt",
        "/home/someone/films/a/train.txt": "films/a/train.txt",
        "/srv/secret/ucf101/train.txt": "ucf101/train.txt",
        "/videos": "videos",
    }
    assert {path: public_path(path) for path in paths} == paths


# ------------------------------------------------------------------------------------------------------- the template


def test_the_template_is_the_card_of_the_project():
    template = ModelCard.load(ROOT / "model_card.md")
    assert template.data.pipeline_tag == "video-classification"
    assert template.data.license == "apache-2.0"
    assert template.data.eval_results is None
    assert "No trained weights come with the project" in template.text
    assert card.TEMPLATE.read_text() == (ROOT / "model_card.md").read_text()


@pytest.mark.parametrize("model_class", [EverestModel, EverestForPreTraining, EverestForVideoClassification])
def test_every_part_of_the_template_is_filled(model_class, tmp_path):
    text = make_card(save(tmp_path, model_class), **facts())
    assert "<!--" not in text
    assert "project's own" not in text
    for said in ("2211.10636", "2203.12602", "hwang2024everest", "## Limits", "## Bias", "## Licence"):
        assert said in text


def test_the_example_of_a_card_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("clip.mp4")
    for model_class in (EverestModel, EverestForPreTraining, EverestForVideoClassification):
        folder = Path("runs") / model_class.__name__
        EverestVideoProcessor.from_config(tiny_config()).save_pretrained(save(folder, model_class))
        (example,) = re.findall(r"```python\n(.*?)```", write_card(folder).read_text(), re.DOTALL)
        exec(compile(example, str(folder), "exec"), {})


def test_the_example_names_the_repository(classifier):
    text = named_for_hub(make_card(classifier), "someone/waving")
    assert 'name = "someone/waving"  # a folder, or a repository on the Hub\nmodel = ' in text


def test_another_model_gets_no_card(tmp_path):
    folder = save(tmp_path)
    config = (folder / "config.json").read_text().replace("EverestForVideoClassification", "BertModel")
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match="is a checkpoint of BertModel, not of EVEREST"):
        make_card(folder)


@pytest.mark.parametrize("model_class", [EverestForPreTraining, EverestForVideoClassification])
def test_the_cost_of_a_clip_is_what_the_model_computes(model_class, tmp_path):
    folder = save(tmp_path, model_class)
    model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
    # A pass of pre-training is one with gradients, which embeds the kept tokens again.
    with operations_counter() as counter, torch.set_grad_enabled(model_class is EverestForPreTraining):
        model(torch.randn(1, 12, 3, 24, 40))
    told = re.search(r"A forward pass of a clip takes (\S+) GFLOPs", make_card(folder))[1]
    assert float(told) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)


def test_hardware_is_told_in_words():
    assert re.fullmatch(r"1 process on \d+ CPU cores \(\w+\), fp32", hardware_of(Accelerator(cpu=True)))
