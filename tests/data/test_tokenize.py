"""Conversations to token ids and loss masks: tokenizers of all kinds, `train_on`, flags, raw text,
batches, prompts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from chat_templates import (
    CHATML,
    FAMILIES,
    LLAMA2,
    Family,
    assistant,
    byte_tokenizer,
    call,
    character_tokenizer,
    metaspace_tokenizer,
    render_one,
    renderer_of,
    runs,
    system,
    tokenizer_of,
    trained_texts,
    user,
)

from lit_sft.errors import UserError
from lit_sft.types import Conversation

ONE = (user("Hi"), assistant("Hello"))
TWO = (*ONE, user("x"), assistant("Yes."))
SPACE_BEFORE_ANSWERS = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)
CHATML_FAMILY = FAMILIES["chatml"]
NO_TEMPLATE = Family(None, ("<pad>",), eos="</s>", bos="<s>")

TOKENIZERS = {
    "bytes": byte_tokenizer,
    "trimmed_offsets": lambda family: with_trimmed_offsets(byte_tokenizer(family)),
    "metaspace_first": metaspace_tokenizer,
    "metaspace_always": lambda family: metaspace_tokenizer(family, scheme="always"),
    "characters": character_tokenizer,
}


def with_trimmed_offsets(tokenizer):
    """As GPT-2 and SmolLM2 have it: the offset of a token leaves out its leading space."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, LLAMA2, None], ids=["chatml", "llama-2", "plain"])
def test_tokenizers_of_all_kinds(kind, template):
    tokenizer = TOKENIZERS[kind](
        replace(NO_TEMPLATE if template != CHATML else CHATML_FAMILY, template=template)
    )
    renderer = renderer_of(tokenizer)
    messages = (
        user("What is 1+1? 你好"),
        assistant("It is 2, 世界"),
        user(" x "),
        assistant("Yes. "),
    )
    [example] = render_one(renderer, *messages)
    stop = "<|im_end|>" if template == CHATML else "</s>"
    expected = (
        [f" It is 2, 世界 {stop}", f" Yes. {stop}"]
        if template == LLAMA2
        else [f"It is 2, 世界{stop}", f"Yes. {stop}"]
    )
    if kind.startswith("metaspace"):  # its decoder strips the space that a text begins with
        expected = [text.lstrip() for text in expected]
    assert [
        text.lstrip() if kind.startswith("metaspace") else text
        for text in trained_texts(tokenizer, example)
    ] == expected
    for i, (begin, end) in zip((1, 3), runs(example), strict=True):
        served = tokenizer.apply_chat_template(
            [message.to_dict() for message in messages[:i]],
            chat_template=renderer.template.text,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert example.input_ids[:begin] == served
        assert (
            example.input_ids[end - 1]
            == tokenizer.convert_tokens_to_ids(stop)
            == example.stop_ids[0]
        )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompt_and_answer_that_would_share_a_token_are_tokenized_apart(kind):
    """`Answer: ` + `Hello`: a server feeds the space, though a tokenizer would merge it with the
    word.
    """
    tokenizer = TOKENIZERS[kind](replace(NO_TEMPLATE, bos=None))
    question, answer = user("Question: Hi\nAnswer: "), assistant("Hello there")
    renderer = renderer_of(tokenizer, "raw")
    [example] = render_one(renderer, question, answer)
    [(begin, end)] = runs(example)
    assert (
        example.input_ids[:begin]
        == tokenizer(question.content)["input_ids"]
        == renderer.prompt(Conversation((question,)))
    )
    assert tokenizer.decode(example.input_ids) == "Question: Hi\nAnswer: Hello there</s>"
    assert end == len(example.input_ids) and example.input_ids[-1] == tokenizer.eos_token_id
    assert example.notes == (() if kind == "characters" else ("split_boundary",))


def test_an_answer_that_merges_with_the_header_is_tokenized_apart():
    """The newlines of header and answer are one token in the text, but a server feeds the first
    alone.
    """
    tokenizer = tokenizer_of("chatml")
    header = tokenizer.convert_tokens_to_ids(["<|im_start|>", "assistant", "Ċ"])
    examples = render_one(renderer_of(tokenizer), user("Hi"), assistant("\n Hello"), *ONE)
    assert [trained_texts(tokenizer, example) for example in examples] == [
        ["\n Hello<|im_end|>"],
        ["Hello<|im_end|>"],
    ]
    assert [example.notes for example in examples] == [
        ("per_turn", "split_boundary"),
        ("per_turn",),
    ]
    assert all(
        example.input_ids[begin - 3 : begin] == header
        for example in examples
        for begin, _ in runs(example)
    )


def test_a_turn_that_is_not_trained_must_not_share_a_token_with_what_is():
    renderer = renderer_of(tokenizer_of("chatml"), train_on="all")
    with pytest.raises(UserError, match="turn 2 is not trained, but shares a token with others"):
        render_one(renderer, user("Hi"), assistant("\n Hello", train=False))


def test_a_prompt_may_begin_with_a_space_that_no_offset_covers():
    tokenizer = TOKENIZERS["trimmed_offsets"](replace(NO_TEMPLATE, bos=None))
    [example] = render_one(renderer_of(tokenizer, "raw"), user("  Hi\n"), assistant("Hello"))
    assert trained_texts(tokenizer, example) == ["Hello</s>"]
    assert example.notes == ()


def test_a_boundary_that_cannot_be_kept_is_refused_or_lenient():
    """A tokenizer that rewrites a word by what stands before it: tokenized apart, the text would be
    another.
    """
    from tokenizers import normalizers

    tokenizer = byte_tokenizer(replace(NO_TEMPLATE, bos=None))
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(" Hello", " Hi"), normalizers.Replace("Hello", "Yes")]
    )
    messages = (user("Answer: "), assistant("Hello"))
    with pytest.raises(
        UserError, match=r"turn 2 .*does not keep the prompt's end 'Answer: ' and the answer 'Hello"
    ):
        render_one(renderer_of(tokenizer, "raw"), *messages)
    [example] = render_one(renderer_of(tokenizer, "raw", unproved="lenient"), *messages)
    assert trained_texts(tokenizer, example) == [" Hi</s>"]
    assert example.notes == ("lenient",)


def test_a_lenient_example_keeps_the_notes_of_its_row():
    """Two turns that share a token with their prompts become examples of their own."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer(replace(NO_TEMPLATE, template=SPACE_BEFORE_ANSWERS))
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(" Hello", " Hi"), normalizers.Replace("Hello", "Yes")]
    )
    renderer = renderer_of(tokenizer, unproved="lenient")
    examples = render_one(renderer, *ONE, user("x"), assistant("Hello"))
    assert [example.notes for example in examples] == [("per_turn", "lenient")] * 2


def test_stop_token_is_trained_where_pad_is_eos():
    tokenizer = tokenizer_of("mistral")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    [example] = render_one(renderer_of(tokenizer), *TWO)
    assert [
        example.loss_mask[i]
        for i, token in enumerate(example.input_ids)
        if token == tokenizer.eos_token_id
    ] == [
        1,
        1,
    ]


@pytest.mark.parametrize("family", ["llama-2", "llama-3", "mistral", "gemma", "deepseek-v3"])
def test_bos_comes_once_though_the_tokenizer_adds_one_too(family):
    tokenizer = byte_tokenizer(FAMILIES[family], adds_bos=True)
    renderer = renderer_of(tokenizer)
    for example in render_one(renderer, *ONE):
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert renderer.prompt(Conversation(ONE[:1])).count(tokenizer.bos_token_id) == 1


# ---- what is trained
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_on", "flags", "expected"),
    [
        ("completions", (None, None), ["Hello<|im_end|>", "Yes.<|im_end|>"]),
        ("completions", (False, None), ["Yes.<|im_end|>"]),
        ("completions", (None, False), ["Hello<|im_end|>"]),
        ("completions", (False, False), []),
        ("last_completion", (None, None), ["Yes.<|im_end|>"]),
        ("last_completion", (True, None), ["Hello<|im_end|>", "Yes.<|im_end|>"]),
        ("last_completion", (True, False), ["Hello<|im_end|>"]),
    ],
)
def test_train_on_and_flags(train_on, flags, expected):
    tokenizer = tokenizer_of("chatml")
    first, second = flags
    messages = (
        user("Hi"),
        assistant("Hello", train=first),
        user("x"),
        assistant("Yes.", train=second),
    )
    [example] = render_one(renderer_of(tokenizer, train_on=train_on), *messages)
    assert trained_texts(tokenizer, example) == expected
    assert len(example.stop_ids) == bool(expected)


def test_train_on_all():
    tokenizer = tokenizer_of("chatml")
    renderer = renderer_of(tokenizer, train_on="all")
    [example] = render_one(renderer, *TWO)
    assert example.loss_mask == [1] * len(example.input_ids)
    assert tokenizer.decode(example.input_ids) == renderer.template.write(Conversation(TWO))[0]
    assert example.stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    [example] = render_one(renderer, user("Hi"), assistant("Hello", train=False), *TWO[2:])
    [(_, begin), (end, _)] = runs(example)
    assert tokenizer.decode(example.input_ids[begin:end]) == "Hello<|im_end|>"
    # What ends a question is no stop token of the model.
    [example] = render_one(renderer, *ONE, user("x"))
    assert example.stop_ids == ()


def test_train_on_all_needs_a_stop_token_but_no_prompt_that_fits():
    tokenizer = tokenizer_of("deepseek-r1")
    [example] = render_one(renderer_of(tokenizer, train_on="all"), *ONE)
    assert example.loss_mask == [1] * len(example.input_ids)
    assert example.stop_ids == (tokenizer.eos_token_id,)
    assert example.notes == ()
    unended = "{%- for message in messages %}{{- message.role + message.content }}{%- endfor %}"
    with pytest.raises(UserError, match=r"turn 2 \(assistant\) open"):
        render_one(renderer_of(tokenizer_of("chatml"), unended, train_on="all"), *ONE)
    # several special tokens at the end
    [example] = render_one(renderer_of(tokenizer_of("phi-3"), train_on="all"), *TWO)
    assert example.stop_ids == (tokenizer_of("phi-3").convert_tokens_to_ids("<|end|>"),)
    # what is not trained must be found in the text as it is
    with pytest.raises(
        UserError, match=r"turn 2 is not trained, but the template rewrites it; set data\.train_on"
    ):
        first = assistant("Hello", reasoning_content="hm", train=False)
        render_one(renderer_of(tokenizer_of("qwen3"), train_on="all"), user("Hi"), first, *TWO[2:])


def test_history_that_is_not_trained_need_not_fit():
    tokenizer = tokenizer_of("qwen3")
    first = assistant("Hello", reasoning_content="hm")
    [example] = render_one(
        renderer_of(tokenizer, train_on="last_completion"), user("Hi"), first, *TWO[2:]
    )
    assert example.notes == ()
    assert trained_texts(tokenizer, example) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]
    # only the first turn is trained, and what follows rewrites it: the example ends with it
    trained = replace(first, train=True)
    [example] = render_one(
        renderer_of(tokenizer), user("Hi"), trained, user("x"), assistant("Yes.", train=False)
    )
    assert tokenizer.decode(example.input_ids).endswith("<think>\nhm\n</think>\n\nHello<|im_end|>")


def test_a_conversation_may_end_with_a_question():
    tokenizer = tokenizer_of("chatml")
    [example] = render_one(renderer_of(tokenizer), *ONE, user("x"))
    assert trained_texts(tokenizer, example) == ["Hello<|im_end|>"]
    [example] = render_one(renderer_of(tokenizer), user("x"))
    assert example.loss_mask == [0] * len(example.input_ids)


# ---- without a template
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
def test_raw_is_prompt_completion_and_one_eos(adds_bos):
    tokenizer = byte_tokenizer(NO_TEMPLATE, adds_bos=adds_bos)
    renderer = renderer_of(tokenizer, "raw")
    [example] = render_one(renderer, system("你好。\n"), user("问题：1+1\n回答："), assistant("2"))
    bos = "<s>" if adds_bos else ""
    assert tokenizer.decode(example.input_ids) == bos + "你好。\n问题：1+1\n回答：2</s>"
    assert trained_texts(tokenizer, example) == ["2</s>"]
    assert example.stop_ids == (tokenizer.eos_token_id,)
    [(begin, _)] = runs(example)
    assert example.input_ids[:begin] == tokenizer("你好。\n问题：1+1\n回答：")["input_ids"]


def test_raw_does_not_double_a_bos():
    tokenizer = byte_tokenizer(NO_TEMPLATE, adds_bos=True)
    renderer = renderer_of(tokenizer, "raw")
    [example] = render_one(renderer, user("<s>Hi"), assistant(" Hello"))
    assert tokenizer.decode(example.input_ids) == "<s>Hi Hello</s>"
    [(begin, _)] = runs(example)
    assert renderer.prompt(Conversation((user("<s>Hi"),))) == example.input_ids[:begin]


def test_raw_trains_the_last_answer_only():
    tokenizer = byte_tokenizer(NO_TEMPLATE)
    for train_on, trained in (("completions", "Yes.</s>"), ("all", "HiHelloxYes.</s>")):
        renderer = renderer_of(tokenizer, "raw", train_on=train_on)
        [example] = render_one(renderer, *TWO, user("Hi"))
        assert tokenizer.decode(example.input_ids) == "HiHelloxYes.</s>"
        assert trained_texts(tokenizer, example) == [trained]


def test_raw_does_not_double_an_eos_and_trains_all_when_told():
    tokenizer = byte_tokenizer(NO_TEMPLATE, adds_bos=True)
    [example] = render_one(
        renderer_of(tokenizer, "raw", train_on="all"), user("Hi"), assistant(" Hello</s>")
    )
    assert tokenizer.decode(example.input_ids) == "<s>Hi Hello</s>"
    assert example.loss_mask == [1] * len(example.input_ids)
    assert example.stop_ids == (tokenizer.eos_token_id,)


def test_raw_does_not_lose_a_tool_call():
    with pytest.raises(
        UserError, match="calls 'get_weather', which the chat template does not write"
    ):
        render_one(
            renderer_of(byte_tokenizer(NO_TEMPLATE), "raw"),
            user("Hi"),
            assistant("", tool_calls=call("get_weather")),
        )


def test_an_eos_that_the_tokenizer_appends_is_not_doubled():
    from tokenizers import processors

    tokenizer = byte_tokenizer(NO_TEMPLATE, adds_bos=True)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = both
    renderer = renderer_of(tokenizer, "raw")
    [example] = render_one(renderer, *ONE)
    assert tokenizer.decode(example.input_ids) == "<s>HiHello</s>"
    assert tokenizer.decode(renderer.prompt(Conversation(ONE[:1]))) == "<s>Hi"


@pytest.mark.parametrize(
    "text",
    [
        "Hello there",
        "Hello there</s>",
        "Hello there</s>\n",
        "<s>Hello there",
        "<s>Hello there</s> \n",
    ],
)
def test_plain_text_is_trained_whole_between_one_bos_and_one_eos(text):
    tokenizer = byte_tokenizer(NO_TEMPLATE, adds_bos=True)
    renderer = renderer_of(tokenizer)
    [[example]] = renderer.render([Conversation((), text=text)], [3])
    assert tokenizer.decode(example.input_ids) == "<s>Hello there</s>"
    assert example.loss_mask == [1] * len(example.input_ids)
    assert (example.row, example.stop_ids) == (3, (tokenizer.eos_token_id,))
    for prompt in ("Hello", "<s>Hello"):
        assert tokenizer.decode(renderer.prompt(Conversation((), text=prompt))) == "<s>Hello"


def test_white_space_is_kept_where_no_eos_is_before_it():
    tokenizer = byte_tokenizer(NO_TEMPLATE)
    [[example]] = renderer_of(tokenizer).render([Conversation((), text="Hi</s> there \n")], [0])
    assert tokenizer.decode(example.input_ids) == "Hi</s> there \n</s>"


def test_plain_text_needs_an_eos():
    tokenizer = byte_tokenizer(CHATML_FAMILY)
    tokenizer.eos_token = None
    [error] = renderer_of(tokenizer).render([Conversation((), text="Hello")], [0])
    assert isinstance(error, UserError) and "no eos token" in str(error)


# ---- batches, prompts, fingerprint
# -----------------------------------------------------------------------


def test_results_belong_to_their_conversations():
    """A batch gives what each conversation gives alone, whatever is refused or takes several parts
    beside it.
    """
    renderer = renderer_of(tokenizer_of("qwen3"))
    conversations = [
        Conversation(TWO),
        Conversation((user("Hi"), assistant("a<|im_end|>b"))),
        Conversation(ONE),
        Conversation((), text="Hello"),
        Conversation(ONE),
        Conversation((user("Hi"), assistant("Yes.", reasoning_content="hm"))),
    ]
    rows = [10, 11, 12, 13, 14, 15]
    together = renderer.render(conversations, rows)
    alone = [
        renderer.render([conversation], [row])[0]
        for conversation, row in zip(conversations, rows, strict=True)
    ]
    assert isinstance(together[1], UserError) and str(together[1]) == str(alone[1])
    assert [r for r in together if isinstance(r, list)] == [r for r in alone if isinstance(r, list)]
    assert [[(e.row, e.part) for e in r] for r in together if isinstance(r, list)] == [
        [(10, 0), (10, 1)], [(12, 0)], [(13, 0)], [(14, 0)], [(15, 0)],
    ]  # fmt: skip
    assert renderer.render([], []) == []


def test_texts_are_tokenized_in_one_call(monkeypatch):
    tokenizer = byte_tokenizer(CHATML_FAMILY)
    calls = []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, texts, **kw: calls.append(len(texts)) or encode(self, texts, **kw),
    )
    renderer_of(tokenizer).render([Conversation(TWO), Conversation(ONE)] * 50, range(100))
    assert calls == [3]  # two texts and one header, each of them once


def test_one_turn_is_rendered_twice(monkeypatch):
    tokenizer = byte_tokenizer(CHATML_FAMILY)
    renderer = renderer_of(tokenizer)
    written = []
    write = type(renderer.template).write
    monkeypatch.setattr(
        type(renderer.template),
        "write",
        lambda self, c, *a, **kw: written.append(len(c.messages)) or write(self, c, *a, **kw),
    )
    render_one(renderer, *ONE)
    assert written == [1, 2]


def test_prompt():
    tokenizer = tokenizer_of("chatml")
    renderer = renderer_of(tokenizer)
    served = tokenizer.apply_chat_template(
        [ONE[0].to_dict()], add_generation_prompt=True, return_dict=False
    )
    assert renderer.prompt(Conversation(ONE[:1])) == renderer.prompt(Conversation(ONE)) == served
    # an answer that could not be trained does not keep the question from being asked
    tokenizer = tokenizer_of("deepseek-r1")
    renderer = renderer_of(tokenizer)
    prompt = tokenizer.decode(renderer.prompt(Conversation(ONE)))
    assert prompt.endswith("<｜User｜>Hi<｜Assistant｜><think>\n")
    with pytest.raises(UserError, match="System role"):
        renderer_of(tokenizer_of("gemma")).prompt(Conversation((system("S"), user("Hi"))))


def test_chat_template_kwargs_reach_the_template():
    tokenizer = tokenizer_of("chatml")
    renderer = renderer_of(tokenizer, "{{ head }}" + CHATML, chat_template_kwargs={"head": "Yes."})
    assert tokenizer.decode(render_one(renderer, *ONE)[0].input_ids).startswith(
        "Yes.<|im_start|>user"
    )


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_fingerprint_changes_with_what_decides_the_ids(kind):
    import json

    make = TOKENIZERS[kind]
    base = renderer_of(make(CHATML_FAMILY)).fingerprint()
    assert json.loads(json.dumps(base)) == base
    tokenizer = make(CHATML_FAMILY)
    renderer = renderer_of(tokenizer)
    tokenizer(
        ["a", "b c"], padding=kind == "bytes", truncation=True, max_length=4
    )  # settings of a call are no change
    assert renderer.fingerprint() == base
    others = [
        renderer_of(make(replace(CHATML_FAMILY, special=("<|im_start|>", "<|im_end|>", "<|x|>")))),
        renderer_of(make(replace(CHATML_FAMILY, eos="<|im_end|>"))),
        renderer_of(tokenizer, CHATML + " "),
        renderer_of(tokenizer, "raw"),
        renderer_of(tokenizer, "{{ a }}" + CHATML, chat_template_kwargs={"a": 1}),
        renderer_of(tokenizer, "{{ a }}" + CHATML, chat_template_kwargs={"a": 2}),
        renderer_of(tokenizer, train_on="all"),
        renderer_of(tokenizer, unproved="lenient"),
    ]
    assert len({json.dumps(other.fingerprint()) for other in others} | {json.dumps(base)}) == 9
