"""From views to videos to figures."""

import pytest
import torch
from torch import nn

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
