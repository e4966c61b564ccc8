"""everest-hf split: shares of each class, whole groups, lists that training reads."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers.videos import write_clip, write_list

from everest_hf import cli
from everest_hf.data import load_videos
from everest_hf.data.splits import assign, split_videos

PERSONS = 10


@pytest.fixture
def folder(tmp_path):
    """Class folders as UCF101 has them: walk, 30 videos of 10 persons, and jump, 10 of the same."""
    video = write_clip(tmp_path / "any.mp4", num_frames=4)
    for name, clips in (("walk", 3), ("jump", 1)):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for person in range(PERSONS):
            for clip in range(clips):
                path = tmp_path / "videos" / name / f"v_{name}_g{person:02}_c{clip:02} a.mp4"
                path.hardlink_to(video)
    return tmp_path / "videos"


def lines_of(path: Path) -> list[tuple[str, ...]]:
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["video", "label"]
    return [tuple(line) for line in lines]


def test_each_part_has_its_share_of_each_class(folder, capsys):
    assert cli.main(["split", str(folder), "--val", "0.2", "--test", "0.1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out[:4]] == [
        ["class", "train", "val", "test"],
        ["jump", "7", "2", "1"],
        ["walk", "21", "6", "3"],
        ["all", "classes", "28", "8", "4"],
    ]
    assert out[4].split() == ["train", str(folder / "train.csv")]
    parts = {part: lines_of(folder / f"{part}.csv") for part in ("train", "val", "test")}
    assert Counter(label for _, label in parts["val"]) == {"jump": 2, "walk": 6}
    videos = [path for lines in parts.values() for path, _ in lines]
    assert sorted(videos) == sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.mp4"))
    rows = load_videos(folder / "train.csv")
    assert len(rows) == 28
    assert rows.features["label"].names == ["jump", "walk"]


def test_groups_stay_whole(folder):
    done = split_videos(folder, val=0.3, group=r"_(g\d+)_")
    persons = [{path.split("_")[2] for path, _ in lines_of(file)} for file in done.files.values()]
    assert not set.intersection(*persons)
    assert [len(group) for group in persons] == [7, 3]
    assert done.counts == {"jump": {"train": 7, "val": 3}, "walk": {"train": 21, "val": 9}}


def test_the_seed_makes_the_split(folder, tmp_path):
    texts = [
        split_videos(folder, seed=seed, out=tmp_path / str(place)).files["val"].read_text()
        for place, seed in enumerate((1, 1, 2))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].splitlines()[1].startswith("../videos/jump/")
    assert len(load_videos(tmp_path / "2" / "val.csv")) == 8


def test_groups_of_several_classes_and_sizes():
    """Groups of up to nine videos of two classes: the shares are near, and no group is in two parts."""
    groups = [f"g{i % 23 * i % 17}" for i in range(300)]
    labels = ["ab"[i % 7 % 2] for i in range(300)]
    part_of = assign(labels, groups, {"train": 0.7, "val": 0.2, "test": 0.1}, seed=3)
    parts_of_group = {
        group: {part for part, its in zip(part_of, groups, strict=True) if its == group} for group in groups
    }
    assert all(len(parts) == 1 for parts in parts_of_group.values())
    for name in "ab":
        counts = Counter(part for part, label in zip(part_of, labels, strict=True) if label == name)
        total = labels.count(name)
        assert abs(counts["train"] / total - 0.7) < 0.1
        assert abs(counts["val"] / total - 0.2) < 0.1
        assert counts["test"] > 0


def test_segments_of_one_video_stay_together(folder, tmp_path):
    videos = sorted(folder.glob("*/*.mp4"))[:6]
    lines = [f"{path},{start},{start + 0.04},{'ab'[i % 2]}" for i, path in enumerate(videos) for start in (0, 0.08)]
    (tmp_path / "list.csv").write_text("\n".join(["video,start,end,label", *lines]))
    done = split_videos(tmp_path / "list.csv", val=0.4)
    rows = {part: load_videos(path) for part, path in done.files.items()}
    assert [len(part) for part in rows.values()] == [8, 4]
    assert not set(rows["train"]["video"]) & set(rows["val"]["video"])
    assert set(rows["val"]["start"]) == {0.0, 0.08}


def test_a_list_is_divided_beside_itself(folder):
    source = write_list(folder.parent / "all.txt", [(p, p.parent.name) for p in sorted(folder.glob("*/*.mp4"))])
    done = split_videos(source)
    assert done.files["val"] == folder.parent / "val.csv"
    assert lines_of(done.files["val"])[0][0].startswith("videos/jump/")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--val", "0"], r"val is 0; it must be a share above 0 and below 1"),
        (["--val", "0.7", "--test", "0.3"], r"test is 0\.3; it must be a share of 0 or more and below 0\.3"),
        (["--group", "("], r"group is '\(', which is no regular expression"),
        (
            ["--group", "person"],
            r"jump/v_jump_g00_c00 a\.mp4, .* 40 in all: the group 'person' is not found in the path",
        ),
        (
            ["--group", "[a-z]+"],
            r"class 'jump' \(1\), 'walk' \(1\): too few videos, or groups of them, to be in train, val",
        ),
        (["--group", "videos|v_"], r"class 'jump' \(1\), 'walk' \(1\): too few"),
    ],
)
def test_impossible_splits(folder, capsys, options, message):
    assert cli.main(["split", str(folder), *options]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert not list(folder.glob("*.csv"))


def test_a_class_of_one_video(folder, capsys):
    write_clip(folder / "run" / "a.mp4", num_frames=4)
    assert cli.main(["split", str(folder)]) == 1
    assert "class 'run' (1): too few videos" in capsys.readouterr().err


def test_lists_are_not_overwritten(folder, capsys):
    split_videos(folder, test=0.1)
    before = (folder / "val.csv").read_text()
    assert cli.main(["split", str(folder), "--seed", "5", "--test", "0.1"]) == 1
    assert f"{folder}/train.csv: is there already; overwrite replaces it" in capsys.readouterr().err
    assert cli.main(["split", str(folder), "--seed", "5", "--overwrite"]) == 1
    assert f"{folder}/test.csv: is part of another split" in capsys.readouterr().err
    assert (folder / "val.csv").read_text() == before
    assert cli.main(["split", str(folder), "--seed", "5", "--test", "0.1", "--overwrite"]) == 0
    assert (folder / "val.csv").read_text() != before
    with pytest.raises(ValueError, match=r"train\.csv: is the source itself"):
        split_videos(folder / "train.csv", overwrite=True)


def test_folders_named_by_numbers_are_refused_where_a_list_would_change_them(folder):
    (folder / "walk").rename(folder / "1")
    with pytest.raises(ValueError, match=r"videos: 1: classes that a list would have for numbers; name them by words"):
        split_videos(folder)
    (folder / "jump").rename(folder / "0")
    assert load_videos(split_videos(folder).files["val"])["label"][:] == [0] * 2 + [1] * 6


def test_groups_that_leave_no_split():
    """a is in g1 and g2, b in g2 and g3, c in g1 and g3: of two parts, one lacks a class."""
    labels, groups = list("aabbcc"), ["g1", "g2", "g2", "g3", "g1", "g3"]
    with pytest.raises(
        ValueError, match=r"^class '[abc]' was not in (train|val) in any split that was tried; make the"
    ):
        assign(labels, groups, {"train": 0.5, "val": 0.5}, seed=0)
