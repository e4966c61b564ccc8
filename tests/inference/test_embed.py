"""Features of videos: their values, the two formats, interruption, bad videos."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from helpers.commands import fork
from helpers.tiny import tiny_config
from helpers.videos import bad_files, write_class_folders, write_clip, write_list
from safetensors import safe_open

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel, EverestVideoProcessor, cli
from everest_hf.data import VideoViews, class_names_of, load_videos
from everest_hf.data.transforms import normalize
from everest_hf.files import held
from everest_hf.inference import embed as module
from everest_hf.inference import features

PATIENCE = 120


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Checkpoints of each kind, by name. Their norms are not the identity, as in a model that was trained."""
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = {
        "classifier": (EverestForVideoClassification, {}),
        "first_token": (EverestForVideoClassification, {"use_mean_pooling": False}),
        "autoencoder": (EverestForPreTraining, {}),
        "encoder": (EverestModel, {}),
        "selecting": (EverestForVideoClassification, {"frame_oversampling": 1.5}),
    }
    for name, (cls, overrides) in kinds.items():
        torch.manual_seed(0)
        model = cls(tiny_config(**overrides))
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        model.save_pretrained(folder / name)
        EverestVideoProcessor.from_config(model.config, frame_step=2).save_pretrained(folder / name)
    return {name: str(folder / name) for name in kinds}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("videos") / "set", videos_per_class=3, num_frames=40)


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def read(path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return tensors and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, {name: json.loads(value) for name, value in file.metadata().items()}


def views_by_hand(videos, config, segments=1, crops=1) -> torch.Tensor:
    """Pixel values (videos, V, T, C, h, w) as evaluation has them."""
    views = VideoViews(
        load_videos(videos),
        config.frame_size,
        num_frames=config.num_frames,
        num_input_frames=config.num_input_frames,
        frame_step=2,
        num_segments=segments,
        num_crops=crops,
    )
    clips = torch.stack([item["pixel_values"] for item in views])
    return normalize(clips, config.image_mean, config.image_std)


def pooled_by_hand(name: str, checkpoint: str, clips: torch.Tensor) -> torch.Tensor:
    """Features (B, D) of clips (B, T, C, h, w) from the parts of the model."""
    if name == "autoencoder":
        model = EverestForPreTraining.from_pretrained(checkpoint).eval()
        encoder, norm = model.everest, model.everest.layernorm
        tokens = encoder.encoder(encoder.embeddings(clips).hidden_states)[0]
        return norm(tokens).mean(dim=1)
    if name == "encoder":
        return EverestModel.from_pretrained(checkpoint).eval()(clips).last_hidden_state.mean(dim=1)
    model = EverestForVideoClassification.from_pretrained(checkpoint).eval()
    tokens = model.everest(clips).last_hidden_state
    return tokens[:, 0] if name == "first_token" else model.fc_norm(tokens.mean(dim=1))


@pytest.mark.parametrize("name", ["classifier", "first_token", "autoencoder", "encoder", "selecting"])
def test_features_are_what_the_docs_say(name, checkpoints, videos, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run("embed", videos, out, "--model", checkpoints[name], "--batch-size", 4) == 0
    assert f"{out}: 32 values for each of 6 videos\n" in capsys.readouterr().out
    tensors, about = read(out)
    config = tiny_config(frame_oversampling=1.5 if name == "selecting" else 1.0)
    with torch.no_grad():
        expected = pooled_by_hand(name, checkpoints[name], views_by_hand(videos, config)[:, 0])
    assert set(tensors) == {"embeddings", "index", "labels"}
    torch.testing.assert_close(tensors["embeddings"], expected, atol=1e-5, rtol=1e-5)
    assert expected.std(dim=0).min() > 1e-4  # videos differ
    assert tensors["index"].tolist() == list(range(6))
    rows = load_videos(videos)
    assert tensors["labels"].tolist() == list(rows["label"])
    assert about["videos"] == list(rows["video"])
    assert about["class_names"] == class_names_of(rows)
    assert (about["model"], about["keep_ratio"], about["frame_step"]) == (checkpoints[name], 0.45, 2)
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_classifier_and_features_agree(checkpoints, videos, tmp_path):
    """The features times the last layer are the logits that evaluation has."""
    run("embed", videos, tmp_path / "out.safetensors", "--model", checkpoints["classifier"])
    model = EverestForVideoClassification.from_pretrained(checkpoints["classifier"]).eval()
    with torch.no_grad():
        logits = model(views_by_hand(videos, model.config)[:, 0]).logits
        torch.testing.assert_close(model.classifier(read(tmp_path / "out.safetensors")[0]["embeddings"]), logits)


def test_views_are_averaged_and_the_keep_ratio_is_the_models(checkpoints, videos, tmp_path):
    model = EverestForVideoClassification.from_pretrained(checkpoints["classifier"]).eval()
    clips = views_by_hand(videos, model.config, segments=2, crops=3)
    model.classifier = torch.nn.Identity()
    with torch.no_grad():
        expected = model(clips.flatten(0, 1), keep_ratio=0.2).logits.unflatten(0, (6, 6)).mean(dim=1)
    options = ["--model", checkpoints["classifier"], "--views", "2x3", "--keep-ratio", 0.2, "--batch-size", 5]
    run("embed", videos, tmp_path / "out.safetensors", *options)
    tensors, about = read(tmp_path / "out.safetensors")
    torch.testing.assert_close(tensors["embeddings"], expected, atol=1e-5, rtol=1e-5)
    assert (about["num_segments"], about["num_crops"], about["keep_ratio"]) == (2, 3, 0.2)


def test_parquet_has_a_row_a_video(checkpoints, videos, tmp_path):
    for suffix in ("parquet", "safetensors"):
        run("embed", videos, tmp_path / f"out.{suffix}", "--model", checkpoints["classifier"])
    table = load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train", cache_dir=str(tmp_path))
    rows = load_videos(videos)
    assert table.column_names == ["video", "label", "embedding"]
    assert list(table["video"]) == list(rows["video"])
    assert list(table["label"]) == [class_names_of(rows)[label] for label in rows["label"]]
    assert torch.equal(torch.tensor(table["embedding"][:]), read(tmp_path / "out.safetensors")[0]["embeddings"])


def test_bad_videos_are_named_and_missing(checkpoints, tmp_path, capfd):
    bad = bad_files(tmp_path)
    good = write_clip(tmp_path / "other.mp4", 30, seed=5)
    source = write_list(tmp_path / "list.txt", [(bad["text"], 3), (good, 1), (bad["empty"], 0), (good, 2)])
    model = ["--model", checkpoints["classifier"], "--batch-size", 2]
    for suffix in ("safetensors", "parquet"):
        assert run("embed", source, tmp_path / f"out.{suffix}", *model) == 1
        out, err = capfd.readouterr()
        for name in ("text", "empty"):
            assert f"everest-hf: error: {bad[name]}: " in err
        assert "for each of 2 videos" in out
    tensors, about = read(tmp_path / "out.safetensors")
    assert (tensors["index"].tolist(), tensors["labels"].tolist()) == ([1, 3], [1, 2])
    assert about["videos"] == [str(good)] * 2
    assert torch.equal(*tensors["embeddings"])
    table = load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train", cache_dir=str(tmp_path))
    assert (list(table["video"]), list(table["label"])) == ([str(good)] * 2, [1, 2])


def test_videos_without_labels(checkpoints, videos, tmp_path):
    paths = load_videos(videos)["video"][:2]
    source = write_list(tmp_path / "list.txt", [(path,) for path in paths])
    for suffix in ("safetensors", "parquet"):
        assert run("embed", source, tmp_path / f"out.{suffix}", "--model", checkpoints["encoder"]) == 0
    assert set(read(tmp_path / "out.safetensors")[0]) == {"embeddings", "index"}
    table = load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train", cache_dir=str(tmp_path))
    assert table.column_names == ["video", "embedding"]


# --------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on_and_gives_the_same(checkpoints, videos, tmp_path, capfd, how):
    paths = load_videos(videos)["video"]
    source = write_list(tmp_path / "list.txt", [(paths[i % 6], i % 6) for i in range(3 * module.SHARD + 10)])
    out, parts = tmp_path / "out.safetensors", tmp_path / ".partial-out.safetensors"
    command = ["embed", source, out, "--model", checkpoints["classifier"], "--batch-size", 7, "--workers", 1]
    process = fork(lambda: run(*command))
    deadline = time.monotonic() + PATIENCE
    while not (parts / "000000.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, how)
    process.join(PATIENCE)
    assert process.exitcode == (-signal.SIGKILL if how is signal.SIGKILL else 130)
    assert not out.exists()
    first = (parts / "000000.safetensors").stat().st_mtime_ns
    capfd.readouterr()

    other = ["embed", source, out, "--model", checkpoints["autoencoder"]]
    assert run(*other) == 1
    assert f"{parts}: holds parts of other features (different: model)" in capfd.readouterr().err
    assert (parts / "000000.safetensors").stat().st_mtime_ns == first

    assert run(*command) == 0
    assert f"{3 * module.SHARD + 10}/{3 * module.SHARD + 10}" in capfd.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["list.txt", "out.safetensors"]
    embeddings = read(out)[0]["embeddings"]
    assert len(embeddings) == 3 * module.SHARD + 10
    torch.testing.assert_close(embeddings, embeddings[:6].repeat(66, 1)[: len(embeddings)], atol=1e-5, rtol=1e-5)


def test_finished_parts_are_not_made_again(checkpoints, videos, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)
    out, parts = tmp_path / "out.safetensors", tmp_path / ".partial-out.safetensors"
    command = ["embed", videos, out, "--model", checkpoints["classifier"], "--batch-size", 3]
    monkeypatch.setitem(features.FORMATS, ".safetensors", fail)
    assert run(*command) == 1  # at the very end
    assert capfd.readouterr().err.endswith("/out.safetensors: the disk is full\n")
    assert sorted(os.listdir(parts)) == ["000000.safetensors", "000001.safetensors", "run.json"]
    (parts / "000001.safetensors").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHARD", 4)
    assert run(*command) == 0
    progress = capfd.readouterr().err
    assert "4/6" in progress  # where it starts
    assert "3/6" not in progress
    assert read(out)[0]["index"].tolist() == list(range(6))


def test_several_processes_make_parts_that_the_last_call_joins(checkpoints, videos, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 2)
    command = ["embed", videos, tmp_path / "a.safetensors", "--model", checkpoints["classifier"], "--workers", 1]
    for part in ("2/2", "1/2"):
        assert run(*command, "--shard", part) == 0
        assert (
            f"a.safetensors: part {part[0]} of 2 is made; when all are, run without --shard" in capfd.readouterr().out
        )
        assert not (tmp_path / "a.safetensors").exists()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / ".partial-a.safetensors").glob("*.safetensors")}
    assert len(made) == 3
    monkeypatch.setattr(module, "features_of", None)  # nothing is left to compute
    assert run(*command) == 0
    monkeypatch.undo()
    command[2] = tmp_path / "b.safetensors"
    assert run(*command) == 0
    (one, about), (other, same) = (read(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert about == same
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in other)


@pytest.mark.parametrize("size", [0, 4, 60, -8])
def test_a_truncated_part_is_made_again(checkpoints, videos, tmp_path, capfd, caplog, monkeypatch, size):
    out, part = tmp_path / "out.safetensors", tmp_path / ".partial-out.safetensors" / "000000.safetensors"
    command = ["embed", videos, out, "--model", checkpoints["classifier"]]
    with monkeypatch.context() as patched:
        patched.setitem(features.FORMATS, ".safetensors", fail)
        assert run(*command) == 1
    os.truncate(part, size % part.stat().st_size)
    assert run(*command) == 0
    assert f"{part} is damaged" in caplog.text
    assert read(out)[0]["index"].tolist() == list(range(6))


def test_two_of_the_same_output_at_once(checkpoints, videos, tmp_path, capfd):
    parts = tmp_path / ".partial-out.safetensors"
    command = ["embed", videos, tmp_path / "out.safetensors", "--model", checkpoints["classifier"]]
    with held(parts):
        second = fork(lambda: run(*command))
        second.join(PATIENCE)
    assert second.exitcode == 1
    assert f"error: {parts} is in use by process {os.getpid()} on " in capfd.readouterr().err.splitlines()[-1]
    assert run(*command) == 0


def test_a_damaged_description_of_parts_is_said(checkpoints, videos, tmp_path, capfd):
    parts = tmp_path / ".partial-out.safetensors"
    parts.mkdir()
    (parts / "run.json").write_text('{"model":')
    assert run("embed", videos, tmp_path / "out.safetensors", "--model", checkpoints["classifier"]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == f"everest-hf: error: {parts}/run.json is damaged; remove {parts}"


def fail(*args):
    raise OSError("the disk is full")


# ------------------------------------------------------------------------------------------------------------- refused


def test_what_is_wrong_is_said_before_anything_is_computed(checkpoints, videos, tmp_path, capsys):
    there = tmp_path / "there.parquet"
    there.write_text("")
    model = ["--model", checkpoints["classifier"]]
    for arguments, reason in {
        (
            videos,
            tmp_path / "out.npy",
            *model,
        ): f"{tmp_path}/out.npy: cannot tell the format; expected a name ending in ",
        (videos, there, *model): f"{there}: is there already",
        (tmp_path / "gone", tmp_path / "x.parquet", *model): f"{tmp_path}/gone: no such",
        (videos, tmp_path / "x.parquet", "--model", tmp_path / "no"): f"{tmp_path}/no: no such checkpoint folder",
        (videos, tmp_path / "x.parquet", *model, "--keep-ratio", 2): "EverestConfig.keep_ratio is 2",
        (videos, tmp_path / "x.parquet", *model, "--batch-size", 0): "--batch-size is 0; it must be at least 1",
        (videos, there / "x.parquet", *model): f"{there}",
    }.items():
        assert run("embed", *arguments) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"everest-hf: error: {reason}")
    assert os.listdir(tmp_path) == ["there.parquet"]


def test_a_decoding_process_that_is_killed_is_said(checkpoints, videos, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(VideoViews, "_read", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    assert run("embed", videos, tmp_path / "out.parquet", "--model", checkpoints["classifier"], "--workers", 1) == 1
    assert "everest-hf check-data" in capfd.readouterr().err.splitlines()[-1]
