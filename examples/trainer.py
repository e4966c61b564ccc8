"""Fine-tune with the Trainer of Transformers, on clips that the package reads.

python examples/trainer.py --model CHECKPOINT --train VIDEOS --val VIDEOS --output_dir FOLDER [--max_steps 100 …]

CHECKPOINT: a model's folder or its name on the Hub. VIDEOS: a list, a folder of class folders, or what training takes.
All options of TrainingArguments are there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from everest_hf import EverestForVideoClassification, EverestVideoProcessor
from everest_hf.data import VideoClips, VideoViews, class_names_of, collate, load_videos
from everest_hf.data.transforms import finetuning_transform, normalize


@dataclass
class Inputs:
    model: str
    train: str
    val: str
    frame_step: int = 4


def build_trainer(inputs: Inputs, arguments: TrainingArguments, adapt: Callable = lambda model: model) -> Trainer:
    """Return a Trainer for a classifier that starts from a checkpoint; adapt: what is done to the model first."""
    rows = load_videos(inputs.train)
    names = class_names_of(rows)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = EverestForVideoClassification.from_pretrained(inputs.model, ignore_mismatched_sizes=True, **labels)
    config, frame_step = model.config, inputs.frame_step
    sampling = {"num_frames": config.num_frames, "num_input_frames": config.num_input_frames, "frame_step": frame_step}

    def batch_of(items: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(items)
        clips = batch["pixel_values"].flatten(0, -5)  # uint8 (B, T, C, h, w); val has one view a video
        return {"pixel_values": normalize(clips, config.image_mean, config.image_std), "labels": batch["labels"]}

    arguments.remove_unused_columns = False  # which are `batch_of`'s to choose
    return Trainer(
        adapt(model),
        arguments,
        data_collator=batch_of,
        train_dataset=VideoClips(rows, finetuning_transform(config.frame_size, rand_augment=7), **sampling),
        eval_dataset=VideoViews(load_videos(inputs.val, class_names=names), config.frame_size, **sampling),
        processing_class=EverestVideoProcessor.from_config(config, frame_step=frame_step),
        compute_metrics=lambda found: {"top1": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )


def main(adapt: Callable = lambda model: model, command_line: list[str] | None = None) -> dict[str, float]:
    """Train, save, and return the figures on the videos of val."""
    trainer = build_trainer(
        *HfArgumentParser((Inputs, TrainingArguments)).parse_args_into_dataclasses(command_line), adapt
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main())
