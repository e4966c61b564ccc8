"""Every way of reading gives the frames of FFmpeg's program, bit for bit, from every kind of video that it writes."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import tiny_config
from helpers.videos import BACKENDS, write_turned
from truth import ENCODED, KINDS, coloured_frames, encode, ffmpeg, true_frames, write_kind

from everest_hf import EverestForVideoClassification, EverestVideoProcessor
from everest_hf.cli import main
from everest_hf.data import VideoViews
from everest_hf.inference import top_labels
from everest_hf.video import open_video
from everest_hf.video.encoding import even_frames
from everest_hf.video_reading_everest import SequentialVideo

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not installed")

# Of these the length decides which frames a decoder that seeks misses at the end; or they have less than one group.
LENGTHS = [
    *((kind, 50) for kind in KINDS),
    *((f"b-frames/clip.{suffix}", length) for suffix in ("mp4", "avi", "flv", "ts") for length in (38, 60)),
    *((kind, length) for kind in ("mpeg4 xvid/clip.avi", "hevc/clip.mp4", "vp8/clip.webm") for length in (38, 60)),
    *((f"{kind}/clip.mp4", length) for kind in ("b-frames", "hevc", "10 bit", "av1") for length in (1, 2, 3)),
]


@pytest.fixture(scope="module", params=LENGTHS, ids=lambda kind: f"{kind[0]} {kind[1]}")
def video(request, tmp_path_factory):
    """The path of a video, and its true frames."""
    path = write_kind(tmp_path_factory.mktemp("kind"), *request.param)
    return path, true_frames(path)


def clips_of(count: int) -> list[list[int]]:
    """Indices of the whole video, of strided clips, in another order, and of single frames, most of them late."""
    singles = {0, count // 3, count // 2, count - 3, count - 2, count - 1} & set(range(count))
    return [list(range(count)), list(range(0, count, 4)), [count - 1, 0, count // 2], *([i] for i in sorted(singles))]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_open_video_gives_the_true_frames(video, backend):
    path, truth = video
    opened = open_video(path, backend=backend)
    assert opened.num_frames == len(truth)
    for indices in clips_of(len(truth)):
        assert np.array_equal(open_video(path, backend=backend).read(indices).numpy(), truth[indices]), indices


def test_reading_in_order_gives_the_true_frames(video):
    path, truth = video
    opened = SequentialVideo(str(path))
    assert opened.num_frames == len(truth)
    for indices in clips_of(len(truth))[:3]:
        assert np.array_equal(opened.read(indices).numpy(), truth[indices])


def test_processor_and_evaluation_views_give_the_true_frames(video):
    path, truth = video
    config = tiny_config()
    processor = EverestVideoProcessor.from_config(config, frame_step=3)
    expected = processor(truth, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(str(path), return_tensors="pt")["pixel_values"], expected)
    rows = Dataset.from_dict({"video": [str(path)]})
    view = VideoViews(rows, config.frame_size, num_frames=config.num_frames, frame_step=3)[0]["pixel_values"]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (config.image_mean, config.image_std))
    assert torch.allclose((view / 255 - mean) / std, expected, atol=1e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    EverestForVideoClassification(tiny_config(initializer_range=1.0)).save_pretrained(folder)
    EverestVideoProcessor.from_config(tiny_config(), frame_step=3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind",
    ["b-frames/clip.ts", "mpeg4 xvid/clip.avi", "hevc 10 bit/clip.mp4", "interlaced/clip.mp4", "edit list/clip.mp4"],
)
def test_predict_scores_the_true_frames(checkpoint, tmp_path, capsys, kind):
    path = write_kind(tmp_path, kind)
    model = EverestForVideoClassification.from_pretrained(checkpoint).eval()
    processor = EverestVideoProcessor.from_pretrained(checkpoint)
    with torch.inference_mode():
        logits = model(**processor(true_frames(path), return_tensors="pt")).logits
    expected = [{"label": label, "score": score} for label, score in top_labels(logits, model.config, 3)]
    main(["predict", str(path), "--model", str(checkpoint), "--top-k", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["labels"] == expected


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1)])
def test_turned_frames_are_the_true_ones(tmp_path, matrix, backend):
    path = write_turned(tmp_path / "turned.mp4", coloured_frames(10, 80, 112), matrix)
    assert np.array_equal(open_video(path, backend=backend).read(range(10)).numpy(), true_frames(path))


@pytest.mark.parametrize("suffix", ["mp3", "m4a"])
def test_the_cover_of_music_is_no_video(tmp_path, suffix):
    cover = encode(tmp_path / "cover.png", coloured_frames(1, 80, 112), "-frames:v 1")
    music = tmp_path / f"music.{suffix}"
    sound = ["-f", "lavfi", "-i", "sine=duration=1", "-i", str(cover), "-map", "0", "-map", "1", "-c:v", "copy"]
    ffmpeg(*sound, "-disposition:v:0", "attached_pic", "-shortest", str(music))
    readers = (open_video, EverestVideoProcessor(), lambda path: next(even_frames(path, path)))
    for read in readers:
        with pytest.raises(ValueError, match=f"music.{suffix}: .*its only picture is a cover$"):
            read(str(music))


def test_a_rate_that_the_header_does_not_tell_is_no_error(tmp_path):
    path = encode(tmp_path / "clip.mkv", coloured_frames(50, 80, 112), ENCODED["b-frames/clip.mkv"], rate="1000")
    assert open_video(path).fps == 0
    for backend in ("auto", "decord", "pyav"):
        assert np.array_equal(open_video(path, backend=backend).read([3, 40]).numpy(), true_frames(path)[[3, 40]])
