"""Selection of tokens and frames, and the pixel targets, against the independent reference."""

import functools

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.called import Called
from helpers.tiny import tiny_config

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification, EverestModel

# Odd shapes: tubelet 3, height and width that differ, one and four channels, a patch that is not a power of two.
SHAPES = {
    "rgb": {},
    "gray": {"num_channels": 1, "image_mean": [0.45], "image_std": [0.3], "image_size": (40, 16), "tubelet_size": 4},
    "four": {
        "num_channels": 4,
        "image_mean": [0.1, 0.2, 0.3, 0.4],
        "image_std": [0.5, 0.6, 0.7, 0.8],
        "image_size": (10, 25),
        "patch_size": 5,
        "num_frames": 15,
        "mask_ratio": 0.8,
    },
    "raw": {"norm_pix_loss": False, "use_mean_pooling": False, "qkv_bias": False, "hidden_act": "gelu"},
}
MODELS = (EverestModel, EverestForPreTraining, EverestForVideoClassification)


def clips(config, batch_size=2, seed=0):
    """Return normalised clips (B, T, C, H, W) in which some places move and some stand still."""
    generator = torch.Generator().manual_seed(seed)
    height, width = config.frame_size
    shape = (batch_size, config.num_input_frames, config.num_channels, height, width)
    return torch.randn(shape, generator=generator)


def build(model_class, seed=0, **overrides):
    torch.manual_seed(seed)
    model = model_class(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms too, which start at 0 and 1
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def double(x):
    return x.detach().double().numpy()


def base(model):
    return getattr(model, "everest", model)


def ids_of(output):
    names = ("kept_ids", "visible_ids", "target_ids", "slots")
    return {name: output[name] for name in names if output.get(name) is not None}


def embedded(model, clip):
    """Return the reference's tokens of one clip (T, C, H, W)."""
    config, projection = model.config, base(model).embeddings.projection
    kernel = projection.weight.reshape(
        -1, config.num_channels, config.tubelet_size, config.patch_size, config.patch_size
    )
    return reference.embed(double(clip), double(kernel), double(projection.bias))


def pair(module):
    bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
    return double(module.weight), double(bias)


def transform(x, layers, heads, config):
    activation = {"silu": reference.silu, "gelu": reference.gelu}[config.hidden_act]
    for layer in layers:
        attention = layer.attention
        parts = {
            "norm1": pair(layer.norm1),
            "query": pair(attention.query),
            "key": pair(attention.key),
            "value": pair(attention.value),
            "output": pair(attention.output),
            "norm2": pair(layer.norm2),
            "fc1": pair(layer.mlp.fc1),
            "fc2": pair(layer.mlp.fc2),
        }
        x = reference.block(x, parts, heads, config.layer_norm_eps, activation)
    return x


def encode(model, tokens, ids):
    config, encoder = model.config, base(model).encoder
    x = (tokens + reference.positions(len(tokens), config.hidden_size))[ids]
    return transform(x, encoder.layers, config.num_attention_heads, config)


# ------------------------------------------------------------------ the whole computation against the reference


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_classification_is_what_the_reference_computes(shape):
    model = build(EverestForVideoClassification, **shape)
    config, pixel_values = model.config, clips(tiny_config(**shape))
    with torch.no_grad():
        output = model(pixel_values, output_scores=True)
    for clip, scores, kept_ids, logits in zip(
        pixel_values, output.scores, output.kept_ids, output.logits, strict=True
    ):
        tokens = embedded(model, clip)
        expected = reference.scores(tokens, config.num_slots)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        expected_ids = sorted(reference.top(expected, reference.share(config.keep_ratio, len(tokens))))
        assert kept_ids.tolist() == expected_ids
        x = encode(model, tokens, expected_ids)
        if config.use_mean_pooling:
            pooled = reference.layer_norm(x.mean(axis=0, keepdims=True), *pair(model.fc_norm), 2e-5)
        else:
            pooled = reference.layer_norm(x[:1], *pair(model.everest.layernorm), 1e-5)
        weight, bias = pair(model.classifier)
        np.testing.assert_allclose(logits, (pooled @ weight.T + bias)[0], atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pretraining_is_what_the_reference_computes(shape):
    model = build(EverestForPreTraining, **shape)
    config, pixel_values = model.config, clips(tiny_config(**shape))
    noise = torch.rand(2, config.num_informative_tokens, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(pixel_values, noise=noise, output_scores=True)
    losses = []
    for i, clip in enumerate(pixel_values):
        tokens = embedded(model, clip)
        informative = reference.top(
            reference.scores(tokens, config.num_slots), reference.share(config.pretraining_keep_ratio, len(tokens))
        )
        visible, targets = reference.split(informative, noise[i].tolist(), config.num_visible_tokens)
        assert output.visible_ids[i].tolist() == visible
        assert output.target_ids[i].tolist() == targets

        encoded = reference.layer_norm(encode(model, tokens, visible), *pair(model.everest.layernorm), 1e-5)
        decoder = model.decoder
        table = reference.positions(len(tokens), config.decoder_hidden_size)
        x = np.concatenate(
            [
                encoded @ double(decoder.projection.weight).T + table[visible],
                double(decoder.mask_token)[0] + table[targets],
            ]
        )
        x = transform(x, decoder.layers, config.decoder_num_attention_heads, config)[len(visible) :]
        weight, bias = pair(decoder.head)
        predicted = reference.layer_norm(x, *pair(decoder.norm), 2e-5) @ weight.T + bias
        np.testing.assert_allclose(output.logits[i], predicted, atol=5e-5)

        pixels = [
            reference.pixel_target(
                double(clip),
                token,
                config.tubelet_size,
                config.patch_size,
                config.image_mean,
                config.image_std,
                config.norm_pix_loss,
            )
            for token in targets
        ]
        losses.append(((predicted - np.array(pixels)) ** 2).mean())
    assert output.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    # The reference's share of visible tokens is taken on the mask ratio as it is written.
    assert config.num_visible_tokens == reference.share(round(1 - config.mask_ratio, 6), config.num_tokens)


def test_the_released_sizes_keep_the_published_numbers_of_tokens():
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 1,
        "decoder_intermediate_size": 8,
    }
    config = EverestConfig(**sizes)
    pixel_values = clips(config, batch_size=1)
    with torch.no_grad():
        assert EverestModel(config).eval()(pixel_values).kept_ids.shape == (1, 940)
        output = EverestForPreTraining(config).eval()(pixel_values)
    assert output.visible_ids.shape == (1, 156)
    assert output.target_ids.shape == (1, 314)
    assert output.logits.shape == (1, 314, 2 * 16 * 16 * 3)


# ------------------------------------------------------------------ ties


def test_a_still_clip_keeps_the_first_tokens():
    for overrides in ({}, {"hidden_size": 36}, {"image_size": (24, 56), "num_frames": 21}):
        model = build(EverestModel, **overrides)
        pixel_values = clips(model.config, batch_size=3)[:, :1].expand(-1, model.config.num_frames, -1, -1, -1)
        with torch.no_grad():
            output = model(pixel_values, output_scores=True)
        assert output.scores.max() == 0
        expected = torch.arange(model.config.num_kept_tokens())
        assert torch.equal(output.kept_ids, expected.expand_as(output.kept_ids))


def test_slot_0_scores_as_slot_1_and_comes_first():
    model = build(EverestModel, keep_ratio=0.35)  # 21 tokens: the last is one of a tied pair
    pixel_values = clips(model.config)
    pixel_values[:, 6:] = pixel_values[:, 3:6].repeat(1, 2, 1, 1, 1)  # nothing moves after slot 1
    with torch.no_grad():
        output = model(pixel_values, output_scores=True)
    scores = output.scores.unflatten(1, (4, 15))
    assert torch.equal(scores[:, 0], scores[:, 1])
    assert scores[:, 2:].max() == 0
    for row, ids in zip(output.scores, output.kept_ids, strict=True):
        assert ids.tolist() == sorted(reference.top(row.tolist(), 21))
        assert (ids < 15).sum() == 11  # of the pairs cut in half the token of slot 0 stays
        assert (ids >= 15).sum() == 10


def test_partly_still_clips_break_their_ties_by_the_lower_id():
    model = build(EverestModel, keep_ratio=0.75)
    pixel_values = clips(model.config, batch_size=5)
    pixel_values[:, :, :, :, 16:] = pixel_values[:, :1, :, :, 16:]  # three of five columns stand still
    with torch.no_grad():
        output = model(pixel_values, output_scores=True)
    still = (torch.arange(60) % 5 >= 2).expand(5, -1)
    assert output.scores[still].max() == 0
    for row, ids in zip(output.scores, output.kept_ids, strict=True):
        assert ids.tolist() == sorted(reference.top(row.tolist(), 45))


# ------------------------------------------------------------------ nothing but the clip decides


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"token_selection": "random"}, {"token_selection": "tube"}, {"frame_oversampling": 1.5}],
    ids=["motion", "random", "tube", "frames"],
)
def test_batch_mates_do_not_matter(model_class, overrides):
    model = build(model_class, **overrides)
    pixel_values = clips(model.config, batch_size=5)
    pixel_values[:, :, :, :8] = pixel_values[:, :1, :, :8]  # exact ties must hold as well
    with torch.no_grad():
        together = model(pixel_values)
        for row in range(5):
            alone = model(pixel_values[row : row + 1])
            for name, ids in ids_of(alone).items():
                assert torch.equal(ids[0], together[name][row])
            logits = "logits" if "logits" in alone else "last_hidden_state"
            torch.testing.assert_close(alone[logits][0], together[logits][row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("oversampling", [1.0, 1.5])
def test_selection_is_the_same_in_every_precision(model_class, dtype, oversampling):
    model = build(model_class, frame_oversampling=oversampling).to(dtype).float()  # values that the dtype can hold
    pixel_values = clips(model.config).to(dtype)
    pixel_values[:, :, :, :8] = pixel_values[:, :1, :, :8]
    expected = ids_of(model(pixel_values.float()))
    outputs = {"half": model.to(dtype)(pixel_values), "mixed": model(pixel_values.float())}
    model = model.float()
    for grad in (True, False):
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
            outputs[f"autocast, grad {grad}"] = model(pixel_values.float(), output_scores=True)
    assert outputs["autocast, grad True"].scores.dtype == torch.float32
    for name, output in outputs.items():
        for key, ids in expected.items():
            assert torch.equal(output[key], ids), (name, key)


def test_gradients_on_or_off_give_the_same_result():
    for model_class in MODELS:
        model = build(model_class)
        pixel_values = clips(model.config)
        with torch.no_grad():
            without = model(pixel_values)
        result = model(pixel_values)
        for name, ids in ids_of(without).items():
            assert torch.equal(ids, result[name])
        key = "logits" if "logits" in result else "last_hidden_state"
        torch.testing.assert_close(result[key], without[key], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ keep ratio


def test_a_keep_ratio_at_call_time_equals_a_config_with_it():
    model = build(EverestForVideoClassification)
    pixel_values = clips(model.config)
    for keep_ratio in (0.1, 0.3, 0.6, 0.95, 1, 1.0):
        other = EverestForVideoClassification(tiny_config(keep_ratio=keep_ratio)).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            called, configured = model(pixel_values, keep_ratio=keep_ratio), other(pixel_values)
        assert called.kept_ids.shape[1] == reference.share(keep_ratio, 60)
        assert torch.equal(called.kept_ids, configured.kept_ids)
        assert torch.equal(called.logits, configured.logits)
    assert model.config.keep_ratio == 0.45


@pytest.mark.parametrize("grad", [True, False])
def test_keep_ratio_1_is_dense_and_selects_nothing(grad):
    model = build(EverestForVideoClassification)
    pixel_values = clips(model.config)
    with torch.set_grad_enabled(grad), Called() as dense:
        output = model(pixel_values, keep_ratio=1)
    assert torch.equal(output.kept_ids, torch.arange(60).expand(2, -1))
    selecting = {"sort", "topk", "argsort", "linalg_vector_norm", "diff", "gather", "scatter_add"}
    assert selecting.isdisjoint(dense.names)
    assert dense.names.count("addmm") + dense.names.count("linear") + dense.names.count("mm") == (
        1 + 2 * 6 + 1  # one projection, six linear maps a layer, the head
    )
    with torch.set_grad_enabled(grad), Called() as sparse:
        model(pixel_values)
    assert selecting & set(sparse.names)


# ------------------------------------------------------------------ baselines


@pytest.mark.parametrize("selection", ["random", "tube"])
def test_baselines_follow_the_callers_noise(selection):
    model = build(EverestModel, token_selection=selection)
    count = 60 if selection == "random" else 15
    noise = torch.rand(2, count, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        kept_ids = model(clips(model.config), noise=noise).kept_ids
    for ids, row in zip(kept_ids.tolist(), noise.tolist(), strict=True):
        order = sorted(range(count), key=lambda i: row[i])
        if selection == "random":
            assert ids == sorted(order[:27])
        else:
            places = sorted(order[: reference.share(0.45, 15)])
            assert ids == [slot * 15 + place for slot in range(4) for place in places]


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


@pytest.mark.parametrize("selection", ["random", "tube"])
def test_baselines_are_drawn_in_training_and_fixed_in_evaluation(selection):
    model = build(EverestModel, token_selection=selection)
    pixel_values = clips(model.config)[:1].repeat(3, 1, 1, 1, 1)
    evaluated = model(pixel_values).kept_ids
    assert torch.equal(evaluated, model(clips(model.config, 3, seed=5)).kept_ids)
    assert torch.equal(evaluated[0], evaluated[1])
    model.train()
    draws = torch.cat([model(pixel_values).kept_ids for _ in range(4)])
    assert len({tuple(row) for row in draws.tolist()}) > 6


@pytest.mark.parametrize(("selection", "draws"), [("random", 60), ("tube", 15)])
def test_every_token_is_drawn_alike(selection, draws):
    model = build(EverestModel, token_selection=selection, patch_size=4, image_size=(12, 20)).train()
    torch.manual_seed(0)
    kept_ids = model.embeddings(clips(model.config, 1).expand(2000, -1, -1, -1, -1)).kept_ids
    share = torch.bincount(kept_ids.flatten(), minlength=60) / 2000
    expected = reference.share(0.45, draws) / draws
    assert (share - expected).abs().max() < 4.5 * (expected * (1 - expected) / 2000) ** 0.5


def test_evaluation_draws_one_fixed_random_set_that_is_spread_out():
    kept_ids = build(EverestModel, token_selection="random")(clips(tiny_config(), 1)).kept_ids[0]
    assert len(set(kept_ids.tolist())) == 27
    assert all(2 <= ((kept_ids >= 15 * slot) & (kept_ids < 15 * slot + 15)).sum() <= 12 for slot in range(4))


def test_motion_pretraining_draws_which_tokens_are_visible():
    model = build(EverestForPreTraining).train()
    pixel_values = clips(model.config, 1).expand(400, -1, -1, -1, -1)
    torch.manual_seed(0)
    output = model.everest.embeddings(pixel_values, pretraining=True)
    both = torch.cat([output.kept_ids, output.target_ids], dim=1).sort(dim=1).values
    assert torch.equal(both, both[:1].expand_as(both))  # the informative ids are no matter of luck
    share = torch.bincount(output.kept_ids.flatten(), minlength=60)[both[0]] / 400
    assert (share - 9 / 24).abs().max() < 4.5 * (9 / 24 * 15 / 24 / 400) ** 0.5


# ------------------------------------------------------------------ a caller's own mask


def mask(masked, rows=2, seed=0):
    order = torch.rand(rows, 60, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < masked


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_a_callers_mask_replaces_the_selection(dtype):
    bool_masked_pos = mask(41)
    expected = [[i for i in range(60) if not row[i]] for row in bool_masked_pos.tolist()]
    dropped = [[i for i in range(60) if row[i]] for row in bool_masked_pos.tolist()]
    for model_class in MODELS:
        model = build(model_class)
        output = model(clips(model.config), bool_masked_pos=bool_masked_pos.to(dtype))
        if model_class is EverestForPreTraining:
            assert output.visible_ids.tolist() == expected
            assert output.target_ids.tolist() == dropped
            assert output.logits.shape[1] == 41
        else:
            assert output.kept_ids.tolist() == expected


def test_a_mask_of_the_selected_tokens_gives_the_same_logits():
    model = build(EverestForVideoClassification)
    pixel_values = clips(model.config)
    expected = model(pixel_values)
    bool_masked_pos = torch.ones(2, 60, dtype=torch.bool).scatter(1, expected.kept_ids, False)
    output = model(pixel_values, bool_masked_pos=bool_masked_pos)
    assert torch.equal(output.logits, expected.logits)


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


# ------------------------------------------------------------------ frame selection


def frame_clip(strengths, config, batch_size=1, seed=0):
    """Return a clip (B, T, C, H, W) in which about `strengths` places of each candidate slot change."""
    pixel_values = clips(config, batch_size, seed)[:, :1].repeat(1, config.num_input_frames, 1, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    _, rows, columns = config.grid_size
    side = config.patch_size
    for slot, strength in enumerate(strengths):
        for place in torch.randperm(rows * columns, generator=generator)[:strength].tolist():
            top, left = place // columns * side, place % columns * side
            block = pixel_values[:, slot * config.tubelet_size :, :, top : top + side, left : left + side]
            block += torch.randn(batch_size, 1, config.num_channels, side, side, generator=generator)
    return pixel_values


FRAMES = {"frame_oversampling": 1.5}  # 18 frames, 6 candidate slots, of which 4 are chosen


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_evaluation_takes_the_slots_with_most_informative_tokens(model_class, seed):
    model = build(model_class, **FRAMES)
    pixel_values = clips(model.config, batch_size=3, seed=seed)
    ratio = model.config.pretraining_keep_ratio if model_class is EverestForPreTraining else model.config.keep_ratio
    with torch.no_grad():
        slots = model(pixel_values).slots
    for clip, chosen in zip(pixel_values, slots.tolist(), strict=True):
        counts = reference.informative_per_slot(embedded(model, clip), 6, ratio)
        assert sum(counts) == reference.share(ratio, 90)
        assert chosen == reference.choose_slots(counts, 4)


def test_still_slots_are_left_out_and_ties_go_to_the_earlier():
    model = build(EverestModel, keep_ratio=0.4, **FRAMES)
    pixel_values = frame_clip([0, 0, 12, 0, 12, 12], model.config, batch_size=2)
    output = model(pixel_values)
    assert output.slots.tolist() == [[0, 2, 4, 5]] * 2
    still = frame_clip([0] * 6, model.config)
    assert model(still).slots.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("overrides", [{}, {"token_selection": "random"}, {"token_selection": "tube"}], ids=str)
def test_frame_selection_equals_a_plain_model_on_the_chosen_frames(model_class, overrides):
    model = build(model_class, **FRAMES, **overrides)
    plain = model_class(tiny_config(**overrides)).eval()
    plain.load_state_dict(model.state_dict())
    pixel_values = clips(model.config, batch_size=3)
    with torch.no_grad():
        output = model(pixel_values, output_scores=True)
        frames = torch.stack(
            [
                clip.unflatten(0, (6, 3))[slots].flatten(0, 1)
                for clip, slots in zip(pixel_values, output.slots, strict=True)
            ]
        )
        expected = plain(frames, output_scores=True)
    assert len(set(map(tuple, output.slots.tolist()))) > 1
    assert expected.slots is None
    for name in expected:
        if name != "loss":
            assert torch.equal(output[name], expected[name]), name
    if "loss" in expected:
        torch.testing.assert_close(output.loss, expected.loss)


def test_a_keep_ratio_at_call_time_moves_no_slot():
    model = build(EverestModel, **FRAMES)
    pixel_values = clips(model.config)
    expected = model(pixel_values)
    for keep_ratio in (0.1, 0.8, 1):
        output = model(pixel_values, keep_ratio=keep_ratio)
        assert torch.equal(output.slots, expected.slots)
        assert output.kept_ids.shape[1] == reference.share(keep_ratio, 60)


@pytest.mark.parametrize("pretraining", [False, True])
def test_training_draws_slots_with_the_right_probabilities(pretraining):
    sizes = {"patch_size": 4, "image_size": (12, 20)}
    model = build(EverestModel, **FRAMES, **sizes).train()
    pixel_values = frame_clip([3, 2, 14, 5, 9, 7], model.config)
    ratio = model.config.pretraining_keep_ratio if pretraining else model.config.keep_ratio
    counts = reference.informative_per_slot(embedded(model, pixel_values[0]), 6, ratio)
    expected = reference.inclusion_probabilities(counts, 4)
    assert expected.max() - expected.min() > 0.2  # or the test could not fail
    torch.manual_seed(0)
    draws = 6000
    slots = model.embeddings(pixel_values.expand(draws, -1, -1, -1, -1), pretraining=pretraining).slots
    assert (slots.diff(dim=1) > 0).all()  # in time order, none twice
    share = torch.bincount(slots.flatten(), minlength=6).double().numpy() / draws
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(share - expected) <= 4 * error + 1e-9).all(), (share, expected)


def test_frame_noise_decides_the_draw():
    model = build(EverestModel, **FRAMES)
    pixel_values = clips(model.config)
    noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    first = model(pixel_values, frame_noise=noise).slots
    assert torch.equal(first, model.train()(pixel_values, frame_noise=noise).slots)
    others = [model(pixel_values, frame_noise=torch.rand(2, 6)).slots for _ in range(8)]
    assert any(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("value", [0.0, 1.0 - 2**-24, 1.0])
def test_frame_noise_at_its_ends_still_gives_distinct_slots(value):
    model = build(EverestModel, **FRAMES)
    slots = model(clips(model.config), frame_noise=torch.full((2, 6), value)).slots
    assert (slots.diff(dim=1) > 0).all()


def test_without_oversampling_no_frame_is_selected():
    for oversampling in (1.0, 1.2):  # 1.2 of 12 frames are 14, rounded down to 12
        model = build(EverestModel, frame_oversampling=oversampling)
        assert model(clips(model.config)).slots is None


# ------------------------------------------------------------------ bad input


def refused(match, model, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        model(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_class", MODELS)
def test_clips_that_do_not_fit_are_refused(model_class):
    model = build(model_class)
    call = functools.partial(refused, model=model)
    call(r"frames 11.*expected 12", pixel_values=torch.rand(2, 11, 3, 24, 40))
    call(r"frames 24.*expected 12", pixel_values=torch.rand(2, 24, 3, 24, 40))
    call(r"\(40, 24\).*\(24, 40\)", pixel_values=torch.rand(2, 12, 3, 40, 24))
    call(r"1 channels.*num_channels=3", pixel_values=torch.rand(2, 12, 1, 24, 40))
    # Channels before frames, as in (B, C, T, H, W).
    call(r"12 channels.*num_channels=3", pixel_values=torch.rand(2, 3, 12, 24, 40))
    call(r"\(12, 3, 24, 40\).*five", pixel_values=torch.rand(12, 3, 24, 40))
    call(r"uint8.*float", pixel_values=torch.zeros(2, 12, 3, 24, 40, dtype=torch.uint8))
    call(r"int64.*float", pixel_values=torch.zeros(2, 12, 3, 24, 40, dtype=torch.int64))


@pytest.mark.parametrize("model_class", MODELS)
def test_frame_selection_wants_all_candidates(model_class):
    refused(r"frames 12.*expected 18", build(model_class, **FRAMES), torch.rand(2, 12, 3, 24, 40))


@pytest.mark.parametrize("model_class", MODELS)
def test_other_sizes_are_checked_too(model_class):
    call = functools.partial(refused, model=build(model_class), interpolate_pos_encoding=True)
    call(r"frames 13.*multiple of 3", pixel_values=torch.rand(1, 13, 3, 24, 40))
    call(r"height 28.*multiple of 8", pixel_values=torch.rand(1, 12, 3, 28, 40))
    call(r"width 42.*multiple of 8", pixel_values=torch.rand(1, 12, 3, 24, 42))
    call(r"frames 3", pixel_values=torch.rand(1, 3, 3, 24, 40))  # one slot: no motion
    call(r"frames 0", pixel_values=torch.rand(1, 0, 3, 24, 40))
    call(r"width 0", pixel_values=torch.rand(1, 12, 3, 24, 0))


def test_a_grid_too_small_for_the_ratios_is_refused():
    small = torch.rand(1, 6, 3, 8, 8)  # two tokens
    refused("mask_ratio", build(EverestForPreTraining), small, interpolate_pos_encoding=True)
    refused("keep_ratio", build(EverestModel), small, interpolate_pos_encoding=True)
    no_target = build(EverestForPreTraining, mask_ratio=0.5, pretraining_keep_ratio=0.6)
    refused("pretraining_keep_ratio", no_target, small, interpolate_pos_encoding=True)


@pytest.mark.parametrize("model_class", MODELS)
def test_masks_that_do_not_fit_are_refused(model_class):
    model = build(model_class)
    pixel_values = clips(model.config)
    uneven = mask(41)
    uneven[0, uneven[0].nonzero()[0]] = False
    refused(r"\[40, 41\].*same number", model, pixel_values, bool_masked_pos=uneven)
    refused(r"\(2, 59\).*\(2, 60\)", model, pixel_values, bool_masked_pos=mask(41)[:, 1:])
    refused(r"\(1, 60\).*\(2, 60\)", model, pixel_values, bool_masked_pos=mask(41)[:1])
    refused("at least one", model, pixel_values, bool_masked_pos=torch.ones(2, 60, dtype=torch.bool))


def test_noise_that_does_not_fit_is_refused():
    pixel_values = clips(tiny_config())
    for selection, count in (("motion", 24), ("random", 60), ("tube", 15)):
        model = build(EverestForPreTraining, token_selection=selection)
        refused(rf"noise.*\(2, 7\).*\(2, {count}\)", model, pixel_values, noise=torch.rand(2, 7))
        refused(rf"noise.*\(1, {count}\).*\(2, {count}\)", model, pixel_values, noise=torch.rand(1, count))
    for selection, count in (("random", 60), ("tube", 15)):
        model = build(EverestForVideoClassification, token_selection=selection)
        refused(rf"noise.*\(2, 7\).*\(2, {count}\)", model, pixel_values, noise=torch.rand(2, 7))
    model = build(EverestModel, **FRAMES)
    for shape in ((1, 6), (2, 5)):
        refused(r"frame_noise.*\(2, 6\)", model, clips(model.config), frame_noise=torch.rand(shape))


@pytest.mark.parametrize("keep_ratio", [0, -0.1, 1.1, float("nan"), "0.5", True])
def test_an_impossible_keep_ratio_is_refused(keep_ratio):
    for model_class in (EverestModel, EverestForVideoClassification):
        refused(f"keep_ratio.*{keep_ratio}", build(model_class), clips(tiny_config()), keep_ratio=keep_ratio)


def test_a_keep_ratio_that_keeps_nothing_is_refused():
    refused("keep_ratio.*0.016", build(EverestModel), clips(tiny_config()), keep_ratio=0.016)
