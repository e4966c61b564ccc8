"""Settings of the whole test run, made before anything that reads them is imported."""

import os

# Nothing may come from a network, and the commands that the tests start share the cores with the tests.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
