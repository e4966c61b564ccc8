# For training on NVIDIA GPUs. Without a command it runs the quickstart; results appear in the folder /workspace.
#   docker build -t everest .
#   docker run --gpus all --ipc host -v "$PWD:/workspace" --user "$(id -u):$(id -g)" everest
FROM pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime

WORKDIR /opt/everest
COPY . .
# The image brings PyTorch, and PyAV its own FFmpeg. All that is written, caches too, goes below /workspace, where any user may
# write.
RUN pip install --no-cache-dir . \
    && useradd --no-create-home --uid 10001 everest \
    && install --directory --mode 1777 /workspace

ENV HOME=/workspace USER=everest
WORKDIR /workspace
USER 10001
CMD ["accelerate", "launch", "-m", "train_accelerate"]
