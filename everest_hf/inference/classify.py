"""From a video to pixel values, and from a classifier's logits to labels."""

from typing import Any

import torch
from datasets import Dataset, Features, Value

from ..configuration_everest import problem_type_of
from ..data import VideoViews, source_of, transforms
from ..data.segments import FEATURES, columns_with
from ..video import MAX_PIXELS, TIME_LIMIT, Segment
from ..video_processing_everest import sampled_frames
from .sources import WEB


def evaluation_views(rows, model, processor, views: tuple[int, int], **options):
    """Return the `VideoViews` of rows as the model's training evaluated them; views: segments x crops.

    Raises:
        ValueError: the processor samples by seconds; views are in frames.
    """
    if processor.fps is not None:
        raise ValueError(
            f"the processor's fps is {processor.fps}; views are sampled by its frame_step, so fps must be null"
        )
    return VideoViews(
        rows,
        model.config.frame_size,
        num_frames=model.config.num_frames,
        num_input_frames=model.config.num_input_frames,
        frame_step=processor.frame_step,
        frame_sampling=processor.frame_sampling,
        num_segments=views[0],
        num_crops=views[1],
        **options,
    )


def read_view(
    processor,
    video: str,
    *,
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
    segment: Segment | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Return pixel values (1, T, C, H, W) of the centre view of a video, a file or URL, and the places of these frames.

    time_limit, max_pixels, segment: see `everest_hf.video.open_video`; a URL has the time limit too, and a size limit.

    Raises:
        VideoError: whatever is wrong with the video.
    """
    where = source_of(video, url_schemes=WEB, time_limit=time_limit)
    limits: dict[str, Any] = {"time_limit": time_limit, "max_pixels": max_pixels, "segment": segment}
    frames, metadata = sampled_frames(**where, sample_indices_fn=processor.sample_frames, **limits)  # (T, H, W, C)
    pixel_values = processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"]
    return pixel_values, list(metadata.frames_indices or ())


def to_uint8(pixel_values: torch.Tensor, processor) -> torch.Tensor:
    """Undo the normalisation of frames (T, C, H, W): uint8, as they were scaled and cropped."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (processor.image_mean, processor.image_std))  # (C, 1, 1)
    return ((pixel_values.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def classify(
    model, processor, video: str, keep_ratio: float | None = None, views: tuple[int, int] = (1, 1), **opening
) -> torch.Tensor:
    """Return the logits (views, num_labels) float32 of a video: of its centre clip, or of `views`, segments x crops.

    The video is a file or URL; opening and errors as in `read_view`.
    """
    if views == (1, 1):
        pixel_values, _ = read_view(processor, video, **opening)  # (1, T, C, H, W)
    else:
        pixel_values = _read_views(model, processor, video, views, **opening)  # (V, T, C, H, W)
    with torch.inference_mode():
        return model(pixel_values.to(model.device), keep_ratio=keep_ratio).logits.float().cpu()


def _read_views(
    model, processor, video: str, views: tuple[int, int], segment: Segment | None = None, **opening
) -> torch.Tensor:
    columns = columns_with([segment])
    features = {"video": Value("string"), **{name: FEATURES[name] for name in columns}}
    rows = Dataset.from_dict({"video": [video], **columns}, Features(features))
    clips = evaluation_views(rows, model, processor, views, url_schemes=WEB, **opening)[0]["pixel_values"]
    return transforms.normalize(clips, model.config.image_mean, model.config.image_std)


def top_labels(logits: torch.Tensor, config, k: int) -> list[tuple[str, float]]:
    """Return the k labels (at most all) of largest score, with it: a probability, or for regression the value.

    logits: (views, num_labels); the score is the mean over the views.
    """
    scores = scores_of(logits, config).mean(dim=0).topk(min(k, config.num_labels))
    return [(config.id2label[i], s) for i, s in zip(scores.indices.tolist(), scores.values.tolist(), strict=True)]


def scores_of(logits: torch.Tensor, config) -> torch.Tensor:
    """Return probabilities, or for regression values, of logits (n, num_labels)."""
    problem_type = problem_type_of(config)
    if problem_type == "regression":
        return logits
    return logits.sigmoid() if problem_type == "multi_label_classification" else logits.softmax(dim=-1)
