"""From views to videos to figures."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from videos import write_clip, write_list

from everest_hf.data import VideoViews, class_names_of, collate, load_videos
from everest_hf.evaluation import mean_loss, predict_videos


class LinearModel(nn.Module):
    """Logits and a loss that are easy to follow: the first pixels of a clip are its logits."""

    class Output(dict):
        __getattr__ = dict.__getitem__

    def forward(self, pixel_values):
        logits = pixel_values.flatten(1)[:, :3]
        return self.Output(logits=logits, loss=logits.mean())


def view(*pixels) -> torch.Tensor:
    """A clip uint8 (T, C, h, w) = (1, 1, 1, 3) with these pixels."""
    return torch.tensor(pixels, dtype=torch.uint8).view(1, 1, 1, 3)


def batch_of(*videos, first_index=0) -> dict:
    """A batch of videos, each a list of views."""
    pixel_values = torch.stack([torch.stack(views) for views in videos])  # (B, V, 1, 1, 1, 3)
    index = torch.arange(first_index, first_index + len(videos))
    return {"pixel_values": pixel_values, "labels": index % 3, "index": index}


def halve(clip: torch.Tensor) -> torch.Tensor:
    return clip.float() / 2


@pytest.fixture
def batches() -> list[dict]:
    return [
        batch_of([view(4, 0, 0), view(0, 8, 0)], [view(0, 0, 2), view(0, 0, 2)]),
        batch_of([view(6, 6, 6), view(1, 2, 3)], first_index=2),
    ]


def test_probabilities_are_the_mean_of_the_softmax_over_views(batches):
    predicted = predict_videos(LinearModel(), batches, to_pixel_values=halve)
    first = (torch.tensor([2.0, 0, 0]).softmax(0) + torch.tensor([0, 4.0, 0]).softmax(0)) / 2
    third = (torch.full((3,), 1 / 3) + torch.tensor([0.5, 1, 1.5]).softmax(0)) / 2
    torch.testing.assert_close(predicted["probabilities"][0], first)
    torch.testing.assert_close(predicted["probabilities"][1], torch.tensor([0, 0, 1.0]).softmax(0))
    torch.testing.assert_close(predicted["probabilities"][2], third)
    assert predicted["labels"].tolist() == [0, 1, 2]
    assert predicted["index"].tolist() == [0, 1, 2]
    # Not the softmax of the mean logits: that would prefer another class for the first video.
    assert predicted["probabilities"][0, 1] < torch.tensor([1.0, 2, 0]).softmax(0)[1]


def test_half_precision_logits_become_float32_probabilities(batches):
    class Half(LinearModel):
        def forward(self, pixel_values):
            return self.Output(logits=super().forward(pixel_values).logits.bfloat16())

    predicted = predict_videos(Half(), batches, to_pixel_values=halve)
    assert predicted["probabilities"].dtype == torch.float32
    torch.testing.assert_close(predicted["probabilities"].sum(dim=1), torch.ones(3))


def test_what_is_gathered_is_what_counts(batches):
    """`gather` stands for the other processes: here each one sends what this one sends, and the copies are dropped."""
    received = []

    def gather(tensors):
        received.append([len(tensor) for tensor in tensors])
        return tuple(torch.cat([tensor, tensor]) for tensor in tensors)

    predicted = predict_videos(LinearModel(), batches, to_pixel_values=halve, gather=gather)
    assert received == [[2, 2, 2], [1, 1, 1]]
    assert predicted["index"].tolist() == [0, 1, 0, 1, 2, 2]
    assert predicted["probabilities"].shape == (6, 3)


def test_loss_counts_each_video_once(batches):
    """A short last batch weighs as its number of videos."""
    loss = mean_loss(LinearModel(), batches, to_pixel_values=halve)
    by_video = [(4 + 8) / 12, (2 + 2) / 12, (18 + 6) / 12]
    assert loss == pytest.approx(sum(by_video) / 3)


def test_copies_in_the_last_batch_do_not_change_the_loss(batches):
    """Where processes get batches of one size, the last is filled up; `gather` drops what was added."""
    last = batches[1]["pixel_values"]
    filled = [batches[0], {"pixel_values": torch.cat([last, batches[0]["pixel_values"][:1]])}]
    dropped = iter([2, 1])
    loss = mean_loss(LinearModel(), filled, to_pixel_values=halve, gather=lambda losses: losses[: next(dropped)])
    assert loss == mean_loss(LinearModel(), batches, to_pixel_values=halve)


def test_evaluation_is_without_dropout_and_gradients(batches):
    class Watched(LinearModel):
        def forward(self, pixel_values):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(pixel_values)

    model = Watched().train()
    predict_videos(model, batches, to_pixel_values=halve)
    model.train()
    mean_loss(model, batches, to_pixel_values=halve)


# ------------------------------------------------------------------------------------------------------------ labels

MULTI, REGRESSION = "multi_label_classification", "regression"
SAMPLING = {"num_frames": 4, "frame_step": 1}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a.mp4", "b, c.mp4"):
        write_clip(folder / name, num_frames=6)
    return folder


def rows_of(clips, *labels, **options) -> Dataset:
    rows = zip(("a.mp4", "b, c.mp4"), labels, strict=True)
    return load_videos(write_list(clips / "list.txt", rows), **options)


def test_several_labels_a_video(clips):
    rows = rows_of(clips, "run,jump", "sit", problem_type=MULTI)
    assert class_names_of(rows) == ["jump", "run", "sit"]
    assert rows["label"][:] == [[0, 1], [2]]
    batch = collate(list(VideoViews(rows, (24, 40), **SAMPLING)))
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 0, 1]]
    assert batch["labels"].dtype == torch.float32
    held_out = rows_of(clips, "sit,run", "run", problem_type=MULTI, class_names=["jump", "run", "sit"])
    assert held_out["label"][:] == [[1, 2], [1]]


def test_several_integers_a_video(clips):
    rows = rows_of(clips, "2,0", "1", problem_type=MULTI, num_labels=4)
    assert class_names_of(rows) == ["0", "1", "2", "3"]
    assert rows["label"][:] == [[0, 2], [1]]


def test_numbers_as_labels(clips):
    rows = rows_of(clips, "1.5", "-2e-1", problem_type=REGRESSION)
    assert class_names_of(rows) is None
    batch = collate(list(VideoViews(rows, (24, 40), **SAMPLING)))
    assert torch.equal(batch["labels"], torch.tensor([1.5, -0.2]))


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        (("1.5", "high"), {"problem_type": REGRESSION}, ["list.txt:2", "'high'", "not a finite number"]),
        (("1.5", "nan"), {"problem_type": REGRESSION}, ["list.txt:2", "'nan'", "not a finite number"]),
        (("a,", "b"), {"problem_type": MULTI}, ["list.txt:1", "'a,'", "an empty name"]),
        (("a,d", "b"), {"problem_type": MULTI, "class_names": ["a", "b"]}, ["list.txt:1", "'d'", "2 known"]),
        (("0,7", "1"), {"problem_type": MULTI, "num_labels": 3}, ["list.txt:1", "(7)", "labelled 0 to 2"]),
    ],
)
def test_labels_that_are_none(clips, labels, options, words):
    with pytest.raises(ValueError) as error:
        rows_of(clips, *labels, **options)
    assert all(word in str(error.value) for word in words), error.value
