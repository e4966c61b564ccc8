"""Settings of the whole test run, made before anything that reads them is imported."""

import os
import signal

# Nothing may come from a network, and the commands that the tests start share the cores with the tests.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
# Training is tested on a CPU also where there is a GPU, for which test_gpu.py is.
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch

torch.set_num_threads(1)
# A shell's background jobs are started deaf to Ctrl-C, and so would be the commands that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
