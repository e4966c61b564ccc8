"""What a run needs to go on, as files of tensors and numbers: nothing that they hold is ever executed."""

import importlib
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, DistributedType, load
from torch.distributed.checkpoint import filesystem, metadata

# The file of the parts that Accelerate does not know.
PARTS = "parts.pt"
_FORCED, _FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# The names in the index of a sharded checkpoint, which torch.distributed reads as a pickle.
_INDEX_NAMES = {
    *((metadata.__name__, name) for name, value in vars(metadata).items() if isinstance(value, type)),
    (filesystem.__name__, filesystem._StorageInfo.__name__),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
# What DeepSpeed saves beside tensors and numbers: plain records of it.
_DEEPSPEED_RECORDS = {
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler",
    "deepspeed.utils.tensor_fragment": "fragment_address",
}


def save_state(accelerator: Accelerator, folder: Path, parts: dict[str, Any]) -> None:
    """Save model, optimizer, scaler and random states as Accelerate does, and the `state_dict()` of each part.

    Every process calls it.
    """
    accelerator.save_state(str(folder))
    states = {name: part.state_dict() for name, part in parts.items()}
    if accelerator.is_main_process:
        torch.save(states, folder / PARTS)


def load_state(accelerator: Accelerator, folder: Path, parts: dict[str, Any]) -> bool:
    """Load what `save_state` saved; return whether the random states of this process are as they were.

    Raises:
        pickle.UnpicklingError: a file holds more than tensors and numbers. Others: it does not fit this run.
    """
    with _only_tensors(accelerator):
        for index in folder.rglob("*.metadata"):
            _IndexReader(index.open("rb")).load()
        accelerator.load_state(str(folder))
        states = torch.load(folder / PARTS, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(states[name])
        random_states = folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl"
        return random_states.exists() and _are_restored(load(random_states))


def _are_restored(states: dict[str, Any]) -> bool:
    """Say whether these are the random states now: Accelerate says nothing where it could not restore them."""
    saved, now = [states["torch_manual_seed"]], [torch.get_rng_state()]
    if torch.cuda.is_available():
        saved += states.get("torch_cuda_manual_seed", [])
        now += torch.cuda.get_rng_state_all()
    return len(saved) == len(now) and all(map(torch.equal, saved, now))


@contextmanager
def _only_tensors(accelerator: Accelerator) -> Iterator[None]:
    """Let all calls of torch.load read tensors and numbers alone: Accelerate, torch.distributed and DeepSpeed ask for
    more.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
    os.environ[_FORCED] = "1"
    records = _DEEPSPEED_RECORDS if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    try:
        with torch.serialization.safe_globals(
            [getattr(importlib.import_module(module), name) for module, name in records.items()]
        ):
            yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


class _IndexReader(pickle.Unpickler):
    """Reads the index of a sharded checkpoint; another name than those that belong there is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_NAMES or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")
