"""Mean average precision of segments, against values worked out by hand, and on untrimmed videos."""

import json
from itertools import pairwise

import pytest
from helpers.commands import train
from helpers.videos import write_list

from everest_hf import cli
from everest_hf.data import load_videos
from everest_hf.data.synthetic import DIRECTIONS, PAUSE, MotionVideos, write_untrimmed_videos
from everest_hf.evaluation.localization import FoundSegment, average_precision, localization_figures, true_segments
from everest_hf.video import open_video

TRUE = [FoundSegment("A", "run", 0, 10), FoundSegment("A", "run", 20, 30), FoundSegment("B", "run", 0, 10)]
# By falling score, with the intersection over union of the true segment that each meets:
FOUND = [
    FoundSegment("A", "run", 20, 26, 0.6),  # fourth: 6 / 10 of the second true one
    FoundSegment("A", "run", 0, 8, 0.9),  # first: 8 / 10 of the first one
    FoundSegment("B", "run", 5, 15, 0.7),  # third: 5 / 15 of the one in B
    FoundSegment("A", "run", 1, 9, 0.8),  # second: 8 / 10 of the first one, which is taken; 0 of the other
]


@pytest.mark.parametrize(
    ("least", "value"),
    [
        # Right, wrong, right, right. Precision 1, 1/2, 2/3, 3/4 at recall 1/3, 1/3, 2/3, 1; the highest from there on is
        # 1, 3/4, 3/4, 3/4. Each right one is a third of the recall: (1 + 3/4 + 3/4) / 3.
        (0.3, 5 / 6),
        # Right, wrong, wrong, right: (1 + 2/4) / 3. At 0.6 the fourth is right by exactly that much.
        (0.4, 1 / 2),
        (0.5, 1 / 2),
        (0.6, 1 / 2),
        # Right, wrong, wrong, wrong.
        (0.7, 1 / 3),
        # At 0.8 the first is right by exactly that much; at 0.9 none is.
        (0.8, 1 / 3),
        (0.9, 0),
    ],
)
def test_average_precision_by_hand(least, value):
    assert average_precision(TRUE, FOUND, least) == pytest.approx(value)


def test_the_mean_is_over_classes_of_true_segments_alone():
    """Of "jump" nothing is found: 0. "swim" is in no video: it is not looked at."""
    true = [*TRUE, FoundSegment("A", "jump", 0, 4)]
    figures = localization_figures(true, [*FOUND, FoundSegment("A", "swim", 0, 4, 1.0)])
    wanted = {"map_0.3": 5 / 12, "map_0.4": 1 / 4, "map_0.5": 1 / 4, "map_0.6": 1 / 4, "map_0.7": 1 / 6}
    assert figures == pytest.approx({**wanted, "map": sum(wanted.values()) / 5})


def test_a_found_segment_takes_the_nearest_true_one_that_is_free():
    """The first meets both true ones, by 8/16 and 12/14. If it took the former, the second one, 8/10, would be wrong."""
    true = [FoundSegment("A", "run", 0, 10), FoundSegment("A", "run", 4, 16)]
    found = [FoundSegment("A", "run", 2, 16, 0.9), FoundSegment("A", "run", 0, 8, 0.8)]
    assert average_precision(true, found, 0.5) == 1
    # Twice the first: what is left meets it by 8/16, which is right by exactly that much.
    assert average_precision(true, [found[0], found[0]], 0.5) == 1
    assert average_precision(true, [found[0], found[0]], 0.51) == pytest.approx(1 / 2)


def test_nothing_found_and_nothing_to_find():
    assert localization_figures(TRUE, [])["map"] == 0
    with pytest.raises(ValueError, match="there are no segments to find"):
        localization_figures([], FOUND)


# ------------------------------------------------------------------ untrimmed videos

SPEC = MotionVideos(num_train=2, num_val=1)


def test_untrimmed_videos_have_motions_with_pauses_around_them(tmp_path):
    folder = write_untrimmed_videos(tmp_path / "motion", SPEC)
    segments = true_segments(load_videos(folder / "train.csv"))
    assert len(segments) == 2 * 7
    for i in (0, 7):
        of_video = segments[i : i + 7]
        assert [s.label == PAUSE for s in of_video] == [True, False] * 3 + [True]
        assert {s.label for s in of_video} <= {PAUSE, *DIRECTIONS}
        assert all(a.end == b.start for a, b in pairwise(of_video))
        video = open_video(of_video[0].video)
        assert video.num_frames == round(of_video[-1].end * SPEC.fps)
        frames = video.read(range(video.num_frames)).float()
        changes = (frames[1:] - frames[:-1]).abs().mean(dim=(1, 2, 3))  # of frame i + 1
        for segment in of_video:
            own = changes[max(0, round(segment.start * SPEC.fps) - 1) : round(segment.end * SPEC.fps) - 1]
            assert own.max() < 4 if segment.label == PAUSE else own.min() > 4, segment
    again = write_untrimmed_videos(tmp_path / "again", SPEC)
    assert (again / "val.csv").read_text() == (folder / "val.csv").read_text()
    assert (again / "val" / "00000.mp4").read_bytes() == (folder / "val" / "00000.mp4").read_bytes()


def test_rows_must_be_segments_in_seconds(tmp_path):
    folder = write_untrimmed_videos(tmp_path / "motion", MotionVideos(num_train=1, num_val=1))
    write_list(tmp_path / "list.txt", [(folder / "val" / "00000.mp4", "left")])
    with pytest.raises(ValueError, match="each row must be a segment in seconds: columns video, label, start, end"):
        true_segments(load_videos(tmp_path / "list.txt"))


RECIPE = """
task: finetune
train: motion/train.csv
val: motion/val.csv
output_dir: run
config: {image_size: 64, num_frames: 8, hidden_size: 96, num_hidden_layers: 4, num_attention_heads: 4,
         intermediate_size: 384, initializer_range: 0.1, drop_path_rate: 0.0}
frame_step: 1
crop_scale: [1.0, 1.0]
crop_ratio: [1.0, 1.0]
flip: false
rand_augment: 0
erasing: 0.0
label_smoothing: 0.0
num_sample: 2
epochs: 4
warmup_epochs: 1
batch_size: 16
base_lr: 2.4e-2
min_lr: 3.0e-5
layer_decay: 1.0
eval_every: 4
balanced_sampling: true
segments: 1
crops: 1
"""


@pytest.mark.slow
def test_motions_of_untrimmed_videos_are_found(tmp_path, capsys):
    """Trained for a minute on segments of other videos, a small classifier finds three motions and the pauses.

    Motions are along four axes, in one sense each: a classifier learns the axis long before the sense.
    """
    axes = DIRECTIONS[:4]
    write_untrimmed_videos(tmp_path / "motion", MotionVideos(num_train=80, num_val=12), directions=axes)
    (tmp_path / "run.yaml").write_text(RECIPE)
    train("run.yaml", cwd=tmp_path).check()
    arguments = ["eval-timeline", str(tmp_path / "motion" / "val.csv"), "--model", str(tmp_path / "run"), "--json"]
    assert cli.main([*arguments, "--stride", "1"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["map_0.5"] >= 0.9, figures
