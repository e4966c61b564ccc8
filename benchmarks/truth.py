"""How far the frames that are read from videos of each kind are from those that the program ffmpeg gives.

    python benchmarks/truth.py
    python benchmarks/truth.py --kinds b-frames interlaced

Writes a short video of each kind with the program ffmpeg, reads a strided clip of its frames by their numbers, and
prints the mean absolute difference to ffmpeg's own frames, in levels of 255: of Transformers' `load_video` with decord
and with PyAV, and of `everest_hf.video.open_video` with each of its backends. Writes the figures to a JSON file. It takes
about a minute.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import measure
import numpy as np
import torch
from tqdm import tqdm
from transformers.video_utils import load_video

from everest_hf.video import BACKENDS, open_video
from everest_hf.video.decoders import torchcodec_loads

X264 = "-c:v libx264 -x264-params keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
X265 = "-c:v libx265 -x265-params log-level=none:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0:open-gop=0"
MPEG4 = "-c:v mpeg4 -g 12 -bf 2 -qscale 3"
HDR = "-color_primaries bt2020 -color_trc smpte2084 -colorspace bt2020nc"

# By file name: arguments of ffmpeg. The part before a "/" only keeps names of one container apart.
ENCODED = {
    "b-frames/clip.mp4": f"{X264} -pix_fmt yuv420p",
    "b-frames/clip.mov": f"{X264} -pix_fmt yuv420p",
    "b-frames/clip.mkv": f"{X264} -pix_fmt yuv420p",
    "b-frames/clip.avi": f"{X264} -pix_fmt yuv420p",
    "b-frames/clip.flv": f"{X264} -pix_fmt yuv420p",
    "b-frames/clip.ts": f"{X264} -pix_fmt yuv420p",
    "b-frames/clip.m2ts": f"{X264} -pix_fmt yuv420p",
    "b-frames/clip.3gp": f"{X264} -pix_fmt yuv420p",
    "b-frames/clip.h264": f"{X264} -pix_fmt yuv420p",
    "fragmented/clip.mp4": f"{X264} -pix_fmt yuv420p -movflags frag_keyframe+empty_moov",
    "open groups/clip.mp4": f"{X264}:open-gop=1 -pix_fmt yuv420p",
    "open groups/clip.mkv": f"{X264}:open-gop=1 -pix_fmt yuv420p",
    "open groups/clip.ts": f"{X264}:open-gop=1 -pix_fmt yuv420p",
    "intra refresh/clip.mp4": "-c:v libx264 -x264-params keyint=12:bframes=2:intra-refresh=1 -pix_fmt yuv420p",
    "interlaced/clip.mp4": f"{X264}:tff=1 -pix_fmt yuv420p -flags +ildct+ilme",
    "interlaced/clip.ts": f"{X264}:tff=1 -pix_fmt yuv420p -flags +ildct+ilme",
    "interlaced/clip.mpg": "-c:v mpeg2video -g 12 -bf 2 -pix_fmt yuv420p -flags +ildct+ilme -top 1",
    "4:2:2/clip.mp4": f"{X264} -pix_fmt yuv422p",
    "4:4:4/clip.mp4": f"{X264} -pix_fmt yuv444p",
    "full range/clip.mp4": f"{X264} -pix_fmt yuvj420p -color_range pc",
    "bt709/clip.mp4": f"{X264} -pix_fmt yuv420p -colorspace bt709 -color_primaries bt709 -color_trc bt709",
    "grey/clip.mp4": f"{X264} -pix_fmt gray",
    "10 bit/clip.mp4": f"{X264} -pix_fmt yuv420p10le",
    "10 bit 4:2:2/clip.mkv": f"{X264} -pix_fmt yuv422p10le",
    "rgb/clip.mkv": "-c:v libx264rgb -g 12 -pix_fmt rgb24",
    "hevc/clip.mp4": f"{X265} -pix_fmt yuv420p",
    "hevc/clip.mkv": f"{X265} -pix_fmt yuv420p",
    "hevc/clip.ts": f"{X265} -pix_fmt yuv420p",
    "hevc open groups/clip.mp4": f"{X265}:open-gop=1 -pix_fmt yuv420p".replace("open-gop=0:", ""),
    "hevc 10 bit/clip.mp4": f"{X265} -pix_fmt yuv420p10le",
    "hevc HDR/clip.mov": f"{X265} -pix_fmt yuv420p10le -tag:v hvc1 {HDR}",
    "vp8/clip.webm": "-c:v libvpx -g 12 -deadline realtime -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 8",
    "vp9/clip.webm": "-c:v libvpx-vp9 -g 12 -deadline realtime -cpu-used 8",
    "vp9 10 bit/clip.webm": "-c:v libvpx-vp9 -g 12 -deadline realtime -cpu-used 8 -pix_fmt yuv420p10le -profile:v 2",
    "av1/clip.mp4": "-c:v libsvtav1 -preset 12 -g 12",
    "av1/clip.mkv": "-c:v libsvtav1 -preset 12 -g 12",
    "av1 10 bit/clip.mp4": "-c:v libsvtav1 -preset 12 -g 12 -pix_fmt yuv420p10le",
    "mpeg1/clip.mpg": "-c:v mpeg1video -g 12 -bf 2",
    "mpeg2/clip.mpg": "-c:v mpeg2video -g 12 -bf 2",
    "mpeg2/clip.vob": "-c:v mpeg2video -g 12 -bf 2 -f vob",
    "mpeg2/clip.ts": "-c:v mpeg2video -g 12 -bf 2",
    "mpeg4/clip.avi": MPEG4,
    "mpeg4 xvid/clip.avi": "-c:v libxvid -g 12 -bf 2 -qscale 3",
    "mpeg4 packed/clip.avi": "-c:v libxvid -g 12 -bf 2 -qscale 3 -flags +low_delay",
    "mpeg4/clip.mp4": MPEG4,
    "mpeg4/clip.mkv": MPEG4,
    "msmpeg4/clip.avi": "-c:v msmpeg4 -g 12",
    "wmv2/clip.wmv": "-c:v wmv2 -g 12",
    "wmv1/clip.asf": "-c:v wmv1 -g 12",
    "sorenson/clip.flv": "-c:v flv -g 12",
    "mjpeg/clip.avi": "-c:v mjpeg -q:v 3",
    "mjpeg/clip.mov": "-c:v mjpeg -q:v 3 -pix_fmt yuvj422p",
    "prores/clip.mov": "-c:v prores_ks",
    "prores alpha/clip.mov": "-c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le",
    "dnxhr/clip.mxf": "-c:v dnxhd -profile:v dnxhr_sq -pix_fmt yuv422p -s 320x256",
    "ffv1/clip.mkv": "-c:v ffv1 -g 12",
    "huffyuv/clip.avi": "-c:v huffyuv",
    "raw/clip.avi": "-c:v rawvideo -pix_fmt bgr24",
    "raw/clip.y4m": "-pix_fmt yuv420p",
    "animation/clip.mov": "-c:v qtrle",
    "png/clip.mov": "-c:v png",
    "theora/clip.ogv": "-c:v libtheora -g 12 -q:v 7",
    "gif/clip.gif": "-vf split[a][b];[a]palettegen[p];[b][p]paletteuse",
    "apng/clip.apng": "-f apng -plays 0",
    "pixels not square/clip.mp4": f"{X264} -pix_fmt yuv420p -vf setsar=4/3",
    "negative times/clip.mp4": f"{X264} -pix_fmt yuv420p -output_ts_offset -0.5",
    "late start/clip.mkv": f"{X264} -pix_fmt yuv420p -output_ts_offset 7.3",
    "late start/clip.ts": f"{X264} -pix_fmt yuv420p -output_ts_offset 7.3",
    "variable rate/clip.mp4": f"{X264} -pix_fmt yuv420p -vf setpts=(N+0.3*mod(N*7\\,5))*0.04/TB -vsync passthrough",
    "variable rate/clip.mkv": f"{X264} -pix_fmt yuv420p -vf setpts=(N+0.3*mod(N*7\\,5))*0.04/TB -vsync passthrough",
    # The time jumps between two B-frames.
    "gap/clip.mp4": f"{X264} -pix_fmt yuv420p -vf setpts=(N+100*gte(N\\,27))*0.04/TB -vsync passthrough",
    "gap/clip.mkv": f"{X264} -pix_fmt yuv420p -vf setpts=(N+100*gte(N\\,27))*0.04/TB -vsync passthrough",
    "1000 a second/clip.mkv": f"{X264} -pix_fmt yuv420p -r 1000",
    "30000 over 1001/clip.mp4": f"{X264} -pix_fmt yuv420p -r 30000/1001",
}
# By file name: arguments of ffmpeg and the size of the frames, height and width.
SIZES = {
    "odd/clip.mp4": ("-c:v libx264 -pix_fmt yuv444p -g 12", (47, 61)),
    "odd 4:2:0/clip.mkv": ("-c:v ffv1 -pix_fmt yuv420p", (47, 61)),
    "odd/clip.avi": ("-c:v mpeg4 -g 12", (47, 61)),
    "small/clip.mp4": (f"{X264} -pix_fmt yuv420p", (64, 48)),
    "tiny/clip.mp4": (f"{X264} -pix_fmt yuv420p", (16, 2)),
}
HEIGHT, WIDTH = 80, 112


def coloured_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) of strong colours: a texture that moves down, and a disc that moves to the right."""
    rows, columns = np.mgrid[0:height, 0:width]
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for t in range(num_frames):
        waves = [np.sin((rows - 2 * t) / a + columns / b) for a, b in ((5, 9), (7, -6), (11, 4))]
        frames[t] = np.stack([127 + 120 * wave for wave in waves], axis=-1)
        disc = (rows - height // 2) ** 2 + (columns - (3 * t) % width) ** 2 < (height // 4) ** 2
        frames[t][disc] = (250, 5 * t % 250, 20)
    return frames


def encode(path: Path, frames: np.ndarray, arguments: str, rate: str = "25") -> Path:
    """Write frames uint8 (T, H, W, 3) with the program ffmpeg and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", rate, "-i", "-"]
    ffmpeg(*given, *arguments.split(), "-threads", "1", str(path), stdin=frames.tobytes())
    return path


def ffmpeg(*arguments: str, stdin: bytes = b"") -> bytes:
    """Run the program ffmpeg and return what it writes to its standard output."""
    command = ["ffmpeg", "-y", "-v", "error", *arguments]
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=True, timeout=100).stdout


def cut(path: Path, frames: np.ndarray) -> Path:
    """Write a video that begins between two key frames: what comes before is hidden by an edit list."""
    whole = encode(path.with_name("whole.mp4"), frames, f"{X264} -pix_fmt yuv420p")
    ffmpeg("-ss", "0.61", "-i", str(whole), "-c", "copy", str(path))
    return path


def with_cover(path: Path, frames: np.ndarray) -> Path:
    """Write a video whose first stream of pictures is a cover."""
    video = encode(path.with_name("plain.mp4"), frames, f"{X264} -pix_fmt yuv420p")
    cover = encode(path.with_name("cover.png"), frames[:1, :32, :32], "-frames:v 1")
    streams = ["-map", "1", "-map", "0", "-c", "copy", "-disposition:v:0", "attached_pic"]
    ffmpeg("-i", str(video), "-i", str(cover), *streams, str(path))
    return path


def resized(path: Path, frames: np.ndarray) -> Path:
    """Write a video whose frames change their size in the middle."""
    half = max(1, len(frames) // 2)
    small = frames[half:, : frames.shape[1] // 2, : frames.shape[2] // 2]
    codec = f"{X264} -pix_fmt yuv420p" if path.suffix == ".ts" else ENCODED["vp8/clip.webm"]
    parts = [encode(path.with_name(f"{i}{path.suffix}"), part, codec) for i, part in enumerate((frames[:half], small))]
    if path.suffix == ".ts":
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        return path
    shift = 0
    with av.open(str(path), "w") as new:
        for i, part in enumerate(parts):
            with av.open(str(part)) as old:
                stream = new.add_stream_from_template(old.streams.video[0]) if i == 0 else new.streams.video[0]
                for packet in packets_of(old):
                    remux(packet, packet.pts + shift, packet.dts + shift, stream)
            shift = round(half * Fraction(1, 25) / stream.time_base)
    return path


def jumping(path: Path, frames: np.ndarray) -> Path:
    """Write a video whose clock jumps by half a second between packets, as a recording's may, within a run of B-frames."""
    whole = encode(path.with_name("whole.mp4"), frames, f"{X264} -pix_fmt yuv420p")
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(packets_of(old)):
            shift = 0 if i < 27 else round(Fraction(1, 2) / packet.time_base)
            remux(packet, packet.pts + shift, packet.dts + shift, stream)
    return path


def packets_of(container):
    return (packet for packet in container.demux(video=0) if packet.size)


def remux(packet, pts: int, dts: int, stream) -> None:
    """Write a packet, with other times, as one of another file's stream."""
    packet.pts, packet.dts, packet.stream = pts, dts, stream
    stream.container.mux(packet)


MADE: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "edit list/clip.mp4": cut,
    "cover/clip.mp4": with_cover,
    "size changes/clip.ts": resized,
    "size changes/clip.webm": resized,
    "clock jumps/clip.mp4": jumping,
    "clock jumps/clip.mkv": jumping,
}
KINDS = (*ENCODED, *SIZES, *MADE)


def write_kind(folder: Path, kind: str, num_frames: int = 50) -> Path:
    """Write a video of a kind of KINDS into a folder and return its path."""
    path = Path(folder) / kind.replace("/", "_").replace(" ", "_").replace(":", "")
    arguments, (height, width) = SIZES.get(kind, (ENCODED.get(kind, ""), (HEIGHT, WIDTH)))
    frames = coloured_frames(num_frames, height, width)
    return MADE[kind](path, frames) if kind in MADE else encode(path, frames, arguments)


def true_frames(path: Path) -> np.ndarray:
    """The frames uint8 (T, H, W, 3) of a video as the program ffmpeg gives them, upright."""
    pictures = ffmpeg(
        "-i", str(path), "-vsync", "passthrough", "-pix_fmt", "rgb24", "-f", "image2pipe", "-c:v", "ppm", "-"
    )
    header = b"\n".join(pictures.split(b"\n", maxsplit=3)[:3]) + b"\n"  # of each picture: P6, width and height, 255
    width, height = map(int, header.split()[1:3])
    frames = np.frombuffer(pictures, np.uint8).reshape(-1, len(header) + 3 * width * height)
    return frames[:, len(header) :].reshape(-1, height, width, 3)


# ------------------------------------------------------------------------------------------------------ comparison


def run(args: argparse.Namespace) -> list[dict]:
    """Return, for each kind, the difference of each way of reading; None where it fails."""
    kinds = [kind for kind in KINDS if not args.kinds or any(part in kind for part in args.kinds)]
    with tempfile.TemporaryDirectory() as folder:
        return [compare(write_kind(Path(folder), kind), kind) for kind in tqdm(kinds, unit="video")]


def compare(path: Path, kind: str) -> dict:
    """Return the difference of each way of reading a strided clip of a video."""
    truth = true_frames(path)
    indices = list(range(1, len(truth), 4))
    return {"kind": kind, "frames": len(truth)} | {
        name: difference(read, path, indices, truth[indices]) for name, read in readers().items()
    }


def readers() -> dict[str, Callable]:
    """Return the ways of reading the frames at indices of a path, by name."""

    def transformers(backend: str) -> Callable:
        return lambda path, indices: load_video(str(path), backend=backend, sample_indices_fn=lambda **_: indices)[0]

    def ours(backend: str) -> Callable:
        return lambda path, indices: open_video(path, backend=backend).read(indices).numpy()

    found = [name for name in BACKENDS if name != "torchcodec" or torchcodec_loads()]
    return {f"load_video, {name}": transformers(name) for name in ("decord", "pyav")} | {
        name: ours(name) for name in found
    }


def difference(read: Callable, path: Path, indices: list[int], truth: np.ndarray) -> float | None:
    """Return the mean absolute difference in levels, None where reading fails or gives frames of another size."""
    try:
        frames = np.asarray(read(path, indices))
    except Exception:
        return None
    return float(np.abs(frames.astype(int) - truth).mean()) if frames.shape == truth.shape else None


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table."""
    names = [name for name in results[0] if name not in ("kind", "frames")]
    return measure.markdown_table(
        ["kind", *names], [[row["kind"], *(shown(row[name]) for name in names)] for row in results]
    )


def shown(value: float | None) -> str:
    """Return a difference as the table has it."""
    return "fails" if value is None else "0" if value == 0 else f"{value:.2g}" if value < 1 else f"{value:.0f}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", help="only the kinds whose names hold one of these")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "truth.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    measure.run_and_report(args, torch.device("cpu"), run, table)


if __name__ == "__main__":
    main()
