"""Segments in rows: the columns that give them, and what is checked before a video is opened."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Value

from ..video.segments import FRAMES, SECONDS, Segment

# The column of a data set's rows that says where a segment is from.
WHERE = "where"
FEATURES = {
    **dict.fromkeys(SECONDS, Value("float64")),
    **dict.fromkeys(FRAMES, Value("int64")),
    WHERE: Value("string"),
}


def segment_columns(columns: Iterable[str], source: str) -> tuple[str, str] | None:
    """Return which of the columns give the start and the end of segments, None for none.

    Raises:
        ValueError: one of the two is missing, or there are segments in seconds and in frames.
    """
    known = [name for name in (*SECONDS, *FRAMES) if name in columns]
    if not known:
        return None
    pair = next((pair for pair in (SECONDS, FRAMES) if set(pair) == set(known)), None)
    if pair is None:
        raise ValueError(
            f"{source}: has of a segment's columns {', '.join(known)}; it must have start and end (seconds), or "
            "start_frame and end_frame (numbers from 0, the end not included)"
        )
    return pair


def segment_of(values: Sequence[Any], columns: tuple[str, str], where: str) -> Segment | None:
    """Return the segment that the values of its two columns give, None where both are empty.

    Raises:
        ValueError: a value is no number of 0 or more, or the end is not after the start.
    """
    if all(value is None or value == "" for value in values):
        return None
    in_frames = columns == FRAMES
    numbers = [_number(value, in_frames) for value in values]
    for name, value, number in zip(columns, values, numbers, strict=True):
        if number is None:
            right = "a whole number of frames from 0" if in_frames else "a number of seconds from 0"
            raise ValueError(f"{where}: {name} is {value!r}; it must be {right}")
    start, end = (number for number in numbers if number is not None)
    if start >= end:
        raise ValueError(f"{where}: {columns[1]} is {values[1]}; it must be more than {columns[0]}, {values[0]}")
    return Segment(start, end, in_frames, where)


def segments_of(
    values: Sequence[Sequence[Any]], columns: tuple[str, str], places: Sequence[str]
) -> list[Segment | None]:
    """Return `segment_of` of each row, from the values of the two columns and what errors call the rows."""
    return [segment_of(pair, columns, where) for *pair, where in zip(*values, places, strict=True)]


def _number(value: Any, whole: bool) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    is_right = 0 <= number < math.inf and not (whole and number % 1) and not isinstance(value, bool)
    if not is_right:
        return None
    return int(number) if whole else number


def columns_with(segments: Sequence[Segment | None]) -> dict[str, list]:
    """Return the columns of a data set's rows that hold these segments; {} where there are none."""
    there = [segment for segment in segments if segment is not None]
    if not there:
        return {}
    start, end = there[0].columns
    return {
        start: [segment and segment.start for segment in segments],
        end: [segment and segment.end for segment in segments],
        WHERE: [segment and segment.where for segment in segments],
    }


def segment_in(row: Mapping[str, Any]) -> Segment | None:
    """Return the segment of a data set's row, None where it is the whole video."""
    for columns in (SECONDS, FRAMES):
        if row.get(columns[0]) is not None:
            return Segment(row[columns[0]], row[columns[1]], columns == FRAMES, row.get(WHERE) or "")
    return None


def segments_in(rows: Dataset) -> dict[str, list]:
    """Return the two columns of segments that a data set's rows have, {} for none."""
    return {name: rows[name][:] for name in (*SECONDS, *FRAMES) if name in rows.column_names}
