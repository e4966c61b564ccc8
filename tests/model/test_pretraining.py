"""Pre-training: which tokens are visible, which are targets, and the loss on their pixels."""

import pytest
import torch
from helpers import reference
from helpers.models import LIGHT, build, clips, mask

from everest_hf import EverestForPreTraining


def test_pretraining_leaves_the_loss_out_where_not_wanted():
    model = build(EverestForPreTraining)
    output = model(clips(), return_loss=False)
    assert output.loss is None
    assert torch.equal(output.logits, model(clips()).logits)


def test_norm_pix_loss_of_a_flat_tubelet_is_finite():
    model = build(EverestForPreTraining)
    output = model(torch.zeros(2, 12, 3, 24, 40))
    torch.testing.assert_close(output.loss, output.logits.square().mean())  # a flat tubelet's target is 0


@pytest.mark.parametrize("selection", ["random", "tube"])
def test_pretraining_baselines_part_visible_and_targets(selection):
    model = build(EverestForPreTraining, token_selection=selection)
    count = 60 if selection == "random" else 15
    noise = torch.rand(2, count, generator=torch.Generator().manual_seed(3))
    output = model(clips(model.config), noise=noise)
    for visible, targets, row in zip(
        output.visible_ids.tolist(), output.target_ids.tolist(), noise.tolist(), strict=True
    ):
        order = sorted(range(count), key=lambda i: row[i])
        if selection == "random":
            assert (visible, targets) == (order[:9], order[9:24])
        else:
            seen, wanted = order[: reference.share(0.15, 15)], order[reference.share(0.15, 15) : 6]
            assert visible == [slot * 15 + place for slot in range(4) for place in seen]
            assert targets == [slot * 15 + place for slot in range(4) for place in wanted]


def test_motion_pretraining_draws_which_tokens_are_visible():
    model = build(EverestForPreTraining, **LIGHT).train()
    pixel_values = clips(model.config, 1).expand(400, -1, -1, -1, -1)
    torch.manual_seed(0)
    output = model.everest.embeddings(pixel_values, pretraining=True)
    both = torch.cat([output.kept_ids, output.target_ids], dim=1).sort(dim=1).values
    assert torch.equal(both, both[:1].expand_as(both))  # the informative ids are no matter of luck
    share = torch.bincount(output.kept_ids.flatten(), minlength=60)[both[0]] / 400
    assert (share - 9 / 24).abs().max() < 4.5 * (9 / 24 * 15 / 24 / 400) ** 0.5


def test_masked_pixels_do_not_reach_the_encoder_and_unmasked_ones_cost_nothing():
    model = build(EverestForPreTraining)
    pixel_values, bool_masked_pos = clips(model.config), mask(41)
    output = model(pixel_values, bool_masked_pos=bool_masked_pos)
    pixels = bool_masked_pos.reshape(2, 4, 3, 5).repeat_interleave(3, 1).repeat_interleave(8, 2)
    pixels = pixels.repeat_interleave(8, 3)[:, :, None].expand_as(pixel_values)
    changed = torch.where(pixels, pixel_values + torch.randn_like(pixel_values), pixel_values)
    again = model(changed, bool_masked_pos=bool_masked_pos)
    assert torch.equal(again.logits, output.logits)
    assert again.loss != output.loss


def test_pixels_outside_the_informative_tokens_never_cost_anything():
    model = build(EverestForPreTraining)
    pixel_values = clips(model.config)
    pixel_values[..., 16:] *= 1e-3  # two of five columns move, 24 tokens; the others hardly
    output = model(pixel_values, output_scores=True)
    informative = torch.cat([output.visible_ids, output.target_ids], dim=1)
    changed = pixel_values.clone().unflatten(1, (4, 3)).unflatten(3 + 1, (3, 8)).unflatten(-1, (5, 8))
    for clip, ids in zip(changed, informative, strict=True):
        for token in set(range(60)) - set(ids.tolist()):
            slot, place = divmod(token, 15)
            clip[slot, :, :, place // 5, :, place % 5] *= 0.5
    again = model(changed.reshape(pixel_values.shape))
    assert torch.equal(again.target_ids, output.target_ids)
    assert torch.equal(again.loss, output.loss)
