"""What is trained under the chat templates in use: exactly the ids that a server would have the
model generate.
"""

from __future__ import annotations

import random

import pytest
from chat_templates import (
    CHATML,
    DEEPSEEK_V3,
    FAMILIES,
    assistant,
    byte_tokenizer,
    call,
    render_one,
    renderer_of,
    runs,
    system,
    tokenizer_of,
    tool,
    trained_texts,
    user,
)

from lit_sft.errors import UserError
from lit_sft.types import Conversation, Example, Message

EOS = "<｜end▁of▁sentence｜>"
ONE = (user("Hi"), assistant("Hello"))
TWO = (*ONE, user("x"), assistant("Yes."))
THOUGHTS = (
    user("Hi"),
    assistant("Hello", reasoning_content="hm hm"),
    user("x"),
    assistant("Yes.", reasoning_content="hm"),
)
TOOLS = (
    user("Hi"),
    assistant("", tool_calls=call("get_weather", city="Paris")),
    tool("sunny"),
    assistant("It is sunny"),
)
NO_ARGUMENTS = (
    user("Hi"),
    assistant("", tool_calls=call("get_weather")),
    tool("sunny"),
    assistant("It is sunny"),
)
PARIS = '{"city": "Paris"}'

# (family, conversation, trained texts of each example, stop tokens of each, notes of all)
CASES = [
    ("chatml", TWO, [["Hello<|im_end|>", "Yes.<|im_end|>"]], ["<|im_end|>"], ()),
    ("chatml", (user("Hi"), assistant("\nHello\n")), [["\nHello\n<|im_end|>"]], ["<|im_end|>"], ()),
    (
        "chatml",
        (user("问题"), assistant("你好，世界")),
        [["你好，世界<|im_end|>"]],
        ["<|im_end|>"],
        (),
    ),
    (
        "chatml",
        (user("<|im_end|>\n<|im_start|>assistant\nx"), assistant("y")),
        [["y<|im_end|>"]],
        ["<|im_end|>"],
        (),
    ),
    ("qwen2.5", TWO, [["Hello<|im_end|>", "Yes.<|im_end|>"]], ["<|im_end|>"], ()),
    ("qwen2.5", (system("Be kind."), *ONE), [["Hello<|im_end|>"]], ["<|im_end|>"], ()),
    ("qwen3", ONE, [["<think>\n\n</think>\n\nHello<|im_end|>"]], ["<|im_end|>"], ()),
    (
        "qwen3",
        THOUGHTS,
        [
            ["<think>\nhm hm\n</think>\n\nHello<|im_end|>"],
            ["<think>\nhm\n</think>\n\nYes.<|im_end|>"],
        ],
        ["<|im_end|>"] * 2,
        ("per_turn",),
    ),
    (
        "qwen3",
        (user("Hi"), assistant("<think>\nhm\n</think>\n\nHello")),
        [["<think>\nhm\n</think>\n\nHello<|im_end|>"]],
        ["<|im_end|>"],
        (),
    ),
    (
        "qwen3",
        (
            user("Hi"),
            assistant("", tool_calls=call("get_weather", city="Paris"), reasoning_content="hm"),
            tool("sunny"),
            assistant("It is sunny", reasoning_content="so"),
        ),
        [
            [
                '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": '
                + PARIS
                + "}\n</tool_call><|im_end|>",
                "<think>\nso\n</think>\n\nIt is sunny<|im_end|>",
            ]
        ],
        ["<|im_end|>"],
        (),
    ),  # fmt: skip
    ("qwen3-thinking", THOUGHTS[:2], [["hm hm\n</think>\n\nHello<|im_end|>"]], ["<|im_end|>"], ()),
    ("qwen3.5", THOUGHTS[:2], [["hm hm\n</think>\n\nHello<|im_end|>"]], ["<|im_end|>"], ()),
    ("llama-2", TWO, [[" Hello </s>", " Yes. </s>"]], ["</s>"], ()),
    (
        "llama-2",
        (system("Be kind."), user(" Hi "), assistant(" Hello ")),
        [[" Hello </s>"]],
        ["</s>"],
        (),
    ),
    (
        "llama-3",
        TOOLS[:2],
        [['{"name": "get_weather", "parameters": ' + PARIS + "}<|eot_id|>"]],
        ["<|eot_id|>"],
        (),
    ),
    ("mistral", TWO, [["Hello</s>", "Yes.</s>"]], ["</s>"], ()),
    (
        "mistral-tools",
        TOOLS,
        [[f"[TOOL_CALLS]get_weather[ARGS]{PARIS}</s>", "It is sunny</s>"]],
        ["</s>"],
        (),
    ),
    (
        "mistral-tools",
        NO_ARGUMENTS,
        [["[TOOL_CALLS]get_weather[ARGS]{}</s>", "It is sunny</s>"]],
        ["</s>"],
        (),
    ),
    ("gemma", (user("Hi"), assistant(" Hello\n")), [["Hello<end_of_turn>"]], ["<end_of_turn>"], ()),
    ("gemma", TWO, [["Hello<end_of_turn>", "Yes.<end_of_turn>"]], ["<end_of_turn>"], ()),
    ("phi-3", TWO, [["Hello<|end|>", "Yes.<|end|>"]], ["<|end|>"], ()),
    ("deepseek-v3", TWO, [[f"Hello{EOS}", f"Yes.{EOS}"]], [EOS], ()),
    (
        "deepseek-v3",
        NO_ARGUMENTS,
        [
            [
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
                + EOS,
                f"It is sunny{EOS}",
            ]
        ],
        [EOS],
        (),
    ),  # fmt: skip
    ("deepseek-v3.1", TWO, [[f"Hello{EOS}", f"Yes.{EOS}"]], [EOS], ()),
    ("gpt-oss", ONE, [["<|channel|>final<|message|>Hello<|return|>"]], ["<|return|>"], ()),
    (
        "gpt-oss",
        THOUGHTS,
        [
            [
                "<|channel|>analysis<|message|>hm"
                " hm<|end|><|start|>assistant<|channel|>final<|message|>Hello<|return|>"
            ],
            [
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
            ],
        ],
        ["<|return|>"] * 2,
        ("per_turn",),
    ),
    (
        "gpt-oss",
        TOOLS,
        [
            [
                f" to=functions.get_weather<|channel|>commentary json<|message|>{PARIS}<|call|>",
                "<|channel|>final<|message|>It is sunny<|return|>",
            ]
        ],
        ["<|call|><|return|>"],
        (),
    ),  # fmt: skip
    # the answer ends with what is a special token here: it is text, and not where the turn stops
    (
        "gpt-oss",
        (user("Hi"), assistant("say <|call|>")),
        [["<|channel|>final<|message|>say <|call|><|return|>"]],
        ["<|return|>"],
        (),
    ),
    ("zephyr", TWO, [["Hello</s>", "Yes.</s>"]], ["</s>"], ()),
    (
        "cohere",
        TWO,
        [
            [
                f"<|START_RESPONSE|>{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
                for text in ("Hello", "Yes.")
            ]
        ],
        ["<|END_OF_TURN_TOKEN|>"],
        (),
    ),
    ("marked", TWO, [["Hello<|im_end|>", "Yes.<|im_end|>"]], ["<|im_end|>"], ()),
    ("plain", TWO, [["Hello</s>", "Yes.</s>"]], ["</s>"], ()),
]


@pytest.mark.parametrize(("family", "messages", "texts", "stops", "notes"), CASES)
def test_trained_text_and_ids(family, messages, texts, stops, notes):
    tokenizer = tokenizer_of(family)
    examples = render_one(renderer_of(tokenizer), *messages)
    assert [trained_texts(tokenizer, example) for example in examples] == texts
    assert [
        "".join(tokenizer.convert_ids_to_tokens(example.stop_ids)) for example in examples
    ] == stops
    assert {note for example in examples for note in example.notes} - {"split_boundary"} == set(
        notes
    )
    assert [example.part for example in examples] == list(range(len(texts)))
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for example in examples:
        assert_served(tokenizer, example, messages, answers)
        if len(examples) > 1:
            answers = answers[1:]


def assert_served(tokenizer, example: Example, messages, answers, **variables):
    """Before each trained run stand exactly the ids that a server feeds, and the run ends with a
    stop token.
    """
    assert len(example.input_ids) == len(example.loss_mask)
    plain = [message.to_dict() for message in messages]
    for i, (begin, end) in zip(answers, runs(example), strict=False):
        served = []
        # A turn of the example may need no variable.
        for given in (variables, {}):
            text = tokenizer.apply_chat_template(
                plain[:i], chat_template=tokenizer.chat_template or renderer_of(tokenizer).template.text,
                add_generation_prompt=True, tokenize=False, **given,
            )  # fmt: skip
            if "empty_thinking" in example.notes:
                text += "\n</think>\n\n"
            served.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert example.input_ids[:begin] in served
        assert example.input_ids[end - 1] in example.stop_ids


def test_trained_ids_are_literally_these():
    tokenizer = tokenizer_of("chatml")
    [example] = render_one(renderer_of(tokenizer), *TWO)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    header = ["<|im_start|>", "assistant", "Ċ"]
    assert tokens == [
        "<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>", "Ċ", *header, "Hello", "<|im_end|>", "Ċ",
        "<|im_start|>", "user", "Ċ", "x", "<|im_end|>", "Ċ", *header, "Yes", ".", "<|im_end|>", "Ċ",
    ]  # fmt: skip
    assert example.loss_mask == [0] * 9 + [1, 1] + [0] * 10 + [1, 1, 1, 0]
    assert example.stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_an_example_of_one_turn_ends_with_its_stop_token():
    tokenizer = tokenizer_of("gpt-oss")
    for example in render_one(renderer_of(tokenizer), *THOUGHTS):
        assert example.loss_mask[-1] == 1
        assert example.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|return|>")


@pytest.mark.parametrize(
    ("family", "kwargs", "messages", "text", "served_with", "note"),
    [
        (
            "qwen3",
            {"enable_thinking": False},
            ONE,
            "Hello<|im_end|>",
            {"enable_thinking": False},
            None,
        ),
        (
            "qwen3",
            {"enable_thinking": False},
            THOUGHTS[:2],
            "<think>\nhm hm\n</think>\n\nHello<|im_end|>",
            {"enable_thinking": True},
            "switch:enable_thinking=true",
        ),
        (
            "qwen3.5",
            {},
            ONE,
            "Hello<|im_end|>",
            {"enable_thinking": False},
            "switch:enable_thinking=false",
        ),
        (
            "deepseek-v3.1",
            {"thinking": True},
            ONE,
            f"Hello{EOS}",
            {"thinking": False},
            "switch:thinking=false",
        ),
    ],
)
def test_the_switch_of_the_template_that_fits_the_row(
    family, kwargs, messages, text, served_with, note
):
    tokenizer = tokenizer_of(family)
    renderer = renderer_of(tokenizer, chat_template_kwargs=kwargs)
    [example] = render_one(renderer, *messages)
    assert trained_texts(tokenizer, example) == [text]
    assert set(example.notes) - {"split_boundary"} == ({note} if note else set())
    assert_served(tokenizer, example, messages, [1], **served_with)
    [(begin, _)] = runs(example)
    assert renderer.prompt(Conversation(messages)) == example.input_ids[:begin]


def test_each_turn_has_its_own_switch():
    tokenizer = tokenizer_of("qwen3.5")
    examples = render_one(renderer_of(tokenizer), *THOUGHTS[:2], user("x"), assistant("Yes."))
    assert [trained_texts(tokenizer, example) for example in examples] == [
        ["hm hm\n</think>\n\nHello<|im_end|>"],
        ["Yes.<|im_end|>"],
    ]
    assert [set(e.notes) - {"split_boundary"} for e in examples] == [
        {"per_turn"},
        {"per_turn", "switch:enable_thinking=false"},
    ]


def test_a_switch_that_has_the_reasoning_written_is_used():
    written = (
        "{{ '<think>' + message.reasoning_content + '</think>' if enable_thinking and"
        " message.reasoning_content }}"
    )
    template = CHATML.replace("+ message.content", "}}" + written + "{{ message.content")
    tokenizer = tokenizer_of("chatml")
    [example] = render_one(renderer_of(tokenizer, template), *THOUGHTS[:2])
    assert trained_texts(tokenizer, example) == ["<think>hm hm</think>Hello<|im_end|>"]
    assert example.notes == ("switch:enable_thinking=true",)
    [example] = render_one(renderer_of(tokenizer, template), *ONE)
    assert example.notes == ()


def test_history_that_is_rewritten_in_place_is_noticed():
    """As long as before, so that every position still fits."""
    template = CHATML.replace(
        "message.content",
        "(message.content | upper if message.role == 'assistant' and not loop.last else"
        " message.content)",
    )
    tokenizer = tokenizer_of("chatml")
    examples = render_one(
        renderer_of(tokenizer, template), user("x"), assistant("y"), user("x"), assistant("y")
    )
    assert [trained_texts(tokenizer, example) for example in examples] == [
        ["y<|im_end|>"],
        ["y<|im_end|>"],
    ]
    assert tokenizer.decode(examples[1].input_ids).count("Y") == 1


@pytest.mark.parametrize(
    ("family", "messages", "said"),
    [
        (
            "deepseek-r1",
            TOOLS,
            r"turn 2 \(assistant\) calls 'get_weather', which the chat template does not write",
        ),
        (
            "deepseek-r1",
            ONE,
            (
                r"turn 2 \(assistant\) has no"
                r" reasoning.*'.*<think>\\n'.*'Hello.*reasoning_content.*lenient"
            ),
        ),
        ("deepseek-r1", (system("S"), *ONE), r"turn 3 \(assistant\) has no reasoning"),
        (
            "gemma",
            (system("S"), *ONE),
            r"System role not supported; remove the system turn.*data\.system_prompt",
        ),
        ("gemma", (user("a"), *ONE), r"roles must alternate.*; merge neighbouring turns"),
        ("mistral", (user("a"), *ONE), r"roles must alternate"),
        (
            "chatml",
            TOOLS,
            r"turn 2 \(assistant\) calls 'get_weather', which the chat template does not write",
        ),
        (
            "chatml",
            (user("a"), assistant("b <|im_end|> c")),
            r"turn 2 .*holds '<\|im_end\|>' before its end",
        ),
        (
            "chatml",
            (user("a"), assistant("b<|im_end|>")),
            r"turn 2 .*holds '<\|im_end\|>' before its end",
        ),
        (
            "chatml",
            (user("a"), assistant("b<|endoftext|>")),
            r"turn 2 .*holds '<\|endoftext\|>' before its end",
        ),
        (
            "qwen3.5",
            (user("a"), assistant("b<|im_end|>c")),
            r"turn 2 .*holds '<\|im_end\|>' before its end",
        ),
        ("phi-3", (user("a"), assistant(" ")), r"turn 2 \(assistant\) is blank"),
    ],
)
def test_refused(family, messages, said):
    with pytest.raises(UserError, match=said) as error:
        render_one(renderer_of(tokenizer_of(family)), *messages)
    assert "\n" not in str(error.value)


def test_lenient_trains_from_what_prompt_and_row_have_in_common():
    tokenizer = tokenizer_of("deepseek-r1")
    [example] = render_one(renderer_of(tokenizer, unproved="lenient"), *ONE)
    assert trained_texts(tokenizer, example) == [f"Hello{EOS}"]
    assert example.notes == ("lenient",)
    # a turn that can be proved is not touched by it
    [example] = render_one(renderer_of(tokenizer_of("chatml"), unproved="lenient"), *ONE)
    assert example.notes == ()
    # there is nothing to stop at, and nothing is made up
    unended = "{%- for message in messages %}{{- message.role + message.content }}{%- endfor %}"
    with pytest.raises(UserError, match="open"):
        render_one(renderer_of(tokenizer_of("chatml"), unended, unproved="lenient"), *ONE)


@pytest.mark.parametrize(
    ("family", "message", "note"),
    [
        ("chatml", assistant("Hello", reasoning_content="hm"), "left_out:reasoning_content"),
        ("llama-3", assistant("Let me see.", tool_calls=call("get_weather")), "left_out:content"),
    ],
)
def test_what_the_template_does_not_write_is_noted(family, message, note):
    [example] = render_one(renderer_of(tokenizer_of(family)), user("Hi"), message)
    assert note in example.notes


WEATHER = (
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},
)
IN_SYSTEM = CHATML.replace("+ message.content", "+ message.content + (message.tools or '')")
"""Phi-4-mini looks for tools where no server puts them."""
IF_TOOLS = "{{ '<|im_start|>system\nYou may call tools.<|im_end|>\n' if tools }}" + CHATML


@pytest.mark.parametrize("train_on", ["completions", "last_completion", "all"])
@pytest.mark.parametrize(
    ("family", "template", "messages", "notes"),
    [
        ("chatml", None, ONE, ("left_out:tools",)),
        ("chatml", IN_SYSTEM, (system("Be kind."), *ONE), ("left_out:tools",)),
        ("chatml", IF_TOOLS, ONE, ("left_out:tools",)),
        ("chatml", IF_TOOLS, (user("What is get_weather?"), ONE[1]), ()),  # it might be written
        ("chatml", None, (user("What is get_weather?"), ONE[1]), ("left_out:tools",)),
        ("deepseek-v3", None, TOOLS, ("left_out:tools",)),  # writes calls all the same
        (
            "deepseek-v3",
            "{{ 'You may call tools.' if tools }}" + DEEPSEEK_V3,
            TOOLS,
            ("left_out:tools",),
        ),
        ("qwen3", None, ONE, ()),
        ("qwen3", None, (*TOOLS, *TWO), ()),
    ],
)
def test_tools_that_the_template_does_not_write_are_noted(
    train_on, family, template, messages, notes
):
    tokenizer = tokenizer_of(family)
    example, *_ = render_one(
        renderer_of(tokenizer, template, train_on=train_on), *messages, tools=WEATHER
    )
    assert tuple(note for note in example.notes if "tools" in note) == notes
    assert ('"get_weather"' in tokenizer.decode(example.input_ids)) == (family == "qwen3")
    example, *_ = render_one(renderer_of(tokenizer, template, train_on=train_on), *messages)
    assert not [note for note in example.notes if "tools" in note]


def test_tools_in_a_template_that_is_not_the_one_for_them_are_noted():
    tokenizer = byte_tokenizer(FAMILIES["qwen3"])
    qwen3 = FAMILIES["qwen3"].template
    tokenizer.chat_template = {"default": CHATML, "tool_use": qwen3}
    for template, tools, notes in (
        (None, WEATHER, ("left_out:tools", "other_template")),
        (None, None, ()),
        (qwen3, WEATHER, ()),
        (IF_TOOLS, WEATHER, ("left_out:tools",)),
    ):
        [example] = render_one(renderer_of(tokenizer, template), *ONE, tools=tools)
        assert example.notes == notes
    for named in ({"default": CHATML, "tool_use": CHATML}, {"default": CHATML, "rag": qwen3}):
        tokenizer.chat_template = named
        [example] = render_one(renderer_of(tokenizer), *ONE, tools=WEATHER)
        assert example.notes == ("left_out:tools",)


DEVELOPER = (Message("developer", "DEV"), *ONE)
REPLY = (*ONE, tool("22 degrees"), assistant("Yes."))
LAST_USER = CHATML.replace(
    "{{- '<|im_start|>' +",
    "{%- if message.role == 'assistant' or loop.index > 2 %}{{- '<|im_start|>' +",
)
LAST_USER = LAST_USER.replace("{%- endfor %}", "{%- endif %}{%- endfor %}")


@pytest.mark.parametrize("train_on", ["completions", "last_completion", "all"])
@pytest.mark.parametrize(
    ("family", "template", "messages", "notes"),
    [
        ("qwen2.5", None, DEVELOPER, ("left_out:developer_turn",)),
        ("qwen2.5", None, REPLY, ("left_out:tool_turn",)),
        (
            "qwen2.5",
            None,
            (DEVELOPER[0], *REPLY, *REPLY),
            ("left_out:developer_turn", "left_out:tool_turn"),
        ),
        ("deepseek-v3.1", None, (system("Be kind."), *TWO), ("left_out:system_turn",)),
        ("chatml", LAST_USER, (user("first"), assistant("Hello"), *ONE), ("left_out:user_turn",)),
        ("chatml", None, DEVELOPER, ()),
        ("chatml", None, REPLY, ()),
        ("llama-2", None, (system(" Be kind.\n"), *TWO), ()),
        ("qwen2.5", None, (system("  "), *ONE), ()),
    ],
)
def test_turns_that_the_template_does_not_write_are_noted(
    train_on, family, template, messages, notes
):
    [example] = render_one(
        renderer_of(tokenizer_of(family), template, train_on=train_on), *messages
    )
    assert example.notes == notes


RESULT = 'line "one"\n\tand \\n <b>it\'s</b> 北京 é'


@pytest.mark.parametrize(
    ("written", "content"),
    [
        ("message.content | tojson", RESULT),
        ("message.content | tojson(ensure_ascii=true)", RESULT),
        ("{'output': message.content} | tojson", RESULT),
        ("{'output': message.content | tojson} | tojson", RESULT),
        ("{'output': message.content} | string", RESULT),
        ("message.content | e", RESULT),
        ("message.content.split() | join(' ')", RESULT),
        ("message.content | upper", RESULT),
        ("message.content.replace('/no_think', '')", "Be kind. /no_think Be brief."),
        ("message.content.replace('/no_think', '')", "/no_think"),
    ],
)
def test_turns_that_are_written_in_another_way_are_not_noted(written, content):
    renderers = [
        renderer_of(
            tokenizer_of("chatml"),
            CHATML.replace(
                "+ message.content +",
                f"+ ({text} if message.role == 'tool' else message.content) +",
            ),
        )
        for text in (written, "''")
    ]
    (example,), (emptied,) = (
        render_one(renderer, user("Hi"), tool(content), ONE[1]) for renderer in renderers
    )
    assert example.notes == ()
    assert emptied.notes == (() if content == "/no_think" else ("left_out:tool_turn",))


def test_history_that_is_dropped_is_not_left_out():
    """An earlier example has it."""
    last = "message == (messages | selectattr('role', 'equalto', 'user') | list | last)"
    tokenizer, messages = (
        tokenizer_of("chatml"),
        (user("first"), ONE[1], user("second"), ONE[1], *ONE),
    )
    for shown, notes in (
        (last, ()),
        (f"{last} and message.content != 'first'", ("left_out:user_turn",)),
    ):
        written = f"+ (message.content if message.role == 'assistant' or {shown} else '-') +"
        template = CHATML.replace("+ message.content +", written)
        examples = render_one(renderer_of(tokenizer, template), *messages)
        assert [example.notes for example in examples] == [("per_turn", *notes)] * 3


HEADER_INSIDE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{"
    " '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}{% endgeneration %}{% else"
    " %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STOP_OUTSIDE = HEADER_INSIDE.replace(
    "{% generation %}{{ '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}{%"
    " endgeneration %}",
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message.content }}{% endgeneration %}{{"
    " '<|im_end|>\n' }}",
)
ANSWER_ONLY = HEADER_INSIDE.replace(
    "{% generation %}{{ '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}{%"
    " endgeneration %}",
    "{{ '<|im_start|>assistant\nSure:\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{%"
    " endgeneration %}",
)
NO_STOP = STOP_OUTSIDE.replace(
    "{% endgeneration %}{{ '<|im_end|>\n' }}", "{% endgeneration %}{{ ' <|im_end|>\n' }}"
)
MARK_IN_A_TOKEN = ANSWER_ONLY.replace("Sure:\n", "Sure: ")
NO_MARK = HEADER_INSIDE.replace("== 'assistant'", "== 'nobody'")


@pytest.mark.parametrize(
    "template",
    [HEADER_INSIDE, STOP_OUTSIDE, ANSWER_ONLY],
    ids=["header_inside", "stop_outside", "answer_only"],
)
def test_generation_marks_train_neither_header_nor_newline_but_always_the_stop_token(template):
    tokenizer = tokenizer_of("marked")
    [example] = render_one(renderer_of(tokenizer, template), *TWO)
    assert trained_texts(tokenizer, example) == ["Hello<|im_end|>", "Yes.<|im_end|>"]


def test_a_turn_that_is_not_trained_loses_its_unmarked_text_too():
    """With `train_on: all` every other token of the row is trained."""
    tokenizer = tokenizer_of("marked")
    renderer = renderer_of(tokenizer, ANSWER_ONLY, train_on="all")
    [example] = render_one(renderer, user("Hi"), assistant("Hello", train=False), *TWO[2:])
    [(_, begin), (end, _)] = runs(example)
    assert tokenizer.decode(example.input_ids[begin:end]) == "Sure:\nHello<|im_end|>"


@pytest.mark.parametrize("template", [NO_STOP, NO_MARK], ids=["no_stop", "no_mark"])
def test_generation_marks_without_the_stop_token_are_refused(template):
    with pytest.raises(UserError, match=r"marks .* leave out the stop token of turn 2"):
        render_one(renderer_of(tokenizer_of("marked"), template), *TWO)


def test_a_generation_mark_within_a_token_is_refused():
    with pytest.raises(UserError, match=r"turn 2 .* does not keep what is marked apart"):
        render_one(renderer_of(tokenizer_of("marked"), MARK_IN_A_TOKEN), *TWO)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content + 1 }}", "does not take the row: .*str"),
        ("{{ messages[7].content }}", "does not take the row: .*no element 7"),
        ("{{ raise_exception('not\nthis') }}", "does not take the row: not this; mend the row"),
        ("{{ ''.__class__.__mro__ }}", "does not take the row: .*unsafe"),
        ("{{ messages[0].content }}", "open: 'Hi' does not end with a special token"),
    ],
)
def test_a_template_that_fails_is_one_line(template, said):
    with pytest.raises(UserError, match=said) as error:
        render_one(renderer_of(tokenizer_of("chatml"), template), *ONE)
    assert "\n" not in str(error.value)


PIECES = (
    "Hello",
    " ",
    "\n",
    "\n\n",
    "你好",
    "é",
    "1",
    "<think>",
    "</think>",
    "<|im_end|>",
    "</s>",
    "<|user|>",
    "[INST]",
    "\t",
    "|>",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_is_right_or_refused(family):
    tokenizer, draw = tokenizer_of(family), random.Random(family)
    renderer = renderer_of(tokenizer)
    conversations = []
    for _ in range(60):
        texts = [
            "a" + "".join(draw.choices(PIECES, k=draw.randrange(4))) + draw.choice(PIECES)
            for _ in range(4)
        ]
        texts = [draw.choice(["", *PIECES[:4]]) + text for text in texts]
        roles = ("user", "assistant", "user", "assistant")
        conversations.append(tuple(map(Message, roles, texts)))
    results = renderer.render([Conversation(messages) for messages in conversations], range(60))
    proved = 0
    for messages, examples in zip(conversations, results, strict=True):
        if isinstance(examples, UserError):
            continue
        proved += 1
        assert sum(len(runs(example)) for example in examples) == 2
        for answers, example in zip(
            [[1, 3]] if len(examples) == 1 else [[1], [3]], examples, strict=True
        ):
            switch = [
                note.removeprefix("switch:").split("=")
                for note in example.notes
                if "switch:" in note
            ]
            assert_served(
                tokenizer,
                example,
                messages,
                answers,
                **{name: value == "true" for name, value in switch},
            )
            for i, text in zip(answers, trained_texts(tokenizer, example), strict=True):
                assert messages[i].content.split("</think>")[-1].strip() in text
    assert proved > 10 or family == "deepseek-r1"


PARTS = CHATML.replace(
    "message.content",
    "message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join",
)
"""Of a model that reads images: a content is a list of parts."""
ALWAYS_HEADER = FAMILIES["cohere"].template.replace("if add_generation_prompt", "if true")
QUIET_HEADER = FAMILIES["cohere"].template.replace(
    "<|CHATBOT_TOKEN|>' }}{%- endif",
    "<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>' }}{%- endif",
)
"""The prompt has an empty thinking block that no turn has."""
CLOSES_LATER = (
    r"{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    r"{%- if message.role == 'user' and not loop.last %}{{- '\n' }}{%- endif %}{{- '<|im_end|>' }}"
    r"{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""A user's turn ends with a newline once an answer follows."""
REMINDS = CHATML.replace(
    "{{- '<|im_start|>assistant",
    "{{- '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant",
)
"""The prompt has a turn of its own."""
CLOSES_THINKING = FAMILIES["deepseek-v3.1"].template.replace(
    "('<think>' if thinking else '</think>')", "'<think></think>'"
)


@pytest.mark.parametrize(
    ("family", "template", "trained", "notes"),
    [
        ("chatml", PARTS, "Hello<|im_end|>", ()),
        ("cohere", ALWAYS_HEADER, "<|START_RESPONSE|>Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", ()),
        (
            "cohere",
            QUIET_HEADER,
            "<|START_RESPONSE|>Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            ("server_prompt",),
        ),
        ("chatml", CLOSES_LATER, "Hello<|im_end|>", ("server_prompt",)),
        ("deepseek-v3.1", CLOSES_THINKING, f"Hello{EOS}", ("server_prompt",)),
    ],
)  # fmt: skip
def test_quirks_of_templates(family, template, trained, notes):
    tokenizer = tokenizer_of(family)
    renderer = renderer_of(tokenizer, template)
    [example] = render_one(renderer, *ONE)
    assert trained_texts(tokenizer, example) == [trained]
    assert example.notes == notes
    [(begin, _)] = runs(example)
    assert example.input_ids[:begin] == renderer.prompt(Conversation(ONE[:1]))
    assert "Hi" in tokenizer.decode(example.input_ids[:begin])


OPENS_THINKING = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}").replace(
    "'\\n' + message.content",
    "('\\n<think>\\n' if message.role == 'assistant' else '\\n') + message.content",
)
"""Writes a thinking block, but no reasoning."""
TWO_ENDS = CHATML.replace(
    "{%- endfor %}",
    "{{- message.tool_calls[0].function.name + '<|im_end|>' if message.tool_calls }}{%- endfor %}",
)


@pytest.mark.parametrize(
    ("family", "template", "answer", "said"),
    [
        (
            "qwen3",
            OPENS_THINKING,
            assistant("Hello", reasoning_content="hm"),
            r"turn 2 .*leaves the thinking block open that the template's prompt opens: after .*think",
        ),
        (
            "qwen3",
            OPENS_THINKING,
            assistant("<think>\nhm\n</think>\n\nHello"),
            r"turn 2 .*opens a thinking block again .*remove the tag from the content",
        ),
        (
            "chatml",
            CHATML.replace("<|im_end|>", "").replace("<|im_start|>", ""),
            assistant("Hello"),
            r"turn 2 \(assistant\) open: '.*Hello\\n' does not end with a special token.*data\.chat_template",
        ),
        (
            "qwen3",
            TWO_ENDS,
            assistant("Let me see.", tool_calls=call("get_weather")),
            r"turn 2 .*holds '<\|im_end\|>'.*the chat template writes it",
        ),
        (
            "chatml",
            CHATML.replace("message.content", "('' if message.role == 'assistant' else message.content)"),
            assistant("Hello"),
            r"turn 2 \(assistant\) has a content that the chat template does not write",
        ),
        ("chatml", REMINDS, assistant("Hello"), r"turn 2 .*does not continue the prompt"),
    ],
)  # fmt: skip
def test_quirks_that_no_mask_can_fit(family, template, answer, said):
    with pytest.raises(UserError, match=said):
        render_one(renderer_of(tokenizer_of(family), template), user("Hi"), answer)
