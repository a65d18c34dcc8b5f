"""Standard output and error that cannot end a run, whatever their encoding and their reader.

Only the standard library is imported here: it runs before what takes seconds to import.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO

TRAINS_OR_EVALUATES = ("fit", "validate", "test", "predict")
"""Commands that write their results to files. What they print may be lost."""


class KeepOn:
    """A stream that drops what its reader, a pipe or a terminal, no longer takes.

    Args:
        stream: Standard output or error.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        try:
            return self.stream.write(text)
        except (OSError, ValueError):
            self._leave()
            return len(text)

    def flush(self) -> None:
        """Flushes the stream, or drops what it holds."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._leave()

    def _leave(self) -> None:
        """Sends what the stream still holds, and all that follows, nowhere."""
        # ValueError: the stream is closed, so it has no descriptor either.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def set_up(args: list[str]) -> None:
    """Prints `?` for a character that the encoding lacks, and lets a run survive its reader.

    A program that reads the results of the other commands must learn that they were cut off, so
    there a lost reader remains an error.

    Args:
        args: The command line without the name of the program.
    """
    for stream in (sys.stdout, sys.stderr):
        # A stream that was closed before the start is None.
        if stream is not None:
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if args[:1] and args[0] in TRAINS_OR_EVALUATES:
        if sys.stdout is not None:
            sys.stdout = KeepOn(sys.stdout)  # type: ignore[assignment]
        if sys.stderr is not None:
            sys.stderr = KeepOn(sys.stderr)  # type: ignore[assignment]
