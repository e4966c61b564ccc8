"""Search among features, and how well neighbours tell labels."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_config
from helpers.videos import bad_files, write_class_folders, write_list

from everest_hf import EverestForVideoClassification, EverestVideoProcessor, cli
from everest_hf.inference import label_figures, read_features, search
from everest_hf.inference.features import FeatureFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, videos, and their features in both formats."""
    folder = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    model = EverestForVideoClassification(tiny_config())
    model.save_pretrained(folder / "model")
    EverestVideoProcessor.from_config(model.config, frame_step=2).save_pretrained(folder / "model")
    videos = write_class_folders(folder / "videos", videos_per_class=3, num_frames=40)
    how = ["--model", folder / "model", "--views", "2x1", "--keep-ratio", 0.7]
    for suffix in ("safetensors", "parquet"):
        assert run("embed", videos, folder / f"features.{suffix}", *how) == 0
    return folder


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    assert run(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("everest-hf: error: ")


# ------------------------------------------------------------------------------------------------------------- search


def test_both_formats_hold_the_same(folder):
    one, other = (read_features(folder / f"features.{suffix}") for suffix in ("safetensors", "parquet"))
    assert torch.equal(one.embeddings, other.embeddings)
    assert (one.videos, one.labels, one.about) == (other.videos, other.labels, other.about)
    assert one.labels == ["left"] * 3 + ["right"] * 3
    assert one.about["model"] == str(folder / "model")
    assert (one.about["keep_ratio"], one.about["num_segments"]) == (0.7, 2)


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_the_nearest_to_a_video_of_the_set_is_itself(folder, capsys, suffix):
    features = folder / f"features.{suffix}"
    query = read_features(features).videos[4]
    assert run("search", query, features, "--top-k", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["query"] == query
    first, *others = found["matches"]
    assert (first["video"], first["label"]) == (query, "right")
    assert first["similarity"] == pytest.approx(1, abs=1e-6)  # the same views and keep ratio
    assert len(others) == 2
    assert first["similarity"] > others[0]["similarity"] >= others[1]["similarity"]


def test_the_similarity_is_the_cosine_of_the_features(folder, capsys):
    features = read_features(folder / "features.parquet")
    query = features.videos[0]
    matches = search(query, features, top_k=99)
    assert sorted(match.video for match in matches) == features.videos
    for match in matches:
        one, other = features.embeddings[0].double(), features.embeddings[features.videos.index(match.video)].double()
        cosine = float(one @ other / one.norm() / other.norm())
        assert match.similarity == pytest.approx(cosine, abs=1e-5)
    assert run("search", query, folder / "features.parquet", "--top-k", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == query
    assert [line.split() for line in lines[1:]] == [
        [f"{match.similarity:.4f}", match.video, match.label] for match in matches[:2]
    ]


def test_videos_without_labels_are_found_too(folder, tmp_path, capsys):
    features = read_features(folder / "features.parquet")
    listed = write_list(tmp_path / "list.txt", [(path,) for path in features.videos])
    out = tmp_path / "out.safetensors"
    assert run("embed", listed, out, "--model", folder / "model") == 0
    assert [match.label for match in search(features.videos[1], out, top_k=2)] == [None, None]
    capsys.readouterr()
    assert refused(capsys, "neighbours", out) == f"{out}: the videos have no labels; embed a source that has some"


def test_a_model_that_has_moved_or_changed(folder, tmp_path, capsys):
    features = folder / "features.safetensors"
    query = read_features(features).videos[0]
    moved = shutil.copytree(folder / "model", tmp_path / "moved")
    assert search(query, features, model=moved)[0].video == query
    model = EverestForVideoClassification.from_pretrained(moved)
    torch.nn.init.normal_(model.fc_norm.weight)
    model.save_pretrained(moved)
    line = refused(capsys, "search", query, features, "--model", moved)
    assert line == f"{moved}: has other weights than the model that made the features; embed the videos again"


def test_what_cannot_be_searched_is_named(folder, tmp_path, capsys):
    features, bad = folder / "features.safetensors", bad_files(tmp_path)
    query = read_features(features).videos[0]
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"not features")
    table = shutil.copy(folder / "features.parquet", tmp_path / "cut.parquet")
    Path(table).write_bytes(Path(table).read_bytes()[:-100])
    for arguments, reason in (
        ((bad["text"], features), f"{bad['text']}: "),
        ((tmp_path / "gone.mp4", features), f"{tmp_path}/gone.mp4: no such video file"),
        ((query, tmp_path / "gone.parquet"), f"{tmp_path}/gone.parquet: no such file of features"),
        ((query, other), f"{other}: not a file of features that everest-hf embed wrote, or damaged"),
        ((query, table), f"{table}: not a file of features that everest-hf embed wrote, or damaged"),
        ((query, query), f"{query}: cannot tell the format"),
        ((query, features, "--top-k", 0), "--top-k is 0; it must be at least 1"),
    ):
        assert refused(capsys, "search", *arguments).startswith(reason)
    assert (
        refused(capsys, "neighbours", other)
        == f"{other}: not a file of features that everest-hf embed wrote, or damaged"
    )


# --------------------------------------------------------------------------------------------------------- neighbours


def by_hand(embeddings: torch.Tensor, labels: list[str], k: int) -> tuple[list[bool], list[float]]:
    """The answers and reciprocal ranks, by loops, in float64."""
    rows = [row / row.norm() for row in embeddings.double()]
    right, ranks = [], []
    for i, row in enumerate(rows):
        others = sorted(((float(row @ other), labels[j]) for j, other in enumerate(rows) if j != i), reverse=True)
        votes = dict.fromkeys(sorted(set(labels)), 0.0)
        for cosine, label in others[:k]:
            votes[label] += math.exp(cosine / 0.07)
        right.append(max(votes, key=votes.get) == labels[i])
        ranks.append(next((1 / r for r, (_, label) in enumerate(others, 1) if label == labels[i]), 0.0))
    return right, ranks


@pytest.mark.parametrize("k", [1, 3, 20, 999])
def test_figures_are_those_of_loops(k, monkeypatch):
    monkeypatch.setattr("everest_hf.inference.neighbours.AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    labels = [*"abcabcabcaabbb" * 3, "alone"]
    centres = {label: torch.randn(6, generator=generator) for label in sorted(set(labels))}
    embeddings = torch.stack([centres[label] + 1.5 * torch.randn(6, generator=generator) for label in labels])
    features = FeatureFile([str(i) for i in range(len(labels))], embeddings, labels, {})
    right, ranks = by_hand(embeddings, labels, k)
    total, *of_labels = label_figures(features, k)
    assert total.label is None
    assert total.accuracy == pytest.approx(sum(right) / len(right))
    assert total.reciprocal_rank == pytest.approx(sum(ranks) / len(ranks), abs=1e-6)
    assert [row.label for row in of_labels] == ["a", "alone", "b", "c"]
    for row in of_labels:
        own = [i for i, label in enumerate(labels) if label == row.label]
        assert row.videos == len(own)
        assert row.accuracy == pytest.approx(sum(right[i] for i in own) / len(own))
        assert row.reciprocal_rank == pytest.approx(sum(ranks[i] for i in own) / len(own), abs=1e-6)
    assert 0 < total.accuracy < 1
    assert (of_labels[1].accuracy, of_labels[1].reciprocal_rank) == (0, 0)


def test_neighbours_prints_a_row_for_each_label(folder, capsys):
    assert run("neighbours", folder / "features.parquet", "--k", 2) == 0
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first == "6 videos of 2 labels, each by its nearest others"
    assert header.split() == ["2-NN", "accuracy", "mean", "reciprocal", "rank", "videos", "label"]
    assert [row.split()[2:] for row in rows] == [["3", "left"], ["3", "right"], ["6", "all"]]
    assert run("neighbours", folder / "features.safetensors", "--k", 2, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    total, *of_labels = label_figures(read_features(folder / "features.parquet"), 2)
    assert (figures["accuracy"], figures["reciprocal_rank"]) == (total.accuracy, total.reciprocal_rank)
    assert [entry["label"] for entry in figures["labels"]] == [row.label for row in of_labels]
    assert rows[-1].split()[0] == f"{total.accuracy:.1%}"


def test_neighbours_need_two_videos_and_a_k(folder):
    with pytest.raises(ValueError, match="there is a single video"):
        label_figures(FeatureFile(["a"], torch.ones(1, 2), ["a"], {}))
    with pytest.raises(ValueError, match="k is 0"):
        label_figures(read_features(folder / "features.parquet"), 0)
