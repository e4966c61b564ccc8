"""Exported models: the files, what lies beside them, the program of the README, and what is refused."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import BATCH
from helpers.tiny import tiny_config
from helpers.videos import real_clips, write_clip

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestVideoProcessor, cli, inference
from everest_hf.inference import export

CASES = [
    ("onnx", "classifier"),
    ("onnx", "autoencoder"),
    ("onnx", "compensated"),
    ("pt2", "classifier"),
    ("pt2", "selecting"),
    ("pt2", "compensated"),
]
LABELS = ["climb", "dive", "jump", "run", "swim"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    kinds = {
        "classifier": (EverestForVideoClassification, names, {"frame_step": 2}),
        "selecting": (EverestForVideoClassification, {"frame_oversampling": 1.5}, {"frame_sampling": "segment"}),
        "compensated": (EverestForVideoClassification, {"token_selection": "compensated"}, {"frame_step": 2}),
        "sharing": (EverestForVideoClassification, BATCH, {"frame_step": 2}),
        "autoencoder": (EverestForPreTraining, {}, {"frame_step": 3}),
    }
    for name, (cls, fields, sampling) in kinds.items():
        torch.manual_seed(0)
        model = cls(tiny_config(**fields))
        model.save_pretrained(folder / name)
        EverestVideoProcessor.from_config(model.config, **sampling).save_pretrained(folder / name)
    return {name: str(folder / name) for name in kinds}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "a clip.mp4", num_frames=50)


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def run_file(file, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    if file.suffix == ".pt2":
        return list(torch.export.load(file).module()(pixel_values))
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["pixel_values"]
    return [torch.from_numpy(value) for value in session.run(None, {"pixel_values": pixel_values.numpy()})]


@dataclass
class Exported:
    """An export: its format and kind of model, its folder, what the command printed, and what it was made from."""

    kind: str
    name: str
    out: Path
    printed: str
    keep_ratio: float | None
    model: torch.nn.Module
    processor: EverestVideoProcessor

    def expected(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            output = self.model(pixel_values, keep_ratio=self.keep_ratio)
        return output["last_hidden_state" if self.name == "autoencoder" else "logits"], output.kept_ids


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request, checkpoints, tmp_path_factory) -> Exported:
    kind, name = request.param
    if kind == "onnx" and export.missing_packages(kind):
        pytest.skip("needs the extra `onnx`")
    out = tmp_path_factory.mktemp("exported") / "new" / "out"
    options = ["--keep-ratio", 0.3, "--dynamic-batch"] if name == "classifier" else []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run("export", checkpoints[name], out, "--format", kind, *options) == 0
    keep_ratio = 0.3 if name == "classifier" else None
    return Exported(kind, name, out, printed.getvalue(), keep_ratio, *inference.load_encoder(checkpoints[name]))


def test_a_file_gives_what_the_model_gives(exported, clip):
    kind, out = exported.kind, exported.out
    assert re.fullmatch(rf"{out}/model.{kind}: \d+\.\d MiB, at most \S+ from the model\n", exported.printed)
    assert os.listdir(out.parent) == ["out"]
    names = {"README.md", "config.json", f"model.{kind}", "video_preprocessor_config.json"}
    assert names <= set(os.listdir(out)) <= {*names, "found.npz"}
    for batch_size in (1, 5) if exported.name == "classifier" else (1,):
        pixel_values = exported.processor([str(clip)] * batch_size, return_tensors="pt")["pixel_values"]
        values, ids = run_file(out / f"model.{kind}", pixel_values)
        wanted, wanted_ids = exported.expected(pixel_values)
        assert torch.equal(ids, wanted_ids)
        torch.testing.assert_close(values, wanted, atol=1e-4, rtol=1e-4)


def test_the_program_of_the_readme_runs_without_transformers(exported):
    """It resizes with Pillow, which is within a level of 255 of the processor."""
    (program,) = re.findall(r"```python\n(.*?)```", (exported.out / "README.md").read_text(), flags=re.DOTALL)
    alone = "import sys\nfor name in ('everest_hf', 'transformers'):\n    sys.modules[name] = None\n"
    after = "\nnp.savez('found.npz', pixel_values=pixel_values, output=output, kept_ids=kept_ids)\n"
    video = str(min(real_clips().values()))
    command = [sys.executable, "-c", alone + program + after, video]
    done = subprocess.run(command, capture_output=True, text=True, cwd=exported.out)
    assert done.returncode == 0, done.stderr
    found = np.load(exported.out / "found.npz")
    pixel_values = exported.processor(video, return_tensors="pt")["pixel_values"]
    assert found["pixel_values"].shape == pixel_values.shape
    levels = np.abs(found["pixel_values"] - pixel_values.numpy()) * 255 * min(exported.model.config.image_std)
    assert levels.mean() < 1
    wanted, _ = exported.expected(torch.from_numpy(found["pixel_values"]))
    np.testing.assert_allclose(found["output"], wanted, atol=1e-4, rtol=1e-4)
    if exported.name == "classifier":
        label, score = done.stdout.split()
        assert (label, float(score)) == (LABELS[wanted.argmax()], pytest.approx(wanted.max().item(), abs=1e-3))
    stored = json.loads((exported.out / "config.json").read_text())["id2label"]
    assert stored == {str(i): label for i, label in exported.model.config.id2label.items()}


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_budget_that_clips_share_is_a_fixed_share_in_a_file(checkpoints, clip, tmp_path, kind, caplog):
    if export.missing_packages(kind):
        pytest.skip("needs the extra `onnx`")
    assert run("export", checkpoints["sharing"], tmp_path / "out", "--format", kind) == 0
    assert "token_budget 'batch' is 'clip' in the file, which keeps 0.45 of every clip" in caplog.text
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["token_budget"], stored["keep_threshold"]) == ("clip", None)
    model, processor = inference.load_encoder(checkpoints["sharing"])
    pixel_values = processor(str(clip), return_tensors="pt")["pixel_values"]
    values, ids = run_file(tmp_path / "out" / f"model.{kind}", pixel_values)
    with torch.no_grad():
        wanted = model(pixel_values, keep_ratio=0.45)
    assert torch.equal(ids, wanted.kept_ids)
    torch.testing.assert_close(values, wanted.logits, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_of_a_file_that_is_not_the_model(checkpoints, tmp_path, capsys, monkeypatch):
    right = export._WRITERS["pt2"]

    def write_another(exported, *arguments):
        with torch.no_grad():
            exported.model.classifier.bias += 1e-3
            right(exported, *arguments)
            exported.model.classifier.bias -= 1e-3

    monkeypatch.setitem(export._WRITERS, "pt2", write_another)
    assert run("export", checkpoints["classifier"], tmp_path / "out", "--format", "pt2") == 1
    line = capsys.readouterr().err
    assert line == (
        f"everest-hf: error: {checkpoints['classifier']}: the exported file gives values that are 0.001 off; "
        "it is not written\n"
    )
    assert os.listdir(tmp_path) == []


def test_a_model_that_cannot_be_exported_is_named(checkpoints, tmp_path, capsys, monkeypatch):
    forward = EverestForVideoClassification.forward

    def depend_on_values(self, pixel_values, **kwargs):
        return forward(self, pixel_values if pixel_values.sum() > 0 else -pixel_values, **kwargs)

    monkeypatch.setattr(EverestForVideoClassification, "forward", depend_on_values)
    assert run("export", checkpoints["classifier"], tmp_path / "out", "--format", "pt2") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"everest-hf: error: {checkpoints['classifier']}: cannot be exported: ")
    assert os.listdir(tmp_path) == []


def test_what_is_wrong_is_said_before_a_model_is_loaded(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "load_encoder", None)
    file = tmp_path / "file"
    file.write_text("")
    for arguments, reason in (
        ((tmp_path,), f"{tmp_path}: is not empty; give a new folder"),
        ((file,), f"{file}: is a file; give a folder"),
        ((tmp_path / "out", "--keep-ratio", 2), "EverestConfig.keep_ratio is 2"),
    ):
        assert run("export", checkpoints["classifier"], *arguments, "--format", "pt2") == 1
        assert capsys.readouterr().err.startswith(f"everest-hf: error: {reason}")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert run("export", checkpoints["classifier"], tmp_path / "out", "--format", "onnx") == 1
    assert capsys.readouterr().err == (
        "everest-hf: error: --format onnx needs onnx, onnxscript, onnxruntime: pip install 'everest-hf[onnx]'\n"
    )
