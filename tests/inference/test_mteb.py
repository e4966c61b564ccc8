"""A checkpoint as a model of mteb, on videos of this machine."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Video
from helpers.tiny import tiny_config
from helpers.videos import moving_frames, write_video
from torch.utils.data import DataLoader

from everest_hf import EverestForPreTraining, EverestForVideoClassification, EverestVideoProcessor
from everest_hf.data import VideoViews, load_videos
from everest_hf.inference import embed_videos
from everest_hf.inference.features import read_features
from everest_hf.inference.loading import load_encoder

mteb = pytest.importorskip("mteb")

from mteb.abstasks import AbsTaskClassification  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from everest_hf.mteb import model_meta  # noqa: E402


class Brightness(AbsTaskClassification):
    """Bright and dark videos of this machine."""

    input_column_name = "video"
    samples_per_label = 2
    metadata = TaskMetadata(
        name="Brightness",
        description="Bright and dark videos.",
        dataset={"path": "none/none", "revision": "1"},
        type="VideoClassification",
        category="v2c",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="accuracy",
        modalities=["video"],
    )

    def load_data(self, **kwargs):
        self.data_loaded = True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder and a classifier that nobody trained, and 6 videos, bright and dark."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    for kind, name in ((EverestForPreTraining, "encoder"), (EverestForVideoClassification, "classifier")):
        kind(tiny_config()).save_pretrained(folder / name)
        EverestVideoProcessor.from_config(tiny_config(), frame_step=1).save_pretrained(folder / name)
    for i in range(6):
        frames = moving_frames(20, 48, 64, seed=i) * (1.0 if i % 2 else 0.3)
        write_video(folder / "videos" / ("dark", "bright")[i % 2] / f"{i}.mp4", frames.astype("uint8"))
    return folder


def rows_of(place) -> Dataset:
    paths = sorted((place / "videos").rglob("*.mp4"))
    features = Features({"video": Video(), "label": ClassLabel(names=["bright", "dark"])})
    return Dataset.from_dict({"video": list(map(str, paths)), "label": [p.parent.name for p in paths]}, features)


@pytest.mark.parametrize("checkpoint", ["encoder", "classifier"])
def test_a_task_of_mteb_runs_on_a_checkpoint(place, checkpoint):
    task = Brightness()
    task.dataset = DatasetDict(train=rows_of(place), test=rows_of(place))
    meta = model_meta(place / checkpoint)
    assert (meta.name, meta.embed_dim, meta.modalities) == (f"everest_hf/{checkpoint}", 32, ["video"])
    result = mteb.evaluate(meta, task, cache=None, show_progress_bar=False)
    assert result.model_name == f"everest_hf/{checkpoint}"
    (scores,) = result.task_results[0].scores["test"]
    assert scores["accuracy"] == 1
    assert len(scores["scores_per_experiment"]) == 10


def test_its_features_are_those_of_embed(place, tmp_path):
    model, _ = load_encoder(str(place / "encoder"))
    views = VideoViews(
        load_videos(place / "videos"), model.config.frame_size, num_frames=12, frame_step=1, count_unreadable=True
    )
    assert embed_videos(model, views, tmp_path / "f.safetensors", num_workers=0) == []
    wanted = read_features(tmp_path / "f.safetensors").embeddings
    encoder = model_meta(place / "encoder").load_model()
    found = encoder.encode(DataLoader(rows_of(place), batch_size=4), show_progress_bar=False)
    np.testing.assert_allclose(found, wanted, atol=2e-2)  # torchcodec's colours are not those of ffmpeg's program
    assert found.dtype == np.float32
    distances = torch.cdist(wanted[:3], wanted[3:], p=torch.inf)
    assert distances.min() > 0.2


def test_there_is_no_such_checkpoint(place):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        model_meta(place / "nowhere")
