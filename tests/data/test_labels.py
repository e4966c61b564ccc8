"""Labels that can be read and cannot be meant: what is refused where they are learned, and what is warned of."""

import logging

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers.videos import write_class_folders, write_clip, write_list

from everest_hf.data import load_videos
from everest_hf.training.loaders import load_rows
from everest_hf.training.recipe import Recipe

SEVERAL = "multi_label_classification"
HMDB51 = "April_09_brush_hair_u_nm_np1_ba_goo_{}.avi"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with the videos 0.mp4 to 7.mp4."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(8):
        write_clip(folder / f"{i}.mp4", num_frames=4)
    return folder


def list_of(videos, path, labels):
    """Write a list in which the videos have these labels."""
    return write_list(path, [(videos / f"{i}.mp4", label) for i, label in enumerate(labels)])


def finetune(train, val=None, **values):
    """The rows of a fine-tuning."""
    names = {"train": str(train), "val": None if val is None else str(val)}
    return load_rows(Recipe(task="finetune", crop_scale=[0.1, 1.0], **names, **values))


def warnings_of(caplog, function) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        function()
    return caplog.text


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (["10.0", "2.0"], {}, r":1 \('10\.0'\), \S+:2 \('2\.0'\): neither an integer nor a name; write classes as"),
        (["1e0", "1.e+00"], {}, r":2 \('1\.e\+00'\): neither an integer nor a name"),
        (["a,.5", "a"], {"problem_type": SEVERAL}, r":1 \('\.5'\): neither an integer nor a name"),
        (["walk", "walk", "3"], {}, r":3 \('3'\), \S+:1 \('walk'\): an integer beside a name; write all labels as"),
        (["0", "--1"], {}, r":2 \('--1'\): neither an integer nor a name"),
        (["1,2", "walk"], {"problem_type": SEVERAL}, r":1 \('1'\), \S+:2 \('walk'\): an integer beside a name"),
    ],
)
def test_labels_that_are_neither_integers_nor_names(videos, tmp_path, caplog, labels, arguments, message):
    source = list_of(videos, tmp_path / "list.txt", labels)
    with pytest.raises(ValueError, match=message) as caught:
        load_videos(source, **arguments)
    assert len(str(caught.value).splitlines()) == 1
    # Where labels are not learned, the same is a warning.
    text = warnings_of(caplog, lambda: load_videos(source, labels_required=False, **arguments))
    assert str(caught.value) in text


def test_class_folders_may_have_any_names(tmp_path):
    """Digits and letters, as signs of the hand have them."""
    write_class_folders(tmp_path, ("3", "b", "2.5"), 1)
    assert load_videos(tmp_path).features["label"].names == ["2.5", "3", "b"]


def test_names_that_differ_only_in_capitals(videos, tmp_path, caplog):
    message = "Cat and cat: different classes of "
    source = list_of(videos, tmp_path / "list.txt", ["cat", "Cat", "dog"])
    assert message in warnings_of(caplog, lambda: load_videos(source))
    assert message not in warnings_of(caplog, lambda: load_videos(source, class_names=["Cat", "cat", "dog"]))
    write_class_folders(tmp_path / "folders", ("cat", "Cat"), 1)
    assert message in warnings_of(caplog, lambda: load_videos(tmp_path / "folders"))
    features = Features(video=Value("string"), label=ClassLabel(names=["cat", "Cat"]))
    rows = Dataset.from_dict({"video": [str(videos / "0.mp4")], "label": [0]}, features)
    assert message.replace("Cat and cat", "cat and Cat") in warnings_of(caplog, lambda: load_videos(rows))


def test_one_video_with_two_labels(videos, tmp_path, caplog):
    (tmp_path / "linked").symlink_to(videos)
    lines = [(videos / "0.mp4", 0), (videos / "1.mp4", 1), (tmp_path / "linked" / "0.mp4", 1), (videos / "0.mp4", 0)]
    source = write_list(tmp_path / "list.txt", lines)
    message = r"list\.txt:1 \('0'\) and \S+list\.txt:3 \('1'\): one video with two labels; leave one of them"
    with pytest.raises(ValueError, match=message):
        load_videos(source)
    assert "one video with two labels" in warnings_of(caplog, lambda: load_videos(source, labels_required=False))
    twice = write_list(tmp_path / "twice.txt", [lines[0], lines[1], lines[0]])
    assert len(load_videos(twice)) == 3
    assert load_videos(source, problem_type="regression")["label"][:] == [0, 1, 1, 0]  # two measurements
    orders = write_list(tmp_path / "several.txt", [(videos / "0.mp4", "a,b"), (videos / "0.mp4", "b,a")])
    assert load_videos(orders, problem_type=SEVERAL)["label"][:] == [[0, 1], [0, 1]]
    apart = write_list(tmp_path / "apart.txt", [(videos / "0.mp4", "a"), (videos / "0.mp4", "b")])
    with pytest.raises(
        ValueError, match=r"apart\.txt:2 \('b'\): one video with two labels; 'path a,b' has both in one line"
    ):
        load_videos(apart, problem_type=SEVERAL)


# ---------------------------------------------------------------------- official lists


def test_official_lists_of_ucf101_count_from_1(videos, tmp_path):
    """As trainlist01.txt has them: 101 classes, of which the first is 1; the lists of the tests here count from 0."""
    names = [f"Class{i:03}/v_Class{i:03}_g{group:02}_c01.avi" for i in range(101) for group in (8, 9)]
    content = (videos / "0.mp4").read_bytes()
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    from_one = write_list(tmp_path / "trainlist01.txt", [(name, i // 2 + 1) for i, name in enumerate(names)])
    from_zero = write_list(tmp_path / "train.txt", [(name, i // 2) for i, name in enumerate(names)])
    message = (
        f"{from_one}: 1 of 102 classes without a training video, class 0; its labels run from 1 to 101, as in UCF101's "
        "official lists, and must count from 0: `everest-hf make-list ucf101 ANNOTATIONS VIDEOS OUT` writes such lists, "
        "with the classes' names"
    )
    for val in (from_zero, from_one, None):
        with pytest.raises(ValueError) as caught:
            finetune(from_one, val)
        assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"101 classes are labelled 0 to 100; these seem to count from 1, as UCF101"):
        finetune(from_zero, from_one)
    assert len(finetune(from_zero, from_zero)[1]) == 202


def test_split_files_of_hmdb51_are_no_classes(videos, tmp_path, caplog):
    lines = [(HMDB51.format(i), f"{mark} ") for i, mark in enumerate((1, 1, 0, 2, 1, 2))]
    source = write_list(tmp_path / "brush_hair_test_split1.txt", lines)
    for name, _ in lines:
        (tmp_path / name).write_bytes((videos / "0.mp4").read_bytes())
    message = (
        rf"^{source}:1: looks like a split file of HMDB51, whose 0, 1 and 2 are no classes but mean unused, training"
    )
    with pytest.raises(ValueError, match=message):
        finetune(source)
    assert "looks like a split file of HMDB51" in warnings_of(
        caplog, lambda: load_videos(source, labels_required=False)
    )
    # The same videos with classes of three folders, which happen to be three.
    folders = [(f"{i % 3}/{HMDB51.format(i)}", i % 3) for i in range(6)]
    for name, _ in folders:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((videos / "0.mp4").read_bytes())
    assert len(finetune(write_list(tmp_path / "list.txt", folders))[0]) == 6


# ---------------------------------------------------------------------- classes of a run


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (
            [0, 2, 5],
            None,
            "3 of 6 classes without a training video, classes 1, 3, 4; number the classes from 0 without",
        ),
        (
            [0, 2, 999_999],
            None,
            "999997 of 1000000 classes without a training video, classes 1, 3, 4, … 999997 in all",
        ),
        (["0,1", "3"], SEVERAL, "1 of 4 classes without a training video, class 2; number the classes from 0"),
        ([1, 2, 3], None, "class 0; its labels run from 1 to 3, and must count from 0: subtract 1 from each"),
    ],
)
def test_a_class_without_a_training_video_stops_the_run(videos, tmp_path, labels, problem_type, message):
    config = {"config": {"problem_type": problem_type}} if problem_type else {}
    with pytest.raises(ValueError, match=rf"^{tmp_path}/list\.txt: .*{message}") as caught:
        finetune(list_of(videos, tmp_path / "list.txt", labels), **config)
    assert len(str(caught.value).splitlines()) == 1
    pretraining = Recipe(train=str(tmp_path / "list.txt"))
    assert len(load_rows(pretraining)[0]) == len(labels)


def test_a_declared_class_without_a_training_video_stops_the_run(videos, tmp_path):
    features = Features(video=Value("string"), label=ClassLabel(names=["walk", "jump", "run"]))
    paths = [str(videos / f"{i}.mp4") for i in range(2)]
    Dataset.from_dict({"video": paths, "label": [0, 2]}, features).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(
        ValueError, match="1 of 3 classes without a training video, class jump; give each class a video"
    ):
        finetune(tmp_path / "set.parquet")


def test_a_label_of_val_that_train_lacks_stops_the_run(videos, tmp_path):
    for train, val, message in (
        ([0, 1, 0], [0, 2], r"val\.txt:2 \(2\): label out of range; 2 classes"),
        (["a", "b"], ["a", "c"], r"val\.txt:2 \('c'\): class not among the 2 known"),
    ):
        sources = list_of(videos, tmp_path / "train.txt", train), list_of(videos, tmp_path / "val.txt", val)
        with pytest.raises(ValueError, match=message):
            finetune(*sources)


def test_integers_are_the_same_classes_in_lists_and_folders(videos, tmp_path):
    """A folder of val with the name of an integer is that class of train, also where val lacks others."""
    train = list_of(videos, tmp_path / "train.txt", [0, 1, 2, 0])
    write_class_folders(tmp_path / "val", ("1", "2"), 1)
    _, val = finetune(train, tmp_path / "val")
    assert val["label"][:] == [1, 2]


def test_pretraining_does_not_ask_for_the_same_classes(videos, tmp_path):
    write_class_folders(tmp_path / "train", ("walk", "jump"), 1)
    write_class_folders(tmp_path / "val", ("run",), 1)
    rows = load_rows(Recipe(train=str(tmp_path / "train"), val=str(tmp_path / "val")))
    assert [len(part) for part in rows] == [2, 1]


def test_videos_in_train_and_val_are_named(videos, tmp_path, caplog):
    (tmp_path / "folder").symlink_to(videos)
    (tmp_path / "1.mp4").hardlink_to(videos / "1.mp4")
    write_clip(tmp_path / "2.mp4", num_frames=4)  # another video, though the name is the same
    train = list_of(videos, tmp_path / "train.txt", [0, 1, 0, 1])
    paths = [tmp_path / "1.mp4", tmp_path / "2.mp4", tmp_path / "folder" / "3.mp4", videos / "5.mp4"]
    val = write_list(tmp_path / "val.txt", [(path, 0) for path in paths])
    shared = f"{tmp_path}/1.mp4, {tmp_path}/folder/3.mp4: held out in {val} and trained on as well"
    assert shared in warnings_of(caplog, lambda: finetune(train, val))
    text = warnings_of(caplog, lambda: load_rows(Recipe(train=str(train), val=str(train))))
    assert f"{videos}/0.mp4, {videos}/1.mp4, {videos}/2.mp4, … 4 in all: held out" in text
    apart = write_list(tmp_path / "apart.txt", [(videos / "5.mp4", 0)])
    assert "held out" not in warnings_of(caplog, lambda: finetune(train, apart))
