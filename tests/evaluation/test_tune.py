"""The choice of a keep ratio: its figures, what it recommends, what it writes."""

import csv
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.commands import ROOT
from helpers.models import FRAMES, build, clips
from helpers.tiny import tiny_config
from helpers.videos import bad_files, moving_frames, write_list, write_video
from PIL import Image

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestVideoProcessor, cli, inference
from everest_hf.cost import clip_cost, operations_counter
from everest_hf.data import VideoViews, load_videos
from everest_hf.data.transforms import normalize
from everest_hf.evaluation import keep_ratio as tune
from everest_hf.evaluation.evaluate import evaluate_model, figures_of, mean_scores
from everest_hf.evaluation.keep_ratio import tune_keep_ratio
from everest_hf.evaluation.keep_ratio_report import JSON, as_text, write_report
from everest_hf.evaluation.keep_ratio_results import Comparison, RatioResult, paired_difference, recommend
from everest_hf.evaluation.threshold import find_threshold
from everest_hf.training.loaders import build_val_loader
from everest_hf.training.recipe import load_recipe

CLASSES = ["black", "dark", "grey", "light", "white"]
RATIOS = [0.1, 0.3, 1.0]
LEARNED = [0.3, 0.5, 0.7, 0.9, 1.0]  # keep ratios that the head has seen
FRAME_STEP = 1
TIMES = {"clips_per_second", "read_clips_per_second"}


def write_shades(folder, videos_per_class: int, seed: int) -> None:
    """Write videos whose class is the brightness of the ground that a bright square moves over."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        for i in range(videos_per_class):
            frames = np.full((14, 48, 64, 3), 40.0 * label + rng.uniform(0, 40)) + rng.normal(0, 6, (14, 48, 64, 3))
            for t in range(14):
                frames[t, 8 + t : 20 + t, 10 + 2 * t : 24 + 2 * t] = 255
            write_video(folder / name / f"{name}_{i}.mp4", frames.clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(tune, "LEAST_SECONDS", 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with videos to learn from and others to measure on, and a classifier whose head has learned."""
    folder = tmp_path_factory.mktemp("place")
    write_shades(folder / "train", 8, seed=0)
    write_shades(folder / "val", 6, seed=1)
    save(classifier(folder / "train"), folder / "run" / "model")
    return folder


def classifier(videos) -> EverestForVideoClassification:
    """A random encoder, and the head that least squares has for its features at some keep ratios."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    model = EverestForVideoClassification(tiny_config(keep_ratio=0.3, **names)).eval()
    rows = load_videos(videos)
    clips = torch.cat([item["pixel_values"] for item in views_of(rows, model.config)])
    head, model.classifier = model.classifier, torch.nn.Identity()
    with torch.no_grad():
        pixel_values = normalize(clips, model.config.image_mean, model.config.image_std)
        features = torch.cat([model(pixel_values, keep_ratio=ratio).logits for ratio in LEARNED])
        labels = torch.tensor(rows["label"][:]).repeat(len(LEARNED))
        wanted = 8 * torch.nn.functional.one_hot(labels, len(CLASSES)).float()
        with_bias = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        weights = torch.linalg.lstsq(with_bias, wanted, driver="gelsd").solution  # (D + 1, classes)
        head.weight.copy_(weights[:-1].T)
        head.bias.copy_(weights[-1])
    model.classifier = head
    return model


def save(model, folder) -> str:
    model.save_pretrained(folder)
    EverestVideoProcessor.from_config(model.config, frame_step=FRAME_STEP).save_pretrained(folder)
    return str(folder)


def views_of(rows, config, **options) -> VideoViews:
    return VideoViews(
        rows, config.frame_size, num_frames=config.num_frames, frame_step=FRAME_STEP, count_unreadable=True, **options
    )


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of tune-keep-ratio."""
    code = cli.main(["tune-keep-ratio", *map(str, arguments)])
    return (code, *capsys.readouterr())


def evaluated(place, source, ratio: float, segments: int, crops: int) -> dict[str, float]:
    """The figures of an evaluation of the classifier with another keep ratio in its configuration."""
    model = EverestForVideoClassification.from_pretrained(place / "run" / "model", keep_ratio=ratio)
    options = {"task": "finetune", "train": str(source), "val": str(source), "num_workers": 0}
    recipe = load_recipe(None, {**options, "frame_step": FRAME_STEP, "batch_size": 6 * segments * crops})
    loader = build_val_loader(recipe, model.config, load_videos(source, class_names=CLASSES), segments, crops)
    return evaluate_model(Accelerator(cpu=True), model, loader, source="val")


# ------------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(("segments", "crops"), [(1, 1), (2, 3)])
def test_figures_are_those_of_an_evaluation_at_that_keep_ratio(place, segments, crops):
    source = place / "val"
    model = EverestForVideoClassification.from_pretrained(place / "run" / "model")
    views = views_of(load_videos(source, class_names=CLASSES), model.config, num_segments=segments, num_crops=crops)
    found = tune_keep_ratio(model, views, ratios=[1.0, 0.1, 0.3, 0.1], batch_size=6, num_workers=0).to_json()
    assert [row["keep_ratio"] for row in found["ratios"]] == RATIOS
    for row in found["ratios"]:
        expected = evaluated(place, source, row["keep_ratio"], segments, crops)
        assert {f"val_{name}": row[name] for name in ("loss", "top1", "top5", "mean_class_accuracy")} == pytest.approx(
            expected, rel=1e-4
        )
        cost = clip_cost(model.config, keep_ratio=row["keep_ratio"])
        assert (row["tokens"], row["gflops"] * 1e9) == (cost.tokens, pytest.approx(cost.forward))
        assert row["clips_per_second"] > 0
    least, middle, dense = (row["top1"] for row in found["ratios"])
    assert middle > 1 / len(CLASSES)  # something was learned,
    assert least < dense  # and something is to be lost
    best = max(found["ratios"], key=lambda row: (row["top1"], row["keep_ratio"]))
    assert found["recommended"]["reference_keep_ratio"] == best["keep_ratio"]
    for row in found["ratios"]:
        assert row["difference_points"] == pytest.approx(100 * (row["top1"] - best["top1"]))
    assert (found["videos"], found["views"], found["clips_per_batch"]) == (30, [segments, crops], 6 * segments * crops)


def test_the_command_prints_and_writes_what_the_function_finds(place, tmp_path, capsys):
    arguments = [place / "run", place / "val", "-o", tmp_path / "out", "--workers", 1, "--ratios", *RATIOS]
    code, out, err = run(capsys, *arguments, "--max-loss", 30)
    assert code == 0, err
    assert "30/30" in err
    assert set(os.listdir(tmp_path / "out")) == {"keep-ratio.json", "keep-ratio.csv", "keep-ratio.png"}
    report = json.loads((tmp_path / "out" / "keep-ratio.json").read_text())
    assert (report["source"], report["model"]) == (str(place / "val"), str(place / "run" / "model"))
    with (tmp_path / "out" / "keep-ratio.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in line.items()} for line in lines] == report["ratios"]
    with Image.open(tmp_path / "out" / "keep-ratio.png") as picture:
        assert min(picture.size) > 300
    table = [line.split() for line in out.splitlines() if line[:10].strip() in ("0.1", "0.3", "1")]
    assert [line[:2] for line in table] == [["0.1", "6"], ["0.3", "18"], ["1", "60"]]
    assert [line[4:6] for line in table] == [[f"{row['top1']:.1%}", f"{row['top5']:.1%}"] for row in report["ratios"]]
    assert f"recommended    keep ratio {report['recommended']['keep_ratio']:g}: " in out
    assert f"--model {place / 'run' / 'model'} --keep-ratio {report['recommended']['keep_ratio']:g}\n" in out

    code, out, _ = run(capsys, *arguments, "--max-loss", 30, "--json")
    again = json.loads(out)
    assert code == 0
    for summary in (report, again):
        assert summary.pop("date").endswith("+00:00")
        for row in (summary, *summary["ratios"]):
            assert all(row.pop(name) > 0 for name in TIMES & set(row))
    assert again == report


def test_unreadable_videos_are_named_and_left_out(place, tmp_path, capsys):
    bad = bad_files(tmp_path)
    good = [(place / "val" / name / f"{name}_{i}.mp4", name) for name in CLASSES for i in range(2)]
    source = write_list(tmp_path / "list.txt", [(bad["text"], "grey"), *good, (bad["empty"], "dark")])
    whole = write_list(tmp_path / "whole.txt", good)
    options = ["--ratios", 0.3, 1, "--workers", 1, "--json", "-o", tmp_path / "out", "--batch-size", 1]
    code, out, err = run(capsys, place / "run", source, *options)
    found = json.loads(out)
    assert code == 1
    assert [entry["video"] for entry in found["unreadable"]] == [str(bad["text"]), str(bad["empty"])]
    for name in ("text", "empty"):
        assert f"everest-hf: error: {bad[name]}: " in err
    code, out, _ = run(capsys, place / "run", whole, *options)
    assert code == 0
    expected = json.loads(out)
    assert found["videos"] == expected["videos"] == 10
    for ours, theirs in zip(found["ratios"], expected["ratios"], strict=True):
        assert {k: v for k, v in ours.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}

    nothing = write_list(tmp_path / "nothing.txt", [(bad["text"], "grey"), (bad["empty"], "dark")])
    code, out, err = run(capsys, place / "run", nothing, *options)
    assert (code, out) == (1, "")
    assert f"everest-hf: error: none of the 2 videos can be read; the first is {bad['text']}: " in err


# ------------------------------------------------------------------------------------------------ budget of the batch


def by_hand(model, pixel_values, **fields):
    """What a model of the same weights answers with these fields of its configuration."""
    config = type(model.config).from_dict({**model.config.to_dict(), **fields})
    other = EverestForVideoClassification(config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other(pixel_values)


@pytest.mark.parametrize("overrides", [{}, FRAMES])
def test_figures_of_a_shared_budget_are_those_of_the_model_at_its_threshold(place, tmp_path, overrides):
    """One of the videos cannot be read, and has no say in the threshold either."""
    good = [(path, path.parent.name) for path in sorted((place / "val").rglob("*_[012].mp4"))]
    source = write_list(tmp_path / "list.txt", [(bad_files(tmp_path)["text"], "grey"), *good])
    model = EverestForVideoClassification.from_pretrained(place / "run" / "model", **overrides)
    processor = EverestVideoProcessor.from_config(model.config, frame_step=FRAME_STEP)
    rows = load_videos(source, class_names=CLASSES)
    views = inference.evaluation_views(rows, model, processor, (2, 1), count_unreadable=True)
    before = model.config.to_dict()
    found = tune_keep_ratio(model, views, ratios=[0.6, 0.2], budget="batch", batch_size=4, num_workers=1)
    assert model.config.to_dict() == before
    assert (found.budget, found.model_token_budget, found.videos, len(found.unreadable)) == ("batch", "clip", 15, 1)
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found

    pixels = torch.cat([views[i]["pixel_values"] for i in range(1, len(views))])
    pixel_values = normalize(pixels, model.config.image_mean, model.config.image_std)
    labels = torch.tensor(rows["label"][1:])
    for row, ratio in zip(found.ratios, (0.2, 0.6), strict=True):
        threshold = found.thresholds[str(ratio)]
        output = by_hand(model, pixel_values, token_budget="batch", keep_ratio=ratio, keep_threshold=threshold)
        counts = (output.kept_ids >= 0).sum(dim=1).numpy()
        assert (row.keep_ratio, row.tokens) == (ratio, round(60 * ratio))
        assert counts.mean() == pytest.approx(60 * ratio, abs=0.1)
        assert [row.tokens_low, row.tokens_high] == [round(count) for count in np.percentile(counts, [5, 95])]
        assert row.tokens_low < row.tokens < row.tokens_high
        scores = mean_scores(output.logits, 2, "single_label_classification")
        expected = figures_of(scores, labels, "single_label_classification")
        assert {name: getattr(row, name) for name in expected} == pytest.approx(expected, rel=1e-4)
        forward = [clip_cost(model.config, keep_ratio=count / 60).forward for count in counts]
        assert row.gflops * 1e9 == pytest.approx(np.mean(forward))


@pytest.mark.parametrize("selection", ["motion", "compensated"])
def test_operations_of_a_shared_budget_are_those_that_are_computed(selection):
    """The first clip keeps all its tokens; they are scored all the same."""
    model = build(EverestForVideoClassification, token_selection=selection)
    pixel_values, counts, operations = clips(model.config, 2), [], []
    pixel_values[1, :, :, :12] = 0  # half of every frame stands still
    threshold = {**find_threshold(model.config, torch.rand(2, model.config.num_tokens), 0.5), "medians": 0.0}
    for clip in pixel_values.split(1):
        with tune.batch_budget(model.config, 0.5, threshold), operations_counter() as counter, torch.no_grad():
            counts.append(model(clip).kept_ids.shape[1])
        operations.append(counter.get_total_flops())
    assert counts[1] < counts[0] == 60
    found = tune._costs(model.config, 0.5, np.array(counts))
    assert found["gflops"] * 1e9 == pytest.approx(np.mean(operations))


def test_a_budget_that_is_set_for_a_while_is_taken_back_whatever_happens():
    config = tiny_config(keep_ratio=0.3)
    before = config.to_dict()
    seen = []

    def stop():
        with tune.batch_budget(config, 0.5):
            seen.append((config.token_budget, config.keep_ratio))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert seen == [("batch", 0.5)]
    assert config.to_dict() == before


def test_where_much_stands_still_the_threshold_keeps_what_changes_at_all():
    scores = torch.zeros(4, 60)
    scores[:, :30] = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)) + 1
    config = tiny_config(keep_ratio=0.8)
    found = find_threshold(config, scores)
    assert (found["keep_ratio"], found["medians"]) == (0.8, 0)
    assert found["median_score"] == scores[scores > 0].median()
    assert tiny_config(keep_ratio=0.8, token_budget="batch", keep_threshold=found).score_threshold() == 0
    with pytest.raises(
        ValueError, match=r"keep_threshold is .*; it must be None or a dict of .* where medians is at least 0"
    ):
        tiny_config(keep_ratio=0.8, token_budget="batch", keep_threshold={**found, "medians": -1.0})


def test_a_choice_of_either_budget_is_kept_in_the_checkpoint(place, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "model"
    shutil.copytree(place / "run", tmp_path / "run")
    stored = json.loads((checkpoint / "config.json").read_text())
    source = write_list(tmp_path / "list.txt", [(p, p.parent.name) for p in sorted((place / "val").rglob("*_0.mp4"))])
    options = [checkpoint.parent, source, "-o", tmp_path / "out", "--workers", 1, "--max-loss", 60]

    code, out, err = run(capsys, *options, "--budget", "batch", "--ratios", 0.4, "--save")
    assert code == 0, err
    assert set(os.listdir(tmp_path / "out")) == {"keep-ratio.json", "keep-ratio.csv", "keep-ratio.png"}
    report = json.loads((tmp_path / "out" / "keep-ratio.json").read_text())
    (row,), threshold = report["ratios"], report["thresholds"]["0.4"]
    with (tmp_path / "out" / "keep-ratio.csv").open(newline="") as file:
        assert [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)] == [row]
    lines = [line.split() for line in out.splitlines()]
    assert ["0.4", "24", f"{row['tokens_low']}-{row['tokens_high']}"] in [line[:3] for line in lines]
    assert "recommended    keep ratio 0.4: the only one that was measured\n" in out
    assert f"to use it      everest-hf predict VIDEO --model {checkpoint}\n" in out
    kept = f"kept           keep_ratio 0.4, token_budget batch, keep_threshold {threshold['medians']:.3g} medians"
    assert f"{kept}, in {checkpoint / 'config.json'}\n" in out
    chosen = {"keep_ratio": 0.4, "token_budget": "batch", "keep_threshold": threshold}
    assert json.loads((checkpoint / "config.json").read_text()) == {**stored, **chosen}

    model = EverestForVideoClassification.from_pretrained(place / "run" / "model")
    pixel_values = normalize(views_of(load_videos(source), model.config)[0]["pixel_values"], 0.5, 0.2)
    saved = EverestForVideoClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        ours, theirs = saved(pixel_values), by_hand(model, pixel_values, **chosen)
    assert torch.equal(ours.kept_ids, theirs.kept_ids)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-3)

    # The checkpoint's own budget is the default.
    code, out, _ = run(capsys, *options, "--json")
    assert [row["keep_ratio"] for row in json.loads(out)["ratios"]] == [tenths / 10 for tenths in range(1, 10)]

    # As a share of each clip, the ratios give what they gave before.
    code, out, err = run(capsys, *options, "--budget", "clip", "--ratios", 0.4, 1, "--save", "--json")
    rows = load_videos(source, class_names=CLASSES)
    expected = tune_keep_ratio(model, views_of(rows, model.config), ratios=[0.4, 1], num_workers=1).to_json()
    both = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in found["ratios"]]
        for found in (json.loads(out), expected)
    ]
    assert both[0] == [{name: pytest.approx(value, rel=1e-4) for name, value in row.items()} for row in both[1]]
    assert [(row["tokens_low"], row["tokens"], row["tokens_high"]) for row in both[0]] == [(24,) * 3, (60,) * 3]
    ratio = json.loads(out)["recommended"]["keep_ratio"]
    assert f"kept           keep_ratio {ratio:g}, token_budget clip, in {checkpoint / 'config.json'}\n" in err
    assert json.loads((checkpoint / "config.json").read_text()) == {
        **stored,
        **{"keep_ratio": ratio, "token_budget": "clip", "keep_threshold": None},
    }


# ------------------------------------------------------------------------------------------------------------ compared


def answers(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Which videos two models classify rightly: so many by both, by the first alone, by the second alone, by none."""
    return tuple(
        np.repeat(rights, (both, first, second, neither))
        for rights in ([True, True, False, False], [True, False, True, False])
    )


def test_a_paired_difference_by_hand():
    # 4 more lost than gained of 200; variance 8 + 1 - 16 / 202.
    difference, error = paired_difference(*answers(both=150, first=2, second=6, neither=42))
    assert difference == -2
    assert error == pytest.approx(100 * (9 - 16 / 202) ** 0.5 / 202)
    # Agresti and Min's interval for 40, 20 and 160 videos, as published: -0.21601726 to -0.03089632 at 95 %.
    _, error = paired_difference(*answers(both=70, first=20, second=40, neither=30))
    assert error == pytest.approx(100 * (0.21601726 - 0.03089632) / 2 / 1.959964, rel=1e-6)


def test_a_difference_is_not_certain_where_all_answers_are_equal():
    assert paired_difference(*answers(both=98, first=0, second=0, neither=0)) == (0, 1)


def rows_of(*points: tuple[float, float, float]) -> list[RatioResult]:
    """Results of (keep ratio r, difference, standard error) at 100 / r clips a second."""
    return [
        RatioResult(
            keep_ratio=ratio,
            tokens=60,
            tokens_low=60,
            tokens_high=60,
            gflops=ratio,
            clips_per_second=100 / ratio,
            loss=0.5,
            top1=0.9 + difference / 100,
            top5=1.0,
            mean_class_accuracy=0.9,
            difference_points=difference,
            standard_error_points=error,
        )
        for ratio, difference, error in points
    ]


@pytest.mark.parametrize(
    ("differences", "max_loss", "ratio"),
    [
        ([-9.0, -3.0, -0.5, 0.0], 1.0, 0.6),
        ([-9.0, -1.0, -0.5, 0.0], 1.0, 0.3),  # as much as is allowed
        ([-0.5, -3.0, -0.5, 0.0], 1.0, 0.6),  # the smallest one holds by luck
        ([-9.0, -3.0, -2.0, 0.0], 1.0, 1.0),
        ([-9.0, -0.5, 0.0, -2.0], 1.0, 0.3),  # more tokens than in training may be worse
        ([0.0, -2.0, -3.0, -4.0], 1.0, 0.1),
        ([-9.0, -3.0, -0.5, 0.0], 50.0, 0.1),
    ],
)
def test_the_smallest_ratio_is_recommended_from_which_all_hold_up_to_the_most_accurate(differences, max_loss, ratio):
    errors = [1.0 if difference else 0.0 for difference in differences]
    rows = rows_of(*zip((0.1, 0.3, 0.6, 1.0), differences, errors, strict=True))
    assert recommend(rows, 500, max_loss).keep_ratio == ratio


def test_a_loss_that_is_just_allowed_is_allowed():
    """3 of 1000 videos are 0.3 points to the bit, so that the comparison needs no tolerance."""
    for lost, count, allowed in ((3, 1000, 0.3), (7, 1000, 0.7), (1, 100, 1.0), (29, 1000, 2.9)):
        difference, _ = paired_difference(*answers(both=count - lost, first=0, second=lost, neither=0))
        assert -difference == allowed


def test_how_certain_a_recommendation_is():
    rows = rows_of((0.1, -3.0, 0.1), (0.3, -0.8, 0.5), (0.6, 0.0, 0.4), (1.0, 0.0, 0.0))
    found = recommend(rows, 200, 1.0)
    assert (found.keep_ratio, found.is_certain, found.certain_keep_ratio) == (0.3, False, 0.6)
    assert found.loss_bound_points == pytest.approx(0.8 + 1.644854 * 0.5)
    assert found.videos_needed == 136  # 200 * (1.644854 * 0.5) ** 2 = 135.3
    found = recommend(rows, 200, 2.0)
    assert (found.keep_ratio, found.is_certain, found.certain_keep_ratio) == (0.3, True, 0.3)
    few = recommend(rows_of((0.5, 0.0, 5.0), (1.0, 0.0, 0.0)), 18, 1.0)
    assert (few.keep_ratio, few.is_certain, few.certain_keep_ratio) == (0.5, False, 1.0)
    assert few.videos_needed == 1218  # 18 * 8.22427 ** 2 = 1217.5


def said_of(results: list[RatioResult], num_videos: int, max_loss: float, **changes) -> dict[str, str]:
    """The lines below the table by their first words."""
    comparison = Comparison(
        source="val",
        date="",
        versions={},
        model="m",
        model_keep_ratio=0.6,
        model_token_budget="clip",
        frame_oversampling=1.0,
        budget="clip",
        thresholds=None,
        device="cpu",
        threads=1,
        dtype="float32",
        videos=num_videos,
        views=[1, 1],
        clips_per_batch=8,
        read_clips_per_second=50.0,
        ratios=results,
        recommended=recommend(results, num_videos, max_loss),
        unreadable=[],
    )
    lines = as_text(replace(comparison, **changes)).splitlines()[4 + len(results) :]
    return {line[:15].strip(): line[15:] for line in lines}


def test_what_is_said_of_a_recommendation():
    rows = rows_of((0.2, -3.0, 0.1), (0.5, -0.8, 0.5), (0.8, 0.0, 0.4), (1.0, 0.0, 0.0))
    said = said_of(rows, 200, 1.0)
    assert said["recommended"] == "keep ratio 0.5: -0.80 ± 0.50 points, 2.00 times the clips/s, 50% of the GFLOPs"
    bound = "1.62 points at 95 % confidence"
    assert said["not certain"] == f"it may lose {bound}, 1 allowed; from keep ratio 0.8 on that is certain"
    assert said["to use it"] == "everest-hf predict VIDEO --model m --keep-ratio 0.5"
    assert said["to keep it"] == "model.config.keep_ratio = 0.5; model.save_pretrained(FOLDER)"
    # The configuration's keep ratio would choose other frames.
    assert "to keep it" not in said_of(rows, 200, 1.0, frame_oversampling=1.5)
    same = "the same command with --save"
    assert said_of(rows, 200, 1.0, model_token_budget="batch")["to keep it"] == same
    threshold = {"keep_ratio": 0.5, "medians": 1.25, "median_score": 0.75}
    shared = {"budget": "batch", "thresholds": {"0.5": threshold}}
    said = said_of(rows, 200, 1.0, **shared)
    fields = f"keep_ratio=0.5, token_budget='batch', keep_threshold={threshold}"
    assert (said["to use it"], said["to keep it"]) == (f"from_pretrained('m', {fields})", same)
    assert "to keep it" not in said_of(rows, 200, 1.0, frame_oversampling=1.5, **shared)
    assert said_of(rows, 200, 2.0)["certain"] == f"it loses at most {bound}, 2 allowed"
    assert said_of(rows, 200, 0.1)["not certain"].endswith(
        "points at 95 % confidence, 0.1 allowed; about 8658 videos tell 0.1 from none"
    )

    dense = said_of(rows_of((0.5, -4.0, 1.0), (1.0, 0.0, 0.0)), 200, 1.0)
    assert dense["recommended"] == "keep ratio 1: at 0.5, 4.00 points are lost"
    better = said_of(rows_of((0.3, -0.5, 0.2), (0.5, 0.0, 0.0), (1.0, -4.0, 1.0)), 200, 1.0)
    assert better["recommended"] == "keep ratio 0.3: -0.50 ± 0.20 points, 1.67 times the clips/s, 60% of the GFLOPs"
    assert better["certain"] == "it loses at most 0.83 points at 95 % confidence, 1 allowed"
    smallest = said_of(rows_of((0.3, 0.0, 0.0), (1.0, -4.0, 1.0)), 200, 1.0)
    assert smallest["recommended"] == "keep ratio 0.3: the smallest of all, and none is more accurate"


# ------------------------------------------------------------------------------------------------------------- refused


def test_results_that_are_kept_can_be_read_and_drawn(tmp_path):
    results = sorted((ROOT / "benchmarks" / "results").glob("keep-ratio-*.json"))
    assert results
    for path in results:
        stored = json.loads(path.read_text())
        found = Comparison.from_json(stored)
        assert found.recommended == recommend(found.ratios, found.videos, found.recommended.max_loss_points)
        assert as_text(found) in (ROOT / "docs" / "keep-ratio.md").read_text()
        assert all(file.stat().st_size for file in write_report(tmp_path, found))
        written = json.loads((tmp_path / JSON).read_text())
        assert Comparison.from_json(written) == found
        assert {name: written[name] for name in stored if name != "ratios"} == {
            name: value for name, value in stored.items() if name != "ratios"
        }


def test_what_is_wrong_is_said_before_a_model_is_loaded(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inference, "load_checkpoint", None)  # nothing here gets as far
    model, videos, out = place / "run", place / "val", tmp_path / "out"
    torch.manual_seed(0)
    several = save(
        EverestForVideoClassification(tiny_config(problem_type="multi_label_classification")), tmp_path / "several"
    )
    number = save(EverestForVideoClassification(tiny_config(num_labels=1)), tmp_path / "number")
    pretrained = save(EverestForPreTraining(tiny_config()), tmp_path / "pretrained")
    paths = load_videos(videos)["video"]
    tube = save(EverestForVideoClassification(tiny_config(token_selection="tube")), tmp_path / "tube")
    dropout = tiny_config(attention_probs_dropout_prob=0.1)
    dropout = save(EverestForVideoClassification(dropout), tmp_path / "dropout")
    narrow = tiny_config(min_keep_ratio=0.41, max_keep_ratio=0.49)
    narrow = save(EverestForVideoClassification(narrow), tmp_path / "narrow")
    frames = save(EverestForVideoClassification(tiny_config(**FRAMES)), tmp_path / "frames")
    batch = ("--budget", "batch")
    right = "it must be above min_keep_ratio 0.05 and below max_keep_ratio 1.0 with token_budget 'batch'"
    unlabelled = write_list(tmp_path / "unlabelled.txt", [(path,) for path in paths])
    foreign = write_list(tmp_path / "foreign.txt", [(paths[0], "black"), (paths[1], "pink")])
    for arguments, reason in {
        (
            model,
            videos,
            "--ratios",
            0,
            1,
        ): "EverestConfig.keep_ratio is 0.0; it must be a number above 0 and at most 1",
        (model, videos, "--ratios", 0.5, 1.5): "EverestConfig.keep_ratio is 1.5",
        (model, videos, "--ratios", 0.001, 1): "keep ratio 0.001 leaves none of the model's 60 tokens",
        (model, videos, "--ratios", 0.5, 0.5): "there is one keep ratio; it takes two or more to compare",
        (model, videos, "--max-loss", 0): "the loss allowed is 0 points; it must be above 0",
        (model, videos, "--max-loss", "nan"): "the loss allowed is nan points; it must be above 0",
        (model, videos, "--batch-size", 0): "--batch-size is 0; it must be at least 1",
        (model, videos, *batch, "--ratios", 0.5, 1): f"EverestConfig.keep_ratio is 1.0; {right}",
        (model, videos, *batch, "--ratios", 0.05): f"EverestConfig.keep_ratio is 0.05; {right}",
        (tube, videos, *batch): "EverestConfig.token_selection is 'tube'; it must be one of 'motion', 'compensated'",
        (dropout, videos, *batch): "EverestConfig.attention_probs_dropout_prob is 0.1; it must be 0 with token_budget",
        (narrow, videos, *batch): "none of the keep ratios 0.1, 0.2 … 1 lies between min_keep_ratio 0.41 and max_keep",
        ("owner/name", videos, "--save"): "owner/name: --save needs a checkpoint in a folder here that can be written",
        (
            frames,
            videos,
            "--save",
        ): "with frame_oversampling 1.5 the saved keep_ratio also chooses frames; leave --save",
        (frames, videos, "--save", *batch): "with frame_oversampling 1.5 the saved keep_ratio also chooses frames",
        (model, unlabelled): f"{unlabelled}:1",
        (model, foreign): f"{foreign}:2 ('pink'): class not among the 5 known",
        (model, tmp_path / "gone"): f"{tmp_path}/gone: no such",
        (tmp_path / "no", videos): f"{tmp_path}/no: no such checkpoint folder",
        (pretrained, videos): f"{pretrained}: is a checkpoint of EverestForPreTraining, which knows no labels",
        (several, videos): "the model is one of multi_label_classification; keep ratios are compared by top-1",
        (number, videos): "the model is one of regression; keep ratios are compared by top-1",
        (model, videos, "-o", foreign): f"{foreign}: File exists",
    }.items():
        code, printed, err = run(capsys, "-o", out, *arguments)
        assert (code, printed) == (1, "")
        assert err.splitlines()[-1].startswith(f"everest-hf: error: {reason}"), err


def test_a_threshold_is_not_found_where_nothing_moves(place, tmp_path, capsys):
    still = np.repeat(moving_frames(1, 48, 64), 14, axis=0)
    write_video(tmp_path / "val" / "grey" / "still.mp4", still, crf="0")
    options = ["--budget", "batch", "--workers", 1, "-o", tmp_path / "out"]
    code, printed, err = run(capsys, place / "run", tmp_path / "val", *options)
    assert (code, printed) == (1, "")
    assert err.splitlines()[-1].startswith("everest-hf: error: nothing moves in any of the 1 clips")
