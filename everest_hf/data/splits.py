"""Labelled videos divided into training, validation and test."""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Value

from ..files import write_whole
from .lists import write_csv
from .rows import class_names_of, named
from .segments import segments_in
from .sources import load_videos

TRAIN, PARTS = "train", ("train", "val", "test")
# Orders in which groups are dealt out before a split counts as impossible.
ATTEMPTS = 100


@dataclass(frozen=True)
class Split:
    """What `split_videos` wrote. files: the list of each part. counts: by class, the videos in each part."""

    files: dict[str, Path]
    counts: dict[str, dict[str, int]]


def split_videos(
    source: str | os.PathLike,
    *,
    val: float = 0.2,
    test: float = 0.0,
    group: str | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    overwrite: bool = False,
    **options,
) -> Split:
    """Divide the videos of a source, and write a list of each part: train.csv, val.csv and, where test > 0, test.csv.

    Each part has its share of each class, and at least one video. `group` is a regular expression; the videos in whose
    paths it finds the same (its first group, where it has one) stay together, as do segments of one video. The lists
    lie in `out`, by default the source's folder, and their paths are relative to it. The same seed gives the same
    split. source, options: of `everest_hf.data.load_videos`.

    Raises:
        ValueError, FileNotFoundError: the source is not one, its videos are not files, a share is not possible, or
            videos and groups are too few for a class to be in each part.
        FileExistsError: a list is there already, and `overwrite` is not given.
    """
    shares = _shares_of(val, test)
    pattern = _compiled(group)
    out = _folder_of(Path(source).expanduser(), out)
    _check_free(Path(source).expanduser(), out, shares, overwrite)
    rows = load_videos(source, **options)
    if rows.features["video"] != Value("string"):
        raise ValueError(f"{source}: its videos are not files of their own, so that no list can name them")
    names = class_names_of(rows)
    _check_names(names or [], str(source))
    labels = [names[label] if names else str(label) for label in rows["label"]]
    paths = [path if "://" in path else os.path.relpath(path, out) for path in rows["video"]]
    part_of = assign(labels, _groups_of(paths, pattern, group), shares, seed)
    files = {part: out / f"{part}.csv" for part in shares}
    columns = {"video": paths, **segments_in(rows), "label": labels}
    lines = list(zip(*columns.values(), strict=True))
    for part, path in files.items():
        chosen = [line for line, its in zip(lines, part_of, strict=True) if its == part]
        write_whole(path, partial(write_csv, header=list(columns), lines=chosen))
    counted = Counter(zip(labels, part_of, strict=True))
    return Split(files, {name: {part: counted[name, part] for part in shares} for name in sorted(set(labels))})


def _shares_of(val: float, test: float) -> dict[str, float]:
    if not 0 < val < 1:
        raise ValueError(f"val is {val:g}; it must be a share above 0 and below 1, such as 0.2")
    if not (test >= 0 and 1 - val - test > 1e-9):  # which floats make of 1 - 0.7 - 0.3
        raise ValueError(f"test is {test:g}; it must be a share of 0 or more and below {1 - val:g}, what val leaves")
    return {TRAIN: 1 - val - test, "val": val, **({"test": test} if test else {})}


def _compiled(group: str | None) -> re.Pattern | None:
    try:
        return None if group is None else re.compile(group)
    except re.error as error:
        raise ValueError(f"group is {group!r}, which is no regular expression: {error}") from None


def _folder_of(source: Path, out: str | os.PathLike | None) -> Path:
    if out is not None:
        return Path(os.path.abspath(Path(out).expanduser()))
    if not source.exists():
        raise FileNotFoundError(
            f"{source}: no such folder or list; of what is elsewhere, name a folder for the lists (out)"
        )
    return Path(os.path.abspath(source if source.is_dir() else source.parent))


def _check_free(source: Path, out: Path, shares: Mapping[str, float], overwrite: bool) -> None:
    """Refuse to write over the source, or over another split, of which a part must not stay beside this one's."""
    for path in (out / f"{part}.csv" for part in PARTS):
        if not path.exists():
            continue
        if source.exists() and path.samefile(source):
            raise ValueError(f"{path}: is the source itself; choose another folder (out), or another name for it")
        if path.stem not in shares:
            raise FileExistsError(f"{path}: is part of another split; remove it, or give test a share")
        if not overwrite:
            raise FileExistsError(f"{path}: is there already; overwrite replaces it")


def _check_names(names: Sequence[str], source: str) -> None:
    """Refuse names of classes, as folders may have them, that a list would have for numbers of classes."""
    numbers = [name for name in names if re.fullmatch(r"[-+]?[\d.]+", name)]
    if numbers and set(names) != {str(i) for i in range(len(names))}:
        raise ValueError(f"{source}: {named(numbers)}: classes that a list would have for numbers; name them by words")


def _groups_of(paths: Sequence[str], pattern: re.Pattern | None, group: str | None) -> list[str]:
    if pattern is None:
        return list(paths)
    found = [pattern.search(path) for path in paths]
    without = [path for path, match in zip(paths, found, strict=True) if match is None]
    if without:
        raise ValueError(f"{named(without)}: the group {group!r} is not found in the path")
    return [match[1] if match.re.groups else match[0] for match in found if match is not None]


# ---------------------------------------------------------------------- dealing out


def assign(labels: Sequence[str], groups: Sequence[str], shares: Mapping[str, float], seed: int) -> list[str]:
    """Return the part of each video: near the shares in each class, with no group in two parts and each class in all.

    shares: of each part; they add up to 1. Groups are dealt out from the largest on, each to the part that lacks most
    of its videos. Where a class is then not in all parts, other orders are tried.

    Raises:
        ValueError: a class cannot be in all parts.
    """
    sizes: dict[str, Counter] = defaultdict(Counter)  # of a group, its videos of each class
    for label, group in zip(labels, groups, strict=True):
        sizes[group][label] += 1
    _check_possible(sizes, shares)
    wanted = _wanted(Counter(labels), shares)
    rng = random.Random(seed)
    fault = ""
    for attempt in range(ATTEMPTS):
        order = sorted(sizes)
        rng.shuffle(order)
        if attempt == 0:
            order.sort(key=lambda group: -sizes[group].total())
        part_of, fault = _deal(order, sizes, wanted)
        if not fault:
            return [part_of[group] for group in groups]
    raise ValueError(f"{fault} in any split that was tried; make the groups smaller")


def _check_possible(sizes: Mapping[str, Counter], shares: Mapping[str, float]) -> None:
    groups_of = Counter(label for counter in sizes.values() for label in counter)
    few = [f"{name!r} ({count})" for name, count in sorted(groups_of.items()) if count < len(shares)]
    if few:
        raise ValueError(
            f"class {named(few)}: too few videos, or groups of them, to be in {', '.join(shares)}: "
            f"{len(shares)} are needed"
        )


def _wanted(totals: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return how many videos of each class each part is to have: its share, and one at least."""
    wanted: dict[str, dict[str, float]] = {part: {} for part in shares}
    for name, total in totals.items():
        held_out = {part: max(1.0, share * total) for part, share in shares.items() if part != TRAIN}
        for part, count in {TRAIN: total - sum(held_out.values()), **held_out}.items():
            wanted[part][name] = count
    return wanted


def _deal(
    order: Sequence[str], sizes: Mapping[str, Counter], wanted: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, str], str]:
    """Return the part of each group, and, where a class is not in all parts, what says so."""
    lacks = {part: dict(counts) for part, counts in wanted.items()}
    totals = Counter(name for counter in sizes.values() for name in counter.elements())
    given: dict[str, set[str]] = {part: set() for part in wanted}
    part_of = {}
    for group in order:
        need = {
            part: sum(count * lacks[part][name] / totals[name] ** 2 for name, count in sizes[group].items())
            for part in wanted
        }
        part = part_of[group] = max(need, key=need.__getitem__)
        given[part].update(sizes[group])
        for name, count in sizes[group].items():
            lacks[part][name] -= count
    faults = (
        f"class {name!r} was not in {part}" for part in wanted for name in sorted(totals) if name not in given[part]
    )
    return part_of, next(faults, "")
