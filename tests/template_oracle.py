"""Judges what is trained under any chat template, without the code that finds it.

The oracle knows only what a server does: it renders the messages before a turn with
`apply_chat_template`, and stops at a stop token. Each text of a row begins and ends with words that
occur nowhere else, so a run of trained tokens tells which turn it is, and whether it is whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from chat_templates import Family, byte_tokenizer, renderer_of, runs

from lit_sft.data.tokenize import Renderer
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Example, Message

Turn = dict[str, Any]
"""A message as a server receives it."""

_SPECIAL = re.compile(
    r"<\|[^|<>\s'+]+\|>|<｜[^｜<>]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>"
    r"|\[/?[A-Z]{2,}[A-Z_]*\]|\[\|[a-z]+\|\]|<SPECIAL_\d+>|</?assistant>|</?s>|<eos>|<bos>|<sop>|<sep>"
    r"|\[gMASK\]|\[e~\[|\]~!?b\[?\]?"
)
"""Names of special tokens in the text of a template."""
_ENDS = (
    "<|return|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>",
    "<seed:eos>", "<｜hy_eos:opensource｜>", "[e~[", "[EOS]", "<|end_of_text|>", "<|role_end|>", "<|end|>",
)  # fmt: skip
"""Tokens that are eos of their model, if its template names them; the first one counts."""
_STOPS = {
    *_ENDS, "<|endoftext|>", "</s>", "<eos>", "<|call|>", "<|calls|>", "<|eom_id|>", "<|eom|>", "<end_of_turn>",
    "<turn|>", "<|tool_response>", "<|user|>", "<|observation|>", "<end_of_utterance>", "<end_of_sentence>",
    "<|end_of_msg|>", "<|message_sep|>", "<|tools_suffix|>", "<|assistant_end|>", "[|endofturn|]", "<SPECIAL_12>", "</assistant>",
    "<sep>",
}  # fmt: skip
"""Tokens at which servers stop for some model."""
_BETWEEN_PARTS = {"<|end|>", "<|eom|>"}
"""Tokens that end one part of a turn where turns have parts (Harmony's channels)."""
_OPEN_THINKING = re.compile(r"[<\[](?!\|END)[\w:|]*think[\w:|]*[>\]]\s*\Z", re.IGNORECASE)
_CLOSED_THINKING = re.compile(r"</[\w:]*think[\w:]*>|\[/THINK\]|<\|END_THINKING\|>")
_WORDS = re.compile(r"((?:begin|end|first|last|city|list|time)(\d))(?!\d)")
"""Words of a row that occur once, with the number of their message (see `row_shapes`)."""
_EMPTY_THINKING = re.compile(rf"\s*(?:{_CLOSED_THINKING.pattern})\s*")
_REASONS = {
    "open": "leaves turn",
    "thinking left open": "leaves the thinking block open",
    "thinking opened twice": "opens a thinking block again",
    "opens thinking": "opens a thinking block",
    "no call": "does not write; set data.chat_template to a template with tool calls",
    "template": "does not take the row",
    "prefix": "does not continue the prompt",
    "holds": "before its end, where a server would stop",
    "token": "does not keep",
    "marks": "marks of the chat template leave out",
}
"""Reason of a refusal -> words of its message."""


@dataclass(frozen=True)
class Row:
    """A conversation and how many of its turns are to be trained."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    untrained: frozenset[int] = frozenset()
    """Indices of assistant turns that are not trained."""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Row:
        """Reads a row of the format `messages`."""
        turns = [{k: v for k, v in turn.items() if k != "weight"} for turn in row["messages"]]
        for turn in turns:
            if "tool_calls" in turn:
                turn["tool_calls"] = [_parsed_call(call) for call in turn["tool_calls"]]
        weights = [turn.get("weight", 1) for turn in row["messages"]]
        untrained = frozenset(i for i, weight in enumerate(weights) if weight == 0)
        tools = row.get("tools")
        return cls(tuple(turns), None if tools is None else tuple(tools), untrained)

    def conversation(self, end: int | None = None) -> Conversation:
        """Returns the row, up to a message, as `lit_sft` reads it."""
        messages = []
        for i, turn in enumerate(self.turns[:end]):
            fields = {key: value for key, value in turn.items() if key != "tool_calls"}
            calls = turn.get("tool_calls")
            message = Message(**fields, tool_calls=None if calls is None else tuple(calls))
            messages.append(replace(message, train=False) if i in self.untrained else message)
        return Conversation(tuple(messages), self.tools)

    def wanted(self) -> list[int]:
        """Returns the indices of the turns that have to be trained."""
        answers = [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        return [i for i in answers if i not in self.untrained]


@dataclass
class Verdict:
    """What came of a row."""

    kind: str
    """`exact`, `server prompt`, `per turn`, `refused: REASON` or `wrong`."""
    faults: list[str] = field(default_factory=list)


def family_of(template: str) -> Family:
    """Finds the special tokens of a model in the text of its template."""
    # Hunyuan 3 puts the names of its tokens together.
    suffix = re.search(r"set HYTK = '([^']+)'", template)
    text = template.replace("{}", suffix.group(1)) if suffix else template
    special = dict.fromkeys(_SPECIAL.findall(text))
    eos = next((token for token in _ENDS if token in text), "</s>")
    if "end_of_turn" in template or "<turn|>" in template:
        eos = "<eos>"
    if "<|end|>" in special and "eos_token" in template:
        eos = "<|endoftext|>"
    bos = "<s>" if eos == "</s>" else "<bos>"
    thinking = [token for token in special if re.fullmatch(r"</?think>", token)]
    added = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    kept = tuple(token for token in special if token not in thinking)
    return Family(template, kept, eos=eos, bos=bos, added=added)


class Server:
    """What a server does with a template."""

    def __init__(self, template: str, family: Family | None = None) -> None:
        """Makes a tokenizer, by default with the special tokens that the template names."""
        self.template = template
        self.is_marked = re.search(r"\{%-?\s*generation\b", template) is not None
        self.family = family_of(template) if family is None else family
        self.tokenizer = byte_tokenizer(self.family)
        self.renderer: Renderer = renderer_of(self.tokenizer)

    @cached_property
    def takes_text(self) -> bool:
        """Whether arguments have to be JSON text: an object fails, or is printed by Python."""
        function = {"name": "probe", "arguments": {"key": "value"}}
        call = {"id": "call00001", "type": "function", "function": function}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        turns = [{"role": "user", "content": "."}, answer]
        try:
            text = self._text(turns, None, as_text=False)
        except Exception:  # noqa: BLE001 - a template may raise anything
            return True
        return "{'key'" in text

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a content has to be a list of parts, as templates with images may want it."""
        texts = []
        for content in ("vprobe", [{"type": "text", "text": "vprobe"}]):
            try:
                texts.append(self._render([{"role": "user", "content": content}], None))
            except Exception:  # noqa: BLE001 - a template may raise anything
                texts.append("")
        return "vprobe" not in texts[0] and "vprobe" in texts[1]

    def text(self, turns: Any, tools: Any, **variables: Any) -> str:
        """Renders messages."""
        return self._text(turns, tools, self.takes_text, **variables)

    def ids(self, text: str) -> list[int]:
        """Tokenizes a rendered text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, turns: Any, tools: Any, as_text: bool, **variables: Any) -> str:
        served = [_served(turn, as_text) for turn in turns]
        if self.takes_parts:
            for turn in served:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        return self._render(served, tools, **variables)

    def _render(self, served: Any, tools: Any, **variables: Any) -> str:
        tools = None if tools is None else list(tools)
        return str(
            self.tokenizer.apply_chat_template(served, tools=tools, tokenize=False, **variables)
        )


def _served(turn: Turn, as_text: bool) -> Turn:
    served = dict(turn)
    if "reasoning_content" in turn:
        served["thinking"] = turn["reasoning_content"]
    if as_text and "tool_calls" in turn:
        served["tool_calls"] = [_text_call(call) for call in turn["tool_calls"]]
    return served


def _text_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    """Reads the arguments of a call as servers do, which may be JSON text."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def judge(server: Server, row: Row) -> Verdict:
    """Renders a row with `lit_sft`, and judges what comes of it."""
    [result] = server.renderer.render([row.conversation()], [0])
    if isinstance(result, UserError):
        return _judge_refusal(server, row, str(result))
    return judge_examples(server, row, result)


def judge_examples(server: Server, row: Row, examples: Sequence[Example]) -> Verdict:
    """Judges every run of trained tokens in the examples of a row."""
    faults = []
    trained: list[int] = []
    for example in examples:
        for begin, end in turn_runs(server, example):
            text = server.tokenizer.decode(example.input_ids[begin:end])
            number, fault = turn_of(row, text)
            faults += fault
            if number is not None:
                trained.append(number)
                faults += _judge_run(server, row, example, begin, end, number)
    if sorted(trained) != row.wanted():
        faults.append(f"trained turns {sorted(trained)}, wanted {row.wanted()}")
    faults += _judge_prompt(server, row)
    if faults:
        return Verdict("wrong", faults)
    if any("server_prompt" in example.notes for example in examples):
        return Verdict("server prompt")
    if len(examples) > 1:
        return Verdict("per turn")
    return Verdict("exact")


def turn_runs(server: Server, example: Example) -> list[tuple[int, int]]:
    """Joins the marked parts of one turn: a turn ends only with its stop token."""
    if not server.is_marked:
        return runs(example)
    joined: list[tuple[int, int]] = []
    is_open = False
    for begin, end in runs(example):
        if is_open:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
        is_open = example.input_ids[end - 1] not in example.stop_ids
    return joined


def turn_of(row: Row, text: str) -> tuple[int | None, list[str]]:
    """Finds the turn that a trained text belongs to, by its words."""
    found = sorted({int(number) for _, number in _WORDS.findall(text)})
    own = [i for i in found if row.turns[i]["role"] == "assistant"]
    if len(found) == 1 and len(own) == 1:
        return own[0], []
    return (own[0] if own else None), [f"words of messages {found} are trained as one: {text!r}"]


def _judge_run(
    server: Server, row: Row, example: Example, begin: int, end: int, number: int
) -> list[str]:
    """Judges one run of trained tokens, that of the turn `number`."""
    ids = example.input_ids
    text = server.tokenizer.decode(ids[begin:end])
    fed, wholes = _texts_of_server(server, row, example, number)
    faults = _judge_content(server, row, example.notes, number, text)
    faults += _judge_stop(server, ids[begin:end], text)
    own = _without_block(server, row, example.notes, number, text)
    if not server.is_marked and not any(own in whole for whole in wholes):
        faults.append(f"the template never writes {own!r}")
    before = server.tokenizer.decode(ids[:begin])[-160:]
    asked = server.renderer.prompt(row.conversation(number + 1))
    if not _fits(server, asked, ids[:begin]):
        faults.append(f"predict does not ask {before!r} for {text!r}")
    fitting = [prompt for prompt in fed if _fits(server, server.ids(prompt), ids[:begin])]
    if not fitting:
        return [*faults, f"no server feeds {before!r} before {text!r}"]
    faults += _judge_doubling(fitting[0], text)
    if _leaves_open(fitting[0], fitting[0] + text):
        faults.append(f"the thinking block of the prompt is never closed: {text!r}")
    return faults


def _texts_of_server(
    server: Server, row: Row, example: Example, number: int
) -> tuple[list[str], list[str]]:
    """Renders the prompts that a server may feed for a turn, and the texts up to this turn."""
    fed = []
    wholes = []
    for turns in histories(row):
        for switch in _switches(example.notes):
            prompt = server.text(turns[:number], row.tools, add_generation_prompt=True, **switch)
            whole = server.text(turns[: number + 1], row.tools, **switch)
            fed += [prompt, *_closed(prompt, whole, turns[number], example.notes)]
            wholes += [whole, *_continued(server, row, turns, number, whole, switch)]
    return fed, wholes


def _closed(prompt: str, whole: str, turn: Turn, notes: tuple[str, ...]) -> list[str]:
    """Closes the block that a prompt opens, if the template writes an empty one for the answer."""
    block = _EMPTY_THINKING.match(whole[len(prompt) :])
    if "empty_thinking" not in notes or not whole.startswith(prompt) or block is None:
        return []
    if not _OPEN_THINKING.search(prompt) or "reasoning_content" in turn:
        return []
    start = whole.find(turn["content"], len(prompt)) if turn["content"] else len(whole)
    return [whole[: min(len(prompt) + block.end(), start)]]


def _without_block(server: Server, row: Row, notes: tuple[str, ...], number: int, text: str) -> str:
    """Cuts off the reasoning that the template does not write, which has to be all of it."""
    turn = histories(row)[1][number]
    if "written:reasoning" not in notes or "reasoning_content" not in turn:
        return text
    if _could_reason(server, row, number):
        return f"not {text}, but what the template writes"
    thought, closing, answer = re.split(f"({_CLOSED_THINKING.pattern})", text, maxsplit=1)
    if thought.strip() != turn["reasoning_content"].strip():
        return f"{thought}, which is not the reasoning"
    return answer.lstrip() if closing else text


def _continued(
    server: Server, row: Row, turns: list[Turn], number: int, whole: str, switch: dict[str, bool]
) -> list[str]:
    """Adds the token of the next message to a text whose template does not end the turn.

    A server goes on with a result after a call, and with the user after an answer.
    """
    if _has_special_end(server, whole):
        return []
    calls = turns[number].get("tool_calls", [])
    following: list[Turn] = [{"role": "user", "content": "nextmessage"}]
    if calls:
        following = [
            {"role": "tool", "content": "nextmessage", "name": call["function"]["name"],
             "tool_call_id": call["id"]}
            for call in calls
        ]  # fmt: skip
    history = server.text([*turns[: number + 1], *following], row.tools, **switch)
    ending = whole.rstrip()[-12:]
    behind = history.partition("nextmessage")[0].rpartition(ending)[2]
    special = sorted({*server.tokenizer.all_special_tokens, *server.family.special}, key=len)
    for token in reversed(special):
        if behind.lstrip().startswith(token):
            gap = behind[: len(behind) - len(behind.lstrip())]
            return [whole.rstrip() + gap + token]
    return []


def _fits(server: Server, prompt: list[int], before: list[int]) -> bool:
    """Whether the ids before a run are the prompt; marks may leave out what begins an answer."""
    if not server.is_marked:
        return prompt == before
    rest = server.tokenizer.decode(before[len(prompt) :])
    return before[: len(prompt)] == prompt and not _WORDS.search(rest)


def _judge_doubling(prompt: str, text: str) -> list[str]:
    """A run must not repeat the end of its prompt: its header, or an opening tag."""
    for length in range(5, 60):
        if text[:length].strip() and prompt.endswith(text[:length]):
            return [f"{text[:length]!r} ends the prompt, and is trained again"]
    return []


def _judge_content(
    server: Server, row: Row, notes: tuple[str, ...], number: int, text: str
) -> list[str]:
    """All that the turn says has to be in its run, unless the template cannot write it."""
    # What a template does not write is no answer to learn from, unless a call stands there.
    turn = histories(row)[1][number]
    faults = []
    missing = _words(turn["content"], text)
    if missing and not ("left_out:content" in notes and turn.get("tool_calls")):
        faults.append(f"{missing} of the content is missing: {text!r}")
    missing = _words(turn.get("reasoning_content", ""), text)
    if missing and "left_out:reasoning_content" not in notes:
        faults.append(f"{missing} of the reasoning is missing: {text!r}")
    if missing and _could_reason(server, row, number):
        faults.append(f"the template could write the reasoning: {text!r}")
    for call in turn.get("tool_calls", []):
        function = call["function"]
        missing = _words(json.dumps(function["arguments"]), text)
        if missing or function["name"] not in text:
            faults.append(f"{missing} of the call of {function['name']} is missing: {text!r}")
    return faults


def _words(source: str, text: str) -> list[str]:
    """Returns the words of a text that another one lacks."""
    return [word for word, _ in _WORDS.findall(source) if word not in text]


def _could_reason(server: Server, row: Row, number: int) -> bool:
    """Whether the template writes the reasoning behind a prompt, with some switch."""
    for turns in histories(row):
        reasoning = histories(row)[1][number]["reasoning_content"]
        for switch in _ALL_SWITCHES:
            prompt = server.text(turns[:number], row.tools, add_generation_prompt=True, **switch)
            whole = server.text(turns[: number + 1], row.tools, **switch)
            answer = whole[len(prompt) :]
            twice = _OPEN_THINKING.search(prompt) and answer.lstrip().startswith("<think>")
            if whole.startswith(prompt) and not twice and not _words(reasoning, answer):
                return True
    return False


def _judge_stop(server: Server, ids: list[int], text: str) -> list[str]:
    """A run ends where a server stops, and nowhere before."""
    tokens = server.tokenizer.convert_ids_to_tokens(ids)
    special = set(server.tokenizer.all_special_tokens) | set(server.family.special)
    stop = tokens[-1]
    faults = []
    if stop not in special or stop not in _STOPS | {server.family.eos}:
        faults.append(f"{stop!r} is no stop token: {text!r}")
    inside = set(tokens[:-1]) & (_STOPS | {server.family.eos}) & special
    if inside - (_BETWEEN_PARTS - {stop}):
        faults.append(f"{sorted(inside)} stand inside: {text!r}")
    return faults


def _judge_prompt(server: Server, row: Row) -> list[str]:
    """If the last turn is open, its prompt is what a server feeds."""
    if row.turns[-1]["role"] == "assistant":
        return []
    ids = server.renderer.prompt(row.conversation())
    fed = [
        server.ids(server.text(turns, row.tools, add_generation_prompt=True))
        for turns in histories(row)
    ]
    if ids in fed:
        return []
    return [f"no server feeds the prompt {server.tokenizer.decode(ids)!r}"]


_ALL_SWITCHES: list[dict[str, bool]] = [
    {}, {"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}, {"thinking": True},
]  # fmt: skip


def _switches(notes: tuple[str, ...]) -> list[dict[str, bool]]:
    """Reads the template variables in the notes of an example; a turn may be without any."""
    switches: list[dict[str, bool]] = [{}]
    for note in notes:
        if note.startswith("switch:"):
            name, value = note.removeprefix("switch:").split("=")
            switches.append({name: value == "true"})
    return switches


def histories(row: Row) -> list[list[Turn]]:
    """Returns the messages as they are, and with reasoning apart, as servers give it back."""
    turns = []
    for turn in row.turns:
        thought = re.match(r"<think>(.*?)</think>(.*)", turn["content"], re.DOTALL)
        if turn["role"] == "assistant" and thought:
            reasoning, content = thought.groups()
            turn = {**turn, "content": content.strip(), "reasoning_content": reasoning.strip()}
        turns.append(turn)
    return [list(row.turns), turns]


def _judge_refusal(server: Server, row: Row, message: str) -> Verdict:
    """Checks that the reason of a refusal is true."""
    found = [name for name, words in _REASONS.items() if words in message]
    name = found[0] if found else "other"
    number = re.search(r"turn (\d+) \(assistant\)", message)
    index = int(number.group(1)) - 1 if number else None
    if name == "other" or not _is_true(server, row, name, index):
        return Verdict("wrong", [f"refused, but the reason is not true: {message}"])
    return Verdict(f"refused: {name}", [message])


def _is_true(server: Server, row: Row, name: str, index: int | None) -> bool:
    """Whether the reason holds for the row as it is, or with reasoning apart."""
    if name == "template":
        return any(_is_refused(server, row, end) for end in range(1, len(row.turns) + 1))
    return index is not None and any(
        _is_true_of(server, row, turns, name, index) for turns in histories(row)
    )


def _is_true_of(server: Server, row: Row, turns: list[Turn], name: str, index: int) -> bool:
    """Whether the reason holds for one form of the row."""
    turn = turns[index]
    has_reasoning = "think>" in turn["content"] or "reasoning_content" in turn
    texts = []
    for switch in _ALL_SWITCHES:
        # A model that is told to think must not learn to answer at once.
        if has_reasoning or True not in switch.values():
            prompt = server.text(turns[:index], row.tools, add_generation_prompt=True, **switch)
            texts.append((prompt, server.text(turns[: index + 1], row.tools, **switch)))
    fitting = [prompt for prompt, whole in texts if whole.startswith(prompt)]
    holds = {
        "open": not any(_has_special_end(server, whole) for _, whole in texts)
        and not any(_continued(server, row, turns, index, whole, {}) for _, whole in texts),
        "opens thinking": not has_reasoning
        and any(_OPEN_THINKING.search(prompt) for prompt, _ in texts)
        and all(_OPEN_THINKING.search(prompt) for prompt in fitting),
        "thinking left open": all(_leaves_open(p, whole) for p, whole in texts if p in fitting),
        "thinking opened twice": all(whole[len(p) :].startswith("<think>") for p, whole in texts),
        "no call": all(_lacks_call(prompt, whole, turn) for prompt, whole in texts),
        "prefix": not fitting,
        "holds": any(stop in turn["content"] for stop in _STOPS | {server.family.eos})
        or any(_has_several_stops(server, whole[len(p) :]) for p, whole in texts if p in fitting),
    }
    return holds.get(name, False)


def _is_refused(server: Server, row: Row, end: int) -> bool:
    """Whether the template refuses the messages up to one of them."""
    for generation_prompt in (False, True):
        try:
            server.text(row.turns[:end], row.tools, add_generation_prompt=generation_prompt)
        except Exception:  # noqa: BLE001 - a template may raise anything
            return True
    return False


def _has_special_end(server: Server, whole: str) -> bool:
    """Whether a text ends with a special token of the tokenizer."""
    special = set(server.tokenizer.all_special_tokens) | set(server.family.special)
    return any(whole.rstrip().endswith(token) for token in special)


def _has_several_stops(server: Server, answer: str) -> bool:
    """Whether a template ends several parts of a turn in the same way."""
    found = re.findall("|".join(map(re.escape, {*_STOPS, server.family.eos})), answer)
    return len(found) > len(set(found))


def _leaves_open(prompt: str, whole: str) -> bool:
    """Whether an answer never closes the thinking block that its prompt opens."""
    is_open = _OPEN_THINKING.search(prompt) is not None
    return is_open and not _CLOSED_THINKING.search(whole[len(prompt) :])


def _lacks_call(prompt: str, whole: str, turn: Turn) -> bool:
    """Whether a text names some call of a turn no more often than its prompt."""
    names = [call["function"]["name"] for call in turn.get("tool_calls", [])]
    return any(whole.count(name) <= prompt.count(name) for name in names)
