"""Labels that can be read and yet cannot be meant. Where they are learned they are refused, elsewhere warned of."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pyarrow.compute as pc
from datasets import Dataset, Value

from .rows import Row, class_names_of, is_integer, labels_in, named, refuse

logger = logging.getLogger(__name__)

# What is meant as a number, but is no integer: 10.0, 1.5e+01, --1.
_NO_INTEGER = re.compile(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?|[+-]{2,}\d+", re.IGNORECASE)
# The names of HMDB51's videos end in codes of the body's part, camera, people, view, quality, and a number.
_HMDB51 = re.compile(r".+_[fhlu]_(cm|nm)_np\d+_(fr|ba|le|ri)_(bad|med|goo)_\d+\.\w+")


def warn(culprits: list[str], reason: str) -> None:
    """Log what `refuse` raises."""
    if culprits:
        logger.warning("%s: %s", named(culprits), reason)


def check_texts(rows: list[Row], problem_type: str, *, learned: bool) -> None:
    """Look at labels that nobody declared as classes; `learned`: raise a ValueError for what cannot be meant."""
    tell = refuse if learned else warn
    first: dict[str, Row] = {}
    for row in rows:
        for text in filter(None, labels_in(row, problem_type)):  # what is empty is refused as such
            first.setdefault(text, row)
    tell(
        [f"{row.where} ({text!r})" for text, row in first.items() if _NO_INTEGER.fullmatch(text)],
        "neither an integer nor a name; write classes as integers from 0 or as names (numbers to be learned need "
        "problem_type=regression)",
    )
    integer, name = (next((text for text in first if is_integer(text) == kind), None) for kind in (True, False))
    if integer is not None and name is not None:
        both = [f"{first[text].where} ({text!r})" for text in (integer, name)]
        tell(both, "an integer beside a name; write all labels as integers from 0 or all as names")
    tell(
        [rows[0].where] if _are_marks_of_hmdb51(rows, set(first)) else [],
        "looks like a split file of HMDB51, whose 0, 1 and 2 are no classes but mean unused, training and test; "
        "`everest-hf make-list hmdb51 ANNOTATIONS VIDEOS OUT` writes a list of each",
    )


def _are_marks_of_hmdb51(rows: list[Row], labels: set[str]) -> bool:
    if not {"1", "2"} <= labels <= {"0", "1", "2"}:
        return False
    of_folder = defaultdict(set)
    for row in rows:
        folder, _, name = row.path.rpartition(os.sep)
        if not _HMDB51.fullmatch(name):
            return False
        of_folder[folder].add(str(row.label))
    return any(len(labels) > 1 for labels in of_folder.values())  # classes would have a folder, and a label, each


def check_contradictions(rows: list[Row], problem_type: str, *, learned: bool) -> None:
    """Look for a video file that has other labels in another row; `learned`: raise a ValueError for it."""
    seen: dict[tuple, Row] = {}
    wrong = []
    for place, row in _places(rows):
        other = seen.setdefault(place, row)
        if other.label != row.label and set(labels_in(other, problem_type)) != set(labels_in(row, problem_type)):
            wrong.append(f"{other.where} ({other.label!r}) and {row.where} ({row.label!r})")
    right = "'path a,b' has both in one line" if problem_type.startswith("multi") else "leave one of them"
    (refuse if learned else warn)(wrong, f"one video with two labels; {right}")


def _places(rows: list[Row]) -> Iterator[tuple[tuple, Row]]:
    """Yield the folder, with its links followed, the name of each video's file and what segment of it, and the row."""
    real: dict[str, str] = {}
    for row in rows:
        folder, _, name = row.path.rpartition(os.sep)
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        yield (real[folder], name, str(row.segment)), row


def warn_of_similar(names: Sequence[str] | None, source: str) -> None:
    """Warn of names of classes that differ only in capitals."""
    alike = defaultdict(list)
    for name in names or ():
        alike[name.casefold()].append(name)
    pairs = [" and ".join(group) for group in alike.values() if len(group) > 1]
    warn(pairs, f"different classes of {source}, though the names differ only in capitals")


# ---------------------------------------------------------------------- of a run


def check_classes(train: Dataset, source: str) -> None:
    """Check that every class has a training video.

    Raises:
        ValueError: one has none. It says what that looks like.
    """
    column = train.select_columns("label").with_format("arrow")[:]["label"]
    flat = pc.list_flatten(column) if hasattr(train.features["label"], "feature") else column
    present = set(pc.unique(flat).to_pylist())
    names = class_names_of(train) or [str(i) for i in range(max(present) + 1)]
    missing = [name for i, name in enumerate(names) if i not in present]
    if missing:
        classes = "class" if len(missing) == 1 else "classes"
        what = f"{len(missing)} of {len(names)} classes without a training video, {classes} {named(missing)}"
        raise ValueError(f"{source}: {what}; {_remedy(missing, names)}")


def _remedy(missing: list[str], names: list[str]) -> str:
    if not all(map(is_integer, names)):
        return "give each class a video, or leave it out of the classes"
    if missing != ["0"]:
        return "number the classes from 0 without gaps, or write their names"
    known, remedy = "", "subtract 1 from each, or write the classes' names"
    if len(names) == 102:
        known = ", as in UCF101's official lists"
        remedy = "`everest-hf make-list ucf101 ANNOTATIONS VIDEOS OUT` writes such lists, with the classes' names"
    return f"its labels run from 1 to {len(names) - 1}{known}, and must count from 0: {remedy}"


def warn_of_shared(train: Dataset, val: Dataset, source: str) -> None:
    """Warn of video files that are in both, under whatever path; a video that is copied is another file."""
    if not train.features["video"] == val.features["video"] == Value("string"):
        return  # bytes, whose names say little
    by_name = defaultdict(list)
    paths = val["video"][:]
    for path in paths:
        by_name[os.path.basename(path)].append(path)
    shared_names = [path for path in train["video"][:] if os.path.basename(path) in by_name]
    files = {_file_of(path) for path in shared_names}
    names = {os.path.basename(path) for path in shared_names}
    shared = [path for path in paths if os.path.basename(path) in names and _file_of(path) in files]
    warn(shared, f"held out in {source} and trained on as well; figures on them say little")


def _file_of(path: str) -> tuple[int, int] | str:
    """Return what tells a file from others, however its path is written."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return (status.st_dev, status.st_ino) if status.st_ino else path
