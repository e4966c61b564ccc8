"""Features of videos: one vector a video, for retrieval, clustering or a classifier on top."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import nn

from ..data import VideoViews
from ..data.rows import paths_of
from ..data.segments import segments_in
from ..files import LOCK, held, part_suffix, put_in_place, write_whole
from ..modeling_everest import EverestForVideoClassification, EverestModelOutput, EverestPreTrainedModel
from ..packing_everest import mean_of_tokens
from ..video import VideoError
from .batches import pixel_values_of, reading
from .features import Features, save_tensors, writer_of

logger = logging.getLogger(__name__)

# Videos whose features are kept together, and at most lost when a run is killed.
SHARD = 128
DESCRIPTION = "run.json"


def feature_function(
    model: EverestPreTrainedModel, keep_ratio: float | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from pixel values (B, T, C, H, W) to features (B, D) float32.

    Of a classifier, whose last linear layer is replaced by the identity, they are what this layer saw: with mean
    pooling, fc_norm of the mean of the encoder's tokens. Of an `EverestModel` they are the mean of its tokens, after
    its final LayerNorm where it has one; a pre-training checkpoint loaded with use_mean_pooling=False has it.
    keep_ratio: as in the model's forward.
    """
    if isinstance(model, EverestForVideoClassification):
        model.classifier = nn.Identity()  # type: ignore[assignment]  # another kind of module than it was
        return lambda pixel_values: model(pixel_values, keep_ratio=keep_ratio).logits.float()
    return lambda pixel_values: _mean_token(model(pixel_values, keep_ratio=keep_ratio))


def _mean_token(output: EverestModelOutput) -> torch.Tensor:
    return mean_of_tokens(output.last_hidden_state.float(), output.packing)[:, 0]


def embed_videos(
    model: EverestPreTrainedModel,
    views: VideoViews,
    out: str | os.PathLike,
    *,
    keep_ratio: float | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> list[VideoError]:
    """Write the features of videos into the file `out`, and return the videos that cannot be read.

    views: with count_unreadable=True. A video's feature is the mean over its views, see `feature_function` for what it
    is of a view; an unreadable video has none. The suffix of `out` chooses the format, see FORMATS.

    `out` appears when it is whole. Until then finished parts lie beside it, in the folder .partial-<name>, and the
    same call goes on from there. `num_workers` processes decode, by default one a core. shard: (i, n) makes the i-th of
    every n parts and not `out`, so that n processes, on machines that share the folder, make all; a call without it then
    makes what is missing, and `out`.

    Raises:
        ValueError: the suffix is unknown, or the parts beside `out` belong to another model, other videos or settings.
        FileExistsError: `out` is there already.
        OSError: a file cannot be written. BlockingIOError: another process writes the same file.
    """
    out, rows = Path(out), views.rows
    write = writer_of(out)
    if out.exists():
        raise FileExistsError(f"{out}: is there already; remove it, or choose another file")
    settings = {
        **asdict(views.sampling),
        "num_segments": views.num_segments,
        "num_crops": views.num_crops,
        "keep_ratio": keep_ratio or model.config.keep_ratio,
    }
    parts = out.with_name(f".partial-{out.name}")
    with held(parts, f"{LOCK}{part_suffix(shard)}"):
        digest = digest_of_model(model)
        _open_parts(parts, {"model": digest, "rows": _digest_of_rows(rows), **settings})
        own = range(0, len(rows), SHARD)[shard[0] :: shard[1]]
        batches = _missing_batches(own, len(rows), parts, batch_size)
        with reading(views, batches, num_workers=num_workers, description="embed", total=len(rows)) as found:
            _write_parts(found, parts, len(rows), feature_function(model, keep_ratio), model)
        found_of = [_read_part(_part_of(parts, row)) for row in own]
        if shard[1] > 1:
            return [VideoError(*error) for part in found_of for error in part.bad]
        features = Features.joined(found_of)
        about = {"model": model.name_or_path, "weights": digest, **settings}
        about = {key: json.dumps(value) for key, value in about.items()}
        write_whole(out, lambda aside: write(aside, features, rows, about), parts)
        shutil.rmtree(parts)
    return [VideoError(path, reason) for path, reason in features.bad]


# ---------------------------------------------------------------------- the work


def _missing_batches(starts: Sequence[int], count: int, parts: Path, batch_size: int) -> list[list[int]]:
    """Return the batches of the parts from these of `count` rows on that are not there yet; none goes beyond a part."""
    missing = (start for start in starts if not _is_whole(_part_of(parts, start)))
    ranges = [range(start, min(start + SHARD, count)) for start in missing]
    return [list(rows[i : i + batch_size]) for rows in ranges for i in range(0, len(rows), batch_size)]


def _write_parts(
    batches: Iterator[dict[str, Any]], parts: Path, num_rows: int, function: Callable, model: EverestPreTrainedModel
) -> None:
    """Write the parts that the batches make up."""
    found = []
    for batch in batches:
        found.append(features_of(batch, model, function))
        following = int(batch["index"][-1]) + 1
        if following % SHARD == 0 or following == num_rows:
            _write_part(_part_of(parts, following - 1), Features.joined(found))
            found = []


@torch.inference_mode()
def features_of(batch: dict[str, Any], model: EverestPreTrainedModel, function: Callable) -> Features:
    """Return the features of a batch of views, by a function of their pixel values (see `feature_function`)."""
    views, readable = batch["pixel_values"], ~batch["unreadable"]  # (B, V, T, C, h, w), (B,)
    embeddings = function(pixel_values_of(batch, model)).unflatten(0, views.shape[:2]).mean(dim=1).cpu()  # (B, D)
    return Features(embeddings[readable], batch["index"][readable], batch["bad"])


# ---------------------------------------------------------------------- parts


def _open_parts(folder: Path, description: dict[str, Any]) -> None:
    """See that the folder of the parts is new, or of a run of the same description that was interrupted."""
    path = folder / DESCRIPTION
    if path.is_file():
        try:
            known = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{path} is damaged; remove {folder}") from None
        different = [key for key, value in description.items() if known.get(key) != value]
        if different:
            raise ValueError(
                f"{folder}: holds parts of other features (different: {', '.join(different)}); "
                "remove it, or choose another output"
            )
    else:
        # By a name of its own: another process may begin with its share of the parts at the same time.
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{DESCRIPTION}-", delete=False) as aside:
            aside.write(json.dumps(description))
        put_in_place(Path(aside.name), path)


def _part_of(parts: Path, row: int) -> Path:
    return parts / f"{row // SHARD:06d}.safetensors"


def _write_part(path: Path, features: Features) -> None:
    tensors = {"embeddings": features.embeddings, "index": features.index}
    write_whole(path, lambda aside: save_tensors(tensors, aside, {"bad": json.dumps(features.bad)}))


def _read_part(path: Path) -> Features:
    with safe_open(path, "pt") as file:
        bad = [(name, reason) for name, reason in json.loads(file.metadata()["bad"])]
        return Features(file.get_tensor("embeddings"), file.get_tensor("index"), bad)


def _is_whole(path: Path) -> bool:
    """Say whether there is a part; one that is damaged is named in a warning, and as good as none."""
    if not path.exists():
        return False
    try:
        _read_part(path)
    except (SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s is damaged (%s) and made again", path, error)
        return False
    return True


def digest_of_model(model: nn.Module) -> str:
    """Return what tells the weights of a model from others."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of_rows(rows: Dataset) -> str:
    labels = list(rows["label"]) if "label" in rows.column_names else None
    known = [paths_of(rows), labels, *([segments] if (segments := segments_in(rows)) else [])]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
