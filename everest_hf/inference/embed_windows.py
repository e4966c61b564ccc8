"""Features of long videos: a .npy file for each, with a vector for each window."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..data import class_names_of, source_of
from ..data.rows import is_video, paths_of
from ..data.segments import WHERE, segment_in, segments_in
from ..files import held, write_whole
from ..modeling_everest import EverestPreTrainedModel
from ..video import MAX_PIXELS, TIME_LIMIT, Segment, VideoError, open_video
from .embed import digest_of_model
from .localization import ANNOTATIONS, annotations_of, database_of, reader_settings
from .slots import SlotEncoder
from .video_windows import VideoWindows, checked_windows

logger = logging.getLogger(__name__)

ABOUT = "features.json"


def embed_windows(
    model: EverestPreTrainedModel,
    processor,
    rows: Dataset,
    out: str | os.PathLike,
    *,
    subset: str = "training",
    keep_ratio: float | None = None,
    url_schemes: Sequence[str] = (),
    time_limit: float = TIME_LIMIT,
    max_pixels: int = MAX_PIXELS,
    **placing,
) -> list[VideoError]:
    """Write the features of each video of `rows` into the folder `out`, and return the videos that cannot be read.

    `<stem>.npy` is float32 (n, D), a vector for each window (see `windows`); videos of one name keep the folders that
    they lie in. features.json says how they were made and where in time each feature is; annotations.json holds the
    segments of the rows and their labels, as programs for temporal action localisation read them.

    A file appears when it is whole. The same call goes on after an interruption. Other videos can be added to the same
    folder, as another subset.

    subset: the part of the data set that these videos are. placing: stride, frame_step, fps and batch_size of `windows`.
    The others as there, and in `everest_hf.data.source_of`.

    Raises:
        ValueError: the folder holds features of another model or of other windows, or another video has the name of
            one; or as in `windows`.
        OSError: a file cannot be written. BlockingIOError: another process writes into the folder.
    """
    encoder, out = SlotEncoder(model, keep_ratio), Path(out)
    places = checked_windows(model, processor, **placing)
    settings = {
        "model": model.name_or_path,
        "weights": digest_of_model(model),
        "keep_ratio": keep_ratio or model.config.keep_ratio,
        **{name: places[name] for name in ("stride", "frame_step", "fps")},
        "span": (model.config.num_frames - 1) * places["frame_step"] + 1,
        "dim": model.config.hidden_size,
    }
    opening = {"time_limit": time_limit, "max_pixels": max_pixels}
    with held(out):
        records = _opened(out / ABOUT, settings)
        named = _named(rows, records)
        _write_json(out / ABOUT, {**settings, "videos": records})
        bad = []
        for name, numbers in tqdm(named.items(), "embed", unit="video"):
            try:
                video = _open(rows, numbers, url_schemes, opening)
                windows = VideoWindows(encoder, processor, video, **places)
                records[name] |= _record(windows, rows, numbers, subset)
                _write_features(out / f"{name}.npy", windows, settings["dim"])
            except VideoError as error:
                bad.append(error)
        _finish(out, settings, records, bad)
    return bad


def _open(rows: Dataset, numbers: list[int], url_schemes: Sequence[str], opening: dict[str, Any]):
    """Open the video that rows are about, and see that their segments are in it."""
    video = rows[numbers[0]]["video"]
    source = source_of(video, numbers[0], url_schemes=url_schemes, time_limit=opening["time_limit"])
    opened = open_video(**source, **opening)
    for segment in _segments(rows, numbers):
        if segment is not None:
            with _named_as(opened):
                segment.frames_in(opened.num_frames, opened.header)
    return opened


@contextmanager
def _named_as(video) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise VideoError(video.name, str(error)) from error


def _segments(rows: Dataset, numbers: list[int]) -> list[Segment | None]:
    """Return the segments of some rows; [] where the rows have none."""
    columns = list(segments_in(rows))
    return [segment_in(row) for row in rows.select_columns([*columns, WHERE]).select(numbers)] if columns else []


def _labels(rows: Dataset, numbers: list[int]) -> list[str | None]:
    """Return the names of the classes of some rows, or their numbers as text."""
    if "label" not in rows.column_names:
        return [None] * len(numbers)
    classes = class_names_of(rows)
    return [
        str(classes[label] if classes else label) for label in rows.select_columns("label").select(numbers)["label"]
    ]


def _record(windows: VideoWindows, rows: Dataset, numbers: list[int], subset: str) -> dict[str, Any]:
    """Return what features.json says of a video: its frames, its features' seconds, its actions."""
    duration = windows.num_frames / windows.fps if windows.fps else None
    segments = _segments(rows, numbers)
    with _named_as(windows.video):
        labels = _labels(rows, numbers) if segments else []
        actions = annotations_of(labels, segments, duration, windows.video.fps)
    return {
        "subset": subset,
        "num_frames": windows.num_frames,
        "fps": windows.fps or None,
        "duration": duration,
        "count": len(windows),
        "seconds": None if windows.centers is None else [round(second, 6) for second in windows.centers],
        "annotations": actions,
    }


def _write_features(path: Path, windows: VideoWindows, dim: int) -> None:
    """Write the features of a video, unless they are there."""
    if path.exists() and _shape_of(path) == (len(windows), dim):
        return

    def write(aside: Path) -> None:
        # In the file at once: those of a day would not fit in memory.
        features = np.lib.format.open_memmap(aside, "w+", np.float32, (len(windows), dim))
        try:
            for i, window in enumerate(tqdm(windows, windows.video.name, unit="window", leave=False)):
                features[i] = window.features
        except VideoError:
            aside.unlink()
            raise
        features.flush()

    write_whole(path, write)


def _shape_of(path: Path) -> tuple[int, ...]:
    try:
        return np.load(path, mmap_mode="r").shape
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged (%s) and made again", path, error)
        return ()


# ---------------------------------------------------------------------- names


def _named(rows: Dataset, records: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """Return the numbers of the rows of each video by the name of its features, and note the names in the records."""
    by_path: dict[str, list[int]] = {}
    for i, path in enumerate(paths_of(rows)):
        by_path.setdefault(path, []).append(i)
    names = feature_names(list(by_path))
    for name, path in zip(names, by_path, strict=True):
        known = records.setdefault(name, {"video": path})["video"]
        if known != path:
            raise ValueError(f"{path}: its features would be {name}.npy, which are of {known}; choose another folder")
    return dict(zip(names, by_path.values(), strict=True))


def feature_names(paths: Sequence[str]) -> list[str]:
    """Return what the features of each video are called: its name without suffix, or, where others have this name too,
    with the folders below the one that all videos lie in, and where that is not enough, with the suffix.
    """
    places = [PurePath(path.partition("://")[2] if "://" in path else os.path.abspath(path)) for path in paths]
    common = os.path.commonpath([place.parent for place in places])
    below = [place.relative_to(common) if place.is_relative_to(common) else place for place in places]
    bare = [place.with_suffix("") if is_video(place.name) else place for place in below]
    forms = [[place.name for place in bare], [place.as_posix() for place in bare], [p.as_posix() for p in below]]
    counts = [Counter(form) for form in forms]
    found = [
        next((name for name, count in zip(names, counts, strict=True) if count[name] == 1), names[-1])
        for names in zip(*forms, strict=True)
    ]
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}.npy would hold the features of several videos; rename one of them")
    return found


# ---------------------------------------------------------------------- features.json


def _opened(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the videos that features.json knows, {} where there is none.

    Raises:
        ValueError: it is damaged, or of other features.
    """
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        videos = dict(known["videos"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: is damaged; remove it, and the features beside it that it was about") from None
    different = [name for name, value in settings.items() if name != "model" and known.get(name) != value]
    if different:
        raise ValueError(
            f"{path.parent}: holds features of another kind (different: {', '.join(different)}); choose another folder"
        )
    return videos


def _finish(out: Path, settings: dict[str, Any], records: dict[str, dict[str, Any]], bad: list[VideoError]) -> None:
    """Write annotations.json and features.json of the videos whose features are there."""
    videos = {name: record for name, record in records.items() if (out / f"{name}.npy").exists() and "count" in record}
    database = database_of(videos)
    _write_json(out / ANNOTATIONS, database)
    about = {**settings, **reader_settings(out, settings, database), "videos": videos}
    _write_json(out / ABOUT, {**about, "bad": [{"video": error.path, "reason": error.reason} for error in bad]})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8", errors="surrogateescape"))
