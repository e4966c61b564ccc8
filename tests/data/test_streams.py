"""Clips of streams: who reads what, in which order, and what is drawn for it."""

from collections import Counter

import pytest
import torch
from helpers.tables import write_parquet
from helpers.videos import bad_files, moving_frames, write_video
from torch.utils.data import DataLoader

from everest_hf.data import MAX_REPLACEMENTS, StreamedClips, collate, stream_videos
from everest_hf.data.transforms import finetuning_transform
from everest_hf.video import VideoError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
SIZE = (24, 40)
SAMPLING = {"num_frames": 4, "frame_step": 2}
NAMES = ["walk", "jump"]


def write_files(folder, *sizes, cells=None):
    """Write parquet files with as many videos, or the cells given, and return a pattern of them."""
    folder.mkdir(exist_ok=True)
    video = write_video(folder / "video.mp4", moving_frames(12, 48, 64)).read_bytes()
    cells = cells or [{"bytes": video, "path": f"{i:03}.mp4"} for i in range(sum(sizes))]
    cells = iter(cells)
    for number, size in enumerate(sizes):
        of_file = [next(cells) for _ in range(size)]
        write_parquet(folder / f"part-{number}.parquet", of_file, [i % 2 for i in range(size)], NAMES)
    return folder / "part-*.parquet"


@pytest.fixture(scope="module")
def three_files(tmp_path_factory):
    """A pattern of three files of 10, 8 and 6 videos."""
    return write_files(tmp_path_factory.mktemp("three"), 10, 8, 6)


def clips_of(pattern, **kwargs) -> StreamedClips:
    values = {"batch_size": 2, "num_batches": 6, "shuffle_buffer": 1, **SAMPLING, **kwargs}
    return StreamedClips(stream_videos(pattern), finetuning_transform(SIZE), **values)


def batches_of(clips: StreamedClips, num_workers: int = 0) -> list[dict]:
    return list(DataLoader(clips, batch_size=clips.batch_size, num_workers=num_workers, collate_fn=collate))


def order_of(clips: StreamedClips, num_workers: int = 0) -> list[int]:
    return torch.cat([batch["index"] for batch in batches_of(clips, num_workers)]).tolist()


def first_pass(part: list[int]) -> list[int]:
    """What a part has, which starts again at its end: all before the first repetition."""
    return part[: next((i for i, x in enumerate(part) if x in part[:i]), len(part))]


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (1, 3), (2, 0), (2, 2), (4, 1)])
def test_parts_are_disjoint_and_complete(three_files, num_processes, num_workers):
    """Also where readers share a file: 2 processes of 2 workers, or 4 processes, and 3 files."""
    count, parts = max(1, num_workers), []
    for rank in range(num_processes):
        shape = {"batch_size": 1, "num_batches": 25 * count, "num_processes": num_processes, "process_index": rank}
        order = order_of(clips_of(three_files, **shape), num_workers)
        parts += [first_pass(order[worker::count]) for worker in range(count)]
    assert all(parts)
    assert sorted(Counter(x for part in parts for x in part).values()) == [1] * 24


def test_same_clips_whoever_reads_them(three_files):
    alone = batches_of(clips_of(three_files, num_batches=12))
    shared = [
        batch
        for rank in range(2)
        for batch in batches_of(clips_of(three_files, num_batches=12, num_processes=2, process_index=rank), 2)
    ]
    found = [
        {
            index: (clip, seed)
            for batch in batches
            for index, clip, seed in zip(batch["index"].tolist(), batch["pixel_values"], batch["seed"], strict=True)
        }
        for batches in (alone, shared)
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(clip, found[1][i][0]) and seed == found[1][i][1] for i, (clip, seed) in found[0].items())
    assert len({int(seed) for _, seed in found[0].values()}) == 24


def test_order_is_that_of_seed_and_epoch(three_files):
    orders = {}
    for seed, epoch, buffer in ((0, 0, 8), (0, 1, 8), (1, 0, 8), (0, 0, 1)):
        clips = clips_of(three_files, num_batches=12, seed=seed, shuffle_buffer=buffer)
        clips.set_epoch(epoch)
        orders[seed, epoch, buffer] = order_of(clips)
        assert order_of(clips) == orders[seed, epoch, buffer]
    assert len(set(map(tuple, orders.values()))) == 4
    assert len({frozenset(order) for order in orders.values()}) == 1


@pytest.mark.parametrize(("num_workers", "buffer"), [(0, 1), (2, 5), (3, 5)])
def test_epoch_goes_on_where_it_was_left(three_files, num_workers, buffer):
    shape = {"num_batches": 9, "shuffle_buffer": buffer, "num_processes": 2, "process_index": 1}
    clips = clips_of(three_files, **shape)
    clips.set_epoch(3)
    whole = order_of(clips, num_workers)
    for done in (4, 7):
        clips.set_epoch(3, start=done * 2 * 2)
        clips.set_epoch(3)  # as Accelerate's loaders do
        assert order_of(clips, num_workers) == whole[done * 2 :]
    clips.set_epoch(4)
    assert len(order_of(clips, num_workers)) == 18


def test_several_crops_of_a_video(three_files):
    clips = clips_of(three_files, num_batches=2, num_sample=3)
    batch = batches_of(clips)[0]
    assert batch["pixel_values"].shape == (6, 4, 3, *SIZE)
    assert batch["index"].tolist() == [i for i in order_of(clips)[:6:3] for _ in range(3)]
    assert len(set(batch["seed"].tolist())) == 6


def test_unreadable_videos_are_passed_over_and_reported(tmp_path):
    bad = {name: path.read_bytes() for name, path in bad_files(tmp_path).items() if name != "missing"}
    good = (tmp_path / "good.mp4").read_bytes()
    cells = [{"bytes": content, "path": f"{name}.mp4"} for name, content in bad.items()]
    cells = [cells[0], {"bytes": good, "path": "good.mp4"}, *cells[1:], {"bytes": good, "path": "fine.mp4"}]
    batches = batches_of(clips_of(write_files(tmp_path, 5, cells=cells), num_batches=1, batch_size=4))
    reported = [path for path, _ in batches[0]["bad"]]
    assert reported == ["text.mp4", "empty.mp4", "truncated.mp4", "text.mp4", "empty.mp4", "truncated.mp4"]
    assert len(set(batches[0]["index"].tolist())) == 2


def test_stream_of_unreadable_videos_ends(tmp_path):
    cells = [{"bytes": b"no video" * 9, "path": "text.mp4"}] * 3
    with pytest.raises(VideoError, match=rf"text\.mp4: .*; nor could the {MAX_REPLACEMENTS} before it be read"):
        batches_of(clips_of(write_files(tmp_path, 3, cells=cells)))


def test_fewer_videos_than_readers(tmp_path):
    clips = clips_of(write_files(tmp_path, 2), num_processes=3, process_index=2)
    with pytest.raises(ValueError, match="the stream has fewer videos than the 3 processes that read it"):
        batches_of(clips)
