"""A folder of pictures as a video. Each picture is a frame; the numbers in their names are their order."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageOps

from ..video_reading_everest import check_pixels
from .containers import Header, remembered

SUFFIXES = (".jpg", ".jpeg", ".png")
# Before, in and after the last number of a name.
_NAME = re.compile(r"(.*?)(\d+)(\D*)")
# Culprits that an error names.
NAMED = 3


def is_picture(name: str) -> bool:
    """Say whether a name ends as those of frames do, and is not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@dataclass(frozen=True)
class Frames:
    """The names of a folder's frames, in short, since a process remembers those of many folders.

    Frame i, from 0, is `prefix`, the number `first` + i with at least `width` digits, and `suffix`.
    """

    prefix: str
    first: int
    width: int
    suffix: str
    count: int

    def name(self, i: int) -> str:
        """Return the name of frame i, counted from 0."""
        return f"{self.prefix}{self.first + i:0{self.width}}{self.suffix}"


def frames_in(folder: str) -> Frames:
    """Return the frames of a folder, in the order of the last number in the name of each.

    Raises:
        ValueError: there is none; or names do not differ in this number alone, or it has gaps.
    """
    names = [name for name in os.listdir(folder) if is_picture(name)]
    if not names:
        raise ValueError(f"a folder without frames, which are files ending in {', '.join(SUFFIXES)}")
    numbers = {name: int(match[2]) for name in names if (match := _NAME.fullmatch(name))}
    without = sorted(set(names) - set(numbers))
    if without:
        raise ValueError(f"{_named(without)}: frames are told by a number in their names, as img_00001.jpg")
    names.sort(key=lambda name: (numbers[name], name))
    for before, name in pairwise(names):
        if numbers[name] == numbers[before]:
            raise ValueError(f"{before} and {name} have one number; keep frames of one kind in a folder")
        if numbers[name] != numbers[before] + 1:
            raise ValueError(f"{before} and {name} follow one another, with a gap between; number frames one by one")
    prefix, digits, suffix = _NAME.fullmatch(names[0]).groups()  # type: ignore[union-attr]  # each matches
    frames = Frames(prefix, numbers[names[0]], len(digits), suffix, len(names))
    for i, name in enumerate(names):
        if name != frames.name(i):
            raise ValueError(f"{names[0]} and {name} differ in more than their numbers; expected {frames.name(i)}")
    return frames


def _named(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f", … {len(names)} in all" if len(names) > NAMED else "")


def picture_header(folder: str, max_pixels: int = 0) -> Header:
    """Return what a folder of pictures says of its video, by its first one; max_pixels: of `check_pixels`."""
    first = remembered(frames_in, folder).name(0)
    with _open(folder, first) as picture:
        width, height = picture.size
        kind = (picture.format or "").lower()
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientation, in which the sides change places
    check_pixels(1, height, width, max_pixels)
    height, width = (width, height) if turned else (height, width)
    return Header(
        codec=kind,
        duration=None,
        fps=0.0,
        height=height,
        width=width,
        matrix=(1, 0, 0, 1),
        times=None,
        time_base=None,
        obstacles=frozenset(),
    )


def _open(folder: str, name: str) -> Image.Image:
    try:
        return Image.open(os.path.join(folder, name), formats=("JPEG", "PNG"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: no picture, or a damaged one") from error


class PictureDecoder:
    """Frames from a folder of JPEG or PNG files, by Pillow. It does not scale."""

    obstacles: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, source: str | bytes, size: tuple[int, int] | None = None, header: Header | None = None):
        self._folder = os.fsdecode(source)
        self._header = header or picture_header(self._folder)
        self._frames: Frames = remembered(frames_in, self._folder)
        self.num_frames = self._frames.count

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._frame(self._frames.name(i)) for i in indices])

    def read_blocks(self, blocks: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        return map(self.read, blocks)

    def _frame(self, name: str) -> torch.Tensor:
        expected = self._header.height, self._header.width
        with _open(self._folder, name) as picture:
            if set(picture.size) != set(expected):  # before it is decoded: it may be huge
                self._refuse_size(name, picture.size)
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"{name}: has more than 8 bits a colour; write frames in 8")
            try:
                pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{name}: a damaged picture: {error}") from error
        if pixels.shape[:2] != expected:
            self._refuse_size(name, pixels.shape[1::-1])
        return torch.from_numpy(pixels)

    def _refuse_size(self, name: str, size: Sequence[int]) -> None:
        raise ValueError(
            f"{name}: is {size[0]} x {size[1]} pixels, where {self._frames.name(0)} is {self._header.width} x "
            f"{self._header.height}; frames of a video have one size"
        )


def is_folder_of_pictures(path: str | bytes) -> TypeGuard[str]:
    """Say whether a source is the path of a folder with a frame in it."""
    if not isinstance(path, str) or not os.path.isdir(path):
        return False
    with os.scandir(path) as entries:
        return any(is_picture(entry.name) for entry in entries)
