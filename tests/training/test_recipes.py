"""The recipes of the project: their values, their dry runs on data of their shape, and short runs of some of them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from helpers.commands import train, train_on
from helpers.tiny import TINY, tiny_config
from helpers.videos import write_clip, write_list
from safetensors.torch import load_file

from everest_hf import EverestConfig, EverestForPreTraining, modeling_everest
from everest_hf.cost import training_memory
from everest_hf.training.dry_run import describe
from everest_hf.training.options import parse_command_line
from everest_hf.training.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = {str(path.relative_to(FOLDER).with_suffix("")): path for path in sorted(FOLDER.rglob("*.yaml"))}
ACCELERATE = {name: FILES.pop(name) for name in list(FILES) if "/accelerate" in name}
DATA_SETS = {name: path for name, path in FILES.items() if not name.startswith("quickstart")}
UNPUBLISHED = ("kinetics400", "ssv2", "ego4d_oscc", "multinode")
# Processes that a recipe is meant for, clips of a step, epochs (method: recipes of the release; VideoMAE's).
MEANT_FOR = {
    "ucf101/pretrain": (8, 192, 3200),
    "ucf101/finetune": (8, 128, 100),
    "hmdb51/pretrain": (8, 192, 4800),
    "hmdb51/finetune": (8, 128, 50),
    "kinetics400/pretrain": (8, 192, 800),
    "kinetics400/finetune": (8, 128, 100),
    "ssv2/pretrain": (8, 192, 800),
    "ssv2/finetune": (8, 128, 50),
    "ego4d_oscc/pretrain": (8, 192, 800),
    "ego4d_oscc/finetune": (8, 128, 50),
    "gpu24gb/pretrain": (1, 192, 3200),
    "gpu24gb/finetune": (1, 128, 100),
    "multinode/pretrain": (16, 192, 800),
    "multinode/finetune": (16, 128, 50),
    "probe": (8, 256, 50),
}
SHRUNK = [
    *(f"{name}={json.dumps(value)}" for name, value in TINY.items() if name != "num_labels"),
    "num_hidden_layers=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with lists that the recipes take, of a few videos named again and again, and a pre-trained encoder."""
    folder = tmp_path_factory.mktemp("place")
    videos = [write_clip(folder / "data" / f"{i}.mp4", num_frames=70, seed=i).name for i in range(4)]
    write_list(folder / "data" / "train.txt", [(videos[i % 4], i % 2) for i in range(200)])
    write_list(folder / "data" / "few.txt", [(videos[i], i % 2) for i in range(4)])
    write_list(folder / "data" / "val.txt", [(videos[i], i % 2) for i in range(2)])
    torch.manual_seed(0)
    EverestForPreTraining(tiny_config(num_hidden_layers=1)).save_pretrained(folder / "encoder")
    return folder


def own_values(name: str) -> dict:
    """What a recipe's file says, as it is read."""
    values = yaml.safe_load(FILES[name].read_text())
    recipe = load_recipe(FILES[name], {"train": values.get("train", "any")})
    return {key: getattr(recipe, key) for key in values}


# ------------------------------------------------------------------ what they hold


def test_every_recipe_is_looked_at_here():
    assert DATA_SETS.keys() == MEANT_FOR.keys()
    assert set(ACCELERATE) == {"gpu24gb/accelerate", "multinode/accelerate", "multinode/accelerate-deepspeed"}


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_holds_only_what_differs_from_the_defaults(name):
    values = own_values(name)
    default = load_recipe(None, {"task": values.pop("task"), "train": "any"})
    config = {**EverestConfig().to_dict(), **default.config}
    for field, value in yaml.safe_load(FILES[name].read_text()).get("config", {}).items():
        assert value != config[field], field
    values.pop("config", None)
    assert [field for field, value in values.items() if value == getattr(default, field)] == []


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_total_batch_and_the_command_are_as_the_comment_says(name):
    processes, total, epochs = MEANT_FOR[name]
    recipe, text = load_recipe(FILES[name]), FILES[name].read_text()
    clips = recipe.batch_size * recipe.gradient_accumulation_steps * recipe.num_sample
    assert (processes * clips, recipe.epochs) == (total, epochs)
    assert f"{total} clips" in text
    assert "accelerate launch" in text
    assert f"recipes/{name}.yaml" in text
    assert (name.split("/")[0] in UNPUBLISHED) == (
        "nobody has verified" in " ".join(text.replace("#", "").split()).lower()
    )


def test_fine_tuning_and_probing_start_from_what_pretraining_leaves():
    for name in DATA_SETS:
        recipe = load_recipe(FILES[name])
        if recipe.has_labels:
            before = load_recipe(FILES["ucf101/pretrain" if name == "probe" else name.replace("finetune", "pretrain")])
            assert recipe.model == f"{before.output_dir}/model"
            assert recipe.train == before.train
    assert len({load_recipe(path).output_dir for path in DATA_SETS.values()}) == len(DATA_SETS)


def test_the_values_of_the_release():
    pretrain, finetune = (load_recipe(FILES[f"ucf101/{task}"]) for task in ("pretrain", "finetune"))
    assert (pretrain.base_lr, pretrain.min_lr, pretrain.warmup_epochs) == (1e-3, 1e-5, 40)
    assert (pretrain.betas, pretrain.weight_decay, pretrain.clip_grad) == ([0.9, 0.95], 0.05, 0)
    assert (pretrain.crop_scale, pretrain.flip, pretrain.frame_step) == ([1, 0.875, 0.75, 0.66], False, 4)
    assert (finetune.base_lr, finetune.min_lr, finetune.warmup_epochs) == (1e-3, 1e-6, 5)
    assert (finetune.betas, finetune.weight_decay, finetune.layer_decay) == ([0.9, 0.999], 0.05, 0.75)
    assert (finetune.rand_augment, finetune.erasing, finetune.label_smoothing) == (7, 0.25, 0.1)
    assert (finetune.mixup, finetune.cutmix, finetune.config) == (0, 0, {"drop_path_rate": 0.1})
    assert (finetune.crop_scale, finetune.flip, finetune.frame_step) == ([0.08, 1], True, 4)
    hmdb51 = load_recipe(FILES["hmdb51/finetune"])
    assert (finetune.segments, finetune.crops) == (5, 3)
    assert (hmdb51.segments, hmdb51.crops, hmdb51.frame_step) == (10, 3, 2)
    assert load_recipe(FILES["hmdb51/pretrain"]).frame_step == 2
    ssv2 = load_recipe(FILES["ssv2/finetune"])
    assert (ssv2.frame_sampling, ssv2.flip, ssv2.segments, ssv2.crops) == ("segment", False, 2, 3)


# ------------------------------------------------------------------ dry runs


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_dry_run_of_every_recipe(place, monkeypatch, name):
    monkeypatch.chdir(place)
    arguments = [str(FILES[name]), "--dry_run", "--train", "data/train.txt", "--output_dir", "dry"]
    if load_recipe(FILES[name]).has_labels:
        arguments += ["--val", "data/val.txt", "--model", "encoder"]  # of another size, as nothing depends on it
    recipe = load_recipe(*parse_command_line(arguments))
    text = describe(recipe, Accelerator())
    processes, total, _ = MEANT_FOR[name]
    assert f"{total // processes} clips = 1 processes" in text
    assert text.endswith("nothing was trained or written")
    assert not (place / "dry").exists()
    if not recipe.has_labels:
        assert f" {'653.1' if name.startswith('multinode') else '94.21'} M parameters" in text


# ------------------------------------------------------------------ short runs


@pytest.mark.parametrize("name", ["gpu24gb/pretrain", "ssv2/finetune", "multinode/finetune", "probe"])
def test_two_steps_of_a_recipe(place, name):
    recipe = load_recipe(FILES[name])
    batch = 2 // recipe.gradient_accumulation_steps
    arguments = ["--train", "data/few.txt", "--output_dir", f"runs/{name}", "--num_workers", 1]
    arguments += ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", batch, "--log_every", 1, "--save_every", 1]
    if recipe.has_labels:
        arguments += ["--val", "data/val.txt", "--model", "encoder"]
    else:
        arguments += ["--config", *SHRUNK]
    train(FILES[name], *arguments, cwd=place).check()
    lines = [json.loads(line) for line in (place / "runs" / name / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert ("val_top1" in lines[-1]) == recipe.has_labels
    assert (place / "runs" / name / "model" / "model.safetensors").exists()


def test_a_new_head_learns_on_all_processes_of_a_sharded_run(place):
    """Accelerate's launcher asks for weights to be loaded by the first process alone, where nobody says otherwise."""
    sharding = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    sharding |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    arguments = ["--train", "data/four.txt", "--val", "data/val.txt", "--model", "encoder", "--num_workers", 1]
    arguments += ["--epochs", 2, "--warmup_epochs", 0, "--batch_size", 2, "--base_lr", 0.1]
    # Four classes: two of them are the second process's.
    write_list(place / "data" / "four.txt", [(f"{i}.mp4", i) for i in range(4)])
    for result in train_on(2, FILES["probe"], *arguments, cwd=place, environment=sharding):
        result.check()
    saved = load_file(place / "runs" / "ucf101" / "probe" / "model" / "model.safetensors")
    assert (saved["classifier.bias"] != 0).all()
    assert torch.isfinite(saved["classifier.weight"]).all()


# ------------------------------------------------------------------ Accelerate's settings


def test_the_settings_for_one_gpu_fit_into_it():
    settings = load_config_from_file(str(ACCELERATE["gpu24gb/accelerate"]))
    assert (settings.distributed_type, settings.num_processes, settings.mixed_precision) == ("NO", 1, "bf16")
    for task in ("pretrain", "finetune"):
        recipe = load_recipe(FILES[f"gpu24gb/{task}"])
        memory = training_memory(EverestConfig(), task, recipe.batch_size, mixed_precision=settings.mixed_precision)
        assert memory.total < 0.7 * 24e9
        assert f"expects {memory.total / 2**30:.0f} GiB" in FILES[f"gpu24gb/{task}"].read_text()


def test_the_settings_for_several_machines_are_fsdp2_over_the_layers():
    settings = load_config_from_file(str(ACCELERATE["multinode/accelerate"]))
    assert (settings.distributed_type, settings.num_machines, settings.num_processes) == ("FSDP", 2, 16)
    assert settings.fsdp_config["fsdp_version"] == 2
    layer = settings.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert issubclass(getattr(modeling_everest, layer), torch.nn.Module)
    assert layer in modeling_everest.EverestPreTrainedModel._no_split_modules
