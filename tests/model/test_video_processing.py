"""The processor: the centre view of evaluation from a path, a URL's file or an array, also as remote code."""

import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_config
from helpers.videos import bad_files, real_clips, write_clip, write_list
from transformers import AutoVideoProcessor, pipeline

from everest_hf import EverestForVideoClassification, EverestVideoProcessor
from everest_hf.data import VideoViews, load_videos
from everest_hf.data.transforms import normalize
from everest_hf.video import read_frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "a clip.mp4", num_frames=50, height=48, width=64)


def pixels(processor, videos, **kwargs) -> torch.Tensor:
    return processor(videos, return_tensors="pt", **kwargs)["pixel_values"]


def evaluation_view(path, config, tmp_path, **sampling) -> torch.Tensor:
    """What evaluation during training feeds the model for one video (1, T, C, H, W)."""
    rows = load_videos(write_list(tmp_path / "list.txt", [(path, 0)]))
    counts = {"num_frames": config.num_frames, "num_input_frames": config.num_input_frames}
    view = VideoViews(rows, config.frame_size, **counts, **sampling)[0]["pixel_values"]
    return normalize(view, config.image_mean, config.image_std)


@pytest.mark.parametrize("sampling", [{"frame_step": 3}, {"frame_step": 7}, {"frame_sampling": "segment"}])
@pytest.mark.parametrize("oversampling", [1.0, 1.5])
def test_same_pixels_as_the_evaluation_view(clip, tmp_path, sampling, oversampling):
    config = tiny_config(frame_oversampling=oversampling)
    processor = EverestVideoProcessor.from_config(config, **sampling)
    result = pixels(processor, str(clip))
    assert result.shape == (1, config.num_input_frames, 3, *config.frame_size)
    assert torch.equal(result, evaluation_view(clip, config, tmp_path, **sampling))


def test_same_pixels_as_the_evaluation_view_on_real_clips(tmp_path):
    config = tiny_config()
    processor = EverestVideoProcessor.from_config(config)
    for path in real_clips().values():
        expected = evaluation_view(path, config, tmp_path, frame_step=processor.frame_step)
        assert torch.equal(pixels(processor, str(path)), expected)


def test_paths_lists_and_arrays_are_one_video_in_many_forms(clip):
    processor = EverestVideoProcessor.from_config(tiny_config(), frame_step=3)
    expected = pixels(processor, str(clip))
    frames = read_frames(clip, range(50))  # (T, H, W, C)
    for video in (clip, frames.numpy(), frames, frames.permute(0, 3, 1, 2), list(frames.numpy())):
        assert torch.equal(pixels(processor, video), expected)
    for videos in ([str(clip), clip], [frames.numpy(), frames.numpy()], torch.stack([frames, frames])):
        assert torch.equal(pixels(processor, videos), expected.repeat(2, 1, 1, 1, 1))


def test_array_with_the_number_of_frames_of_the_model_is_a_clip_already(clip):
    config = tiny_config(frame_oversampling=1.5)
    processor = EverestVideoProcessor.from_config(config, frame_step=3)
    frames = read_frames(clip, range(config.num_input_frames))
    result = pixels(processor, frames.numpy())
    assert torch.equal(result, pixels(processor, frames.numpy(), do_sample_frames=False))
    assert result.shape[1] == config.num_input_frames
    batch = pixels(processor, [frames.numpy(), frames.flip(0).numpy()])
    assert torch.equal(batch, torch.cat([result, result.flip(1)]))


def test_videos_of_different_sizes_make_one_batch(clip, tmp_path):
    tall = write_clip(tmp_path / "tall.mp4", num_frames=20, height=90, width=50)
    processor = EverestVideoProcessor.from_config(tiny_config(), frame_step=2)
    batch = pixels(processor, [str(clip), str(tall)])
    assert torch.equal(batch, torch.cat([pixels(processor, str(clip)), pixels(processor, str(tall))]))


@pytest.fixture(params=["with everest_hf", "alone"])
def installed(request, monkeypatch):
    """Beside the package, and as remote code where it is not installed."""
    if request.param == "alone":
        monkeypatch.setitem(sys.modules, "everest_hf.video", None)  # importing it is an ImportError


def test_short_video_repeats_its_last_frame(tmp_path, installed):
    path = write_clip(tmp_path / "short.mp4", num_frames=7)
    result = pixels(EverestVideoProcessor.from_config(tiny_config(), frame_step=2), str(path))[0]
    assert result.shape[0] == 12
    assert all(torch.equal(result[t], result[3]) for t in range(3, 12))  # frames 0, 2, 4, 6, 6, …
    assert not torch.equal(result[2], result[3])


def test_call_overrides_the_sampling(clip):
    processor = EverestVideoProcessor.from_config(tiny_config(frame_oversampling=1.5), frame_step=3)
    assert pixels(processor, str(clip)).shape[1] == 18
    assert pixels(processor, str(clip), num_frames=12).shape[1] == 18  # as the pipeline asks
    assert pixels(processor, str(clip), num_frames=6).shape[1] == 6
    assert not torch.equal(pixels(processor, str(clip), frame_step=1), pixels(processor, str(clip)))
    with pytest.raises(ValueError, match="fps is 5"):
        processor(str(clip), fps=5)


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "missing"])
def test_bad_file_is_named_in_one_line(tmp_path, kind, installed):
    path = bad_files(tmp_path)[kind]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        EverestVideoProcessor()(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------------- beside a checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(frame_oversampling=1.5)
    torch.manual_seed(0)
    EverestForVideoClassification(config).eval().save_pretrained(folder)
    EverestVideoProcessor.from_config(config, frame_step=3).save_pretrained(folder)
    return folder


def test_round_trip(checkpoint, clip):
    config = tiny_config(frame_oversampling=1.5)
    expected = pixels(EverestVideoProcessor.from_config(config, frame_step=3), str(clip))
    for loader in (EverestVideoProcessor, AutoVideoProcessor):
        processor = loader.from_pretrained(checkpoint)
        assert type(processor) is EverestVideoProcessor
        assert torch.equal(pixels(processor, str(clip)), expected)


REMOTE = """
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
sys.modules["everest_hf"] = None  # importing the package is an ImportError
from transformers import AutoVideoProcessor
import numpy
processor = AutoVideoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
numpy.save(sys.argv[3], processor(sys.argv[2], return_tensors="np")["pixel_values"])
"""


def test_remote_code_gives_the_same_pixels(checkpoint, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    output = tmp_path / "pixels.npy"
    subprocess.run([sys.executable, "-c", REMOTE, str(moved), str(clip), str(output)], check=True, cwd=tmp_path)
    expected = pixels(EverestVideoProcessor.from_pretrained(checkpoint), str(clip))
    assert np.array_equal(np.load(output), expected.numpy())


def test_pipeline_gives_the_scores_of_the_evaluation_view(checkpoint, clip, tmp_path):
    classify = pipeline("video-classification", model=str(checkpoint))
    scores = {entry["label"]: entry["score"] for entry in classify(str(clip), top_k=5)}
    model = EverestForVideoClassification.from_pretrained(checkpoint).eval()
    view = evaluation_view(clip, model.config, tmp_path, frame_step=3)
    with torch.no_grad():
        expected = model(view).logits.softmax(-1)[0]
    assert len(scores) == 5
    for i, score in enumerate(expected.tolist()):
        assert scores[model.config.id2label[i]] == pytest.approx(score, abs=1e-6)


def test_url_is_read_like_a_file(clip):
    handler = partial(SimpleHTTPRequestHandler, directory=str(clip.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        processor = EverestVideoProcessor.from_config(tiny_config())
        result = pixels(processor, f"http://127.0.0.1:{server.server_port}/a%20clip.mp4")
        server.shutdown()
    assert torch.equal(result, pixels(processor, str(clip)))
