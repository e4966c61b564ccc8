"""From a video to pixel values, and from a classifier's logits to labels."""

import torch
from datasets import Dataset

from ..configuration_everest import problem_type_of
from ..data import VideoViews, transforms


def evaluation_views(rows, model, processor, views: tuple[int, int], **options):
    """Return the `VideoViews` of rows as the model's training evaluated them; views: segments x crops."""
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


def read_view(processor, video: str) -> tuple[torch.Tensor, list[int]]:
    """Return pixel values (1, T, C, H, W) and the places of these frames in the video."""
    batch = processor(video, return_tensors="pt", return_metadata=True)
    return batch["pixel_values"], list(batch["video_metadata"][0].frames_indices)


def to_uint8(pixel_values: torch.Tensor, processor) -> torch.Tensor:
    """Undo the normalisation of frames (T, C, H, W): uint8, as they were scaled and cropped."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (processor.image_mean, processor.image_std))  # (C, 1, 1)
    return ((pixel_values.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def classify(
    model, processor, video: str, keep_ratio: float | None = None, views: tuple[int, int] = (1, 1)
) -> torch.Tensor:
    """Return the logits (views, num_labels) float32 of a video: of its centre clip, or of `views`, segments x crops.

    The video is a file; for its centre clip it may be a URL.
    """
    if views == (1, 1):
        pixel_values = processor(video, return_tensors="pt")["pixel_values"]  # (1, T, C, H, W)
    else:
        pixel_values = _read_views(model, processor, video, views)  # (V, T, C, H, W)
    with torch.inference_mode():
        return model(pixel_values.to(model.device), keep_ratio=keep_ratio).logits.float().cpu()


def _read_views(model, processor, video: str, views: tuple[int, int]) -> torch.Tensor:
    clips = evaluation_views(Dataset.from_dict({"video": [video]}), model, processor, views)[0]["pixel_values"]
    return transforms.normalize(clips, model.config.image_mean, model.config.image_std)


def top_labels(logits: torch.Tensor, config, k: int) -> list[tuple[str, float]]:
    """Return the k labels (at most all) of largest score, with it: a probability, or for regression the value.

    logits: (views, num_labels); the score is the mean over the views.
    """
    scores = _scores(logits, config).mean(dim=0).topk(min(k, config.num_labels))
    return [(config.id2label[i], s) for i, s in zip(scores.indices.tolist(), scores.values.tolist(), strict=True)]


def _scores(logits: torch.Tensor, config) -> torch.Tensor:
    problem_type = problem_type_of(config)
    if problem_type == "regression":
        return logits
    return logits.sigmoid() if problem_type == "multi_label_classification" else logits.softmax(dim=-1)
