"""What a GPU changes: nothing but speed. Left out where there is none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import send_to_device
from helpers.commands import PATIENCE, ROOT, SCRIPT, log_of, train
from helpers.tiny import TINY, tiny_config
from helpers.videos import write_class_folders
from safetensors.torch import load_file
from torch import nn

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification
from everest_hf.cost import training_memory
from everest_hf.evaluation.report import FIGURES
from everest_hf.kernels_everest import split_linear, splits_products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
MODELS = (EverestForPreTraining, EverestForVideoClassification)
SMALL = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 1536}


def moving_clips(config: EverestConfig, batch_size: int, seed: int = 0) -> torch.Tensor:
    """Clips of smooth blobs of which a part moves, with little noise, so that tokens differ in how informative they are."""
    generator = torch.Generator().manual_seed(seed)
    height, width = config.frame_size
    clips = torch.randn(batch_size, 1, 3, height, width, generator=generator).repeat(
        1, config.num_input_frames, 1, 1, 1
    )
    for t in range(config.num_input_frames):
        clips[:, t, :, : height // 2] = clips[:, t, :, : height // 2].roll(t, dims=-1)
    return clips + 0.05 * torch.randn(clips.shape, generator=generator)


def inputs_of(model: nn.Module, batch_size: int = 4) -> dict[str, torch.Tensor]:
    inputs = {"pixel_values": moving_clips(model.config, batch_size)}
    if isinstance(model, EverestForVideoClassification):
        inputs["labels"] = torch.arange(batch_size) % model.config.num_labels
    return inputs


def build(model_class, config: EverestConfig) -> nn.Module:
    torch.manual_seed(0)
    return model_class(config).eval()


# ------------------------------------------------------------------------------------------------------------ model


@pytest.mark.skipif(not splits_products(GPU), reason="needs matrix units for bf16")
def test_three_products_in_16_bits_give_one_in_32():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 50, 1536), (768, 1536)))
    exact = x.double() @ weight.double().T
    error = (split_linear(x.to(GPU), weight.to(GPU)).cpu().double() - exact).norm() / exact.norm()
    assert error < 3e-5
    assert (x.bfloat16().double() @ weight.bfloat16().double().T - exact).norm() / exact.norm() > 1e-3


@pytest.mark.parametrize("oversampling", [1.0, 1.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_tokens_are_those_of_a_cpu(autocast, oversampling):
    config = EverestConfig(**SMALL, frame_oversampling=oversampling)
    model, clips = build(EverestForVideoClassification, config), moving_clips(config, 4)
    with torch.no_grad():
        here = model(clips, output_scores=True)
        model.to(GPU)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            there = model(clips.to(GPU), output_scores=True)
    torch.testing.assert_close(there.scores.cpu(), here.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(there.kept_ids.cpu(), here.kept_ids)
    if oversampling > 1:
        assert torch.equal(there.slots.cpu(), here.slots)
    tolerance = 0.02 if autocast else 1e-4
    assert (there.logits.cpu() - here.logits).norm() < tolerance * here.logits.norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_class", MODELS)
def test_loss_and_gradients_are_those_of_a_cpu(model_class, attention):
    model = build(model_class, tiny_config(attn_implementation=attention))
    losses, gradients = [], []
    for device in ("cpu", GPU):
        model.to(device).zero_grad()
        loss = model(**send_to_device(inputs_of(model), device)).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([weight.grad.flatten().cpu() for weight in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()


@pytest.mark.parametrize("model_class", MODELS)
def test_a_compiled_step_is_one_graph_and_gives_the_loss_of_the_eager_one(model_class):
    model = build(model_class, EverestConfig(**SMALL)).to(GPU)
    inputs = send_to_device(inputs_of(model), GPU)
    with torch.autocast("cuda", torch.bfloat16):
        eager = model(**inputs).loss
        compiled = torch.compile(model, fullgraph=True, dynamic=False)(**inputs).loss
    compiled.backward()
    assert compiled.item() == pytest.approx(eager.item(), rel=0.01)


# ---------------------------------------------------------------------------------------------------- packed tokens

SHARED = {"token_budget": "batch", "attn_implementation": "sdpa", "problem_type": "single_label_classification"}


def unequal(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Let each clip of a step's inputs change more than the one before."""
    clips = inputs["pixel_values"]
    factors = torch.linspace(0.1, 1, len(clips), device=clips.device).view(-1, 1, 1, 1, 1)
    return {**inputs, "pixel_values": clips[:, :1] + factors * (clips - clips[:, :1])}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_packed_tokens_give_loss_and_gradients_of_a_cpu(attention, autocast):
    model = build(EverestForVideoClassification, EverestConfig(**SMALL, **SHARED)).train()
    inputs, losses, gradients = unequal(inputs_of(model)), [], []
    for device, name in (("cpu", "sdpa"), (GPU, attention)):
        model.to(device).zero_grad()
        model.config._attn_implementation = name
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = model(**send_to_device(inputs, device))
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(torch.cat([weight.grad.flatten().cpu() for weight in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01 if autocast else 1e-4)
    assert (gradients[1] - gradients[0]).norm() < (0.1 if autocast else 1e-3) * gradients[0].norm()


def test_packed_tokens_are_compiled_once_for_all_contents():
    model = build(EverestForVideoClassification, EverestConfig(**SMALL, **SHARED)).to(GPU).train()
    compiled, inputs = torch.compile(model, fullgraph=True, dynamic=False), send_to_device(inputs_of(model), GPU)
    for step in range(4):
        here = {**unequal(inputs), "pixel_values": unequal(inputs)["pixel_values"].roll(step, 0)}
        with torch.autocast("cuda", torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(**here).loss
            loss.backward()
            assert loss.item() == pytest.approx(model(**here).loss.item(), rel=0.01)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_step_never_waits_for_the_gpu(model_class):
    model = build(model_class, tiny_config(drop_path_rate=0.1)).to(GPU).train()
    inputs = send_to_device(inputs_of(model), GPU)
    model(**inputs).loss.backward()  # libraries may wait once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_memory_is_as_estimated(task, mixed_precision):
    config = EverestConfig(**SMALL)
    batch_size = 16
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = build(MODELS[task == "finetune"], config).to(GPU).train()
    inputs = inputs_of(model, batch_size)
    raw = (inputs["pixel_values"] > 0).byte().to(GPU)  # the batch as it came, before it was normalised
    inputs = send_to_device(inputs, GPU)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed_precision == "bf16"):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before
    estimate = training_memory(config, task, batch_size, mixed_precision=mixed_precision).total
    del raw
    assert 0.8 * peak < estimate < 1.35 * peak


# --------------------------------------------------------------------------------------------------------- training

CLASSES = ("left", "right", "up")
RECIPE = {
    "train": "videos/train",
    "val": "videos/val",
    "config": {name: list(v) if isinstance(v, tuple) else v for name, v in TINY.items() if name != "num_labels"},
    "frame_step": 1,
    "epochs": 4,
    "warmup_epochs": 1,
    "batch_size": 4,
    "base_lr": 0.3,
    "log_every": 1,
    "save_every": 1,
    "num_workers": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_class_folders(folder / "videos" / "train", CLASSES, 6)
    write_class_folders(folder / "videos" / "val", CLASSES, 2)
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "finetune.yaml").write_text(
        yaml.safe_dump({**RECIPE, "task": "finetune", "segments": 2, "crops": 1, "erasing": 0.5, "mixup": 0.5})
    )
    return folder


def launch(*arguments, cwd: Path, mixed_precision: str = "no") -> subprocess.CompletedProcess:
    """Run train_accelerate.py on the GPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
    command += ["--mixed_precision", mixed_precision, str(SCRIPT), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_training_runs_in_every_precision(place, mixed_precision):
    if mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs a GPU that has bf16")
    pretrain, finetune = f"pretrain-{mixed_precision}", f"finetune-{mixed_precision}"
    launch("pretrain.yaml", "--output_dir", pretrain, cwd=place, mixed_precision=mixed_precision)
    model = ["--model", f"{pretrain}/model"]
    launch("finetune.yaml", *model, "--output_dir", finetune, cwd=place, mixed_precision=mixed_precision)
    losses = [line["loss"] for line in log_of(place / pretrain) if "loss" in line]
    assert len(losses) == 4 * (18 // 4)
    assert losses[-1] < losses[0]
    weights = load_file(place / finetune / "model" / "model.safetensors")
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())
    assert "val_top1" in log_of(place / finetune)[-1]


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(place):
    launch("pretrain.yaml", "--output_dir", "whole", cwd=place)
    shutil.copytree(place / "whole", place / "parts")
    for later in sorted((place / "parts" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    shutil.rmtree(place / "parts" / "model")
    launch("pretrain.yaml", "--output_dir", "parts", cwd=place)
    whole, parts = (load_file(place / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=1e-4)


def test_evaluation_gives_the_figures_of_a_cpu(place):
    launch("finetune.yaml", "--output_dir", "judged", cwd=place)
    launch("finetune.yaml", "--eval_only", "--model", "judged/model", "--output_dir", "there", cwd=place)
    train("finetune.yaml", "--eval_only", "--model", "judged/model", "--output_dir", "here", cwd=place).check()
    here, there = (json.loads((place / name / "evaluation" / FIGURES).read_text()) for name in ("here", "there"))
    assert there == pytest.approx(here, rel=1e-4)
