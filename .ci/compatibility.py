"""Does a checkpoint load where people are? Run by .ci/compatibility, in environments of other versions.

    python compatibility.py write FOLDER       with the package: checkpoints, a video, and what they give
    python compatibility.py check FOLDER OUT   without it, as a Hub user: compare, train a step, save to OUT, load again
    python compatibility.py read OUT           with the package: read what another version saved

Each ends with an error where something differs. `check` prints a row of the table in docs/compatibility.md.
"""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import av
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    pipeline,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLASSES = {"classifier": AutoModelForVideoClassification, "pretraining": AutoModelForPreTraining}
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 8,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
    "num_labels": 5,
}


def write_video(path: Path) -> None:
    """Write 40 frames of a bright square that moves over a smooth texture."""
    rows, columns = np.mgrid[0:48, 0:64]
    texture = np.stack([110 + 50 * np.sin(rows / 7 + c) + 50 * np.cos(columns / 9 - c) for c in range(3)], axis=-1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for t in range(40):
            frame = texture.copy()
            frame[t // 2 : t // 2 + 14, t : t + 14] = (250, 220, 40)
            picture = av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@torch.no_grad()
def answers(models: dict, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the models give for clips (2, T, C, H, W)."""
    classifier, pretraining = (models[name].eval() for name in CLASSES)
    noise = torch.linspace(0, 0.99, pretraining.config.num_informative_tokens).flip(0).expand(len(pixel_values), -1)
    predicted = pretraining(pixel_values, noise=noise)
    found = classifier(pixel_values, output_scores=True)
    return {
        "logits": found.logits,
        "kept_ids": found.kept_ids,
        "scores": found.scores,
        "dense": classifier(pixel_values, keep_ratio=1.0).logits,
        "predicted": predicted.logits.contiguous(),
        "loss": predicted.loss,
        **answers_of_shared_budget(classifier, pixel_values, found.scores),
    }


def answers_of_shared_budget(model, pixel_values: torch.Tensor, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a classifier gives in evaluation and in training where the clips share their tokens."""
    config = model.config
    median = scores.median().item()
    config.token_budget = "batch"  # of a checkpoint whose budget is "clip": the weights are the same
    fields = {name: getattr(config, name) for name in sys.modules[type(config).__module__].THRESHOLD_FIELDS}
    config.keep_threshold = {"medians": 0.97, "median_score": median, **fields}
    try:
        found = model(pixel_values)
        shared = {"shared": found.logits, "shared_ids": found.kept_ids}
        return {**shared, "shared_in_training": model.train()(pixel_values).logits}
    finally:
        config.token_budget, config.keep_threshold = "clip", None
        model.eval()


def compare(found: dict, expected: dict, what: str) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **CLOSE, msg=lambda m, name=name: f"{what}: {name}: {m}")


def write(folder: Path) -> None:
    from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification, EverestVideoProcessor

    folder.mkdir(parents=True)
    write_video(folder / "clip.mp4")
    config = EverestConfig(**SIZES)
    processor = EverestVideoProcessor.from_config(config, frame_step=3)
    clip = processor(str(folder / "clip.mp4"), return_tensors="pt")["pixel_values"]
    torch.manual_seed(0)
    models = {"classifier": EverestForVideoClassification(config), "pretraining": EverestForPreTraining(config)}
    for name, model in models.items():
        with torch.no_grad():  # away from a start, so that the logits are of order one
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    pixel_values = torch.cat([clip, clip.flip(1) + 0.3 * torch.randn_like(clip)])
    found = answers(models, pixel_values)
    assert 0.3 < found["logits"].std() < 30, found["logits"]
    save_file({"clip": clip, "pixel_values": pixel_values, **found}, folder / "expected.safetensors")


def check(folder: Path, out: Path) -> None:
    sys.modules["everest_hf"] = None  # importing the package is an ImportError
    expected = load_file(folder / "expected.safetensors")
    pixel_values = expected["pixel_values"]
    models = {name: load(auto, folder / name) for name, auto in CLASSES.items()}
    compare(answers(models, pixel_values), expected, "checkpoint of the newest version")
    encoder = load(AutoModel, folder / "classifier")
    tokens = encoder(pixel_values).last_hidden_state
    assert tokens.shape == (2, encoder.config.num_kept_tokens(), 48)

    processor = AutoVideoProcessor.from_pretrained(folder / "classifier", trust_remote_code=True)
    clip = processor(str(folder / "clip.mp4"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip, expected["clip"], **CLOSE)

    for name, model in models.items():
        train_a_step(model, pixel_values, {"labels": torch.tensor([1, 3])} if name == "classifier" else {})
        model.save_pretrained(out / name)
        processor.save_pretrained(out / name)
    trained = answers(models, pixel_values)
    assert not torch.allclose(trained["logits"], expected["logits"], atol=1e-3)
    again = {name: load(auto, out / name) for name, auto in CLASSES.items()}
    compare(answers(again, pixel_values), trained, "saved and loaded again")
    save_file({"clip": clip, "pixel_values": pixel_values, **trained}, out / "expected.safetensors")
    print_row(pipeline_says(folder))


def load(auto, folder: Path, **kwargs):
    """Load a checkpoint with remote code; every weight must come from it."""
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **kwargs)
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def train_a_step(model, pixel_values: torch.Tensor, labels: dict) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        loss = model.train()(pixel_values, **labels).loss
        loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


def pipeline_says(folder: Path) -> str:
    """Return whether the pipeline gives the scores of the classifier, or how it fails."""
    try:
        classify = pipeline("video-classification", model=str(folder / "classifier"), trust_remote_code=True)
        scores = {entry["label"]: entry["score"] for entry in classify(str(folder / "clip.mp4"), top_k=5)}
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    expected = load_file(folder / "expected.safetensors")
    model = load(AutoModelForVideoClassification, folder / "classifier")
    with torch.no_grad():
        own = model(expected["clip"]).logits.softmax(-1)[0]
    found = torch.tensor([scores[name] for name in model.config.id2label.values()])
    return "yes" if torch.allclose(own, found, atol=1e-5) else "scores of other frames"


def print_row(pipeline: str) -> None:
    names = ("transformers", "torch", "torchvision", "av", "numpy")
    versions = [platform.python_version(), *(importlib.metadata.version(name).split("+")[0] for name in names)]
    print("| " + " | ".join([*versions, "yes", pipeline]) + " |")


def read(out: Path) -> None:
    import everest_hf  # noqa: F401  # the Auto classes then take the package's

    expected = load_file(out / "expected.safetensors")
    models = {name: load(auto, out / name) for name, auto in CLASSES.items()}
    assert type(models["classifier"]).__module__.startswith("everest_hf."), type(models["classifier"])
    compare(answers(models, expected["pixel_values"]), expected, "checkpoint of the other version")
    AutoVideoProcessor.from_pretrained(out / "classifier")


if __name__ == "__main__":
    {"write": write, "check": check, "read": read}[sys.argv[1]](*map(Path, sys.argv[2:]))
