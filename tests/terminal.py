"""What the command line says: the one line of a refused command, the log lines of one that runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from running import run


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """The lines that lit_sft logs meanwhile."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("lit_sft")
    others, logger.handlers = logger.handlers, [Keep()]
    propagates = (
        logger.propagate
    )  # a run stops that; then pytest would put handlers here, and later runs none
    try:
        yield lines
    finally:
        logger.handlers = others
        logger.propagate = propagates


def refused(capsys: Any, command: str, args: list[str], code: int = 1) -> str:
    """Runs a command that must end with this exit code and one line on the terminal; returns that
    line.
    """
    capsys.readouterr()
    with log_lines(), pytest.raises(SystemExit) as caught:
        run(command, args)
    assert caught.value.code == code
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(err) == 1 and err[0].startswith("error: "), err
    return err[0].removeprefix("error: ")
