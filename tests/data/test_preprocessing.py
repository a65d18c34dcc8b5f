"""Rows to examples on disk: everything is counted, nothing is made twice, one rank works and the
others wait.
"""

import json
import logging
import multiprocessing
import os
import time
import tracemalloc
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from running import chat_rows, write_rows
from terminal import log_lines
from tiny import CHATML, save_tiny, tiny_llama, tiny_tokenizer
from transformers.utils import chat_template_utils

from lit_sft import preprocessing
from lit_sft.data import chat_template
from lit_sft.data.cache import COLUMNS, META, TOKENS, Block, cache_key, write_cache
from lit_sft.data.packing import one_per_pack
from lit_sft.data.sources.rows import subset
from lit_sft.data.stats import Counts
from lit_sft.data.tokenize import Renderer
from lit_sft.data.workers import map_in_order
from lit_sft.datamodule import SFTDataModule
from lit_sft.errors import UserError
from lit_sft.generation.prompts import Asked, encode
from lit_sft.preprocessing import num_overlapping


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO, logger="lit_sft")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("prepare") / "model")


@pytest.fixture
def open_data(model, tmp_path):
    """The data of a run, not yet prepared; rows are a list or a path."""

    def get(rows, **options):
        train = write_rows(tmp_path / "train.jsonl", rows) if isinstance(rows, list) else rows
        settings = {
            "model_name_or_path": model,
            "cache_dir": str(tmp_path / "cache"),
            "max_length": 64,
            **options,
        }
        return SFTDataModule(train=str(train), **settings).data

    return get


@pytest.fixture
def prepared(open_data):
    def get(rows, **options):
        data = open_data(rows, **options)
        data.prepare("fit")
        return data

    return get


def chat(question, answer, **flags):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **flags},
        ]
    }


def examples(data, name="train"):
    cache = data.caches[name]
    return [
        (ids.tolist(), mask.tolist(), row)
        for ids, mask, row in (cache[i] for i in range(len(cache)))
    ]


def counts(data):
    return Counts(**data.caches["train"].meta)


# ------------------------------------------------------------------ counts

LONG = "What is it? " * 30
MIXED = [
    chat("Hello", "world"),
    {"messages": [{"role": "user", "content": "no answer"}]},
    chat("Hello", LONG),
    chat("not trained", "fine", train=0),
    {"messages": [{"role": "usr", "content": "x"}]},
    chat("How are you?", "fine"),
]


def test_every_row_is_counted(prepared):
    data = prepared(MIXED, on_bad_row="skip")
    told = counts(data)
    assert (told.rows_read, told.rows_kept, told.examples) == (6, 2, 2)
    assert told.dropped == {
        "bad row (data.on_bad_row: skip): it does not fit the format": 2,
        "longer than data.max_length 64": 1,
        "no token of it is trained": 1,
    }
    kept = examples(data)
    assert [row for _, _, row in kept] == [0, 5]
    assert told.tokens == sum(len(ids) for ids, _, _ in kept)
    assert told.trained_tokens == sum(sum(mask[1:]) for _, mask, _ in kept)
    answer = len(data.tokenizer(LONG + "<|im_end|>")["input_ids"])
    assert told.lost_trained_tokens == answer
    assert told.longest > answer
    assert told.lines("train") == [
        (
            f"train: 2 of 6 rows kept as 2 examples, {told.tokens} tokens,"
            f" {told.trained_tokens / told.tokens:.0%} of them trained, the longest {told.longest}"
        ),
        "train: 2 rows dropped: bad row (data.on_bad_row: skip): it does not fit the format",
        "train: 1 rows dropped: longer than data.max_length 64",
        "train: 1 rows dropped: no token of it is trained",
        f"train: {answer} target tokens lost to data.max_length",
    ]


REWRITING = (
    "{% for message in messages %}{% set is_old = message.role == 'assistant' and not loop.last"
    " %}{{ '<|im_start|>' + message.role + '\\n' + ('-' if is_old else message.content) +"
    " '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)
"""Shows an earlier answer as a dash, so that every answer becomes an example of its own."""


def test_a_row_that_loses_a_part_is_kept(prepared):
    long_end = {"messages": [*chat("Hello", "world")["messages"], *chat("Hello", LONG)["messages"]]}
    data = prepared([long_end, chat("Hello", "world")], chat_template=REWRITING)
    told = counts(data)
    assert (told.rows_read, told.rows_kept, told.examples, dict(told.dropped)) == (2, 2, 2, {})
    assert told.notes == {"per_turn": 1, "partly_dropped": 1}


def test_what_was_done_is_told():
    notes = {"switch:enable_thinking=false": 3, "per_turn": 1200, "something_new": 2}
    lines = Counts(notes=notes, placeholders={"{{name}}": 91}).lines("train")[1:]
    assert lines == [
        (
            "train: 3 rows: rendered with the template's switch {enable_thinking: false}; serve the"
            " model with it (data.chat_template_kwargs)"
        ),
        (
            "train: 1,200 rows: one example per assistant turn, because the template rewrites"
            " earlier turns"
        ),
        "train: 2 rows: something_new",
        "train: 91 rows with {{name}} as it stands: nothing fills it",
    ]


USER_AND_ASSISTANT = CHATML.replace(
    "{{ '<|im_start|>'", "{% if message.role in ('user', 'assistant') %}{{ '<|im_start|>'"
)
USER_AND_ASSISTANT = USER_AND_ASSISTANT.replace("{% endfor %}", "{% endif %}{% endfor %}")
"""Writes no other role."""


def test_turns_that_the_template_does_not_write_are_counted_by_row(prepared):
    rows = [
        {"messages": [{"role": role, "content": "Be brief."}, *A["messages"]]}
        for role in ("system", "developer")
    ]
    with log_lines() as lines:
        told = counts(prepared([*rows, rows[0], A], chat_template=USER_AND_ASSISTANT))
    assert told.rows_kept == 4 and told.notes == {
        "left_out:system_turn": 2,
        "left_out:developer_turn": 1,
    }
    rest = "turn that the template does not write, so the model does not see it"
    assert {f"train: 2 rows: a system {rest}", f"train: 1 rows: a developer {rest}"} <= set(lines)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_system_prompt_that_the_template_does_not_write_is_refused(on_bad_row, open_data):
    options = {
        "chat_template": USER_AND_ASSISTANT,
        "system_prompt": "Be brief.",
        "on_bad_row": on_bad_row,
    }
    said = (
        "^data.system_prompt is set, but the chat template does not write it.*data.chat_template.*"
        " to null$"
    )
    with pytest.raises(UserError, match=said):
        open_data([A], **options).prepare("fit")
    with pytest.raises(UserError, match=said):
        open_data([A], predict=["Hello"], **options).asked_by_predict()
    open_data([A], **options | {"system_prompt": None}).prepare("fit")
    open_data([A], **options | {"chat_template": CHATML}).prepare("fit")
    open_data([{"text": "once"}], **options).prepare("fit")  # no template is used


def test_placeholders_are_counted_by_row_and_stay(prepared):
    with log_lines() as lines:
        data = prepared(
            [chat("I am {{name}}, {{ name }}", "Hello {{author}}"), chat("Hi", "I am {{name}}")]
        )
    assert counts(data).placeholders == {"{{name}}": 2, "{{author}}": 1}
    assert "train: 2 rows with {{name}} as it stands: nothing fills it" in lines
    assert "I am {{name}}" in data.tokenizer.decode(examples(data)[1][0])


def test_empty_fields_of_a_template_are_counted(prepared):
    rows = [{"instruction": "Add", "input": text, "output": "2"} for text in ("1+1", "", "")]
    with log_lines() as lines:
        data = prepared(rows, prompt_template="{instruction} {input}:", chat_template="raw")
    assert counts(data).blank == {"input": 2}
    assert "train: 2 rows: input of data.prompt_template is empty" in lines


@pytest.mark.parametrize("format", ["auto", "alpaca"])
def test_columns_that_are_not_read_are_told_once(format, prepared, tmp_path):
    rows = [
        {"instruction": f"Who {n}?", "context": "Ann.", "response": "Ann", "category": "qa"}
        for n in range(9)
    ]
    with log_lines() as lines:
        prepared(rows, column_mapping={"response": "output"}, format=format, val_size=2)
    line = f"{tmp_path / 'train.jsonl'}: columns that are not read: context, category"
    assert lines.count(line) == 1
    with log_lines() as lines:
        prepared([A, B])
    assert not [line for line in lines if "not read" in line]


def test_unread_columns_that_would_change_the_text_are_counted(prepared):
    rows = [
        {**A, "chat_template_kwargs": {"enable_thinking": False}},
        {**B, "functions": [{"name": "f"}]},
        B,
    ]
    with log_lines() as lines:
        data = prepared([*rows, rows[0]])
    assert counts(data).notes == {"unread:chat_template_kwargs": 2, "unread:functions": 1}
    assert any(
        line.startswith("train: 2 rows: chat_template_kwargs of the row are not read")
        for line in lines
    )
    assert any(line.startswith("train: 1 rows: functions are not read;") for line in lines)


def test_members_of_a_mixture_have_formats_of_their_own(model, tmp_path):
    """Each is detected; a column mapping is for the member that has its columns; rows of each are
    counted.
    """
    alpaca, pair = (
        {"instruction": "Hello", "output": "world"},
        {"question": "Hello", "answer": "fine"},
    )
    spec = [
        write_rows(tmp_path / f"{n}.jsonl", rows)
        for n, rows in enumerate(([A, B], [alpaca], [pair]))
    ]
    mapping = {"question": "prompt", "answer": "completion"}
    options = {"model_name_or_path": model, "cache_dir": str(tmp_path), "column_mapping": mapping}
    with log_lines() as lines:
        data = SFTDataModule(train=spec, **options).data
        data.prepare("fit")
    assert counts(data).rows_kept == 4
    readings = data.preparation(data.rows["train"]).readings
    assert [readings[n].format for n in range(3)] == ["messages", "alpaca", "prompt_completion"]
    assert f"train: 2 rows of {spec[0]}, 1 rows of {spec[1]}, 1 rows of {spec[2]}" in lines
    with pytest.raises(
        UserError, match="`data.column_mapping` names question, answer, which no source"
    ):
        SFTDataModule(train=spec[:2], **options).data.prepare("fit")


# ------------------------------------------------------------------ length


def test_truncation_cuts_and_adds_nothing(prepared):
    rows = [chat("Hello", LONG), chat("Hello", "world"), chat(LONG, "world")]
    whole = examples(prepared(rows, max_length=1024))
    data = prepared(rows, max_length=40, overlong="truncate")
    cut = examples(data)
    assert [row for _, _, row in cut] == [0, 1]  # of row 2 only the question would be left
    assert cut[0] == (whole[0][0][:40], whole[0][1][:40], 0)
    assert cut[1] == whole[1]
    stops = set(data.tokenizer.all_special_ids)
    assert cut[0][0][-1] not in stops and cut[0][1][-1] == 1
    assert all(sum(mask[1:]) for _, mask, _ in cut)
    told = counts(data)
    assert (told.truncated, told.lost_trained_tokens) == (
        1,
        sum(whole[0][1][40:]) + sum(whole[2][1]),
    )
    assert told.dropped == {
        "longer than data.max_length 40 even after truncation, no target is left": 1
    }
    assert any(
        "target tokens lost to data.max_length; 1 examples truncated" in line
        for line in told.lines("x")
    )


def test_a_stop_token_that_was_cut_off_is_not_trained(prepared):
    end = prepared([chat("Hello", "world")]).caches["train"].meta["stop_ids"]
    assert end == tiny_tokenizer().convert_tokens_to_ids(["<|im_end|>"])
    cut = prepared([chat("Hello", LONG)], overlong="truncate")
    assert cut.caches["train"].meta["stop_ids"] == []
    assert cut.stop_ids == end  # known from the template all the same


def test_a_token_that_begins_messages_would_not_become_the_eos_of_an_export(prepared):
    """It is one of several ends of turns, as of GLM; an export takes the only one as eos."""
    template = (
        "{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else 'A:\\n') + m.content }}"
        "{% endfor %}{{ 'A:\\n' if add_generation_prompt }}"
    )
    data = prepared([chat("Hello", "world")], chat_template=template)
    tokenizer = data.tokenizer
    [begin] = tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    assert data.caches["train"].meta["stop_ids"] == [begin]
    assert data.turn_end_ids == data.stop_ids == sorted([begin, tokenizer.eos_token_id])


def test_ends_of_calls_are_stop_tokens_but_no_candidates_for_eos(prepared):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{{ '<|endoftext|>' if m.tool_calls else '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
    )
    data = prepared([chat("Hello", "world")], chat_template=template)
    end, call_end = data.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert data.turn_end_ids == [end]
    assert data.stop_ids == sorted([end, call_end])


def test_overlong_error_names_row_and_remedy(open_data):
    with pytest.raises(
        UserError, match=r"train.jsonl line 2: \d+ tokens are more than data.max_length 64; raise"
    ):
        open_data([chat("Hello", "world"), chat("Hello", LONG)], overlong="error").prepare("fit")


def test_no_row_left_is_an_error(open_data):
    with pytest.raises(
        UserError, match="data.train .*no row is left to train on: 2 rows no token of it is trained"
    ):
        open_data([chat("Hello", "world", train=0)] * 2).prepare("fit")


# ------------------------------------------------------------------ bad rows


def test_a_bad_row_stops_with_its_place(open_data):
    with pytest.raises(UserError, match=r"train.jsonl line 2: .*without an answer"):
        open_data(MIXED).prepare("fit")


def test_rows_that_cannot_be_read_or_tokenized_are_skipped_by_reason(
    open_data, tmp_path, monkeypatch
):
    """Also where none of the first rows can be read, and where a tokenizer fails on one text."""
    good = json.dumps(chat("Hello", "world")).encode()
    bad = [b'{"messages": [', b"3", '"é"'.encode("latin-1"), b'{"messages": 1' + b"0" * 5000 + b"}"]
    lost = json.dumps(chat("Hello", "no words for this")).encode()
    path = tmp_path / "torn.jsonl"
    path.write_bytes(b"\n".join([*bad * 6, good, lost, good, b'{"messages": []}', good]))
    data = open_data(str(path), on_bad_row="skip")
    encode = type(data.tokenizer)._encode_plus

    def fail_on_one(self, text, *args, **kwargs):
        if any("no words" in one for one in text):
            raise TypeError("a text\nwithout words")
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(type(data.tokenizer), "_encode_plus", fail_on_one)
    with log_lines() as lines:
        data.prepare("fit")
    reason = "bad row (data.on_bad_row: skip): "
    assert counts(data).dropped == {
        f"{reason}it cannot be read": 24,
        f"{reason}the template or the tokenizer does not take it": 1,
        f"{reason}it does not fit the format": 1,
    }
    assert [row for _, _, row in examples(data)] == [24, 26, 28]
    assert any("more than 4,300 digits" in line for line in lines)
    with pytest.raises(UserError, match=r"line 26: the tokenizer .*\(TypeError: a text without"):
        open_data(str(path), on_bad_row="error").preparation(data.rows["train"]).examples(
            subset(data.rows["train"], [25]), Counts()
        )


def test_keys_of_turns_that_nothing_reads_are_counted(prepared):
    """All rows count, not only the first ones."""
    rows = [chat("Hello", f"world {i}") for i in range(40)]
    for row in rows[30:]:
        row["messages"][1]["rating"] = 5
    lines = counts(prepared(rows)).lines("train")
    assert "train: 10 rows: the key 'rating' of a turn is not read" in lines


def test_many_skipped_rows_do_not_fill_the_screen(prepared):
    bad = {"messages": [{"role": "user", "content": "no answer"}]}
    with log_lines() as lines:
        data = prepared([bad] * 40 + [chat("Hello", "world")], on_bad_row="skip")
    skips = [line for line in lines if line.startswith("skipped: ")]
    assert len(skips) == preprocessing.SHOWN_SKIPS and "train.jsonl line 1: " in skips[0]
    assert counts(data).dropped == {
        "bad row (data.on_bad_row: skip): it does not fit the format": 40
    }


# ------------------------------------------------------------------ copies

A, B, C = chat("Hello", "world"), chat("How are you?", "fine"), chat("Is it?", "1")


def test_copies_are_counted(prepared):
    with log_lines() as lines:
        data = prepared([A, B, A, A])
    assert counts(data).duplicates == 2
    assert "train: 2 rows are exact copies of another" in lines


def test_rows_that_a_mixture_repeats_are_no_copies(model, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [A, B, A])
    options = {"model_name_or_path": model, "cache_dir": str(tmp_path)}
    data = SFTDataModule(train=[{"path": path, "weight": 3.0}], **options).data
    data.prepare("fit")
    assert len(data.caches["train"]) == 9
    assert counts(data).duplicates == 1


def test_a_row_of_several_examples_is_one_copy(prepared, tmp_path):
    """Templates that rewrite history make an example of each turn; half a row in common is no
    copy.
    """
    turns = [*A["messages"], *B["messages"]]
    long, other = {"messages": turns}, {"messages": [*A["messages"], *C["messages"]]}
    template = CHATML.replace(
        "message['content']",
        "('' if message.role == 'assistant' and not loop.last else message.content)",
    )
    options = {
        "chat_template": template,
        "validation": write_rows(tmp_path / "validation.jsonl", [long, other, C]),
    }
    data = prepared([long, A, long, C, long], **options)
    assert (len(data.caches["train"]), counts(data).notes["per_turn"]) == (8, 3)
    assert counts(data).duplicates == 2
    assert num_overlapping(data.caches["train"], data.caches["validation"]) == 2


def test_overlap_with_validation_is_counted(prepared, tmp_path):
    with log_lines() as lines:
        data = prepared([A, B], validation=write_rows(tmp_path / "validation.jsonl", [B, C]))
    assert num_overlapping(data.caches["train"], data.caches["validation"]) == 1
    assert "validation: 1 rows are in the training set too" in lines


# ------------------------------------------------------------------ the cache


@pytest.fixture
def no_rendering(monkeypatch):
    """From here on, nothing may be tokenized."""

    def forbid():
        monkeypatch.setattr(Renderer, "render", lambda *_: pytest.fail("tokenized again"))

    return forbid


def test_a_second_start_tokenizes_nothing(prepared, no_rendering):
    with log_lines() as first:
        before = examples(prepared(MIXED, on_bad_row="skip"))
    no_rendering()
    with log_lines() as second:
        assert examples(prepared(MIXED, on_bad_row="skip")) == before
    assert any(line.startswith("tokenized ") for line in first)
    told = [line for line in first if line.startswith("train: ")]
    assert len(told) == 5 and second[-len(told) :] == told  # counts and all


SAME = {
    "packing": False,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "num_workers": 0,
    "questions": [],
}
OTHER = {
    "chat_template": CHATML.replace("im_end|>'", "im_end|>' + ' '"),
    "system_prompt": "You are a helpful assistant.",
    "max_length": 65,
    "overlong": "truncate",
    "train_on": "last_completion",
    "on_bad_row": "skip",
    "unproved": "lenient",
    "max_samples": 1,
    "format": "sharegpt",
}


def key(data):
    rows = data.open("train")
    return cache_key(data.preparation(rows).identity(rows))


def test_template_variables_change_the_key(open_data):
    template = "{{ colour }}" + CHATML
    keys = set()
    for colour in ("red", "blue"):
        kwargs = {"colour": colour}
        data = open_data([A, B], chat_template=template, chat_template_kwargs=kwargs)
        keys.add(key(data))
    assert len(keys) == 2


@pytest.mark.parametrize("option", SAME)
def test_options_that_change_no_example_keep_the_key(option, open_data):
    assert key(open_data([A, B], **{option: SAME[option]})) == key(open_data([A, B]))


@pytest.mark.parametrize("option", OTHER)
def test_options_that_change_examples_change_the_key(option, open_data):
    assert key(open_data([A, B], **{option: OTHER[option]})) != key(open_data([A, B]))


def test_other_rows_and_other_tokenizers_change_the_key(open_data, tmp_path):
    first = key(open_data([A, B]))
    assert key(open_data([A, C])) != first
    assert key(open_data([B, A])) != first
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["hello"])
    other = save_tiny(tmp_path / "other", tiny_llama(len(tokenizer)), tokenizer)
    assert key(open_data([A, B], model_name_or_path=other)) != first
    assert key(open_data([A, B])) == first


DATED = "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML


class NextYear(date):
    @classmethod
    def today(cls):
        return date.today() + timedelta(days=365)


class InNextYear(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now() + timedelta(days=365)


def test_a_template_that_writes_the_date_gets_the_same_on_every_day(prepared, monkeypatch):
    """In the rows and in what is asked; where the date is lost, a resume is refused and names
    it.
    """
    data = prepared([A, B], chat_template=DATED)
    packs, path = one_per_pack(2), Path(data.options.cache_dir) / "chat_template_date"
    saved, first = data.fingerprint(packs), path.read_text().strip()
    monkeypatch.setattr(chat_template, "date", NextYear)
    monkeypatch.setattr(chat_template_utils, "datetime", InNextYear)
    later = prepared([A, B], chat_template=DATED)
    assert (
        later.fingerprint(packs) == saved
        and later.caches["train"].path == data.caches["train"].path
    )
    [prompt] = encode([Asked(later.question("Hello"), "")], later.renderer)
    assert examples(data)[0][0][: len(prompt.ids)] == prompt.ids
    path.unlink()
    with log_lines() as lines:
        anew = prepared([A, B], chat_template=DATED)
    second = path.read_text().strip()
    assert second == str(NextYear.today()) != first
    assert any(
        f"the date of the day: where it writes it, that is {second} " in line and str(path) in line
        for line in lines
    )
    assert anew.caches["train"].path != data.caches["train"].path
    said = (
        f'order: chat_template_date in data.cache_dir \\("{first}", now "{second}"\\): restore that'
    )
    with pytest.raises(UserError, match=said):
        anew.check_same(saved, packs)
    assert anew.chat_template == DATED  # as it is exported


def test_what_a_checkpoint_remembers_is_of_the_rows_that_were_read(prepared, monkeypatch):
    data = prepared([A, B])
    packs = one_per_pack(2)
    before = data.fingerprint(packs)
    with open(data.options.train, "a") as file:
        file.write(json.dumps(C) + "\n")
    monkeypatch.setattr(
        Renderer, "fingerprint", lambda *_: pytest.fail("the tokenizer is written out again")
    )
    assert data.fingerprint(packs) == before


@pytest.mark.parametrize("name", [META, *COLUMNS, *TOKENS])
def test_a_damaged_cache_is_set_aside_and_made_anew(name, prepared):
    data = prepared([A, B])
    before, path = examples(data), data.caches["train"].path
    with (path / name).open("r+b") as file:
        file.truncate(3)
    with log_lines() as lines:
        assert examples(prepared([A, B])) == before
    assert any(f"the cache {path} is damaged" in line and "made anew" in line for line in lines)
    assert len(list(path.parent.glob(f"{path.name}.damaged.*"))) == 1


# ------------------------------------------------------------------ ranks

FORK = multiprocessing.get_context("fork")


def start_rank(rank, data, results, **variables):
    """Prepares in a process of its own, as a launcher would start it; puts (rank, what came of it)
    into the queue.
    """

    def work():
        os.environ.update(variables, RANK=str(rank))
        if rank:
            Renderer.render = lambda *_: pytest.fail("only rank 0 tokenizes")
        try:
            data.prepare("fit")
            results.put((rank, examples(data)))
        except UserError as error:
            results.put((rank, str(error)))

    process = FORK.Process(target=work)
    process.start()
    return process


def run_ranks(data, pause=0.5):
    """Ranks 1 and 2 first, rank 0 later; what each of them got."""
    results = FORK.Queue()
    processes = [start_rank(1, data, results), start_rank(2, data, results)]
    time.sleep(pause)
    assert results.empty()
    processes.append(start_rank(0, data, results))
    try:
        got = dict(results.get(timeout=20) for _ in processes)
        for process in processes:
            process.join(timeout=10)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        return got
    finally:
        for process in processes:
            process.kill()


def test_other_ranks_wait_for_rank_0(open_data):
    got = run_ranks(open_data([A, B, C]))
    assert got[0] == got[1] == got[2]
    assert len(got[0]) == 3


def test_other_ranks_end_with_the_error_of_rank_0(open_data):
    got = run_ranks(open_data(MIXED))
    assert "train.jsonl line 2: a row without an answer" in got[0]
    assert got[1] == got[2] == f"rank 0 could not prepare the data: {got[0]}"


def test_the_error_of_another_job_does_not_count(open_data, monkeypatch):
    data, results = open_data([A, B, C]), FORK.Queue()
    processes = [start_rank(1, data, results, SLURM_JOB_ID="1")]
    with monkeypatch.context() as patched:
        patched.setattr(preprocessing.Preparation, "_write", raising(UserError("disk full")))
        processes.append(start_rank(0, data, results, SLURM_JOB_ID="2"))
    try:
        assert results.get(timeout=20) == (0, "disk full")
        time.sleep(0.5)
        assert results.empty()
        processes.append(start_rank(0, data, results, SLURM_JOB_ID="1"))
        got = dict(results.get(timeout=20) for _ in range(2))
        assert got[0] == got[1] and len(got[0]) == 3
    finally:
        for process in processes:
            process.kill()


def raising(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_error_of_the_data(error, open_data, monkeypatch):
    data = open_data([A, B, C])
    monkeypatch.setattr(preprocessing.Preparation, "_write", raising(error()))
    with pytest.raises(error):
        data.prepare("fit")
    assert not list(Path(data.options.cache_dir).glob("*.error"))


def test_an_error_of_an_earlier_run_does_not_count(open_data):
    data = open_data([A, B, C])
    failure = Path(data.options.cache_dir) / f"{key(data)}.{preprocessing._job()}.error"
    failure.parent.mkdir()
    failure.write_text("disk full")
    os.utime(failure, (time.time() - 3600,) * 2)
    got = run_ranks(data)
    assert got[0] == got[1] == got[2]
    assert not failure.exists()


def test_a_damaged_cache_is_waited_for(prepared, open_data):
    path = prepared([A, B, C]).caches["train"].path
    (path / "rows.i64").unlink()
    got = run_ranks(open_data([A, B, C]))
    assert got[0] == got[1] and len(got[0]) == 3


# ------------------------------------------------------------------ workers


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(preprocessing, "CHUNK_ROWS", 7)
    monkeypatch.setattr(preprocessing, "ROWS_PER_WORKER", 20)


def test_workers_change_nothing(prepared, small_chunks, tmp_path):
    rows = [*MIXED, *chat_rows(70)]
    options = {"on_bad_row": "skip", "overlong": "truncate"}
    alone = prepared(rows, num_workers=1, **options)
    shared = prepared(rows, num_workers=3, cache_dir=str(tmp_path / "other"), **options)
    assert examples(shared) == examples(alone)
    assert shared.caches["train"].meta == alone.caches["train"].meta
    assert counts(shared).rows_read == 76
    few = prepared(MIXED, cache_dir=str(tmp_path / "few"), **options)
    assert counts(shared).longest == counts(few).longest > 100


def test_workers_report_the_first_bad_row(open_data, small_chunks):
    bad = {"messages": [{"role": "user", "content": "no answer"}]}
    with pytest.raises(UserError, match=r"train.jsonl line 31: a row without an answer"):
        open_data([*chat_rows(30), bad, *chat_rows(30), bad], num_workers=3).prepare("fit")
    assert not multiprocessing.active_children()


def test_few_rows_need_no_processes(prepared, monkeypatch):
    monkeypatch.setattr(
        "lit_sft.data.workers.ProcessPoolExecutor", lambda *_: pytest.fail("a process")
    )
    prepared(chat_rows(50), num_workers=4)


def die(item):
    if item == 3:
        os.kill(os.getpid(), 9)
    return item


def test_a_worker_that_dies_is_an_error_and_no_hang():
    before = dict(os.environ)
    with pytest.raises(
        UserError, match="a process that tokenizes rows was killed.*data.num_workers"
    ):
        list(map_in_order(die, range(100), 2))
    assert dict(os.environ) == before
    assert not multiprocessing.active_children()


def test_results_come_in_order_and_workers_do_not_run_ahead():
    taken = []

    def items():
        for item in range(100):
            taken.append(item)
            yield item

    def slow_start(item):
        time.sleep(0.05 if item == 0 else 0)
        return item

    for seen, result in enumerate(map_in_order(slow_start, items(), 2)):
        assert result == seen
        assert len(taken) <= seen + 6


def test_giving_up_in_between_leaves_no_process():
    results = map_in_order(die, range(1), 2)
    assert next(results) == 0
    results.close()
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------ memory


def test_memory_does_not_grow_with_rows(tmp_path):
    numbers = np.arange(1000)
    block = Block(
        np.full(1000, 2), numbers, numbers.astype(np.int32), numbers.astype(np.uint64), numbers.astype(np.uint32),
        np.zeros(2000, np.int32), np.ones(2000, np.uint8),
    )  # fmt: skip
    peaks = []

    def blocks():
        for _ in range(1000):
            yield block._replace(loss_mask=np.ones(2000, np.uint8))
        peaks.append(tracemalloc.get_traced_memory()[1])

    tracemalloc.start()
    cache = write_cache(tmp_path / "c", blocks(), {})
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(cache) == 1_000_000
    assert peaks[0] < 2**20
    assert held < 8 * len(cache) + 2**20  # the lengths


def test_a_chunk_of_rows_is_read_at_a_time(open_data, small_chunks, monkeypatch):
    data = open_data(chat_rows(40), max_length=256)
    rows = data.open("train")
    preparation = data.preparation(rows)
    read = []
    monkeypatch.setattr(
        type(rows), "__getitem__", lambda self, i: read.append(i) or self.parts[0].rows[i]
    )
    seen = []

    def watch(path, blocks, meta, name):
        for block in blocks:
            seen.append((len(block.lengths), len(read)))

    monkeypatch.setattr(preprocessing, "write_cache", watch)
    preparation._write(Path("unused"), rows, 1)
    assert [length for length, _ in seen] == [7, 7, 7, 7, 7, 5]
    assert [count for _, count in seen] == [7, 14, 21, 28, 35, 40]


def test_no_progress_bar_off_the_terminal(prepared, capfd):
    prepared([A, B])
    assert "tokenizing" not in capfd.readouterr().err


def test_meta_is_plain_json(prepared):
    path = prepared(MIXED, on_bad_row="skip").caches["train"].path
    assert json.loads((path / META).read_text())["dropped"]["no token of it is trained"] == 1
