"""The configuration: its counts, its errors, and what survives a file."""

import json
import math

import pytest
from helpers.reference import share
from helpers.tiny import TINY, tiny_config
from transformers import AutoConfig

from everest_hf import EverestConfig, EverestForVideoClassification
from everest_hf.configuration_everest import share_of

# ------------------------------------------------------------------ counts


def test_counts_at_the_defaults():
    config = EverestConfig()
    assert config.grid_size == (8, 14, 14)
    assert (config.num_slots, config.num_tokens_per_slot, config.num_tokens) == (8, 196, 1568)
    assert config.num_kept_tokens() == 940
    assert config.num_informative_tokens == 470
    assert config.num_visible_tokens == 156
    assert config.num_target_tokens == 314
    assert config.tubelet_dim == 3 * 2 * 16 * 16
    assert config.num_input_frames == config.num_frames == 16


def test_defaults_are_base_as_published():
    config = EverestConfig()
    encoder = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    decoder = (
        config.decoder_hidden_size,
        config.decoder_num_hidden_layers,
        config.decoder_num_attention_heads,
        config.decoder_intermediate_size,
    )
    assert encoder == (768, 12, 12, 4 * 768)
    assert decoder == (384, 4, 6, 4 * 384)
    assert (config.keep_ratio, config.pretraining_keep_ratio, config.mask_ratio) == (0.6, 0.3, 0.9)
    assert (config.token_selection, config.frame_oversampling, config.init_scale) == ("motion", 1.0, 0.001)
    assert config.layer_norm_eps == config.head_layer_norm_eps == 1e-6
    assert all((config.norm_pix_loss, config.use_mean_pooling, config.qkv_bias))


def test_counts_of_a_grid_with_no_equal_sides():
    config = tiny_config()
    assert config.frame_size == (24, 40)
    assert config.grid_size == (4, 3, 5)
    assert (config.num_tokens, config.num_kept_tokens()) == (60, 27)
    assert (config.num_informative_tokens, config.num_visible_tokens, config.num_target_tokens) == (24, 9, 15)


@pytest.mark.parametrize("count", [7, 60, 100, 196, 1000, 1568, 6272])
def test_shares_are_rounded_down_as_the_ratio_is_written(count):
    for percent in range(1, 101):
        assert share_of(percent / 100, count) == share(percent / 100, count)


def test_the_visible_share_has_no_float_dust():
    # 1 - 0.9 is 0.09999999999999998.
    config = EverestConfig(image_size=(80, 160), patch_size=8, num_frames=10, tubelet_size=2)
    assert config.num_tokens == 1000
    assert config.num_visible_tokens == 100


def test_keep_ratio_of_a_call_counts_like_that_of_the_config():
    for percent in range(2, 101):
        assert tiny_config().num_kept_tokens(percent / 100) == tiny_config(keep_ratio=percent / 100).num_kept_tokens()


def test_a_tube_has_the_same_places_in_every_slot():
    config = tiny_config(token_selection="tube")
    assert config.num_kept_tokens() == share(0.45, 15) * 4
    assert config.num_visible_tokens == share(0.15, 15) * 4
    assert config.num_informative_tokens == share(0.4, 15) * 4


@pytest.mark.parametrize(
    ("oversampling", "frames"), [(1.0, 12), (1.2, 12), (1.25, 15), (1.3, 15), (1.5, 18), (1.75, 21), (2.0, 24)]
)
def test_candidate_frames_are_a_multiple_of_the_tubelet(oversampling, frames):
    assert tiny_config(frame_oversampling=oversampling).num_input_frames == frames


def test_candidate_frames_have_no_float_dust():
    # 1.1 * 30 is 33.00000000000001, but 1.15 * 60 is 68.99999999999999.
    assert tiny_config(num_frames=60, frame_oversampling=1.15).num_input_frames == 69


# ------------------------------------------------------------------ errors

NAN = math.nan
BAD_FIELDS = [
    # field, value, a word of what would be right
    ("image_size", (25, 40), "patch_size=8"),
    ("image_size", (24, 41), "patch_size=8"),
    ("image_size", 30, "patch_size=8"),
    ("image_size", (24, 40, 56), "height, width"),
    ("image_size", [], "height, width"),
    ("image_size", None, "height, width"),
    ("image_size", "224", "height, width"),
    ("image_size", 0, "positive"),
    ("image_size", (-24, 40), "positive"),
    ("patch_size", 0, "positive"),
    ("patch_size", 2.5, "integer"),
    ("num_channels", 0, "positive"),
    ("num_frames", 0, "positive"),
    ("num_frames", 13, "tubelet_size=3"),
    ("num_frames", 2, "tubelet_size=3"),
    ("num_frames", 3, "two"),
    ("num_frames", 12.0, "integer"),
    ("tubelet_size", -3, "positive"),
    ("hidden_size", 30, "num_attention_heads=4"),
    ("hidden_size", 0, "positive"),
    ("num_hidden_layers", 0, "positive"),
    ("num_attention_heads", 0, "positive"),
    ("intermediate_size", 0, "positive"),
    ("decoder_hidden_size", 21, "decoder_num_attention_heads=2"),
    ("decoder_num_hidden_layers", 0, "positive"),
    ("decoder_num_attention_heads", -1, "positive"),
    ("decoder_intermediate_size", 0, "positive"),
    ("keep_ratio", 0, "above 0"),
    ("keep_ratio", 1.01, "at most 1"),
    ("keep_ratio", -0.5, "above 0"),
    ("keep_ratio", NAN, "at most 1"),
    ("keep_ratio", None, "number"),
    ("keep_ratio", "0.5", "number"),
    ("keep_ratio", True, "number"),
    ("keep_ratio", 0.01, "60 tokens"),
    ("pretraining_keep_ratio", 0, "above 0"),
    ("pretraining_keep_ratio", 1.2, "at most 1"),
    ("pretraining_keep_ratio", 0.15, "mask_ratio"),
    ("pretraining_keep_ratio", 0.1, "visible"),
    ("mask_ratio", 0, "between 0 and 1"),
    ("mask_ratio", 1, "between 0 and 1"),
    ("mask_ratio", 1.5, "between 0 and 1"),
    ("mask_ratio", 0.999, "60 tokens"),
    ("token_selection", "movement", "'motion', 'compensated', 'random', 'tube'"),
    ("token_selection", None, "'motion', 'compensated', 'random', 'tube'"),
    ("frame_oversampling", 0.9, "at least 1"),
    ("frame_oversampling", NAN, "at least 1"),
    ("frame_oversampling", math.inf, "at least 1"),
    ("frame_oversampling", "2", "number"),
    ("hidden_dropout_prob", 1.0, "below 1"),
    ("attention_probs_dropout_prob", -0.1, "at least 0"),
    ("drop_path_rate", 1.5, "below 1"),
    ("classifier_dropout", NAN, "below 1"),
    ("layer_norm_eps", 0, "positive"),
    ("layer_norm_eps", math.inf, "positive"),
    ("head_layer_norm_eps", -1e-6, "positive"),
    ("initializer_range", -1, "positive"),
    ("init_scale", 0, "positive"),
    ("image_mean", (0.5, 0.5), "num_channels=3"),
    ("image_mean", 0.5, "num_channels=3"),
    ("image_mean", None, "num_channels=3"),
    ("image_mean", (0.5, "a", 0.5), "num"),
    ("image_std", (0.5,), "num_channels=3"),
    ("image_std", "abc", "num"),
    ("image_std", (0.2, 0, 0.2), "positive"),
    ("image_std", (0.2, NAN, 0.2), "number"),
    ("hidden_act", "gelo", "gelu"),
    ("problem_type", "clustering", "regression"),
    ("class_weights", [1.0, 2.0], "num_labels=5"),
    ("class_weights", [1.0, 2.0, 0, 1.0, 1.0], "positive"),
    ("class_weights", "balanced", "list"),
]


@pytest.mark.parametrize(("field", "value", "right"), BAD_FIELDS, ids=lambda value: str(value))
def test_an_impossible_value_names_field_value_and_what_is_right(field, value, right):
    with pytest.raises(ValueError) as error:
        tiny_config(**{field: value})
    message = str(error.value)
    assert field in message
    assert right in message
    shown = value if isinstance(value, tuple) and value else [value]
    assert any(str(part) in message for part in shown)
    assert "\n" not in message


def test_a_width_without_its_own_channel_pairs_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size is 33.*even"):
        tiny_config(hidden_size=33, num_attention_heads=3)


def test_no_target_token_is_left_by_a_tube():
    # 15 places: 0.2 of them are 3, and so are 0.22 of them.
    with pytest.raises(ValueError, match="pretraining_keep_ratio"):
        tiny_config(token_selection="tube", pretraining_keep_ratio=0.22, mask_ratio=0.8)


def test_no_visible_token_is_left_by_a_tube():
    with pytest.raises(ValueError, match="mask_ratio"):
        tiny_config(token_selection="tube", mask_ratio=0.95)


def test_a_pixel_alone_cannot_be_normalised():
    sizes = {"patch_size": 1, "tubelet_size": 1, "image_size": (3, 5), "num_frames": 4}
    with pytest.raises(ValueError, match="norm_pix_loss"):
        tiny_config(**sizes)
    tiny_config(**sizes, norm_pix_loss=False)


def test_a_single_slot_serves_where_no_motion_is_needed():
    for selection in ("random", "tube"):
        assert tiny_config(num_frames=3, token_selection=selection).num_slots == 1
    with pytest.raises(ValueError, match="num_frames"):
        tiny_config(num_frames=3, token_selection="tube", frame_oversampling=2.0)


def test_frame_selection_needs_a_ratio_to_count_with():
    with pytest.raises(ValueError, match="keep_ratio is 1"):
        tiny_config(keep_ratio=1, frame_oversampling=1.5)


def test_four_channels_need_four_statistics():
    with pytest.raises(ValueError, match=r"image_mean.*num_channels=4"):
        tiny_config(num_channels=4)
    tiny_config(num_channels=4, image_mean=[0.5] * 4, image_std=[0.5] * 4)


# ------------------------------------------------------------------ files


def test_a_file_gives_the_same_configuration(tmp_path):
    config = tiny_config(token_selection="tube", frame_oversampling=1.5, problem_type="regression")
    config.save_pretrained(tmp_path)
    for loaded in (EverestConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EverestConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert loaded.frame_size == (24, 40)


def test_a_file_holds_every_field(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for field, value in TINY.items():
        if field != "num_labels":
            assert stored[field] == (list(value) if isinstance(value, tuple) else value)
    assert len(stored["id2label"]) == TINY["num_labels"]


def test_labels_have_names():
    config = EverestConfig(id2label={0: "still", 1: "left", 2: "right"}, label2id={"still": 0, "left": 1, "right": 2})
    assert config.num_labels == 3
    assert config.id2label[2] == "right"


def test_overrides_while_loading_are_checked_too(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="keep_ratio is 2"):
        EverestConfig.from_pretrained(tmp_path, keep_ratio=2)
    assert EverestConfig.from_pretrained(tmp_path, image_size=(32, 48)).grid_size == (4, 4, 6)


def test_a_model_checks_the_configuration_that_it_is_given(tmp_path):
    EverestForVideoClassification(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="keep_ratio is 2"):
        EverestForVideoClassification.from_pretrained(tmp_path, keep_ratio=2)
    model = EverestForVideoClassification.from_pretrained(tmp_path, image_size=(32, 48), keep_ratio=0.5)
    assert model.everest.embeddings.position_embeddings.table.shape == (4 * 4 * 6, 32)
