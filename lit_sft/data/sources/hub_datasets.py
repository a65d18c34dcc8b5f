"""Data sets in the storage of `datasets`: hub ids, its cache, and directories of `save_to_disk`."""

from __future__ import annotations

import logging
from textwrap import shorten
from typing import TYPE_CHECKING

from lit_sft import hub
from lit_sft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


def load_saved(folder: str, split: str, key: str) -> Dataset:
    """Loads a directory written by `Dataset.save_to_disk`, or one split of a `DatasetDict`.

    Raises:
        UserError: It cannot be read or has no such split.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(folder, keep_in_memory=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read the data set saved in `{folder}` (`{key}`): {shorten(str(error), 200)}"
        ) from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise UserError(
            f"`{folder}` has no split {split} but {', '.join(saved)}; set `{key}` to [{{path: ...,"
            " split: ...}]"
        )
    return saved[split]


def load_hub(repo: str, config: str | None, split: str, key: str) -> Dataset:
    """Loads a data set from the hub; from the local cache if the hub cannot be reached.

    No script of a data set is run. Without a network the check of the hub takes about 3 seconds.

    Raises:
        UserError: Neither hub nor cache has this data set, configuration or split.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    reason = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else why_unreachable(repo)
    try:
        if reason is None:
            return datasets.load_dataset(repo, config, split=split, keep_in_memory=False)
        cached = Cache(
            repo_id=repo,
            dataset_name=repo.split("/")[-1],
            config_name=config,
            version="auto",
            hash="auto",
        ).as_dataset(split=split)
        log.warning(
            "data set %s comes from the local cache, its newest state was not looked up: %s",
            repo,
            reason,
        )
        return cached
    except Exception as error:
        # Each library below `datasets` raises its own exceptions.
        reasons = shorten(
            "; ".join(filter(None, (reason, str(error) or type(error).__name__))), 300
        )
        raise UserError(
            f"cannot get data set '{repo}' from the Hugging Face hub ({reasons}); "
            f"give a local file or directory in `{key}`"
        ) from error


def why_unreachable(repo: str) -> str | None:
    """Returns the reason why the hub cannot serve the data set now; None if it can."""
    from huggingface_hub import HfApi

    error = hub.ask(lambda seconds: HfApi().dataset_info(repo, timeout=seconds))
    if error is None:
        return None
    return str(error) or type(error).__name__
