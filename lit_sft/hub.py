"""Model name of the user -> local directory, with a time limit on every request to the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from lit_sft.errors import UserError

TIMEOUT_SECONDS = 3.0
"""Time limit of a request to the hub. After that the local cache is used."""

GRACE_SECONDS = 0.5
"""Additional time for the thread, so that the HTTP client reports its own time-out, which is more
precise.
"""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# No sub-folders, which hold other formats of the same weights.
_DOWNLOAD = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
_WITHOUT_SAFETENSORS = "pytorch_model*.bin"
_DO_NOT_DOWNLOAD = ["*/*", "consolidated*.safetensors"]


def resolve(
    name_or_path: str,
    *,
    revision: str | None = None,
    key: str = "model.model_name_or_path",
    allow_adapter: bool = False,
) -> str:
    """Returns the local directory of a model: a directory, a download, or a cached download.

    If the hub cannot be reached, the Hugging Face libraries retry for most of a minute in every
    call. Here the hub gets one request, then the cache is used.

    Args:
        name_or_path: A directory or a hub id.
        revision: Branch, tag or commit of a hub id.
        key: The configuration key that holds `name_or_path`, for messages.
        allow_adapter: Whether a directory that holds only an adapter is accepted.

    Raises:
        UserError: There is no such model, or it cannot be downloaded.
    """
    if not name_or_path:
        raise UserError(f"{key} is empty: set it to a model directory or a hub id")
    local = Path(name_or_path).expanduser()
    if local.exists():
        _check_model_directory(local, key, allow_adapter)
        return str(local)
    if not _HUB_ID.fullmatch(name_or_path) or name_or_path.startswith("."):
        raise UserError(
            f"{key}: there is no directory {name_or_path}; set it to an existing directory or to a"
            " hub id"
        )
    directory = _fetch(name_or_path, revision, key)
    _check_model_directory(directory, key, allow_adapter)
    return str(directory)


def gguf_file(directory: str | Path) -> str | None:
    """Returns the name of the GGUF file that holds the weights of a directory.

    Returns:
        None if the directory has safetensors, or no GGUF file.

    Raises:
        UserError: The directory holds several GGUF files.
    """
    directory = Path(directory)
    files = sorted(directory.glob("*.gguf"))
    if not files or any(directory.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise UserError(
            f"{directory} holds {len(files)} .gguf files; leave one of them in a directory of"
            " its own"
        )
    return files[0].name


def ask(question: Callable[[float], Any]) -> Exception | None:
    """Sends one request to the hub, with a time limit.

    The request runs in a thread, because the time-out of an HTTP client covers neither name
    resolution nor the second address of a host.

    Args:
        question: Sends the request. It is called with the time-out in seconds for its HTTP client.

    Returns:
        None if the hub answered. Otherwise the error of the request, or a TimeoutError.
    """
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            question(TIMEOUT_SECONDS)
        except Exception as error:
            # The HTTP client differs between versions, and so do its errors.
            outcome.append(error)
        else:
            outcome.append(None)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS + GRACE_SECONDS)
    if not outcome:
        return TimeoutError(f"no answer within {TIMEOUT_SECONDS:g} s")
    return outcome[0]


def _fetch(repo_id: str, revision: str | None, key: str) -> Path:
    """Returns the snapshot of a hub id: downloaded, or from the cache if the hub does not answer.

    Raises:
        UserError: There is no such model, or it is neither downloadable nor cached.
    """
    from huggingface_hub import errors

    unreachable = _why_unreachable(repo_id, revision, key)
    try:
        snapshot = _download(repo_id, revision, unreachable is not None, _DOWNLOAD)
        if not any(snapshot.glob("*.safetensors")):
            patterns = [*_DOWNLOAD, _WITHOUT_SAFETENSORS]
            snapshot = _download(repo_id, revision, unreachable is not None, patterns)
    except errors.GatedRepoError as error:
        raise UserError(
            f"{key}: access to {repo_id} is gated; accept its conditions on the hub and log in with"
            " `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{key}: {repo_id} is neither a local directory nor complete in the local cache, and"
            f" the hub cannot be reached ({unreachable or _first_line(error)}); set {key} to a"
            " local model directory"
        ) from error
    except Exception as error:
        # The HTTP client differs between versions, and so do its errors.
        raise UserError(
            f"{key}: the download of {repo_id} failed ({_first_line(error)}); try again"
        ) from error
    return snapshot


def _download(repo_id: str, revision: str | None, is_offline: bool, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(
        repo_id,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=_DO_NOT_DOWNLOAD,
        local_files_only=is_offline,
    )
    return Path(snapshot)


def _why_unreachable(repo_id: str, revision: str | None, key: str) -> str | None:
    """Returns why the hub cannot serve a model now, or None if it can.

    Raises:
        UserError: The hub answered that there is no such model or revision.
    """
    from huggingface_hub import HfApi, errors

    error = ask(lambda seconds: HfApi().model_info(repo_id, revision=revision, timeout=seconds))
    if error is None:
        return None
    if isinstance(error, errors.RevisionNotFoundError):
        raise UserError(
            f"{key}: {repo_id} has no revision {revision!r}; change model.revision"
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise UserError(
            f"{key}: there is no directory {repo_id}, and the hub has no such model or shows it"
            " only to its members; mend the name, or log in with `hf auth login`"
        ) from error
    if isinstance(error, errors.HFValidationError):
        raise UserError(f"{key}: {repo_id!r} is neither a directory nor a valid hub id") from error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        return f"it answered {error.response.status_code}"
    return _first_line(error)


def _check_model_directory(path: Path, key: str, allow_adapter: bool) -> None:
    if not path.is_dir():
        raise UserError(f"{key}: {path} is a file; set it to the directory that holds the model")
    if (path / "config.json").is_file() or gguf_file(path) is not None:
        return
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"{key}: {path} is no model directory (no config.json)")
    if not allow_adapter:
        raise UserError(
            f"{key}: {path} holds an adapter, not a model; set it to the adapter's base model"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
