"""Rows -> tokenized examples on disk: composes the data stages before any process group exists."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lit_sft.data.cache import (
    Block,
    ExampleCache,
    cache_key,
    open_cache,
    to_block,
    wait_for_cache,
    write_cache,
    write_failure,
)
from lit_sft.data.formats.parse import to_conversation
from lit_sft.data.sources.rows import Rows
from lit_sft.data.stats import Counts, find_placeholders
from lit_sft.data.tokenize import Renderer
from lit_sft.data.workers import map_in_order
from lit_sft.errors import UserError, located
from lit_sft.ranks import global_rank
from lit_sft.types import Conversation, Example

log = logging.getLogger(__name__)

CACHE_VERSION = 10
"""Part of the cache key. Raise it when formats, rendering or the layout of the cache change."""
CHUNK_ROWS = 200
"""Rows that are rendered and tokenized together."""
ROWS_PER_WORKER = 1000
"""Starting a process for fewer rows costs more than it saves."""
JOB = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables that launchers set for all ranks of a job before the data is prepared.

Lightning's own launcher is different: it starts the other ranks after that.
"""
DAY = 24 * 60 * 60
"""Seconds. No rank of an older job still waits for its failure file."""
SHOWN_SKIPS = 10
"""Skipped rows that are logged; the others are only counted."""


class Chunk(NamedTuple):
    """The examples of some rows."""

    block: Block
    counts: Counts
    skipped: list[str]
    """One message per skipped row, with its place."""


class BadRow(NamedTuple):
    """A row without examples."""

    error: UserError
    """With the place of the row."""
    reason: str
    """In which step it failed, for the counts."""


class Reading(NamedTuple):
    """How the rows of one source are read."""

    format: str
    column_mapping: Mapping[str, str] | None


@dataclass(frozen=True)
class Preparation:
    """Everything that decides which examples a row becomes."""

    renderer: Renderer
    readings: Mapping[int, Reading]
    """Number of the source -> reading: the members of a mixture may have different formats."""
    prompt_template: str | None
    system_prompt: str | None
    on_bad_row: Literal["error", "skip"]
    max_length: int
    overlong: Literal["drop", "truncate", "error"]

    def conversation(self, rows: Rows, index: int, need_answer: bool = True) -> Conversation:
        """Reads one row as a conversation.

        Raises:
            UserError: The row is bad; the message names file and row.
        """
        return self._parse(rows, index, self._read(rows, index), need_answer)

    def _read(self, rows: Rows, index: int) -> dict[str, Any]:
        with located(rows.where(index)):
            return rows[index]

    def _parse(
        self, rows: Rows, index: int, row: Mapping[str, Any], need_answer: bool = True
    ) -> Conversation:
        reading = self.readings[rows.source_of(index)]
        with located(rows.where(index)):
            try:
                return to_conversation(
                    row,
                    format=reading.format,
                    column_mapping=reading.column_mapping,
                    prompt_template=self.prompt_template,
                    system_prompt=self.system_prompt,
                    need_answer=need_answer,
                )
            except RecursionError:
                raise UserError("the row is nested too deep to be read; remove it") from None

    def examples(self, rows: Rows, counts: Counts) -> list[Example]:
        """Returns all examples of a few rows, in order, and adds what was dropped to `counts`.

        Raises:
            UserError: A row is bad.
        """
        return self._examples(rows, range(len(rows)), counts, [])

    def _examples(
        self, rows: Rows, indices: range, counts: Counts, skipped: list[str]
    ) -> list[Example]:
        examples: list[Example] = []
        for index, result in self._render(rows, indices, counts):
            counts.rows_read += 1
            if not isinstance(result, BadRow):
                examples += self._keep(result, rows.where(index), counts)
            elif self.on_bad_row == "error":
                raise result.error
            else:
                counts.dropped[f"bad row (data.on_bad_row: skip): {result.reason}"] += 1
                skipped.append(str(result.error))
        return examples

    def _chunk(self, rows: Rows, indices: range) -> Chunk:
        """Makes the examples of some rows, in a worker process."""
        counts = Counts()
        skipped: list[str] = []
        return Chunk(to_block(self._examples(rows, indices, counts, skipped)), counts, skipped)

    def _keep(self, examples: list[Example], where: str, counts: Counts) -> list[Example]:
        """Returns the examples of a row that can be trained, and counts all of them."""
        kept: list[Example] = []
        reasons: list[str] = []
        for example in examples:
            fitted = self._fit(example, where, counts)
            if isinstance(fitted, Example):
                kept.append(fitted)
            else:
                reasons.append(fitted)
        notes: set[str] = set()
        stop_ids = set(counts.stop_ids)
        for example in kept:
            counts.tokens += len(example.input_ids)
            counts.trained_tokens += sum(example.loss_mask[1:])
            notes.update(example.notes)
            stop_ids.update(example.stop_ids)
        counts.rows_kept += bool(kept)
        counts.examples += len(kept)
        counts.notes.update(notes)
        counts.stop_ids = sorted(stop_ids)
        if kept and reasons:
            counts.notes["partly_dropped"] += 1
        elif reasons:
            counts.dropped[reasons[0]] += 1
        return kept

    def _render(
        self, rows: Rows, indices: range, counts: Counts
    ) -> Iterator[tuple[int, list[Example] | BadRow]]:
        """Yields each row with its examples, or as a bad row."""
        conversations: dict[int, Conversation] = {}
        results: dict[int, list[Example] | BadRow] = {}
        for index in indices:
            try:
                row = self._read(rows, index)
            except UserError as error:
                results[index] = BadRow(error, "it cannot be read")
                continue
            try:
                conversations[index] = self._parse(rows, index, row)
            except UserError as error:
                results[index] = BadRow(error, "it does not fit the format")
        for conversation in conversations.values():
            counts.placeholders.update(find_placeholders(conversation))
            counts.blank.update(conversation.blank)
            counts.notes.update(conversation.notes)
        for index, result in self._rendered(conversations).items():
            if isinstance(result, UserError):
                located_error = UserError(f"{rows.where(index)}: {result}")
                reason = "the template or the tokenizer does not take it"
                results[index] = BadRow(located_error, reason)
            else:
                results[index] = result
        for index in indices:
            yield index, results[index]

    def _rendered(
        self, conversations: Mapping[int, Conversation]
    ) -> dict[int, list[Example] | UserError]:
        """Renders conversations, and returns {row: its examples, or its error}."""
        try:
            results = self.renderer.render(list(conversations.values()), list(conversations))
            return dict(zip(conversations, results, strict=True))
        except (MemoryError, OSError):
            raise
        # A tokenizer may be any program. All texts of a chunk go through it in one call.
        except Exception as error:
            if len(conversations) == 1:
                reason = f"{type(error).__name__}: {shorten(str(error), 200)}"
                failure = UserError(
                    f"the tokenizer does not take the row ({reason}); remove the row, or report"
                    " the error"
                )
                failure.__cause__ = error
                return dict.fromkeys(conversations, failure)
            alone: dict[int, list[Example] | UserError] = {}
            for index, conversation in conversations.items():
                alone |= self._rendered({index: conversation})
            return alone

    def _fit(self, example: Example, where: str, counts: Counts) -> Example | str:
        """Returns the example, truncated if `overlong` says so, or the reason to drop it."""
        length = len(example.input_ids)
        targets = sum(example.loss_mask[1:])
        counts.longest = max(counts.longest, length)
        if targets == 0:
            return "no token of it is trained"
        if length <= self.max_length:
            return example
        if self.overlong == "error":
            raise UserError(
                f"{where}: {length} tokens are more than data.max_length {self.max_length}; raise"
                " data.max_length, or set data.overlong to drop or truncate"
            )
        ids = example.input_ids[: self.max_length]
        mask = example.loss_mask[: self.max_length]
        if self.overlong == "drop" or not any(mask[1:]):
            counts.lost_trained_tokens += targets
            reason = f"longer than data.max_length {self.max_length}"
            if self.overlong == "truncate":
                return f"{reason} even after truncation, no target is left"
            return reason
        counts.truncated += 1
        counts.lost_trained_tokens += targets - sum(mask[1:])
        trained = {token for token, label in zip(ids, mask, strict=True) if label}
        return replace(
            example,
            input_ids=ids,
            loss_mask=mask,
            stop_ids=tuple(i for i in example.stop_ids if i in trained),
        )

    def identity(self, rows: Rows) -> dict[str, Any]:
        """Returns everything that decides the examples, as plain JSON values.

        The data counts by its content, besides tokenizer, template, options and versions.
        """
        import tokenizers
        import transformers

        options = {k: v for k, v in vars(self).items() if k not in ("renderer", "readings")}
        return {
            "cache": CACHE_VERSION,
            "rows": rows.fingerprint,
            "readings": [(source, *reading) for source, reading in self.readings.items()],
            "renderer": self.renderer.fingerprint(),
            "libraries": [transformers.__version__, tokenizers.__version__],
            **options,
        }

    def cached(self, rows: Rows, path: Path, name: str, num_workers: int = 1) -> ExampleCache:
        """Opens the cached examples of a data set. Global rank 0 makes them, the others wait.

        Args:
            rows: The data set.
            path: Directory of the cache, named by the hash of `identity`.
            name: Name in log lines, `train` or `validation`.
            num_workers: Processes that tokenize.

        Raises:
            UserError: A row is bad, or no row is left.
        """
        failure = path.with_name(f"{path.name}.{_job()}.error")
        if global_rank() != 0:
            return wait_for_cache(path, failure)
        for old in path.parent.glob(f"{path.name}.*.error"):
            if old == failure or time.time() - old.stat().st_mtime > DAY:
                old.unlink(missing_ok=True)
        try:
            cache = open_cache(path) or self._write(path, rows, num_workers)
            counts = Counts(**cache.meta)
            if not len(cache):
                dropped = [f"{n:,} rows {reason}" for reason, n in counts.dropped.items()]
                reasons = "; ".join(dropped) or "it is empty"
                raise UserError(
                    f"data.{name} ({rows.name}): no row is left to train on: {reasons}; the longest"
                    f" example has {counts.longest} tokens, data.max_length is {self.max_length}"
                )
        except Exception as error:
            # A signal is no Exception: it reaches all ranks, and must not stop the next run.
            write_failure(failure, error)
            raise
        for line in counts.lines(name):
            log.info(line)
        return cache

    def _write(self, path: Path, rows: Rows, num_workers: int) -> ExampleCache:
        """Tokenizes all rows and writes the cache."""
        counts = Counts()
        meta: dict[str, Any] = {}
        of_rows: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]] = []

        def blocks() -> Iterator[Block]:
            num_skipped = 0
            starts = range(0, len(rows), CHUNK_ROWS)
            chunks = (range(start, min(start + CHUNK_ROWS, len(rows))) for start in starts)
            workers = min(num_workers, len(rows) // ROWS_PER_WORKER)
            with tqdm(
                desc="tokenizing", total=len(rows), unit=" rows", leave=False, disable=None
            ) as bar:
                for chunk in map_in_order(partial(self._chunk, rows), chunks, workers):
                    counts.add(chunk.counts)
                    of_rows.append(_row_hashes(chunk.block))
                    for message in chunk.skipped[: max(0, SHOWN_SKIPS - num_skipped)]:
                        log.warning("skipped: %s", message)
                    num_skipped += len(chunk.skipped)
                    bar.update(chunk.counts.rows_read)
                    yield chunk.block
            if of_rows:
                kept, hashes = (np.concatenate(arrays) for arrays in zip(*of_rows, strict=True))
                counts.duplicates = _num_duplicates(rows.origins[kept], hashes)
            # `dataclasses.asdict` cannot copy a Counter.
            meta.update(vars(counts))

        started = time.monotonic()
        cache = write_cache(path, blocks(), meta, rows.name)
        log.info("tokenized %s rows in %.1f s", f"{counts.rows_read:,}", time.monotonic() - started)
        return cache


def _job() -> str:
    """Returns a name that is the same on all ranks of a job and different in other jobs."""
    return cache_key({variable: os.environ.get(variable) for variable in JOB})[:8]


def num_overlapping(train: ExampleCache, validation: ExampleCache) -> int:
    """Counts validation rows that are in the training set, too."""
    return int(np.isin(_row_hashes(validation)[1], _row_hashes(train)[1]).sum())


def _num_duplicates(origins: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64]) -> int:
    """Counts rows that are exact copies of an earlier row. Repetitions by a weight do not count.

    Args:
        origins: [N] place of each row in its source; a repeated row has the same one.
        hashes: [N] hash of the examples of each row.
    """
    distinct = np.unique(origins, return_index=True)[1]
    return len(distinct) - len(np.unique(hashes[distinct]))


def _row_hashes(
    examples: Block | ExampleCache,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Returns [N] numbers of the rows with examples, and [N] hashes of the examples of each."""
    first = np.flatnonzero(np.diff(examples.rows, prepend=-1))
    # An odd factor loses no bits of a hash. It makes the order of the parts count.
    factors = np.uint64(2) * examples.parts.astype(np.uint64) + np.uint64(1)
    hashes = examples.hashes * factors
    if len(first):
        hashes = np.bitwise_xor.reduceat(hashes, first)
    return examples.rows[first], hashes
