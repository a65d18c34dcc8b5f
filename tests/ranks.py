"""Runs a function in several processes of one gloo group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from running import RANKS_START


def run_ranks(function: Callable[..., None], *args: Any, world_size: int = 2) -> None:
    """Calls `function(*args)` on every rank; an error of one rank is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        given = (world_size, store, function, args)
        torch.multiprocessing.start_processes(_rank, given, world_size, start_method=RANKS_START)


def _rank(
    rank: int, world_size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=world_size
    )
    try:
        function(*args)
    finally:
        torch.distributed.destroy_process_group()
