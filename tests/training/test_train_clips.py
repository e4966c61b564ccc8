"""The picture of the first training clips: what the model really sees."""

import logging

import pytest
import torch
from helpers.tiny import tiny_config
from helpers.videos import bad_files, write_class_folders, write_list
from PIL import Image

from everest_hf import EverestForPreTraining, EverestForVideoClassification
from everest_hf.data import VideoClips, load_videos
from everest_hf.training import loaders, train_clips
from everest_hf.training.recipe import load_recipe

PATH = "train_clips.png"
CLASSES = {"num_labels": 2, "id2label": {0: "left", 1: "right"}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_videos(write_class_folders(tmp_path_factory.mktemp("place") / "videos", videos_per_class=4))


@pytest.fixture
def drawn(rows, tmp_path, monkeypatch):
    """A function that draws the clips of a recipe; it returns heading, texts, strips and the size of the picture."""

    def draw(cls=EverestForVideoClassification, train=rows, config=None, **options):
        recipe = load_recipe(None, {"train": "videos", "frame_step": 1, **options})
        config = config or tiny_config(**CLASSES, problem_type="single_label_classification")
        model = cls(config)
        real, kept = train_clips.write_contact_sheet, {}

        def write(heading, clips, path, **layout):
            kept.update(heading=heading, clips=clips)
            real(heading, clips, path, **layout)

        monkeypatch.setattr(train_clips, "write_contact_sheet", write)
        before = torch.get_rng_state()
        train_clips.draw_train_clips(recipe, model, train, tmp_path / PATH)
        assert torch.equal(torch.get_rng_state(), before)
        with Image.open(tmp_path / PATH) as picture:
            return kept["heading"], kept["clips"], picture.size

    return draw


def clips_of(rows, config, **options) -> VideoClips:
    recipe = load_recipe(None, {"train": "videos", "frame_step": 1, **options})
    return VideoClips(rows, loaders.build_transform(recipe, config), **loaders.sampling_of(recipe, config))


def test_fine_tuning_shows_clips_and_labels_of_the_first_epoch(rows, drawn):
    heading, clips, size = drawn(task="finetune", erasing=0.0, label_smoothing=0.0)
    assert heading == "training clips; below each: 27 of 60 tokens kept"
    items = clips_of(rows, tiny_config(), task="finetune")
    wanted = [items[i] for i in items.order()[:6].tolist()]
    for (text, (clip, kept)), item in zip(clips, wanted, strict=True):
        label = ("left", "right")[item["labels"]]
        assert text == f"{rows[item['index']]['video'].rsplit('/', 1)[1]}: {label}"
        assert torch.equal(clip, item["pixel_values"])  # normalised and back
        assert (kept == clip).all(dim=1).sum() >= 27 * 3 * 64  # kept tokens have 3 frames of 8 x 8 pixels
    # Four frames, one a tubelet, enlarged four times; a heading and six clips of a line and two strips.
    assert size == (4 * (160 + 4) + 4, 7 * 26 + 12 * (96 + 4))


def test_erasing_and_mixing_are_seen_and_said(rows, drawn):
    _, plain, _ = drawn(task="finetune", erasing=0.0, label_smoothing=0.0)
    _, mixed, _ = drawn(task="finetune", erasing=0.9, label_smoothing=0.1, mixup=0.8)
    assert not any(torch.equal(one[1][0], other[1][0]) for one, other in zip(plain, mixed, strict=True))
    shares = [sum(float(part.split()[1]) for part in text.split(": ")[1].split(", ")) for text, _ in mixed]
    assert shares == pytest.approx([1] * 6, abs=0.011)


def test_pretraining_shows_tokens_seen_and_to_predict(drawn):
    heading, clips, _ = drawn(EverestForPreTraining, task="pretrain")
    assert heading == "training clips; below each: 9 of 60 tokens seen, 15 to predict (blue)"
    _, (clip, shown) = clips[0]
    tinted = shown == (clip // 4 + 3 * torch.tensor([30, 90, 255]).view(3, 1, 1) // 4).to(torch.uint8)
    assert tinted.all(dim=1).sum() == 15 * 3 * 64
    assert (shown == clip).all(dim=1).sum() >= 9 * 3 * 64  # dropped ones may by chance be as grey


def test_repeated_clips_and_frame_selection(drawn):
    config = tiny_config(**CLASSES, frame_oversampling=1.5, token_selection="random")
    _, clips, _ = drawn(config=config, task="finetune", num_sample=4)
    assert len(clips) == 4
    assert len({text.split(":")[0] for text, _ in clips}) == 1
    assert all(len(strip) == 12 for _, strips in clips for strip in strips)  # the frames that the model works on


def test_unreadable_videos_leave_out_the_picture(tmp_path, caplog):
    rows = load_videos(write_list(tmp_path / "bad.txt", [(bad_files(tmp_path)["text"], 0)]))
    recipe = load_recipe(None, {"train": "videos", "task": "finetune"})
    with caplog.at_level(logging.WARNING):
        train_clips.draw_train_clips(recipe, EverestForVideoClassification(tiny_config()), rows, tmp_path / PATH)
    assert "train_clips.png is not drawn" in caplog.text
    assert not (tmp_path / PATH).exists()
