"""Lists with columns: csv, tsv, json, jsonl and folders of `datasets`, as people write them."""

import json

import pandas as pd
import pytest
from helpers.videos import write_clip

from everest_hf import cli
from everest_hf.data import class_names_of, load_videos
from everest_hf.training.loaders import load_rows
from everest_hf.training.recipe import Recipe

SEVERAL = "multi_label_classification"
PATHS = ("a.mp4", "sub/b, b.mp4", "sub/c 7.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the videos PATHS."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(PATHS):
        write_clip(folder / name, num_frames=4, seed=i)
    return folder


def listed(folder, name, text, **arguments):
    """The rows of a list in the folder."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    try:
        return load_videos(path, **arguments)
    finally:
        path.unlink()


def in_json(*labels, **others) -> list[dict]:
    return [{"video": path, "label": label, **others} for path, label in zip(PATHS, labels, strict=True)]


TABLES = {
    "header": ("l.csv", 'video,label\na.mp4,walk fast\n"sub/b, b.mp4",run\nsub/c 7.mp4,walk fast\n'),
    "no header": ("l.csv", 'a.mp4,walk fast\n"sub/b, b.mp4",run\nsub/c 7.mp4,walk fast\n'),
    "another order and more columns": (
        "l.csv",
        'id,label,path,text\n7,walk fast,a.mp4,"one\nline"\n8,run,"sub/b, b.mp4",""\n9,walk fast,sub/c 7.mp4,x\n',
    ),
    "Excel": ("l.csv", '\ufeffvideo;label\r\na.mp4;"walk fast"\r\nsub/b, b.mp4;run\r\nsub/c 7.mp4;walk fast\r\n'),
    "tsv": ("l.tsv", "a.mp4\twalk fast\nsub/b, b.mp4\trun\n\nsub/c 7.mp4\twalk fast\n"),
    "tsv with a header": ("l.tsv", "video\tlabel\na.mp4\twalk fast\nsub/b, b.mp4\trun\nsub/c 7.mp4\twalk fast\n"),
    "csv by another name": ("l.txt", 'video, label\na.mp4, walk fast\n"sub/b, b.mp4", run\nsub/c 7.mp4, walk fast\n'),
    "json": ("l.json", json.dumps(in_json("walk fast", "run", "walk fast"), indent=1)),
    "json in a line": ("l.json", json.dumps(in_json("walk fast", "run", "walk fast"))),
    "jsonl": ("l.jsonl", "\n".join(map(json.dumps, in_json("walk fast", "run", "walk fast", more=[1, {}])))),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_form_has_the_same_rows(folder, name):
    rows = listed(folder, *TABLES[name])
    assert rows["video"][:] == [str(folder / path) for path in PATHS]
    assert class_names_of(rows) == ["run", "walk fast"]
    assert rows["label"][:] == [1, 0, 1]


def test_a_csv_of_path_and_label_with_a_blank_between_stays_one(folder):
    """As VideoMAE's train.csv; its paths and several labels may hold commas."""
    rows = listed(folder, "train.csv", "a.mp4 0\nsub/b, b.mp4 1\nsub/c 7.mp4 0\n")
    assert rows["label"][:] == [0, 1, 0]
    rows = listed(folder, "train.csv", "a.mp4 x,y\nsub/b, b.mp4 y\n", problem_type=SEVERAL)
    assert rows["label"][:] == [[0, 1], [1]]
    rows = listed(folder, "list.txt", "sub/b, b.mp4\na.mp4\n", labels_required=False)
    assert rows["video"][:] == [str(folder / "sub/b, b.mp4"), str(folder / "a.mp4")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", 'video,label\na.mp4,"y,x"\n"sub/b, b.mp4",x\n'),
        ("l.csv", 'a.mp4,"y,x"\n"sub/b, b.mp4",x\n'),
        ("l.json", '[{"video": "a.mp4", "label": ["y", "x"]},\n{"label": ["x"], "video": "sub/b, b.mp4"}]'),
    ],
)
def test_several_labels(folder, name, text):
    rows = listed(folder, name, text, problem_type=SEVERAL)
    assert rows["label"][:] == [[0, 1], [0]]
    assert class_names_of(rows) == ["x", "y"]


def test_numbers_and_missing_labels(folder):
    text = "video,score\na.mp4,1.5\nsub/c 7.mp4,-2\n"
    rows = listed(folder, "l.csv", text, label_column="score", problem_type="regression")
    assert rows["label"][:] == [1.5, -2]
    for name, text in {
        "l.csv": "video,label\na.mp4,\nsub/c 7.mp4,x\n",
        "l.tsv": "video\na.mp4\nsub/c 7.mp4\n",
        "l.json": '[{"video": "a.mp4"}, {"video": "sub/c 7.mp4", "label": null}]',
        "m.json": '[{"video": "a.mp4", "label": ["x", "y"]}, {"video": "sub/c 7.mp4", "label": ["x"]}]',
    }.items():
        assert listed(folder, name, text, labels_required=False).column_names == ["video"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "x,a.mp4\n", r"l\.csv:1: has 2 fields, the video in number 2, and no header; write a line 'label,video'"),
        ("l.tsv", "3\ta.mp4\n", r"l\.tsv:1: has 2 fields, .* write a line 'label\\tvideo' before it"),
        ("l.csv", "a.mp4,x,y\n", r"l\.csv:1: has 3 fields, .* 'video,…,…' before it \(several labels of a video go into"),
        ("l.csv", "video,label\na.mp4,x\na.mp4,x,y\n", r"l\.csv:3: has 3 fields, where video, label are 2; put a field"),
        ("l.csv", 'video,label\na.mp4,"x\n', r"l\.csv:2: no line of csv: unexpected end of data"),
        ("l.csv", "video,label\n", r"l\.csv: the list is empty; a video a line must follow its header video,label"),
        ("l.csv", "video,label\na.mp4,x\n\n,x\n", r"l\.csv:4 \(None\): no path of a video in the column 'video'"),
        ("l.csv", "video,label\na.mp4,x\na.mp4,\n", r"l\.csv:3: line without label"),
        ("l.csv", "video,class\na.mp4,x\n", r"l\.csv: has no column 'label'; it has \['video', 'class'\] \(label_column"),
        ("l.csv", "file,label\na,x\n", r"l\.csv: has the columns \['file', 'label'\]; none is the videos'"),
        ("l.csv", "one,two,label\na.mp4,a.mp4,x\n", r"one, two may be the videos': name it as video_column"),
        ("l.csv", "video,video\na.mp4,a.mp4\n", r"l\.csv:1: has the column 'video' twice"),
        ("l.csv", "video,label\na.doc,x\n", r"l\.csv:2 \(.*a\.doc\): not a video; expected a path ending in"),
        ("l.json", '[{"video": "a.mp4", "label": 0},\n {"video": 5}]', r"l\.json:2 \(5\): no path of a video"),
        ("l.json", '[{"video": "a.mp4"},\n "b"]', r'l\.json:2: "b" is no object; expected \{"video": …'),
        ("l.json", '[{"video": "a.mp4"},\n {"video" "b"}]', r"l\.json:2: not JSON: Expecting ':' delimiter, in column 11"),
        ("l.json", '[{"video": "a.mp4"}\n {"video": "b"}]', r"l\.json:1: not JSON: a comma or \] must follow"),
        ("l.json", '[{"video": "a.mp4"}', r"l\.json:1: not JSON: a comma or \] must follow"),
        ("l.json", "[]", r"l\.json: the list is empty"),
        ("k.csv", "label,youtube_id,time_start,time_end,split\nx,a,0,1,train\n", r"k\.csv: is Kinetics' own csv, .*make-list kinetics \S+k\.csv V"),
        ("s.json", '[{"id": "1", "label": "x y", "template": "x [y]"}]', r"s\.json: is Something-Something's own json, .*make-list ssv2"),
        ("o.json", '{"version": 1, "clips": []}', r"o\.json: is Ego4D's own json, .*make-list oscc"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_file_line_and_the_fix(folder, name, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        listed(folder, name, text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_with_metadata(folder, tmp_path, kind):
    """A VideoFolder of `datasets`, with splits and without."""
    frame = pd.DataFrame({"file_name": PATHS[::2], "text": ["", "x.mp4"], "label": ["walk fast", "run"]})
    write = {
        "csv": lambda path: frame.to_csv(path, index=False),
        "jsonl": lambda path: frame.to_json(path, orient="records", lines=True),
        "parquet": lambda path: frame.to_parquet(path),
    }[kind]
    for place in ("whole", "splits/train"):
        (tmp_path / place / "sub").mkdir(parents=True)
        for path in PATHS:
            (tmp_path / place / path).symlink_to(folder / path)
        write(tmp_path / place / f"metadata.{kind}")
    for source, split in (("whole", None), ("splits", "train")):
        rows = load_videos(tmp_path / source, split=split)
        place = tmp_path / source / (split or "")
        assert rows["video"][:] == [str(place / path) for path in PATHS[::2]]
        assert [class_names_of(rows)[label] for label in rows["label"]] == ["walk fast", "run"]


def test_another_metadata_file_makes_no_such_folder(folder, tmp_path):
    (tmp_path / "walk").mkdir()
    (tmp_path / "walk" / "a.mp4").symlink_to(folder / "a.mp4")
    (tmp_path / "metadata.csv").write_text("made_by,date\nme,today\n")
    assert class_names_of(load_videos(tmp_path)) == ["walk"]


def test_names_in_lists_are_the_classes_of_a_run(folder, tmp_path):
    text = "video,label\n" + "".join(f'"{folder / path}",{name}\n' for path, name in zip(PATHS, "bab", strict=True))
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "val.jsonl").write_text(json.dumps({"video": str(folder / "a.mp4"), "label": "b"}))
    recipe = Recipe(
        task="finetune", crop_scale=[0.1, 1.0], train=str(tmp_path / "train.csv"), val=str(tmp_path / "val.jsonl")
    )
    train, val = load_rows(recipe)
    assert class_names_of(train) == class_names_of(val) == ["a", "b"]
    assert (train["label"][:], val["label"][:]) == ([1, 0, 1], [1])


def test_prepare_writes_csv_for_a_list_with_columns(folder, tmp_path):
    """Its names may hold blanks, which would end a label in a line."""
    source = tmp_path / "lists" / "train.json"
    source.parent.mkdir()
    source.write_text(json.dumps(in_json("walk fast", "run, slowly", "walk fast")))
    assert cli.main(["prepare", str(source), str(tmp_path / "out"), "--data-root", str(folder)]) == 0
    new = tmp_path / "out" / "train.csv"
    assert new.read_text().splitlines()[:3] == ["video,label", "a.mp4,walk fast", '"sub/b, b.mp4","run, slowly"']
    assert class_names_of(load_videos(new)) == ["run, slowly", "walk fast"]
