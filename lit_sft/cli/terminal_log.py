"""Log lines and warnings on the terminal: ours, and those of libraries that apply here."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lit_sft import errors

log = logging.getLogger("lit_sft")

NOT_HERE = (
    # A batch is a slice of a memory-mapped file, so workers would not help.
    "does not have many workers",
    # We store the position in the data ourselves.
    "not resumable",
    "is smaller than the logging interval",
    # All ranks log the same value.
    "sync_dist=True)`",
    # There may be no validation set.
    "across ranks is zero",
    # Lightning calls a deprecated function of torch 2.13.
    "treespec, LeafSpec",
    # Lightning calls deprecated functions of jsonargparse.
    "deprecated",
    # `slurm.check_launch` refuses a job that needs srun and does not use it.
    "The `srun` command is available",
)
"""Parts of warnings that do not apply here."""


class _TerminalHandler(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which a progress bar replaces while it is drawn."""

    @property  # type: ignore[override]
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


def set_up() -> None:
    """Shows our log lines without prefix, and hides warnings of libraries that do not apply."""
    _show_own_lines()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # On some CPUs it warns that a kernel from the hub is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for text in NOT_HERE:
        warnings.filterwarnings("ignore", f".*{re.escape(text)}.*")
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _show_own_lines() -> None:
    if not log.handlers:
        handler = _TerminalHandler()
        handler.setFormatter(errors.RedactingFormatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.ERROR)  # type: ignore[attr-defined]
    log.propagate = False
