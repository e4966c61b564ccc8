"""Moving pictures: what the panels show, and files that players open."""

import av
import numpy as np
import pytest
import torch
from helpers.tiny import tiny_config
from PIL import Image

from everest_hf.visualize.animation import (
    GAP,
    HEAT,
    TOP,
    Canvas,
    heat_map,
    kept_token_panels,
    reconstruction_panels,
    write_animation,
    write_windows,
)


@pytest.fixture
def config():
    return tiny_config()


def colourful(num_frames: int, config) -> torch.Tensor:
    """A clip uint8 (T, C, H, W) in which no pixel is grey."""
    frames = torch.randint(0, 60, (num_frames, config.num_channels, *config.frame_size), dtype=torch.uint8)
    frames[:, 0] += 150
    return frames


def is_grey(frames: torch.Tensor) -> torch.Tensor:
    return (frames[:, 0] == frames[:, 1]) & (frames[:, 1] == frames[:, 2])  # (T, H, W)


def test_kept_tokens_keep_their_colour_and_no_others(config):
    clip, ids = colourful(config.num_frames, config), torch.tensor([0, 17, 59])
    panels = kept_token_panels(clip, ids, torch.rand(config.num_tokens), config)
    assert torch.equal(panels["clip"], clip)
    coloured = ~is_grey(panels["3 of 60 tokens"])
    tubelets = coloured.unflatten(0, (-1, config.tubelet_size))  # (t, tubelet, H, W)
    patches = tubelets.unfold(2, config.patch_size, config.patch_size).unfold(3, config.patch_size, config.patch_size)
    share = patches.float().mean(dim=(1, 4, 5)).flatten()  # (N,)
    assert share.nonzero().flatten().tolist() == ids.tolist()
    assert torch.equal(share[ids], torch.ones(3))


def test_the_brightest_token_is_that_of_the_largest_score(config):
    scores = torch.zeros(config.num_tokens)
    scores[23] = 5.0
    heat = heat_map(torch.zeros(config.num_frames, 3, *config.frame_size, dtype=torch.uint8), scores, config)
    slots, rows, columns = config.grid_size
    light = (
        heat.float().mean(dim=1).view(slots, config.tubelet_size, rows, config.patch_size, columns, config.patch_size)
    )
    light = light.mean(dim=(1, 3, 5)).flatten()  # (N,)
    assert light.argmax() == 23
    assert (light > light.min() + 1).sum() == 1


def test_frames_that_were_not_selected_are_faded():
    config = tiny_config(frame_oversampling=2.0)
    clip = colourful(config.num_input_frames, config)
    slots = torch.tensor([0, 3, 4, 6])
    panels = kept_token_panels(
        clip, torch.arange(config.num_tokens), torch.rand(config.num_tokens), config, slots=slots
    )
    (kept,) = (panel for name, panel in panels.items() if name.endswith("tokens"))
    grey = is_grey(kept).flatten(1).all(dim=1).unflatten(0, (-1, config.tubelet_size))  # (c, tubelet)
    assert (~grey.all(dim=1)).nonzero().flatten().tolist() == slots.tolist()
    assert all(len(panel) == config.num_input_frames for panel in panels.values())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_reconstruction_shows_what_was_seen_and_predicted(channels):
    mean = (0.5,) * channels
    config = tiny_config(num_channels=channels, image_mean=mean, image_std=mean, norm_pix_loss=False)
    clip = torch.full((config.num_frames, channels, *config.frame_size), 90, dtype=torch.uint8)
    visible, target = torch.tensor([1, 2]), torch.tensor([30])
    predictions = torch.ones(1, config.tubelet_dim)  # white
    panels = reconstruction_panels(clip, visible, target, predictions, config)
    assert list(panels) == ["clip", "2 visible", "with 1 predicted"]
    white = (panels["with 1 predicted"] == 255).all(dim=1).sum()
    assert white == config.tubelet_size * config.patch_size**2
    assert not (panels["2 visible"] == 255).any()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_files_open_in_players(tmp_path, config, suffix):
    clip = colourful(config.num_frames, config)
    path = tmp_path / "new" / f"kept{suffix}"
    panels = kept_token_panels(clip, torch.arange(9), torch.rand(config.num_tokens), config)
    write_animation(panels, path, fps=5)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    assert len(frames) == config.num_frames
    assert rate == 5
    height, width, _ = frames[0].shape
    assert width > 3 * height / 2
    assert height % 2 == width % 2 == 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written beside it
    if suffix == ".gif":
        assert Image.open(path).info["loop"] == 0  # for ever


def test_another_suffix_is_refused(tmp_path, config):
    panels = {"clip": colourful(config.num_frames, config)}
    with pytest.raises(ValueError, match=r"kept.webp.*\.mp4, \.gif"):
        write_animation(panels, tmp_path / "kept.webp", fps=5)


def test_windows_follow_one_another(tmp_path, config):
    frames = colourful(config.num_frames, config)
    windows = [({"clip": frames}, ["first"] * config.num_frames), ({"clip": frames[5:]}, [])]
    write_windows(iter(windows), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert len(list(container.decode(video=0))) == config.num_frames + config.num_frames - 5


def test_the_scores_have_axes_and_a_scale(config):
    """The panel of the scores has ink left of it and below, and right of it all colours from the first to the last."""
    panels = kept_token_panels(
        colourful(config.num_frames, config), torch.arange(9), torch.rand(config.num_tokens), config
    )
    canvas = Canvas(panels)
    height, width = canvas.shown[::-1]
    pixels = torch.from_numpy(np.array(canvas.background)).int()  # (H, W, 3)
    left, top = canvas.lefts[-1], TOP
    assert (pixels[top : top + height, left - 40 : left - 8] < 100).any()
    assert (pixels[top + height + 8 :, left : left + width] < 100).any()
    scale = pixels[top + 2 : top + height - 2, left + width + GAP + 6].flip(0)  # (height - 4, 3)
    ends = torch.tensor(HEAT([0.0, 1.0])[:, :3]) * 255
    assert torch.stack([scale[0], scale[-1]]).float() == pytest.approx(ends, abs=20)
    assert len(scale.unique(dim=0)) > 100


@pytest.mark.parametrize("width", range(390, 394))
def test_no_size_is_rounded_to_an_odd_one(width):
    """A figure of 8.04 inches is 803.99 pixels wide, which are cut to 803."""
    canvas = Canvas(dict.fromkeys(("clip", "kept"), torch.zeros(1, 3, 8, width, dtype=torch.uint8)))
    assert canvas.background.size == canvas.size
    assert canvas.size[0] % 2 == canvas.size[1] % 2 == 0


def test_a_title_is_written_above_the_panels(config):
    panels = {"clip": colourful(1, config)}
    canvas = Canvas(panels)
    with_title, without = (np.array(canvas.compose([panels["clip"][0]], title)) for title in ("frame 7, 0.28 s", ""))
    changed = (with_title != without).any(axis=-1)
    assert changed[:TOP].any()
    assert not changed[TOP:].any()
