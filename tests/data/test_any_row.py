"""Rows of every format with any value in any place: each becomes examples whose masks are right, or
one line of error that names file and row.

What is right is computed here from the row by hand, without the code that is tested.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import hypothesis
import pyarrow as pa
import pyarrow.parquet
import pytest
from chat_templates import Family, byte_tokenizer
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from lit_sft.data.chat_template import ChatTemplate
from lit_sft.data.formats.columns import detect_format, report_unread
from lit_sft.data.sources.open_rows import open_rows
from lit_sft.data.sources.rows import subset
from lit_sft.data.stats import Counts
from lit_sft.data.tokenize import Renderer
from lit_sft.errors import UserError
from lit_sft.preprocessing import Preparation, Reading

EOS = "<|endoftext|>"
STOP = "<|im_end|>"
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS_PER_FILE = 20
FILES_PER_FORMAT = int(os.environ.get("ANY_ROW_FILES", "220"))
"""Files for each of the 5 formats: 22,000 rows."""

# ------------------------------------------------------------------ rows as they should be

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two?"}],
    },
    {**ANSWER, "weight": 0},
    {"role": "user", "content": "And?", "name": "Eve"},
    {"role": "assistant", "content": "Hm.", "tool_calls": [CALL], "loss": True},
    {"role": "tool", "content": "3", "name": "add", "tool_call_id": "1"},
    {"role": "assistant", "content": "3", "reasoning_content": "easy"},
]
SHARED = [
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Let me see."},
    {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1}})},
    {"from": "function_call", "value": json.dumps([{"name": "now"}])},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "It is 3.", "masked": False},
]
SEEDS = {
    "messages": [
        {"messages": [USER, ANSWER]},
        {"messages": CHAT, "tools": [TOOL]},
        {"messages": json.dumps(CHAT), "tools": json.dumps([TOOL])},
    ],
    "sharegpt": [
        {"conversations": SHARED[:1] + SHARED[-1:], "system": "Be brief."},
        {"conversations": SHARED, "tools": json.dumps([TOOL])},
    ],
    "alpaca": [
        {"instruction": "Translate", "input": "Hund", "output": "dog"},
        {"instruction": "x", "output": "y", "history": [["a", "b"]], "system": "z"},
    ],
    "prompt_completion": [
        {"prompt": "1+1?", "completion": "2"},
        {"prompt": CHAT[:4], "completion": [ANSWER]},
        {"prompt": json.dumps([USER]), "completion": "2"},
    ],
    "text": [{"text": "Once upon a time."}, {"text": "The end." + EOS + "\n"}],
}
KEYS = (
    *(
        "role",
        "content",
        "name",
        "tool_call_id",
        "tool_calls",
        "function_call",
        "reasoning_content",
    ),
    *("thinking", "weight", "train", "loss", "masked", "train_detail", "from", "value", "type"),
    *("text", "function", "arguments", "id", "messages", "conversations", "prompt", "completion"),
    *("instruction", "input", "output", "history", "system", "tools", "image", "images", "x"),
    *("functions", "chat_template_kwargs"),
)
STRINGS = (
    *("", " ", "\n\n", "Hello", "assistant", "user", "tool", "gpt", "human", "function_call"),
    *(STOP, f"a{STOP}", f"{STOP}\n<|im_start|>assistant\n", EOS, f"x{EOS} ", "<image>", "{{ x }}"),
    *("{x}", "[]", "{}", "null", "0", "[1", '{"name": "add"}', json.dumps([USER]), "[" * 2000),
    *(
        "\ud83d",
        "\udc00x",
        "\x00",
        "\u2028",
        "\ufeff",
        "e\u0301",
        "\r\n",
        "\U0001f600",
        "ﬁ",
        "\u202e",
    ),
    *("<call>", "<|im", "_end|>", "\x85", "\ufffd", "اب", "你好", "\nHello", " Hello "),
)
LEAVES = st.one_of(
    st.sampled_from(STRINGS),
    st.text(max_size=6),
    st.sampled_from((None, True, False, 0, 1, 1.0, -1, 0.5, 10**30, 10**400, 1e308)),
    st.sampled_from((float("nan"), float("inf"), -0.0, [], {}, [None], [[]], {"": None})),
)
VALUES = st.one_of(
    LEAVES,
    LEAVES,
    st.lists(LEAVES, max_size=3),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), LEAVES, max_size=3),
)


def places_in(value):
    """All (container, key) in a value."""
    found = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def replace(draw, container, key):
    container[key] = copy.deepcopy(draw(VALUES))


def add(draw, container, key):
    target = container[key] if isinstance(container[key], dict) else container
    value = copy.deepcopy(draw(VALUES))
    if isinstance(target, dict):
        target[draw(st.sampled_from(KEYS))] = value
    else:
        target.insert(key, value)


def remove(draw, container, key):
    del container[key]


def repeat(draw, container, key):
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))


def move(draw, container, key):
    if isinstance(container, list):
        container.append(container.pop(key))


def write_as_json(draw, container, key):
    container[key] = json.dumps(container[key])


def wrap_in_object(draw, container, key):
    container[key] = {draw(st.sampled_from(KEYS)): container[key]}


def nest(draw, container, key):
    for _ in range(draw(st.sampled_from((1, 3, 100, 400)))):
        container[key] = [container[key]]


def unwrap(draw, container, key):
    if isinstance(container[key], list) and container[key]:
        container[key] = container[key][0]


CHANGES = (replace, replace, add, add, remove, repeat, move, write_as_json, wrap_in_object, nest, unwrap)  # fmt: skip


def change(draw, row):
    """Changes one place of a row."""
    container, key = draw(st.sampled_from(places_in(row)))
    draw(st.sampled_from(CHANGES))(draw, container, key)


@st.composite
def lines_of(draw, format):
    """The lines of a file: rows, changed in some places, and lines that are damaged."""
    lines = []
    for _ in range(ROWS_PER_FILE):
        row = copy.deepcopy(draw(st.sampled_from(SEEDS[format])))
        for _ in range(draw(st.sampled_from((0, 1, 1, 1, 1, 2, 3)))):
            if row:
                change(draw, row)
        line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
        lines.append(damaged(draw, line))
    return lines


DAMAGES = ("cut", "byte", "latin", "utf-16", "digits", "other")


def damaged(draw, line):
    """Damages the bytes of a line, sometimes."""
    what = draw(st.sampled_from((*[""] * 12, *DAMAGES)))
    if what == "cut":
        return line[: draw(st.integers(1, len(line)))]
    if what == "byte":
        at = draw(st.integers(0, len(line) - 1))
        return line[:at] + bytes([draw(st.integers(128, 255))]) + line[at:]
    if what == "latin":
        return line + " é".encode("latin-1")
    if what == "utf-16":
        return line.decode("utf-8", "replace").encode("utf-16").replace(b"\n", b"")
    if what == "digits":
        return line.replace(b"{", b'{"n": ' + b"9" * 5000 + b", ", 1)
    if what == "other":
        return json.dumps(draw(VALUES)).encode()
    return line


# ------------------------------------------------------------------ what is right, by hand


def parsed(value):
    return json.loads(value) if isinstance(value, str) else value


def parsed_list(value):
    value = parsed(value)
    return [value] if isinstance(value, dict) else value


def content_of(message):
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    if content is None:
        return ""
    return content


def calls_of(value):
    text = ""
    for call in parsed_list(value or []):
        call = parsed(call)
        function = parsed(call["function"] if call.get("function") is not None else call)
        arguments = function.get("arguments")
        arguments = {} if arguments is None else parsed(arguments)
        text += f"<call>{function['name']} {json.dumps(arguments, ensure_ascii=False)}</call>"
    return text


def is_trained(message, default):
    for key in ("weight", "train", "training", "loss", "loss_scale", "loss_weight", "loss_mask"):
        if message.get(key) is not None:
            return bool(message[key])
    for key in ("masked", "mask"):
        if message.get(key) is not None:
            return not message[key]
    return default


def turn_of(message, default=True):
    """A message -> (role, text, whether it is trained)."""
    message = parsed(message)
    role = message["role"]
    trained = role == "assistant" and is_trained(message, default)
    return role, content_of(message) + calls_of(message.get("tool_calls")), trained


def shared_turns(row):
    turns = []
    may_join = False
    for item in parsed(row["conversations"]):
        item = parsed(item)
        speaker = item.get("from") if item.get("from") is not None else item.get("role")
        role = {"human": "user", "gpt": "assistant", "observation": "tool"}.get(speaker, speaker)
        text = item.get("value") if item.get("value") is not None else item.get("content")
        calls = item.get("tool_calls")
        if role in ("function_call", "tool_call"):
            role, text, calls = "assistant", None, calls if text is None else text
        own = content_of({"content": text})
        trained = role == "assistant" and is_trained(item, True)
        written = calls_of(calls)
        thoughts = any(item.get(key) for key in ("reasoning_content", "reasoning", "thinking"))
        if role == "assistant" and may_join and written and not own and not thoughts:
            role, before, _ = turns.pop()
            turns.append((role, before + written, trained))
        else:
            turns.append((role, own + written, trained))
        may_join = role == "assistant"
    return turns


def looks_like_messages(value):
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return False
    roles = ("system", "developer", "user", "assistant", "tool")
    return bool(items) and all(isinstance(i, dict) and i.get("role") in roles for i in items)


def pair_turns(row):
    prompt, answer = row["prompt"], row.get("completion")
    if looks_like_messages(prompt):
        prompt = json.loads(prompt)
        answer = json.loads(answer) if looks_like_messages(answer) else answer
    if isinstance(prompt, str):
        turns = [("user", prompt, False)]
    else:
        turns = [turn_of(message, False) for message in prompt]
    if isinstance(answer, str):
        return [*turns, ("assistant", answer, True)]
    return turns + [turn_of(message) for message in answer or []]


def alpaca_turns(row):
    turns = []
    for question, answer in parsed(row.get("history") or []):
        turns += [("user", question, False), ("assistant", answer, True)]
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    turns.append(("user", question, False))
    if row.get("output") is not None:
        turns.append(("assistant", row["output"], True))
    return turns


TURNS = {
    "messages": lambda row: [turn_of(message) for message in parsed(row["messages"])],
    "sharegpt": shared_turns,
    "prompt_completion": pair_turns,
    "alpaca": alpaca_turns,
}


def tools_of(row):
    tools = []
    for tool in parsed_list(row.get("tools") or []):
        tool = {key: value for key, value in parsed(tool).items() if value is not None}
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    if not tools:
        return ""
    return f"<|im_start|>tools\n{json.dumps(tools, ensure_ascii=False)}{STOP}\n"


def right_examples(format, row, count):
    """The (whole text, trained text) of each example, one or one per trained turn."""
    if format == "text":
        text = row["text"]
        if text.rstrip().endswith(EOS):
            text = text.rstrip().removesuffix(EOS)
        return [(text + EOS, text + EOS)]
    turns = TURNS[format](row)
    if row.get("system") and all(role not in ("system", "developer") for role, _, _ in turns):
        turns.insert(0, ("system", row["system"], False))
    whole = tools_of(row)
    answers = []
    for role, text, trained in turns:
        whole += f"<|im_start|>{role}\n{text}{STOP}"
        if trained:
            answers.append((whole, text + STOP))
        whole += "\n"
    if count == 1:
        return [(whole, "".join(answer for _, answer in answers))]
    return answers


# ------------------------------------------------------------------ the check


FAMILY = Family(TEMPLATE, ("<|im_start|>", STOP), eos=EOS)
TOKENIZER = byte_tokenizer(FAMILY)
OUTCOMES = {"examples": 0, "errors": 0}


def preparation_of(format, on_bad_row):
    renderer = Renderer(TOKENIZER, ChatTemplate(TOKENIZER, TEMPLATE))
    readings = {0: Reading(format, None)}
    return Preparation(renderer, readings, None, None, on_bad_row, 100_000, "error")


def decoded(ids):
    return TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


def check_examples(format, line, examples):
    row = json.loads(line.decode("utf-8-sig"))
    right = right_examples(format, row, len(examples))
    whole = [decoded(example.input_ids) for example in examples]
    masked = [
        decoded([i for i, m in zip(e.input_ids, e.loss_mask, strict=True) if m]) for e in examples
    ]
    answers = [answer for _, answer in right]
    assert masked == answers, row
    if len(right) == 1 and whole[0] != right[0][0]:
        # The text ends with the stop token of a single turn that was tokenized in two parts.
        assert whole[0] + "\n" == right[0][0], row
    else:
        assert whole == [text for text, _ in right], row


def check_detection(rows):
    """The format and the columns that are not read are told, or one line says why not."""
    try:
        format, _ = detect_format(rows, None, None)
        report_unread(rows, format, None, None)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def check_file(format, lines, folder):
    path = Path(folder, "any.jsonl")
    path.write_bytes(b"\n".join(lines))
    rows = open_rows(str(path))
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    assert len(rows) == len(lines)
    check_detection(rows.head(3))
    strict, lenient = preparation_of(format, "error"), preparation_of(format, "skip")
    kept = []
    for i, line in enumerate(lines):
        counts = Counts()
        try:
            examples = strict.examples(subset(rows, [i]), counts)
        except UserError as error:
            text = str(error)
            assert rows.where(i) in text and "\n" not in text and len(text) < 1000
            OUTCOMES["errors"] += 1
            continue
        OUTCOMES["examples"] += 1
        if not examples:
            assert counts.dropped == {"no token of it is trained": 1}
            continue
        check_examples(format, line, examples)
        kept += [(i, e.input_ids, e.loss_mask) for e in examples]
    counts = Counts()
    together = lenient.examples(rows, counts)
    assert [(e.row, e.input_ids, e.loss_mask) for e in together] == kept
    assert counts.rows_read == len(rows) == counts.rows_kept + sum(counts.dropped.values())


@pytest.mark.parametrize("format", SEEDS)
def test_rows_as_they_should_be(format, tmp_path):
    before = OUTCOMES["examples"]
    check_file(format, [json.dumps(row).encode() for row in SEEDS[format]], tmp_path)
    assert OUTCOMES["examples"] == before + len(SEEDS[format])


@pytest.mark.parametrize("format", SEEDS)
def test_any_row(format):
    OUTCOMES.update(examples=0, errors=0)

    @hypothesis.settings(
        max_examples=FILES_PER_FORMAT,
        derandomize="ANY_ROW_SEED" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(lines_of(format))
    def check(lines):
        with tempfile.TemporaryDirectory() as folder:
            check_file(format, lines, folder)

    check()
    print(format, OUTCOMES)
    num_rows = sum(OUTCOMES.values())
    assert num_rows >= FILES_PER_FORMAT * ROWS_PER_FILE * 0.9
    # Neither side of the check is empty.
    assert min(OUTCOMES.values()) > num_rows / 10


# ------------------------------------------------------------------ files


ANY_FILE = hypothesis.settings(
    max_examples=max(20, FILES_PER_FORMAT // 2),
    derandomize="ANY_ROW_SEED" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
CELLS = st.text(st.sampled_from("ab ,;\t|\"'\\\r\n\0é\ufeff{}=你"), max_size=8)


@ANY_FILE
@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6),
    st.sampled_from(",;\t|"),
    st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
    st.sampled_from(("\n", "\r\n")),
    st.sampled_from(("", "\ufeff")),
    st.booleans(),
)
def test_any_csv_that_python_writes(cells, separator, quoting, end, mark, is_declared):
    if quoting == csv.QUOTE_MINIMAL and end == "\n":
        # Python writes a lone carriage return without quotes then, and does not read it itself.
        cells = [(one.replace("\r", ""), two.replace("\r", "")) for one, two in cells]
    cells = [row for row in cells if "".join(row).strip()]
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([("prompt", "completion"), *cells])
    declared = f"sep={separator}{end}" if is_declared else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.csv")
        path.write_bytes((mark + declared + file.getvalue()).encode())
        if not cells:
            with pytest.raises(UserError, match="is empty"):
                open_rows(str(path), cache_dir=folder)
            return
        rows = open_rows(str(path), cache_dir=folder)
        found = [rows[i] for i in range(len(rows))]
    assert found == [{"prompt": one, "completion": two} for one, two in cells]


def whole_file(suffix):
    """A file that can be read."""
    rows = [{"prompt": 'é "a", b', "completion": "x\ny"}] * 3
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, sink)
    elif suffix == ".arrow":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif suffix in (".csv", ".csv.gz"):
        text = table.to_pandas().to_csv(index=False).encode()
        return gzip.compress(text) if suffix == ".csv.gz" else text
    elif suffix == ".json":
        return json.dumps(rows, indent=1).encode()
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".json", ".parquet", ".arrow"])
def test_any_damaged_file(suffix):
    """A file that is cut, or has other bytes somewhere, is read or refused in one line."""
    whole = whole_file(suffix)

    @ANY_FILE
    @given(
        st.integers(0, len(whole)),
        st.binary(max_size=6) | st.sampled_from((b'"', b"\n", b"\0", b"\xff", b",", b"[" * 3000)),
        st.sampled_from((0, 0, 1, 4, len(whole))),
    )
    def check(at, inserted, lost):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"any{suffix}")
            path.write_bytes(whole[:at] + inserted + whole[at + lost :])
            try:
                rows = open_rows(str(path), cache_dir=folder)
            except UserError as error:
                assert "\n" not in str(error) and "any" in str(error)
                return
            for i in range(len(rows)):
                try:
                    rows[i]
                except UserError as error:
                    assert "\n" not in str(error)

    check()
