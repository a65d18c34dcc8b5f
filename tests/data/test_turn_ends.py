"""What ends a turn, and what fills the thinking block of a prompt, under templates of families."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from chat_templates import (
    FAMILIES,
    assistant,
    call,
    render_one,
    renderer_of,
    tool,
    trained_texts,
    user,
)
from family_templates import (
    APERTUS,
    FAMILY_TEMPLATES,
    GLM45,
    GLM47,
    HARMONY,
    HUNYUAN3,
    NEMOTRON3,
    OLMO3,
    QWEN36,
    R1_TOOLS,
    STEP,
)
from template_oracle import Server, judge
from template_sweep import ROWS

from lit_sft.data.stop_set import stop_set
from lit_sft.data.tokenize import Renderer
from lit_sft.errors import UserError
from lit_sft.types import Message

NO_THOUGHTS = {
    "single", "multi-turn", "system", "system, multi-turn", "last turn open", "first turn untrained", "call",
    "call, result", "call, result, answer", "tools, no call", "text beside a call", "two calls", "nested arguments",
    "arguments as JSON text",
    "calls, multi-turn", "reasoning, then none", "reasoning, call, no more", "white space", "Unicode", "markup",
}  # fmt: skip
"""Shapes with an answer without thoughts."""
REFUSED = {
    # Nobody could make these models answer without thoughts: their prompt begins them.
    "DeepSeek R1": ("refused: opens thinking", NO_THOUGHTS),
    "MiniMax M2": ("refused: opens thinking", NO_THOUGHTS),
    # Their prompt closes the thinking block, until `reasoning_effort` opens it.
    "Hunyuan 3": ("refused: prefix", {shape for shape in ROWS if "reason" in shape or "thoughts" in shape}),
    "Olmo 3": ("refused: no call", {shape for shape in ROWS if "call" in shape or "arguments" in shape} - {"tools, no call"}),
    "gpt-oss": ("refused: no call", {"two calls"}),
}  # fmt: skip
"""Family -> why rows are refused, and the shapes of these rows."""
CITY = call("get_weather", city="Rome")
AGENT = (
    user("Weather?"),
    assistant("", tool_calls=CITY, reasoning_content="must look"),
    tool("sunny"),
    assistant("It is sunny.", reasoning_content="so it is"),
)
TWO = (user("Hi"), assistant("Hello"), user("Well?"), assistant("Yes."))


def _renderer(template: str, **options: Any) -> Renderer:
    return renderer_of(Server(template).tokenizer, template, **options)


def _trained(renderer: Renderer, *messages: Message) -> list[list[str]]:
    examples = render_one(renderer, *messages)
    return [trained_texts(renderer.tokenizer, example) for example in examples]


@pytest.mark.parametrize("family", FAMILY_TEMPLATES)
def test_no_mask_is_wrong(family: str) -> None:
    """Rows are refused only where no server could produce the turn."""
    server = Server(FAMILY_TEMPLATES[family])
    verdicts = {shape: judge(server, row) for shape, row in ROWS.items()}
    assert not {shape: v.faults for shape, v in verdicts.items() if v.kind == "wrong"}
    reason, shapes = REFUSED.get(family, ("", set()))
    refused = {
        shape: found.kind for shape, found in verdicts.items() if found.kind.startswith("refused")
    }
    assert refused == dict.fromkeys(shapes, reason)


@pytest.mark.parametrize(
    ("template", "messages", "trained"),
    [
        (GLM45, TWO[:2], [["\n<think></think>\nHello<|user|>"]]),
        (GLM45, TWO, [["\n<think></think>\nHello<|user|>", "\n<think></think>\nYes.<|user|>"]]),
        (
            GLM45,
            AGENT,
            [
                [
                    (
                        "\n<think>must look</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>"
                        "\n<arg_value>Rome</arg_value>\n</tool_call><|observation|>"
                    ),
                    "\n<think>so it is</think>\nIt is sunny.<|user|>",
                ]
            ],
        ),
        (
            GLM47,
            AGENT,
            [
                [
                    (
                        'must look</think><tool_call>get_weather{"city": "Rome"}</tool_call>'
                        "<|observation|>"
                    ),
                    "so it is</think>It is sunny.<|user|>",
                ]
            ],
        ),
        # The end is written once the user has replied.
        (APERTUS, TWO, [["Hello<|assistant_end|>", "Yes.<|assistant_end|>"]]),
        # Every turn ends as the template ends it when nothing follows, as a server asks for it.
        (OLMO3, TWO, [["Hello<|endoftext|>"], ["Yes.<|endoftext|>"]]),
    ],
)
def test_the_end_of_a_turn(
    template: str, messages: tuple[Message, ...], trained: list[list[str]]
) -> None:
    renderer = _renderer(template)
    assert _trained(renderer, *messages) == trained
    [*_, last] = render_one(renderer, *messages)
    assert last.loss_mask[-1] == 1
    assert last.input_ids[-1] in last.stop_ids


def test_a_turn_with_calls_ends_with_the_token_of_results_whatever_follows() -> None:
    """Such a row has no result, but a server feeds one."""
    messages = (user("Weather?"), assistant("", tool_calls=CITY), *TWO[2:])
    [first, second] = _trained(_renderer(GLM45), *messages)
    assert first[0].endswith("</tool_call><|observation|>")
    assert second == ["\n<think></think>\nYes.<|user|>"]


def test_a_call_in_the_content_is_followed_by_its_result() -> None:
    messages = (user("Weather?"), assistant("look()"), Message("tool", "sunny"), *TWO[1:2])
    [[first, second]] = _trained(_renderer(GLM45), *messages)
    assert first.endswith("look()<|observation|>")
    assert second.endswith("Hello<|user|>")


def test_a_neighbouring_answer_is_no_end() -> None:
    """No server stops at the token of the assistant."""
    examples = _trained(_renderer(GLM45), *TWO[:2], assistant("Again"))
    assert [text.rpartition("<|")[2] for [text] in examples] == ["user|>", "user|>"]


def test_train_on_all_ends_with_the_stop_token() -> None:
    renderer = _renderer(GLM45, train_on="all")
    [example] = render_one(renderer, *TWO)
    assert renderer.tokenizer.decode(example.input_ids).endswith("Yes.<|user|>")
    assert example.loss_mask == [1] * len(example.input_ids)
    assert renderer.tokenizer.convert_ids_to_tokens(example.stop_ids) == ["<|user|>"]


def test_a_template_that_no_special_token_divides_is_refused() -> None:
    template = (
        "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
    )
    with pytest.raises(UserError, match=r"leaves turn 2 .* none begins the next message"):
        render_one(_renderer(template), *TWO[:2])


@pytest.mark.parametrize(
    ("template", "turn_ends", "others"),
    [
        # `<|user|>` is no eos token for other uses of the export, so another is beside it.
        (GLM45, {"<|user|>", "</s>"}, {"<|observation|>"}),
        (GLM47, {"<|user|>", "</s>"}, {"<|observation|>"}),
        (APERTUS, {"<|assistant_end|>"}, {"<|tools_suffix|>"}),
        # A base that was trained on whole conversations also emits the end of earlier answers.
        (OLMO3, {"<|endoftext|>"}, {"<|im_end|>"}),
        # `<|end|>` ends parts of an answer, too.
        (HARMONY, {"<|return|>"}, {"<|call|>"}),
        (QWEN36, {"<|im_end|>"}, set()),
        (FAMILIES["chatml"].template, {"<|im_end|>"}, set()),
        (FAMILIES["gemma"].template, {"<end_of_turn>"}, set()),
        (FAMILIES["cohere"].template, {"<|END_OF_TURN_TOKEN|>"}, set()),
        (FAMILIES["phi-3"].template, {"<|end|>"}, set()),
    ],
)
def test_where_a_server_stops(template: str, turn_ends: set[str], others: set[str]) -> None:
    renderer = _renderer(template)
    found = stop_set(renderer)
    tokens = renderer.tokenizer.convert_ids_to_tokens
    assert set(tokens(sorted(found.turn_ends))) == turn_ends
    assert set(tokens(sorted(found.all))) == turn_ends | others


@pytest.mark.parametrize("form", ["apart", "in the content"])
def test_reasoning_that_the_template_never_writes_fills_the_block_of_the_prompt(form: str) -> None:
    renderer = _renderer(R1_TOOLS)
    messages = AGENT
    if form == "in the content":
        messages = (
            user("Weather?"),
            assistant("<think>\nmust look\n</think>", tool_calls=CITY),
            tool("sunny"),
            assistant("<think>\nso it is\n</think>\n\nIt is sunny."),
        )
    assert _trained(renderer, *messages) == [
        [
            (
                "must look\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather"
                '<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
                "<｜end▁of▁sentence｜>"
            )
        ],
        ["so it is\n</think>\n\nIt is sunny.<｜end▁of▁sentence｜>"],
    ]
    examples = render_one(renderer, *messages)
    notes = Counter(note for example in examples for note in example.notes)
    assert notes == {"per_turn": 2, "written:reasoning": 2}
    # History has no thoughts, as a server writes it.
    assert "must look" not in renderer.tokenizer.decode(examples[1].input_ids)


def test_reasoning_stays_inside_the_marks_of_a_template() -> None:
    template = R1_TOOLS.replace(
        "{{- '<｜Assistant｜>' + m.content.split('</think>')[-1].lstrip() }}",
        "{{- '<｜Assistant｜>' }}{%- generation %}{{- m.content.split('</think>')[-1].lstrip() }}",
    ).replace(
        "{{- '<｜end▁of▁sentence｜>' }}{%- endif %}",
        "{{- '<｜end▁of▁sentence｜>' }}{%- endgeneration %}{%- endif %}",
    )
    assert "endgeneration" in template
    [[text]] = _trained(_renderer(template), AGENT[0], AGENT[3])
    assert text == "so it is\n</think>\n\nIt is sunny.<｜end▁of▁sentence｜>"


def test_a_switch_that_opens_the_block_is_set_for_reasoning() -> None:
    """DeepSeek V3.1 writes no thoughts, but its prompt opens the block when it is told to."""
    family = FAMILIES["deepseek-v3.1"]
    [example] = render_one(_renderer(family.template), AGENT[0], AGENT[3])
    assert example.notes == ("switch:thinking=true", "written:reasoning")
    [[text]] = _trained(_renderer(family.template), AGENT[0], AGENT[3])
    assert text == "so it is</think>It is sunny.<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("content", ["Hello", "\n\n Hello", "Zebra"])
def test_an_answer_without_reasoning_is_trained_behind_the_empty_block(content: str) -> None:
    """To train `</think>` there would teach the model to think nothing."""
    renderer = _renderer(STEP)
    [example] = render_one(renderer, user("Hi"), assistant(content))
    [[text]] = _trained(renderer, user("Hi"), assistant(content))
    assert text == f"{content}<|im_end|>"
    before = renderer.tokenizer.decode(example.input_ids).partition(text)[0]
    assert before.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert example.notes[0] == "empty_thinking"


def test_reasoning_behind_a_prompt_that_closes_the_block_names_the_variable() -> None:
    said = r"the prompt closes .* data\.chat_template_kwargs .*reads .*reasoning_effort"
    with pytest.raises(UserError, match=said):
        render_one(_renderer(HUNYUAN3), AGENT[0], AGENT[3])
    told = _renderer(HUNYUAN3, chat_template_kwargs={"reasoning_effort": "high"})
    [[text]] = _trained(told, AGENT[0], AGENT[3])
    assert text == "so it is</think>It is sunny.<｜hy_eos:opensource｜>"


@pytest.mark.parametrize(
    ("template", "name", "keeps"),
    [
        (QWEN36, "preserve_thinking", True),
        (GLM47, "clear_thinking", False),
        (NEMOTRON3, "truncate_history_thinking", False),
    ],
)
def test_a_variable_that_keeps_earlier_thoughts_makes_one_example(
    template: str, name: str, keeps: bool
) -> None:
    messages = (
        user("Hi"),
        assistant("Hello", reasoning_content="hm"),
        user("Well?"),
        assistant("Yes.", reasoning_content="so so"),
    )
    assert len(render_one(_renderer(template), *messages)) == 2
    renderer = _renderer(template, chat_template_kwargs={name: keeps})
    [example] = render_one(renderer, *messages)
    text = renderer.tokenizer.decode(example.input_ids)
    assert "hm" in text and "so so" in text
    assert len(trained_texts(renderer.tokenizer, example)) == 2


def test_harmony_trains_the_thought_and_the_answer_behind_a_result() -> None:
    renderer = _renderer(HARMONY)
    assert _trained(renderer, *AGENT) == [
        [
            (
                "<|channel|>analysis<|message|>must look<|end|><|start|>assistant"
                " to=functions.get_weather<|channel|>commentary json<|message|>"
                '{"city": "Rome"}<|call|>'
            ),
            (
                "<|channel|>analysis<|message|>so it is<|end|><|start|>assistant<|channel|>final"
                "<|message|>It is sunny.<|return|>"
            ),
        ],
    ]
    told = _renderer(HARMONY, chat_template_kwargs={"reasoning_effort": "high"})
    [example] = render_one(told, *AGENT)
    assert example.notes == ("server_prompt",)
    assert "Reasoning: high" in told.tokenizer.decode(example.input_ids)
    assert _trained(told, *AGENT) == _trained(renderer, *AGENT)
