"""Answers behind a history that a template writes differently from the prompt of a server."""

from dataclasses import replace

import pytest
from chat_templates import (
    CHATML,
    assistant,
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
from lit_sft.types import Conversation

HEADER = "<|im_start|>assistant\n"
AGENT = """\
{%- set ns = namespace(answered=false) %}
{%- for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}
{%- set ns.answered = true %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.tool_calls %}
{%- if m.reasoning_content and not ns.answered %}{{ '<think>' + m.reasoning_content + '</think>' }}
{%- endif %}
{{- '<call>' + m.tool_calls[0].function.name + '</call>' }}
{%- else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Reasoning of calls is dropped once an answer follows (gpt-oss)."""
LAST_SYSTEM = """\
{%- for m in messages %}{% if m.role != 'system' %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'user' and loop.last and messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The system prompt is written only before a last user turn (Mistral Nemo)."""


def chatml_with_prompt(extra: str, before_content: str = "") -> str:
    """ChatML with more text behind its generation prompt, or before each answer."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{{ '" + before_content + "' }}"
        "{% if m.reasoning_content %}{{ '<quiet>' + m.reasoning_content + '</quiet>' }}{% endif %}"
        "{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n" + extra + "' }}{% endif %}"
    )


QUIET = chatml_with_prompt("<quiet></quiet>")
"""The generation prompt has an empty thinking block that the history lacks (Gemma 4)."""


def rendered(template, *messages, **settings):
    tokenizer = tokenizer_of("chatml")
    return tokenizer, render_one(renderer_of(tokenizer, template, **settings), *messages)


def served(tokenizer, template, messages, **variables):
    return tokenizer.apply_chat_template(
        [message.to_dict() for message in messages],
        chat_template=template,
        add_generation_prompt=True,
        return_dict=False,
        **variables,
    )


def test_an_agent_learns_its_answer_behind_its_own_reasoning():
    row = (
        user("Weather?"),
        assistant("", reasoning_content="must look", tool_calls=call("look")),
        tool("THE RESULT", name="look"),
        assistant("Sunny."),
    )
    tokenizer, [example] = rendered(AGENT, *row)
    assert trained_texts(tokenizer, example) == [
        "<think>must look</think><call>look</call><|im_end|>",
        "Sunny.<|im_end|>",
    ]
    begin, _ = runs(example)[1]
    assert example.input_ids[:begin] == served(tokenizer, AGENT, row[:3])
    assert example.notes == ("server_prompt",)


def test_a_system_prompt_that_moves_stays_where_a_server_has_it():
    row = (system("BE KIND"), user("One?"), assistant("Yes."), user("Two?"), assistant("No."))
    tokenizer, examples = rendered(LAST_SYSTEM, *row)
    for example, end, answer in zip(examples, (2, 4), ("Yes.", "No."), strict=True):
        [(begin, _)] = runs(example)
        assert example.input_ids[:begin] == served(tokenizer, LAST_SYSTEM, row[:end])
        assert trained_texts(tokenizer, example) == [answer + "<|im_end|>"]


@pytest.mark.parametrize("answer", ["Hello", "<quit>", "<quiet>", "q", " spaced ", "[x] </b>"])
def test_a_block_of_the_prompt_alone_stands_before_any_answer(answer):
    row = (user("Hi <quiet></quiet>"), assistant(answer))
    tokenizer, [example] = rendered(QUIET, *row)
    [(begin, _)] = runs(example)
    assert example.input_ids[:begin] == served(tokenizer, QUIET, row[:1])
    assert trained_texts(tokenizer, example) == [answer + "<|im_end|>"]


def test_every_turn_stands_behind_its_own_prompt():
    row = (user("One?"), assistant("Yes."), user("Two?"), assistant("No."))
    tokenizer, examples = rendered(QUIET, *row)
    assert [trained_texts(tokenizer, example) for example in examples] == [
        ["Yes.<|im_end|>"],
        ["No.<|im_end|>"],
    ]
    assert tokenizer.decode(examples[1].input_ids).count("<quiet></quiet>") == 1


def test_tags_that_begin_alike_are_told_apart():
    """As Command R: the prompt has <START_THINKING>, the history <START_RESPONSE>."""
    template = chatml_with_prompt("<START_THINKING><END_THINKING>", "<START_RESPONSE>")
    row = (user("Hi"), assistant("Hello"))
    tokenizer, [example] = rendered(template, *row)
    assert tokenizer.decode(example.input_ids).endswith(
        HEADER + "<START_THINKING><END_THINKING><START_RESPONSE>Hello<|im_end|>\n"
    )
    assert trained_texts(tokenizer, example) == ["<START_RESPONSE>Hello<|im_end|>"]


@pytest.mark.parametrize(
    "extra, before_content",
    [
        ("<quiet>", ""),  # open: reasoning has to follow
        ("<deep>", ""),  # one tag of unknown meaning
        ("<quiet>\\n\\n</quiet>", "<quiet></quiet>"),  # the block would stand there twice
    ],
)
def test_an_answer_that_does_not_fit_its_prompt_is_refused(extra, before_content):
    template = chatml_with_prompt(extra, before_content)
    with pytest.raises(UserError, match=r"turn 2 .*does not continue the prompt of a server"):
        rendered(template, user("Hi"), assistant("Hello"))


def test_reasoning_does_not_follow_a_closed_block():
    with pytest.raises(UserError, match=r"turn 2 .*does not continue the prompt of a server"):
        rendered(QUIET, user("Hi"), assistant("Hello", reasoning_content="hm"))


SWITCHED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ '<quiet>' + m.reasoning_content + '</quiet>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking %}{{ '<quiet></quiet>' }}{% endif %}{% endif %}"
)


def test_thinking_is_switched_on_for_reasoning_only():
    tokenizer, [example] = rendered(SWITCHED, user("Hi"), assistant("Hello"))
    assert example.notes == ("server_prompt",)
    assert "<quiet></quiet>Hello" in tokenizer.decode(example.input_ids)
    thoughts = (user("Hi"), assistant("Hello", reasoning_content="hm"))
    tokenizer, [example] = rendered(SWITCHED, *thoughts)
    assert example.notes == ("switch:enable_thinking=true",)
    assert trained_texts(tokenizer, example) == ["<quiet>hm</quiet>Hello<|im_end|>"]


def test_the_prompt_of_an_answer_is_the_one_of_training():
    tokenizer = tokenizer_of("chatml")
    row = (user("Hi"), assistant("Hello"))
    prompt = renderer_of(tokenizer, QUIET).prompt(Conversation(row))
    assert prompt == served(tokenizer, QUIET, row[:1])


def test_marks_move_with_the_answer():
    template = QUIET.replace(
        "{{ m.content + '<|im_end|>\\n' }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}",
    )
    tokenizer, [example] = rendered(template, user("Hi"), assistant("Hello"))
    assert trained_texts(tokenizer, example) == ["Hello<|im_end|>"]


@pytest.mark.parametrize(
    "template, row",
    [
        (
            LAST_SYSTEM.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"),
            (system("BE KIND"), user("MY QUESTION"), assistant("Hello")),
        ),
        (
            AGENT.replace("}}{{ '<|im_start|>assistant\\n'", "}}{{ '<|im_start|>assistant\\n<x>'"),
            (
                user("MY QUESTION"),
                assistant("", reasoning_content="must look", tool_calls=call("look")),
                tool("MY QUESTION", name="look"),
                assistant("Hello"),
            ),
        ),
    ],
)
def test_lenient_never_trains_another_message(template, row):
    template = template.replace(
        "%}{{ '<|im_start|>assistant\\n' }}", "%}{{ '<|im_start|>assistant\\n<x>' }}"
    )
    with pytest.raises(UserError, match="does not continue|no reasoning"):
        rendered(template, *row)
    tokenizer, examples = rendered(template, *row, unproved="lenient")
    for example in examples:
        for text in trained_texts(tokenizer, example):
            assert "MY QUESTION" not in text and "<|im_start|>" not in text
    assert trained_texts(tokenizer, examples[-1])[-1] == "Hello<|im_end|>"


def test_lenient_refuses_a_turn_whose_history_cannot_be_told():
    template = CHATML.replace("message.content", "(message.content | upper)") + (
        "{% if add_generation_prompt %}<x>{% endif %}"
    )
    with pytest.raises(UserError, match=r"turn 2 .*cannot be told from the messages before it"):
        rendered(template, user("hi"), assistant("HELLO"), unproved="lenient")


def test_a_first_turn_has_no_history():
    """A conversation that begins with a greeting of the assistant."""
    greeting = assistant("Hello")
    tokenizer, [example] = rendered(CHATML, greeting, user("Hi"), replace(greeting, content="Yes"))
    assert trained_texts(tokenizer, example) == ["Hello<|im_end|>", "Yes<|im_end|>"]
