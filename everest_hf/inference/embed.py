"""Features of videos: one vector a video, for retrieval, clustering or a classifier on top."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import VideoViews, class_names_of, collate, transforms
from ..data.rows import paths_of
from ..data.segments import segments_in
from ..data.workers import keep_freed_memory, naming_lost_workers, num_cores
from ..files import held, put_in_place
from ..modeling_everest import EverestForVideoClassification, EverestPreTrainedModel
from ..video import VideoError

logger = logging.getLogger(__name__)

# Videos whose features are kept together, and at most lost when a run is killed.
SHARD = 128
DESCRIPTION = "run.json"


@dataclass(frozen=True)
class Features:
    """Features of the videos of some rows: embeddings float32 (n, D), index int64 (n,), the row of each of them, and
    bad, (path, reason) of each video that cannot be read.
    """

    embeddings: torch.Tensor
    index: torch.Tensor
    bad: list[tuple[str, str]]

    @classmethod
    def joined(cls, parts: "Iterable[Features]") -> "Features":
        """Return all of them, in the order of the parts."""
        embeddings, index, bad = zip(*((part.embeddings, part.index, part.bad) for part in parts), strict=True)
        return cls(torch.cat(embeddings), torch.cat(index), [entry for entries in bad for entry in entries])


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
    return lambda pixel_values: model(pixel_values, keep_ratio=keep_ratio).last_hidden_state.float().mean(dim=1)


def embed_videos(
    model: EverestPreTrainedModel,
    views: VideoViews,
    out: str | os.PathLike,
    *,
    keep_ratio: float | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
) -> list[VideoError]:
    """Write the features of videos into the file `out`, and return the videos that cannot be read.

    views: with count_unreadable=True. A video's feature is the mean over its views, see `feature_function` for what it
    is of a view; an unreadable video has none. The suffix of `out` chooses the format, see FORMATS.

    `out` appears when it is whole. Until then finished parts lie beside it, in the folder .partial-<name>, and the
    same call goes on from there. `num_workers` processes decode, by default one a core.

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
    with held(parts):
        _open_parts(parts, {"model": _digest_of_model(model), "rows": _digest_of_rows(rows), **settings})
        batches = _missing_batches(len(rows), parts, batch_size)
        _embed_batches(batches, views, num_workers or num_cores(), parts, feature_function(model, keep_ratio), model)
        features = Features.joined([_read_part(_part_of(parts, row)) for row in range(0, len(rows), SHARD)])
        about = {"model": model.name_or_path, **settings}
        about = {key: json.dumps(value) for key, value in about.items()}
        _write_whole(out, lambda aside: write(aside, features, rows, about), parts)
        shutil.rmtree(parts)
    return [VideoError(path, reason) for path, reason in features.bad]


# ---------------------------------------------------------------------- the work


def _missing_batches(count: int, parts: Path, batch_size: int) -> list[list[int]]:
    """Return the batches of `count` rows of which there is no part yet; no batch goes beyond a part."""
    missing = (start for start in range(0, count, SHARD) if not _is_whole(_part_of(parts, start)))
    ranges = [range(start, min(start + SHARD, count)) for start in missing]
    return [list(rows[i : i + batch_size]) for rows in ranges for i in range(0, len(rows), batch_size)]


@torch.inference_mode()
def _embed_batches(
    batches: list[list[int]],
    views: VideoViews,
    num_workers: int,
    parts: Path,
    function: Callable,
    model: EverestPreTrainedModel,
) -> None:
    """Write the parts that the batches make up."""
    loader = DataLoader(
        views, batch_sampler=batches, num_workers=num_workers, collate_fn=collate, worker_init_fn=keep_freed_memory
    )
    num_rows, done = len(views), len(views) - sum(map(len, batches))
    found = []
    with tqdm(total=num_rows, initial=done, desc="embed", unit="video") as bar, naming_lost_workers():
        for batch in loader:
            found.append(_features_of(batch, model, function))
            bar.update(len(batch["index"]))
            following = int(batch["index"][-1]) + 1
            if following % SHARD == 0 or following == num_rows:
                _write_part(_part_of(parts, following - 1), Features.joined(found))
                found = []


def _features_of(batch: dict[str, Any], model: EverestPreTrainedModel, function: Callable) -> Features:
    views, readable = batch["pixel_values"], ~batch["unreadable"]  # (B, V, T, C, h, w), (B,)
    clips = transforms.normalize(views.flatten(0, 1).to(model.device), model.config.image_mean, model.config.image_std)
    embeddings = function(clips).unflatten(0, views.shape[:2]).mean(dim=1).cpu()  # (B, D)
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
        _write_whole(path, lambda aside: aside.write_text(json.dumps(description)))


def _part_of(parts: Path, row: int) -> Path:
    return parts / f"{row // SHARD:06d}.safetensors"


def _write_part(path: Path, features: Features) -> None:
    tensors = {"embeddings": features.embeddings, "index": features.index}
    _write_whole(path, lambda aside: save_file(tensors, aside, {"bad": json.dumps(features.bad)}))


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


def _write_whole(path: Path, write: Callable[[Path], Any], place: Path | None = None) -> None:
    """Let `write` write a file that has its name when it is whole; until then it lies in `place`, or beside it."""
    aside = (place or path.parent) / f"{path.name}.growing"
    try:
        write(aside)
        put_in_place(aside, path)
    except (OSError, SafetensorError) as error:  # a full disk, for instance, whose error may not name the file
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _digest_of_model(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of_rows(rows: Dataset) -> str:
    labels = list(rows["label"]) if "label" in rows.column_names else None
    known = [paths_of(rows), labels, *([segments] if (segments := segments_in(rows)) else [])]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------------- formats


def writer_of(out: Path) -> Callable:
    """Return the function that writes the format of a file name.

    Raises:
        ValueError: the suffix is none of FORMATS.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"{out}: cannot tell the format; expected a name ending in {' or '.join(FORMATS)}")
    return FORMATS[out.suffix]


def write_safetensors(path: Path, features: Features, rows: Dataset, about: dict[str, str]) -> None:
    """Write tensors embeddings float32 (n, D), index int64 (n,), and labels int64 (n,) where the rows have them.

    The metadata hold, as JSON, the paths of the n videos, the names of the classes, `about`, and of rows with segments
    the n starts and ends, by the names of their columns.
    """
    names, chosen = paths_of(rows), features.index.tolist()
    segments = {name: [values[row] for row in chosen] for name, values in segments_in(rows).items()}
    about = {**about, **{name: json.dumps(values) for name, values in segments.items()}}
    videos = [names[row] for row in chosen]
    tensors = {"embeddings": features.embeddings, "index": features.index}
    if "label" in rows.column_names:
        tensors["labels"] = torch.tensor(list(rows["label"]))[features.index]
    save_file(
        tensors,
        path,
        {**about, "videos": json.dumps(videos), "class_names": json.dumps(class_names_of(rows))},
    )


def write_parquet(path: Path, features: Features, rows: Dataset, about: dict[str, str]) -> None:
    """Write a table with a row a video: video (path), start and end of a segment (or start_frame and end_frame), label
    (name of the class where known), embedding (D floats).
    """
    names, classes, chosen = paths_of(rows), class_names_of(rows), features.index.tolist()
    columns = {"video": [names[row] for row in chosen]}
    columns |= {name: [values[row] for row in chosen] for name, values in segments_in(rows).items()}
    if "label" in rows.column_names:
        labels = [classes[label] if classes else label for label in rows["label"]]
        columns["label"] = [labels[row] for row in chosen]
    flat = pa.array(features.embeddings.flatten().numpy())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, features.embeddings.shape[1])
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path)


FORMATS = {".safetensors": write_safetensors, ".parquet": write_parquet}
