"""Transformers' own suites of configurations and models, on ours."""

import unittest

import torch
from helpers.tiny import TINY, tiny_config
from helpers.transformers_tests import failing, suite

from everest_hf import EverestConfig, EverestForPreTraining, EverestForVideoClassification, EverestModel

HEADS = (EverestForPreTraining, EverestForVideoClassification)
# The fields of a configuration as its file has them: lists, and names of labels in place of their number.
AS_IN_FILES = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
AS_IN_FILES.pop("num_labels")

configurations, models = suite("test_configuration_common"), suite("test_modeling_common")


class EverestModelTester:
    """What the suite asks of a tester: sizes, a configuration, and inputs for it."""

    batch_size = 3
    is_training = True
    num_hidden_layers = TINY["num_hidden_layers"]
    hidden_size = TINY["hidden_size"]
    num_attention_heads = TINY["num_attention_heads"]
    num_labels = TINY["num_labels"]
    mask_length, num_masks = 60, 33
    image_size, patch_size = 24, 8  # of the noise of an image model; with a mask, ours reads none

    def __init__(self):
        self.seq_length = self.get_config().num_kept_tokens()

    def get_config(self) -> EverestConfig:
        return tiny_config()

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, 12, 3, 24, 40, generator=generator)}


@failing({"test_model_get_set_embeddings": "it wants an embedding of words; ours is the projection of patches"})
class EverestModelTest(models.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (EverestModel, *HEADS)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = EverestModelTester()
        self.config_tester = configurations.ConfigTester(
            self, config_class=EverestConfig, has_text_modality=False, **AS_IN_FILES
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = dict(inputs_dict)
        if return_labels and model_class is EverestForVideoClassification:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    # The suite knows models without a loss by a list of the library's own.

    def test_training(self):
        self.all_model_classes = HEADS
        super().test_training()

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        self.all_model_classes = HEADS
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_attention_outputs(self):
        self.each_with_its_tokens(super().test_attention_outputs)

    def test_hidden_states_output(self):
        self.each_with_its_tokens(super().test_hidden_states_output)

    def each_with_its_tokens(self, test):
        config = tiny_config()
        for model_class in self.all_model_classes:
            is_pretraining = model_class is EverestForPreTraining
            count = config.num_visible_tokens if is_pretraining else config.num_kept_tokens()
            self.all_model_classes, self.model_tester.seq_length = (model_class,), count
            test()


def test_the_suite_has_its_tests():
    assert len([name for name in dir(models.ModelTesterMixin) if name.startswith("test_")]) > 80
