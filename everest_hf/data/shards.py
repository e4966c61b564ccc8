"""Webdataset files: that every sample has its one video is seen in the headers, before `datasets` copies a byte.

`datasets` takes the fields of the first samples for those of all: it says no more than that these differ, and drops
what is more or less in a later one.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

from .rows import is_video, named

# The name of a sample and a field in the name of a member, as webdataset has them: the first dot parts the two.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
# The samples that `datasets` looks at for the fields of all.
_FIRST = 5


class ShardError(ValueError):
    """A webdataset file is not as it must be; the message names it and the members that are wrong."""


def check_shards(paths: Sequence[str], video_column: str | None, *, first_only: bool) -> None:
    """Refuse a sample that has not one video, of the same suffix in all files; only headers are read.

    `video_column` is the field of the videos where it was named; first_only: see the first samples of the first file.

    Raises:
        ShardError: as said.
        OSError, tarfile.TarError: a file cannot be read.
    """
    samples = ((path, *sample) for path in paths for sample in _samples(path))
    first: list[str] = []
    for number, (path, key, fields) in enumerate(islice(samples, _FIRST) if first_only else samples):
        first = first or fields
        reason = _fault(fields, first, video_column, compare=number < _FIRST)
        if reason:
            members = videos if len(videos := _videos(fields, video_column)) > 1 else fields
            dotted = any("." in field for field in members)
            hint = "; a sample's name ends at the first dot: leave the other dots out of the names" if dotted else ""
            raise ShardError(f"{path}: {named([f'{key}.{field}' for field in members])}: {reason}{hint}")
    if not first:
        raise ShardError(f"{named(list(paths))}: no sample of files such as 000.mp4 and 000.cls")


def _samples(path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the fields of each sample; as `datasets` reads them, hidden files are no part of one."""
    with tarfile.open(path) as archive:
        files = (member.name for member in archive if member.isreg())
        names = (name for name in files if not os.path.basename(name).startswith((".", "__")))
        parts = (match.groups() for name in names if (match := _MEMBER.fullmatch(name)))
        for key, members in groupby(parts, key=lambda part: part[0]):
            yield key, [field for _, field in members]


def _fault(fields: list[str], first: list[str], video_column: str | None, *, compare: bool) -> str | None:
    """Say what is wrong with the fields of a sample beside those of the first one; compare: all of them."""
    videos, usual = _videos(fields, video_column), _videos(first, video_column)
    if not videos:
        return f"a sample without {video_column or 'a video'}; its files must follow one another"
    if len(videos) > 1:
        return f"{len(videos)} videos in a sample; it must have one, or video_column must name the field"
    if videos != usual:
        return f"the video's suffix is not {usual[0]!r} as in the first sample; it must be the same in all"
    if compare and sorted(fields) != sorted(first):
        return f"the first sample has {', '.join(first)}; all must have the same, one after another"
    return None


def _videos(fields: list[str], video_column: str | None) -> list[str]:
    return [field for field in fields if (field == video_column if video_column else is_video(f".{field}"))]
