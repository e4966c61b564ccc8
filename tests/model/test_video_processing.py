"""The processor: the centre view of evaluation from a path, a URL's file or an array, also as remote code."""

import contextlib
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_config
from helpers.videos import bad_files, real_clips, write_clip, write_list
from transformers import AutoVideoProcessor, VideoClassificationPipeline, pipeline

from everest_hf import EverestForVideoClassification, EverestVideoProcessor, video_processing_everest
from everest_hf.data import VideoViews, load_videos
from everest_hf.data.transforms import normalize
from everest_hf.inference import evaluation_views, read_view
from everest_hf.video import TIME_LIMIT, read_frames


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


def test_fps_counts_in_seconds_of_the_video(clip, tmp_path):
    config = tiny_config()
    processor = EverestVideoProcessor.from_config(config, frame_step=3)
    for fps, step in ((25, 1), (12.5, 2), (8, 3), (100, 1)):  # the video has 25 frames a second
        assert torch.equal(pixels(processor, str(clip), fps=fps), pixels(processor, str(clip), frame_step=step))
    EverestVideoProcessor.from_config(config, fps=12.5).save_pretrained(tmp_path)
    by_seconds = EverestVideoProcessor.from_pretrained(tmp_path)
    assert torch.equal(pixels(by_seconds, str(clip)), pixels(processor, str(clip), frame_step=2))
    assert torch.equal(pixels(by_seconds, str(clip), frame_step=3), pixels(processor, str(clip)))
    frames = read_frames(clip, range(50))
    metadata = [[{"total_num_frames": 50, "fps": 50}]]
    assert torch.equal(pixels(by_seconds, frames, video_metadata=metadata), pixels(processor, frames, frame_step=4))
    with pytest.raises(ValueError, match=r"^fps is 12.5, but the video does not tell its own rate; give frame_step$"):
        by_seconds(frames)
    with pytest.raises(ValueError, match=r"^fps is 5 and frame_step is 2; give one of them$"):
        processor(str(clip), fps=5, frame_step=2)


def test_a_processor_by_seconds_reads_a_view_and_makes_no_views_in_frames(clip, tmp_path):
    config = tiny_config()
    processor = EverestVideoProcessor.from_config(config, fps=12.5)
    view, places = read_view(processor, str(clip))
    assert torch.equal(view, pixels(processor, str(clip)))
    assert {b - a for a, b in pairwise(places)} == {2}
    rows = load_videos(write_list(tmp_path / "list.txt", [(clip, 0)]))
    with pytest.raises(ValueError, match=r"^the processor's fps is 12.5; views are sampled by its frame_step"):
        evaluation_views(rows, EverestForVideoClassification(config), processor, (1, 1))


SIZES = [40, (30, 50), {"height": 48, "width": 80}, {"height": 20, "width": 20}]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_another_size_is_that_of_the_pixels_too(clip, tmp_path, size):
    shape = {"height": size, "width": size} if isinstance(size, int) else size
    height, width = shape.values() if isinstance(shape, dict) else shape
    config = tiny_config()
    processor = EverestVideoProcessor.from_config(config)
    processor.save_pretrained(tmp_path)
    expected = pixels(EverestVideoProcessor.from_config(config, size=size), str(clip))
    assert expected.shape[-2:] == (height, width)
    assert torch.equal(pixels(EverestVideoProcessor.from_pretrained(tmp_path, size=size), str(clip)), expected)
    assert torch.equal(pixels(processor, str(clip), size=size), expected)


def test_a_crop_that_is_given_or_belongs_to_a_short_side_is_kept(clip, tmp_path):
    processor = EverestVideoProcessor.from_config(tiny_config())
    processor.save_pretrained(tmp_path)
    crop = {"height": 16, "width": 24}
    for options, shape in (({"size": 48, "crop_size": crop}, (16, 24)), ({"size": {"shortest_edge": 40}}, (24, 40))):
        for loaded, call in ((EverestVideoProcessor.from_pretrained(tmp_path, **options), {}), (processor, options)):
            assert pixels(loaded, str(clip), **call).shape[-2:] == shape


@pytest.mark.parametrize("num_frames", [6, 18])
def test_another_number_of_frames_has_the_same_stride(clip, tmp_path, num_frames):
    config = tiny_config()
    EverestVideoProcessor.from_config(config, frame_step=2).save_pretrained(tmp_path)
    other = tiny_config(num_frames=num_frames)
    expected = pixels(EverestVideoProcessor.from_config(other, frame_step=2), str(clip))
    assert expected.shape[1] == num_frames
    for processor in (
        EverestVideoProcessor.from_pretrained(tmp_path, num_frames=num_frames),
        EverestVideoProcessor.from_config(config, frame_step=2, num_frames=num_frames),
    ):
        assert torch.equal(pixels(processor, str(clip)), expected)
    processor = EverestVideoProcessor.from_pretrained(tmp_path)
    assert torch.equal(pixels(processor, str(clip), num_frames=num_frames), expected)
    assert pixels(processor, str(clip), num_frames=num_frames, num_input_frames=21).shape[1] == 21


BAD_SAMPLING = [
    ({"num_frames": 0}, "num_frames is 0; it must be a positive integer"),
    ({"num_frames": -1}, "num_frames is -1; it must be a positive integer"),
    ({"frame_step": 0}, "frame_step is 0; it must be a positive integer"),
    ({"frame_step": -1}, "frame_step is -1; it must be a positive integer"),
    ({"num_input_frames": 6}, "num_input_frames is 6; it must be None or an integer of at least num_frames=12"),
    ({"frame_sampling": "uniform"}, "frame_sampling is 'uniform'; it must be one of ['segment', 'stride']"),
    ({"fps": 0}, "fps is 0; it must be a positive number"),
    ({"fps": 2, "frame_sampling": "segment"}, "fps is 2; it has no meaning for frame_sampling='segment'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SAMPLING, ids=str)
def test_an_impossible_sampling_is_named_and_no_file_is_blamed(clip, tmp_path, options, message):
    config = tiny_config()
    processor = EverestVideoProcessor.from_config(config)
    processor.save_pretrained(tmp_path)
    for use in (
        lambda: processor(str(clip), **options),
        lambda: EverestVideoProcessor.from_pretrained(tmp_path, **options),
        lambda: EverestVideoProcessor.from_config(config, **options),
        lambda: EverestVideoProcessor(**{"num_frames": 12, **options}),
    ):
        with pytest.raises(ValueError) as raised:
            use()
        assert str(raised.value) == message


@pytest.mark.parametrize("num_channels", [1, 4])
def test_a_model_of_other_channels_is_fed_from_arrays_and_files_are_refused(clip, tmp_path, num_channels):
    statistics = {"image_mean": [0.5] * num_channels, "image_std": [0.5] * num_channels}
    config = tiny_config(num_channels=num_channels, **statistics)
    EverestVideoProcessor.from_config(config).save_pretrained(tmp_path)
    processor = EverestVideoProcessor.from_pretrained(tmp_path)
    frames = torch.randint(256, (12, num_channels, 24, 40), dtype=torch.uint8)
    result = pixels(processor, frames, input_data_format="channels_first")
    torch.testing.assert_close(result[0], (frames / 255 - 0.5) / 0.5)
    EverestForVideoClassification(config)(result)
    with pytest.raises(ValueError, match=f"the video has 3 channels; expected {num_channels}"):
        processor(str(clip))


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


@pytest.mark.skipif(
    not hasattr(VideoClassificationPipeline, "_load_video_processor"),
    reason="this version of Transformers has no pipeline with a video processor",
)
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


def test_url_is_read_like_a_file_within_limits(clip, monkeypatch):
    handler = partial(SimpleHTTPRequestHandler, directory=str(clip.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        processor = EverestVideoProcessor.from_config(tiny_config())
        url = f"http://127.0.0.1:{server.server_port}/a%20clip.mp4"
        result = pixels(processor, url)
        monkeypatch.setattr(video_processing_everest, "MAX_DOWNLOAD", 2**10)
        with pytest.raises(ValueError, match=rf"^{url}: cannot be read: the file is larger than \S+ GiB"):
            processor(url)
        server.shutdown()
    assert torch.equal(result, pixels(processor, str(clip)))


def test_a_url_has_the_time_limit_of_every_video(monkeypatch):
    class Endless(SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(2**16))

    assert video_processing_everest.TIME_LIMIT == TIME_LIMIT == 60
    monkeypatch.setattr(video_processing_everest, "TIME_LIMIT", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.mp4"
        with pytest.raises(ValueError, match=f"^{url}: cannot be read: to download it takes longer than 0.1 s"):
            EverestVideoProcessor()(url)
        server.shutdown()
