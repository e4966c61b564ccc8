"""What a run says of the speed of its reading: before it starts, and where it waits."""

from dataclasses import replace

import pytest
from accelerate import Accelerator
from helpers.tiny import tiny_config
from helpers.videos import write_clip

from everest_hf import cli
from everest_hf.data import load_videos
from everest_hf.training.recipe import Recipe
from everest_hf.training.waiting import Reading, reading_of, seconds_of_clip


@pytest.mark.parametrize(
    ("workers", "wait", "needed"),
    [(4, 0.5, 8), (4, 0.3, 6), (1, 0.0, 1), (0, 0.5, 1), (0, 0.75, 3), (2, 1.0, 2000)],
)
def test_the_processes_that_read_as_fast_as_the_model_trains(workers, wait, needed):
    """With 4 of them a step of 8 s, of which the model takes 4 s, is 32 s of reading: 8 processes read it in 4 s."""
    assert Reading(workers, 8, None).workers_needed(wait) == needed


def test_the_advice_is_one_option_or_one_command(tmp_path):
    source = write_clip(tmp_path / "in" / "a.mp4", 40)
    rows = load_videos(tmp_path / "in", labels_required=False)
    recipe = Recipe(train=str(tmp_path / "in"), frame_step=2, num_workers=3)
    reading = replace(reading_of(recipe, rows, Accelerator()), cores=4)
    assert reading.advice(0.25) == (
        "25% of the time is spent waiting for data: raise --num_workers to 4, which read as fast as the model trains"
    )
    command = f"everest-hf prepare {tmp_path / 'in'} OUT --frame-step 2"
    assert reading.advice(0.5) == (
        "50% of the time is spent waiting for data: 6 decoding processes would read as fast as the model trains, and "
        f"there are 4 cores; prepare the videos once: `{command}`"
    )
    assert reading.forecast(0.02) == (
        f"20 ms of a core for a clip: 3 processes read 150 clips/s, 4 cores 200; faster after `{command}`"
    )
    assert cli.main(command.replace("everest-hf ", "").replace("OUT", str(tmp_path / "out")).split()) == 0
    prepared = load_videos(tmp_path / "out", labels_required=False)
    assert reading_of(recipe, prepared, Accelerator()).command is None
    assert seconds_of_clip(recipe, tiny_config(), prepared) > 0
    source.write_bytes(b"no video")
    assert seconds_of_clip(recipe, tiny_config(), rows) is None
