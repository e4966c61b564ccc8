"""Files of `datasets` for the tests, of real videos: parquet and webdataset."""

import tarfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

BOTH = {"bytes": Value("binary"), "path": Value("string")}


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory):
    """A cache of their own for the data sets of a module's tests."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def write_parquet(path: Path, cells: Sequence[dict], labels: Sequence[int], names: list[str]) -> Path:
    """Write a parquet file of cells {"bytes", "path"} and labels."""
    rows = {"video": list(cells), "label": list(labels)}
    Dataset.from_dict(rows, Features(video=BOTH, label=ClassLabel(names=names))).to_parquet(path)
    return path


def write_tar(path: Path, videos: Sequence[Path], **parts: Sequence[str]) -> Path:
    """Write a webdataset file of videos; parts: cls=["0", "1"] puts 000.cls with "0" beside 000.mp4, and so on."""
    members = []
    for i, video in enumerate(videos):
        contents = {"mp4": video.read_bytes(), **{suffix: texts[i].encode() for suffix, texts in parts.items()}}
        members += [(f"{path.stem}-{i:03}.{suffix}", content) for suffix, content in contents.items()]
    return write_members(path, members)


def write_members(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a .tar file of members, (name, content), in this order."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return path
