"""`Rows`: an index into the rows of files. Choosing and repeating rows only changes the index."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lit_sft.errors import UserError

log = logging.getLogger(__name__)

Index = npt.NDArray[np.int64]


class Indexed(Protocol):
    """Values that are read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


@dataclass(frozen=True)
class FilePart:
    """The rows of one file, of one split of a saved or hub data set, or of a built-in task."""

    name: str
    """Path or name as the user wrote it, for messages."""
    fingerprint: str
    """Hash of the content, without path and date: a changed file never matches an old cache."""
    rows: Indexed
    """N rows. A row that is no object is refused when it is read."""
    lines: Indexed | None = None
    """[N] line of each row, from 0. None if the file has no lines."""


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows, read one at a time. Forked workers may share it, and it can be pickled."""

    name: str
    """Name of the source as the user wrote it."""
    parts: tuple[FilePart, ...]
    sources: tuple[tuple[str, int], ...]
    """(name, number of parts) of each member of a mixture, in the order of the parts.

    Without a mixture there is one.
    """
    origins: Index
    """[N] int64: index of each row into the rows of all parts, equal for copies of a row."""

    def __len__(self) -> int:
        """Number of rows N."""
        return len(self.origins)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Reads row `i`.

        Raises:
            UserError: The row cannot be read. The message lacks the place, see `where`.
        """
        part, place = self._find(i)
        row = part.rows[place]
        if not isinstance(row, dict):
            raise UserError(
                f"the row is a {type(row).__name__}, expected an object; repair or remove it"
            )
        return row

    def where(self, i: int) -> str:
        """Returns the place of row `i` for messages.

        Such as `train.jsonl line 12` (from 1) or `alpaca.json row 3` (from 0).
        """
        part, place = self._find(i)
        if part.lines is None:
            return f"{part.name} row {place}"
        return f"{part.name} line {part.lines[place] + 1}"

    def head(self, count: int) -> list[dict[str, Any]]:
        """Returns the first `count` rows without bad ones, which are refused when they are used."""
        rows: list[dict[str, Any]] = []
        for i in range(len(self)):
            if len(rows) == count:
                break
            try:
                rows.append(self[i])
            except UserError:
                continue
        return rows

    def columns(self) -> list[str]:
        """Lists the columns of the first 100 rows."""
        columns: dict[str, None] = {}
        for row in self.head(100):
            columns.update(dict.fromkeys(row))
        return list(columns)

    def source_of(self, i: int) -> int:
        """Returns the index of row `i` into `sources`."""
        if len(self.sources) == 1:
            return 0
        return int(subset(self, [i]).source_ids()[0])

    def source_ids(self) -> Index:
        """Returns [N] int64: the index of each row into `sources`."""
        part_ids = np.searchsorted(self._ends, self.origins, side="right")
        ends_of_sources = np.cumsum([num_parts for _, num_parts in self.sources])
        return np.searchsorted(ends_of_sources, part_ids, side="right")

    def counts(self) -> list[tuple[str, int]]:
        """Returns (name, number of rows) of each source, with copies."""
        counted = np.bincount(self.source_ids(), minlength=len(self.sources))
        return [(name, int(rows)) for (name, _), rows in zip(self.sources, counted, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content of all parts, and of the choice and order of the rows."""
        parts = repr([(part.fingerprint, len(part.rows)) for part in self.parts])
        return hashlib.sha256(parts.encode() + self.origins.tobytes()).hexdigest()

    @cached_property
    def _ends(self) -> Index:
        return np.cumsum([len(part.rows) for part in self.parts], dtype=np.int64)

    def _find(self, i: int) -> tuple[FilePart, int]:
        origin = int(self.origins[i])
        number = int(np.searchsorted(self._ends, origin, side="right"))
        part = self.parts[number]
        start = int(self._ends[number]) - len(part.rows)
        return part, origin - start


def join(name: str, parts: Sequence[FilePart]) -> Rows:
    """Concatenates the rows of all parts."""
    num_rows = sum(len(part.rows) for part in parts)
    return Rows(name, tuple(parts), ((name, len(parts)),), np.arange(num_rows, dtype=np.int64))


def mix(name: str, members: Iterable[tuple[Rows, float]], seed: int) -> Rows:
    """Concatenates the members of a mixture, with repeated rows.

    The rows stay in order. Shuffling is up to the order of training.

    Args:
        name: Name of the mixture.
        members: (rows, weight) of each. Weight 2.0 takes all rows twice, 0.5 takes half of them.
        seed: Chooses the rows for the fraction of a weight.
    """
    parts: list[FilePart] = []
    sources: list[tuple[str, int]] = []
    origins: list[Index] = []
    for number, (rows, weight) in enumerate(members):
        whole, share = divmod(weight, 1.0)
        order = np.random.default_rng((seed, number)).permutation(len(rows))
        some = np.sort(order[: round(share * len(rows))])
        offset = sum(len(part.rows) for part in parts)
        origins += [rows.origins + offset] * int(whole) + [rows.origins[some] + offset]
        parts += rows.parts
        sources += rows.sources
    return Rows(name, tuple(parts), tuple(sources), np.concatenate(origins))


def subset(rows: Rows, indices: npt.ArrayLike) -> Rows:
    """Chooses the rows at `indices` ([M] integers), in that order. They keep their place."""
    return replace(rows, origins=rows.origins[np.asarray(indices, dtype=np.int64)])


def by_source(rows: Rows) -> dict[int, Rows]:
    """Returns {index into `Rows.sources`: rows} for each member of a mixture that has rows."""
    if len(rows.sources) == 1:
        return {0: rows}
    ids = rows.source_ids()
    members = {}
    for source in np.unique(ids).tolist():
        name, _ = rows.sources[source]
        members[source] = replace(subset(rows, np.flatnonzero(ids == source)), name=name)
    return members


def limit(rows: Rows, count: int) -> Rows:
    """Returns the `first_rows` for `data.max_samples`, and logs their number.

    Raises:
        UserError: `count` is not positive.
    """
    if count < 1:
        raise UserError(
            f"`data.max_samples` is {count}, expected at least 1 (or null for all rows)"
        )
    if count < len(rows):
        log.info(
            "%s: the first %s of %s rows (data.max_samples)",
            rows.name,
            f"{count:,}",
            f"{len(rows):,}",
        )
    return first_rows(rows, count)


def first_rows(rows: Rows, count: int | None) -> Rows:
    """Returns the first `count` rows; None: all. Members of a mixture get a proportional share."""
    count = len(rows) if count is None else min(count, len(rows))
    if len(rows.sources) == 1:
        return subset(rows, np.arange(count))
    ids = rows.source_ids()
    sizes = np.bincount(ids, minlength=len(rows.sources))
    exact = sizes * count / len(rows)
    shares = np.floor(exact).astype(np.int64)
    largest_rests = np.argsort(shares - exact, kind="stable")[: count - shares.sum()]
    shares[largest_rests] += 1
    chosen = [np.flatnonzero(ids == source)[:share] for source, share in enumerate(shares)]
    return subset(rows, np.sort(np.concatenate(chosen)))


def split_rows(
    n: int, val_size: float, seed: int, origins: Index | None = None
) -> tuple[Index, Index]:
    """Chooses validation rows at random.

    Args:
        n: Number of rows.
        val_size: A share between 0 and 1, or a number of rows from 1 up.
        seed: Seed of the choice.
        origins: `Rows.origins`. Copies of a row stay on one side, and validation gets only one.

    Returns:
        Training indices and validation indices, both ascending.

    Raises:
        UserError: `val_size` is out of range or leaves nothing on one side.
    """
    if origins is None:
        origins = np.arange(n)
    distinct, first, copy_of = np.unique(origins, return_index=True, return_inverse=True)
    count = int(val_size)
    if 0 < val_size < 1:
        # A share of few rows is at least one row, and leaves one.
        count = min(max(round(val_size * len(distinct)), 1), len(distinct) - 1)
    if isinstance(val_size, bool) or val_size <= 0 or (val_size > 1 and count != val_size):
        raise UserError(
            f"`data.val_size` is {val_size}, expected a share between 0 and 1 or a whole number of"
            " rows"
        )
    if not 0 < count < len(distinct):
        raise UserError(
            f"`data.val_size: {val_size}` takes {count} of {len(distinct)} rows and leaves nothing"
            " on one side"
        )
    chosen = np.zeros(len(distinct), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(distinct))[:count]] = True
    return np.flatnonzero(~chosen[copy_of]), np.sort(first[chosen])
