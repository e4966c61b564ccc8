"""The command everest-hf, called in this process and, once, as the installed script."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import av
import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from helpers.tiny import TINY, tiny_config
from helpers.videos import bad_files, real_clips, write_clip, write_list, write_video
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel, pipeline

import everest_hf
from everest_hf import (
    EverestForPreTraining,
    EverestForVideoClassification,
    EverestVideoProcessor,
    cli,
    inference,
    video_processing_everest,
    visualize,
)
from everest_hf.commands.visualize import ANIMATION_SUFFIXES
from everest_hf.data import VideoViews, load_videos
from everest_hf.data.transforms import normalize
from everest_hf.embeddings_everest import pixel_targets
from everest_hf.selection_everest import patchify
from everest_hf.training.recipe import load_recipe
from everest_hf.visualize import draw_reconstruction
from everest_hf.visualize.animation import WRITERS
from everest_hf.visualize.tokens import reconstruct

LABELS = ["climb", "dive", "jump", "run", "swim"]
COMMANDS = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]
FRAME_STEP = 3


def save(model, folder, **sampling) -> str:
    """Save a model with its processor and return the folder."""
    model.save_pretrained(folder)
    EverestVideoProcessor.from_config(model.config, frame_step=FRAME_STEP, **sampling).save_pretrained(folder)
    return str(folder)


def classifier(**overrides) -> EverestForVideoClassification:
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    torch.manual_seed(0)
    return EverestForVideoClassification(tiny_config(**{**names, **overrides}))


def autoencoder(**overrides) -> EverestForPreTraining:
    torch.manual_seed(0)
    return EverestForPreTraining(tiny_config(**overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def clip(folder) -> str:
    return str(write_clip(folder / "a clip.mp4", num_frames=50))


@pytest.fixture(scope="module")
def finetuned(folder) -> str:
    return save(classifier(), folder / "finetuned")


@pytest.fixture(scope="module")
def pretrained(folder) -> str:
    return save(autoencoder(), folder / "pretrained")


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command line."""
    code = cli.main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def run_well(capsys, *arguments) -> str:
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    return out


def assert_refused(capsys, *arguments, culprit) -> str:
    """The command fails with one line that begins with the culprit; return what the line says of it."""
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert out == ""
    line, rest = err.split("\n", 1)
    assert rest == ""
    assert line.startswith(f"everest-hf: error: {culprit}")
    return line


def evaluated_logits(model, path, tmp_path) -> torch.Tensor:
    """Logits that evaluation during training has for the single view of a video."""
    config = model.config
    rows = load_videos(write_list(tmp_path / "list.txt", [(path, 0)]))
    counts = {"num_frames": config.num_frames, "num_input_frames": config.num_input_frames}
    view = VideoViews(rows, config.frame_size, frame_step=FRAME_STEP, **counts)[0]["pixel_values"]
    with torch.no_grad():
        return model.eval()(normalize(view, config.image_mean, config.image_std)).logits[0]


def labels_of(line: str) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in json.loads(line)["labels"]}


# ------------------------------------------------------------------------------------------------------------ predict


@pytest.mark.parametrize("oversampling", [1.0, 1.5])
def test_predict_pipeline_and_evaluation_give_the_same_logits(tmp_path, capsys, oversampling):
    checkpoint = save(classifier(frame_oversampling=oversampling), tmp_path / "model")
    model = EverestForVideoClassification.from_pretrained(checkpoint)
    classify = pipeline("video-classification", model=checkpoint)
    loaded = inference.load_checkpoint(checkpoint, "EverestForVideoClassification")
    for path in map(str, real_clips().values()):
        expected = evaluated_logits(model, path, tmp_path)
        torch.testing.assert_close(inference.classify(*loaded, path)[0], expected, atol=1e-6, rtol=0)
        piped = {entry["label"]: entry["score"] for entry in classify(path, top_k=5, function_to_apply="none")}
        assert [piped[name] for name in LABELS] == pytest.approx(expected.tolist(), abs=1e-6)
        printed = labels_of(run_well(capsys, "predict", path, "--model", checkpoint, "--json"))
        scored = {entry["label"]: entry["score"] for entry in classify(path, top_k=5)}
        assert printed == pytest.approx(scored, abs=1e-6)


def test_predict_over_views_is_the_mean_of_their_softmax(clip, finetuned, tmp_path, capsys):
    model = EverestForVideoClassification.from_pretrained(finetuned).eval()
    config = model.config
    counts = {"num_frames": config.num_frames, "num_segments": 2, "num_crops": 3}
    rows = load_videos(write_list(tmp_path / "list.txt", [(clip, 0)]))
    views = VideoViews(rows, config.frame_size, frame_step=FRAME_STEP, **counts)[0]["pixel_values"]
    with torch.no_grad():
        logits = model(normalize(views, config.image_mean, config.image_std)).logits
    printed = labels_of(run_well(capsys, "predict", clip, "--model", finetuned, "--views", "2x3", "--json"))
    assert [printed[name] for name in LABELS] == pytest.approx(logits.softmax(-1).mean(0).tolist(), abs=1e-6)
    assert printed != labels_of(run_well(capsys, "predict", clip, "--model", finetuned, "--json"))


def test_predict_prints_the_most_probable_labels_first(clip, finetuned, capsys):
    lines = run_well(capsys, "predict", clip, "--model", finetuned, "--top-k", 3).splitlines()
    assert lines[0] == clip
    scores, names = zip(*(line.split() for line in lines[1:]), strict=True)
    assert len(names) == len(set(names)) == 3
    assert set(names) < set(LABELS)
    assert list(scores) == sorted(scores, reverse=True)
    assert sum(map(float, scores)) < 1


def test_predict_at_another_keep_ratio_is_the_model_of_that_ratio(clip, finetuned, tmp_path, capsys):
    other = save(classifier(keep_ratio=0.2), tmp_path / "other")
    given = run_well(capsys, "predict", clip, "--model", finetuned, "--keep-ratio", 0.2, "--json")
    assert given == run_well(capsys, "predict", clip, "--model", other, "--json")
    assert given != run_well(capsys, "predict", clip, "--model", finetuned, "--json")


def test_several_videos_are_answered_in_order_with_progress(clip, finetuned, capsys, tmp_path):
    short = write_clip(tmp_path / "short.mp4", num_frames=5, seed=3)
    code, out, err = run(capsys, "predict", clip, short, clip, "--model", finetuned, "--json")
    assert code == 0
    lines = out.splitlines()
    assert [json.loads(line)["video"] for line in lines] == [clip, str(short), clip]
    assert lines[0] == lines[2] != lines[1]
    assert "3/3" in err
    assert "/1" not in run(capsys, "predict", clip, "--model", finetuned)[2]


@pytest.mark.parametrize(
    ("problem_type", "activation"),
    [
        ("single_label_classification", lambda x: x.softmax(-1)),
        ("multi_label_classification", torch.sigmoid),
        ("regression", lambda x: x),
    ],
)
def test_scores_fit_the_problem_type(problem_type, activation):
    config = tiny_config(problem_type=problem_type, id2label=dict(enumerate(LABELS)))
    logits = torch.tensor([[0.5, -1.0, 3.0, 0.0, -2.0], [0.0, 1.0, 4.0, 0.5, 0.0]])
    expected = activation(logits).mean(dim=0).tolist()
    assert dict(inference.top_labels(logits, config, 99)) == dict(zip(LABELS, expected, strict=True))
    assert inference.top_labels(logits, config, 1) == [("jump", expected[2])]


def test_the_score_of_a_single_label_is_its_value():
    config = tiny_config(num_labels=1, id2label={0: "age"}, label2id={"age": 0})
    assert inference.top_labels(torch.tensor([[31.5]]), config, 5) == [("age", 31.5)]


def test_names_cannot_steer_the_terminal(clip, finetuned, tmp_path, capfd):
    """Escape sequences, a C1 control character, a change of direction and bytes that are no UTF-8, in names."""
    name = "a\x1b]0;title\x07\x9b31m\u202eb.mp4"
    shown = "a\\x1b]0;title\\x07\\x9b31m\\u202eb.mp4"
    good, bad = tmp_path / name, tmp_path / f"bad\udce9{name}"
    shutil.copy(clip, good)
    bad.write_bytes(b"no video" * 99)
    folder = tmp_path / "videos" / "cl\x1b[2Jimb é"
    folder.mkdir(parents=True)
    shutil.copy(clip, folder / "a.mp4")
    shutil.copy(bad, folder / "bad\x1b[2J.mp4")
    assert cli.main(["predict", str(good), str(bad), "--model", finetuned]) == 1
    out, err = capfd.readouterr()
    assert out.startswith(f"{tmp_path}/{shown}\n")
    assert f"error: {tmp_path}/bad\\udce9{shown}: cannot be decoded" in err
    assert cli.main(["predict", str(good), "--model", finetuned, "--json"]) == 0
    line = capfd.readouterr().out
    assert json.loads(line)["video"] == str(good)
    assert line.isascii()
    assert cli.main(["check-data", str(folder.parent)]) == 1
    out, err = capfd.readouterr()
    assert "cl\\x1b[2Jimb é (1)" in out
    assert "bad\\x1b[2J.mp4: cannot be decoded" in out
    assert not set("\x1b\x07\x9b\u202e") & set(out + err.replace("\x1b[A", ""))
    assert cli.main(["check-data", str(folder.parent), "--json"]) == 1
    assert "cl\\u001b[2Jimb é" in capfd.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"^\S+gone\\x1b\[2J.mp4: no such video file"):
        load_videos(write_list(tmp_path / "list.txt", [("gone\x1b[2J.mp4", "climb")]))


@pytest.mark.parametrize("kind", ["text", "empty", "truncated"])
def test_unreadable_videos_are_named_and_the_others_answered(clip, finetuned, tmp_path, capsys, kind):
    bad = bad_files(tmp_path)[kind]
    assert_refused(capsys, "predict", bad, "--model", finetuned, culprit=f"{bad}: ")
    code, out, err = run(capsys, "predict", bad, clip, "--model", finetuned, "--json")
    assert code == 1
    assert json.loads(out)["video"] == clip
    assert f"everest-hf: error: {bad}: " in err


def test_what_is_wrong_is_known_before_a_model_is_loaded(clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inference, "load_checkpoint", None)  # nothing here gets as far
    missing = tmp_path / "missing.mp4"
    for command in (["predict", clip, missing], ["visualize", missing, "-o", "x.png"]):
        assert_refused(capsys, *command, "--model", "m", culprit=f"{missing}: no such video file")
    for command in (["predict", clip], ["visualize", clip, "-o", "x.png"]):
        for ratio in (0, 1.5, "nan"):
            line = assert_refused(capsys, *command, "--keep-ratio", ratio, culprit="EverestConfig.keep_ratio is ")
            assert "above 0 and at most 1" in line
        line = assert_refused(capsys, *command, "--model", clip, culprit=f"{clip}: is a file")
        assert "everest-hf convert" in line
        assert_refused(capsys, *command, "--model", tmp_path / "gone", culprit=f"{tmp_path}/gone: no such checkpoint")
        assert "no config.json" in assert_refused(capsys, *command, "--model", tmp_path, culprit=f"{tmp_path}: ")
    assert_refused(capsys, "predict", clip, "--top-k", 0, culprit="--top-k is 0; it must be at least 1")
    line = assert_refused(capsys, "visualize", clip, "-o", "x.txt", culprit="x.txt: not a picture")
    assert ".png" in line


def test_checkpoints_that_cannot_predict_are_refused(clip, finetuned, pretrained, tmp_path, capsys):
    line = assert_refused(capsys, "predict", clip, "--model", pretrained, culprit=f"{pretrained}: ")
    assert "EverestForPreTraining" in line
    assert "fine-tune" in line
    videomae = tmp_path / "videomae"
    VideoMAEConfig(architectures=["VideoMAEForPreTraining"]).save_pretrained(videomae)
    line = assert_refused(capsys, "predict", clip, "--model", videomae, culprit=f"{videomae}: ")
    assert "VideoMAEForPreTraining" in line
    assert "everest-hf convert" in line
    damaged = shutil.copytree(finetuned, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(capsys, "predict", clip, "--model", damaged, culprit=f"{damaged}: cannot be loaded: ")
    (damaged / "config.json").write_text("{")
    assert_refused(capsys, "predict", clip, "--model", damaged, culprit=f"{damaged}: cannot be loaded: ")


# --------------------------------------------------------------------------------------------------- the newest run


def put_run(checkpoint: str, folder: Path, age: int) -> Path:
    """Copy a checkpoint to where a run leaves it, `age` seconds ago."""
    shutil.copytree(checkpoint, folder)
    changed = (folder / "config.json").stat().st_mtime - age
    os.utime(folder / "config.json", (changed, changed))
    return folder


def test_without_model_the_newest_finished_run_is_used(clip, finetuned, pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    for command in (["predict", clip], ["visualize", clip, "-o", "out.png"]):
        assert "--model" in assert_refused(capsys, *command, culprit="a model is needed")
    put_run(finetuned, runs / "old" / "model", age=900)
    newest = put_run(save(classifier(keep_ratio=0.9), "source"), runs / "deeper" / "new" / "model", age=100)
    put_run(pretrained, runs / "other" / "model", age=50)  # no classifier
    put_run(finetuned, runs / "going" / "checkpoints" / "epoch-00001", age=0)  # not finished
    (runs / "half" / "model").mkdir(parents=True)
    (runs / "half" / "model" / "config.json").write_text("[1")
    code, out, err = run(capsys, "predict", clip, "--json")
    assert code == 0
    assert err == f"everest-hf: model {newest}\n"
    assert out == run_well(capsys, "predict", clip, "--json", "--model", newest)
    assert out != run_well(capsys, "predict", clip, "--json", "--model", finetuned)
    code, out, err = run(capsys, "visualize", clip, "-o", "out.png")
    assert code == 0
    assert err == "everest-hf: model runs/other/model\n"


# ---------------------------------------------------------------------------------------------------------- visualize


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def coloured(path) -> float:
    """Number of pixels of a picture that are not grey."""
    return float((np.ptp(pixels_of(path), axis=-1) > 12).sum())


@pytest.fixture(scope="module")
def red_clip(folder) -> str:
    """A clip that is colourful everywhere, whose left half changes from frame to frame."""
    frames = np.zeros((40, 48, 80, 3), np.uint8)
    frames[..., 0] = 200
    frames[:, :, :40, 1] = 90 * (np.arange(40) // (3 * FRAME_STEP) % 2)[:, None, None]  # other from slot to slot
    return str(write_video(folder / "red.mp4", frames, crf=5))


def test_a_picture_of_kept_tokens_has_more_colour_the_more_are_kept(red_clip, finetuned, tmp_path, capsys):
    amounts = []
    for ratio in (0.1, 0.5, 1):
        picture = tmp_path / "new folder" / f"{ratio}.png"
        out = run_well(capsys, "visualize", red_clip, "-o", picture, "--model", finetuned, "--keep-ratio", ratio)
        assert out == f"{picture}: {round(60 * ratio)} of 60 tokens kept\n"
        amounts.append(coloured(picture))
    clip_alone = amounts[2] / 2
    assert [a / clip_alone for a in amounts] == pytest.approx([1.1, 1.5, 2], abs=0.05)


def test_a_picture_shows_what_moves(red_clip, finetuned, tmp_path, capsys):
    picture = tmp_path / "out.png"
    run_well(capsys, "visualize", red_clip, "-o", picture, "--model", finetuned, "--keep-ratio", 0.4)
    lower = pixels_of(picture)
    lower = lower[lower.shape[0] // 2 :]
    is_coloured = np.ptp(lower, axis=-1) > 12
    columns = np.array_split(np.arange(is_coloured.shape[1]), 4)  # a slot each
    for column in columns:
        left, right = np.array_split(is_coloured[:, column], 2, axis=1)
        assert left.sum() > 3 * right.sum()


def test_the_picture_of_frame_selection_fades_the_slots_left_out(red_clip, finetuned, tmp_path, capsys):
    selecting = save(classifier(frame_oversampling=1.5), tmp_path / "selecting")
    shares = {}
    for name, checkpoint in {"all": finetuned, "selected": selecting}.items():
        picture = tmp_path / f"{name}.png"
        out = run_well(capsys, "visualize", red_clip, "-o", picture, "--model", checkpoint)
        assert "27 of 60 tokens kept" in out
        pixels = pixels_of(picture)
        shares[name] = pixels.shape[1], (pixels.sum(-1) > 700).mean()  # nearly white
    assert shares["selected"][0] == pytest.approx(1.5 * shares["all"][0], rel=0.05)  # six candidates beside four slots
    assert shares["selected"][1] > shares["all"][1]


@pytest.mark.parametrize("suffix", ["png", "jpg", "pdf", "svg"])
def test_formats_of_pictures(clip, finetuned, tmp_path, capsys, suffix):
    picture = tmp_path / f"out.{suffix}"
    run_well(capsys, "visualize", clip, "-o", picture, "--model", finetuned)
    starts = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "pdf": b"%PDF", "svg": b"<?xml"}
    assert picture.read_bytes().startswith(starts[suffix])


@pytest.mark.parametrize("suffix", ANIMATION_SUFFIXES)
@pytest.mark.parametrize("kind", ["finetuned", "pretrained"])
def test_moving_pictures(clip, request, tmp_path, capsys, suffix, kind):
    path = tmp_path / f"out{suffix}"
    out = run_well(capsys, "visualize", clip, "-o", path, "--model", request.getfixturevalue(kind))
    assert out.startswith(f"{path}: {'27 of 60 tokens kept' if kind == 'finetuned' else '9 of 60 tokens seen'}")
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == TINY["num_frames"]
    assert tuple(WRITERS) == ANIMATION_SUFFIXES


def test_a_moving_picture_of_the_whole_video(clip, finetuned, tmp_path, capsys):
    """Windows of 12 of every third frame: 0 to 33, and the last, 14 to 47, of which five are new."""
    path = tmp_path / "out.mp4"
    out = run_well(capsys, "visualize", clip, "-o", path, "--model", finetuned, "--all")
    assert out == f"{path}: 2 clips, of each 27 of 60 tokens kept\n"
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == 12 + 5


def test_a_picture_starts_where_it_is_told_to(clip, finetuned, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(visualize, "draw_kept_tokens", lambda *args, **titles: drawn.append(titles))
    run_well(capsys, "visualize", clip, "-o", tmp_path / "a.png", "--model", finetuned, "--start", 0.2)
    (titles,) = drawn
    assert titles["frame_numbers"] == list(range(5, 41, 3))
    assert titles["seconds"] == pytest.approx([frame / 25 for frame in titles["frame_numbers"]])
    command = ["visualize", clip, "--model", finetuned, "-o"]
    assert_refused(capsys, *command, "a.png", "--start", -1, culprit="--start is -1; it must be 0 seconds or more")
    assert_refused(
        capsys, *command, "a.png", "--all", culprit="a.png: a picture shows one clip; with --all, end it in "
    )
    assert_refused(capsys, *command, "a.png", "--start", 9, culprit=f"{clip}: shows no frame at 9 s or later")


def test_real_clips_are_drawn_with_both_kinds_of_model(finetuned, pretrained, tmp_path, capsys):
    for name, path in real_clips().items():
        kept, rebuilt = tmp_path / f"{name}.kept.png", tmp_path / f"{name}.rebuilt.png"
        out = run_well(capsys, "visualize", path, "-o", kept, "--model", finetuned)
        assert out == f"{kept}: 27 of 60 tokens kept\n"
        out = run_well(capsys, "visualize", path, "-o", rebuilt, "--model", pretrained)
        assert out.startswith(f"{rebuilt}: 9 of 60 tokens seen, 15 predicted, loss ")
        assert pixels_of(rebuilt).shape[0] > 1.7 * pixels_of(kept).shape[0]  # four rows beside two
        assert pixels_of(rebuilt).std() > 10


def test_keep_ratio_of_a_pretrained_model_is_the_share_seen_and_predicted(clip, pretrained, tmp_path, capsys):
    picture = tmp_path / "out.png"
    command = ["visualize", clip, "-o", picture, "--model", pretrained, "--keep-ratio"]
    assert "9 of 60 tokens seen, 51 predicted" in run_well(capsys, *command, 1)
    assert "beside the 9 visible" in assert_refused(capsys, *command, 0.1, culprit=f"{pretrained}: ")


def test_unreadable_video_and_unwritable_picture_are_named(clip, finetuned, tmp_path, capsys):
    bad = bad_files(tmp_path)["text"]
    assert_refused(capsys, "visualize", bad, "-o", tmp_path / "x.png", "--model", finetuned, culprit=f"{bad}: ")
    assert not (tmp_path / "x.png").exists()
    blocked = bad / "x.png"  # below a file
    assert_refused(capsys, "visualize", clip, "-o", blocked, "--model", finetuned, culprit=bad)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_perfect_predictions_give_the_clip_back(norm_pix_loss):
    config = tiny_config(norm_pix_loss=norm_pix_loss)
    clip = torch.randint(256, (config.num_frames, 3, *config.frame_size), dtype=torch.uint8)
    ids = torch.tensor([44, 3, 17])
    pixel_values = normalize(clip[None], config.image_mean, config.image_std)
    patches = patchify(pixel_values, config.tubelet_size, config.patch_size)
    perfect = pixel_targets(patches, ids[None], config)[0]  # (3, P)
    rebuilt = reconstruct(clip, ids, perfect, config)
    assert rebuilt.dtype == torch.uint8
    assert (rebuilt.int() - clip.int()).abs().max() <= 1

    # Flat predictions: with norm_pix_loss each token's own mean stays, otherwise one value is the same everywhere.
    flat = patchify(reconstruct(clip, ids, torch.zeros_like(perfect), config)[None].float(), 3, 8)[0]
    original = patchify(clip[None].float(), 3, 8)[0]
    others = [i for i in range(config.num_tokens) if i not in ids.tolist()]
    assert torch.equal(flat[others], original[others])
    means = original[ids].unflatten(-1, (3, -1)).mean(-1) if norm_pix_loss else torch.zeros(3, 3)
    torch.testing.assert_close(flat[ids].unflatten(-1, (3, -1)), means[..., None].expand(3, 3, 192), atol=0.51, rtol=0)


def test_a_picture_of_a_reconstruction_shows_the_predictions(tmp_path):
    config = tiny_config(norm_pix_loss=False)
    clip = torch.zeros(config.num_frames, 3, *config.frame_size, dtype=torch.uint8)
    predictions = torch.tensor([0.0, 1.0, 0.0]).repeat(15, 192)  # green; the channel is fastest
    draw_reconstruction(clip, torch.arange(9), torch.arange(9, 24), predictions, config, tmp_path / "out.png")
    pixels = pixels_of(tmp_path / "out.png")
    green, black = ((pixels == colour).all(-1).sum() for colour in ((0, 255, 0), (0, 0, 0)))
    # Black are the clip's 60 tokens, 9 that were seen, these beside the predicted ones, and 24 to compare with.
    assert green / black == pytest.approx(15 / (60 + 9 + 9 + 24), rel=0.05)


def test_pixels_come_back_from_normalised_values(clip, finetuned):
    _, processor = inference.load_checkpoint(finetuned, "EverestForVideoClassification")
    raw = processor(clip, do_normalize=False, do_rescale=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(inference.to_uint8(processor(clip, return_tensors="pt")["pixel_values"][0], processor), raw)


# ------------------------------------------------------------------------------------------------------------ convert

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 6,
    "tubelet_size": 3,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}


@pytest.fixture(scope="module")
def videomae(folder) -> str:
    torch.manual_seed(0)
    model = VideoMAEForVideoClassification(VideoMAEConfig(**SIZES, num_labels=3))
    model.save_pretrained(folder / "videomae")
    return str(folder / "videomae")


def test_convert_writes_a_checkpoint_that_predicts(videomae, clip, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("far jump\nrun\nswim \n\n", encoding="utf-8")
    out = tmp_path / "deeper" / "converted"
    report = run_well(capsys, "convert", videomae, out, "--keep-ratio", 0.5, "--labels", labels)
    assert "EverestForVideoClassification" in report
    assert "16 kept of 32" in report
    assert str(out) in report
    assert set(labels_of(run_well(capsys, "predict", clip, "--model", out, "--json"))) == {"far jump", "run", "swim"}
    assert "16 of 32 tokens" in run_well(capsys, "visualize", clip, "-o", tmp_path / "x.png", "--model", out)


def test_every_option_of_convert_reaches_the_configuration(videomae, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--keep-ratio", 0.7, "--num-frames", 9, "--token-selection", "tube", "--num-attention-heads", 3]
    more = ["--image-size", 24, 48, "--decoder-num-attention-heads", 4]
    run_well(capsys, "convert", videomae, out, *options, *more)
    config = json.loads((out / "config.json").read_text())
    assert (config["keep_ratio"], config["num_frames"], config["token_selection"]) == (0.7, 9, "tube")
    assert (config["num_attention_heads"], config["decoder_num_attention_heads"]) == (3, 4)
    assert config["image_size"] == [24, 48]
    run_well(capsys, "convert", videomae, tmp_path / "square", "--image-size", 40)
    assert json.loads((tmp_path / "square" / "config.json").read_text())["image_size"] == 40


def test_convert_says_what_is_wrong(videomae, finetuned, tmp_path, capsys):
    out = tmp_path / "out"
    assert_refused(capsys, "convert", tmp_path / "no.pth", out, culprit=f"{tmp_path}/no.pth: no such file")
    assert_refused(capsys, "convert", finetuned, out, culprit=f"{finetuned}: is an EVEREST checkpoint already")
    assert_refused(capsys, "convert", videomae, tmp_path.parent, culprit=f"{tmp_path.parent}: is not empty")
    for option, value, field in (
        ("--keep-ratio", 2, "keep_ratio"),
        ("--num-frames", 7, "num_frames"),
        ("--image-size", 33, "image_size"),
        ("--token-selection", "best", "token_selection"),
        ("--num-attention-heads", 5, "hidden_size"),
    ):
        line = assert_refused(capsys, "convert", videomae, out, option, value, culprit=f"EverestConfig.{field} is ")
        assert "it must be" in line
    assert not out.exists()


def test_convert_refuses_labels_that_do_not_fit(videomae, tmp_path, capsys):
    labels, out = tmp_path / "labels.txt", tmp_path / "out"
    for text, fault in {
        "a\nb\n": ": names 2 classes, but ",
        "a\nb\na\n": ":3: a class twice: a",
        "a\n\nb\n": ":2: no name of a class",
        "": ": names 0 classes",
    }.items():
        labels.write_text(text)
        assert_refused(capsys, "convert", videomae, out, "--labels", labels, culprit=f"{labels}{fault}")
    labels.write_bytes(b"\xff\xfe\x00a")
    assert "UTF-8" in assert_refused(capsys, "convert", videomae, out, "--labels", labels, culprit=f"{labels}: ")
    gone = tmp_path / "gone.txt"
    assert_refused(capsys, "convert", videomae, out, "--labels", gone, culprit=f"{gone}: No such file")
    headless = tmp_path / "headless"
    VideoMAEModel(VideoMAEConfig(**SIZES)).save_pretrained(headless)
    labels.write_text("a\nb\nc\n")
    line = assert_refused(capsys, "convert", headless, out, "--labels", labels, culprit=f"{labels}: ")
    assert "has no classifier" in line


# ------------------------------------------------------------------------------------------------------- command line


# train shows the help of a recipe.
@pytest.mark.parametrize("command", [name.replace("_", "-") for name in COMMANDS if name != "train"])
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    example = capsys.readouterr().out.split("example:\n")[1].strip()
    program, *arguments = example.split()
    assert program == "everest-hf"
    parsed = cli.build_parser().parse_args(arguments)
    assert parsed.command is getattr(cli, command.replace("-", "_")).run


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["predict"],
        ["visualize", "a.mp4"],
        ["convert", "a"],
        ["predict", "a.mp4", "--keep-ratio", "much"],
        ["predict", "a.mp4", "--unknown"],
        ["predict", "a.mp4", "--views", "5"],
        ["embed", "list.txt", "out.parquet", "--views", "0x3"],
        ["prepare", "folder"],
        ["check-data", "folder", "--workers", "many"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: everest-hf")
    assert "error: " in error.splitlines()[-1]


@pytest.mark.parametrize("command", ["check-data", "prepare", "embed", "tune-keep-ratio"])
def test_a_time_limit_below_0_is_refused(command, finetuned, tmp_path, capsys):
    arguments = [tmp_path] if command == "check-data" else [tmp_path, tmp_path / "out.parquet"]
    assert_refused(
        capsys, command, *arguments, "--decode-timeout", -1, culprit="--decode-timeout is -1; it must be 0 or "
    )


@pytest.mark.parametrize(
    "command", ["check-data", "prepare", "embed", "tune-keep-ratio", "predict", "views", "visualize"]
)
def test_videos_of_too_many_pixels_are_refused_by_every_command(command, clip, finetuned, tmp_path, capsys):
    """A small file of large frames, which would take gigabytes; here the limit is small instead."""
    videos = write_list(tmp_path / "list.txt", [(clip, "climb")])
    arguments = {
        "check-data": ["check-data", videos],
        "prepare": ["prepare", videos, tmp_path / "out"],
        "embed": ["embed", videos, tmp_path / "out.safetensors", "--model", finetuned],
        "tune-keep-ratio": ["tune-keep-ratio", finetuned, videos, "--out", tmp_path / "report", "--ratios", 0.5, 1],
        "predict": ["predict", clip, "--model", finetuned],
        "views": ["predict", clip, "--model", finetuned, "--views", "2x1"],
        "visualize": ["visualize", clip, "--model", finetuned, "-o", tmp_path / "a.png"],
    }[command]
    code, out, err = run(capsys, *arguments, "--max-pixels", 3000)
    assert code == 1
    assert "1 x 64 x 48 pixels are 3072, more than max_pixels=3000" in out + err
    assert_refused(capsys, *arguments, "--max-pixels", -1, culprit="--max-pixels is -1; it must be 0 or more")


@pytest.mark.parametrize("views", ["1x1", "2x1"])
def test_a_url_is_predicted_like_a_file_within_limits(clip, finetuned, capsys, views, monkeypatch):
    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if "slow" in self.path:
                time.sleep(5)
            super().do_GET()

        def log_message(self, *_):
            """Say nothing: a slow answer would end up in the output of the next test."""

    options = ["--model", finetuned, "--json", "--views", views]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=Path(clip).parent)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        url = f"{address}/a%20clip.mp4"
        assert labels_of(run_well(capsys, "predict", url, *options)) == labels_of(
            run_well(capsys, "predict", clip, *options)
        )
        _, _, err = run(capsys, "predict", f"{address}/slow.mp4", *options, "--decode-timeout", 0.5)
        assert f"error: {address}/slow.mp4: took longer than 0.5 s to fetch\n" in err
        monkeypatch.setattr(video_processing_everest, "MAX_DOWNLOAD", 2**10)
        assert (
            f"error: {url}: cannot be fetched: the file is larger than 9.53674e-07 GiB; download it first\n"
            in run(capsys, "predict", url, *options)[2]
        )
        server.shutdown()


@pytest.mark.parametrize("command", ["embed", "tune-keep-ratio"])
def test_time_limits_reach_the_decoder(command, clip, finetuned, tmp_path, capsys):
    """A limit that no decoder can keep makes a sound video unreadable."""
    videos = write_list(tmp_path / "list.txt", [(clip, 0)])
    arguments = {
        "embed": [videos, tmp_path / "out.safetensors", "--model", finetuned],
        "tune-keep-ratio": [finetuned, videos, "--out", tmp_path / "report", "--ratios", 0.5, 1],
    }[command]
    code, out, err = run(capsys, command, *arguments, "--decode-timeout", 1e-6)
    assert code == 1
    assert "took longer than 1e-06 s" in out + err


def run_entry(*arguments, then: str = "") -> subprocess.CompletedProcess:
    """Run what the installed script runs, in a process of its own, and `then` a program before it ends."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    module, function = setup["options.entry_points"]["console_scripts"].split("=")[1].strip().split(":")
    call = f"import sys; from {module} import {function}\ntry: code = {function}()\n"
    program = f"{call}except SystemExit as end: code = end.code\n{then}\nsys.exit(code)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd="/", env=environment
    )


@pytest.mark.parametrize(
    ("arguments", "code", "answer"),
    [
        (["--help"], 0, "tune-keep-ratio"),
        (["--version"], 0, f"everest-hf {everest_hf.__version__}"),
        (["predict", "--help"], 0, "--keep-ratio"),
        (["export", "--help"], 0, "--dynamic-batch"),
        (["search", "--help"], 0, "FEATURES"),
        (["neighbours", "--help"], 0, "--k K"),
        (["predcit"], 2, "predcit"),
        (["predict"], 2, "VIDEO"),
        (["predict", "a.mp4", "--top_k", "many"], 2, "--top-k"),
    ],
)
def test_what_needs_no_model_imports_nothing_heavy(arguments, code, answer):
    heavy = ("torch", "transformers", "accelerate", "datasets", "matplotlib", "numpy", "av", "tqdm")
    done = run_entry(*arguments, then=f"print('imported', [name for name in {heavy} if name in sys.modules])")
    assert done.returncode == code
    assert answer in done.stdout + done.stderr
    assert done.stdout.endswith("imported []\n")


def test_a_command_that_runs_has_the_whole_package():
    config = "everest_hf.EverestConfig(num_hidden_layers=1)"
    check = f"print(type(AutoModel.from_config({config})) is everest_hf.EverestModel)"
    done = run_entry("predict", "missing.mp4", then=f"import everest_hf; from transformers import AutoModel; {check}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "everest-hf: error: missing.mp4: no such video file"
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    "spelling", ["--keep-ratio 0.3", "--keep_ratio 0.3", "--keep_ratio=0.3", "--keep_r 0.3", "--keep-r=0.3"]
)
def test_hyphen_and_underscore_are_the_same_in_options(spelling):
    args = cli.build_parser().parse_args(["predict", "a_b-c.mp4", *spelling.split()])
    assert (args.videos, args.keep_ratio) == (["a_b-c.mp4"], 0.3)


def test_a_run_is_a_model_for_every_command(clip, finetuned, tmp_path, capsys):
    source = put_run(finetuned, tmp_path / "run" / "model", age=0).parent
    videos, picture = write_list(tmp_path / "list.txt", [(clip,)]), tmp_path / "x.png"
    answers = [run_well(capsys, "predict", clip, "--json", "--model", model) for model in (finetuned, source)]
    assert answers[0] == answers[1]
    assert "27 of 60 tokens" in run_well(capsys, "visualize", clip, "-o", picture, "--model", source)
    assert "for each of 1 videos" in run_well(capsys, "embed", videos, tmp_path / "x.parquet", "--model", source)
    line = assert_refused(capsys, "convert", source, tmp_path / "out", culprit=f"{source}/model: ")
    assert "is an EVEREST checkpoint already" in line


def test_a_run_that_has_not_finished_is_no_model(clip, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("task: finetune\n")
    for command in (["predict", clip, "--model", tmp_path], ["tune-keep-ratio", tmp_path, "videos"]):
        assert_refused(capsys, *command, culprit=f"{tmp_path}: is a run that has not finished")
    with pytest.raises(ValueError, match="is a run that has not finished"):
        load_recipe(None, {"train": "videos", "model": str(tmp_path)})


def test_an_interrupted_command_ends_without_a_traceback(clip, finetuned, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoViews, "_read", interrupt)
    assert run(capsys, "predict", clip, "--model", finetuned) == (130, "", "everest-hf: error: interrupted\n")


def test_the_installed_script_predicts_into_a_pipe_that_closes(clip, finetuned):
    """`everest-hf predict … | head -1`: the answer, and no traceback when the reader goes."""
    script = Path(sys.executable).with_name("everest-hf")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    videos = [clip] * 3
    command = [str(script), "predict", *videos, "--model", finetuned, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        code = process.wait(timeout=120)
    assert set(labels_of(line)) == set(LABELS)
    assert "Traceback" not in error
    assert "BrokenPipeError" not in error
    assert code in (0, 1)  # 0 where all was written before the reader went
