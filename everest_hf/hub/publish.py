"""Publishing on the Hub: what of a run is published, whether it may be, and the uploads."""

import logging
import os
import shutil
from concurrent.futures import Future
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from transformers.dynamic_module_utils import get_relative_imports

from ..inference.loading import model_folder
from ..training.run import Run
from .card import CARD, make_card, named_for_hub, public_recipe

logger = logging.getLogger(__name__)

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
PARTS = {
    "weights": WEIGHTS,
    "configuration": ("config.json",),
    "code of the configuration": ("configuration_everest.py",),
    "code of the model": ("modeling_everest.py",),
    "code of the processor": ("video_processing_everest.py", "video_reading_everest.py"),
    "processor": ("video_preprocessor_config.json",),
}
RECIPE = "recipe.yaml"
# Files of the run that are published beside its recipe.
RECORDS = ("log.jsonl", "curves.png", "tokens.png")


# ------------------------------------------------------------------------------------------------ what is published


def published_files(folder: Path, repo: str, card: str | None = None) -> dict[str, Path | bytes]:
    """Return the files that are published of a model's folder and of its run: by name, a path or the content.

    card: the text of the model card; by default the folder's README.md, or else one that is made from the configuration
    and titled as `repo`. The recipe is published without private parts of paths.

    Raises:
        FileNotFoundError, ValueError: no such folder, or a part of the model is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    files: dict[str, Path | bytes] = {}
    for what, patterns in PARTS.items():
        found = {path.name: path for path in folder.iterdir() if _matches(path.name, patterns)}
        if not found:
            raise ValueError(f"{folder}: has no {what} ({patterns[0]}); model and processor are saved there together")
        files |= found
    files |= _imported(folder, files)
    if card is None:
        path = folder / CARD
        card = path.read_text(encoding="utf-8") if path.is_file() else make_card(folder, name=repo.split("/")[-1])
    return files | {CARD: card.encode()} | _records(folder)


def _imported(folder: Path, files: dict[str, Path | bytes]) -> dict[str, Path]:
    """Return the files that the code in a model's folder imports, by name."""
    found: dict[str, Path] = {}
    waiting = [path for path in files.values() if isinstance(path, Path) and path.suffix == ".py"]
    while waiting:  # what is imported imports other files
        code = waiting.pop()
        for path in (folder / f"{name}.py" for name in get_relative_imports(code)):
            if not path.is_file():
                raise ValueError(f"{folder}: has no {path.name}, which {code.name} imports")
            if path.name not in found:
                found[path.name] = path
                waiting.append(path)
    return found


def _records(folder: Path) -> dict[str, bytes]:
    """Return the records of the run that a model's folder belongs to. They are read now, as a run still adds to them."""
    run = next((place for place in (folder.parent, folder.parent.parent) if (place / RECIPE).is_file()), None)
    if run is None:
        return {}
    recipe = public_recipe((run / RECIPE).read_text(encoding="utf-8")).encode()
    return {RECIPE: recipe} | {name: (run / name).read_bytes() for name in RECORDS if (run / name).is_file()}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# ------------------------------------------------------------------------------------------------------ the Hub


@contextmanager
def _in_one_line(repo: str):
    """Turn the errors of the Hub's client into a ValueError, or a ConnectionError, of one line."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise ValueError(f"{repo}: the Hub wants a token; `hf auth login` stores one, or set HF_TOKEN") from None
    except HFValidationError:
        raise ValueError(f"{repo}: is no name of a repository; expected name or user/name") from None
    except OfflineModeIsEnabled:
        raise ConnectionError(f"{repo}: the Hub is out of reach while HF_HUB_OFFLINE is set") from None
    except (HTTPError, RuntimeError) as error:
        # The client wraps errors of large files in a RuntimeError.
        reason = error if isinstance(error, HTTPError) else error.__cause__ or error
        if isinstance(reason, HfHubHTTPError):
            raise ValueError(f"{repo}: {_refusal(reason)}") from error
        raise ConnectionError(f"{repo}: the Hub at {HfApi().endpoint} cannot be reached: {reason}") from error


def _refusal(error: HfHubHTTPError) -> str:
    said = " ".join((error.server_message or str(error)).split())
    status = error.response.status_code
    if status == 401:
        return f"the Hub does not know the token; `hf auth login` stores another, or set HF_TOKEN ({said})"
    if status == 403:
        return f"the token has no right to write there ({said})"
    return f"the Hub answers {status}: {said}"


def open_repository(repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Create a repository if need be, check that one may push to it, and return its full name.

    private: create it so that nobody else sees it. revision: the branch to push to, created from main.

    Raises:
        ValueError: there is no token or a wrong one, `repo` is no name of a repository, one may not write to it, or it
            is public although `private` was asked for. ConnectionError: the Hub cannot be reached.
    """
    api = HfApi()
    with _in_one_line(repo):
        api.whoami()
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise ValueError(f"{repo}: is public already; make it private on the Hub, or push without --private")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        # This uploads nothing, as small files go with the commit; but the Hub refuses whoever may not write.
        api.preupload_lfs_files(repo, [CommitOperationAdd(CARD, b"-")], revision=revision)
    return repo


def upload(
    files: dict[str, Path | bytes], repo: str, *, revision: str | None = None, message: str | None = None
) -> str:
    """Commit `published_files` to a repository, all or none, and return its URL.

    The new weights replace those in the repository. The example in the card names the repository.

    Raises:
        ValueError, ConnectionError: the Hub refused the upload, or it broke off; the repository is as before.
    """
    api = HfApi()
    card = named_for_hub(files[CARD].decode(), repo)  # type: ignore[union-attr]  # no path: `published_files` reads it
    with _in_one_line(repo):
        # Stale weights in one file would be loaded instead of new weights in several.
        stored = api.list_repo_files(repo, revision=revision)
        stale = [name for name in stored if _matches(name, WEIGHTS) and name not in files]
        added = [CommitOperationAdd(name, source) for name, source in {**files, CARD: card.encode()}.items()]
        removed = [CommitOperationDelete(name) for name in stale]
        api.create_commit(
            repo, [*added, *removed], commit_message=message or "Upload EVEREST model", revision=revision
        )
    return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def push(
    checkpoint: str | os.PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Publish a checkpoint, or the result of a run, and return its URL.

    checkpoint: the folder of a model or of a run. The other arguments and errors as in `published_files`,
    `open_repository` and `upload`.
    """
    files = published_files(model_folder(checkpoint), repo)
    repo = open_repository(repo, private=private, revision=revision)
    return upload(files, repo, revision=revision, message=message)


class Uploads:
    """The uploads of a run: checkpoints during the training, one at a time, and the result at its end.

    repo: the repository's name; "" if this process pushes nothing, for want of a repository or as not the main process.
    """

    def __init__(self, repo: str | None, folder: Path, accelerator: Accelerator):
        """Check that one may push; errors as in `open_repository`."""
        self.repo = open_repository(repo) if repo and accelerator.is_main_process else ""
        self.held = folder / ".upload"
        self._running: Future | None = None

    def start(self, checkpoint: Path, run: Run, steps: int) -> None:
        """Start to upload a checkpoint of `steps` steps while the training goes on, unless another upload is running.

        If it fails, a warning is logged.
        """
        if self._running is not None and not self._running.done():
            return
        try:
            files = self._hold(published_files(checkpoint, self.repo, make_card(checkpoint, run, steps=steps)))
        except (ValueError, OSError) as error:
            logger.warning("%s not pushed: %s", checkpoint, error)
            return
        self._running = HfApi().run_as_future(upload, files, self.repo, message=f"Step {steps}")
        self._running.add_done_callback(self._warn)

    def finish(self, model: Path) -> str:
        """Upload the result of the run and return its URL.

        Raises:
            ValueError: the upload failed; the message names the command that tries again.
        """
        if self._running is not None:
            self._running.exception()  # waits
        shutil.rmtree(self.held, ignore_errors=True)
        try:
            return upload(published_files(model, self.repo), self.repo, message="Result of the run")
        except (ValueError, OSError) as error:
            again = f"all is saved; `everest-hf push {model} {self.repo}` tries again"
            raise ValueError(f"{error}; {again}") from error

    def _hold(self, files: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
        """Return links to the files, or copies, that stay until the upload ends; the run may delete the checkpoint earlier."""
        shutil.rmtree(self.held, ignore_errors=True)
        self.held.mkdir()
        for name, source in files.items():
            if isinstance(source, Path):
                try:
                    os.link(source, self.held / name)
                except OSError:  # not every file system has links
                    shutil.copyfile(source, self.held / name)
                files[name] = self.held / name
        return files

    def _warn(self, done: Future) -> None:
        if done.exception() is not None:
            logger.warning("checkpoint not pushed: %s", done.exception())
