"""Transformers' own suite of video processors, on ours."""

import unittest

from helpers.transformers_tests import failing, suite

from everest_hf import EverestVideoProcessor

processors = suite("test_video_processing_common")


class EverestVideoProcessorTester:
    """What the suite asks of a tester: sizes, and videos of random pixels."""

    batch_size, num_frames, num_channels = 5, 8, 3
    min_resolution, max_resolution = 80, 120

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return processors.prepare_video_inputs(
            self.batch_size,
            self.num_frames,
            self.num_channels,
            self.min_resolution,
            self.max_resolution,
            equal_resolution,
            return_tensors,
        )

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, 18, 18


@failing(
    {
        "test_call_sample_frames": "a short video repeats its last frame here, where the suite wants an error, and fps "
        "changes the stride, where the suite wants another number of frames: the model takes a fixed one",
        "test_video_processor_from_dict_with_kwargs": "one number as size is a square here, as the model takes",
    }
)
class EverestVideoProcessorTest(processors.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = EverestVideoProcessor
    input_name = "pixel_values"
    test_cast_dtype = True
    video_processor_dict = {  # noqa: RUF012  # as the suite reads it
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 18, "width": 18},
        "num_frames": 8,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }

    def setUp(self):
        super().setUp()
        self.video_processor_tester = EverestVideoProcessorTester()


def test_the_suite_has_its_tests():
    assert len([name for name in dir(processors.VideoProcessingTestMixin) if name.startswith("test_")]) > 12
