"""Folders of pictures as videos: their order, their pixels, what is wrong with them, and wherever a video may be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_config
from helpers.videos import counting_frames, frame_number, moving_frames, write_clip, write_list
from PIL import Image

from everest_hf import EverestForVideoClassification, EverestVideoProcessor, cli
from everest_hf.data import VideoClips, VideoViews, class_names_of, load_videos
from everest_hf.data.transforms import normalize
from everest_hf.video import Segment, VideoError, open_video, probe, read_frames

SIZE = (24, 40)


def write_frames(folder, frames: np.ndarray, name: str = "img_{:05}.png", first: int = 1) -> Path:
    """Write frames (T, H, W, 3) as pictures of these names, and return their folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(first + i))
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "readme.txt").write_text("these are frames")
    return folder


@pytest.fixture
def frames(tmp_path) -> Path:
    """Thirty frames that show their numbers."""
    return write_frames(tmp_path / "a folder", counting_frames(30))


@pytest.mark.parametrize(
    ("name", "first"), [("img_{:05}.png", 1), ("{}.png", 8), ("b2_frame{:02}.PNG", 95), ("{:03}_x.png", 0)]
)
def test_frames_are_in_the_order_of_their_numbers(tmp_path, name, first):
    expected = counting_frames(30)
    folder = write_frames(tmp_path / "frames", expected, name, first)
    video = open_video(folder)
    assert (video.num_frames, video.fps) == (30, 0)
    assert torch.equal(read_frames(folder, [29, 3, 3]), torch.from_numpy(expected[[29, 3, 3]]))
    info = probe(folder)
    assert (info.num_frames, info.height, info.width, info.codec, info.duration) == (30, 32, 64, "png", 0)


def test_kinds_of_pictures(tmp_path):
    """Grey ones, with a palette, with transparency, JPEG; those of a camera that was held upright are turned."""
    frame = moving_frames(1, 32, 64)[0]
    for mode in ("L", "P", "RGBA", "1"):
        (tmp_path / mode).mkdir()
        Image.fromarray(frame).convert(mode).save(tmp_path / mode / "0.png")
        expected = np.array(Image.fromarray(frame).convert(mode).convert("RGB"))
        assert torch.equal(read_frames(tmp_path / mode, [0])[0], torch.from_numpy(expected))
    (tmp_path / "jpeg").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(frame).save(tmp_path / "jpeg" / "0.jpeg", exif=exif, quality=95)
    info = probe(tmp_path / "jpeg")
    assert (info.height, info.width, info.codec) == (64, 32, "jpeg")
    difference = read_frames(tmp_path / "jpeg", [0])[0].float() - torch.from_numpy(np.rot90(frame, -1).copy())
    assert difference.abs().mean() < 4


def break_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "img_00007.png").unlink(), "img_00006.png and img_00008.png follow one another, with a gap between"),
        (lambda f: break_off(f / "img_00007.png"), "img_00007.png: a damaged picture"),
        (lambda f: (f / "img_00007.png").write_bytes(b"x"), "img_00007.png: no picture, or a damaged one"),
        (lambda f: Image.new("RGB", (8, 8)).save(f / "img_00007.png"), "img_00007.png: is 8 x 8 pixels, where img_00001.png is 64 x 32"),
        (lambda f: Image.new("RGB", (32, 64)).save(f / "img_00007.png"), "img_00007.png: is 32 x 64 pixels, where"),
        (lambda f: Image.new("I;16", (64, 32)).save(f / "img_00007.png"), "img_00007.png: has more than 8 bits a colour"),
        (lambda f: (f / "thumb.png").write_bytes(b"x"), "thumb.png: frames are told by a number in their names"),
        (lambda f: (f / "flow_x_00007.png").write_bytes(b"x"), "flow_x_00007.png and img_00007.png have one number"),
        (lambda f: (f / "img_00007.png").rename(f / "img_7.png"), "img_00001.png and img_7.png differ in more than their numbers"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_the_file(frames, change, reason):
    change(frames)
    with pytest.raises(VideoError) as caught:
        read_frames(frames, range(30))
    assert str(caught.value).startswith(f"{frames}: cannot be decoded: {reason}")


def test_limits_hold_for_pictures(frames):
    with pytest.raises(VideoError, match="64 x 32 pixels are 2048, more than max_pixels=2000"):
        open_video(frames, max_pixels=2000)
    with pytest.raises(VideoError, match="more than max_pixels=5000"):
        open_video(frames, max_pixels=5000).read([0, 1, 2])


def test_segments_of_pictures_are_in_frames(frames):
    assert open_video(frames, segment=Segment(10, 20, in_frames=True)).frames == range(10, 20)
    with pytest.raises(
        VideoError, match="is in seconds, and the video tells no times; give start_frame and end_frame"
    ):
        open_video(frames, segment=Segment(1, 2))


# ---------------------------------------------------------------------- sources


@pytest.fixture
def folders(tmp_path) -> Path:
    """Class folders of folders of frames: walk/0, walk/1, jump/0, jump/1."""
    for i, name in enumerate(("walk/0", "walk/1", "jump/0", "jump/1")):
        write_frames(tmp_path / "set" / name, moving_frames(20, 32, 64, seed=i), "{:03}.jpg")
    return tmp_path / "set"


def test_class_folders_of_folders(folders):
    rows = load_videos(folders)
    assert rows["video"][:] == [str(folders / name) for name in ("jump/0", "jump/1", "walk/0", "walk/1")]
    assert class_names_of(rows) == ["jump", "walk"]
    assert len(load_videos(folders / "walk", labels_required=False)) == 2
    item = VideoClips(rows, torch.nn.Identity(), num_frames=4)[3]
    assert (item["pixel_values"].shape, item["labels"], item["bad"]) == ((4, 3, 32, 64), 1, [])
    write_clip(folders / "walk" / "2.mp4")  # where there are video files, pictures are none
    assert load_videos(folders, class_names=["jump", "walk"])["video"][:] == [str(folders / "walk" / "2.mp4")]


def test_lists_of_folders(folders, tmp_path):
    for lines in ([("set/walk/0", "w"), ("set/jump/1", "j")], [("set/walk/0,w",), ("set/jump/1,j",)]):
        rows = load_videos(write_list(tmp_path / "list.txt", lines))
        assert rows["video"][:] == [str(folders / "walk/0"), str(folders / "jump/1")]
        assert class_names_of(rows) == ["j", "w"]
    (tmp_path / "list.csv").write_text("video,label\nset/walk/0,w\n")
    assert len(load_videos(tmp_path / "list.csv")) == 1


def frames_of(path, **arguments) -> list[tuple]:
    """Start and end of each row of a list, and its label where there is one."""
    rows = load_videos(path, **arguments)
    return [(row["start_frame"], row["end_frame"], row.get("label")) for row in rows]


def test_lists_with_counts(folders, tmp_path):
    counted = write_list(tmp_path / "mmaction.txt", [("set/walk/0", 20, 1), ("set/jump/1", 15, 0)])
    assert frames_of(counted) == [(0, 20, 1), (0, 15, 0)]
    assert frames_of(counted, labels_required=False) == [(0, 20, 1), (0, 15, 0)]
    both = write_list(tmp_path / "videomae.txt", [("set/walk/0", 1, 20, 1), ("set/jump/1", 4, 10, 0)])
    assert frames_of(both) == [(0, 20, 1), (3, 13, 0)]
    write_clip(tmp_path / "a b.mp4", num_frames=12)
    lines = [("set/walk/0", 1, 20), ("a b.mp4", 0, -1), ("a b.mp4", 2, 5)]
    pretraining = write_list(tmp_path / "pretrain.txt", lines)
    assert frames_of(pretraining, labels_required=False) == [(0, 20, None), (None, None, None), (2, 7, None)]
    view = VideoViews(load_videos(pretraining, labels_required=False), SIZE, num_frames=5)[2]["pixel_values"]
    assert view.shape == (1, 5, 3, *SIZE)
    with pytest.raises(
        ValueError, match=r"pretrain\.txt:1: a count of 1; .* 'folder count label' or 'folder first count"
    ):
        load_videos(pretraining)
    few = load_videos(write_list(tmp_path / "few.txt", [("set/walk/0", 21, 1)]))
    with pytest.raises(
        VideoError, match=r"few\.txt:1: the segment 0 to 21 \(frames\) is not in the video, which has 20"
    ):
        VideoViews(few, SIZE, num_frames=4)[0]


def test_a_folder_that_is_missing_is_named(folders, tmp_path):
    with pytest.raises(ValueError, match=r"list\.txt:2 \(\S+/set/walk/9\): not a video; .* or a folder of frames"):
        load_videos(write_list(tmp_path / "list.txt", [("set/walk/0", "w"), ("set/walk/9", "w")]))


# ---------------------------------------------------------------------- commands


def test_commands_take_folders(folders, tmp_path, capsys):
    torch.manual_seed(0)
    config = tiny_config()
    model = EverestForVideoClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    processor = EverestVideoProcessor.from_config(config, frame_step=1)
    processor.save_pretrained(tmp_path / "model")
    folder = str(folders / "walk" / "0")
    pixel_values = processor(folder, return_tensors="pt")["pixel_values"]
    view = VideoViews(load_videos(folders), config.frame_size, num_frames=config.num_frames)[2]["pixel_values"]
    assert torch.equal(pixel_values, normalize(view, config.image_mean, config.image_std))
    assert cli.main(["predict", folder, "--model", str(tmp_path / "model"), "--json"]) == 0
    labels = json.loads(capsys.readouterr().out.splitlines()[-1])["labels"]
    with torch.no_grad():
        assert labels[0]["score"] == pytest.approx(float(model(pixel_values).logits.softmax(-1).max()), abs=1e-6)
    assert cli.main(["check-data", str(folders), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["readable"], report["codecs"]) == (4, {"jpeg": 4})
    assert (
        cli.main(["embed", str(folders), str(tmp_path / "out.safetensors"), "--model", str(tmp_path / "model")]) == 0
    )
    assert "values for each of 4 videos" in capsys.readouterr().out
    assert cli.main(["split", str(folders), "--val", "0.5"]) == 0
    assert len(load_videos(folders / "val.csv")) == 2
    assert cli.main(["prepare", str(folders / "val.csv"), str(tmp_path / "small")]) == 1
    assert "a folder of frames, which does not tell their rate; give --fps" in capsys.readouterr().err


def test_prepared_pictures_are_video_files(tmp_path, capsys):
    folder = write_frames(tmp_path / "in" / "count" / "1", counting_frames(30, 64, 128))
    (write_frames(tmp_path / "in" / "count" / "2", counting_frames(4)) / "img_00003.png").write_bytes(b"damaged")
    command = ["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--fps", "12.5", "--short-side", "32"]
    assert cli.main(command) == 1
    assert "count/2: cannot be decoded: img_00003.png: no picture, or a damaged one" in capsys.readouterr().err
    target = tmp_path / "out" / "count" / "1.mp4"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [target]
    info = probe(target)
    assert (info.num_frames, info.fps, info.height, info.width, info.codec) == (30, 12.5, 32, 64, "h264")
    assert [frame_number(frame) for frame in read_frames(target, range(30))] == list(range(30))

    (folder / "img_00001.png").touch()  # another time: made again; without a change: kept
    for expected in ("1 videos written, 0 there already", "0 videos written, 1 there already"):
        assert cli.main(command) == 1
        assert expected in capsys.readouterr().out
    assert cli.main([*command[:-4], "--fps", "0"]) == 1
    assert "fps is 0; it must be 1 to 1000" in capsys.readouterr().err


def test_frame_numbers_reach_the_model(frames, tmp_path):
    rows = load_videos(write_list(tmp_path / "list.txt", [("a folder", 3, 20, 0)]))
    view = VideoViews(rows, (32, 64), num_frames=5, frame_step=4)[0]["pixel_values"][0]
    assert [frame_number(frame) for frame in view.permute(0, 2, 3, 1)] == [4, 8, 12, 16, 20]  # the middle of 2 to 21
