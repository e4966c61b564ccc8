"""The package's metric modules, against values worked out by hand."""

import subprocess
import sys

import numpy as np
import pytest

from everest_hf.evaluation.metrics import load_metric

# Six classes; rows are videos. The rank of the true class: 1, 2, 1 (a tie, the lower class first), 6, 5.
PROBABILITIES = [
    [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
    [0.5, 0.2, 0.1, 0.1, 0.05, 0.05],
    [0.1, 0.3, 0.1, 0.3, 0.1, 0.1],
    [0.3, 0.25, 0.2, 0.15, 0.1, 0.0],
    [0.3, 0.25, 0.2, 0.15, 0.08, 0.02],
]
LABELS = [0, 1, 1, 5, 4]
UNANSWERED = [0.0] * 6


def compute(name, predictions, references) -> dict:
    return load_metric(name).compute(predictions=predictions, references=references)


# ---------------------------------------------------------------------------------------------------------- accuracy


def test_accuracies_by_hand():
    figures = compute("video_accuracy", PROBABILITIES, LABELS)
    assert figures["top1"] == pytest.approx(2 / 5)
    assert figures["top5"] == pytest.approx(4 / 5)
    # Class 0: 1, class 1: a half, classes 4 and 5: 0; classes without a video do not count.
    assert figures["mean_class_accuracy"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)


def test_a_tie_goes_to_the_lower_class():
    tie = [[0.1, 0.3, 0.1, 0.3, 0.1, 0.1]]
    assert compute("video_accuracy", tie, [1])["top1"] == 1
    assert compute("video_accuracy", tie, [3])["top1"] == 0


def test_fewer_than_five_classes():
    figures = compute("video_accuracy", [[0.4, 0.6], [0.6, 0.4]], [0, 0])
    assert figures["top1"] == 0.5
    assert figures["top5"] == 1


@pytest.mark.parametrize("label", range(6))
def test_no_answer_is_never_right(label):
    """Whatever the class of the video: the classes that a row of zeros would rank first are no exception."""
    assert set(compute("video_accuracy", [UNANSWERED], [label]).values()) == {0}


def test_batches_and_one_call_agree():
    metric = load_metric("video_accuracy")
    metric.add_batch(predictions=PROBABILITIES[:2], references=LABELS[:2])
    metric.add_batch(predictions=PROBABILITIES[2:], references=LABELS[2:])
    assert metric.compute() == compute("video_accuracy", PROBABILITIES, LABELS)


# --------------------------------------------------------------------------------------------------------- confusion


def test_confusion_by_hand():
    counts = compute("confusion_matrix", [*PROBABILITIES, UNANSWERED], [*LABELS, 3])["confusion_matrix"]
    wanted = np.zeros((6, 7), dtype=int)
    for label, predicted in [(0, 0), (1, 0), (1, 1), (5, 0), (4, 0), (3, 6)]:
        wanted[label, predicted] += 1
    assert np.array_equal(counts, wanted)


def test_the_diagonal_is_the_accuracy():
    probabilities = np.random.default_rng(0).random((40, 7))
    labels = np.arange(40) % 7
    counts = compute("confusion_matrix", probabilities, labels)["confusion_matrix"]
    figures = compute("video_accuracy", probabilities, labels)
    assert np.trace(counts) / counts.sum() == pytest.approx(figures["top1"])
    assert np.mean(counts.diagonal() / counts.sum(axis=1)) == pytest.approx(figures["mean_class_accuracy"])


# ------------------------------------------------------------------------------------------------------- multi-label

# Three labels of four videos.
SCORES = [[0.9, 0.2, 0.1], [0.8, 0.6, 0.2], [0.3, 0.7, 0.3], [0.6, 0.1, 0.4]]
WANTED = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]]


def test_multi_label_by_hand():
    figures = compute("multi_label", SCORES, WANTED)
    # Label 0, by falling score: right, wrong, right, right. Label 1: right, right. Label 2 has no video.
    first = (1 / 1 + 2 / 3 + 3 / 4) / 3
    assert figures["map"] == pytest.approx((first + 1) / 2)
    # At 0.5: five answers, four of them right, and one label missed.
    assert figures["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert figures["accuracy"] == pytest.approx(2 / 4)


def test_equal_scores_come_in_together():
    """Whatever the order of the videos: at the shared score, two of three are positive."""
    for labels in ([1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]):
        figures = compute("multi_label", [[0.7], [0.7], [0.7], [0.1]], [[label] for label in labels])
        assert figures["map"] == pytest.approx(2 / 3)


def test_a_video_without_an_answer_is_wrong_in_every_multi_label_figure():
    answered = compute("multi_label", SCORES, WANTED)
    figures = compute("multi_label", [*SCORES, [0.0] * 3], [*WANTED, [1, 0, 0]])
    assert figures["accuracy"] == pytest.approx(2 / 5)
    assert figures["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert figures["map"] == pytest.approx(((1 + 2 / 3 + 3 / 4 + 4 / 5) / 4 + 1) / 2)
    assert all(figures[name] < answered[name] for name in ("accuracy", "f1"))


def test_no_answer_is_wrong_also_where_a_video_has_no_label():
    assert compute("multi_label", [[0.0, 0.0]], [[0, 0]]) == {"map": 0, "f1": 0, "accuracy": 0}


# -------------------------------------------------------------------------------------------------------- regression


def test_regression_by_hand():
    figures = compute("regression", [1.0, 2.0, 6.0], [1.0, 4.0, 4.0])
    assert figures["mse"] == pytest.approx((0 + 4 + 4) / 3)
    assert figures["mae"] == pytest.approx((0 + 2 + 2) / 3)
    # Deviations (-2, -1, 3) and (-2, 1, 1): products 4, -1, 3; squares 14 and 6.
    assert figures["pearson"] == pytest.approx(6 / (14 * 6) ** 0.5)
    assert figures["r2"] == pytest.approx(1 - 8 / 6)


def test_perfect_regression():
    assert compute("regression", [1.5, -2.0], [1.5, -2.0]) == pytest.approx(
        {"mse": 0, "mae": 0, "pearson": 1, "r2": 1}
    )


@pytest.mark.filterwarnings("error")
def test_regression_without_variance():
    assert compute("regression", [1.0, 3.0], [2.0, 2.0]) == {"mse": 1, "mae": 1, "pearson": 0, "r2": 0}
    assert compute("regression", [2.0, 2.0], [1.0, 3.0]) == {"mse": 1, "mae": 1, "pearson": 0, "r2": 0}


# ----------------------------------------------------------------------------------------------------------- loading


def test_the_metrics_need_no_network():
    """Every connection of the process fails; what the library has cached does not help it either."""
    code = (
        "import socket\n"
        "def refuse(*_, **__): raise OSError('no network in this test')\n"
        "socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse\n"
        "from everest_hf.evaluation.metrics import load_metric\n"
        "one = {'predictions': [[1.0, 0.0]], 'references': [0]}\n"
        "print(load_metric('video_accuracy').compute(**one)['top1'])\n"
        "print(load_metric('confusion_matrix').compute(**one)['confusion_matrix'][0, 0])\n"
        "print(load_metric('multi_label').compute(predictions=[[1.0, 0.0]], references=[[1, 0]])['map'])\n"
        "print(load_metric('regression').compute(predictions=[1.0, 2.0], references=[1.0, 2.0])['r2'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1.0", "1", "1.0", "1.0"]
