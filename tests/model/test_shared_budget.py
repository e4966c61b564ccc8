"""A budget of tokens for the batch: which tokens a clip gets, and that it gets nothing else from its neighbours."""

import pytest
import torch
from helpers import reference
from helpers.models import ATTENTIVE, BATCH, build, calibrated, clips, double, main
from helpers.tiny import tiny_config
from torch.nn import functional as F
from transformers import AttentionInterface

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestModel, attention_everest
from everest_hf.attention_everest import attend_one_by_one
from everest_hf.evaluation.threshold import find_threshold, score_tokens
from everest_hf.inference import feature_function, tokens_to_grid
from everest_hf.modeling_everest import EverestDropPath
from everest_hf.packing_everest import Packing, choose_above, choose_of_batch, threshold_of

BOUNDS = (6, 54)
# What makes features of tokens, in all ways.
POOLING = {
    "mean": {},
    "dropout": {"hidden_dropout_prob": 1e-9},  # which the mean comes after
    "first": {"use_mean_pooling": False},
    "attentive": ATTENTIVE,
}


def unequal_clips(batch_size=4, seed=0):
    """Return clips of which one stands still, one changes a little, and the rest much, in some places more."""
    pixel_values = clips(batch_size=batch_size, seed=seed)
    pixel_values[0] = pixel_values[0, :1]
    pixel_values[1] = pixel_values[1, :1] + 0.05 * pixel_values[1]
    pixel_values[2, :, :, :8] *= 3
    return pixel_values


def ready(model_class, **overrides):
    """Return a tiny model in evaluation mode with a threshold for clips like `unequal_clips`."""
    return calibrated(build(model_class, **BATCH, **overrides), unequal_clips(8, seed=1))


def parts(output, name):
    """Return what an output has of each clip under a name."""
    if "packing" not in output:
        return [ids[ids >= 0] for ids in output[name]]
    return output.packing.split(output[name])


def counts_of(output):
    """Return how many tokens each clip has, (B,)."""
    return output.packing.counts if "packing" in output else (output.kept_ids >= 0).sum(dim=1)


def loss_of(output):
    """Return a sum with a different slope for each number of what a model is there for."""
    x = main(output)
    return (x * torch.linspace(-1, 1, x.shape[-1])).square().sum()


def slopes(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_close(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, slope in found.items():
        torch.testing.assert_close(slope, expected[name], atol=1e-5 * float(expected[name].abs().max()), rtol=0)


# ------------------------------------------------------------------ which tokens


@pytest.mark.parametrize("seed", range(5))
def test_the_batch_takes_the_highest_scores_within_bounds(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 12, generator=generator) * torch.tensor([0.0, 0.1, 0.5, 1.0, 4.0])[:, None]
    ids, packing = choose_of_batch(scores, total=20, least=2, most=9)
    expected = reference.shared(double(scores).tolist(), 20, 2, 9)
    assert packing.counts.tolist() == expected
    for clip, own in enumerate(packing.split(ids)):
        assert (own // 12 == clip).all()
        assert (own % 12).tolist() == sorted(scores[clip].argsort(descending=True, stable=True)[: len(own)].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_evaluation_takes_what_is_above_the_threshold_within_bounds(seed):
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(seed))
    scores[0], scores[1] = 0, 2
    _, packing = choose_above(scores, 0.6, least=2, most=9)
    assert packing.counts.tolist() == reference.above(double(scores).tolist(), 0.6, 2, 9)


@pytest.mark.parametrize("model_class", [EverestModel, EverestForVideoClassification])
def test_a_still_clip_has_the_least_and_one_in_which_all_moves_the_most(model_class):
    for model in (ready(model_class), build(model_class, **BATCH).train()):
        pixel_values = unequal_clips(6)
        pixel_values[3] *= 20
        counts = counts_of(model(pixel_values)).tolist()
        assert (counts[0], counts[3]) == BOUNDS
        assert model.training is (sum(counts) == 6 * 27)


def test_a_panning_clip_has_the_most_and_with_the_camera_taken_off_few():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 24, 40 + 12, generator=generator)
    panning = torch.stack([wide[..., x : x + 40] for x in range(12)])  # (12, 3, 24, 40)
    others = 0.2 * clips(batch_size=5) + clips(batch_size=5, seed=1)[:, :1]  # which change less
    counts = {}
    for selection in ("motion", "compensated"):
        model = build(EverestModel, token_selection=selection, **BATCH).train()
        counts[selection] = model(torch.cat([panning[None], others])).packing.counts.tolist()
    assert counts["motion"][0] == BOUNDS[1]
    assert counts["compensated"][0] < 27 < BOUNDS[1]


@pytest.mark.parametrize("training", [True, False])
def test_pretraining_keeps_the_same_share_of_every_clip(training):
    ours, fixed = build(EverestForPreTraining, **BATCH), build(EverestForPreTraining)
    noise = torch.rand(4, 24)
    found, expected = (model.train(training)(unequal_clips(), noise=noise) for model in (ours, fixed))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.visible_ids, expected.visible_ids)


def test_a_keep_ratio_of_a_call_is_that_of_every_clip_in_evaluation():
    ours, fixed = ready(EverestForVideoClassification), build(EverestForVideoClassification)
    for ratio in (0.3, 1.0):
        with torch.no_grad():
            found, expected = ours(unequal_clips(), keep_ratio=ratio), fixed(unequal_clips(), keep_ratio=ratio)
        assert torch.equal(found.kept_ids, expected.kept_ids)
        assert torch.equal(found.logits, expected.logits)


def test_frame_selection_works_with_a_budget_for_the_batch():
    model = build(EverestForVideoClassification, frame_oversampling=1.5, **BATCH).train()
    output = model(clips(model.config, batch_size=3), labels=torch.tensor([0, 1, 2]))
    assert output.slots.shape == (3, 4)
    assert counts_of(output).sum() == 3 * 27
    output.loss.backward()


# ------------------------------------------------------------------ the threshold


@pytest.mark.parametrize("selection", ["motion", "compensated"])
def test_the_threshold_keeps_the_share_on_the_average(selection):
    model = build(EverestModel, token_selection=selection, **BATCH)
    pixel_values = clips(batch_size=16) * torch.rand(16, 1, 1, 1, 1)
    scores = score_tokens(model, pixel_values)
    assert torch.equal(scores, model(pixel_values, keep_ratio=0.5, output_scores=True).scores)
    model.config.keep_threshold = find_threshold(model.config, scores)
    counts = model(pixel_values).packing.counts
    assert abs(int(counts.sum()) - 16 * 27) <= 16  # slots 0 and 1 tie
    assert counts.min() < 27 < counts.max()


def test_the_threshold_counts_in_median_scores():
    config, scores = tiny_config(**BATCH), torch.rand(8, 60)
    found, twice = (find_threshold(config, factor * scores) for factor in (1, 2))
    assert found["keep_ratio"] == 0.45
    assert twice["medians"] == pytest.approx(found["medians"])
    assert twice["median_score"] == pytest.approx(2 * found["median_score"])
    assert found["median_score"] == scores.median()
    still = torch.cat([scores, torch.zeros(8, 60)])
    assert find_threshold(config, still)["median_score"] == scores.median()


def test_clips_in_which_nothing_moves_have_no_threshold():
    with pytest.raises(ValueError, match="nothing moves in any of the 3 clips"):
        find_threshold(tiny_config(**BATCH), torch.zeros(3, 60))


def test_a_threshold_lies_between_scores():
    scores = torch.arange(24).reshape(2, 12).float()
    assert threshold_of(scores, 6, 2, 11) == pytest.approx((13 + 14) / 2)  # 10 of the second, 2 of the first


def test_evaluation_without_a_threshold_says_what_finds_one():
    model = build(EverestForVideoClassification, **BATCH)
    with pytest.raises(ValueError, match=r"keep_threshold is None; .* tune-keep-ratio --budget batch .* finds it"):
        model(clips())
    model.train()(clips())


def test_a_threshold_of_another_keep_ratio_is_refused(tmp_path):
    model = ready(EverestForVideoClassification)
    model.save_pretrained(tmp_path)
    same = EverestForVideoClassification.from_pretrained(tmp_path)
    assert same.config.keep_threshold == model.config.keep_threshold
    with torch.no_grad():
        torch.testing.assert_close(same(unequal_clips()).logits, model(unequal_clips()).logits)
    others = {"keep_ratio": 0.3, "min_keep_ratio": 0.2, "max_keep_ratio": 0.8, "token_selection": "compensated"}
    for name, value in {**others, "frame_oversampling": 1.5}.items():
        with pytest.raises(ValueError, match=rf"keep_threshold\['{name}'\] is .*; it must be {value!r}, as {name} is"):
            EverestForVideoClassification.from_pretrained(tmp_path, **{name: value})
        EverestForVideoClassification.from_pretrained(tmp_path, **{name: value}, keep_threshold=None)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.9, 1.0])
def test_a_share_outside_of_the_bounds_has_no_threshold(ratio):
    with pytest.raises(ValueError, match=rf"keep_ratio is {ratio}; it must be above min_keep_ratio 0\.1 and below"):
        find_threshold(tiny_config(**BATCH), torch.rand(8, 60), ratio)


def test_a_field_that_is_set_later_is_checked_as_well():
    for name, value in (("token_selection", "random"), ("attention_probs_dropout_prob", 0.5)):
        model = build(EverestForVideoClassification, **BATCH).train()
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be .* with token_budget 'batch'"):
            model(clips())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_budget": "video"}, "token_budget is 'video'; it must be one of 'clip', 'batch'"),
        ({"token_selection": "tube"}, "token_selection is 'tube'; it must be one of 'motion', 'compensated'"),
        ({"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob is 0.1; it must be 0"),
        ({"keep_ratio": 0.1}, "keep_ratio is 0.1; it must be above min_keep_ratio 0.1 and below"),
        ({"max_keep_ratio": 0.45}, "keep_ratio is 0.45; it must be above .* and below max_keep_ratio 0.45"),
        ({"min_keep_ratio": 0.0}, "min_keep_ratio is 0.0; it must be a number above 0"),
        ({"keep_threshold": 1.5}, "keep_threshold is 1.5; it must be None or a dict"),
        ({"keep_threshold": {"medians": 1, "median_score": 1}}, "keep_threshold is .* it must be None or a dict"),
    ],
)
def test_an_impossible_budget_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{**BATCH, **fields})


# ------------------------------------------------------------------ packed = one by one


@pytest.mark.parametrize("name", POOLING)
def test_packed_is_one_by_one_in_training(name):
    model = build(EverestForVideoClassification, **BATCH, **POOLING[name]).train()
    pixel_values = unequal_clips()
    output = model(pixel_values)
    model.zero_grad()
    loss_of(output).backward()
    found = slopes(model)
    model.zero_grad()
    for clip, ids in enumerate(parts(output, "kept_ids")):
        dropped = torch.ones(1, 60, dtype=torch.bool).scatter(1, ids[None], False)
        alone = model(pixel_values[clip : clip + 1], bool_masked_pos=dropped)
        torch.testing.assert_close(output.logits[clip], alone.logits[0], atol=1e-5, rtol=1e-5)
        loss_of(alone).backward()
    assert_close(found, slopes(model))


@pytest.mark.parametrize("name", POOLING)
@pytest.mark.parametrize("grad", [True, False])
def test_packed_is_one_by_one_in_evaluation(name, grad):
    model = ready(EverestForVideoClassification, **POOLING[name])
    pixel_values = unequal_clips()
    with torch.set_grad_enabled(grad):
        output = model(pixel_values)
        alone = [model(clip[None]) for clip in pixel_values]
    assert len(set(counts_of(output).tolist())) > 2
    torch.testing.assert_close(output.logits, torch.cat([each.logits for each in alone]), atol=1e-5, rtol=1e-5)
    for ids, each in zip(parts(output, "kept_ids"), alone, strict=True):
        assert torch.equal(ids, each.kept_ids[0])  # which is not filled up


@pytest.mark.parametrize("model_class", [EverestModel, EverestForVideoClassification])
def test_the_neighbours_of_a_clip_change_nothing(model_class):
    model = ready(model_class)
    pixel_values, order = unequal_clips(5), torch.tensor([4, 1, 0, 2, 3])
    others = clips(batch_size=5, seed=7)
    others[2] = pixel_values[2]
    with torch.no_grad():
        outputs = [model(batch) for batch in (pixel_values, pixel_values[order], others)]
    kept = [output.packing.split(main(output)) if model_class is EverestModel else main(output) for output in outputs]
    for here, there in enumerate(order.tolist()):
        torch.testing.assert_close(kept[1][here], kept[0][there], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(kept[2][2], kept[0][2], atol=1e-6, rtol=1e-5)


def test_features_and_grids_are_those_of_each_clip():
    model = ready(EverestModel)
    pixel_values, features = unequal_clips(), feature_function(model)
    with torch.no_grad():
        output = model(pixel_values)
        alone = [model(clip[None]) for clip in pixel_values]
        torch.testing.assert_close(features(pixel_values), torch.cat([features(clip[None]) for clip in pixel_values]))
    grids = torch.cat([tokens_to_grid(each, model.config.grid_size, -1.0) for each in alone])
    torch.testing.assert_close(tokens_to_grid(output, model.config.grid_size, -1.0), grids, atol=1e-5, rtol=1e-5)


def test_a_classifier_gives_a_row_for_each_clip():
    model = ready(EverestForVideoClassification)
    with torch.no_grad():
        output = model(unequal_clips(), output_scores=True)
        packed = model(unequal_clips(), output_hidden_states=True)
    assert {len(value) for value in output.values()} == {4}
    assert output.kept_ids.shape == (4, int(counts_of(output).max()))
    assert torch.equal(counts_of(output), packed.packing.counts)
    assert packed.hidden_states[-1].shape[1] == counts_of(output).sum()


def test_the_last_tokens_are_not_read_of_packed_ones():
    with pytest.raises(ValueError, match="read is 2; of packed tokens it must be None or 'mean'"):
        ready(EverestModel)(unequal_clips(), read=2)


def test_hidden_states_and_attentions_keep_to_the_clip():
    model = ready(EverestModel)
    with torch.no_grad():
        plain = model(unequal_clips())
        output = model(unequal_clips(), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state, plain.last_hidden_state, atol=1e-5, rtol=1e-5)
    total = output.kept_ids.shape[1]
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, total, 32)] * 3
    clip = output.packing.clip_of(total)
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, total))
        assert (weights[0, :, clip[:, None] != clip] == 0).all()


def test_drop_path_drops_whole_clips():
    packing = Packing(torch.tensor([0, 3, 4, 9, 11, 20], dtype=torch.int32), 9)
    torch.manual_seed(0)
    for _ in range(5):
        found = EverestDropPath(0.5).train()(torch.ones(1, 20, 7), packing)
        for part in packing.split(found):
            assert part.unique().tolist() in ([0.0], [2.0])


def test_means_are_those_of_each_clip_in_16_bits_too():
    packing = Packing(torch.tensor([0, 3, 4, 900], dtype=torch.int32), 900)
    for dtype in (torch.float32, torch.bfloat16):
        tokens = (1 + torch.rand(1, 900, 6)).to(dtype)
        expected = torch.stack([part.mean(dim=0, keepdim=True) for part in packing.split(tokens)])
        torch.testing.assert_close(packing.mean(tokens), expected)


# ------------------------------------------------------------------ kinds of attention


def packed_kernel(module, query, key, value, attention_mask, scaling, is_causal=True, **lengths):
    """Stand for a flash kernel: takes lengths under the names that Transformers gives them, and nothing else."""
    assert (attention_mask, is_causal) == (None, False)
    assert max(lengths["cu_seq_lens_q"].diff()) <= lengths["max_length_q"] <= 60
    assert max(lengths["cu_seq_lens_k"].diff()) <= lengths["max_length_k"] <= 60

    def attend(module, query, key, value, mask, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    return attend_one_by_one(
        attend, module, query, key, value, lengths["cu_seq_lens_q"], lengths["cu_seq_lens_k"], scaling
    ), None


AttentionInterface.register("flash_of_a_test", packed_kernel)
AttentionInterface.register("dense_of_a_test", lambda m, q, k, v, mask, scaling, **kw: (
    F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(1, 2), None))  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "flash_of_a_test", "dense_of_a_test"])
@pytest.mark.parametrize("overrides", [{}, ATTENTIVE], ids=["mean", "attentive"])
def test_all_kinds_of_attention_keep_to_the_clip(attention, overrides):
    logits = []
    for name in ("sdpa", attention):
        model = build(EverestForVideoClassification, **BATCH, **overrides).train()
        model.config._attn_implementation = name  # Transformers lets only its own have "flash" in their name
        logits.append(model(unequal_clips()).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_flex_attention_keeps_to_the_clip_in_inference():
    # Without gradients only: torch has no backward pass of flex attention on a CPU.
    models = [ready(EverestForVideoClassification, attention=name) for name in ("flex_attention", "sdpa")]
    with torch.no_grad():
        found, expected = (model(unequal_clips()).logits for model in models)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_in_16_bits(dtype):
    model = ready(EverestForVideoClassification)
    with torch.no_grad():
        expected = model(unequal_clips()).logits
        found = model.to(dtype)(unequal_clips().to(dtype)).logits
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_the_operator_of_compiled_graphs_is_attention_and_so_are_its_gradients():
    generator = torch.Generator().manual_seed(0)
    cu_queries, cu_keys = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 3, 7], [0, 5, 6, 13]))
    query, key, value = (torch.randn(1, 2, n, 4, generator=generator).double() for n in (7, 13, 13))
    arguments = (*(x.requires_grad_() for x in (query, key, value)), cu_queries, cu_keys, 0.7)
    torch.library.opcheck(torch.ops.everest.attend_segments, arguments)
    assert torch.autograd.gradcheck(torch.ops.everest.attend_segments, arguments)
    found = torch.ops.everest.attend_segments(*arguments)
    expected = attend_one_by_one(attention_everest.eager_attention_forward, torch.nn.Module(), *arguments)
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------ compiled


@pytest.mark.parametrize("overrides", [{}, ATTENTIVE], ids=["mean", "attentive"])
def test_compiled_in_one_graph_once_for_all_contents(overrides):
    torch._dynamo.reset()
    overrides = {"num_hidden_layers": 1, "problem_type": "single_label_classification", **overrides}
    model = build(EverestForVideoClassification, **BATCH, **overrides).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    generator, labels, counts = torch.Generator().manual_seed(0), torch.tensor([0, 1, 2, 3]), set()
    for step in range(50):
        pixel_values = unequal_clips(seed=step)[torch.randperm(4, generator=generator)]
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            output = compiled(pixel_values, labels=labels)
            output.loss.backward()
        counts.add(tuple(counts_of(output).tolist()))
        if step % 10 == 0:
            found = slopes(model)
            model.zero_grad()
            expected = model(pixel_values, labels=labels)
            expected.loss.backward()
            torch.testing.assert_close(output.loss, expected.loss)
            assert_close(found, slopes(model))
        model.zero_grad()
    assert len(counts) > 10


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_changes_nothing(attention):
    found = []
    for checkpointing in (False, True):
        model = build(EverestForVideoClassification, attention=attention, **BATCH).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model(unequal_clips())).backward()
        found.append(slopes(model))
    assert_close(*found)
