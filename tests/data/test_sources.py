"""Data sets that `datasets` opens, from files that are written here: parquet, arrow, webdataset, saved folders."""

import json
import re
import time
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, Video
from helpers.tables import BOTH, datasets_cache, write_members, write_tar
from helpers.videos import write_class_folders, write_list

from everest_hf import cli, video_processing_everest
from everest_hf.data import (
    VideoClips,
    VideoViews,
    check_readable,
    class_names_of,
    load_videos,
    source_of,
    stream_videos,
)
from everest_hf.data.transforms import finetuning_transform
from everest_hf.training.loaders import opening_of
from everest_hf.training.recipe import load_recipe
from everest_hf.video import VideoError

pytestmark = pytest.mark.usefixtures(datasets_cache.__name__)
SIZE = (24, 40)
SAMPLING = {"num_frames": 6, "frame_step": 2}
NAMES = ["walk", "jump"]  # not in the order of the alphabet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos walk/walk_0.mp4, walk/walk_1.mp4, jump/jump_0.mp4, jump/jump_1.mp4."""
    return write_class_folders(tmp_path_factory.mktemp("classes"), classes=NAMES)


def paths_of(folder: Path) -> list[Path]:
    return [folder / name / f"{name}_{i}.mp4" for name in NAMES for i in range(2)]


def table_of(folder, videos="both", labels=(0, 0, 1, 1), label=None, **columns) -> Dataset:
    """The videos as a data set: column `video` as paths, bytes, both or the type Video; `label`, by default names."""
    paths = paths_of(folder)
    cells = {
        "paths": ([str(path) for path in paths], Value("string")),
        "bytes": ([path.read_bytes() for path in paths], Value("binary")),
        "both": ([{"bytes": path.read_bytes(), "path": path.name} for path in paths], BOTH),
        "Video": ([{"bytes": path.read_bytes(), "path": path.name} for path in paths], Video(decode=False)),
    }
    values, feature = cells[videos]
    table = {"video": values, "label": list(labels), **columns}
    features = {name: feature if name == "video" else Value("string") for name in table}
    features["label"] = label or ClassLabel(names=NAMES)
    return Dataset.from_dict(table, Features(features))


def same_clips(rows, other) -> bool:
    """Say whether the rows show the same videos with the same class names, in the same order."""
    views = [VideoViews(x, SIZE, **SAMPLING) for x in (rows, other)]
    names = [[class_names_of(x)[label] for label in x["label"]] for x in (rows, other)]
    clips = [torch.stack([v[i]["pixel_values"] for i in range(len(v))]) for v in views]
    return len(rows) == len(other) and names[0] == names[1] and torch.equal(*clips)


@pytest.fixture(scope="module")
def expected(folder):
    lines = [(path, path.parent.name) for path in paths_of(folder)]
    return load_videos(write_list(folder / "list.txt", lines), class_names=NAMES)


# ---------------------------------------------------------------------- kinds of data sets


@pytest.mark.parametrize("videos", ["paths", "bytes", "both", "Video"])
def test_parquet_with_every_kind_of_column(folder, expected, tmp_path, videos):
    path = tmp_path / "a set [1] of videos.parquet"
    table_of(folder, videos).to_parquet(path)
    rows = load_videos(path)
    assert class_names_of(rows) == NAMES
    assert same_clips(rows, expected)


@pytest.mark.parametrize(
    ("text", "binary"),
    [(pa.large_string(), pa.large_binary()), (pa.string_view(), pa.binary_view())],
    ids=["pandas", "polars"],
)
def test_parquet_as_other_libraries_write_it(folder, expected, tmp_path, text, binary):
    """pandas writes large strings, polars views of strings and bytes; all of them are paths, bytes or both."""
    paths = paths_of(folder)
    contents = [path.read_bytes() for path in paths]
    both = [{"bytes": content, "path": path.name} for content, path in zip(contents, paths, strict=True)]
    columns = {
        "paths": pa.array(map(str, paths), text),
        "bytes": pa.array(contents, binary),
        "both": pa.array(both, pa.struct({"bytes": binary, "path": text})),
    }
    for name, column in columns.items():
        labels = pa.array([path.parent.name for path in paths], text)
        pq.write_table(pa.table({"clip": column, "label": labels}), tmp_path / f"{name}.parquet")
        assert same_clips(load_videos(tmp_path / f"{name}.parquet", class_names=NAMES), expected)
        # A stream is told its classes by a ClassLabel alone.
        stream = stream_videos(tmp_path / f"{name}.parquet", labels_required=False)
        assert len(list(stream)) == 4


def test_webdataset(folder, expected, tmp_path):
    words = [path.parent.name for path in paths_of(folder)]
    described = [json.dumps({"label": word, "fps": 25}) for word in words]
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 4))):
        numbers = ["0", "0", "1", "1"][part]
        write_tar(tmp_path / f"{name}.tar", paths_of(folder)[part], cls=numbers, json=described[part], txt=words[part])
    by_number = load_videos(tmp_path / "*.tar")
    assert by_number["label"][:] == [0, 0, 1, 1]
    assert class_names_of(by_number) is None
    assert same_clips(load_videos(tmp_path / "*.tar", class_names=NAMES), expected)
    for column in ("json.label", "txt"):
        rows = load_videos(tmp_path / "*.tar", label_column=column)
        assert class_names_of(rows) == sorted(NAMES)
        assert same_clips(rows, expected)


SAMPLES = [f"{i}.{suffix}" for i in range(8) for suffix in ("mp4", "cls")]


@pytest.mark.parametrize(
    ("members", "culprits", "reason"),
    [
        (["a.1.mp4", "a.1.cls", "a.2.mp4", "a.2.cls"], "a.1.mp4, a.2.mp4", "2 videos in a sample; .*the first dot"),
        (["a.1.mp4", "a.1.cls", "b.1.mp4", "b.1.cls", "c.2.mp4"], "c.2.mp4", "not '1.mp4' as in .*the first dot"),
        ([name for name in SAMPLES if name != "1.mp4"], "1.cls", "a sample without a video; its files must follow"),
        ([name for name in SAMPLES if name != "7.mp4"], "7.cls", "a sample without a video"),
        ([*SAMPLES[:4], "1.avi", *SAMPLES[4:]], "1.mp4, 1.avi", "2 videos in a sample; it must have one"),
        ([*SAMPLES, "7.avi"], "7.mp4, 7.avi", "2 videos in a sample"),
        ([*SAMPLES, "8.avi", "8.cls"], "8.avi, 8.cls", "the video's suffix is not 'mp4' as in the first sample"),
        (["0.mp4", "1.mp4", "0.cls", "1.cls"], "0.cls", "a sample without a video; its files must follow one another"),
        ([*SAMPLES[:3], *SAMPLES[4:]], "1.mp4", "the first sample has mp4, cls; all must have the same, one after"),
    ],
)
def test_a_sample_that_has_not_one_video_is_named(folder, tmp_path, members, culprits, reason):
    content = paths_of(folder)[0].read_bytes()
    contents = [(name, b"0" if name.endswith("cls") else content) for name in members]
    shard = write_members(tmp_path / "part.tar", contents)
    write_members(tmp_path / "sound.tar", [("x.mp4", content), ("x.cls", b"0")])
    read = [lambda: load_videos(tmp_path / "part.tar"), lambda: load_videos(tmp_path)]
    if "7." not in culprits and "8." not in culprits:  # a stream looks at the first samples alone
        read.append(lambda: stream_videos(shard, num_labels=1))
    for attempt in read:
        with pytest.raises(ValueError, match=rf"^{re.escape(f'{shard}: {culprits}')}: .*{reason}") as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 1


def test_fields_of_webdataset_that_are_named(folder, tmp_path):
    """Two videos a sample are two columns where one is named, and hidden files are no part of a sample."""
    content = paths_of(folder)[0].read_bytes()
    members = [(f"{i}.{name}", content) for i in range(2) for name in ("left.mp4", "right.mp4")]
    write_members(tmp_path / "part.tar", [*members, ("._0.mp4", b"")])
    rows = load_videos(tmp_path / "part.tar", video_column="left.mp4", labels_required=False)
    assert [video["path"] for video in rows["video"]] == ["0.left.mp4", "1.left.mp4"]
    with pytest.raises(ValueError, match=r"no sample of files such as 000\.mp4"):
        load_videos(write_members(tmp_path / "none.tar", [("mp4", content)]))


def test_a_later_sample_of_a_stream_without_a_video_is_named(folder, tmp_path):
    content = paths_of(folder)[0].read_bytes()
    contents = [(name, b"0" if name.endswith("cls") else content) for name in SAMPLES if name != "7.mp4"]
    write_members(tmp_path / "part.tar", contents)
    with pytest.raises(VideoError, match=r"part\.tar: the sample 7 has no video"):
        list(stream_videos(tmp_path / "part.tar", num_labels=1))


def test_a_row_without_a_path_is_named(folder, tmp_path):
    paths = [str(paths_of(folder)[0]), None, ""]
    Dataset.from_dict({"video": paths, "label": [0, 0, 0]}).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match=r"set\.parquet row 1, \S+ row 2: neither a path nor bytes of a video"):
        load_videos(tmp_path / "set.parquet")


def test_saved_data_set_and_its_splits(folder, expected, tmp_path):
    table = table_of(folder)
    table.save_to_disk(tmp_path / "one")
    assert same_clips(load_videos(tmp_path / "one"), expected)
    DatasetDict(train=table, test=table.select([3])).save_to_disk(tmp_path / "two")
    assert len(load_videos(tmp_path / "two", split="test")) == 1
    with pytest.raises(ValueError, match=r"two: has several splits; choose one of \['train', 'test'\]"):
        load_videos(tmp_path / "two")
    with pytest.raises(ValueError, match=r"no split 'val'; choose one of \['train', 'test'\]"):
        load_videos(tmp_path / "two", split="val")


def test_folder_of_parquet_files_has_the_splits_of_their_names(folder, expected, tmp_path):
    table_of(folder).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    table_of(folder).select([0]).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    assert same_clips(load_videos(tmp_path, split="train"), expected)
    assert len(load_videos(tmp_path, split="validation")) == 1
    with pytest.raises(ValueError, match=r"several splits; choose one of \['train', 'validation'\]"):
        load_videos(tmp_path)


def test_pattern_joins_files_in_the_order_of_their_names(folder, expected, tmp_path):
    for i in (2, 0, 3, 1):
        table_of(folder).select([i]).to_parquet(tmp_path / f"part-{i}.parquet")
    assert same_clips(load_videos(tmp_path / "part-*.parquet"), expected)


def test_data_sets_in_memory(folder, expected, tmp_path, monkeypatch):
    table = table_of(folder, "paths")
    assert same_clips(load_videos(table), expected)
    assert same_clips(load_videos(expected), expected)
    assert same_clips(load_videos(DatasetDict(train=table, test=table.select([0])), split="train"), expected)
    for videos in ("paths", "both"):
        turned = table_of(folder, videos).select([3, 2, 1, 0]).with_format("torch")
        assert same_clips(load_videos(turned), expected.select([3, 2, 1, 0]))
    rows = [(str(path.relative_to(folder)), path.parent.name) for path in paths_of(folder)]
    frame = pd.DataFrame(rows, columns=["file", "class"])
    columns = {"label_column": "class", "class_names": NAMES}
    assert same_clips(load_videos(frame, data_root=folder, **columns), expected)
    monkeypatch.chdir(folder)
    assert same_clips(load_videos(frame.iloc[::-1], **columns), expected.select([3, 2, 1, 0]))


@pytest.mark.parametrize(
    ("source", "arguments", "error", "message"),
    [
        ([("a.mp4", 0)], {}, TypeError, "source is of the type list; it must be a path, a name on the Hub, or a"),
        (pd.DataFrame({"video": []}, dtype=str), {}, ValueError, "DataFrame: the data set is empty"),
        (pd.DataFrame({"video": ["a.mp4", 3]}), {}, ValueError, "DataFrame: "),
        (pd.DataFrame({"video": ["a.mp4"]}), {"split": "val"}, ValueError, "a DataFrame is one split already"),
        (pd.DataFrame({"video": ["a.mp4"], "label": [0]}), {}, FileNotFoundError, "named by DataFrame, 1 videos"),
        (DatasetDict(), {"split": "val"}, ValueError, "DatasetDict: has no split 'val'"),
    ],
)
def test_wrong_data_sets_in_memory(source, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        load_videos(source, **arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_of_pandas_are_no_classes(folder, tmp_path):
    """A column of integers with a hole is one of floats in pandas."""
    frame = pd.DataFrame({"video": [str(path) for path in paths_of(folder)], "label": [0.0, 10.0, 2.0, 2.0]})
    frame.to_parquet(tmp_path / "set.parquet")
    with pytest.raises(
        ValueError, match=r"set\.parquet row 0 \('0\.0'\), \S+ row 1 \('10\.0'\), .*: neither an integer"
    ):
        load_videos(tmp_path / "set.parquet")
    rows = load_videos(tmp_path / "set.parquet", problem_type="regression")
    assert rows["label"][:] == [0.0, 10.0, 2.0, 2.0]


# ---------------------------------------------------------------------- columns


def test_video_column_is_found_or_named(folder, expected, tmp_path):
    path, table = tmp_path / "set.parquet", table_of(folder)
    table.rename_column("video", "clip").to_parquet(path)
    assert same_clips(load_videos(path), expected)
    two = table.rename_column("video", "left").add_column("right", table["video"][:])
    two.to_parquet(path)
    with pytest.raises(
        ValueError, match=r"\['left', 'label', 'right'\]; left, right may be .* name it as video_column"
    ):
        load_videos(path)
    assert same_clips(load_videos(path, video_column="right"), expected)


def test_paths_are_relative_to_the_file_or_to_data_root(folder, expected, tmp_path):
    names = [str(path.relative_to(folder)) for path in paths_of(folder)]
    table = Dataset.from_dict(
        {"file": names, "label": [0, 0, 1, 1]}, Features(file=Value("string"), label=ClassLabel(names=NAMES))
    )
    table.to_parquet(folder / "set.parquet")
    table.to_parquet(tmp_path / "set.parquet")
    (folder / "set.parquet").rename(folder / "beside.parquet")
    try:
        assert same_clips(load_videos(folder / "beside.parquet"), expected)
    finally:
        (folder / "beside.parquet").unlink()
    assert same_clips(load_videos(tmp_path / "set.parquet", data_root=folder), expected)
    with pytest.raises(FileNotFoundError, match=r"walk_0\.mp4, .* 4 in all: no such video file"):
        load_videos(tmp_path / "set.parquet")


def test_labels_of_every_kind(folder, tmp_path):
    path = tmp_path / "set.parquet"

    def labels(values, feature, **kwargs):
        table_of(folder, labels=values, label=feature).to_parquet(path)
        rows = load_videos(path, **kwargs)
        return rows["label"][:] if "label" in rows.features else None, class_names_of(rows)

    several = {"problem_type": "multi_label_classification"}
    assert labels([3, 0, 1, 1], Value("int64")) == ([3, 0, 1, 1], None)
    assert labels(["b c", "a", "a", "a"], Value("string")) == ([1, 0, 0, 0], ["a", "b c"])
    assert labels([0.5, 1, 2, 3], Value("float32"), problem_type="regression") == ([0.5, 1, 2, 3], None)
    lists = [[0], [1, 0], [1], [1]]
    assert labels(lists, List(ClassLabel(names=["x, y", "z"])), **several) == ([[0], [0, 1], [1], [1]], ["x, y", "z"])
    # Names of another data set give the order; the numbers of this one are its own affair.
    order = {"class_names": ["jump", "run", "walk"]}
    assert labels([0, 0, 1, 1], ClassLabel(names=NAMES), **order) == ([2, 2, 0, 0], ["jump", "run", "walk"])
    # Test splits have -1 where the label is not told.
    assert labels([-1, -1, -1, -1], ClassLabel(names=NAMES), labels_required=False) == (None, None)
    assert labels(lists, List(Value("int64")), labels_required=False) == (None, None)
    for hole in ([[0], [None], [1], [1]], [["a"], ["b", None], ["b"], ["b"]]):
        feature = List(Value("int64" if hole[0] == [0] else "string"))
        with pytest.raises(ValueError, match=r"set\.parquet row 1 \(\[.*None\]\): an empty name among the labels"):
            labels(hole, feature, **several)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_column": "class"}, r"has no column 'class'; it has \['video', 'label', 'kind'\]"),
        ({"video_column": "clip"}, r"has no column 'clip'; it has \['video', 'label', 'kind'\]"),
        ({"video_column": "label"}, r"the column 'label' does not hold videos"),
        ({"class_names": ["walk", "run"]}, r"set\.parquet row 2 \('jump'\), .*: class not among the 2 known"),
        ({"split": "val"}, r"no split 'val'; choose one of \['train'\]"),
        ({"label_column": "kind"}, r"set\.parquet row 1: no label"),
    ],
)
def test_wrong_columns_and_labels(folder, tmp_path, arguments, message):
    path = tmp_path / "set.parquet"
    table_of(folder, kind=["a", None, "b", "c"]).to_parquet(path)
    with pytest.raises(ValueError, match=message):
        load_videos(path, **arguments)


def test_no_labels_where_none_are_needed(folder, tmp_path):
    path = tmp_path / "set.parquet"
    table_of(folder).remove_columns("label").to_parquet(path)
    assert load_videos(path, labels_required=False).column_names == ["video"]
    with pytest.raises(ValueError, match=r"row 0, .* 4 in all: no label; the columns are \['video'\]"):
        load_videos(path)


# ---------------------------------------------------------------------- what is no source


def test_what_is_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    # None of these can be a name on the Hub.
    for source in (
        "list.txt",
        "videos/train.lst",
        "owner/train.txt",
        "owner/train.json",
        "owner/set.parquet",
        "a/b/c",
        "part-*.tar",
    ):
        with pytest.raises(FileNotFoundError, match=r": no such list file, folder of videos or data set"):
            load_videos(source)
    for name in ("a.tar", "b.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"\*: files ending in \.parquet, \.tar; expected one of \.parquet, \.arrow, \.tar"
    ):
        load_videos("[ab].*")
    (tmp_path / "b.parquet").write_bytes(b"this is no parquet file" * 9)
    for name in ("a.tar", "b.parquet"):
        with pytest.raises(ValueError, match=rf"^{name}: cannot be opened as a data set: ") as caught:
            load_videos(name)
        assert len(str(caught.value).splitlines()) == 1


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^owner/clips:small: no file or folder here; on the Hub: .*owner/clips"):
        load_videos("owner/clips:small")


# ---------------------------------------------------------------------- reading


def test_unreadable_rows_are_named_by_their_number(folder, tmp_path):
    cells = [{"bytes": b"no video" * 9, "path": "a.mp4"}, {"bytes": None, "path": None}]
    Dataset.from_dict({"video": cells}, Features(video=BOTH)).to_parquet(tmp_path / "set.parquet")
    rows = load_videos(tmp_path / "set.parquet", labels_required=False)
    reasons = {error.path: error.reason for error in check_readable(rows)}
    assert reasons.keys() == {"a.mp4 (row 0)", "row 1"}
    assert reasons["row 1"] == "neither a path nor bytes"
    with pytest.raises(VideoError, match=r"^a\.mp4 \(row 0\): "):
        VideoViews(rows, SIZE, **SAMPLING)[0]


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if "late" in self.path:
            time.sleep(5)
        if "endless" not in self.path:
            return super().do_GET()
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(bytes(2**20))


@pytest.fixture(scope="module")
def server(folder):
    """Address of a server with the videos of the folder; late.mp4 comes late, and endless.mp4 does not end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_only_addresses_that_are_allowed_are_fetched(folder, server, tmp_path):
    url, local = f"{server}/walk/walk_0.mp4", paths_of(folder)[0].as_uri()
    never = [local, f"simplecache::{local}", f"hf://datasets/a/b/c.mp4::{local}", f"local://{local}"]
    Dataset.from_dict({"video": [url, *never]}).to_parquet(tmp_path / "set.parquet")
    rows = load_videos(tmp_path / "set.parquet", labels_required=False)
    for schemes, culprits in {
        (): [url, *never],
        ("http",): never,
        ("http", "file", "local", "simplecache"): never,
    }.items():
        errors = check_readable(rows, url_schemes=schemes)
        assert [error.path for error in errors] == culprits
        assert errors[-4].reason == "hf:// is fetched, file:// never is"
    with pytest.raises(
        VideoError, match=r"^http://\S+: hf:// is fetched, http:// is not unless url_schemes=http allows it$"
    ):
        VideoViews(rows, SIZE, **SAMPLING)[0]
    allowing = {**SAMPLING, "url_schemes": ["http"]}
    by_path = Dataset.from_dict({"video": [str(paths_of(folder)[0])]})
    expected = VideoViews(by_path, SIZE, **SAMPLING)[0]["pixel_values"]
    assert torch.equal(VideoViews(rows, SIZE, **allowing)[0]["pixel_values"], expected)
    assert VideoClips(rows.select([0]), finetuning_transform(SIZE), **allowing)[0]["bad"] == []


def test_what_is_fetched_is_limited_in_time_and_size(server, monkeypatch):
    for name in ("late", "endless"):
        with pytest.raises(VideoError, match=rf"^http://\S+/{name}.mp4: took longer than 0.3 s to fetch$"):
            source_of(f"{server}/{name}.mp4", url_schemes=["http"], time_limit=0.3)
    monkeypatch.setattr(video_processing_everest, "MAX_DOWNLOAD", 2**25)
    with pytest.raises(
        VideoError, match=r"endless.mp4: cannot be fetched: the file is larger than 0.03125 GiB; download it first$"
    ):
        source_of(f"{server}/endless.mp4", url_schemes=["http"])
    with pytest.raises(VideoError, match=r"gone.mp4: cannot be fetched: .*gone.mp4"):
        source_of(f"{server}/gone.mp4", url_schemes=["http"])


def test_commands_and_recipes_allow_addresses(server, tmp_path, capsys):
    Dataset.from_dict({"video": [f"{server}/walk/walk_0.mp4"]}).to_parquet(tmp_path / "set.parquet")
    command = ["check-data", str(tmp_path / "set.parquet"), "--json"]
    assert cli.main(command) == 1
    assert "http:// is not unless" in json.loads(capsys.readouterr().out)["unreadable"][0]["reason"]
    assert cli.main([*command, "--url-schemes", "s3,http"]) == 0
    recipe = load_recipe(None, {"train": "any", "url_schemes": "s3,http", "max_pixels": 7})
    opening = opening_of(recipe)
    assert (opening["url_schemes"], opening["max_pixels"]) == (["s3", "http"], 7)


# ---------------------------------------------------------------------- streams


def test_stream_has_the_rows_of_the_data_set(folder, tmp_path):
    table_of(folder, "Video").to_parquet(tmp_path / "set.parquet")
    stream, rows = stream_videos(tmp_path / "set.parquet"), load_videos(tmp_path / "set.parquet")
    assert list(stream) == list(rows)
    assert class_names_of(stream) == NAMES
    assert list(stream_videos(tmp_path / "set.parquet", labels_required=False).features) == ["video"]


def test_stream_of_webdataset_files(folder, tmp_path):
    write_tar(tmp_path / "a.tar", paths_of(folder), cls=["0", "0", "1", "2"])
    rows = list(stream_videos(tmp_path / "a.tar", num_labels=3))
    assert [row["label"] for row in rows] == [0, 0, 1, 2]
    assert [row["video"]["path"] for row in rows] == [f"a-{i:03}.mp4" for i in range(4)]
    with pytest.raises(VideoError, match=r"^\S+a\.tar: a-003\.mp4 \(2\): label out of range; 2 classes"):
        list(stream_videos(tmp_path / "a.tar", num_labels=2))
    with pytest.raises(ValueError, match=r"a stream does not tell its classes beforehand"):
        stream_videos(tmp_path / "a.tar")


def test_what_is_not_streamed(folder, tmp_path):
    table_of(folder).save_to_disk(tmp_path / "saved")
    for source in (folder, folder / "list.txt", tmp_path / "saved"):
        with pytest.raises(ValueError, match="is read where it lies, nothing is copied; leave out streaming"):
            stream_videos(source)
