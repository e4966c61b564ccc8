"""Pictures: pixel by pixel where they show tokens, and as files."""

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_config
from PIL import Image

from everest_hf.selection_everest import patchify
from everest_hf.visualize import charts, draw_confusion, draw_curves, draw_kept_tokens, frame_titles
from everest_hf.visualize.tokens import grey_out, token_mask, unpatchify

CONFIG = tiny_config()  # 4 slots of 3 frames, 3 x 5 places of 8 x 8 pixels
FRAMES, SIZE = 12, (24, 40)


@pytest.fixture
def clip() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (FRAMES, 3, *SIZE), generator=generator, dtype=torch.uint8)


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


# -------------------------------------------------------------------------------------------------- which pixels


def test_a_token_is_its_tubelet_of_pixels():
    # Token 37 = slot 2, row 1, column 2 of a slot of 15 tokens in rows of 5.
    mask = token_mask(torch.tensor([37]), CONFIG)
    wanted = torch.zeros(FRAMES, *SIZE, dtype=torch.bool)
    wanted[6:9, 8:16, 16:24] = True
    assert torch.equal(mask, wanted)


def test_tokens_in_any_order_and_at_the_ends():
    mask = token_mask(torch.tensor([59, 0]), CONFIG)
    wanted = torch.zeros(FRAMES, *SIZE, dtype=torch.bool)
    wanted[:3, :8, :8] = True
    wanted[9:, 16:, 32:] = True
    assert torch.equal(mask, wanted)


def test_all_tokens_and_none():
    assert token_mask(torch.arange(60), CONFIG).all()
    assert not token_mask(torch.tensor([], dtype=torch.long), CONFIG).any()


def test_the_mask_agrees_with_the_model_on_what_a_token_is(clip):
    """The pixels of a token as the model cuts them are those that the mask shows."""
    for token in (0, 4, 16, 44, 59):
        shown = clip[:, 0][token_mask(torch.tensor([token]), CONFIG)]
        cut = patchify(clip[None].float(), CONFIG.tubelet_size, CONFIG.patch_size)[0, token]
        assert shown.float().tolist() == cut[: len(shown)].tolist()  # the first channel


def test_unpatchify_is_the_inverse_of_patchify(clip):
    patches = patchify(clip[None].float(), CONFIG.tubelet_size, CONFIG.patch_size)[0]
    assert torch.equal(unpatchify(patches, CONFIG), clip.float())


def test_kept_pixels_stay_and_the_others_fade_by_hand(clip):
    clip[0, :, 0, 0] = torch.tensor([30, 60, 90])  # mean 60: 60 / 4 + 170
    clip[0, :, 0, 8] = torch.tensor([255, 255, 255])
    clip[0, :, 0, 9] = 0
    kept = token_mask(torch.tensor([0]), CONFIG)
    greyed = grey_out(clip, kept)
    assert greyed.dtype == torch.uint8
    assert greyed.shape == clip.shape
    assert torch.equal(greyed[:3, :, :8, :8], clip[:3, :, :8, :8])
    assert greyed[0, :, 0, 8].tolist() == [120, 120, 120]  # a stripe, as x + y is a multiple of 4
    clip[0, :, 0, 10] = torch.tensor([255, 255, 255])
    assert grey_out(clip, kept)[0, :, 0, 10].tolist() == [233, 233, 233]
    assert greyed[0, :, 0, 9].tolist() == [170, 170, 170]
    clip[0, :, 0, 1] = torch.tensor([30, 60, 90])
    assert grey_out(clip, torch.zeros_like(kept))[0, :, 0, 1].tolist() == [185, 185, 185]
    outside = greyed.permute(0, 2, 3, 1)[~kept]  # (pixels, C)
    assert (outside == outside[:, :1]).all()  # no colour
    stripes = outside == 120
    assert stripes.float().mean() == pytest.approx(1 / 4, abs=0.02)
    assert outside[~stripes].min() >= 170


def test_dropped_tokens_show_in_a_clip_that_is_as_bright_as_faded_pixels():
    clip = torch.full((FRAMES, 3, *SIZE), 227, dtype=torch.uint8)  # 227 / 4 + 170 is 226.75
    greyed = grey_out(clip, token_mask(torch.tensor([0]), CONFIG))
    assert greyed[:3, :, :8, :8].unique().tolist() == [227]
    assert greyed[3:].unique().tolist() == [120, 226]


def test_stripes_are_wider_apart_in_large_frames():
    clip = torch.full((1, 3, 224, 224), 255, dtype=torch.uint8)
    greyed = grey_out(clip, torch.zeros(1, 224, 224, dtype=torch.bool))
    assert (greyed == 120).float().mean() == pytest.approx(1 / 8, abs=1e-3)


def test_titles_have_times_where_they_are_known():
    assert frame_titles([3, 12], [0.12, 0.4804]) == ["frame 3, 0.12 s", "frame 12, 0.48 s"]
    assert frame_titles([3], None) == ["frame 3"]


def test_grey_clips_of_one_channel():
    clip = torch.full((FRAMES, 1, *SIZE), 100, dtype=torch.uint8)
    greyed = grey_out(clip, token_mask(torch.tensor([0]), CONFIG))
    assert set(greyed.flatten().tolist()) == {100, 120, 195}


# ------------------------------------------------------------------------------------------------------- pictures


def test_the_picture_of_kept_tokens_shows_colour_where_tokens_are_kept(tmp_path):
    clip = torch.zeros(FRAMES, 3, *SIZE, dtype=torch.uint8)
    clip[:, 0] = 255  # red
    shares = []
    for count in (0, 15, 60):
        path = tmp_path / "deeper" / f"{count}.png"
        draw_kept_tokens(clip, torch.arange(count), CONFIG, path)
        red = (pixels_of(path) == (255, 0, 0)).all(-1)
        shares.append(red.sum())
    unkept, quarter, whole = shares
    assert unkept > 1000  # the clip itself, in the upper row
    assert quarter == pytest.approx(unkept * 1.25, rel=0.03)
    assert whole == pytest.approx(unkept * 2, rel=0.03)


@pytest.mark.parametrize("channels", [1, 3])
def test_clips_of_one_and_three_channels_are_drawn(tmp_path, channels):
    config = tiny_config(num_channels=channels, image_mean=(0.5,) * channels, image_std=(0.5,) * channels)
    clip = torch.randint(256, (FRAMES, channels, *SIZE), dtype=torch.uint8)
    draw_kept_tokens(clip, torch.arange(20), config, tmp_path / "tokens.png")
    assert pixels_of(tmp_path / "tokens.png").std() > 10


def test_curves_have_a_panel_for_each_run_and_for_accuracy(tmp_path):
    losses = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in range(1, 30)]
    pretrain = [*losses, {"step": 29, "val_loss": 0.1}]
    finetune = [
        *losses,
        {"step": 10, "val_loss": 1.0, "val_top1": 0.2},
        {"step": 29, "val_loss": 0.5, "val_top1": 0.9},
    ]
    widths = []
    for name, logs in {"one": {"pretrain": pretrain}, "two": {"pretrain": pretrain, "finetune": finetune}}.items():
        draw_curves(logs, tmp_path / f"{name}.png")
        pixels = pixels_of(tmp_path / f"{name}.png")
        assert (pixels < 250).any(-1).mean() > 0.01
        widths.append(pixels.shape[1])
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.1)


def test_the_legend_is_below_the_lines(tmp_path, monkeypatch):
    """However the lines go: these fill all four corners."""
    found = []
    monkeypatch.setattr(charts, "save", lambda figure, path: found.append(figure))
    log = [{"step": s, "loss": float(s % 2), "val_loss": float(s % 2)} for s in range(50)]
    draw_curves({"run": log}, tmp_path / "curves.png")
    (figure,) = found
    figure.canvas.draw()
    (axis,) = figure.axes
    legend = axis.get_legend().get_window_extent()
    assert not legend.overlaps(axis.get_window_extent())
    assert figure.bbox.containsx(legend.x0)
    assert figure.bbox.containsy(legend.y0)


@pytest.mark.filterwarnings("error")
def test_a_log_without_a_line_is_drawn(tmp_path):
    """A run may end before its first line: every log_every-th step."""
    draw_curves({"pretrain": []}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_curves_of_every_kind_of_fine_tuning_are_drawn(tmp_path):
    """A panel of scores is there for each of them, also where a correlation is negative."""
    for key in ("val_top1", "val_map", "val_pearson"):
        draw_curves({"run": [{"step": 1, "loss": 2.0}, {"step": 1, key: -0.5}]}, tmp_path / f"{key}.png")
        draw_curves({"run": [{"step": 1, "loss": 2.0}]}, tmp_path / "loss.png")
        assert pixels_of(tmp_path / f"{key}.png").shape[1] > 1.8 * pixels_of(tmp_path / "loss.png").shape[1]


# ------------------------------------------------------------------------------------------------------- confusion


def test_the_confusion_picture_shows_shares_of_the_rows(tmp_path):
    """Cells of equal shares have one colour, whatever the count; a full one is the darkest, an empty one the lightest."""
    deep, none = (8, 48, 107), (247, 251, 255)  # the ends of the map of colours
    areas = {}
    for name, counts in {"right": [[500, 0], [0, 1]], "wrong": [[0, 500], [1, 0]], "empty": [[0, 0], [0, 1]]}.items():
        draw_confusion(np.array(counts), ["a", "b"], ["a", "b"], tmp_path / f"{name}.png")
        pixels = pixels_of(tmp_path / f"{name}.png")
        areas[name] = [(pixels == colour).all(-1).sum() for colour in (deep, none)]
    assert areas["right"][0] == pytest.approx(areas["right"][1], rel=0.05)
    assert areas["wrong"] == pytest.approx(areas["right"], rel=0.05)
    assert areas["empty"][0] == pytest.approx(areas["right"][0] / 2, rel=0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("num_classes", "num_named"), [(1, 1), (30, 30), (101, 101), (400, 0)])
def test_each_class_is_named_where_there_is_room(tmp_path, num_classes, num_named):
    names = [f"class {i:03d}" for i in range(num_classes)]
    draw_confusion(np.eye(num_classes, num_classes + 1, dtype=int), names, [*names, "unreadable"], tmp_path / "a.png")
    pixels = pixels_of(tmp_path / "a.png")
    assert max(pixels.shape) < 2500
    ink = pixels.mean(axis=-1) < 160
    lines = np.lib.stride_tricks.sliding_window_view(ink, 100, axis=0).all(-1).any(0)
    edge = np.flatnonzero(lines)[0]  # the line left of the first column
    beside = ink[:, edge - 24 : edge - 9].any(axis=1)  # the last letters of the names, left of the ticks
    # Names and, of 400 classes, the numbers of some rows.
    blocks = np.count_nonzero(np.diff(beside.astype(int)) == 1)
    assert blocks == num_named if num_named else blocks < 10
