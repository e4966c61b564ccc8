"""Selection of tokens, and the pixel targets, against the independent reference."""

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.called import Called
from helpers.models import LIGHT, MODELS, base, build, clips, double, embedded, mask
from helpers.tiny import tiny_config

from everest_hf import (
    EverestConfig,
    EverestForPreTraining,
    EverestForVideoClassification,
    EverestModel,
    configuration_everest,
)
from everest_hf.selection_everest import SELECTIONS

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


def ids_of(output):
    names = ("kept_ids", "visible_ids", "target_ids", "slots")
    return {name: output[name] for name in names if output.get(name) is not None}


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
    [
        {},
        {"token_selection": "compensated"},
        {"token_selection": "random"},
        {"token_selection": "tube"},
        {"frame_oversampling": 1.5},
        {"frame_oversampling": 1.5, "token_selection": "compensated"},
    ],
    ids=["motion", "compensated", "random", "tube", "frames", "compensated frames"],
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
@pytest.mark.parametrize(("selection", "oversampling"), [("motion", 1.0), ("motion", 1.5), ("compensated", 1.0)])
def test_selection_is_the_same_in_every_precision(model_class, dtype, selection, oversampling):
    model = build(model_class, token_selection=selection, frame_oversampling=oversampling)
    model = model.to(dtype).float()  # values that the dtype can hold
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
    model = build(EverestModel, token_selection=selection, **LIGHT).train()
    torch.manual_seed(0)
    kept_ids = model.embeddings(clips(model.config, 1).expand(2000, -1, -1, -1, -1)).kept_ids
    share = torch.bincount(kept_ids.flatten(), minlength=60) / 2000
    expected = reference.share(0.45, draws) / draws
    assert (share - expected).abs().max() < 4.5 * (expected * (1 - expected) / 2000) ** 0.5


def test_evaluation_draws_one_fixed_random_set_that_is_spread_out():
    kept_ids = build(EverestModel, token_selection="random")(clips(tiny_config(), 1)).kept_ids[0]
    assert len(set(kept_ids.tolist())) == 27
    assert all(2 <= ((kept_ids >= 15 * slot) & (kept_ids < 15 * slot + 15)).sum() <= 12 for slot in range(4))


# ------------------------------------------------------------------ a caller's own mask


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


# ------------------------------------------------------------------ a strategy of one's own


def order_by_stillness(scores, noise, grid):
    """Take the tokens that change least first."""
    return scores.sort(dim=-1, stable=True).indices


def test_every_selection_of_the_config_has_its_order():
    assert tuple(SELECTIONS) == configuration_everest.TOKEN_SELECTIONS
    for name, select in SELECTIONS.items():
        scores = torch.rand(2, 60)
        order = select(scores, lambda n: torch.rand(2, n), (4, 3, 5))
        assert torch.equal(order.flatten(1).sort(dim=1).values, torch.arange(60).expand(2, -1)), name


def test_a_strategy_is_a_function_and_its_name(monkeypatch):
    monkeypatch.setitem(SELECTIONS, "stillness", order_by_stillness)
    monkeypatch.setattr(
        configuration_everest, "TOKEN_SELECTIONS", (*configuration_everest.TOKEN_SELECTIONS, "stillness")
    )
    classifier = build(EverestForVideoClassification, token_selection="stillness").train()
    output = classifier(clips(), labels=torch.tensor([1, 2]), output_scores=True)
    for scores, ids in zip(output.scores, output.kept_ids, strict=True):
        dropped = torch.ones(60, dtype=torch.bool).scatter(0, ids, False)
        assert len(ids) == 27
        assert scores[ids].max() <= scores[dropped].min()
        assert (ids.diff() > 0).all()

    model = build(EverestForPreTraining, token_selection="stillness").train()
    before = model(clips(), output_scores=True)
    informative = torch.cat([before.visible_ids, before.target_ids], dim=1)
    assert (before.visible_ids.shape, before.target_ids.shape) == ((2, 9), (2, 15))
    for scores, ids in zip(before.scores, informative, strict=True):
        assert sorted(ids.tolist()) == sorted(order_by_stillness(scores[None], None, None)[0, :24].tolist())
    again = model(clips())
    assert not torch.equal(again.visible_ids, before.visible_ids)  # a draw decides which are visible
    for each, loss in ((classifier, output.loss), (model, before.loss)):
        loss.backward()
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-3)
        first = [weight.clone() for weight in each.parameters()]
        optimizer.step()
        assert not any(torch.equal(*pair) for pair in zip(first, each.parameters(), strict=True))

    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="token_selection is 'stillness'; it must be one of 'motion', 'compensated', 'random', 'tube'"
    ):
        model(clips())
