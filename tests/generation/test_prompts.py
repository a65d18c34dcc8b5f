"""Questions of the data as prompts, and the references that their answers are compared with."""

from dataclasses import replace

import pytest
from chat_templates import (
    CHATML,
    FAMILIES,
    Family,
    assistant,
    byte_tokenizer,
    call,
    metaspace_tokenizer,
    render_one,
    renderer_of,
    runs,
    tokenizer_of,
    user,
)

from lit_sft.errors import UserError
from lit_sft.generation.prompts import Asked, encode
from lit_sft.generation.text_metrics import exact_match, extract_answer
from lit_sft.model.decode import decode_completion
from lit_sft.model.generate import stop_token_ids
from lit_sft.model.new_tokens import add_tokens
from lit_sft.types import Conversation

MAGISTRAL = Family(
    r"""{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
{%- else %}
{%- if message.reasoning_content %}{{- '[THINK]' + message.reasoning_content + '[/THINK]' }}{%- endif %}
{{- message.content + '</s>' }}
{%- endif %}
{%- endfor %}""",
    ("[INST]", "[/INST]", "[THINK]", "[/THINK]"),
    eos="</s>",
    bos="<s>",
)
TOKENIZERS = {name: tokenizer_of for name in FAMILIES} | {
    "magistral": lambda name: byte_tokenizer(MAGISTRAL),
    "llama-2 with spaces": lambda name: metaspace_tokenizer(FAMILIES["llama-2"]),
}
ANSWERS = {
    "text": (assistant("Paris is it."),),
    "reasoning": (assistant("Paris is it.", reasoning_content="hm hm"),),
    "later": (assistant("Yes."), user("Where?"), assistant(" Paris is it.\n")),
    "call": (assistant("", tool_calls=call("get_weather", city="Paris")),),
    "call and text": (assistant("Let me look.", tool_calls=call("get_weather", city="Paris")),),
    "call and reasoning": (
        assistant("", tool_calls=call("get_weather", city="Paris"), reasoning_content="hm hm"),
    ),
}
WITHOUT_CALLS = set(FAMILIES) - {
    "qwen3", "qwen3-thinking", "qwen3.5", "llama-3", "mistral-tools", "deepseek-v3", "gpt-oss",
}  # fmt: skip
REFUSED = {
    # Without reasoning, its prompt leaves a thinking block open.
    "text": {"deepseek-r1"},
    "reasoning": set(),
    "later": {"deepseek-r1"},
    "call": WITHOUT_CALLS,
    "call and text": WITHOUT_CALLS,
    "call and reasoning": WITHOUT_CALLS,
}


def learned(tokenizer, renderer, messages):
    """What a model that has learned a row by heart answers, and the reference that this is compared
    with.
    """
    conversation = Conversation(messages)
    example = render_one(renderer, *messages)[-1]
    begin, end = runs(example)[-1]
    stops = stop_token_ids(tokenizer, None, example.stop_ids)
    ids = example.input_ids[begin:end]
    stop_at = next(i for i, token in enumerate(ids) if token in stops)
    [prompt] = encode([Asked(conversation, "row 1")], renderer)
    assert (
        prompt.ids == example.input_ids[:begin]
        and prompt.num_reference_tokens == stop_at == len(ids) - 1
    )
    return decode_completion(tokenizer, ids[: stop_at + 1], stops), prompt.reference


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_was_learned_by_heart_matches(name, kind):
    tokenizer = TOKENIZERS[name](name)
    renderer, messages = renderer_of(tokenizer), (user("Hi"), *ANSWERS[kind])
    if name in REFUSED[kind] or (name in ("magistral", "llama-2 with spaces") and "call" in kind):
        with pytest.raises(UserError):
            render_one(renderer, *messages)
        return
    answer, reference = learned(tokenizer, renderer, messages)
    assert answer == reference and exact_match(answer, reference)
    shown = extract_answer(reference, None)
    assert "hm hm" not in shown and (
        "get_weather" in shown and "Paris" in shown if "call" in kind else True
    )
    if "call" not in kind:
        assert shown == "Paris is it."
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert not [mark for mark in marks if mark in shown]


def test_rows_that_cannot_be_trained_are_compared_with_their_text():
    tokenizer = tokenizer_of("deepseek-r1")
    messages = (user("Hi"), assistant("Paris is it." + tokenizer.eos_token))
    [prompt] = encode([Asked(Conversation(messages), "row 1")], renderer_of(tokenizer))
    assert prompt.reference == "Paris is it."


def test_the_reference_of_a_lenient_row_begins_where_it_is_trained():
    tokenizer = tokenizer_of("qwen3-thinking")
    renderer, messages = (
        renderer_of(tokenizer, unproved="lenient"),
        (user("Hi"), assistant("Paris is it.")),
    )
    [prompt] = encode([Asked(Conversation(messages), "row 1")], renderer)
    assert extract_answer(prompt.reference, None) == "Paris is it."


def test_raw_rows_that_bring_their_own_end():
    tokenizer = tokenizer_of("chatml")
    messages = (user("Q: 1+1\nA:"), assistant(f" 2{tokenizer.eos_token}"))
    assert learned(tokenizer, renderer_of(tokenizer, "raw"), messages) == (" 2", " 2")


@pytest.mark.parametrize("train_on", ["completions", "last_completion", "all"])
def test_references_do_not_depend_on_what_is_trained_besides(train_on):
    renderer = renderer_of(tokenizer_of("qwen3"), train_on=train_on)
    rows = [
        (
            user("Hi"),
            assistant("Yes.", train=True),
            user("Where?"),
            assistant("Paris is it.", **flag),
        )
        for flag in ({}, {"train": True}, {"train": False})
    ]
    prompts = encode([Asked(Conversation(messages), "row") for messages in rows], renderer)
    thoughtless = "<think>\n\n</think>\n\nParis is it."
    assert [prompt.reference for prompt in prompts] == [thoughtless, thoughtless, None]
    assert len({tuple(prompt.ids) for prompt in prompts}) == 1


def test_new_tokens_are_text_unless_the_template_writes_them():
    """A base model that is taught ChatML, and to put its answer between marks."""
    tokenizer = byte_tokenizer(replace(FAMILIES["chatml"], special=()))
    add_tokens(tokenizer, ["<|im_start|>", "<|im_end|>", "<answer>", "</answer>"], CHATML)
    renderer, text = renderer_of(tokenizer), "so <answer>42</answer>"
    answer, reference = learned(tokenizer, renderer, (user("Hi"), assistant(text)))
    assert answer == reference == text
    ids = tokenizer(f"<|im_start|>{text}<|im_end|>")["input_ids"]
    assert decode_completion(tokenizer, ids, ()) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            "<think>hm</think>Yes.",
        ),
        ("<|channel|>analysis<|message|>hm", "<think>hm</think>"),
        ("<|channel|>commentary<|message|>I look.<|end|>", "I look."),
        (
            " to=functions.f<|channel|>commentary json<|message|>{}",
            " to=functions.fcommentary json{}",
        ),
        ("Yes.<|end|><|start|>user", "Yes.user"),
    ],
)
def test_channels_of_gpt_oss(text, shown):
    tokenizer = tokenizer_of("gpt-oss")
    assert decode_completion(tokenizer, tokenizer(text)["input_ids"], ()) == shown
