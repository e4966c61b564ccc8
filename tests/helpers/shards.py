"""A script for several processes: what each of them reads of a list and of a stream, for test_data_runs.py.

shards.py LIST PATTERN FOLDER STEPS START WORKERS … writes FOLDER/<process>.pt, {WORKERS: (list, stream), …}:
of each the pairs of an index, and a number made of the seed and the pixels of its clip, in the order of reading, of the
third epoch from step START on. An epoch of the stream has STEPS.
"""

import sys
import zlib
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny import TINY

from everest_hf.configuration_everest import EverestConfig
from everest_hf.training import loaders
from everest_hf.training.recipe import Recipe


def read(recipe: Recipe, epoch: int, start: int) -> list[tuple[int, int]]:
    accelerator = Accelerator()
    config = EverestConfig(**TINY)
    train, _ = loaders.load_rows(recipe)
    total_batch = loaders.videos_of_step(recipe, train, accelerator.num_processes)
    loader, sampler = loaders.build_train_loader(recipe, config, train, total_batch)
    loader = accelerator.prepare(loader)
    loader.set_epoch(epoch)
    sampler.set_epoch(epoch, start=start * total_batch)
    found = []
    for batch in loader:
        numbers = [
            zlib.crc32(clip.contiguous().numpy().tobytes() + seed.numpy().tobytes())
            for clip, seed in zip(batch["pixel_values"], batch["seed"], strict=True)
        ]
        found += zip(batch["index"].tolist(), numbers, strict=True)
    return found


def main(source: str, pattern: str, folder: str, steps: str, start: str, *workers: str) -> None:
    found = {}
    for num_workers in map(int, workers):
        shared = {"frame_step": 1, "batch_size": 2, "num_workers": num_workers}
        stream = Recipe(train=pattern, streaming=True, steps_per_epoch=int(steps), **shared)
        found[num_workers] = tuple(read(r, 2, int(start)) for r in (Recipe(train=source, **shared), stream))
    torch.save(found, Path(folder) / f"{Accelerator().process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
