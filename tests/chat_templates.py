"""Chat templates of the model families in use, written anew from their behaviour, and tokenizers to
go with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from lit_sft.data.chat_template import ChatTemplate, resolve_chat_template
from lit_sft.data.tokenize import Renderer
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

_CORPUS = (
    (
        "system user assistant model You are a helpful assistant. Hello Hello Hi Hi there there."
        " Yes. No. Paris is it."
    ),
    (
        "User: What is 1+1?\n\nAssistant: It is 2.\n\n\n\nThe answer: The answer: Answer: Question:"
        " Answer: Hello Hello"
    ),
    (
        "[INST] [/INST] <<SYS>> <</SYS>> <think>\n\n</think>\n\n <think>\nhm hm\n</think>\n\n"
        " get_weather get_weather city"
    ),
    "你好 你好，世界。问题：回答：北京 北京",
    "user\nHi\nHi\nHi\nassistant\nHello\nHello\nHello\nassistant\nYes\nYes\nYes\nuser\nassistant\n",
)


@dataclass(frozen=True)
class Family:
    """A template and what its tokenizer is like."""

    template: str | None
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    """Added tokens that are not special."""
    rstrip: bool = False
    """Whether special tokens swallow the white space behind them."""


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of a family: any text in, the same text out."""
    family = FAMILIES[name]
    return byte_tokenizer(family)


def byte_tokenizer(
    family: Family, *, adds_bos: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges over `\\n\\n` and over a space and a word, as large vocabularies
    have.

    Args:
        family: Its special tokens and template.
        adds_bos: Whether the tokenizer puts bos before a text by itself.
        options: Of `PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return _wrap(backend, family, adds_bos, **options)


def metaspace_tokenizer(
    family: Family, *, adds_bos: bool = False, scheme: str = "first"
) -> PreTrainedTokenizerFast:
    """Like SentencePiece: a space is `▁`, and one is put before the text (`first`) or before each
    piece (`always`).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *byte_tokens], show_progress=False
    )
    words = [
        " " + word for text in _CORPUS for word in text.split()
    ]  # no merge goes over a space or a newline
    backend.train_from_iterator(words, trainer)
    return _wrap(backend, family, adds_bos)


def _wrap(backend: Any, family: Family, adds_bos: bool, **options: Any) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys([family.eos, *([family.bos] if family.bos else []), *family.special])
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=family.rstrip) for t in special]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    if adds_bos:
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.eos,
        bos_token=family.bos,
        pad_token=family.eos,
        **options,
    )
    tokenizer.chat_template = family.template
    return tokenizer


def character_tokenizer(family: Family) -> PreTrainedTokenizer:
    """A tokenizer in Python, one token per character: it does not tell where in the text a token
    lies.
    """
    from transformers import AddedToken, PreTrainedTokenizer

    class CharacterTokenizer(PreTrainedTokenizer):
        model_input_names = ["input_ids", "attention_mask"]

        @property
        def vocab_size(self) -> int:
            return 0x10000

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(0x3000)} | self.added_tokens_encoder

        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token)

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    special = [AddedToken(token, special=True, normalized=False) for token in family.special]
    tokenizer = CharacterTokenizer(
        eos_token=family.eos, bos_token=family.bos, extra_special_tokens=special
    )
    tokenizer.chat_template = family.template
    return tokenizer


CHATML = r"""{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

QWEN25 = r"""{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'assistant' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

_QWEN3_BODY = r"""{%- if tools %}
{{- '<|im_start|>system\nTools:' }}
{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content %}
{%- set thought = message.reasoning_content or '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last_query and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}
{{- content }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- if not loop.first or content %}{{- '\n' }}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
"""

QWEN3 = (
    _QWEN3_BODY
    + r"""{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
)
"""Drops the thoughts of earlier turns; the last turn has a thinking block even when nothing was
thought.
"""

QWEN3_THINKING = (
    _QWEN3_BODY
    + r"""{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"""
)
"""The prompt opens the thinking block, and nothing switches it off."""

QWEN35 = (
    _QWEN3_BODY
    + r"""{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n<think>\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
)
"""The prompt opens the thinking block by default."""

LLAMA2 = r"""{%- if messages[0].role == 'system' %}
{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set content = system + message.content if loop.first else message.content %}
{%- if message.role == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

LLAMA3 = r"""{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}{{- message.content | trim }}{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

MISTRAL = r"""{{- bos_token }}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{- message.content + eos_token }}{%- endif %}
{%- endfor %}"""

MISTRAL_TOOLS = r"""{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
{%- endfor %}
{{- eos_token }}
{%- else %}{{- message.content + eos_token }}{%- endif %}
{%- endfor %}"""

GEMMA = r"""{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""

PHI3 = r"""{%- for message in messages %}
{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
"""Without a generation prompt it writes eos behind the whole text."""

DEEPSEEK_R1 = r"""{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{- message.content }}
{%- elif message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- else %}{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"""
"""Opens a thinking block, but never writes one."""

DEEPSEEK_V3 = r"""{{- bos_token }}
{%- set ns = namespace(after_tool=false) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}{%- set ns.after_tool = false %}
{%- elif message.role == 'tool' %}
{{- '<｜tool▁outputs▁begin｜>' + message.content + '<｜tool▁outputs▁end｜>' }}{%- set ns.after_tool = true %}
{%- else %}
{%- if not ns.after_tool %}{{- '<｜Assistant｜>' }}{%- endif %}
{%- if message.tool_calls %}
{{- message.content + '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments | tojson }}
{{- '<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' }}
{%- else %}{{- message.content }}{%- endif %}
{{- '<｜end▁of▁sentence｜>' }}{%- set ns.after_tool = false %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.after_tool %}{{- '<｜Assistant｜>' }}{%- endif %}"""
"""A turn with tool calls ends with three special tokens, the last of them eos."""

DEEPSEEK_V31 = r"""{%- if not thinking is defined %}{%- set thinking = false %}{%- endif %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<｜Assistant｜></think>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}"""
"""Writes no thoughts, but opens a thinking block when it is told to."""

GLM4 = r"""{{- '[gMASK]<sop>' }}
{%- for message in messages %}{{- '<|' + message.role + '|>\n' + message.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""
"""Turns have a beginning, but no end."""

GPT_OSS = r"""{{- '<|start|>system<|message|>You are a helpful assistant.<|end|>' }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if message.tool_calls %}
{%- if message.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- elif loop.last and not add_generation_prompt %}
{%- if message.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- elif message.role == 'tool' %}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + message.content + '<|end|>' }}
{%- else %}
{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
"""The last turn ends with `<|return|>`, earlier ones with `<|end|>` and without their analysis."""

ZEPHYR = r"""{% for message in messages %}
{{ '<|' + message.role + '|>\n' + message.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}"""
"""Its role marks are plain text, and newlines come from the template's own lines."""

COHERE = r"""{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' + message.content }}
{{- '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}
{%- else %}
{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + message.content + '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"""
"""A turn ends with two special tokens."""

MARKED = r"""{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
{%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_QWEN_ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_DEEPSEEK = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
)  # fmt: skip
_DEEPSEEK_EOS = "<｜end▁of▁sentence｜>"
_DEEPSEEK_BOS = "<｜begin▁of▁sentence｜>"


def _qwen(template: str) -> Family:
    return Family(template, ("<|endoftext|>", *_CHATML_TOKENS), eos="<|im_end|>", added=_QWEN_ADDED)


def _deepseek(template: str) -> Family:
    return Family(
        template, _DEEPSEEK, eos=_DEEPSEEK_EOS, bos=_DEEPSEEK_BOS, added=("<think>", "</think>")
    )


FAMILIES = {
    "chatml": Family(CHATML, _CHATML_TOKENS, eos="<|endoftext|>"),
    "qwen2.5": Family(QWEN25, ("<|endoftext|>", *_CHATML_TOKENS), eos="<|im_end|>"),
    "qwen3": _qwen(QWEN3),
    "qwen3-thinking": _qwen(QWEN3_THINKING),
    "qwen3.5": _qwen(QWEN35),
    "llama-2": Family(LLAMA2, ("<unk>",), eos="</s>", bos="<s>"),
    "llama-3": Family(
        LLAMA3,
        (
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|end_of_text|>",
            *(f"<|reserved_{i}|>" for i in range(50)),
        ),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(MISTRAL, ("<unk>",), eos="</s>", bos="<s>"),
    "mistral-tools": Family(
        MISTRAL_TOOLS,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        eos="</s>",
        bos="<s>",
    ),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), eos="<eos>", bos="<bos>"),
    "phi-3": Family(
        PHI3,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        bos="<s>",
        rstrip=True,
    ),
    "deepseek-r1": _deepseek(DEEPSEEK_R1),
    "deepseek-v3": _deepseek(DEEPSEEK_V3),
    "deepseek-v3.1": _deepseek(DEEPSEEK_V31),
    "glm-4": Family(
        GLM4,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"),
        eos="<|endoftext|>",
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"),
        eos="<|return|>",
    ),
    "zephyr": Family(ZEPHYR, ("<unk>",), eos="</s>", bos="<s>"),
    "cohere": Family(
        COHERE,
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    "marked": Family(MARKED, _CHATML_TOKENS, eos="<|endoftext|>"),
    "plain": Family(None, (), eos="</s>", bos="<s>"),
}


def renderer_of(
    tokenizer: Any,
    chat_template: str | None = None,
    *,
    chat_template_kwargs: dict[str, Any] | None = None,
    train_on: Any = "completions",
    unproved: Any = "error",
) -> Renderer:
    """A renderer as a run builds it from its settings."""
    text = resolve_chat_template(tokenizer, chat_template)
    return Renderer(
        tokenizer, ChatTemplate(tokenizer, text, chat_template_kwargs or {}, unproved), train_on
    )


def render_one(renderer: Renderer, *messages: Message, tools: Any = None) -> list[Example]:
    """The examples of one conversation; raises what is wrong with it."""
    [result] = renderer.render([Conversation(messages, tools)], [0])
    if isinstance(result, UserError):
        raise result
    return result


def runs(example: Example) -> list[tuple[int, int]]:
    """(begin, end) of each run of trained tokens."""
    edges = [0, *example.loss_mask, 0]
    begins = [i for i in range(len(edges) - 1) if edges[i] < edges[i + 1]]
    ends = [i for i in range(len(edges) - 1) if edges[i] > edges[i + 1]]
    return list(zip(begins, ends, strict=True))


def trained_texts(tokenizer: Any, example: Example) -> list[str]:
    """The text of each run of trained tokens."""
    return [tokenizer.decode(example.input_ids[begin:end]) for begin, end in runs(example)]


def user(content: str) -> Message:
    """A user's turn."""
    return Message("user", content)


def system(content: str) -> Message:
    """A system turn."""
    return Message("system", content)


def assistant(content: str, **options: Any) -> Message:
    """An assistant's turn."""
    return Message("assistant", content, **options)


def call(name: str, **arguments: Any) -> tuple[dict[str, Any], ...]:
    """One tool call."""
    return (
        {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}},
    )


def tool(content: str, name: str = "get_weather") -> Message:
    """What a tool answered."""
    return Message("tool", content, name=name, tool_call_id="call00001")
