"""Rows to tokenized examples on disk: composes the data stages, once, before any process group exists."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_sft.data.cache import ExampleCache, cache_key, write_cache
from lit_sft.data.formats import find_placeholders, to_conversation
from lit_sft.data.render import Renderer
from lit_sft.data.sources import Rows
from lit_sft.types import Conversation, Example, UserError

log = logging.getLogger(__name__)

CACHE_VERSION = 2
"""Raise it when formats, rendering or the cache's layout change what a cache holds."""
CHUNK_ROWS = 1000
"""Rows rendered and tokenized together: enough to keep the tokenizer's threads busy."""


def global_rank() -> int:
    """This process's rank before a process group exists, as launchers put it into the environment."""
    for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 0


@dataclass
class Counts:
    """What became of the rows; stored with the cache, so that it can be told again."""

    rows_read: int = 0
    rows_kept: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lost_trained_tokens: int = 0
    """Targets cut away by `overlong: truncate`, or dropped with their row."""
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows."""
    notes: Counter[str] = field(default_factory=Counter)
    """What had to be done to prove masks -> rows."""
    placeholders: Counter[str] = field(default_factory=Counter)
    """Unfilled `{{name}}` -> rows."""
    stop_ids: list[int] = field(default_factory=list)
    longest: int = 0
    """Tokens of the longest example before any cut."""

    def lines(self, name: str) -> list[str]:
        """What is told in the terminal about a data set."""
        share = self.trained_tokens / max(1, self.tokens)
        text = [
            f"{name}: {self.rows_kept:,} of {self.rows_read:,} rows kept as {self.examples:,} examples, "
            f"{self.tokens:,} tokens, {share:.0%} of them trained, the longest {self.longest:,}"
        ]
        text += [f"{name}: {rows:,} rows dropped: {reason}" for reason, rows in self.dropped.items()]
        if self.truncated:
            text.append(
                f"{name}: {self.truncated:,} examples truncated, {self.lost_trained_tokens:,} target tokens lost"
            )
        text += [
            f"{name}: {rows:,} rows, {NOTES.get(note.split('=')[0], note)} ({note})"
            for note, rows in self.notes.items()
        ]
        text += [
            f"{name}: {rows:,} rows hold {key} as it stands: nothing fills it"
            for key, rows in self.placeholders.items()
        ]
        return text


NOTES = {
    "per_turn": "one example per assistant turn, because the template rewrites earlier turns",
    "switch:enable_thinking": "rendered with a switch of the template; serve them with the same chat_template_kwargs",
    "switch:thinking": "rendered with a switch of the template; serve them with the same chat_template_kwargs",
    "lenient": "trained from the longest common prefix, because their mask could not be proved",
    "left_out:reasoning_content": "whose reasoning the template does not write, so it is not trained",
    "left_out:content": "whose content the template does not write beside a tool call, so it is not trained",
    "left_out:tools": "whose tools the template does not write",
    "split_boundary": "tokenized in two parts, prompt and answer, as at inference",
}


@dataclass(frozen=True)
class Preparation:
    """Everything that decides which examples a row becomes."""

    renderer: Renderer
    format: str
    column_mapping: Mapping[str, str] | None
    prompt_template: str | None
    system_prompt: str | None
    on_bad_row: Literal["error", "skip"]
    max_length: int
    overlong: Literal["drop", "truncate", "error"]

    def conversation(self, rows: Rows, index: int, need_answer: bool = True) -> Conversation:
        """One row as a conversation.

        Raises:
            UserError: With the file and the row before what is wrong with it.
        """
        try:
            return to_conversation(
                rows[index],
                format=self.format,
                column_mapping=self.column_mapping,
                prompt_template=self.prompt_template,
                system_prompt=self.system_prompt,
                need_answer=need_answer,
            )
        except UserError as error:
            raise UserError(f"{rows.where(index)}: {error}") from error

    def examples(self, rows: Rows, counts: Counts) -> Iterator[Example]:
        """All examples of all rows, in order; what was dropped and why goes into `counts`."""
        stop_ids: set[int] = set()
        for start in range(0, len(rows), CHUNK_ROWS):
            for index, result in self._render_chunk(rows, range(start, min(start + CHUNK_ROWS, len(rows))), counts):
                counts.rows_read += 1
                if isinstance(result, UserError):
                    if self.on_bad_row == "error":
                        raise result
                    counts.dropped["bad row (data.on_bad_row: skip)"] += 1
                    log.warning("skipped: %s", result)
                    continue
                kept = [short for example in result for short in self._fit(example, rows.where(index), counts)]
                counts.rows_kept += bool(kept)
                for note in {note for example in kept for note in example.notes}:
                    counts.notes[note] += 1
                for example in kept:
                    stop_ids.update(example.stop_ids)
                    counts.examples += 1
                    counts.tokens += len(example.input_ids)
                    counts.trained_tokens += sum(example.loss_mask[1:])
                    yield example
        counts.stop_ids = sorted(stop_ids)

    def _render_chunk(
        self, rows: Rows, indices: range, counts: Counts
    ) -> Iterator[tuple[int, list[Example] | UserError]]:
        """(row, its examples or what is wrong with it) in the order of the rows."""
        parsed: dict[int, Conversation | UserError] = {}
        for index in indices:
            try:
                parsed[index] = self.conversation(rows, index)
            except UserError as error:
                parsed[index] = error
        good = {index: item for index, item in parsed.items() if isinstance(item, Conversation)}
        for conversation in good.values():
            counts.placeholders.update(find_placeholders(conversation))
        rendered = dict(zip(good, self.renderer.render(list(good.values()), list(good)), strict=True))
        for index, item in parsed.items():
            result = item if isinstance(item, UserError) else rendered[index]
            if isinstance(result, UserError) and not isinstance(item, UserError):
                result = UserError(f"{rows.where(index)}: {result}")
            yield index, result

    def _fit(self, example: Example, where: str, counts: Counts) -> Iterator[Example]:
        """The example if it fits into `max_length` and has a target; else what `overlong` says."""
        length, targets = len(example.input_ids), sum(example.loss_mask[1:])
        counts.longest = max(counts.longest, length)
        if targets == 0:
            counts.dropped["no token of it is trained"] += 1
        elif length <= self.max_length:
            yield example
        elif self.overlong == "error":
            raise UserError(
                f"{where}: {length} tokens are more than data.max_length {self.max_length}; raise data.max_length, or "
                "set data.overlong to drop or truncate"
            )
        else:
            kept_mask = example.loss_mask[: self.max_length]
            kept_targets = sum(kept_mask[1:])
            cut = self.overlong == "truncate" and kept_targets > 0
            counts.lost_trained_tokens += targets - kept_targets if cut else targets
            if not cut:
                rest = " even after truncation, no target is left" if self.overlong == "truncate" else ""
                counts.dropped[f"longer than data.max_length {self.max_length}{rest}"] += 1
                return
            counts.truncated += 1
            ids = example.input_ids[: self.max_length]
            yield Example(ids, kept_mask, example.row, example.part, example.stop_ids, example.notes)

    def key(self, rows: Rows) -> str:
        """A hash of all that decides the examples: data by content, tokenizer, template and options."""
        import tokenizers
        import transformers

        options = {k: v for k, v in vars(self).items() if k != "renderer"}
        return cache_key(
            {
                "cache": CACHE_VERSION,
                "rows": rows.fingerprint,
                "renderer": self.renderer.fingerprint(),
                "libraries": [transformers.__version__, tokenizers.__version__],
                **{k: dict(v) if isinstance(v, Mapping) else v for k, v in options.items()},
            }
        )

    def cached(self, rows: Rows, cache_dir: Path, name: str) -> ExampleCache:
        """The examples of a data set, from the cache or made now: by global rank 0, while the others wait.

        Args:
            rows: The data set.
            cache_dir: Folder of all caches.
            name: How to call it in the log, `train` or `validation`.

        Raises:
            UserError: A row is bad, or no row is left.
        """
        path = cache_dir / self.key(rows)
        failure = path.with_suffix(".error")
        if global_rank() != 0:
            return _wait_for(path, failure)
        try:
            cache = _open(path) or self._write(path, rows)
            counts = Counts(**cache.meta)
            if not len(cache):
                reasons = "; ".join(f"{n} rows {reason}" for reason, n in counts.dropped.items()) or "it is empty"
                raise UserError(
                    f"data.{name} ({rows.name}): no row is left to train on: {reasons}; the longest example has "
                    f"{counts.longest} tokens, data.max_length is {self.max_length}"
                )
        except BaseException as error:
            path.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(str(error))
            raise
        failure.unlink(missing_ok=True)
        for line in counts.lines(name):
            log.info(line)
        return cache

    def _write(self, path: Path, rows: Rows) -> ExampleCache:
        counts = Counts()
        meta: dict[str, Any] = {}

        def examples() -> Iterator[Example]:
            yield from self.examples(rows, counts)
            meta.update(vars(counts))  # not `asdict`, which breaks a Counter

        started = time.monotonic()
        cache = write_cache(path, examples(), meta)
        log.info("tokenized %s rows in %.1f s", f"{counts.rows_read:,}", time.monotonic() - started)
        return cache


def num_duplicates(cache: ExampleCache, rows: Rows) -> int:
    """Examples that are exact copies of an earlier one; rows that a mixture repeats on purpose do not count."""
    _, first = np.unique(rows.origins[cache.rows] * (int(cache.parts.max()) + 1) + cache.parts, return_index=True)
    return len(first) - len(np.unique(cache.hashes[first]))


def num_overlapping(train: ExampleCache, validation: ExampleCache) -> int:
    """Validation examples that are in the training set too."""
    return int(np.isin(validation.hashes, train.hashes).sum())


def _open(path: Path) -> ExampleCache | None:
    """The cache if it is there and whole; a damaged one is set aside with a message."""
    if not path.exists():
        return None
    try:
        return ExampleCache(path)
    except (OSError, ValueError, KeyError) as error:
        damaged = path.with_name(f"{path.name}.damaged.{os.getpid()}")
        path.rename(damaged)
        log.warning("the cache %s is damaged (%s): moved to %s and made anew", path, error, damaged.name)
        return None


def _wait_for(path: Path, failure: Path) -> ExampleCache:
    """What rank 0 makes; its error if it fails (only one that is younger than this process counts)."""
    born = time.time() - 60
    while True:
        if (cache := _open_quietly(path)) is not None and len(cache):
            return cache
        if failure.exists() and failure.stat().st_mtime > born:
            raise UserError(f"rank 0 could not prepare the data: {failure.read_text()}")
        time.sleep(0.2)


def _open_quietly(path: Path) -> ExampleCache | None:
    try:
        return ExampleCache(path)
    except (OSError, ValueError, KeyError):
        return None
