"""SFTData: data settings -> rows, tokenizer, template and tokenized examples, without Lightning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sft.checkpoint import data_position
from lit_sft.data import cache_entries, template_omissions
from lit_sft.data.assistant_turns import write_prompt
from lit_sft.data.cache import ExampleCache, cache_key
from lit_sft.data.chat_template import (
    TODAY,
    ChatTemplate,
    kept_date,
    resolve_chat_template,
    with_date,
)
from lit_sft.data.formats.columns import detect_format, report_unread
from lit_sft.data.formats.prompt_template import template_fields
from lit_sft.data.packing import Packs
from lit_sft.data.sources import open_rows
from lit_sft.data.sources import rows as sources_rows
from lit_sft.data.stop_set import StopSet, stop_set
from lit_sft.data.tokenize import Renderer
from lit_sft.data.workers import num_workers_of
from lit_sft.demo import builtin as demo
from lit_sft.errors import UserError, located
from lit_sft.generation.prompts import Asked, Prompt, encode
from lit_sft.hub import resolve
from lit_sft.model import load, new_tokens
from lit_sft.model_builder import base_directory, tokenizer_directory
from lit_sft.preprocessing import Preparation, Reading, num_overlapping
from lit_sft.ranks import global_rank
from lit_sft.settings import DataConfig
from lit_sft.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_sft.data.sources.rows import Rows

log = logging.getLogger(__name__)

DATE_FILE = "chat_template_date"
"""File in the cache directory with the date that chat templates get as today's."""
STAGE_SETS = {
    "fit": ["train", "validation"],
    "validate": ["validation"],
    "test": ["test"],
    "predict": [],
}
"""Stage -> the data sets that it needs."""


class SFTData:
    """The data of a run.

    Args:
        options: The arguments of `SFTDataModule`.

    Attributes:
        rows: Name of a data set (`train`, `validation`, `test`) -> its rows.
        caches: Name of a data set -> its tokenized examples.
    """

    def __init__(self, options: DataConfig) -> None:
        self.options = options
        self.rows: dict[str, Rows] = {}
        self.caches: dict[str, ExampleCache] = {}
        self._told: set[str] = set()
        """Names of sources, data sets and settings that were logged once."""
        self._identity: dict[str, Any] | None = None
        """`Preparation.identity` of the training rows, from before the source could change."""

    @cached_property
    def tokenizer_source(self) -> str:
        """The directory of the tokenizer: that of the model, or of the adapter if it has one."""
        path = tokenizer_directory(self.options.model_name_or_path, self.options.revision)
        adapter = self.options.adapter_name_or_path
        if adapter:
            beside = resolve(adapter, key="model.adapter_name_or_path", allow_adapter=True)
            # The adapter was trained with its own tokens and template.
            if (Path(beside) / "tokenizer_config.json").is_file():
                path = beside
                log.info("tokenizer and chat template: those of the adapter %s", path)
        return path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model or adapter, with `add_tokens`."""
        tokenizer = load.load_tokenizer(
            self.tokenizer_source, trust_remote_code=self.options.trust_remote_code
        )
        if self.options.add_tokens:
            template = resolve_chat_template(tokenizer, self.options.chat_template) or ""
            trust = self.options.trust_remote_code
            config = load.load_config(
                base_directory(self.tokenizer_source), trust_remote_code=trust
            )
            rows = config.get_text_config().vocab_size
            new_tokens.add_tokens(tokenizer, self.options.add_tokens, template, rows=rows)
        return tokenizer

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples. -1 without examples."""
        return max((cache.largest_id for cache in self.caches.values()), default=-1)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest example."""
        return max((int(cache.lengths.max(initial=0)) for cache in self.caches.values()), default=0)

    @cached_property
    def chat_template(self) -> str | None:
        """The text of the template, as it is exported; None for `raw`."""
        if self.options.chat_template is None and self.tokenizer.chat_template is None:
            log.info(
                "chat template: the tokenizer has none, so turns are written below `System:`,"
                " `User:` and `Assistant:`, and %s ends an answer; for another template set"
                " data.chat_template to the path of a .jinja file, to its text, or to raw",
                self.tokenizer.eos_token,
            )
        return resolve_chat_template(self.tokenizer, self.options.chat_template)

    @cached_property
    def template_date(self) -> str | None:
        """The date that the template gets as today's: the same as long as the cache exists.

        None if the template asks for no date.
        """
        if TODAY not in (self.chat_template or ""):
            return None
        path = self._cache_dir() / DATE_FILE
        day = kept_date(path)
        log.info(
            "the chat template asks for the date of the day: where it writes it, that is %s (%s)",
            day,
            path,
        )
        return day

    @cached_property
    def renderer(self) -> Renderer:
        """The renderer: tokenizer and chat template."""
        options = self.options
        text = self.chat_template
        if text is not None and self.template_date is not None:
            text = with_date(text, self.template_date)
        template = ChatTemplate(
            self.tokenizer, text, options.chat_template_kwargs, options.unproved
        )
        return Renderer(self.tokenizer, template, options.train_on)

    @property
    def stop_ids(self) -> list[int]:
        """Stop tokens of the template and of every prepared data set."""
        return sorted(self._stop_set.all | self._trained_stop_ids)

    @property
    def turn_end_ids(self) -> list[int]:
        """Stop tokens of plain answers and of every prepared data set."""
        return sorted(self._stop_set.turn_ends | self._trained_stop_ids)

    @property
    def _trained_stop_ids(self) -> set[int]:
        """Stop tokens of every prepared data set."""
        return {token for cache in self.caches.values() for token in cache.meta["stop_ids"]}

    @cached_property
    def _stop_set(self) -> StopSet:
        """Stop tokens of the template."""
        return stop_set(self.renderer)

    def prepare(self, stage: str) -> None:
        """Reads, renders and tokenizes the data of a stage, or finds it in the cache.

        The command line calls this before any process group exists. Inside one, the ranks that wait
        for rank 0 would time out.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            UserError: A source, a row or a setting is wrong.
        """
        needed = STAGE_SETS[stage]
        is_split_off = "validation" in needed and self.options.val_size is not None
        self._open_rows(["train", *needed] if is_split_off else needed)
        for name in needed:
            if name in self.rows and name not in self.caches:
                self._prepare_set(name)
        self._trim_cache()
        if stage in ("validate", "test") and needed[0] not in self.caches:
            either = " or data.val_size" if stage == "validate" else ""
            raise UserError(
                f"data.{needed[0]}{either} is not set: `{stage}` has nothing to evaluate"
            )

    def _trim_cache(self) -> None:
        """Removes the oldest entries of a cache that is larger than `data.cache_max_gb`."""
        if self.options.cache_max_gb is None or global_rank() != 0:
            return
        removed = cache_entries.trim(self._cache_dir(), self.options.cache_max_gb * 1e9)
        if removed:
            log.info(
                "cache: removed %s entries, %s, that were not used for the longest time"
                " (data.cache_max_gb)",
                len(removed),
                cache_entries.total(removed),
            )

    def _prepare_set(self, name: str) -> None:
        """Makes the examples of one data set, or finds them in the cache."""
        rows = self.rows[name]
        preparation = self.preparation(rows)
        identity = preparation.identity(rows)
        path = self._cache_dir() / cache_key(identity)
        self.caches[name] = preparation.cached(
            rows, path, name, num_workers_of(self.options.num_workers)
        )
        if name == "train":
            # Date and template are separate here, so that a refused resume names the one that
            # differs.
            date = {f"{DATE_FILE} in data.cache_dir": self.template_date}
            self._identity = {**identity, **date, "chat_template": self.chat_template}
        if name == "validation" and "train" in self.caches:
            self._report_overlap()

    def _report_overlap(self) -> None:
        """Warns if validation rows are in the training set."""
        overlap = num_overlapping(self.caches["train"], self.caches["validation"])
        if overlap:
            log.warning("validation: %s rows are in the training set too", f"{overlap:,}")

    def _open_rows(self, names: Sequence[str]) -> None:
        """Opens data sets that are set and not open yet."""
        for name in names:
            spec = getattr(self.options, name)
            if spec is None or name in self.rows:
                continue
            self.rows[name] = self._limited(self._open(spec, split=name, key=f"data.{name}"))
            if name == "train" and self.options.val_size is not None:
                self._split_off_validation(self.options.val_size)
        for name in names:
            if name in self.rows:
                self._report_sources(name)

    def _open(self, spec: Any, split: str, key: str) -> Rows:
        """Opens the rows that a setting names."""
        return open_rows.open_rows(
            spec,
            split=split,
            key=key,
            builtin=demo.rows,
            seed=self.options.seed,
            cache_dir=self._cache_dir() / "sources",
        )

    def _limited(self, rows: Rows) -> Rows:
        """Returns the first `data.max_samples` rows."""
        if self.options.max_samples is None:
            return rows
        return sources_rows.limit(rows, self.options.max_samples)

    def _split_off_validation(self, val_size: int | float) -> None:
        """Moves rows from `train` to `validation`."""
        rows = self.rows["train"]
        train, validation = sources_rows.split_rows(
            len(rows), val_size, self.options.seed, rows.origins
        )
        self.rows["train"] = sources_rows.subset(rows, train)
        self.rows["validation"] = sources_rows.subset(rows, validation)

    def _report_sources(self, name: str) -> None:
        """Logs the members of a mixture, once."""
        key = f"data.{name}"
        if len(self.rows[name].sources) == 1 or key in self._told:
            return
        self._told.add(key)
        members = [f"{count:,} rows of {source}" for source, count in self.rows[name].counts()]
        log.info("%s: %s", name, ", ".join(members))

    def fingerprint(self, packs: Packs) -> dict[str, Any]:
        """Returns what a checkpoint stores about the data, without reading any source.

        See `data_position.remember`.
        """
        assert self._identity is not None
        return data_position.remember(self._identity, self.options, self.caches, packs)

    def check_same(self, saved: dict[str, Any], packs: Packs) -> None:
        """Refuses to resume with other examples, or another order, than the checkpoint's.

        Args:
            saved: The `fingerprint` in the checkpoint.
            packs: The current packs of the training set.

        Raises:
            UserError: Names the setting that differs.
        """
        now = self.fingerprint(packs)
        if not self.options.allow_other_data:
            data_position.check_same(saved, now)
        data_position.tell_other_validation(saved, now)

    def check_split(self, saved: dict[str, Any]) -> None:
        """Refuses to evaluate on rows that the checkpoint may have been trained on.

        See `data_position.check_split`.
        """
        if self.options.val_size is not None and not self.options.allow_other_data:
            data_position.check_split(saved, self.rows["train"].fingerprint)

    def open(self, name: str) -> Rows:
        """Opens one data set.

        Raises:
            UserError: It is not set.
        """
        self._open_rows([name])
        if name not in self.rows:
            raise UserError(f"data.{name} is not set")
        return self.rows[name]

    def preparation(self, rows: Rows) -> Preparation:
        """Decides how the rows of a data set become examples, with the format of each source."""
        members = sources_rows.by_source(rows)
        readings = {}
        for number, member in members.items():
            readings[number] = self._reading(member, is_alone=len(members) == 1)
        mapping = self.options.column_mapping
        if mapping and all(reading.column_mapping is None for reading in readings.values()):
            raise UserError(
                f"`data.column_mapping` names {', '.join(mapping)}, which no source of"
                f" {rows.name} has"
            )
        if any(reading.format != "text" for reading in readings.values()):
            self._check_system_prompt()
        return Preparation(
            renderer=self.renderer,
            readings=readings,
            prompt_template=self.options.prompt_template,
            system_prompt=self.options.system_prompt,
            on_bad_row=self.options.on_bad_row,
            max_length=self.options.max_length,
            overlong=self.options.overlong,
        )

    def _check_system_prompt(self) -> None:
        """Refuses a system prompt that the template does not write, which rows would only count."""
        if not self.options.system_prompt:
            return
        probe = self.question("Hello")
        template = self.renderer.template
        try:
            text = write_prompt(template, probe)
        except UserError:
            # The first row will be refused for the same reason, with its place.
            return
        if "left_out:system_turn" in template_omissions.of_conversation(template, probe, [text]):
            raise UserError(
                "data.system_prompt is set, but the chat template does not write it, so the model"
                " would not see it; set data.chat_template to a template that writes system turns,"
                " or data.system_prompt to null"
            )

    def _reading(self, rows: Rows, is_alone: bool) -> Reading:
        """Decides the format of one source, and logs it.

        In a mixture, the column mapping applies only to members that have its columns.
        """
        mapping = self.options.column_mapping
        template = self.options.prompt_template
        first = rows.head(20)
        if not first:
            # No row can be read. The error of the first says why.
            with located(rows.where(0)):
                rows[0]
        columns = {column for row in first for column in row}
        if not is_alone and not columns.intersection(mapping or ()):
            mapping = None
        format: str = self.options.format
        report: list[str] = []
        if format == "auto":
            format, *report = detect_format(first, mapping, template)
        if rows.name not in self._told:
            self._told.add(rows.name)
            for line in (*report, *report_unread(first, format, mapping, template)):
                log.info("%s: %s", rows.name, line)
        return Reading(format, mapping)

    def _cache_dir(self) -> Path:
        if self.options.cache_dir is not None:
            return Path(self.options.cache_dir).expanduser()
        return cache_entries.default_folder()

    def question(self, text: str) -> Conversation:
        """Makes a conversation of a question.

        The question fills `data.prompt_template` if that has one field.
        """
        template = self.options.prompt_template
        if template is not None and len(self._fields) == 1:
            text = template.format_map({self._fields[0]: text})
        messages = [Message("user", text)]
        if self.options.system_prompt:
            messages.insert(0, Message("system", self.options.system_prompt))
        return Conversation(tuple(messages))

    def questions(self) -> list[Prompt]:
        """Returns the prompts of `data.questions`."""
        return encode(self._listed(self.options.questions, "data.questions"), self.renderer)

    def asked_by_predict(self) -> list[Prompt]:
        """Returns the prompts of `data.predict`; if that is null, of `data.questions`."""
        spec = self.options.predict
        if spec is None:
            spec = self.options.questions
        if not spec:
            raise UserError(
                "there is nothing to predict: set data.predict to a file or to a list of questions"
            )
        if isinstance(spec, list):
            questions = [text for text in spec if isinstance(text, str)]
            if len(questions) == len(spec):
                return encode(self._listed(questions, "data.predict"), self.renderer)
        return self.asked(self._limited(self._open(spec, split="test", key="data.predict")))

    def asked(self, rows: Rows, count: int | None = None, skip: bool = False) -> list[Prompt]:
        """Returns the prompts of the first rows, with the last answer of each as reference.

        Args:
            rows: The rows of a data set.
            count: Number of rows, None: all. Members of a mixture get a proportional share.
            skip: Whether `data.on_bad_row: skip` applies. The bad rows are counted when the data
                set is tokenized.

        Raises:
            UserError: A row is bad.
        """
        preparation = self.preparation(rows)
        rows = sources_rows.first_rows(rows, count)
        prompts: list[Prompt] = []
        for index in range(len(rows)):
            try:
                # The template gets the answer, too, so the prompt is the same as in training.
                conversation = preparation.conversation(rows, index, need_answer=False)
                prompts += encode([Asked(conversation, rows.where(index))], self.renderer)
            except UserError:
                if not skip or self.options.on_bad_row != "skip":
                    raise
        return prompts

    def _listed(self, questions: Sequence[str], key: str) -> list[Asked]:
        """Makes conversations of the questions in a setting."""
        self._check_system_prompt()
        if questions and len(self._fields) > 1 and key not in self._told:
            self._told.add(key)
            log.info(
                "%s: not asked as rows are trained: data.prompt_template has more fields than one",
                key,
            )
        return [Asked(self.question(text), f"{key}[{n}]") for n, text in enumerate(questions)]

    @property
    def _fields(self) -> Sequence[str]:
        """The fields of `data.prompt_template`."""
        if self.options.prompt_template is None:
            return ()
        return template_fields(self.options.prompt_template)
