"""A model as a file that runs without Transformers: ONNX, or a program of torch.export."""

import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..configuration_everest import check_keep_ratio
from ..data.synthetic import MotionVideos, render
from ..files import put_in_place
from ..modeling_everest import EverestForVideoClassification, EverestPreTrainedModel
from ..video.encoding import write_mp4
from ..video_processing_everest import EverestVideoProcessor
from .export_readme import readme_of
from .loading import load_encoder

logger = logging.getLogger(__name__)

# Largest difference between what the file and the model give.
TOLERANCE = 1e-4
# Clips that a file of any number of clips is checked with, beside the two that it is made with, and the most it takes.
CHECKED_BATCH, LARGEST_BATCH = 3, 256
# Bytes of weights from which on an ONNX file has them beside it: a file holds 2 GiB.
LARGEST_WHOLE = 2**30 * 3 // 2
# What each format needs beside the package.
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
SETTINGS, CONFIG, README = "video_preprocessor_config.json", "config.json", "README.md"


class Exported(nn.Module):
    """A model as it is exported: pixel_values (B, T, C, H, W) in, what it gives and the ids of the kept tokens out."""

    def __init__(self, model: EverestPreTrainedModel, keep_ratio: float | None):
        super().__init__()
        self.model, self.keep_ratio = model, keep_ratio
        self.output = "logits" if isinstance(model, EverestForVideoClassification) else "last_hidden_state"

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(pixel_values, keep_ratio=self.keep_ratio)
        return output[self.output], output.kept_ids


def export_model(
    name: str, out: Path, kind: str, *, dynamic_batch: bool = False, keep_ratio: float | None = None
) -> dict[str, float]:
    """Write a classifier, or the encoder of another checkpoint, into the folder `out`, and check the file.

    `out` holds model.onnx or model.pt2, the processor's settings, the model's configuration, and a README with a program
    that runs the file. It appears when the file has given what the model gives on a clip that was read from a video, to
    TOLERANCE; otherwise nothing is left.

    Args:
        name: checkpoint folder or Hub id. kind: "onnx" or "pt2".
        dynamic_batch: take 1 to LARGEST_BATCH clips at a time, not one. keep_ratio: instead of the model's own.

    Returns:
        `difference`, the largest to the model's output, and `bytes`, the size of the file.

    Raises:
        ValueError: the model cannot be exported, or the file does not give what the model gives.
        FileExistsError: `out` is not a new or empty folder. ImportError: a package that the format needs is missing.
        OSError: a file cannot be written.
    """
    check_export(out, kind, keep_ratio)
    model, processor = load_encoder(name)
    if model.config.num_channels != 3:
        raise ValueError(
            f"{name}: takes {model.config.num_channels} channels; the file could not be checked on a video"
        )
    if model.config.token_budget == "batch":
        # A file's shapes are fixed, so every clip keeps the same number.
        model.config.token_budget, model.config.keep_threshold = "clip", None
        ratio = model.config.keep_ratio if keep_ratio is None else keep_ratio
        logger.warning("%s: token_budget 'batch' is 'clip' in the file, which keeps %g of every clip", name, ratio)
    exported = Exported(model.cpu(), keep_ratio).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        folder = Path(aside) / out.name
        folder.mkdir()
        clips = real_clips(processor, Path(aside), CHECKED_BATCH)  # (3, T, C, H, W)
        file = folder / f"model.{kind}"
        try:
            with _quiet():
                _WRITERS[kind](exported, clips[: 2 if dynamic_batch else 1], file, dynamic_batch)
        except OSError:
            raise
        except Exception as error:  # of all that torch.export and the exporter raise
            raise ValueError(f"{name}: cannot be exported: {_first_line(error)}") from error
        difference = _check(name, file, exported, [clips[:1], clips] if dynamic_batch else clips.split(1))
        _write_settings(folder, model, processor, exported, file.name)
        size = sum(part.stat().st_size for part in folder.glob("model.*"))
        if out.is_dir():
            out.rmdir()
        put_in_place(folder, out)
    return {"difference": difference, "bytes": size}


def check_export(out: Path, kind: str, keep_ratio: float | None) -> None:
    """Refuse what can be known to be wrong before a model is loaded; see `export_model`."""
    if keep_ratio is not None:
        check_keep_ratio(keep_ratio)
    if missing := missing_packages(kind):
        raise ImportError(f"--format {kind} needs {', '.join(missing)}: pip install 'everest-hf[{kind}]'")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out}: is not empty; give a new folder")


def missing_packages(kind: str) -> list[str]:
    """Return the names of the packages that a format needs and that are not installed."""
    return [package for package in NEEDS[kind] if importlib.util.find_spec(package) is None]


def real_clips(processor: EverestVideoProcessor, folder: Path, count: int) -> torch.Tensor:
    """Return pixel values (count, T, C, H, W) of videos in which things move, written into a folder and read again."""
    clips = []
    for i in range(count):
        path = folder / f"{i}.mp4"
        spec = MotionVideos(num_frames=64, height=192, width=256, num_sprites=12)
        write_mp4(render(spec, "val", i), path, Fraction(spec.fps), crf=str(spec.quality))
        clips.append(processor(str(path), return_tensors="pt")["pixel_values"])
        path.unlink()
    return torch.cat(clips)


# ---------------------------------------------------------------------- formats


def _dynamic_shapes(dynamic_batch: bool) -> dict | None:
    if not dynamic_batch:
        return None
    return {"pixel_values": {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}}


def _program(exported: Exported, clips: torch.Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(exported, (clips,), dynamic_shapes=_dynamic_shapes(dynamic_batch))


def _write_pt2(exported: Exported, clips: torch.Tensor, file: Path, dynamic_batch: bool) -> None:
    torch.export.save(_program(exported, clips, dynamic_batch), file)


def _write_onnx(exported: Exported, clips: torch.Tensor, file: Path, dynamic_batch: bool) -> None:
    size = sum(weight.nbytes for weight in exported.state_dict().values())
    torch.onnx.export(
        exported,
        (clips,),
        file,
        dynamo=True,
        input_names=["pixel_values"],
        output_names=[exported.output, "kept_ids"],
        dynamic_shapes=_dynamic_shapes(dynamic_batch),
        external_data=size > LARGEST_WHOLE,
        verbose=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what exporters say about themselves, and the graph that they print where they fail."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _run_pt2(file: Path) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    program = torch.export.load(file).module()
    return lambda pixel_values: list(program(pixel_values))


def _run_onnx(file: Path) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixel_values: [
        torch.from_numpy(np.asarray(value)) for value in session.run(None, {"pixel_values": pixel_values.numpy()})
    ]


_WRITERS: dict[str, Callable] = {"onnx": _write_onnx, "pt2": _write_pt2}
_RUNNERS: dict[str, Callable] = {".onnx": _run_onnx, ".pt2": _run_pt2}


@torch.no_grad()
def _check(name: str, file: Path, exported: Exported, batches) -> float:
    """Return by how much a file differs from the model at most.

    Raises:
        ValueError: by more than TOLERANCE, in values or in the tokens that are kept.
    """
    run = _RUNNERS[file.suffix](file)
    worst = 0.0
    for clips in batches:
        (found, ids), (expected, expected_ids) = run(clips), exported(clips)
        difference = (found - expected).abs().max().item()
        same = found.shape == expected.shape and torch.equal(ids, expected_ids)
        if not (same and difference <= TOLERANCE):
            what = f"gives values that are {difference:.2g} off" if same else "keeps other tokens"
            raise ValueError(f"{name}: the exported file {what}; it is not written")
        worst = max(worst, difference)
    return worst


# ---------------------------------------------------------------------- what lies beside it


def _write_settings(
    folder: Path, model: EverestPreTrainedModel, processor: EverestVideoProcessor, exported: Exported, file: str
) -> None:
    processor.to_json_file(folder / SETTINGS)
    model.config.to_json_file(folder / CONFIG, use_diff=False)
    (folder / README).write_text(readme_of(model.config, processor, exported.output, file), encoding="utf-8")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
