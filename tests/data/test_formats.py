"""Every format, in the spellings that are out there, becomes the same conversation."""

import json
from dataclasses import replace

import pytest

from lit_sft.data.formats.columns import detect_format, report_unread
from lit_sft.data.formats.parse import conversation_to_prompt, to_conversation
from lit_sft.data.stats import find_placeholders
from lit_sft.types import Conversation, Message

HI = (Message("user", "hi"), Message("assistant", "hello"))
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
PARTS = [{"type": "text", "text": "hi"}]
TOOL = {"name": "add", "parameters": {"type": "object"}}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CSV_PROMPT = json.dumps([turn("user", "hi")], indent=1)


def assistant(**more):
    """The assistant's message of a row whose last turn has the keys `more`."""
    row = {"messages": [turn("user", "hi"), {"role": "assistant", **more}]}
    return to_conversation(row, format="messages").messages[1]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", {"messages": [turn("user", "hi"), turn("assistant", "hello")]}),
        ("messages", {"messages": json.dumps([turn("user", "hi"), turn("assistant", "hello")])}),
        ("messages", {"messages": [turn("user", "hi", name=None), turn("assistant", "hello", weight=None)]}),
        ("messages", {"messages": [turn("user", PARTS), turn("assistant", "hello")]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}),
        ("sharegpt", {"conversations": [{"from": "user", "value": "hi"}, {"from": "bot", "value": "hello"}]}),
        ("sharegpt", {"conversations": [turn("human", "hi"), turn("chatgpt", "hello")], "tools": "[]", "system": ""}),
        ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}),
        ("alpaca", {"instruction": "hi", "input": None, "output": "hello", "history": [], "system": None}),
        ("prompt_completion", {"prompt": "hi", "completion": "hello"}),
        ("prompt_completion", {"prompt": [turn("user", "hi")], "completion": [turn("assistant", "hello")]}),
        ("prompt_completion", {"prompt": [turn("user", "hi")], "completion": "hello"}),
        ("prompt_completion", {"prompt": CSV_PROMPT, "completion": json.dumps([turn("assistant", "hello")])}),
        ("prompt_completion", {"prompt": CSV_PROMPT, "completion": "hello"}),
    ],
)  # fmt: skip
def test_the_same_conversation(format, row):
    assert detect_format([row], None, None)[0] == format
    assert to_conversation(row, format=format) == Conversation(HI)


def test_plain_text():
    row = {"text": "once upon a time"}
    assert detect_format([row], None, None)[0] == "text"
    assert to_conversation(row, format="text", system_prompt="x") == Conversation(
        (), text="once upon a time"
    )


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("hi", '[{"role": "assistant", "content": "hello"}]'),
        ("[]", "[1]"),
        ('[{"role": "narrator", "content": "hi"}]', "x"),
        ('[{"user": "hi"}]', "x"),
        ("[INST] hi [/INST]", "x"),
        (CSV_PROMPT + " in JSON", "x"),
        ([turn("user", "a chat as JSON")], CSV_PROMPT),
    ],
)
def test_text_that_looks_like_messages_stays_text(prompt, completion):
    row = {"prompt": prompt, "completion": completion}
    *_, asked, answer = to_conversation(row, format="prompt_completion").messages
    assert asked.content == (prompt if isinstance(prompt, str) else "a chat as JSON")
    assert answer.content == completion


@pytest.mark.parametrize("calls", [
    [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}],
    [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
    [{"id": "c1", "name": "add", "arguments": {"a": 1, "b": None}, "function": None}],
    json.dumps([{"id": "c1", "name": "add", "arguments": {"a": 1, "b": None}}]),
])  # fmt: skip
def test_tool_calls(calls):
    message = assistant(content=None, tool_calls=calls)
    assert message == Message("assistant", "", tool_calls=({"id": "c1", **CALL},))


def test_a_call_without_arguments_and_no_calls():
    assert assistant(tool_calls=[{"name": "now"}]).tool_calls[0]["function"] == {
        "name": "now",
        "arguments": {},
    }
    assert assistant(content="x", tool_calls=[]).tool_calls is None


@pytest.mark.parametrize(
    "tools",
    [[TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}], json.dumps(TOOL)],
)
def test_tools_get_the_envelope(tools):
    row = {"messages": [turn("user", "hi"), turn("assistant", "hello")], "tools": tools}
    assert to_conversation(row, format="messages").tools == (
        {"type": "function", "function": TOOL},
    )


def test_tool_answers_keep_their_ids():
    row = {
        "messages": [
            turn("user", "1+1"),
            turn("assistant", None, tool_calls=[CALL]),
            turn("tool", "", name="add", tool_call_id="c1"),
            turn("assistant", "2"),
        ]
    }
    assert to_conversation(row, format="messages").messages[2] == Message(
        "tool", "", name="add", tool_call_id="c1"
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning(key):
    assert assistant(content="2", **{key: "1 and 1"}) == Message(
        "assistant", "2", reasoning_content="1 and 1"
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("blank", ["", " \n", None])
def test_a_blank_name_of_reasoning_does_not_count(key, blank):
    others = dict.fromkeys({"reasoning_content", "reasoning", "thinking"} - {key}, blank)
    for keys in (
        {key: "hm", **others},
        {**others, key: "hm"},
        {key: "hm", **dict.fromkeys(others, "hm")},
    ):
        assert assistant(content="2", **keys).reasoning_content == "hm"
    assert assistant(content="2", thinking="").reasoning_content == ""


def test_think_marks_stay_in_the_content():
    assert assistant(content="<think>x</think>2") == Message("assistant", "<think>x</think>2")


@pytest.mark.parametrize(
    ("flags", "train"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"train": 1}, True),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"loss": 0}, False),
        ({"loss": None}, None),
        ({"loss_scale": 0.0}, False),
        ({"loss_weight": 1}, True),
        ({"loss_mask": 0}, False),
        ({"masked": True}, False),
        ({"masked": False}, True),
        ({"mask": 1}, False),
        ({"train": False, "weight": 0, "masked": True}, False),
        ({"train_detail": []}, None),
        ({}, None),
    ],
)
def test_flags_of_a_turn(flags, train):
    assert assistant(content="x", **flags).train is train
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x", **flags}]
    shared = to_conversation({"conversations": turns}, format="sharegpt")
    assert shared.messages[1].train is train


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_text_parts_are_joined_by_a_newline(kind):
    parts = [{"type": kind, "text": text} for text in ("a", "b ", "", "c")]
    assert assistant(content=parts).content == "a\nb \n\nc"


def notes_of(format, row):
    return to_conversation(row, format=format).notes


def test_keys_of_turns_that_nothing_reads_are_noted():
    row = {"messages": [
        turn("user", "hi", timestamp=3, id=None, name="Eve"),
        turn("assistant", "x", loss=True, annotations=[], toxic=False, timestamp=4, tool_calls=[]),
    ]}  # fmt: skip
    expected = (
        "the key 'timestamp' of a turn is not read",
        "the key 'toxic' of a turn is not read",
    )
    assert notes_of("messages", row) == expected
    assert (
        notes_of("prompt_completion", {"prompt": row["messages"], "completion": "y"})[1:]
        == expected
    )
    turns = [{"from": "human", "value": "hi", "emotion": "calm"}, {"from": "gpt", "value": "x"}]
    assert notes_of("sharegpt", {"conversations": turns}) == (
        "the key 'emotion' of a turn is not read",
    )


def test_neighbouring_answers_are_noted_and_stay_apart():
    turns = [turn("user", "hi"), turn("assistant", "a"), turn("assistant", "", tool_calls=[CALL])]
    conversation = to_conversation({"messages": turns}, format="messages")
    assert (len(conversation.messages), conversation.notes) == (3, ("neighbours",))
    shared = [{"from": "human", "value": "hi"}, *[{"from": "gpt", "value": "a"}] * 2]
    conversation = to_conversation({"conversations": shared}, format="sharegpt")
    assert (len(conversation.messages), conversation.notes) == (3, ("neighbours",))
    assert notes_of("sharegpt", {"conversations": shared[:2]}) == ()


def share_calls(*turns):
    """Assistant turns of a row in ShareGPT's format, in pieces."""
    row = {"conversations": [{"from": "human", "value": "hi"}, *turns]}
    conversation = to_conversation(row, format="sharegpt")
    return list(conversation.messages[1:])


def test_a_call_of_sharegpt_joins_the_turn_before_it():
    call = {
        "from": "function_call",
        "value": json.dumps({"name": "add", "arguments": {"a": 1, "b": None}}),
    }
    text, answer = {"from": "gpt", "value": "Let me see."}, {"from": "observation", "value": "2"}
    assert share_calls(text, call) == [Message("assistant", "Let me see.", tool_calls=(CALL,))]
    assert share_calls(call, call) == [Message("assistant", "", tool_calls=(CALL, CALL))]
    thought = {**text, "reasoning_content": "hm", "loss": True}
    joined = Message("assistant", "Let me see.", "hm", (CALL, CALL, CALL), train=True)
    flagged = {**call, "weight": 1}
    assert share_calls(thought, flagged, {**call, "mask": 0}, flagged) == [joined]
    assert share_calls(call, answer, call)[2] == Message("assistant", "", tool_calls=(CALL,))
    # An answer behind a call without a result is a turn of its own, as nothing else says where it ends.
    assert [len(message.content) for message in share_calls(call, text)] == [0, 11]
    thoughtful = {**call, "reasoning_content": "and"}
    assert len(share_calls(text, thoughtful)) == 2


def test_sharegpt_with_tools():
    call = {"name": "add", "arguments": {"a": 1, "b": None}}
    row = {
        "system": "be brief",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "1+1"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": '{"sum": 2}'},
            {"from": "gpt", "value": "2", "weight": 1},
            {"from": "human", "value": "1+1 twice"},
            {"from": "function_call", "value": json.dumps([call, call])},
            {"from": "function_response", "value": "2"},
            {"from": "model", "value": "4"},
        ],
    }
    conversation = to_conversation(row, format="sharegpt")
    roles = "system user assistant tool assistant user assistant tool assistant"
    assert " ".join(message.role for message in conversation.messages) == roles
    assert conversation.messages[0].content == "be brief"
    assert conversation.messages[2] == Message("assistant", "", tool_calls=(CALL,))
    assert conversation.messages[4].train is True
    assert conversation.messages[6].tool_calls == (CALL, CALL)
    assert conversation.tools == ({"type": "function", "function": TOOL},)


def test_alpaca_with_everything():
    row = {
        "instruction": "translate",
        "input": "Hund",
        "output": "dog",
        "history": [["hi", "hello"]],
        "system": "be brief",
    }
    assert to_conversation(row, format="alpaca", system_prompt="not this").messages == (
        Message("system", "be brief"),
        *HI,
        Message("user", "translate\nHund"),
        Message("assistant", "dog"),
    )


def test_only_the_completion_is_trained():
    prompt = [
        turn("user", "a"),
        turn("assistant", "b"),
        turn("assistant", "c", weight=1),
        turn("user", "d"),
    ]
    messages = to_conversation(
        {"prompt": prompt, "completion": "e"}, format="prompt_completion"
    ).messages
    assert [message.train for message in messages] == [None, False, True, None, None]


def test_column_mapping():
    row = {"question": "hi", "answer": "hello", "id": 3}
    mapping = {"question": "prompt", "answer": "completion"}
    assert detect_format([row], mapping, None)[0] == "prompt_completion"
    assert to_conversation(row, format="prompt_completion", column_mapping=mapping) == Conversation(
        HI
    )


def test_columns_that_are_swapped():
    row, mapping = (
        {"prompt": "hello", "completion": "hi"},
        {"prompt": "completion", "completion": "prompt"},
    )
    assert to_conversation(row, format="prompt_completion", column_mapping=mapping) == Conversation(
        HI
    )


@pytest.mark.parametrize("answer", ["completion", "output", "answer", "response"])
def test_prompt_template(answer):
    row = {"instruction": "算", "n": 3, answer: "三", "note": "{n}"}
    template = "指令：{instruction}{{}}\n输入：{n}\n回答："
    format, reason = detect_format([row], None, template)
    assert "prompt_template" in reason
    conversation = to_conversation(row, format=format, prompt_template=template)
    assert conversation.messages == (
        Message("user", "指令：算{}\n输入：3\n回答："),
        Message("assistant", "三"),
    )


def test_the_template_never_takes_a_question_for_the_answer():
    row = {"output": "bad", "answer": "good"}
    conversation = to_conversation(row, format="alpaca", prompt_template="mend: {output}")
    assert conversation.messages[1].content == "good"


DOLLY = {
    "instruction": "Who?",
    "context": "Ann wrote it.",
    "response": "Ann",
    "category": "qa",
    "note": "",
}


@pytest.mark.parametrize(
    ("row", "options", "names"),
    [
        (
            DOLLY,
            {"format": "alpaca", "column_mapping": {"response": "output"}},
            "context, category",
        ),
        (DOLLY, {"prompt_template": "{context} {instruction}"}, "category"),
        (
            DOLLY | {"output": "x", "system": "y"},
            {"prompt_template": "{instruction}"},
            "context, response, category",
        ),
        ({"text": "a", "tools": ["f"]}, {"format": "text"}, "tools"),
        (
            {"messages": [], "tools": ["f"], "system": "x", "prompt": "hi"},
            {"format": "messages"},
            "prompt",
        ),
        ({"conversations": [], "tools": ["f"], "id": 0}, {"format": "sharegpt"}, "id"),
        (
            {"instruction": "a", "input": "b", "output": "c", "history": [1]},
            {"format": "alpaca"},
            "",
        ),
        (
            {"q": "a", "completion": "b", "x": "c"},
            {"column_mapping": {"q": "prompt", "x": "y"}},
            "x",
        ),
        ({"prompt": "a", "completion": "b", "z": None, "y": [], "w": {}}, {}, ""),
    ],
)
def test_columns_that_are_not_read(row, options, names):
    options = {
        "format": "prompt_completion",
        "column_mapping": None,
        "prompt_template": None,
        **options,
    }
    lines = report_unread([{"more": None}, row, row], **options)
    assert lines == ([f"columns that are not read: {names}"] if names else [])


def test_unread_columns_that_would_change_the_text_are_noted():
    row = {"messages": [turn("user", "hi"), turn("assistant", "hello")]}
    noted = to_conversation(
        {**row, "chat_template_kwargs": {"thinking": True}, "functions": [TOOL]}, format="messages"
    )
    assert noted == Conversation(HI, notes=("unread:chat_template_kwargs", "unread:functions"))
    assert (
        to_conversation(
            {**row, "chat_template_kwargs": {}, "functions": []}, format="messages"
        ).notes
        == ()
    )
    mapping = {"functions": "tools"}
    mapped = to_conversation(
        {**row, "functions": [TOOL]}, format="messages", column_mapping=mapping
    )
    assert mapped.notes == () and mapped.tools == ({"type": "function", "function": TOOL},)


@pytest.mark.parametrize("call", [None, {}, "", {"name": None, "arguments": None}])
def test_no_call_in_the_old_form(call):
    assert assistant(content="x", function_call=call).content == "x"
    message = assistant(content="x", function_call={"name": "now"}, tool_calls=[{"name": "now"}])
    assert message.tool_calls[0]["function"]["name"] == "now"


def test_detection_reads_past_empty_columns():
    rows = [
        {"messages": None, "prompt": "a", "extra": None},
        {"messages": None, "prompt": "b", "extra": "c"},
    ]
    assert detect_format(rows, {"extra": "note"}, None)[0] == "prompt_completion"
    assert detect_format(rows[:1], {"extra": "note"}, None)[0] == "prompt_completion"
    assert detect_format([{"prompt": "x", "messages": []}], None, None)[0] == "messages"


def test_system_prompt_goes_first_where_there_is_none():
    row = {"messages": [turn("user", "hi"), turn("assistant", "hello")]}
    assert to_conversation(row, format="messages", system_prompt="S").messages == (
        Message("system", "S"),
        *HI,
    )
    row["messages"].insert(0, turn("developer", "D"))
    assert to_conversation(row, format="messages", system_prompt="S").messages == (
        Message("developer", "D"),
        *HI,
    )


def test_placeholders_are_found_and_left():
    row = {"prompt": "who? {name}", "completion": "I am {{name}} by {{ author }}"}
    conversation = to_conversation(row, format="prompt_completion")
    assert conversation.messages[1].content == "I am {{name}} by {{ author }}"
    assert find_placeholders(conversation) == {"{name}", "{{name}}", "{{author}}"}
    text = "{{x}} I am {name}, of {company}."
    assert find_placeholders(Conversation((), text=text)) == {"{{x}}", "{name}", "{company}"}


@pytest.mark.parametrize(
    "text",
    [
        r"\frac{num}{den} \begin{enumerate}",
        "`${temp}`",
        "f'Error: {mae}'",
        "{x} {1}",
        '{"a": 1}',
        "f{name}",
    ],
)
def test_braces_of_code_and_formulas_are_no_placeholders(text):
    assert find_placeholders(Conversation((), text=text)) == set()


def test_empty_fields_of_a_prompt_template_are_noted():
    row = {"instruction": "Add", "input": "", "output": "2"}
    conversation = to_conversation(
        row, format="prompt_completion", prompt_template="{instruction}: {input}"
    )
    assert conversation.blank == ("input",)
    assert to_conversation(row, format="alpaca").blank == ()


def test_prompts_for_predict():
    asked = Conversation(HI[:1])
    assert conversation_to_prompt(Conversation(HI)) == (asked, "hello")
    assert conversation_to_prompt(asked) == (asked, None)
    assert conversation_to_prompt(Conversation((*HI[:1], replace(HI[1], train=True)))) == (
        asked,
        "hello",
    )
    assert conversation_to_prompt(Conversation((*HI[:1], replace(HI[1], train=False)))) == (
        asked,
        None,
    )
    for row in (
        {"prompt": "hi"},
        {"prompt": "hi", "completion": ""},
        {"prompt": "hi", "completion": None},
    ):
        assert to_conversation(row, format="prompt_completion", need_answer=False) == asked
    row = {"instruction": "hi", "output": ""}
    assert to_conversation(row, format="alpaca", need_answer=False) == asked
    assert (
        to_conversation({"q": "hi"}, format="alpaca", prompt_template="{q}", need_answer=False)
        == asked
    )
