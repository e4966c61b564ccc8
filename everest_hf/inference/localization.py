"""What programs for temporal action localisation want beside features: annotations, and where the features lie in time.

ActionFormer (github: happyharrycn/actionformer_release) puts an action of s seconds at (s * fps - num_frames / 2) /
feat_stride, in features. OpenTAD (github: sming256/OpenTAD) puts one that begins at frame f at (f - offset_frames) /
(feature_stride * sample_stride). Both take the middle of a window for the place of its feature, as
`everest_hf.inference.video_windows` does.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..video import Segment

ANNOTATIONS = "annotations.json"


def annotations_of(
    labels: Iterable[str | None], segments: Iterable[Segment | None], duration: float | None, fps: float
) -> list[dict[str, Any]]:
    """Return the actions of a video as {"segment": [start, end] in seconds, "label": name}; a row without label has none.

    duration: of the video, which a row without segment is about. fps: of the video's own frames, in which a segment may
    be.

    Raises:
        ValueError: the seconds are not known.
    """
    found = []
    for label, segment in zip(labels, segments, strict=True):
        if label is None:
            continue
        if not fps or duration is None:
            raise ValueError("tells no rate of frames, so that its actions have no seconds")
        start, end = (0.0, duration) if segment is None else (segment.start, segment.end)
        unit = fps if segment is not None and segment.in_frames else 1
        found.append({"segment": [round(start / unit, 6), round(end / unit, 6)], "label": label})
    return found


def database_of(videos: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the json of annotations that both programs read, for the records of features.json by name.

    Classes are numbered in the order of their names, without a gap: ActionFormer takes the numbers of those that occur.
    """
    names = sorted({action["label"] for video in videos.values() for action in video["annotations"]})
    numbers = {name: i for i, name in enumerate(names)}
    return {"database": {name: _entry(video, numbers) for name, video in videos.items()}}


def _entry(video: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    known = {"duration": video["duration"], "fps": video["fps"]} if video["fps"] else {}
    actions = [{**action, "label_id": numbers[action["label"]]} for action in video["annotations"]]
    return {"subset": video["subset"], **known, "frame": video["num_frames"], "annotations": actions}


def reader_settings(
    folder: Path, settings: Mapping[str, Any], database: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return what goes into the configuration of each program, for the settings of features.json."""
    entries = database["database"].values()
    classes = {action["label"] for entry in entries for action in entry["annotations"]}
    actionformer = {
        "json_file": str(folder / ANNOTATIONS),
        "feat_folder": str(folder),
        "file_prefix": None,
        "file_ext": ".npy",
        "num_classes": len(classes),
        "input_dim": settings["dim"],
        "feat_stride": settings["stride"],
        "num_frames": settings["span"],
        "default_fps": settings["fps"],
    }
    opentad = {
        "ann_file": str(folder / ANNOTATIONS),
        "class_map": str(folder / "category_idx.txt"),  # which OpenTAD writes where it is missing
        "data_path": str(folder),
        "feature_stride": settings["stride"],
        "sample_stride": 1,
        "offset_frames": settings["span"] // 2,
    }
    return {"actionformer": actionformer, "opentad": opentad}
