"""What appears on the terminal: our own log lines, and the warnings of libraries that apply
here.
"""

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
    # Batches are slices of a mapped file.
    "does not have many workers",
    # The position is ours.
    "not resumable",
    "is smaller than the logging interval",
    # All ranks log the same.
    "sync_dist=True)`",
    # No validation set.
    "across ranks is zero",
    # Lightning with torch 2.13.
    "treespec, LeafSpec",
    # Of jsonargparse, by Lightning.
    "deprecated",
    # Where it is needed and not used, that is an error of ours.
    "The `srun` command is available",
)
"""Advice of libraries that does not apply."""


class _TerminalHandler(logging.StreamHandler):
    """Writes to what is `sys.stderr` at that moment: a progress bar that is drawn puts lines above
    itself there.
    """

    @property  # type: ignore[override]
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


def set_up() -> None:
    """Shows our own log lines, plain; of the libraries only warnings that apply here."""
    _show_own_lines()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # On some CPUs it misses a kernel of the hub.
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
