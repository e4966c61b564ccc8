"""Windows of a long video: the model's outputs on each alone, with each frame decoded and embedded once."""

import functools

import numpy as np
import pytest
import torch
from helpers.models import BATCH, build, calibrated, clips
from helpers.tiny import tiny_config
from helpers.videos import BACKENDS, FORMATS, moving_frames, real_clips, write_clip, write_video
from PIL import Image

import everest_hf
from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel, EverestVideoProcessor
from everest_hf.inference import feature_function, slots
from everest_hf.inference.slots import SlotEncoder
from everest_hf.video import VideoError, open_video, read_frames

FPS = 25


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    """75 frames that move, stand still while they are copied (frames 20 to 39), and move again."""
    frames = moving_frames(75, 48, 64)
    frames[20:40] = frames[20]
    path = tmp_path_factory.mktemp("windows") / "clip.mp4"
    return str(write_video(path, frames, fps=FPS, g=30))


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {
        "classifier": build(EverestForVideoClassification),
        "encoder": build(EverestModel),
        "normed": build(EverestModel, use_mean_pooling=False),
        "first_token": build(EverestForVideoClassification, use_mean_pooling=False),
        "attentive": build(EverestForVideoClassification, attentive_pooling=True),
        "compensated": build(EverestForVideoClassification, token_selection="compensated"),
        "random": build(EverestForVideoClassification, token_selection="random"),
        "tube": build(EverestForVideoClassification, token_selection="tube"),
        "budget": calibrated(build(EverestForVideoClassification, **BATCH), frames_that_stop()),
        "budget_encoder": calibrated(build(EverestModel, **BATCH), frames_that_stop()),
    }


def frames_that_stop():
    """Return clips of which each changes less than the one before."""
    pixel_values = clips(batch_size=8)
    return pixel_values[:, :1] + torch.linspace(1, 0.1, 8).view(-1, 1, 1, 1, 1) * (pixel_values - pixel_values[:, :1])


def processor(**fields) -> EverestVideoProcessor:
    return EverestVideoProcessor.from_config(tiny_config(), **{"frame_step": 2, **fields})


@functools.cache
def frames_of(video: str) -> np.ndarray:
    return read_frames(video, range(open_video(video).num_frames)).numpy()


def alone(model, found: EverestVideoProcessor, video: str, frames: list[int], keep_ratio=None):
    """The features and logits of the model called on these frames of a video and nothing else."""
    clip = found(frames_of(video)[frames], do_sample_frames=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if not isinstance(model, EverestForVideoClassification):
            return feature_function(model, keep_ratio)(clip)[0], None
        seen = []
        with model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
            logits = model(clip, keep_ratio=keep_ratio).logits[0]
    return seen[0][0], logits


def assert_alone(model, video: str, keep_ratio=None, **options) -> list:
    """Fail unless each window has the outputs of the model on that window alone; return the windows."""
    found = list(everest_hf.windows(model, processor(), video, keep_ratio=keep_ratio, **options))
    for window in found:
        features, logits = alone(model, processor(), video, window.frames, keep_ratio)
        torch.testing.assert_close(window.features, features, atol=1e-5, rtol=1e-5)
        if logits is None:
            assert window.logits is None
        else:
            torch.testing.assert_close(window.logits, logits, atol=1e-5, rtol=1e-5)
    return found


# A slot has 3 frames, so with every second frame it begins 6 frames after the one before it.
@pytest.mark.parametrize("stride", [1, 4, 6, 12, 17, 40])
@pytest.mark.parametrize("keep_ratio", [None, 0.1, 0.8, 1.0])
def test_outputs_are_those_of_the_window_alone(models, video, stride, keep_ratio):
    found = assert_alone(models["classifier"], video, keep_ratio, stride=stride, batch_size=3)
    span = 11 * 2 + 1
    assert len(found) == (75 - span) // stride + 1
    assert [window.frames for window in found] == [
        list(range(start, start + span, 2)) for start in range(0, len(found) * stride, stride)
    ]
    assert torch.stack([window.logits for window in found]).std(dim=0).min() > 1e-3  # windows differ


ALL = ["encoder", "normed", "first_token", "attentive", "compensated", "random", "tube", "budget", "budget_encoder"]


@pytest.mark.parametrize("name", ALL)
def test_models_of_every_kind(models, video, name):
    assert_alone(models[name], video, stride=5)


def test_where_scores_are_made_of_pixels(models, video, monkeypatch):
    """As on a GPU whose products are split, where embeddings that scores are made of do not serve as tokens."""
    monkeypatch.setattr(slots, "serve_as_tokens", lambda *args: False)
    assert_alone(models["classifier"], video, stride=4)


def test_real_footage(models):
    """A telephone camera in a car, whose noise makes close scores."""
    path = str(real_clips()["carphone_pristine.mp4"])
    model = build(EverestForVideoClassification, image_size=(96, 160))
    found = EverestVideoProcessor.from_config(model.config, frame_step=3)
    windows = list(everest_hf.windows(model, found, path, stride=10))
    assert len(windows) == (120 - 34) // 10 + 1
    for window in windows:
        features, _ = alone(model, found, path, window.frames)
        torch.testing.assert_close(window.features, features, atol=1e-5, rtol=1e-5)


def test_weights_in_16_bits(models, video):
    """Scores are in float32 whatever the weights are; only the rounding of the encoder differs."""
    model = build(EverestForVideoClassification).to(torch.bfloat16)
    for window in everest_hf.windows(model, processor(), video, stride=11):
        features, _ = alone(model, processor(), video, window.frames)
        torch.testing.assert_close(window.features, features.float(), atol=0.05, rtol=0.05)


def test_every_slot_is_embedded_once(models, video, monkeypatch):
    embedded, embed = [], SlotEncoder.embed
    monkeypatch.setattr(SlotEncoder, "embed", lambda self, *args: embedded.append(args) or embed(self, *args))
    found = everest_hf.windows(models["classifier"], processor(), video, stride=6)
    assert len(list(found)) == len(found) == 9
    assert len(embedded) == 9 + 3  # where each window alone embeds four
    assert [before is None for _, before in embedded] == [True] + 11 * [False]


def test_what_windows_are(models, video):
    found = everest_hf.windows(models["encoder"], processor(), video)
    assert (found.num_frames, found.fps, found.frame_step, found.stride, found.span) == (75, FPS, 2, 6, 23)
    second = list(found)[1]
    assert second.seconds == pytest.approx([frame / FPS for frame in second.frames])
    assert second.center == pytest.approx((6 + 23 / 2) / FPS)


@pytest.mark.parametrize("num_frames", [1, 10, 22, 23, 24])
def test_a_short_video_repeats_its_last_frame(models, tmp_path, num_frames):
    path = str(write_clip(tmp_path / "clip.mp4", num_frames))
    (window, *more) = assert_alone(models["classifier"], path, stride=1)
    assert window.frames == [min(frame, num_frames - 1) for frame in range(0, 23, 2)]
    assert len(more) == max(0, num_frames - 23)


@pytest.mark.parametrize("fps", [10, 12.5, 40])
def test_a_video_is_read_at_another_rate(models, tmp_path, fps):
    """Each frame is the one that the video shows then, whatever its own rate is and however that varies."""
    times = [*range(0, 160, 4), *range(160, 400, 8)]  # hundredths of a second
    path = str(write_video(tmp_path / "clip.mp4", moving_frames(70, 48, 64), fps=FPS, times=times))
    found = assert_alone(models["classifier"], path, stride=2, frame_step=1, fps=fps)
    for i, window in enumerate(found):
        moments = [100 * (2 * i + j) / fps for j in range(12)]
        assert window.frames == [max(k for k in range(70) if times[k] <= moment + 1e-6) for moment in moments]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.mkv", "clip.webm"])
def test_blocks_are_the_frames_of_a_reading(tmp_path, monkeypatch, backend, name):
    monkeypatch.setattr("everest_hf.video.reading.FRAMES_OF_A_BLOCK", 5)
    path = write_video(tmp_path / name, moving_frames(40, 48, 64), **FORMATS[name])
    wanted = [0, 1, 2, 5, 11, 12, 13, 14, 15, 27, 38, 39]
    blocks = list(open_video(path, backend=backend).read_blocks(wanted))
    assert [len(block) for block in blocks] == [5, 5, 2]
    assert torch.cat(blocks).equal(read_frames(path, wanted, backend=backend))
    few = list(open_video(path, backend=backend, max_pixels=3 * 48 * 64).read_blocks(wanted))
    assert [len(block) for block in few] == [3, 3, 3, 3]
    with pytest.raises(VideoError, match=r"1 x 64 x 48 pixels are 3072, more than max_pixels=3071"):
        next(open_video(path, backend=backend, max_pixels=3071).read_blocks(wanted))


def test_a_folder_of_frames_has_windows_without_times(models, tmp_path):
    for i, frame in enumerate(moving_frames(30, 48, 64)):
        Image.fromarray(frame).save(tmp_path / f"{i:03d}.png")
    found = assert_alone(models["classifier"], str(tmp_path), stride=3)
    assert len(found) == 3
    assert (found[0].seconds, found[0].center) == (None, None)
    with pytest.raises(VideoError, match="tells no times, so that it cannot be read at fps=10"):
        everest_hf.windows(models["classifier"], processor(), str(tmp_path), fps=10)


def test_a_damaged_video_is_an_error_after_the_windows_before_the_damage(models, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 200, height=96, width=128, g=12, crf=10)
    content = path.read_bytes()
    place = (content.index(b"mdat") + content.index(b"moov")) // 2
    path.write_bytes(content[:place] + np.random.default_rng(0).bytes(2000) + content[place + 2000 :])
    found = []
    with pytest.raises(VideoError, match=r"clip.mp4: cannot be decoded"):
        found.extend(everest_hf.windows(models["classifier"], processor(), str(path), stride=6, batch_size=2))
    assert 2 < len(found) < 20


def test_what_cannot_be_is_refused(models, video):
    classifier = models["classifier"]
    for model, options, reason in [
        (build(EverestModel, frame_oversampling=1.5), {}, "frame_oversampling is 1.5: the model chooses frames"),
        (build(EverestForPreTraining), {}, "the model is EverestForPreTraining; expected EverestForVideo"),
        (build(EverestModel).train(), {}, "the model is in training mode"),
        (classifier, {"keep_ratio": 2}, "EverestConfig.keep_ratio is 2"),
        (classifier, {"stride": 0}, "stride is 0; it must be a positive integer"),
        (classifier, {"frame_step": 1.5}, "frame_step is 1.5; it must be a positive integer"),
        (classifier, {"fps": 0}, "fps is 0; it must be a positive number"),
    ]:
        with pytest.raises(ValueError, match=reason):
            everest_hf.windows(model, processor(), video, **options)
    for fields, reason in [
        ({"frame_sampling": "segment"}, "frame_sampling is 'segment', which spreads a clip over the whole video"),
        ({"frame_step": 1, "fps": 5}, "the processor's fps is 5; give the frame_step"),
        ({"size": {"height": 32, "width": 40}}, r"pixel_values has height and width \(32, 40\); expected \(24, 40\)"),
    ]:
        with pytest.raises(ValueError, match=reason):
            list(everest_hf.windows(classifier, processor(**fields), video))
