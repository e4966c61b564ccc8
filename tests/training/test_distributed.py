"""Several processes, accumulated batches and shards: the run of one process with the whole batch."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.commands import FSDP2, PATIENCE, ROOT, SCRIPT, Run, free_port, log_of, train, train_on
from helpers.forgery import Evil, reseal
from helpers.tiny import TINY, tiny_config
from helpers.videos import write_class_folders
from safetensors.torch import load_file, save_file
from transformers import AutoModelForPreTraining

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.training.guard import NotFinite, Watch
from everest_hf.training.inputs import selection_noise, uniform

CLASSES = ("left", "right", "up")
MODEL = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
MODEL = {name: value for name, value in MODEL.items() if name != "num_labels"}
# Nine videos in steps of four clips: two steps an epoch, one video left out. Frame selection draws, too.
PRETRAIN = {
    "train": "videos/train",
    "val": "videos/val",
    "config": {**MODEL, "frame_oversampling": 1.5},
    "frame_step": 1,
    "epochs": 3,
    "warmup_epochs": 1,
    "batch_size": 4,
    "base_lr": 0.1,
    "clip_grad": 0.1,
    "log_every": 1,
    "num_workers": 0,
}
# Without drop path and erasing, which each process draws on its own; with selections and augmentations that draw.
FINETUNE = {
    **PRETRAIN,
    "task": "finetune",
    "config": {**MODEL, "token_selection": "random", "drop_path_rate": 0.0},
    "erasing": 0.0,
    "segments": 1,
    "crops": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos" / "train", CLASSES, 3)
    write_class_folders(folder / "videos" / "val", CLASSES, 1)
    for name, recipe in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module", params=["pretrain", "finetune"])
def whole(request, place) -> Path:
    """The run of one process with the whole batch."""
    train(f"{request.param}.yaml", "--output_dir", f"{request.param}_whole", cwd=place).check()
    return place / f"{request.param}_whole"


@pytest.fixture(scope="module")
def pretrained(place) -> Path:
    train("pretrain.yaml", "--output_dir", "pretrain_alone", cwd=place).check()
    return place / "pretrain_alone"


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """The same loss curve and the same final weights."""
    assert losses_of(one) == pytest.approx(losses_of(other), abs=tolerance)
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() < tolerance, name


# --------------------------------------------------------------------------------------------- the same run otherwise


def test_two_processes_are_one(place, whole):
    recipe, folder = f"{whole.name.split('_')[0]}.yaml", place / f"{whole.name}_two"
    for result in train_on(2, recipe, "--batch_size", 2, "--output_dir", folder, cwd=place):
        result.check()
    assert_close(folder, whole, 1e-5)


def test_accumulated_batches_are_one(place, whole):
    recipe, folder = f"{whole.name.split('_')[0]}.yaml", place / f"{whole.name}_parts"
    options = ["--batch_size", 1, "--gradient_accumulation_steps", 4, "--output_dir", folder]
    train(recipe, *options, cwd=place).check()
    assert_close(folder, whole, 1e-6)


def test_recomputed_layers_are_the_same_run(place, pretrained):
    folder = place / "recomputed"
    train("pretrain.yaml", "--gradient_checkpointing", "--output_dir", folder, cwd=place).check()
    assert_close(folder, pretrained, 1e-6)


@pytest.mark.parametrize("kind", ["alone", "zero2"])
def test_bf16_is_nearly_the_same_run(place, pretrained, kind):
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16", **sharding(kind, place)}
    folder = place / f"bf16_{kind}"
    (result,) = train_on(1, "pretrain.yaml", "--output_dir", folder, cwd=place, environment=environment)
    result.check()
    assert losses_of(folder) == pytest.approx(losses_of(pretrained), rel=0.02)
    assert losses_of(folder) != losses_of(pretrained)
    assert {w.dtype for w in load_file(folder / "model" / "model.safetensors").values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------- shards


SHARDED = ["--epochs", 2, "--save_every", 1]


def sharding(kind: str, place: Path, **settings) -> dict[str, str]:
    """What `accelerate launch` sets for "alone" (nothing), "fsdp2" or "zero1" to "zero3"; settings: of DeepSpeed."""
    if not kind.startswith("zero"):
        return {"alone": {}, "fsdp2": FSDP2}[kind]
    pytest.importorskip("deepspeed")
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    # So small a model would not be sharded at all.
    stage = {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0}
    config = {**dict.fromkeys((*automatic, "gradient_clipping"), "auto"), "zero_optimization": stage, **settings}
    path = place / f"{kind}{len(settings)}.json"
    path.write_text(json.dumps(config))
    how = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    return {**how, "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module", params=["fsdp2", "zero1", "zero3"])
def sharded(request, place) -> Path:
    """Pre-training in shards on two processes, and once more from its checkpoint before the last."""
    folder, environment = place / request.param, sharding(request.param, place)
    options = ["--batch_size", 2, "--output_dir", folder, *SHARDED, *(["--ema", 0.5] if environment is FSDP2 else [])]
    for result in train_on(2, "pretrain.yaml", *options, cwd=place, environment=environment):
        result.check()
    shutil.copy(folder / "log.jsonl", folder / "first_log.jsonl")
    (folder / "checkpoints" / "step-00000004").rename(folder / "first_end")
    for result in train_on(2, "pretrain.yaml", *options, cwd=place, environment=environment):
        result.check()
    return folder


def test_shards_train_as_one_process(place, sharded):
    folder = place / f"un{sharded.name}"
    average = ["--ema", 0.5] if sharded.name == "fsdp2" else []
    train("pretrain.yaml", "--output_dir", folder, *SHARDED, *average, cwd=place).check()
    assert_close(sharded, folder, 1e-5)


def test_a_sharded_checkpoint_loads_in_one_process(sharded):
    for folder in (sharded / "model", sharded / "first_end"):
        model, info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert isinstance(model, EverestForPreTraining)
        assert not any(info.values())
    names = {path.name for path in (sharded / "model").iterdir()}
    assert names >= {f"{name}_everest.py" for name in ("modeling", "selection", "kernels", "configuration")}
    assert names >= {"config.json", "model.safetensors"}
    assert not [name for name in names if "fsdp" in name]


def test_a_sharded_run_goes_on_to_the_same_end(sharded):
    first, again = (
        [json.loads(line) for line in (sharded / name).read_text().splitlines()]
        for name in ("first_log.jsonl", "log.jsonl")
    )
    assert [line.get("loss", line.get("val_loss")) for line in again] == pytest.approx(
        [line.get("loss", line.get("val_loss")) for line in first], abs=1e-7
    )
    one, other = (load_file(sharded / name / "model.safetensors") for name in ("first_end", "model"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_nothing_in_a_sharded_checkpoint_is_executed(place, sharded, tmp_path):
    """Each of the files that torch.distributed and DeepSpeed read as pickles, forged in turn."""
    environment, trace = sharding(sharded.name, place), tmp_path / "was executed"
    forged = {
        "fsdp2": ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"],
        "zero1": ["pytorch_model/mp_rank_00_model_states.pt"],
        "zero3": ["pytorch_model/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    }
    for number, name in enumerate(forged[sharded.name]):
        folder = tmp_path / str(number)
        (folder / "checkpoints").mkdir(parents=True)
        checkpoint = folder / "checkpoints" / "step-00000002"
        shutil.copytree(sharded / "checkpoints" / "step-00000002", checkpoint)
        path = checkpoint / "state" / name
        assert path.is_file()
        (torch.save if path.suffix == ".pt" else dump)(Evil(trace), path)
        reseal(checkpoint)
        options = ["--batch_size", 2, "--output_dir", folder, *SHARDED]
        average = ["--ema", 0.5] if environment is FSDP2 else []
        results = train_on(2, "pretrain.yaml", *options, *average, cwd=place, environment=environment)
        assert [result.returncode for result in results] == [1, 1], results
        assert not trace.exists()
        errors = [line for result in results for line in result.stderr.splitlines() if line.startswith("error:")]
        assert [
            error for error in errors if "is not loaded: it holds more than tensors and numbers" in error
        ] == errors
        assert len(errors) == 1


def dump(value, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.slow
def test_deepspeed_evaluates_and_accumulates_as_one_process(place):
    alone, folder = place / "finetune_alone", place / "finetune_zero3"
    train("finetune.yaml", "--output_dir", alone, cwd=place).check()
    options = ["--batch_size", 1, "--gradient_accumulation_steps", 2, "--output_dir", folder]
    environment = sharding("zero3", place)
    for result in train_on(2, "finetune.yaml", *options, cwd=place, environment=environment):
        result.check()
    assert_close(folder, alone, 1e-5)
    for result in train_on(2, "finetune.yaml", *options, "--eval_only", cwd=place, environment=environment):
        result.check()
    figures = [json.loads((where / "figures.json").read_text()) for where in (alone, folder, folder / "evaluation")]
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.slow
def test_the_recipe_for_deepspeed_runs_as_two_machines(place, pretrained):
    """Two launchers on this one, each with its process."""
    pytest.importorskip("deepspeed")
    folder, settings = place / "machines", ROOT / "recipes" / "multinode" / "accelerate-deepspeed.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings, "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port())]
    run = [SCRIPT, "pretrain.yaml", "--batch_size", "2", "--output_dir", folder]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    machines = [
        subprocess.Popen([*launcher, "--machine_rank", rank, *run], env=environment, cwd=place) for rank in "01"
    ]
    assert [machine.wait(PATIENCE) for machine in machines] == [0, 0]
    assert losses_of(folder) == pytest.approx(losses_of(pretrained), rel=0.02)


def test_a_full_disk_ends_all_processes_of_deepspeed(place):
    options = ["--batch_size", 2, "--output_dir", "full", "--save_every", 1]
    environment = sharding("zero1", place)
    results = train_on(2, "pretrain.yaml", *options, cwd=place, environment=environment, largest_file=200_000)
    assert 0 not in [result.returncode for result in results]
    assert any("error: cannot write checkpoint" in result.stderr for result in results)
    assert not list((place / "full" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("settings", "precision", "options", "message"),
    [
        (
            {"gradient_clipping": 1.0},
            "no",
            [],
            "clip_grad of the recipe is 0.1, gradient_clipping in the configuration",
        ),
        ({"gradient_accumulation_steps": 2}, "no", [], "gradient_accumulation_steps of the recipe is 1, "),
        ({}, "no", ["--ema", 0.5], "ema is not offered with DeepSpeed"),
        ({}, "fp16", [], "mixed_precision is fp16, which CPUs do not have; it must be bf16 or no"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_said_first(place, settings, precision, options, message):
    environment = sharding("zero2", place, **settings)
    environment |= {"ACCELERATE_MIXED_PRECISION": precision}
    (result,) = train_on(1, "pretrain.yaml", *options, "--output_dir", "no", cwd=place, environment=environment)
    assert result.returncode == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert message in error
    assert not (place / "no").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="its processes would run on the GPU")
def test_processes_without_devices_do_not_run_each_alone(place):
    environment = {"ACCELERATE_USE_CPU": "false"}
    results = train_on(2, "pretrain.yaml", "--output_dir", "no", cwd=place, environment=environment)
    assert [result.returncode for result in results] == [1, 1]
    # One that comes late may find the other gone.
    errors = [result.stderr.splitlines()[-1] for result in results]
    wanted = "error: 2 processes were launched, and there is no GPU for them; on CPUs set"
    assert any(error.startswith(wanted) for error in errors)


def test_fp16_on_a_cpu_is_refused(place):
    environment = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    (result,) = train_on(1, "pretrain.yaml", "--output_dir", "no", cwd=place, environment=environment)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: mixed_precision is fp16, which CPUs do not have")


# --------------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize(("processes", "kind"), [(1, "alone"), (2, "alone"), (2, "zero3")])
def test_a_diverging_run_stops_in_its_step(place, processes, kind):
    """An absurd learning rate: the second step's weights overflow, and no checkpoint has them."""
    folder = place / f"diverged_{processes}_{kind}"
    options = ["--base_lr", 1e30, "--min_lr", 0, "--warmup_epochs", 0.5, "--clip_grad", 0, "--save_every", 0.5]
    options += ["--batch_size", 4 // processes, "--output_dir", folder, "--log_every", 100]
    results = train_on(processes, "pretrain.yaml", *options, cwd=place, environment=sharding(kind, place))
    assert [result.returncode for result in results] == [1] * processes, results
    errors = [line for result in results for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, errors
    assert "Traceback" not in results[0].stderr + results[-1].stderr
    (kept,) = (folder / "checkpoints").glob("step-*")
    assert kept.name == "step-00000001"  # its learning rate was 0
    assert all(weight.isfinite().all() for weight in load_file(kept / "model.safetensors").values())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_names_its_step(place, pretrained, processes):
    """A weight of the checkpoint that the run starts from is not a number."""
    poisoned = place / f"poisoned_{processes}"
    model = EverestForPreTraining.from_pretrained(pretrained / "model")
    model.save_pretrained(poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["decoder.mask_token"][:] = torch.nan
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    options = ["--model", poisoned, "--batch_size", 4 // processes, "--output_dir", f"not_finite_{processes}"]
    results = train_on(processes, "pretrain.yaml", *options, cwd=place)
    assert [result.returncode for result in results] == [1] * processes, results
    (error,) = [line for result in results for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "step 1 is not finite: loss nan, gradient norm nan, learning rate 0;" in error
    assert sum(error.count(f"{name}_{i}.mp4") for name in CLASSES for i in range(3)) == 4  # the clips of the step
    assert "Traceback" not in results[0].stderr + results[-1].stderr
    assert not list((place / f"not_finite_{processes}" / "checkpoints").glob("*"))


def watch_of(lag: int) -> Watch:
    """A watch that reads a step's figures `lag` steps later: 0 on a CPU, 1 on a GPU."""
    watch = Watch(Accelerator(cpu=True), lambda indices: [f"clip {i}" for i in indices], lambda: "All is lost")
    watch._lag = lag
    return watch


def end_step(watch: Watch, number: int, losses: list[float], grad_norm: float = 1.0) -> float:
    for i, loss in enumerate(losses):
        watch.add_batch(torch.tensor(loss), torch.tensor([10 * number + i]))
    return watch.end_step(number, 0.5, torch.tensor(grad_norm)).item()


def test_figures_that_are_read_a_step_later_name_their_own_step():
    watch = watch_of(lag=1)
    assert end_step(watch, 1, [1.0, 2.0]) == 1.5
    end_step(watch, 2, [1.0, math.inf])
    message = "step 2 is not finite: loss inf, gradient norm 1, learning rate 0.5; clips of clip 20, clip 21"
    with pytest.raises(NotFinite, match=message):
        end_step(watch, 3, [1.0])


def test_nothing_is_saved_before_all_figures_were_read():
    watch = watch_of(lag=1)
    end_step(watch, 1, [1.0], grad_norm=math.nan)
    with pytest.raises(NotFinite, match="step 1 is not finite: loss 1, gradient norm nan"):
        watch.settle()


def test_a_gradient_that_overflowed_in_fp16_is_the_scalers_business():
    watch = watch_of(lag=0)
    watch.accelerator.scaler = torch.amp.GradScaler("cpu")
    end_step(watch, 1, [1.0], grad_norm=math.inf)
    with pytest.raises(NotFinite):
        end_step(watch, 2, [math.nan], grad_norm=math.inf)


FIRST_SCALE = 2**23


def run_in_fp16(place: Path, folder: Path) -> None:
    options = ["--output_dir", folder, "--save_every", 0.5, "--keep_checkpoints", 9]
    script = ROOT / "tests" / "helpers" / "scaled.py"
    Run(FIRST_SCALE, "pretrain.yaml", *options, cwd=place, script=script).wait().check()


def test_fp16_leaves_out_what_overflowed_and_goes_on_with_its_scale(place):
    """At such a scale the first steps overflow: each halves it and leaves the weights as they are."""
    folder = place / "fp16"
    run_in_fp16(place, folder)
    lines, steps = log_of(folder), sorted((folder / "checkpoints").iterdir())
    overflowed = [line["grad_norm"] is None for line in lines if "loss" in line]
    assert overflowed[:4] == [True, True, True, False]
    scales = [FIRST_SCALE, *(torch.load(step / "state" / "scaler.pt")["scale"] for step in steps)]
    assert [after < before for before, after in pairwise(scales)] == overflowed
    weights = [load_file(step / "model.safetensors")["decoder.mask_token"] for step in steps]
    assert [torch.equal(before, after) for before, after in pairwise(weights)] == overflowed[1:]
    for step in steps[3:]:
        shutil.rmtree(step)
    run_in_fp16(place, folder)
    assert log_of(folder) == lines
    assert torch.equal(load_file(folder / "model" / "model.safetensors")["decoder.mask_token"], weights[-1])


# ------------------------------------------------------------------------------------------- the draws of the selection


def splitmix64(seed: int, count: int) -> list[int]:
    """The first numbers of the generator, with Python's integers."""
    numbers = []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def test_uniform_is_splitmix64():
    seeds = [0, 1, 1234567, 2**63 - 1]
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # the published test vector
    wanted = [[(z >> 40) / 2**24 for z in splitmix64(seed, 5)] for seed in seeds]
    assert uniform(torch.tensor(seeds), 5).tolist() == wanted


def test_uniform_is_uniform():
    draws = uniform(torch.arange(200) * 977, 1000).numpy()
    assert 0 <= draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert abs(counts / draws.size - 0.05).max() < 0.003  # five standard deviations
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.015  # neighbouring seeds


@pytest.mark.parametrize("selection", ["motion", "random", "tube"])
@pytest.mark.parametrize("oversampling", [1.0, 1.5])
@pytest.mark.parametrize("pretraining", [True, False])
def test_a_clip_draws_by_its_seed_alone(selection, oversampling, pretraining):
    """In another batch and at another place it keeps its tokens; with another seed it has others."""
    config = tiny_config(token_selection=selection, frame_oversampling=oversampling)
    torch.manual_seed(0)
    model = (EverestForPreTraining if pretraining else EverestForVideoClassification)(config).train()
    clip = torch.rand(1, config.num_input_frames, 3, *config.frame_size)

    def tokens(seeds: list[int]) -> torch.Tensor:
        noise = selection_noise(torch.tensor(seeds), config, pretraining=pretraining)
        output = model(clip.expand(len(seeds), -1, -1, -1, -1), **noise)
        return output.visible_ids if pretraining else output.kept_ids

    ids = tokens([5, 6, 7])
    assert torch.equal(tokens([8, 7]), torch.stack([tokens([8])[0], ids[2]]))
    draws = pretraining or selection != "motion" or oversampling > 1
    assert torch.equal(ids[0], ids[1]) != draws
    assert draws == bool(selection_noise(torch.tensor([5]), config, pretraining=pretraining))


@pytest.mark.slow
def test_an_error_on_one_process_alone_ends_all_with_one_line(place, tmp_path):
    """The second process is where the videos are not."""
    shutil.copy(place / "pretrain.yaml", tmp_path)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Run(
            "pretrain.yaml",
            "--output_dir",
            place / "apart",
            cwd=cwd,
            environment={**shared, "RANK": i, "LOCAL_RANK": i},
        )
        for i, cwd in zip("01", (place, tmp_path), strict=True)
    ]
    first, second = (rank.wait() for rank in ranks)
    assert (first.returncode, second.returncode) == (1, 1)
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: videos/train: no file or folder here")
    assert "Traceback" not in first.stderr + second.stderr
    assert "error: " not in second.stderr
