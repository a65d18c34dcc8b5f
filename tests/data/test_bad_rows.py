"""The catalogue of what is wrong with rows, files and settings: each is one line that says what and
how to mend it.
"""

import gzip
import json

import pytest
from chat_templates import renderer_of, tokenizer_of
from running import write_rows

from lit_sft.data.formats.columns import detect_format
from lit_sft.data.formats.parse import to_conversation
from lit_sft.data.sources.open_rows import open_rows
from lit_sft.data.sources.rows import limit, split_rows
from lit_sft.data.stats import Counts
from lit_sft.errors import UserError
from lit_sft.preprocessing import Preparation, Reading

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
SHARED_CALL = {"from": "function_call", "value": '{"name": "f"}'}
PAIR = {"prompt": "hi", "completion": "hello"}


def chat(*turns, **columns):
    return "messages", {"messages": [*turns], **columns}


def asks(content, **keys):
    return chat({**USER, "content": content, **keys}, ANSWER)


def says(content, **keys):
    return chat(USER, {**ANSWER, "content": content, **keys})


def calls(**call):
    return says(None, tool_calls=[call])


def share(*turns, **columns):
    return "sharegpt", {"conversations": [*turns], **columns}


def alpaca(**columns):
    return "alpaca", {"instruction": "x", "output": "y", **columns}


def pair(completion):
    return "prompt_completion", {"prompt": "x", "completion": completion}


ROWS = {
    "no column": (
        ("messages", {"prompt": "x"}),
        "`messages` is missing",
        "prompt",
        "data.column_mapping",
    ),
    "null column": (("messages", {"messages": None}), "`messages` is missing or null"),
    "messages a number": (("messages", {"messages": 3}), "`messages` is an int, expected a list"),
    "messages broken JSON": (("messages", {"messages": "[{"}), "`messages`", "not JSON", "a list"),
    "messages too deep": (("messages", {"messages": "[" * 100_000}), "`messages`", "not JSON"),
    "messages by column": (
        ("messages", {"messages": {"role": ["user"]}}),
        "`messages` is a dict, expected a list",
    ),
    "no turns": (chat(), "no turns", "remove the row"),
    "turn a list": (chat(["user", "hi"]), "`messages[0]` is a list of str, expected an object"),
    "no role": (chat({"content": "hi"}), "`messages[0].role` is missing", "content"),
    "unknown role": (
        asks("x", role="usr"),
        "`messages[0].role` is 'usr'",
        "system, developer, user, assistant, tool",
    ),
    "role a list": (asks("x", role=["user"]), "`messages[0].role` is ['user']", "expected one of"),
    "null content": (says(None), "`messages[1].content` is missing or null"),
    "content a list of int": (
        says([1]),
        "`messages[1].content` is a list of int, expected a string",
    ),
    "content a float": (says(0.5), "`messages[1].content` is a float"),
    "nested lists": (says([[["a"]]]), "`messages[1].content` is a list of list"),
    "an image": (
        asks([{"type": "image_url"}]),
        "`messages[0].content[0].type` is 'image_url'",
        "only text",
        "remove",
    ),
    "text part without text": (asks([{"type": "text"}]), "`messages[0].content[0].text` is null"),
    "name a number": (asks("hi", name=3), "`messages[0].name` is an int"),
    "reasoning a list": (
        says("x", thinking=[3]),
        "`messages[1].thinking` is a list of int, expected a string",
    ),
    "two thoughts": (
        says("x", thinking="a", reasoning="b"),
        "`messages[1]` has different",
        "reasoning, thinking",
    ),
    "old call": (
        says(None, function_call={"name": "f"}),
        "`messages[1].function_call`",
        "old form",
        "`tool_calls`",
    ),
    "old call beside text": (
        says("x", function_call={"name": "f"}),
        "`messages[1].function_call`",
        "`tool_calls`",
    ),
    "weight of a half": (says("x", weight=0.5), "`messages[1]`", "weight 0.5", "0 or 1"),
    "weight a word": (says("x", train="yes"), "'yes'", "0 or 1"),
    "weight of a user": (asks("x", weight=1), "`messages[0]` (user)", "only in assistant"),
    "loss scale of two": (says("x", loss_scale=2.0), "`messages[1]`", "loss_scale 2.0", "0 or 1"),
    "loss mask a list": (says("x", loss_mask=[0, 1]), "`messages[1]`", "loss_mask [0, 1]"),
    "loss a word": (says("x", loss="false"), "loss 'false'", "true, false"),
    "flags that contradict": (
        says("x", weight=0, train=True),
        "`messages[1]` has flags that contradict",
        "weight, train",
    ),
    "masked but trained": (says("x", masked=True, loss=True), "contradict", "loss, masked"),
    "flags of parts": (
        share(
            HUMAN, {**GPT, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}
        ),
        "`conversations[1].train_detail`",
        "as a whole",
    ),
    "user not masked": (asks("x", masked=False), "`messages[0]` (user)", "only in assistant"),
    "half a turn trained": (
        share(HUMAN, {**GPT, "loss": False}, SHARED_CALL),
        "`conversations[1]` and `conversations[2]`",
        "same flag",
    ),
    "two values": (share(HUMAN, {**GPT, "content": "other"}), "`conversations[1].content` differ"),
    "two speakers": (share(HUMAN, {**GPT, "role": "user"}), "`conversations[1].role` differ"),
    "two calls": (
        share(HUMAN, {**SHARED_CALL, "tool_calls": [{"name": "g"}]}),
        "`conversations[1].tool_calls` differ",
    ),
    "pictures of a turn": (asks("x", images=["a.png"]), "`messages[0].images`", "only text"),
    "a placeholder": (
        chat({**USER, "content": "<image>\nWhat?"}, ANSWER, images=["a.png"]),
        "`messages[0]` has <image>",
        "column `images`",
        "only text",
    ),
    "a placeholder for a picture": (
        chat({**USER, "content": "Say <audio>"}, ANSWER, voice={"bytes": "x", "path": None}),
        "`messages[0]` has <audio>",
        "column `voice`",
    ),
    "a placeholder in a text": (
        ("text", {"text": "<video> x", "video": "a"}),
        "`text` has <video>",
    ),
    "arguments of another name": (
        calls(name="f", parameters={"a": 1}),
        "tool_calls[0]` has no `arguments`",
        "parameters",
    ),
    "arguments in another place": (
        calls(function={"name": "f"}, arguments={"a": 1}),
        "tool_calls[0]` has no `arguments`",
    ),
    "blank answer": (says(" \n"), "assistant turn `messages[1]` is blank"),
    "blank question": (asks(""), "user turn `messages[0]` is blank"),
    "only system": (
        chat({"role": "system", "content": "x"}),
        "only a system turn",
        "remove the row",
    ),
    "no answer": (chat(USER), "a row without an answer", "data.column_mapping"),
    "answer first": (
        chat(ANSWER, USER),
        "`messages[0]` has the role assistant",
        "user turn must come first",
    ),
    "surrogate": (says("a\ud83d"), "`messages[1]`", "surrogate '\\ud83d'", "remove it"),
    "surrogate in tools": (chat(USER, ANSWER, tools=[{"name": "\ud800"}]), "`tools`", "surrogate"),
    "calls of a user": (
        asks("x", tool_calls=[{"name": "f"}]),
        "`messages[0].tool_calls`",
        "only the assistant",
    ),
    "call without name": (calls(function={"arguments": "{}"}), "tool_calls[0].name` is missing"),
    "arguments no JSON": (calls(name="f", arguments="a=1"), "tool_calls[0].arguments", "not JSON"),
    "an argument twice": (
        calls(name="f", arguments='{"x": 1, "x": 2}'),
        "`messages[1].tool_calls[0].arguments`: the key 'x' stands twice",
    ),
    "a key twice in messages as text": (
        ("prompt_completion", {"prompt": '[{"role": "user", "content": "a", "content": "b"}]'}),
        "`prompt`: the key 'content' stands twice",
    ),
    "arguments a list": (
        calls(name="f", arguments="[1]"),
        "arguments` is a list of int, expected an object",
    ),
    "tools a word": (chat(USER, ANSWER, tools="calculator"), "`tools`", "not JSON"),
    "tools of words": (chat(USER, ANSWER, tools=["add"]), "`tools[0]`", "an object"),
    "unknown speaker": (
        share({"from": "alien", "value": "x"}),
        "`conversations[0].from` is 'alien'",
        "human",
    ),
    "no speaker": (share({"value": "x"}), "`conversations[0].from` is missing"),
    "value a number": (
        share(HUMAN, {"from": "gpt", "value": 42}),
        "`conversations[1].value` is an int",
    ),
    "gpt first": (
        share(GPT, HUMAN, GPT),
        "`conversations[0]` has the role assistant",
        "remove that turn",
    ),
    "call no JSON": (
        share(HUMAN, {"from": "function_call", "value": "f(1)"}),
        "`conversations[1].tool_calls`",
        "JSON",
    ),
    "two systems": (
        share({"from": "system", "value": "a"}, HUMAN, GPT, system="b"),
        "both system prompts",
        "keep one",
    ),
    "system a number": (share(HUMAN, GPT, system=3), "`system` is an int"),
    "no output": (
        alpaca(output=None, response="y"),
        "a row without an answer",
        "data.column_mapping",
    ),
    "no instruction": (alpaca(instruction=None), "`instruction` is missing or null", "output"),
    "output a number": (alpaca(output=42), "`output` is an int, expected a string"),
    "input a bool": (alpaca(input=True), "`input` is a bool"),
    "history of three": (
        alpaca(history=[["a", "b", "c"]]),
        "`history[0]`",
        "pair [question, answer]",
    ),
    "history with null": (alpaca(history=[["a", None]]), "`history[0][1]` is null"),
    "completion a number": (pair(4), "`completion` is an int, expected a string"),
    "completion asks": (pair([USER, ANSWER]), "`completion`", "move them to `prompt`"),
    "blank completion": (pair("\t"), "`completion` is blank"),
    "no text": (("text", {"content": "x"}), "`text` is missing", "content"),
    "blank text": (("text", {"text": " "}), "`text` is blank"),
    "text a list": (("text", {"text": ["a"]}), "`text` is a list of str"),
    "surrogate text": (("text", {"text": "\udc00"}), "`text`", "surrogate"),
}

SETTINGS = {
    "mapping to nowhere": (PAIR, {"column_mapping": {"question": "prompt"}}, ["`question`", "prompt, completion"]),
    "mapping collides": (PAIR, {"column_mapping": {"prompt": "completion"}}, ["data.column_mapping", "one name"]),
    "template column": (PAIR, {"prompt_template": "{question}"}, ["prompt_template {question}", "prompt, completion"]),
    "template null": ({**PAIR, "q": None}, {"prompt_template": "{q}"}, ["prompt_template {q}", "missing or null"]),
    "template list": ({**PAIR, "q": ["a"]}, {"prompt_template": "{q}"}, ["`q` is a list of str", "and numbers"]),
    "template braces": (PAIR, {"prompt_template": "{prompt"}, ["prompt_template` is broken", "{{ and }}"]),
    "template position": (PAIR, {"prompt_template": "{}"}, ["plain {column} fields"]),
    "template attribute": (PAIR, {"prompt_template": "{prompt.__class__}"}, ["plain {column} fields"]),
    "template width": (PAIR, {"prompt_template": "{prompt:>5}"}, ["plain {column} fields"]),
    "template fixed": (PAIR, {"prompt_template": "hello"}, ["plain {column} fields"]),
    "template no answer": ({"q": "x", "a": "y"}, {"prompt_template": "{q}"}, ["a row without an answer"]),
}  # fmt: skip


def one_line(caught, words):
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    (format, row), *words = ROWS[name]
    with pytest.raises(UserError) as caught:
        to_conversation(row, format=format)
    one_line(caught, words)


TEMPLATES = {
    "two users in a row": (
        "gemma",
        chat(USER, USER, ANSWER),
        ["roles must alternate", "merge neighbouring turns"],
    ),
    "system refused": (
        "gemma",
        chat({"role": "system", "content": "x"}, USER, ANSWER),
        ["System", "remove"],
    ),
    "answer stops early": (
        "chatml",
        says("a <|im_end|> b"),
        ["turn 2", "'<|im_end|>' before its end", "remove it"],
    ),
    "call not written": (
        "chatml",
        calls(name="add", arguments="{}"),
        ["turn 2", "'add'", "data.chat_template"],
    ),
    "no reasoning": (
        "deepseek-r1",
        chat(USER, ANSWER),
        ["turn 2", "no reasoning", "reasoning_content"],
    ),
    "length": ("chatml", asks("word " * 200), ["data.max_length 128", "data.overlong"]),
    "ten megabytes": ("chatml", asks("ab " * 3_500_000), ["data.max_length 128", "data.overlong"]),
}


def preparation_of(family, format, **options):
    """Of a file with a good row, a bad one and a good one."""
    renderer = renderer_of(tokenizer_of(family))
    settings = {"on_bad_row": "error", "max_length": 128, "overlong": "error", **options}
    return Preparation(renderer, {0: Reading(format, None)}, None, None, **settings)


GOOD = {
    "messages": chat(USER, ANSWER)[1],
    "sharegpt": share(HUMAN, GPT)[1],
    "alpaca": alpaca()[1],
    "prompt_completion": PAIR,
    "text": {"text": "hi"},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_in_a_file(name, tmp_path):
    """One line that names file and line; with `skip` it is counted, and the rows around it are
    kept.
    """
    (format, row), *words = ROWS[name]
    rows = open_rows(
        write_rows(tmp_path / "a.jsonl", [GOOD[format], row, GOOD[format]], ensure_ascii=True)
    )
    with pytest.raises(UserError) as caught:
        preparation_of("chatml", format).examples(rows, Counts())
    one_line(caught, ["a.jsonl line 2: ", *words])
    counts = Counts()
    assert [
        e.row for e in preparation_of("chatml", format, on_bad_row="skip").examples(rows, counts)
    ] == [0, 2]
    assert (counts.rows_read, counts.rows_kept, sum(counts.dropped.values())) == (3, 2, 1)


@pytest.mark.parametrize(("family", "row", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_rows_that_a_template_does_not_take(family, row, words, tmp_path):
    format, bad = row
    rows = open_rows(write_rows(tmp_path / "a.jsonl", [bad]))
    with pytest.raises(UserError) as caught:
        preparation_of(family, format).examples(rows, Counts())
    one_line(caught, ["a.jsonl line 1: ", *words])
    counts = Counts()
    assert (
        preparation_of(family, format, on_bad_row="skip", overlong="drop").examples(rows, counts)
        == []
    )
    assert sum(counts.dropped.values()) == counts.rows_read == 1


@pytest.mark.parametrize(("row", "settings", "words"), SETTINGS.values(), ids=SETTINGS)
def test_settings_of_formats(row, settings, words):
    with pytest.raises(UserError) as caught:
        to_conversation(row, **{"format": "prompt_completion", **settings})
    one_line(caught, words)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"question": "a", "answer": "b"}],
        [{"prompt": None}],
        [{"prompt:question": "a"}],
        [{"a\nb": "x", "c" * 999: "y"}],
    ],
)
def test_no_format_fits(rows):
    with pytest.raises(UserError) as caught:
        detect_format(rows, None, None)
    one_line(
        caught,
        [
            "no format fits",
            "sharegpt",
            "data.column_mapping",
            "data.format",
            *(["question"] if "question" in str(rows) else []),
        ],
    )


LINE = json.dumps(PAIR).encode()
FILES = {
    "missing": (None, "gone.jsonl", ["file not found", "gone.jsonl", "data.train"]),
    "empty jsonl": (b"", "a.jsonl", ["a.jsonl", "empty"]),
    "blank jsonl": (b"\n  \n", "a.jsonl", ["a.jsonl", "empty"]),
    "empty array": (b"[]", "a.json", ["a.json", "empty"]),
    "broken array": (b'[{"a": 1},', "a.json", ["a.json", "line 1", "complete"]),
    "array of UTF-16": ('[{"a": 1}]'.encode("utf-16"), "a.json", ["a.json", "not UTF-8", "byte 0"]),
    "a key twice": (b'[{"a": 1}, {"b": [{"c": 1, "c": 2}]}]', "a.json", ["a.json", "row 1: the key 'c' stands twice", "keep one"]),
    "a key twice in one row": (b'{"text": "a", "text": "b"}', "a.json", ["a.json", "the key 'text' stands twice"]),
    "a number": (b"42", "a.json", ["a.json", "holds one int", "array"]),
    "header only": (b"prompt,completion\n", "a.csv", ["a.csv", "empty"]),
    "no header": (b"hi,hi\nho,ho\n", "a.csv", ["a.csv", "no header", "add one"]),
    "long header": (b"x" * 99 + b",y\n1,2\n", "a.csv", ["a.csv", "no header"]),
    "ragged csv": (b"prompt,completion\na,b\nc,d,e\n", "a.csv", ["a.csv", "['c', 'd', 'e'] has 3 fields", "2"]),
    "ragged after blank lines": (b"\n prompt,completion\r\n\r\na,\"b\r\nc\"\r\nd,e,f\r\n", "a.csv", ["line 6:", "has 3 fields", "','"]),
    "too few fields": (b"prompt;completion\na;b\nc\n", "a.csv", ["line 3:", "1 fields", "';'"]),
    "text behind the last column": (b"prompt,completion,\na,b,\na,b,c\n", "a.csv", ["line 3:", "3 fields"]),
    "quote within quotes": (b'prompt,completion\na,b\n"x "y" z",b\n', "a.csv", ["a.csv", "line 3:", "','"]),
    "open quote in the middle": (b'prompt,completion\na,b\n"a,b\nc,d\n', "a.csv", ["line 3:", "unexpected end of data"]),
    "no names": (b",,\na,b,c\n", "a.csv", ["no header"]),
    "only a separator": (b"sep=;\n", "a.csv", ["no header"]),
    "open quote": (b'prompt,completion\n"a,b\n', "a.csv", ["a.csv", "unexpected end of data"]),
    "latin csv": ("prompt,completion\né,b\n".encode("latin-1"), "a.csv", ["a.csv", "not UTF-8"]),
    "no parquet": (b"PAR0 nonsense", "a.parquet", ["a.parquet", "complete", "suffix"]),
    "no arrow": (b"nonsense", "a.arrow", ["a.arrow", "complete", "suffix"]),
    "truncated gz": (gzip.compress(LINE * 99)[:-9], "a.jsonl.gz", ["a.jsonl.gz", "Truncated", "complete"]),
    "no zst": (LINE, "a.jsonl.zst", ["a.jsonl.zst", "complete", "suffix"]),
    "empty gz": (gzip.compress(b""), "a.jsonl.gz", ["a.jsonl.gz", "empty"]),
    "strange suffix": (b"x", "a.txt", ["a.txt", ".jsonl", "data.train"]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "name", "words"), FILES.values(), ids=FILES)
def test_files(content, name, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_rows(str(tmp_path / name), key="data.train", cache_dir=tmp_path / "cache")
    one_line(caught, words)


LINES = {
    "broken": (b'{"prompt": "a" "completion"}', ["not JSON", "column 16", "repair or remove"]),
    "a list": (b"[1, 2]", ["is a list, expected an object"]),
    "a word": (b'"hi"', ["is a str, expected an object"]),
    "latin": ('{"prompt": "é"}'.encode("latin-1"), ["not UTF-8 at byte 12", "UTF-8"]),
    "deep": (b"[" * 100_000, ["nested too deep"]),
    "a key twice": (
        b'{"prompt": "a", "completion": "b", "prompt": "c"}',
        ["the key 'prompt' stands twice", "keep one of them"],
    ),
    "a key twice inside": (
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        ["the key 'content' stands twice"],
    ),
}


@pytest.mark.parametrize(("line", "words"), LINES.values(), ids=LINES)
def test_lines_fail_one_by_one(line, words, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE + b"\n\n" + line + b"\n" + LINE)
    rows = open_rows(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError) as caught:
        rows[1]
    one_line(caught, words)
    assert rows.where(1).endswith("a.jsonl line 3")
    assert (
        rows[0] == rows[2] == PAIR
        and rows.head(9) == [PAIR, PAIR]
        and rows.columns() == ["prompt", "completion"]
    )


def test_an_unreadable_file(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jsonl").write_bytes(LINE)
    monkeypatch.setattr("lit_sft.data.sources.blocks.open", refuse, raising=False)
    with pytest.raises(UserError) as caught:
        open_rows(str(tmp_path / "a.jsonl"))
    one_line(caught, ["a.jsonl", "Permission denied", "data.train"])


SPECS = {
    "empty list": ([], ["`data.train` is an empty list"]),
    "a number": ([3], ["`data.train[0]` is 3", "path"]),
    "no path": ([{"weight": 1}], ["`data.train[0].path` is None"]),
    "typo": ([{"path": "{a}", "wieght": 1}], ["`data.train[0]`", "wieght", "did you mean `weight`?"]),
    "weight zero": ([{"path": "{a}", "weight": 0}], ["`data.train[0].weight` is 0", "above 0"]),
    "weight negative": ([{"path": "{a}", "weight": -1.0}], ["`data.train[0].weight` is -1.0"]),
    "weight a word": ([{"path": "{a}", "weight": "2"}], ["`data.train[0].weight` is '2'"]),
    "weight infinite": ([{"path": "{a}", "weight": float("inf")}], ["`data.train[0].weight` is inf"]),
    "weight too small": (["{a}", {"path": "{a}", "weight": 0.1}], ["`data.train[1].weight: 0.1`", "none of 2 rows"]),
    "split of a file": ([{"path": "{a}", "split": "test"}], ["`data.train[0].split`", "remove the key"]),
    "name of a file": ([{"path": "{a}", "name": "main"}], ["`data.train[0].name`", "remove the key"]),
    "empty member": (["{a}", "{dir}/empty.jsonl"], ["empty.jsonl", "empty", "data.train[1]"]),
    "no match": ("{dir}/*.csv", ["no file matches", "data.train"]),
    "no data in directory": ("{dir}/none", ["no data file", "data.train"]),
    "split not there": ("{dir}/split", ["validation: 1", "train is asked for"]),
    "one file without split": ("{dir}/half", ["no split: 1", "train: 1"]),
    "mixed schemas": ("{dir}/mixed", ["mixed/b.jsonl", "columns text", "sources of their own"]),
    "path not there": ("./nothing", ["file not found", "./nothing"]),
    "null byte": ("a\0b", ["file not found"]),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "words"), SPECS.values(), ids=SPECS)
def test_specs(spec, words, tmp_path):
    for name in (
        "a.jsonl",
        "split/dev.jsonl",
        "half/train.jsonl",
        "half/more.jsonl",
        "mixed/a.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINE + b"\n" + LINE)
    (tmp_path / "mixed/b.jsonl").write_text('{"text": "x"}')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "none").mkdir()
    places = {"{a}": str(tmp_path / "a.jsonl"), "{dir}": str(tmp_path)}
    text = json.dumps(spec)
    for mark, place in places.items():
        text = text.replace(mark, place)
    with pytest.raises(UserError) as caught:
        open_rows(json.loads(text), key="data.train")
    one_line(caught, words)


@pytest.mark.parametrize("size", [0, -0.1, 1.5, 10, 11.0, True])
def test_val_size(size):
    with pytest.raises(UserError) as caught:
        split_rows(10, size, 0)
    one_line(caught, ["`data.val_size", str(size)])


def test_max_samples():
    with pytest.raises(UserError) as caught:
        limit(open_rows("builtin:x", builtin=lambda name, split: [PAIR]), 0)
    one_line(caught, ["`data.max_samples` is 0"])
