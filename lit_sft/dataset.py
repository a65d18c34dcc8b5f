"""SFTData: from the data settings to rows, tokenizer, template and tokenized examples. Plain Python, no Lightning."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lit_sft import demo
from lit_sft.build import tokenizer_directory
from lit_sft.data import formats, sources
from lit_sft.data.cache import ExampleCache
from lit_sft.data.render import Renderer
from lit_sft.data.templates import resolve_chat_template
from lit_sft.data.turns import ChatTemplate
from lit_sft.model import load, tokens
from lit_sft.prepare import Preparation, Reading, num_overlapping
from lit_sft.prompts import Asked, Prompt, encode
from lit_sft.types import Conversation, Message, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_sft.data.sources import Rows

log = logging.getLogger(__name__)

MAX_WORKERS = 16
"""Processes that tokenize, at most: the one that writes what they make keeps no more of them busy."""


class SFTData:
    """The data of a run.

    Args:
        options: The arguments of `SFTDataModule`, by name.

    Attributes:
        rows: Opened data sets by name (`train`, `validation`, `test`).
        caches: Tokenized data sets by name.
    """

    def __init__(self, options: SimpleNamespace) -> None:
        self.options = options
        self.rows: dict[str, Rows] = {}
        self.caches: dict[str, ExampleCache] = {}
        self._told: set[str] = set()
        """Sources whose format, and data sets whose sources were logged."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one tokenizer, of the model, with `add_tokens`."""
        path = tokenizer_directory(self.options.model_name_or_path, self.options.revision)
        if adapter := getattr(self.options, "adapter_name_or_path", None):
            beside = load.resolve(adapter, key="model.adapter_name_or_path", allow_adapter=True)
            if (Path(beside) / "tokenizer_config.json").is_file():  # tokens and template that it was trained with
                log.info("tokenizer and chat template: those of the adapter %s", path := beside)
        tokenizer = load.load_tokenizer(path, trust_remote_code=self.options.trust_remote_code)
        tokens.add_tokens(tokenizer, self.options.add_tokens or [])
        return tokenizer

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max((int(cache.lengths.max(initial=0)) for cache in self.caches.values()), default=0)

    @cached_property
    def renderer(self) -> Renderer:
        """The tokenizer together with the template."""
        options = self.options
        text = resolve_chat_template(self.tokenizer, options.chat_template)
        template = ChatTemplate(self.tokenizer, text, options.chat_template_kwargs, options.unproved)
        return Renderer(self.tokenizer, template, options.train_on)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Stop tokens of the template (from a probe) and of every data set that was prepared."""
        probe = Conversation((Message("user", "Hello"), Message("assistant", "Hi")))
        rendered = self.renderer.render([probe], [0])[0]
        template = set() if isinstance(rendered, UserError) else {i for example in rendered for i in example.stop_ids}
        return sorted(template.union(*(cache.meta["stop_ids"] for cache in self.caches.values())))

    def prepare(self, stage: str) -> None:
        """Reads, renders and tokenizes what a stage needs; from the cache where nothing changed.

        The command line calls it before any process group exists, so that no rank times out while one works.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            UserError: A source, a row or a setting is wrong.
        """
        needed = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": []}[stage]
        # a validation set that is split off needs the training rows
        self._open_rows(["train", *needed] if "validation" in needed and self.options.val_size is not None else needed)
        for name in needed:
            if name in self.rows and name not in self.caches:
                rows = self.rows[name]
                self.caches[name] = self.preparation(rows).cached(rows, self._cache_dir(), name, self._num_workers())
                self._report_overlap(name)
                self.__dict__.pop("stop_ids", None)  # the property is computed anew
        if stage in ("validate", "test") and needed[0] not in self.caches:
            either = " or data.val_size" if stage == "validate" else ""
            raise UserError(f"data.{needed[0]}{either} is not set: `{stage}` has nothing to evaluate")

    def _report_overlap(self, name: str) -> None:
        if name == "validation" and "train" in self.caches:
            if overlap := num_overlapping(self.caches["train"], self.caches[name]):
                log.warning("validation: %s rows are in the training set too", f"{overlap:,}")

    def _open_rows(self, names: Sequence[str]) -> None:
        options = self.options
        for name in names:
            spec = getattr(options, name)
            if spec is None or name in self.rows:
                continue
            rows = sources.open_rows(spec, split=name, key=f"data.{name}", **self._source_options())
            self.rows[name] = rows if options.max_samples is None else sources.limit(rows, options.max_samples)
            if name == "train" and options.val_size is not None:
                rows = self.rows["train"]
                train, validation = sources.split_rows(len(rows), options.val_size, options.seed, rows.origins)
                self.rows |= {"train": sources.subset(rows, train), "validation": sources.subset(rows, validation)}
        for name in names:
            if name in self.rows and len(counts := self.rows[name].counts()) > 1 and f"data.{name}" not in self._told:
                self._told.add(f"data.{name}")
                log.info("%s: %s", name, ", ".join(f"{rows:,} rows of {source}" for source, rows in counts))

    def fingerprint(self) -> dict[str, Any]:
        """The training examples as a hash, and by the names of the settings all that decides them and their order."""
        rows, options = self.rows["train"], self.options
        parts = self.preparation(rows).identity(rows)
        order = {"packing": options.packing, "global_batch_size": options.global_batch_size, "seed": options.seed}
        return {
            "examples": self.caches["train"].fingerprint,
            "settings": _readable({**parts.pop("renderer"), **parts}),
            "order": _readable(order),
        }

    def check_same(self, saved: dict[str, Any]) -> None:
        """Refuses to go on with other examples, or in another order, than those of a checkpoint.

        Args:
            saved: What `fingerprint` returned then.

        Raises:
            UserError: Says which setting differs.
        """
        now = self.fingerprint()
        changed = _differences(saved["order"], now["order"])
        if saved["examples"] != now["examples"]:
            changed += _differences(saved["settings"], now["settings"]) or ["the tokens themselves, by no setting"]
        if changed:
            raise UserError(
                f"the checkpoint was made with other examples or in another order: {'; '.join(changed)}: restore that, "
                "or set resume.allow_other_data to true"
            )

    def open(self, name: str) -> Rows:
        """The rows of one data set.

        Raises:
            UserError: It is not set.
        """
        self._open_rows([name])
        if name not in self.rows:
            raise UserError(f"data.{name} is not set")
        return self.rows[name]

    def preparation(self, rows: Rows) -> Preparation:
        """How the rows of a data set become examples, the format of each source decided."""
        members = sources.by_source(rows)
        readings = {number: self._reading(member, len(members) == 1) for number, member in members.items()}
        mapping = self.options.column_mapping
        if mapping and all(reading.column_mapping is None for reading in readings.values()):
            raise UserError(f"`data.column_mapping` names {', '.join(mapping)}, which no source of {rows.name} has")
        if any(reading.format != "text" for reading in readings.values()):
            self._check_system_prompt()
        keys = ("prompt_template", "system_prompt", "on_bad_row", "max_length", "overlong")
        return Preparation(self.renderer, readings, **{key: getattr(self.options, key) for key in keys})

    def _check_system_prompt(self) -> None:
        """In rows it would only be counted, but who sets it wants it seen."""
        if not self.options.system_prompt:
            return
        probe, template = self.question("Hello"), self.renderer.template
        try:
            text = template.prompt(probe)
        except UserError:
            return  # a row is refused likewise, with its place
        if "left_out:system_turn" in template.left_out(probe, [text]):
            raise UserError(
                "data.system_prompt is set, but the chat template does not write it, so the model would not see it; "
                "set data.chat_template to a template that writes system turns, or data.system_prompt to null"
            )

    def _reading(self, rows: Rows, is_alone: bool) -> Reading:
        """Of one source. In a mixture a column mapping is for the members that have its columns."""
        format, mapping = self.options.format, self.options.column_mapping
        if not (first := rows.head(20)):  # all are bad: the first says why
            try:
                rows[0]
            except UserError as error:
                raise UserError(f"{rows.where(0)}: {error}") from error
        if not is_alone and not {column for row in first for column in row}.intersection(mapping or ()):
            mapping = None
        template, said = self.options.prompt_template, list[str]()
        if format == "auto":
            format, *said = formats.detect_format(first, mapping, template)
        if rows.name not in self._told:
            self._told.add(rows.name)
            for line in (*said, *formats.report_unread(first, format, mapping, template)):
                log.info("%s: %s", rows.name, line)
        return Reading(format, mapping)

    def _source_options(self) -> dict[str, Any]:
        return {"builtin": demo.rows, "seed": self.options.seed, "cache_dir": self._cache_dir() / "sources"}

    def _cache_dir(self) -> Path:
        if self.options.cache_dir is not None:
            return Path(self.options.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lit_sft"

    def _num_workers(self) -> int:
        """Processes that tokenize: `auto` is one for each core that this process may use."""
        if self.options.num_workers != "auto":
            if self.options.num_workers < 0:
                raise UserError(f"data.num_workers is {self.options.num_workers}, expected auto or 0 and more")
            return int(self.options.num_workers)
        num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return min(num_cores, MAX_WORKERS)

    def question(self, text: str) -> Conversation:
        """A question as the model is asked it."""
        system = self.options.system_prompt
        return Conversation((*([Message("system", system)] if system else []), Message("user", text)))

    def questions(self) -> list[Prompt]:
        """`data.questions`."""
        return encode(self._listed(self.options.questions, "data.questions"), self.renderer)

    def asked_by_predict(self) -> list[Prompt]:
        """What `predict` answers: `data.predict`, or else `data.questions`."""
        spec = self.options.questions if self.options.predict is None else self.options.predict
        if not spec:
            raise UserError("there is nothing to predict: set data.predict to a file or to a list of questions")
        if isinstance(spec, list) and all(isinstance(text, str) for text in spec):
            return encode(self._listed(spec, "data.predict"), self.renderer)
        rows = sources.open_rows(spec, split="test", key="data.predict", **self._source_options())
        return self.asked(rows if self.options.max_samples is None else sources.limit(rows, self.options.max_samples))

    def asked(self, rows: Rows, count: int | None = None, skip: bool = False) -> list[Prompt]:
        """The first `count` rows (None: all), and the last answer of each.

        Args:
            rows: Of one data set.
            count: How many.
            skip: Leave out bad rows where `data.on_bad_row` says so; they are counted where they are tokenized.
        """
        preparation, prompts = self.preparation(rows), []
        for index in range(len(rows) if count is None else min(count, len(rows))):
            try:
                conversation = preparation.conversation(rows, index, need_answer=False)
                # the whole: the prompt is the one that the answer is trained behind, with the same template switch
                reference = formats.conversation_to_prompt(conversation)[1]
                prompts += encode([Asked(conversation, reference, rows.where(index))], self.renderer)
            except UserError:
                if not skip or self.options.on_bad_row != "skip":
                    raise
        return prompts

    def _listed(self, questions: Sequence[str], key: str) -> list[Asked]:
        self._check_system_prompt()
        return [Asked(self.question(text), None, f"{key}[{n}]") for n, text in enumerate(questions)]


def _readable(parts: Mapping[str, Any]) -> dict[str, str]:
    """Settings as short texts: long ones are hashed."""
    texts = {key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in parts.items()}
    return {
        key: text if len(text) <= 80 else "#" + hashlib.sha256(text.encode()).hexdigest()[:12]
        for key, text in texts.items()
    }


def _differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """What differs, as `max_length (2048, now 1024)`."""
    return [
        f"{key} ({saved.get(key, 'unset')}, now {current.get(key, 'unset')})"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
