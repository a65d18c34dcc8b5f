"""Rows of csv and tsv files, as programs and people write them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TextIO

from lit_sft.errors import UserError

_SEPARATORS = (",", ";", "\t", "|")
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?')
"""The first line of a file for Excel that names its separator."""
_BACKSLASHES = re.compile(r'\\[\\"]?')
"""A backslash, with what it may escape."""


class CsvRows:
    """The rows of a csv file, as programs and people write it.

    Attributes:
        header: Names of the columns.

    Args:
        file: A text file, opened with `newline=""` and at its start.
        separator: What separates the columns, unless the file has another one.
        has_escapes: Whether a backslash stands before a quote within quotes.

    Raises:
        UserError: There is no header.
    """

    def __init__(self, file: TextIO, separator: str, has_escapes: bool = False) -> None:
        self._number = 0
        """Number of the last line that was read."""
        self._start = 0
        """Line before the row."""
        lines: Iterable[str] = file
        if has_escapes and _has_lone_backslashes(file):
            lines = map(_with_doubled_backslashes, file)
        self._lines = self._counted(lines)
        first = next(filter(str.strip, self._lines), "")
        declared = _SEPARATOR_LINE.fullmatch(first.strip("\r\n"))
        if declared is not None:
            separator = declared[1]
            first = next(filter(str.strip, self._lines), "")
        else:
            separator = _find_separator(first, separator)
        self._separator = separator
        self._start = self._number - 1
        reader = csv.reader(
            chain([first], self._lines),
            delimiter=separator,
            escapechar="\\" if has_escapes else None,
            # Who writes a space behind the separator in the header does so in every line.
            skipinitialspace=f"{separator} " in first,
            strict=True,
        )
        self._rows = self._located(reader)
        self.header = _header(next(self._rows, []))

    def __iter__(self) -> Iterator[list[str]]:
        """Yields the fields of each row that is not blank."""
        for fields in self._rows:
            if any(map(str.strip, fields)):
                yield self._fitted(fields)

    def _counted(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self._number += 1
            yield line

    def _located(self, reader: Iterator[list[str]]) -> Iterator[list[str]]:
        """Yields rows, and adds to errors where the row begins."""
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"line {self._start + 1}: {error} (the separator is {self._separator!r}); write"
                    ' a quote within quotes as ""'
                ) from None
            if fields is None:
                return
            yield fields
            self._start = self._number

    def _fitted(self, fields: list[str]) -> list[str]:
        """Drops blank fields behind the last column."""
        num_columns = len(self.header)
        if not any(map(str.strip, fields[num_columns:])):
            fields = fields[:num_columns]
        if len(fields) == num_columns:
            return fields
        raise UserError(
            f"line {self._start + 1}: {fields!s:.80} has {len(fields)} fields, the header"
            f" {num_columns} (the separator is {self._separator!r}); put fields that contain it in"
            " quotes"
        )


def _find_separator(header: str, expected: str) -> str:
    """Returns the expected separator, or another one if only that one separates names."""
    if len(_names(header, expected)) > 1:
        return expected
    return max((expected, *_SEPARATORS), key=lambda separator: len(_names(header, separator)))


def _names(header: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([header], delimiter=separator))
    except csv.Error:
        return []


def _header(fields: list[str]) -> list[str]:
    """Names the columns; blank names at the end are no columns.

    A blank name before them gets a number: pandas writes none for the index.
    """
    names = [name.strip() for name in fields]
    while names and not names[-1]:
        names.pop()
    names = [name or f"column {i + 1} without a name" for i, name in enumerate(names)]
    if not names or len(set(names)) < len(names) or any(len(name) > 64 for name in names):
        raise UserError(
            "the first line is no header (its names must be short, different and not empty); add"
            " one"
        )
    return names


def has_escaped_quotes(path: str) -> bool:
    """Whether a file has a backslash before a quote."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        return any('\\"' in line for line in file)


def _has_lone_backslashes(file: TextIO) -> bool:
    """Whether a file has backslashes that escape nothing, as in LaTeX or Windows paths.

    Otherwise its writer escaped backslashes, too, as `csv.writer` does.
    """
    found = any("\\" in _BACKSLASHES.findall(line) for line in file)
    file.seek(0)
    return found


def _with_doubled_backslashes(line: str) -> str:
    """Escapes all backslashes of a line but those that escape a quote."""
    return _BACKSLASHES.sub(_doubled, line)


def _doubled(found: re.Match[str]) -> str:
    if found.group() == '\\"':
        return found.group()
    return found.group() * 2
