# For training on NVIDIA GPUs. Without a command it runs the quickstart; results appear in the folder /work.
#   docker build -t everest .
#   docker run --gpus all --ipc host -v "$PWD:/work" --user "$(id -u):$(id -g)" everest
FROM pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime

WORKDIR /opt/everest
COPY . .
# The image brings PyTorch, and PyAV its own FFmpeg. All that is written, caches too, goes below /work, where any user may
# write.
RUN pip install --no-cache-dir . \
    && useradd --no-create-home --uid 10001 everest \
    && install --directory --mode 1777 /work

ENV HOME=/work USER=everest
WORKDIR /work
USER 10001
CMD ["accelerate", "launch", "-m", "train_accelerate"]
