"""Video processor of EVEREST: a path, a URL or an array in, normalised pixel values out.

It samples the frames of the centre view that evaluation during training uses, so that a checkpoint gives the same
result in a pipeline as in the run that made it. This file is copied beside a checkpoint as remote code: it imports
nothing but torch, transformers and the file that reads videos.
"""

import importlib
import math
import os
import time
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .video_reading_everest import TIME_LIMIT, SequentialVideo

# Bytes that a video has at most that is fetched from an address.
MAX_DOWNLOAD = 2**31

# ---------------------------------------------------------------------- frame indices of a view


def view_position(view: int, num_views: int) -> float:
    """Place of view `view` of `num_views` spread evenly from start to end: 0 … 1, and the centre for a single one."""
    return view / (num_views - 1) if num_views > 1 else 0.5


def stride_indices(
    *,
    num_video_frames: int,
    num_frames: int,
    frame_step: int = 1,
    num_input_frames: int | None = None,
    segment: int = 0,
    num_segments: int = 1,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Return the frame indices of a clip of neighbouring frames, every `frame_step`-th one.

    The clip spans num_frames * frame_step frames. With `generator` its start is drawn uniformly (training); without,
    it is clip `segment` of `num_segments` spread evenly from the start of the video to its end (evaluation), the
    centre for a single one. `num_input_frames` (default: num_frames) candidates are spread evenly over the same span.
    A video that is shorter than the clip repeats its last frame.
    """
    count = num_input_frames or num_frames
    offsets = [i * num_frames * frame_step // count for i in range(count)]
    last_start = max(0, num_video_frames - 1 - offsets[-1])
    if generator is not None:
        start = int(torch.randint(last_start + 1, (), generator=generator))
    else:
        start = round(last_start * view_position(segment, num_segments))
    return [min(start + offset, num_video_frames - 1) for offset in offsets]


def segment_indices(
    *,
    num_video_frames: int,
    num_frames: int,
    frame_step: int = 1,
    num_input_frames: int | None = None,
    segment: int = 0,
    num_segments: int = 1,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Return one frame index of each of num_frames equal parts of the video (Something-Something v2).

    With `generator` the place within each part is drawn uniformly (training); without, view `segment` takes place
    (segment + 1/2) / num_segments of each part (evaluation), the centre for a single view. `num_input_frames`
    (default: num_frames) is the number of parts where candidates are asked for; `frame_step` has no meaning here.
    A video that is shorter than the clip repeats its last frame.
    """
    count = num_input_frames or num_frames
    if num_video_frames < count:
        return [min(i, num_video_frames - 1) for i in range(count)]
    if generator is not None:
        places = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    else:
        places = [(segment + 0.5) / num_segments] * count
    return [int((i + place) * num_video_frames / count) for i, place in enumerate(places)]


FRAME_SAMPLINGS = {"stride": stride_indices, "segment": segment_indices}


def check_frame_sampling(name: str) -> None:
    """Raise a ValueError unless `name` is a key of FRAME_SAMPLINGS."""
    if name not in FRAME_SAMPLINGS:
        raise ValueError(f"frame_sampling is {name!r}; it must be one of {sorted(FRAME_SAMPLINGS)}")


def frame_indices(*, frame_sampling: str = "stride", num_video_frames: int, **kwargs) -> list[int]:
    """Return the frame indices of a view by the policy `frame_sampling`, a key of FRAME_SAMPLINGS.

    The other arguments are those of `stride_indices` and `segment_indices`.

    Raises:
        ValueError: an unknown policy, or a video without frames.
    """
    check_frame_sampling(frame_sampling)
    if num_video_frames < 1:
        raise ValueError(f"the video has {num_video_frames} frames; at least one is needed")
    return FRAME_SAMPLINGS[frame_sampling](num_video_frames=num_video_frames, **kwargs)


# ---------------------------------------------------------------------- geometry of a view


def cover_size(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """Return the size (height, width) of a frame scaled to just cover `target`, its aspect ratio kept.

    For a square target this is the usual resize of the short side.
    """
    scale = max(target[0] / height, target[1] / width)
    return max(target[0], round(height * scale)), max(target[1], round(width * scale))


def crop_at(frames: torch.Tensor, size: tuple[int, int], position: float) -> torch.Tensor:
    """Cut `size` (height, width) out of frames (..., H, W): `position` 0 is top left, 1 bottom right, 0.5 the centre."""
    top, left = (int((side - part) * position) for side, part in zip(frames.shape[-2:], size, strict=True))
    return frames[..., top : top + size[0], left : left + size[1]]


# ---------------------------------------------------------------------- the processor


class EverestVideoProcessorKwargs(VideosKwargs, total=False):
    """What a call may override beside the arguments of every video processor.

    frame_sampling: "stride" (every frame_step-th frame of a clip) or "segment" (one frame of each equal part).
    frame_step: stride between the frames of a clip, in frames of the video. In its place `fps` may be given, frames of
        a clip in a second: the stride is then the video's own rate over it, rounded, and at least 1.
    num_input_frames: number of frames delivered where the model selects num_frames of them itself; it belongs to a
        num_frames, and where that alone is overridden, as many frames are delivered as it says.
    """

    frame_sampling: str | None
    frame_step: int | None
    num_input_frames: int | None


class EverestVideoProcessor(BaseVideoProcessor):
    """Turn videos into `pixel_values` (B, T, C, H, W), float, ImageNet-normalised.

    Takes a path (where everest_hf is installed, of a folder of frames too) or URL, or a video as an array (T, H, W, C)
    or (T, C, H, W), or a list of either. The frames of the centre clip are sampled, scaled to just cover `size`
    (bilinear, antialiased) and cropped in the centre. Where `size` is given as height and width, it is the size of the
    crop too, unless `crop_size` is given.
    An array that has exactly as many frames as the model takes is a clip already and is not sampled again.

    Beside the fields of every video processor it has num_frames (of a clip), num_input_frames (candidates of frame
    selection; None without it), frame_step and frame_sampling (see `EverestVideoProcessorKwargs`); a call may override them.

    Raises:
        FileNotFoundError, ValueError: a video is missing or cannot be read; the message names it.
        ValueError: a value is impossible; the message names it and what would be right.
    """

    valid_kwargs = EverestVideoProcessorKwargs  # type: ignore[assignment]  # annotated for images
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 16
    num_input_frames = None
    frame_step = 4
    frame_sampling = "stride"

    if TYPE_CHECKING:  # Transformers does not tell what it sets and returns
        fps: float | None

        @classmethod
        def from_pretrained(cls, *args, **kwargs) -> "EverestVideoProcessor": ...

    def __init__(self, **kwargs: Unpack[EverestVideoProcessorKwargs]):
        if kwargs.get("size") is not None and kwargs.get("crop_size") is None:
            kwargs["crop_size"] = kwargs["size"]
        super().__init__(**kwargs)  # type: ignore[misc]  # annotated without what a class adds
        if self.do_sample_frames:
            self._sampling()

    @classmethod
    def from_dict(cls, video_processor_dict, **kwargs):  # type: ignore[override]  # annotated for images
        """Build from what a file says and what a call overrides; what belongs to an override changes with it."""
        num_frames = video_processor_dict.get("num_frames", cls.num_frames)
        return super().from_dict(video_processor_dict, **_with_what_belongs(kwargs, num_frames))

    @classmethod
    def from_config(cls, config, **kwargs) -> "EverestVideoProcessor":
        """Return the processor for a model of `config`; `kwargs` (frame_step, frame_sampling, …) go to the processor.

        Files are read as RGB: for a model of another number of channels, the processor takes arrays alone.
        """
        height, width = config.frame_size
        fitting = {
            "size": {"height": height, "width": width},
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "num_frames": config.num_frames,
            "num_input_frames": config.num_input_frames,
        }
        if config.num_channels != 3:
            fitting["do_convert_rgb"] = False
        return cls(**{**fitting, **_with_what_belongs(kwargs, config.num_frames)})

    def preprocess(self, videos, **kwargs: Unpack[EverestVideoProcessorKwargs]) -> BatchFeature:
        """Return a BatchFeature with `pixel_values` (B, T, C, H, W); see the class for what `videos` may be."""
        options: dict = _with_what_belongs(kwargs, self.num_frames)
        if options.get("do_sample_frames", self.do_sample_frames):
            options |= self._sampling(**options)
            if options["fps"] is not None:
                options["frame_step"] = None
        batch = super().preprocess(_paths_as_text(videos), **options)
        batch["pixel_values"] = batch.pop("pixel_values_videos")
        return batch

    def sample_frames(  # type: ignore[override]  # a list does where an array is annotated
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        num_input_frames: int | None = None,
        frame_step: int | None = None,
        frame_sampling: str | None = None,
        **kwargs,
    ) -> list[int]:
        """Return the frame indices of the centre view of a video of metadata.total_num_frames frames.

        Raises:
            ValueError: an argument is impossible, or the video has no frames, or no rate where fps is given.
        """
        sampling = self._sampling(
            num_frames=num_frames,
            fps=fps,
            num_input_frames=num_input_frames,
            frame_step=frame_step,
            frame_sampling=frame_sampling,
        )
        fps = sampling.pop("fps")
        count = sampling["num_input_frames"] or sampling["num_frames"]
        if metadata.video_backend is None and metadata.total_num_frames == count:  # a clip already
            return list(range(count))
        if fps is not None:
            if not metadata.fps:
                raise ValueError(f"fps is {fps}, but the video does not tell its own rate; give frame_step")
            sampling["frame_step"] = max(1, round(metadata.fps / fps))
        return frame_indices(num_video_frames=metadata.total_num_frames, **sampling)

    def _sampling(self, fps: float | None = None, **given) -> dict:
        """Return how frames are sampled, as given, else as the processor's fields say: arguments of `frame_indices`,
        and fps, None where frame_step counts.

        Raises:
            ValueError: a value is impossible.
        """
        names = ("num_frames", "frame_step", "frame_sampling")
        sampling = {name: getattr(self, name) if given.get(name) is None else given[name] for name in names}
        if fps is None and given.get("frame_step") is None:
            fps = self.fps
        elif fps is not None and given.get("frame_step") is not None:
            raise ValueError(f"fps is {fps} and frame_step is {given['frame_step']}; give one of them")
        _check_fps(fps, sampling["frame_sampling"])
        for name in ("num_frames", "frame_step"):
            if not isinstance(sampling[name], int) or sampling[name] < 1:
                raise ValueError(f"{name} is {sampling[name]!r}; it must be a positive integer")
        check_frame_sampling(sampling["frame_sampling"])
        candidates = given.get("num_input_frames")
        if candidates is None and sampling["num_frames"] == self.num_frames:
            candidates = self.num_input_frames
        if candidates is not None and not (isinstance(candidates, int) and candidates >= sampling["num_frames"]):
            right = f"None or an integer of at least num_frames={sampling['num_frames']}"
            raise ValueError(f"num_input_frames is {candidates!r}; it must be {right}")
        return {**sampling, "num_input_frames": candidates, "fps": fps}

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        """Read one video, or a list of them, with the first decoder that is installed: frames and metadata."""
        if isinstance(video_url_or_urls, (list, tuple)):
            return list(zip(*[self.fetch_videos(v, sample_indices_fn) for v in video_url_or_urls], strict=True))
        return _read_video(video_url_or_urls, sample_indices_fn)

    def _prepare_input_videos(self, videos, input_data_format=None, **kwargs):  # type: ignore[override]  # called by name
        """Bring videos to tensors (T, C, H, W): Transformers 4 takes every tensor for one, whatever its shape."""
        videos = [torch.as_tensor(video) for video in videos]
        given = input_data_format or infer_channel_dimension_format(videos[0])
        if given == ChannelDimension.LAST:
            videos = [video.permute(0, 3, 1, 2).contiguous() for video in videos]
        return super()._prepare_input_videos(videos, input_data_format=ChannelDimension.FIRST, **kwargs)

    def resize(self, image: torch.Tensor, size: SizeDict, *args, **kwargs) -> torch.Tensor:
        """Scale frames (..., H, W) to just cover `size`; a size by its edges is what it is in every processor."""
        if size.height and size.width:
            height, width = cover_size(image.shape[-2], image.shape[-1], (size.height, size.width))
            size = SizeDict(height=height, width=width)
        return super().resize(image, size, *args, **kwargs)

    def center_crop(  # type: ignore[override]  # annotated for arrays
        self, image: torch.Tensor, size: SizeDict, **kwargs
    ) -> torch.Tensor:
        """Cut the centre out of frames (..., H, W); frames that are too small are padded with black."""
        if not (size.height and size.width) or size.height > image.shape[-2] or size.width > image.shape[-1]:
            return super().center_crop(image, size, **kwargs)
        return crop_at(image, (size.height, size.width), view_position(0, 1))

    def rescale_and_normalize(self, images, do_rescale, rescale_factor, do_normalize, image_mean, image_std):
        """Scale and normalise frames (..., C, H, W); where they are not made RGB, C is the number of values of the mean.

        Raises:
            ValueError: it is not.
        """
        channels = images.shape[-3]
        fits = not isinstance(image_mean, (list, tuple)) or len(image_mean) == channels
        if do_normalize and not self.do_convert_rgb and not fits:
            raise ValueError(
                f"the video has {channels} channels; expected {len(image_mean)}, as image_mean has values"
            )
        return super().rescale_and_normalize(images, do_rescale, rescale_factor, do_normalize, image_mean, image_std)


def _with_what_belongs(given, num_frames: int) -> dict:
    """Return the given arguments with what belongs to them and is not given: a crop to a size, candidates to a clip.

    num_frames: of the processor whose fields are overridden; its candidates belong to this number.
    """
    given, size = dict(given), given.get("size")
    by_edges = not (size.get("height") if isinstance(size, dict) else getattr(size, "height", True))
    if size is not None and given.get("crop_size") is None and not by_edges:
        given["crop_size"] = size
    if given.get("num_frames") not in (None, num_frames) and given.get("num_input_frames") is None:
        given["num_input_frames"] = given["num_frames"]
    return given


def _check_fps(fps: float | None, frame_sampling: str) -> None:
    if fps is None:
        return
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps!r}; it must be a positive number")
    if frame_sampling != "stride":
        raise ValueError(f"fps is {fps}; it has no meaning for frame_sampling={frame_sampling!r}")


def _paths_as_text(videos):
    if isinstance(videos, os.PathLike):
        return os.fspath(videos)
    if isinstance(videos, (list, tuple)):
        return [_paths_as_text(video) for video in videos]
    return videos


def _read_video(video: str, sample_indices_fn=None):
    """Return the sampled frames of a file or URL, (T, H, W, C), and their VideoMetadata."""
    is_url = video.startswith(("http://", "https://"))
    if not is_url and not os.path.exists(video):
        raise FileNotFoundError(f"{video}: no such video file")
    try:
        return sampled_frames(_download(video) if is_url else video, video, sample_indices_fn)
    except Exception as error:
        line = _first_line(error)
        raise ValueError(line if line.startswith(f"{video}: ") else f"{video}: cannot be read: {line}") from error


def sampled_frames(
    source: str | bytes, name: str, sample_indices_fn: Callable | None = None, **limits
) -> tuple[torch.Tensor, VideoMetadata]:
    """Return the frames (T, H, W, C) of a video that a function of its metadata chooses (all without), and the metadata.

    source: a path, or the bytes of a file; name: what errors call it. limits: of `everest_hf.video.open_video`, where
    the package is installed.
    """
    opened = _open_video(source, name, **limits)
    metadata = VideoMetadata(
        total_num_frames=opened.num_frames,
        fps=opened.fps or None,
        duration=opened.num_frames / opened.fps if opened.fps else None,
        video_backend="pyav",
    )
    wanted = sample_indices_fn(metadata=metadata) if sample_indices_fn else range(opened.num_frames)
    metadata.frames_indices = list(wanted)
    return opened.read_clip(metadata.frames_indices), metadata


def _download(url: str) -> bytes:
    """Return the file behind a URL, within the limits of `read_fetched` and TIME_LIMIT seconds."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return read_fetched(response, TIME_LIMIT)


def read_fetched(file: BinaryIO, seconds: float) -> bytes:
    """Return the content of a video file that comes over a network, within `seconds` (0: no limit).

    Raises:
        ValueError: it takes longer, or it has more than MAX_DOWNLOAD bytes.
    """
    start, content = time.monotonic(), bytearray()
    while part := file.read(2**20):
        content += part
        if len(content) > MAX_DOWNLOAD:
            raise ValueError(f"the file is larger than {MAX_DOWNLOAD / 2**30:g} GiB; download it first")
        if 0 < seconds < time.monotonic() - start:
            raise ValueError(f"to download it takes longer than {seconds:g} s; download it first")
    return bytes(content)


def _open_video(source: str | bytes, name: str, **limits) -> Any:
    """Open a video: with everest_hf where it is installed, which seeks where that is right; else from the start on."""
    try:
        reading = importlib.import_module("everest_hf.video")
    except ImportError:
        if isinstance(source, str) and os.path.isdir(source):
            raise ValueError("to read a folder of frames needs the package everest_hf") from None
        return SequentialVideo(source)
    return reading.open_video(source, name=name, **limits)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


EverestVideoProcessor.register_for_auto_class("AutoVideoProcessor")
