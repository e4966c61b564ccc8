"""List files: "path label" a line, csv and tsv, json and jsonl; and writing the csv that they all may be."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..video import Segment
from ..video.pictures import frames_in, is_folder_of_pictures
from .rows import VIDEO_SUFFIXES, Row, is_video, refuse
from .segments import segment_columns, segments_of
from .tables import absolute

# The column of the videos in a table, where video_column does not name it, and that of the labels.
VIDEO_COLUMNS, LABEL_COLUMN = ("video", "path", "file_name"), "label"
DELIMITERS = ",;\t|"
_JSON = re.compile(r"\{|\[\s*(\{|\]|$)")
RIGHT = "expected 'path label' a line, or csv whose first line is 'video,label'"
# Columns by which files are known that name no videos: whose they are, and what `everest-hf make-list` calls them.
_OFFICIAL = {
    "youtube_id": ("Kinetics' own csv", "kinetics"),
    "template": ("Something-Something's own json", "ssv2"),
    "clips": ("Ego4D's own json", "oscc"),
}


class Table(NamedTuple):
    """What a list with columns holds: the values of each column as text, lists or None, and each row's "file:line"."""

    columns: dict[str, list]
    places: list[str]


def read_list(
    path: Path,
    root: Path,
    *,
    video_column: str | None = None,
    label_column: str | None = None,
    labels_required: bool = True,
) -> list[Row]:
    """Return the rows of a list file; relative paths start at `root`.

    What a list is, is seen in its first line, whatever its name. One that reads as "path label" is such a list, in
    which a path may hold blanks and a label none.

    Raises:
        ValueError: there is no row; or one has no label where labels_required, no video, an impossible segment, or is
            not of the form that the first one has. The message names file, line and what would be right.
    """
    text = _text_of(path)
    lines = [(f"{path}:{i}", line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: the list is empty; {RIGHT}")
    table = _table_of(text, lines[0][1], path, root, labels_required)
    if table is None:
        rows = [_row_of_line(line, where, root, labels_required) for where, line in lines]
    else:
        label = label_column or (LABEL_COLUMN if labels_required or LABEL_COLUMN in table.columns else None)
        rows = _rows_of_table(table, path, root, video_column, label)
    return _checked(rows, labels_required)


def _table_of(text: str, first: str, path: Path, root: Path, labels_required: bool) -> Table | None:
    """Return the table that a list with this first line is, None where it is lines of "path label"."""
    is_plain = _is_plain(first, root, labels_required)
    if _JSON.match(first) and not is_plain:
        return _json_table(text, path)
    if is_plain and path.suffix.lower() not in (".csv", ".tsv"):
        return None
    delimiter = _delimiter_of(first, path, is_plain)
    return None if delimiter is None else _csv_table(text, delimiter, path, root)


def _names_video(text: str, root: Path) -> bool:
    """Say whether a text names a video file, or a folder of frames that is there."""
    return is_video(text) or (bool(text) and is_folder_of_pictures(absolute(text, root)))


def _text_of(path: Path) -> str:
    if is_video(path.name):
        raise ValueError(f"{path}: a video, not a list of videos; {RIGHT}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8; {RIGHT}") from error


def _checked(rows: list[Row], labels_required: bool) -> list[Row]:
    addresses = [row.where for row in rows if "://" in row.path and not row.path.startswith("hf://")]
    refuse(addresses, "an address; a list takes files of this machine (and hf:// paths): download it, write its path")
    if labels_required:
        refuse([row.where for row in rows if row.label is None], f"line without label; {RIGHT}")
    wrong = [f"{row.where} ({row.path})" for row in rows if not _names_video(row.path, Path())]
    refuse(wrong, f"not a video; expected a path ending in one of {', '.join(VIDEO_SUFFIXES)}, or a folder of frames")
    if labels_required:
        return rows
    # Several labels a row would be refused where one is due; here none is.
    return [row._replace(label=None) if isinstance(row.label, list) else row for row in rows]


# ---------------------------------------------------------------------- path label


def _is_plain(line: str, root: Path, labels_required: bool) -> bool:
    path, label = _parts_of(line)
    if not is_video(path):
        return _names_video(_row_of_line(line, "", root, False).path, root)
    return label is not None or not labels_required


def _parts_of(line: str) -> tuple[str, str | None]:
    head, *tail = line.rsplit(None, 1)
    # A last word that is itself a video file belongs to a path with blanks: the line has no label.
    return (head, tail[0]) if tail and not is_video(tail[0]) else (line, None)


def _row_of_line(line: str, where: str, root: Path, labels_required: bool) -> Row:
    path, label = _parts_of(line)
    if is_video(path):
        return Row(absolute(path, root), label, where)
    if label is None or _names_video(line, root):
        return Row(absolute(line, root), None, where)
    return _counted(path, label, where, root, labels_required) or Row(absolute(path, root), label, where)


def _counted(text: str, last: str, where: str, root: Path, labels_required: bool) -> Row | None:
    """Return the row of a line that tells the frames of a video beside its path, None for another one.

    "folder count label" is mmaction2's, "path first count" VideoMAEv2's for pre-training, and with a label behind it
    that of lists of frames for fine-tuning. `first` is the number in the name of the first frame, or of a video file
    the number of the frame, from 0; a count of -1 is all. last: what follows the text.
    """
    with_label = re.fullmatch(r"(.*\S)\s+(\d+)\s+(-1|\d+)", text)
    if with_label and _names_video(with_label[1], root):
        path, first, count = with_label.groups()
        return _part_of(absolute(path, root), int(first), int(count), last, where)
    counted = re.fullmatch(r"(.*\S)\s+(\d+)", text)
    if counted is None or not _names_video(counted[1], root):
        return None
    path, number = absolute(counted[1], root), int(counted[2])
    if not labels_required and (is_video(path) or number <= 1) and re.fullmatch(r"-1|\d+", last):
        return _part_of(path, number, int(last), None, where)
    if is_video(path):
        return None
    if number <= 1:
        raise ValueError(f"{where}: a count of {number}; expected 'folder count label' or 'folder first count label'")
    return Row(path, last, where, Segment(0, number, True, where))


def _part_of(path: str, first: int, count: int, label: str | None, where: str) -> Row:
    if count == -1:
        return Row(path, label, where)
    try:
        start = first if is_video(path) else first - frames_in(path).first
    except ValueError as error:
        raise ValueError(f"{where}: {path}: {error}") from None
    if start < 0 or count < 1:
        raise ValueError(f"{where}: {count} frames from number {first} on; the folder begins with {first - start}")
    return Row(path, label, where, Segment(start, start + count, True, where))


# ---------------------------------------------------------------------- csv


def _delimiter_of(line: str, path: Path, is_plain: bool) -> str | None:
    """Return what separates the fields of a list's first line, None where it is no line of a table."""
    for delimiter in "\t,;|" if path.suffix.lower() == ".tsv" else DELIMITERS:
        fields = _fields_of(line, delimiter)
        if len(fields) > 1 and (any(map(is_video, fields)) or not is_plain):
            return delimiter
    return DELIMITERS[0] if line.strip('"').lower() in VIDEO_COLUMNS else None


def _fields_of(line: str, delimiter: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]


def _csv_table(text: str, delimiter: str, path: Path, root: Path) -> Table:
    (where, first), *others = _records_of_csv(text, delimiter, path)
    are_videos = [_names_video(field, root) for field in first]
    if not any(are_videos):
        header, records = first, others
        _check_header(header, where)
    else:
        header, records = _assumed_header(first, are_videos.index(True), where, delimiter), [(where, first), *others]
    for where, record in records:
        if len(record) != len(header):
            raise ValueError(
                f"{where}: has {len(record)} fields, where {', '.join(header)} are {len(header)}; put a field that "
                f'holds {delimiter!r} into quotes, as "a{delimiter}b"'
            )
    if not records:
        raise ValueError(f"{path}: the list is empty; a video a line must follow its header {delimiter.join(header)}")
    columns = {name: [record[i] or None for _, record in records] for i, name in enumerate(header)}
    return Table(columns, [where for where, _ in records])


def _records_of_csv(text: str, delimiter: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield "file:line" and the fields of each record; a field in quotes may hold anything."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    try:
        for record in reader:
            if any(field.strip() for field in record):
                yield f"{path}:{line}", [field.strip() for field in record]
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: no line of csv: {error}; a quote within a field is written twice") from None


def _check_header(header: list[str], where: str) -> None:
    twice = [name for name in header if header.count(name) > 1]
    if "" in header or twice:
        what = f"the column {twice[0]!r} twice" if twice and twice[0] else "a column without a name"
        raise ValueError(f"{where}: has {what}; {RIGHT}")


def _assumed_header(first: list[str], place: int, where: str, delimiter: str) -> list[str]:
    """Return the columns of a list without a header, which can only be the video and its label; place: the video's."""
    if place > 0 or len(first) > 2:
        names = ["video" if i == place else "label" if len(first) == 2 else "…" for i in range(len(first))]
        raise ValueError(
            f"{where}: has {len(first)} fields, the video in number {place + 1}, and no header; write a line "
            f"{delimiter.join(names)!r} before it (several labels of a video go into one field in quotes)"
        )
    return ["video", "label"][: len(first)]


# ---------------------------------------------------------------------- json


def _json_table(text: str, path: Path) -> Table:
    """Return the objects of a json list, or of jsonl, as a table."""
    found = list(_objects_of(text, path))
    if not found:
        raise ValueError(f'{path}: the list is empty; expected {{"video": …, "label": …}} for each video')
    names = dict.fromkeys(name for _, item in found for name in item)
    return Table({name: [item.get(name) for _, item in found] for name in names}, [where for where, _ in found])


def _objects_of(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield "file:line" and each object of `[{…}, {…}]`, or of objects that follow one another."""
    decoder, is_list = json.JSONDecoder(), text.lstrip()[0] == "["
    between = re.compile(r"\s*,\s*|\s*\]\s*\Z" if is_list else r"\s+|\Z")
    place, line = re.match(r"\s*\[?\s*" if is_list else r"\s*", text).end(), 1  # type: ignore[union-attr]
    counted = 0
    if is_list and text[place:].strip() == "]":
        return
    while place < len(text):
        line += text.count("\n", counted, place)
        counted = place
        try:
            item, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}, in column {error.colno}") from None
        if not isinstance(item, dict):
            what = json.dumps(item, ensure_ascii=False)[:40]
            raise ValueError(f'{path}:{line}: {what} is no object; expected {{"video": …, "label": …}} for each video')
        yield f"{path}:{line}", item
        gap = between.match(text, place)
        if gap is None:
            line += text.count("\n", counted, place)
            raise ValueError(f"{path}:{line}: not JSON: {'a comma or ]' if is_list else 'a new line'} must follow")
        place = gap.end()


# ---------------------------------------------------------------------- columns


def _rows_of_table(
    table: Table, path: Path, root: Path, video_column: str | None, label_column: str | None
) -> list[Row]:
    columns, places = table
    video = _video_column(table, path, video_column)
    if label_column is not None and label_column not in columns:
        raise ValueError(
            f"{path}: has no column {label_column!r}; it has {list(columns)} (label_column names the labels')"
        )
    videos, labels = columns[video], columns[label_column] if label_column else [None] * len(places)
    wrong = [f"{where} ({cell!r})" for where, cell in zip(places, videos, strict=True) if not _is_path(cell)]
    refuse(wrong, f"no path of a video in the column {video!r}")
    pair = segment_columns(columns, str(path))
    segments = segments_of([columns[name] for name in pair], pair, places) if pair else [None] * len(places)
    rows = zip(videos, labels, places, segments, strict=True)
    return [Row(absolute(cell, root), _label_text(label), where, segment) for cell, label, where, segment in rows]


def _is_path(cell: Any) -> bool:
    return isinstance(cell, str) and bool(cell)


def _video_column(table: Table, path: Path, video_column: str | None) -> str:
    """Return the column that is named, has a usual name, or else is the only one of which the first value is a video."""
    names = list(table.columns)
    if video_column is not None:
        if video_column not in names:
            raise ValueError(f"{path}: has no column {video_column!r}; it has {names}")
        return video_column
    usual = [name for name in VIDEO_COLUMNS if name in names]
    found = usual[:1] or [name for name, cells in table.columns.items() if _is_path(cells[0]) and is_video(cells[0])]
    if len(found) != 1:
        for owner, name in (_OFFICIAL[column] for column in names if column in _OFFICIAL):
            command = f"everest-hf make-list {name} {path} VIDEOS OUT"
            raise ValueError(f"{path}: is {owner}, which names no files; `{command}` writes lists")
        what = f"{', '.join(found)} may be" if found else "none is"
        raise ValueError(f"{path}: has the columns {names}; {what} the videos': name it as video_column")
    return found[0]


def _label_text(label: Any) -> str | list | None:
    if isinstance(label, list):
        return [_label_text(one) for one in label]
    return None if label is None else str(int(label) if isinstance(label, bool) else label)


# ---------------------------------------------------------------------- writing


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a list with a header; None is an empty field."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)
