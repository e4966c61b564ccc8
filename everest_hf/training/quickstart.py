"""The quickstart: a small pre-training and a fine-tuning from it, on videos that it writes itself."""

import json
import shlex
from pathlib import Path

from ..data.synthetic import MotionVideos, write_motion_videos
from ..files import packaged
from ..visualize import draw_curves
from .logging import LOG, read_log
from .recipe import Recipe, load_recipe

# The recipes of the two stages.
RECIPES = packaged("recipes/quickstart")


def write_videos(folder: str | Path = "data/motion") -> Path:
    """Write the quickstart's videos below `folder`, or find them there, and return where train/ and val/ are."""
    return write_motion_videos(folder, MotionVideos())


def folder_of(options: dict) -> Path:
    """Return the folder that holds a run for each stage."""
    return Path(options.get("output_dir", "runs/quickstart"))


def load_stages(options: dict) -> dict[str, Recipe]:
    """Return the recipes of both stages, on videos that are written where they are missing.

    They are chained: fine-tuning starts from the model that pre-training saves.

    options: values for both, over the files'; output_dir is the folder that holds a run for each stage, and only the
    classifier goes to push_to_hub.
    """
    videos, root = write_videos(), folder_of(options)
    shared = {"train": str(videos / "train"), "val": str(videos / "val"), **options}
    first = {"output_dir": str(root / "pretrain"), "push_to_hub": None}
    pretrain = load_recipe(RECIPES / "pretrain.yaml", {**shared, **first})
    own = {"output_dir": str(root / "finetune"), "model": str(root / "pretrain" / "model")}
    return {"pretrain": pretrain, "finetune": load_recipe(RECIPES / "finetune.yaml", {**shared, **own})}


def summarise(stages: dict[str, Recipe]) -> str:
    """Draw the curves of both runs into one picture; say how it went, where everything is, and what to do next."""
    logs = {name: read_log(Path(recipe.output_dir) / LOG) for name, recipe in stages.items()}
    folder = Path(stages["finetune"].output_dir)
    curves = folder.parent / "curves.png"
    draw_curves(logs, curves)
    losses = [line["loss"] for line in logs["pretrain"] if "loss" in line]
    top1 = [line["val_top1"] for line in logs["finetune"] if "val_top1" in line][-1]
    num_classes = len(json.loads((folder / "model" / "config.json").read_text())["id2label"])
    return "\n".join(
        (
            f"pre-training loss   {losses[0]:.3f} -> {losses[-1]:.3f} ({1 - losses[-1] / losses[0]:.0%} lower)",
            f"held-out top-1      {top1:.3f} (chance {1 / num_classes:.3f})",
            f"videos              {stages['finetune'].train} and {stages['finetune'].val}",
            f"pre-trained model   {stages['pretrain'].output_dir}/model",
            f"classifier          {folder}/model",
            f"curves              {curves}",
            f"kept tokens         {folder}/tokens.png",
            "",
            *_next_steps(stages),
        )
    )


def _next_steps(stages: dict[str, Recipe]) -> list[str]:
    """Say what to look at and to type after the quickstart; VIDEOS stands for what the user has."""
    finetune = stages["finetune"]
    clip = min(Path(str(finetune.train)).with_name("val").glob("*/*.mp4"))  # --val may name others
    predict = ["everest-hf", "predict", str(clip), "--model", f"{finetune.output_dir}/model"]
    own = ["recipes/quickstart/finetune.yaml", "--model", f"{stages['pretrain'].output_dir}/model"]
    own += ["--train", "VIDEOS/train", "--val", "VIDEOS/val", "--output_dir", "runs/own"]
    return [
        "next",
        f"look at             {finetune.output_dir}/tokens.png, the tokens of a clip that the model keeps",
        f"predict a clip      {shlex.join(predict)}",
        f"try your videos     accelerate launch train_accelerate.py {shlex.join(own)}",
        "                    with VIDEOS/train/CLASS/*.mp4 and VIDEOS/val/CLASS/*.mp4",
    ]
