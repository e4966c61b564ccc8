"""What is done once for all runs that are forked: what each would import, and what libraries would make and keep."""

import gc
import tempfile
from pathlib import Path

import torch
from helpers.tiny import tiny_config

import train_accelerate  # noqa: F401
from everest_hf import EverestForPreTraining
from everest_hf.visualize import draw_curves

with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
    EverestForPreTraining(tiny_config()).save_pretrained(folder)
    EverestForPreTraining.from_pretrained(folder)
    draw_curves({"run": [{"step": 1, "loss": 1.0}]}, Path(folder) / "curves.png")
# The collector of a fork need not go through what it was born with.
gc.collect()
gc.freeze()
