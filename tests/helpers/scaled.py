"""train_accelerate.py in fp16 on a CPU, with the gradient scaler that Accelerate has for GPUs, for test_distributed.py.

scaled.py SCALE ARGUMENTS …: the scaler starts at SCALE and doubles it after two sound steps.
"""

import sys

import torch

import train_accelerate


def main(scale: str, *arguments: str) -> None:
    build = train_accelerate.build_accelerator

    def build_scaled(recipe):
        accelerator = build(recipe)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=float(scale), growth_interval=2)
        return accelerator

    train_accelerate.build_accelerator = build_scaled
    sys.argv = ["train_accelerate.py", *arguments]
    train_accelerate.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
