"""Frames that keep coming: the outputs of the windows of the file, flat memory, and sources that end or hang."""

import io
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.models import build
from helpers.videos import moving_frames, write_video

import everest_hf
from everest_hf import EverestForVideoClassification, EverestModel, EverestStream, EverestVideoProcessor, cli
from everest_hf.inference.watch import Tally
from everest_hf.inference.watch import watch as watching
from everest_hf.video import VideoError, live, read_frames

FPS = 25


@pytest.fixture(scope="module")
def model():
    return build(EverestForVideoClassification)


@pytest.fixture(scope="module")
def processor(model) -> EverestVideoProcessor:
    return EverestVideoProcessor.from_config(model.config, frame_step=2)


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    """A film of 1.2 seconds, which can be piped."""
    path = tmp_path_factory.mktemp("stream") / "clip.mkv"
    return str(write_video(path, moving_frames(60, 48, 64), fps=50, g=10))


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("name", ["classifier", "encoder"])
def test_outputs_are_those_of_the_windows_of_the_file(model, processor, video, name, at_once):
    """With four frames at once no two windows become whole in one call: they begin six frames apart."""
    model = model if name == "classifier" else build(EverestModel)
    frames = read_frames(video, range(60)).numpy()
    stream = EverestStream(model, processor, keep_ratio=0.3)
    outputs = [stream.push(frames[i : i + at_once]) for i in range(0, 60, at_once)]
    found = [output for output in outputs if output is not None]
    expected = list(everest_hf.windows(model, processor, video, stride=6, keep_ratio=0.3))
    assert len(found) == len(expected) == 7
    for output, window in zip(found, expected, strict=True):
        assert output.frames == window.frames
        torch.testing.assert_close(output.features, window.features, atol=1e-5, rtol=1e-5)
        if name == "classifier":
            torch.testing.assert_close(output.logits, window.logits, atol=1e-5, rtol=1e-5)
    assert stream.output().features.equal(found[-1].features)


def test_of_several_windows_at_once_the_newest_is_encoded(model, processor, video):
    stream = EverestStream(model, processor)
    output = stream.push(read_frames(video, range(60)))
    assert output.frames == list(everest_hf.windows(model, processor, video, stride=6))[-1].frames


def test_memory_is_flat_over_ten_thousand_frames(model, processor):
    """A leak of one slot's tokens, 2 KB, in each six frames would be 3 MB; one of the frames 90 MB."""
    stream, frames = EverestStream(model, processor), moving_frames(250, 48, 64)
    process, seen = psutil.Process(), []
    for _ in range(40):
        for part in np.array_split(frames, 5):
            stream.push(part)
        seen.append(process.memory_info().rss)
    assert seen[-1] - seen[9] < 2 * 2**20
    assert len(stream._slots) == 4


def test_what_cannot_be_is_refused(model, processor):
    with pytest.raises(ValueError, match="frame_oversampling is"):
        EverestStream(build(EverestModel, frame_oversampling=1.5), processor)
    with pytest.raises(
        ValueError, match=r"frames have the shape \(3,\); expected \(frames, height, width, channels\)"
    ):
        EverestStream(model, processor).push(np.zeros(3, np.uint8))
    assert EverestStream(model, processor).output() is None


# ---------------------------------------------------------------------------------------------------------------- watch


def watch(*arguments) -> int:
    return cli.main(["watch", *map(str, arguments)])


def test_a_file_is_watched_in_real_time(model, processor, checkpoint, video, capsys):
    """Which windows have an output depends on how busy the machine is; what the outputs are does not."""
    start = time.monotonic()
    assert watch(video, "--model", checkpoint, "--every", 0, "--json") == 0
    assert time.monotonic() - start > 59 / 50
    out, err = capsys.readouterr()
    seen = [json.loads(line) for line in out.splitlines()]
    expected = list(everest_hf.windows(model, processor, video, stride=6))
    assert 0 < len(seen) <= len(expected) == 7
    for line in seen:
        (window,) = [window for window in expected if window.seconds[0] == pytest.approx(line["start"], abs=1e-3)]
        assert line["end"] == pytest.approx(window.seconds[-1], abs=1e-3)
        scores = window.logits.softmax(dim=-1)
        assert line["label"] == model.config.id2label[int(scores.argmax())]
        assert line["score"] == pytest.approx(float(scores.max()), abs=1e-5)
        assert len(line["top"]) == 3
        assert line["latency"] >= 0
    summary = err.splitlines()[-1]
    assert summary.startswith(f"everest-hf: {video}: ended after 1.2 s: {len(seen)} outputs, latency ")
    assert "0 of 30 frames dropped" in summary
    assert summary.endswith("MiB of memory")


def test_outputs_come_every_so_many_seconds(checkpoint, video, capsys):
    assert watch(video, "--model", checkpoint, "--every", 0.4, "--top-k", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 0 < len(lines) <= 2
    assert all(line.split()[1] == "s" for line in lines)


def test_a_slow_model_answers_for_the_newest_frames(model, processor, video):
    """All frames of the film are there before the first is taken: one output after a second of them, one at the end."""

    class Late(live.LiveVideo):
        def __iter__(self):
            frames = super().__iter__()
            first = next(frames)
            while not self._ended:
                time.sleep(0.01)
            yield first
            yield from frames

    stream, tally = EverestStream(model, processor, frame_step=1), Tally()
    found = list(watching(stream, Late(video, step=2), model.config, every=0, top_k=1, tally=tally))
    assert [seen.end for seen in found] == pytest.approx([0.92, 1.16], abs=1e-3)  # slots end every 0.12 seconds
    assert (tally.frames, tally.dropped) == (30, 0)


def test_a_source_that_ends_before_a_window_is_whole(checkpoint, tmp_path, capsys):
    path = write_video(tmp_path / "short.mp4", moving_frames(8, 48, 64), fps=50)
    assert watch(path, "--model", checkpoint) == 0
    assert f"{path}: ended after 0.1 s, before the first window was whole" in capsys.readouterr().err


def test_a_pipe_is_watched(checkpoint, video, tmp_path, capsys):
    """Its writer stops in the middle of the film, and is gone without a word: the source hangs, then it ends."""
    content = Path(video).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write(count: int, seconds: float) -> None:
        with pipe.open("wb") as file:
            file.write(content[:count])
            file.flush()
            time.sleep(seconds)

    for count, seconds, limit, code, line in [
        (len(content), 0, 60, 0, "ended after 1.2 s: "),
        (len(content) // 2, 1.5, 0.5, 1, "gave no frame for 0.5 s"),
    ]:
        writer = threading.Thread(target=write, args=(count, seconds))
        writer.start()
        assert watch(pipe, "--model", checkpoint, "--every", 0, "--json", "--decode-timeout", limit) == code
        writer.join()
        assert line in capsys.readouterr().err


def test_standard_input_is_watched(checkpoint, video, capsys):
    before = os.dup(0)
    with open(video, "rb") as file:
        os.dup2(file.fileno(), 0)
    try:
        assert watch("-", "--model", checkpoint, "--every", 0, "--json") == 0
    finally:
        os.dup2(before, 0)
        os.close(before)
    assert 0 < len(capsys.readouterr().out.splitlines()) <= 7


def test_a_terminal_shows_one_line(checkpoint, video, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert watch(video, "--model", checkpoint, "--every", 0) == 0
    text = sys.stdout.getvalue()
    assert text.count("\n") == 1
    assert 0 < text.count("\r\x1b[K") <= 7


def test_a_network_camera_that_does_not_answer_is_a_line(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"rtsp://127.0.0.1:{server.getsockname()[1]}/camera"
        assert watch(address, "--model", checkpoint, "--decode-timeout", 0.5) == 1
        assert f"error: {address}: gave no frame for 0.5 s" in capsys.readouterr().err
    assert watch(address, "--model", checkpoint) == 1
    assert f"error: {address}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("gone.mp4", "no such file; expected a video, camera, rtsp://… or - for standard input"),
        ("http://127.0.0.1/a.mp4", "an address is rtsp:// here; pipe others in"),
        ("camera:99", ""),
    ],
)
def test_sources_that_there_are_not(checkpoint, capsys, source, reason):
    assert watch(source, "--model", checkpoint) == 1
    assert f"everest-hf: error: {source}: {reason}" in capsys.readouterr().err


def test_wrong_options_are_said(checkpoint, video, capsys):
    for options, reason in {
        ("--every", -1): "--every is -1; it must be 0 seconds or more",
        ("--frame-step", 0): "--frame-step is 0; it must be at least 1",
        ("--keep-ratio", 3): "EverestConfig.keep_ratio is 3",
    }.items():
        assert watch(video, "--model", checkpoint, *options) == 1
        assert reason in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- frames


def test_every_second_frame_of_a_file_as_it_is_shown(video):
    found = list(live.LiveVideo(video, step=2))
    assert torch.stack([frame.pixels for frame in found]).equal(read_frames(video, range(0, 60, 2)))
    assert [frame.second for frame in found] == pytest.approx([i / 25 for i in range(30)], abs=1e-3)
    assert found[-1].arrived - found[0].arrived > 57 / 50


def test_frames_that_nobody_takes_are_dropped_and_counted(video, monkeypatch):
    monkeypatch.setattr(live, "WAITING", 5)
    source = live.LiveVideo(video)
    frames = iter(source)
    first, deadline = next(frames), time.monotonic() + 60
    while source.read < 60 and time.monotonic() < deadline:
        time.sleep(0.01)
    rest = list(frames)
    assert len(rest) == 5
    assert rest[-1].second == pytest.approx(59 / 50, abs=1e-3)
    assert (first.second, source.read, source.dropped) == (0, 60, 54)


def test_a_frame_of_too_many_pixels_is_refused(video):
    with pytest.raises(VideoError, match=r"1 x 64 x 48 pixels are 3072, more than max_pixels=3000"):
        list(live.LiveVideo(video, max_pixels=3000))
