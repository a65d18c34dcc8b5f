"""`cache list` and `cache clean`: the directory of tokenized data, without any heavy import."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lit_sft.data.cache_entries import default_folder, in_words, list_entries, total, trim

_DAY = 24 * 60 * 60


def run(program: str, args: list[str]) -> int:
    """Runs the command.

    Args:
        program: Name of the program, for the help.
        args: What follows `cache` on the command line.

    Returns:
        The exit code.
    """
    options = _parser(program).parse_args(args)
    folder = Path(options.cache_dir).expanduser() if options.cache_dir else default_folder()
    if not folder.is_dir():
        print(f"error: {folder} is no directory; correct --cache_dir", file=sys.stderr)
        return 1
    if options.action == "list":
        _list(folder)
    else:
        _clean(folder, options.max_gb)
    return 0


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program} cache",
        description="List or clean the cache of tokenized data (`data.cache_dir`).",
    )
    parser.add_argument("action", choices=("list", "clean"))
    parser.add_argument(
        "--cache_dir", help="the directory; by default lit_sft in the user's cache directory"
    )
    parser.add_argument(
        "--max_gb",
        type=_size,
        default=0.0,
        help="clean: keep the entries used last, up to this size together; default 0",
    )
    return parser


def _size(text: str) -> float:
    value = float(text)
    # Also false for nan.
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no size, expected 0 or more GB")
    return value


def _list(folder: Path) -> None:
    entries = list_entries(folder)
    for entry in entries:
        days = (time.time() - entry.used) / _DAY
        print(f"{in_words(entry.size):>9}  used {days:.1f} days ago  {entry.name}  {entry.path}")
    print(f"{len(entries)} entries, {total(entries)} in {folder}")


def _clean(folder: Path, max_gb: float) -> None:
    removed = trim(folder, max_gb * 1e9)
    left = list_entries(folder)
    print(f"removed {len(removed)} entries, {total(removed)}")
    print(f"{len(left)} entries, {total(left)} are left in {folder}")
    num_in_use = sum(entry.is_in_use for entry in left)
    if num_in_use:
        print(f"{num_in_use} of them were used in the last day, so a run may have them open")
