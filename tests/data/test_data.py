"""Rows, clips, views and batches from real video files."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel
from helpers.videos import (
    bad_files,
    counting_frames,
    frame_number,
    real_clips,
    write_class_folders,
    write_clip,
    write_list,
    write_video,
)
from torch.utils.data import DataLoader

from everest_hf.data import (
    MAX_REPLACEMENTS,
    BadVideos,
    EpochSampler,
    VideoClips,
    VideoViews,
    balanced_order,
    check_readable,
    class_names_of,
    collate,
    epoch_order,
    load_videos,
    replacements,
    seed_of,
)
from everest_hf.data.transforms import evaluation_crops, finetuning_transform, pretraining_transform
from everest_hf.training.recipe import Recipe
from everest_hf.video import VideoError, read_clip, read_frames

SIZE = (24, 40)
SAMPLING = {"num_frames": 6, "frame_step": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("classes"), classes=("walk", "jump", "run"), videos_per_class=2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Rows of three good videos and three that cannot be read."""
    root = tmp_path_factory.mktemp("mixed")
    bad = bad_files(root)
    bad.pop("missing")
    good = [write_clip(root / f"fine_{i}.mp4", seed=i) for i in range(2)]
    paths = [root / "good.mp4", *good, *bad.values()]
    return load_videos(write_list(root / "all.txt", [(path, 0) for path in paths]))


def clips_of(rows, transform=None, **kwargs) -> VideoClips:
    return VideoClips(rows, transform or finetuning_transform(SIZE), **{**SAMPLING, **kwargs})


# ---------------------------------------------------------------------- sources


def test_list_with_integers_relative_paths_and_blanks(tmp_path):
    paths = [write_clip(tmp_path / name) for name in ("a.mp4", "sub/b b.avi", "sub/c 7.MP4")]
    lines = [("a.mp4", 2), ("sub/b b.avi", 0), (f"{paths[2]}\t", "1 ")]
    rows = load_videos(write_list(tmp_path / "list.txt", lines))
    assert rows["video"][:] == [str(path) for path in paths]
    assert rows["label"][:] == [2, 0, 1]
    assert class_names_of(rows) is None


def test_list_relative_to_data_root(tmp_path):
    path = write_clip(tmp_path / "videos" / "a.mp4")
    rows = load_videos(write_list(tmp_path / "lists" / "list.txt", [("a.mp4", 0)]), data_root=tmp_path / "videos")
    assert rows["video"][:] == [str(path)]


def test_list_with_class_names(tmp_path):
    for name in "abc":
        write_clip(tmp_path / f"{name}.mp4")
    source = write_list(tmp_path / "list.txt", [("a.mp4", "walk"), ("b.mp4", "jump"), ("c.mp4", "walk")])
    rows = load_videos(source)
    assert rows.features["label"] == ClassLabel(names=["jump", "walk"])
    assert rows["label"][:] == [1, 0, 1]
    given = load_videos(source, class_names=["walk", "run", "jump"])
    assert given["label"][:] == [0, 2, 0]
    assert class_names_of(given) == ["walk", "run", "jump"]


def test_integer_labels_take_given_class_names(tmp_path):
    write_clip(tmp_path / "a.mp4")
    rows = load_videos(write_list(tmp_path / "list.txt", [("a.mp4", 1)]), class_names=["jump", "walk"])
    assert rows["label"][:] == [1]
    assert class_names_of(rows) == ["jump", "walk"]


def test_list_without_labels(tmp_path):
    paths = [write_clip(tmp_path / name) for name in ("a.mp4", "b 1.mp4")]
    rows = load_videos(write_list(tmp_path / "list.txt", [("a.mp4",), ("b 1.mp4",)]), labels_required=False)
    assert rows["video"][:] == [str(path) for path in paths]
    assert "label" not in rows.features


def test_folder_of_class_folders(folder):
    rows = load_videos(folder)
    assert class_names_of(rows) == ["jump", "run", "walk"]
    assert rows["label"][:] == [0, 0, 1, 1, 2, 2]
    assert rows["video"][0] == str(folder / "jump" / "jump_0.mp4")


def test_folder_with_splits(tmp_path):
    write_class_folders(tmp_path / "train", videos_per_class=3)
    write_class_folders(tmp_path / "val", videos_per_class=1)
    assert len(load_videos(tmp_path, split="train")) == 6
    assert len(load_videos(tmp_path, split="val")) == 2
    with pytest.raises(ValueError, match=r"\['train', 'val'\] are splits, not classes"):
        load_videos(tmp_path)
    with pytest.raises(FileNotFoundError, match="no sub-folder 'test'"):
        load_videos(tmp_path, split="test")


def test_folder_for_pretraining_needs_no_classes(tmp_path, caplog):
    write_clip(tmp_path / "a.mp4")
    write_clip(tmp_path / "deep" / "er" / "b.mp4")
    (tmp_path / "notes.md").write_text("no video")
    with caplog.at_level(logging.WARNING):
        rows = load_videos(tmp_path, labels_required=False)
    assert len(rows) == 2
    assert "label" not in rows.features
    assert "1 files that are not videos are ignored" in caplog.text
    with pytest.raises(ValueError, match=r"a\.mp4: video outside of a class folder"):
        load_videos(tmp_path)


def test_class_folders_that_are_links_and_links_in_a_circle(tmp_path, caplog):
    write_clip(tmp_path / "elsewhere" / "deep" / "a.mp4")
    write_clip(tmp_path / "set" / "walk" / "b.mp4")
    (tmp_path / "set" / "jump").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "walk" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere" / "out").symlink_to(tmp_path / "set" / "walk")  # and from there to itself
    with caplog.at_level(logging.WARNING):
        rows = load_videos(tmp_path / "set", labels_required=False)
    names = {str(Path(path).relative_to(tmp_path / "set")) for path in rows["video"]}
    assert names == {"jump/deep/a.mp4", "jump/out/b.mp4", "walk/b.mp4"}
    assert f"walk/up: a link to {tmp_path}/set, which it lies in itself; it is left out" in caplog.text
    with pytest.raises(
        ValueError, match=r"jump/out/b\.mp4 \('jump'\) and \S+walk/b\.mp4 \('walk'\): one video with two"
    ):
        load_videos(tmp_path / "set")


def test_folders_of_splits_beside_other_folders_are_no_classes(tmp_path):
    for name in ("train/walk/a.mp4", "val/walk/b.mp4", "more/c.mp4"):
        write_clip(tmp_path / name)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "list.txt").write_text("a walk")
    message = "'train', 'val'] are splits, not classes; choose one by split= (train_split, val_split)"
    for labels_required in (True, False):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_videos(tmp_path, labels_required=labels_required)
    assert len(load_videos(tmp_path, split="train")) == 1
    write_clip(tmp_path / "alone" / "train" / "walk" / "a.mp4")
    (tmp_path / "alone" / "annotations").mkdir()
    with pytest.raises(ValueError, match=r"\['annotations', 'train'\] are splits, not classes"):
        load_videos(tmp_path / "alone")
    write_clip(tmp_path / "vehicles" / "train" / "a.mp4")
    write_clip(tmp_path / "vehicles" / "car" / "a.mp4")
    assert class_names_of(load_videos(tmp_path / "vehicles")) == ["car", "train"]


def test_an_empty_class_folder_is_named(tmp_path, caplog):
    write_clip(tmp_path / "walk" / "a.mp4")
    (tmp_path / "jump").mkdir()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/jump: a class folder without a video; put videos into it, or"):
        load_videos(tmp_path)
    # Which classes there are is known from elsewhere, or of no interest.
    for arguments in ({"class_names": ["jump", "walk"]}, {"labels_required": False}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(load_videos(tmp_path, **arguments)) == 1
        assert f"{tmp_path}/jump: a class folder without a video" in caplog.text


def bad_list(tmp_path, *lines):
    write_clip(tmp_path / "a.mp4")
    return write_list(tmp_path / "list.txt", lines)


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([], {}, r"list\.txt: the list is empty"),
        ([("a.mp4", 0), ("a.mp4",)], {}, r"list\.txt:2: line without label"),
        (
            [("a.mp4", 0), ("a.mp4", 5)],
            {"num_labels": 5},
            r"list\.txt:2 \(5\): label out of range; 5 classes are .* 0 to 4",
        ),
        ([("a.mp4", -1)], {}, r"list\.txt:1 \(-1\): label out of range"),
        ([("a.mp4", 2)], {"class_names": ["x", "y"]}, r"list\.txt:1 \(2\): label out of range"),
        ([("a.mp4", "z")], {"class_names": ["x", "y"]}, r"list\.txt:1 \('z'\): class not among the 2 known"),
        (
            [("a.mp4", 0), ("a.doc", 0)],
            {},
            r"list\.txt:2 \(.*a\.doc\): not a video; expected a path ending in one of \.mp4",
        ),
        ([("a.mp4", "9" * 20)], {}, r"list\.txt:1 \(9{20}\): label out of range; 1000000 classes are"),
        ([("a.mp4", "9" * 5000)], {}, r"list\.txt:1 \(9{5000}\): label out of range"),
        ([("a.mp4", 1), ("a.mp4", 2)], {"num_labels": 2}, r"list\.txt:2 \(2\): .* 0 to 1; these seem to count from 1"),
        ([("a.mp4", "--1")], {}, r"list\.txt:1 \('--1'\): neither an integer nor a name"),
        ([("http://a.org/a.mp4", 0)], {}, r"list\.txt:1: an address; a list takes files of this machine"),
        (
            [("0;a.mp4",)],
            {},
            r"list\.txt:1: has 2 fields, the video in number 2, and no header; write .*'label;video'",
        ),
        ([("a.mp4", 0)], {"split": "train"}, r"split is 'train', but .*list\.txt is a list file"),
    ],
)
def test_bad_lists_are_refused(tmp_path, lines, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_videos(bad_list(tmp_path, *lines), **arguments)


def test_paths_at_home(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "home" / "videos" / "a.mp4")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_list(tmp_path / "home" / "list.txt", [("~/videos/a.mp4", 0)])
    assert load_videos("~/list.txt")["video"][:] == [str(path)]
    beside = write_list(tmp_path / "list.txt", [("a.mp4", 0)])
    assert load_videos(beside, data_root="~/videos")["video"][:] == [str(path)]


def test_an_address_of_the_hub_in_a_list_stays_as_it_is(tmp_path):
    address = "hf://datasets/owner/name/a clip.mp4"
    assert load_videos(write_list(tmp_path / "list.txt", [(address, 0)]))["video"][:] == [address]


def test_missing_videos_are_counted_and_the_first_named(tmp_path):
    source = bad_list(tmp_path, ("a.mp4", 0), *((f"gone_{i}.mp4", 0) for i in range(5)))
    with pytest.raises(FileNotFoundError) as caught:
        load_videos(source)
    message = str(caught.value)
    assert all(f"gone_{i}.mp4" in message for i in range(3))
    assert "gone_3" not in message
    assert "5 in all: no such video file" in message
    assert str(source) in message


def test_missing_or_unfit_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such list file"):
        load_videos(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="no video in it"):
        load_videos(tmp_path)
    with pytest.raises(ValueError, match="a video, not a list"):
        load_videos(write_clip(tmp_path / "a.mp4"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        load_videos(tmp_path / "binary.txt")


def test_check_readable_names_every_bad_video(mixed):
    errors = check_readable(mixed)
    assert [error.path for error in errors] == mixed["video"][3:]
    assert len(check_readable(mixed, sample=2)) == 1  # rows 0 and 3
    assert check_readable(mixed.select([0, 1, 2])) == []


# ---------------------------------------------------------------------- clips


def test_clip_is_a_function_of_seed_epoch_and_index(folder):
    rows = load_videos(folder)
    first, again, other = clips_of(rows, seed=1), clips_of(rows, seed=1), clips_of(rows, seed=2)
    item = first[4]
    assert item["pixel_values"].shape == (6, 3, *SIZE)
    assert item["pixel_values"].dtype == torch.uint8
    assert (item["labels"], item["index"], item["bad"]) == (2, 4, [])
    torch.rand(7)  # the state of the default generator is no argument
    assert torch.equal(again[4]["pixel_values"], item["pixel_values"])
    assert not torch.equal(other[4]["pixel_values"], item["pixel_values"])
    again.set_epoch(1)
    assert not torch.equal(again[4]["pixel_values"], item["pixel_values"])
    again.set_epoch(0)
    assert torch.equal(again[4]["pixel_values"], item["pixel_values"])


def test_frames_and_augmentation_are_drawn_apart(tmp_path):
    path = write_video(tmp_path / "count.mp4", counting_frames(64, *SIZE), crf=10)
    rows, draws = load_videos(write_list(tmp_path / "list.txt", [(path, 0)])), []

    def transform(clip):
        draws.append(int(torch.randint(64, ())))
        return clip

    clips, starts = clips_of(rows, transform, num_frames=1), []
    for epoch in range(40):
        clips.set_epoch(epoch)
        starts.append(frame_number(clips[0]["pixel_values"][0].permute(1, 2, 0)))
    assert len(set(starts)) > 20
    assert sum(start == draw for start, draw in zip(starts, draws, strict=True)) < 8


def test_seeds_are_distinct():
    seeds = {seed_of(seed=s, epoch=e, index=i) for s in range(6) for e in range(6) for i in range(6)}
    assert len(seeds) == 216
    assert all(0 <= seed < 2**63 for seed in seeds)


def epochs_of(clips: VideoClips, num_workers: int, num_epochs: int = 3) -> dict:
    """All items of some epochs by (epoch, index), read by workers that live through all of them."""
    loader = DataLoader(
        clips,
        batch_size=2,
        sampler=EpochSampler(clips),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    items = {}
    for epoch in range(num_epochs):
        clips.set_epoch(epoch)
        for batch in loader:
            pairs = zip(batch["index"].tolist(), batch["pixel_values"], strict=True)
            items.update({(epoch, index): clip.clone() for index, clip in pairs})
    return items


def test_workers_change_nothing_and_hear_of_each_epoch(folder):
    rows = load_videos(folder)
    alone, shared = epochs_of(clips_of(rows), 0), epochs_of(clips_of(rows), 2)
    assert alone.keys() == shared.keys() == {(epoch, index) for epoch in range(3) for index in range(6)}
    assert all(torch.equal(alone[key], shared[key]) for key in alone)
    assert not torch.equal(alone[0, 0], alone[1, 0])


def test_epoch_order_is_a_permutation_of_its_own():
    orders = [epoch_order(num_rows=50, seed=3, epoch=epoch).tolist() for epoch in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[1] != orders[2]


def test_a_balanced_order_draws_all_classes_equally_often():
    """Seven videos of class 0, two of class 1, one of class 2: ten draws, and any stretch from the start, to one."""
    labels = torch.tensor([0, 1, 0, 0, 2, 0, 0, 1, 0, 0])
    orders = [balanced_order(labels=labels, seed=3, epoch=epoch) for epoch in (0, 0, 1)]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()
    for order in orders[1:]:
        assert len(set(order.tolist())) == 10
        drawn = labels[order % 10]
        for stop in range(1, 11):
            counts = drawn[:stop].bincount(minlength=3)
            assert counts.max() - counts.min() <= 1
        rows = {label: (order % 10)[drawn == label].bincount(minlength=10)[labels == label] for label in range(3)}
        assert all(counts.max() - counts.min() <= 1 for counts in rows.values())  # nor is a video of a class preferred
        assert [draw // 10 for draw in order.tolist() if draw % 10 == 4] == list(range(int(rows[2])))


def test_a_clip_that_is_drawn_again_is_another_one(folder):
    """The first draw of a row is the clip without balance."""
    clips, plain = clips_of(load_videos(folder), balanced=True), clips_of(load_videos(folder))
    first, again, other = clips[4], clips[10], plain[4]
    assert first["seed"] == other["seed"] != again["seed"]
    assert (first["index"], again["index"], again["labels"]) == (4, 4, first["labels"])
    assert torch.equal(first["pixel_values"], other["pixel_values"])
    assert not torch.equal(first["pixel_values"], again["pixel_values"])
    assert sorted(EpochSampler(clips)) == list(range(6))  # of classes of the same size, every video once


def test_order_goes_on_where_an_epoch_was_left(folder):
    clips = clips_of(load_videos(folder))
    sampler, whole = EpochSampler(clips), epoch_order(num_rows=6, seed=0, epoch=2).tolist()
    sampler.set_epoch(2, start=4)
    assert (list(sampler), len(sampler)) == (whole[4:], 2)
    sampler.set_epoch(2)
    assert list(sampler) == whole[4:]
    sampler.set_epoch(3)
    assert (list(sampler), len(sampler)) == (epoch_order(num_rows=6, seed=0, epoch=3).tolist(), 6)


def test_seed_of_a_clip_is_its_own(folder):
    clips = clips_of(load_videos(folder))
    seeds = collate([clips[i] for i in (0, 1, 1)])["seed"].tolist()
    clips.set_epoch(1)
    assert seeds[0] != seeds[1] == seeds[2] != clips[1]["seed"]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_several_crops_of_one_decode(folder, monkeypatch):
    reads = []
    monkeypatch.setattr("everest_hf.data.clips.read_clip", lambda *a, **k: reads.append(a) or read_clip(*a, **k))
    rows = load_videos(folder)
    one, three = clips_of(rows), clips_of(rows, num_sample=3)
    batch = collate([three[4], three[1]])
    assert len(reads) == 2
    assert batch["pixel_values"].shape == (6, 6, 3, *SIZE)
    assert batch["labels"].tolist() == [2, 2, 2, 0, 0, 0]
    assert batch["index"].tolist() == [4, 4, 4, 1, 1, 1]
    assert len(set(batch["seed"].tolist())) == 6
    assert batch["bad"] == []
    # The first crop is that of a run without repetition; the others are draws of their own.
    assert torch.equal(batch["pixel_values"][0], one[4]["pixel_values"])
    assert int(batch["seed"][0]) == one[4]["seed"]
    assert not any(torch.equal(batch["pixel_values"][0], clip) for clip in batch["pixel_values"][1:3])
    # Steps are counted in clips: 12 are two rows for each of two processes.
    sampler = EpochSampler(three, total_batch=12)
    sampler.set_epoch(1, start=12)
    assert list(sampler) == []
    sampler = EpochSampler(three, total_batch=6)
    sampler.set_epoch(1, start=12)
    assert list(sampler) == epoch_order(num_rows=6, seed=0, epoch=1).tolist()[4:]


def test_clips_that_begin_later_share_one_reading(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr("everest_hf.data.clips.read_clip", lambda *a, **k: reads.append(a) or read_clip(*a, **k))
    path = write_video(tmp_path / "count.mp4", counting_frames(60, *SIZE), crf=10)
    rows = load_videos(write_list(tmp_path / "list.txt", [(path, 0)]))
    clips = clips_of(rows, transform=torch.nn.Identity(), num_frames=4, frame_step=3, num_sample=4, sample_shift=2)
    shifts = set()
    for epoch in range(8):
        clips.set_epoch(epoch)
        first, *others = [[frame_number(f.permute(1, 2, 0)) for f in clip] for clip in clips[0]["pixel_values"]]
        assert np.diff(first).tolist() == [3, 3, 3]
        assert all(set(np.subtract(other, first)) in ({0}, {3}, {6}) for other in others)
        shifts |= {other[0] - first[0] for other in others}
    assert shifts == {0, 3, 6}
    assert len(reads) == 8
    short = clips_of(rows, transform=torch.nn.Identity(), num_frames=4, frame_step=30, num_sample=2, sample_shift=2)
    one, two = short[0]["pixel_values"]
    assert torch.equal(one, two)  # no frame is left to begin later at
    with pytest.raises(ValueError, match="sample_shift is 1; it must be 0 unless num_sample is 2 or more"):
        Recipe(train="any", sample_shift=1)


def test_frame_sampling_reaches_the_clips(tmp_path):
    path = write_video(tmp_path / "count.mp4", counting_frames(60, *SIZE), crf=10)
    rows = load_videos(write_list(tmp_path / "list.txt", [(path, 0)]))
    whole = {"transform": torch.nn.Identity(), "num_frames": 4, "num_input_frames": 6}

    def numbers(**kwargs):
        clip = clips_of(rows, **whole, **kwargs)[0]["pixel_values"]
        return [frame_number(frame.permute(1, 2, 0)) for frame in clip]

    stride = numbers(frame_step=3)
    assert [number - stride[0] for number in stride] == [0, 2, 4, 6, 8, 10]
    assert [number // 10 for number in numbers(frame_sampling="segment")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("candidates", [4, 6, 8])
def test_candidates_are_evenly_spaced_in_the_span_of_the_clip(tmp_path, candidates):
    """Stride: that of 4 frames at step 3 is 12 frames. Segment: the whole video. In training and in all views."""
    path = write_video(tmp_path / "count.mp4", counting_frames(60, *SIZE), crf=10)
    rows = load_videos(write_list(tmp_path / "list.txt", [(path, 0)]))
    for frame_sampling in ("stride", "segment"):
        sampling = {"num_frames": 4, "frame_step": 3, "num_input_frames": candidates, "frame_sampling": frame_sampling}
        views = VideoViews(rows, SIZE, **sampling, num_segments=2)[0]["pixel_values"]
        for clip in (*views, VideoClips(rows, torch.nn.Identity(), **sampling)[0]["pixel_values"]):
            numbers = [frame_number(frame.permute(1, 2, 0)) for frame in clip]
            if frame_sampling == "stride":
                assert [number - numbers[0] for number in numbers] == [i * 12 // candidates for i in range(candidates)]
            else:
                part = 60 / candidates
                assert all(int(i * part) <= number < (i + 1) * part for i, number in enumerate(numbers))
                assert len(numbers) == candidates


# ---------------------------------------------------------------------- unreadable videos


def test_replacements_follow_in_the_order_of_the_epoch():
    order = torch.tensor([3, 0, 4, 1, 2])
    assert replacements(index=1, order=order) == [2, 3, 0, 4]
    assert len(replacements(index=7, order=torch.arange(1000))) == MAX_REPLACEMENTS
    assert replacements(index=0, order=torch.tensor([0])) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_a_bad_video_and_reports_it(mixed, num_workers, caplog, tmp_path):
    clips, bad = clips_of(mixed, pretraining_transform(SIZE)), BadVideos(tmp_path / "bad.txt")
    loader = DataLoader(clips, batch_size=2, sampler=EpochSampler(clips), collate_fn=collate, num_workers=num_workers)
    order, read = epoch_order(num_rows=6, seed=0, epoch=0).tolist(), []
    with caplog.at_level(logging.WARNING):
        for epoch_of_same_draws in range(2):
            for batch in loader:
                bad.take(batch)
                bad.share()
                assert batch["pixel_values"].shape == (2, 6, 3, *SIZE)
                assert "bad" not in batch
                read += batch["index"].tolist() if epoch_of_same_draws == 0 else []
    expected = [next(i for i in order[place:] + order if i < 3) for place in range(6)]
    assert read == expected
    assert set(bad.reasons) == set(mixed["video"][3:])
    assert bad.count >= 6
    for path, reason in bad.reasons.items():
        assert caplog.text.count(f"unreadable video replaced: {path}: {reason}") == 1
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert sorted(listed) == sorted(f"{path}\t{reason}" for path, reason in bad.reasons.items())


def test_account_of_bad_videos_is_that_of_all_processes(tmp_path, caplog):
    """Each process meets one video of its own and one that both meet; the list knows one from an earlier start."""
    path = tmp_path / "bad.txt"
    path.write_text("both.mp4\tempty\n")
    processes = [BadVideos(path), BadVideos(path)]
    for name, bad in zip("ab", processes, strict=True):
        bad.take({"bad": [(f"{name}.mp4", "no file"), ("both.mp4", "empty")]})
    news = [entry for bad in processes for entry in bad._news]
    with caplog.at_level(logging.WARNING):
        for is_main, bad in zip((True, False), processes, strict=True):
            bad.share(gather=lambda _: news, is_main=is_main)
    assert [(set(bad.reasons), bad.count) for bad in processes] == [({"a.mp4", "b.mp4", "both.mp4"}, 4)] * 2
    assert path.read_text() == "both.mp4\tempty\na.mp4\tno file\nb.mp4\tno file\n"
    assert caplog.text.count("unreadable video replaced") == 3


def test_training_gives_up_where_no_video_can_be_read(mixed):
    hopeless = mixed.select([3, 4, 5])
    with pytest.raises(VideoError, match=r"nor could any of the 2 videos tried in its place"):
        clips_of(hopeless)[0]


def test_evaluation_never_replaces(mixed):
    views = VideoViews(mixed, SIZE, **SAMPLING)
    assert views[0]["index"] == 0
    with pytest.raises(VideoError) as caught:
        list(DataLoader(views, collate_fn=collate, num_workers=1))
    assert str(caught.value) == f"{mixed['video'][3]}: {caught.value.reason}"
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------------- views


def test_views_are_segments_by_crops(tmp_path):
    path = write_video(tmp_path / "count.mp4", counting_frames(41, 40, 64), crf=10)
    rows = load_videos(write_list(tmp_path / "list.txt", [(path, 3)]))
    item = VideoViews(rows, (40, 40), num_frames=5, frame_step=2, num_segments=3, num_crops=2)[0]
    assert item["pixel_values"].shape == (6, 5, 3, 40, 40)
    assert item["labels"] == 3
    # The crops show columns 0 to 39 and 24 to 63 of 64: the first 5 and the last 5 of 8 digits.
    digits = item["pixel_values"].float().mean((2, 3)).unflatten(-1, (5, 8)).mean(-1) > 127  # (V, T, 5)
    for view, first in enumerate([0, 0, 16, 16, 32, 32]):
        low = 3 if view % 2 else 0
        expected = [[bool(number >> bit & 1) for bit in range(low, low + 5)] for number in range(first, first + 9, 2)]
        assert digits[view].tolist() == expected


def test_single_view_is_the_centre_clip_and_crop(folder):
    rows = load_videos(folder)
    item = VideoViews(rows, SIZE, **SAMPLING)[0]
    many = VideoViews(rows, SIZE, **SAMPLING, num_segments=3, num_crops=3)[0]
    assert torch.equal(item["pixel_values"][0], many["pixel_values"][4])


def test_batches_are_uint8(folder):
    views = VideoViews(load_videos(folder), SIZE, **SAMPLING, num_segments=2)
    batch = collate([views[0], views[5]])
    assert batch["pixel_values"].shape == (2, 2, 6, 3, *SIZE)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].tolist() == [0, 2]
    assert batch["index"].tolist() == [0, 5]
    assert batch["bad"] == []


def test_rows_without_labels_give_batches_without_labels(folder):
    rows = load_videos(folder).remove_columns("label")
    assert "labels" not in collate([clips_of(rows)[0], clips_of(rows)[1]])


def test_videos_given_as_bytes(folder):
    """The form in which datasets keeps videos of parquet and webdataset files."""
    rows = load_videos(folder)
    stored = rows.map(lambda row: {"video": {"path": row["video"], "bytes": Path(row["video"]).read_bytes()}})
    assert torch.equal(clips_of(stored)[2]["pixel_values"], clips_of(rows)[2]["pixel_values"])


def test_real_clips_of_many_sizes_make_one_batch(tmp_path):
    rows = load_videos(write_list(tmp_path / "list.txt", [(path, i) for i, path in enumerate(real_clips().values())]))
    clips = VideoClips(rows, pretraining_transform((48, 64)), num_frames=6, frame_step=4)
    batch = collate([clips[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 6, 3, 48, 64)
    # Real footage: every clip has contrast, and frames that differ.
    assert (batch["pixel_values"].float().flatten(1).std(1) > 10).all()
    assert (batch["pixel_values"][:, 0] != batch["pixel_values"][:, -1]).flatten(1).any(1).all()


def test_view_is_the_crop_of_the_frames_read(folder):
    rows = load_videos(folder)
    views = VideoViews(rows, SIZE, num_frames=20)[0]["pixel_values"]
    frames = read_frames(rows[0]["video"], range(20)).permute(0, 3, 1, 2)
    assert torch.equal(views, evaluation_crops(frames, SIZE))


# ---------------------------------------------------------------------- under Accelerate


def test_resumed_epoch_holds_under_accelerate(folder):
    clips = clips_of(load_videos(folder), seed=5)
    sampler = EpochSampler(clips)
    loader = Accelerator(cpu=True).prepare(DataLoader(clips, batch_size=2, sampler=sampler, collate_fn=collate))
    for epoch, start in ((3, 4), (4, 0)):
        loader.set_epoch(epoch)
        if start:
            sampler.set_epoch(epoch, start=start)
        indices = torch.cat([batch["index"] for batch in loader]).tolist()
        assert indices == epoch_order(num_rows=6, seed=5, epoch=epoch).tolist()[start:]


def test_order_and_epoch_hold_under_accelerate(folder):
    clips = clips_of(load_videos(folder), seed=5)
    loader = DataLoader(clips, batch_size=2, sampler=EpochSampler(clips), collate_fn=collate, num_workers=1)
    prepared = Accelerator(cpu=True).prepare(loader)
    for epoch in (0, 4):
        prepared.set_epoch(epoch)
        batches = list(prepared)
        assert clips.epoch == epoch
        assert (
            torch.cat([batch["index"] for batch in batches]).tolist()
            == epoch_order(num_rows=6, seed=5, epoch=epoch).tolist()
        )
        assert torch.equal(batches[0]["pixel_values"][0], clips[int(batches[0]["index"][0])]["pixel_values"])
