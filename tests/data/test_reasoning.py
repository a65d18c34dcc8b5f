"""Reasoning inside the content of an assistant turn."""

import pytest
from chat_templates import (
    CHATML,
    assistant,
    render_one,
    renderer_of,
    tokenizer_of,
    trained_texts,
    user,
)

from lit_sft.data.reasoning import has_reasoning, split_content
from lit_sft.types import Conversation

OWN_BLOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}PROMPT{% endif %}"
)
"""A template that writes a block of its own, and leaves the content as it is."""
ALWAYS = OWN_BLOCK.replace("PROMPT", "{{ '<think>\\n' }}")
SOMETIMES = OWN_BLOCK.replace("PROMPT", "")
BESIDE = CHATML.replace(
    "message.content",
    "('[think]' + message.reasoning_content + '[/think]' if message.reasoning_content else '')"
    " + message.content",
)
"""A template that writes a block only for reasoning."""
HM = "<think>hm</think>Yes."


def render(template, *messages):
    tokenizer = tokenizer_of("chatml")
    [example] = render_one(renderer_of(tokenizer, template), *messages)
    return trained_texts(tokenizer, example), example.notes


@pytest.mark.parametrize(
    "content",
    [
        "<think>\nhm\n</think>\n\nYes.",
        "<think>hm</think>Yes.",
        "\n<thinking> hm </thinking> Yes.",
        "[THINK]hm[/THINK]\nYes.",
        "hm\n</think>\n\nYes.",
    ],
)
def test_a_block_in_the_content_is_trained_as_reasoning(content):
    texts, notes = render(ALWAYS, user("Hi"), assistant(content))
    assert texts == ["hm\n</think>\n\nYes.<|im_end|>"]
    assert "moved:reasoning" in notes


def test_an_empty_block_in_the_content_is_not_written_twice():
    texts, _ = render(SOMETIMES, user("Hi"), assistant("<think>\n\n</think>\n\nYes."))
    assert texts == ["<think>\n\n</think>\n\nYes.<|im_end|>"]


def test_a_block_goes_where_the_template_writes_reasoning():
    texts, _ = render(BESIDE, user("Hi"), assistant(HM))
    assert texts == ["[think]hm[/think]Yes.<|im_end|>"]


@pytest.mark.parametrize(
    "template, content",
    [
        (CHATML, HM),  # no reasoning known: the block is what the user wants as the answer
        (SOMETIMES, "The tag </think> ends it."),
        (SOMETIMES, "Look: <think>hm</think>"),
        (SOMETIMES, "Yes."),
    ],
)
def test_other_contents_stay(template, content):
    texts, notes = render(template, user("Hi"), assistant(content))
    assert texts[0].endswith(content + "<|im_end|>")
    assert "moved:reasoning" not in notes


def test_a_template_that_takes_the_block_out_itself_gets_the_row_as_it_is():
    tokenizer = tokenizer_of("qwen3")
    row = (user("Hi"), assistant("<think>\nhm\n</think>\n\nYes."))
    [example] = render_one(renderer_of(tokenizer), *row)
    assert example.notes == ()
    assert trained_texts(tokenizer, example) == ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]


def test_earlier_turns_and_prompts_have_it_too():
    tokenizer = tokenizer_of("chatml")
    renderer = renderer_of(tokenizer, SOMETIMES)
    row = (user("Hi"), assistant(HM), user("And?"))
    text = tokenizer.decode(renderer.prompt(Conversation(row)))
    assert "<think>\nhm\n</think>\n\nYes.<|im_end|>" in text and text.count("<think>") == 1


def test_reasoning_of_its_own_field_wins():
    message = assistant(HM, reasoning_content="so")
    texts, notes = render(SOMETIMES, user("Hi"), message)
    assert texts == ["<think>\nso\n</think>\n\n" + HM + "<|im_end|>"]
    assert "moved:reasoning" not in notes


def test_reasoning_in_the_content_that_is_not_written_is_counted():
    template = CHATML.replace("message.content", "message.content.split('</think>')[-1]")
    texts, notes = render(template, user("Hi"), assistant(HM))
    assert texts == ["Yes.<|im_end|>"]
    assert "left_out:reasoning_content" in notes


def test_split_content():
    assert split_content(HM) == ("<think>", "hm", "</think>", "Yes.")
    assert split_content("hm</think>Yes.") == ("", "hm", "</think>", "Yes.")
    assert split_content("a <think>hm</think>Yes.") is None
    assert split_content("<think>hm") is None
    assert has_reasoning(assistant(HM)) and not has_reasoning(assistant("Yes."))
