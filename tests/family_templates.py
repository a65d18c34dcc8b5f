"""Chat templates of model families with thoughts and tools, written anew from their behaviour.

They differ in what they do with the thoughts of earlier turns, in how a prompt begins an answer,
and in what ends a turn.
"""

from __future__ import annotations

_LAST_USER = r"""{%- set ns = namespace(user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.user = loop.index0 %}{%- endif %}{%- endfor %}"""
_THOUGHTS = r"""{%- set content = m.content %}{%- set thought = m.reasoning_content or '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}"""
"""Takes thoughts out of the content."""
_JSON_CALLS = r"""{%- for c in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}"""
_TOOLS = r"""{%- for tool in tools or [] %}{{- '\n' + tool | tojson }}{%- endfor %}"""

_GLM_TOKENS = "{#- <|system|> <|user|> <|assistant|> <|observation|> #}"
"""The oracle reads special tokens out of the text of a template."""

GLM45 = (
    _GLM_TOKENS + "{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\\nTools:' }}" + _TOOLS + "{%- endif %}"
    + _LAST_USER
    + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    + _THOUGHTS
    + r"""{{- '<|assistant|>\n<think>' + (thought.strip() if loop.index0 > ns.user else '') + '</think>' }}
{%- if content.strip() %}{{- '\n' + content.strip() }}{%- endif %}
{%- for c in m.tool_calls or [] %}{{- '\n<tool_call>' + c.function.name }}
{%- for name, value in c.function.arguments.items() %}
{{- '\n<arg_key>' + name + '</arg_key>\n<arg_value>' + (value if value is string else value | tojson(ensure_ascii=false)) + '</arg_value>' }}
{%- endfor %}{{- '\n</tool_call>' }}{%- endfor %}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' + ('\n<think></think>' if enable_thinking is defined and not enable_thinking else '') }}
{%- endif %}"""
)  # fmt: skip
"""A turn is ended by the token of the next role."""

GLM47 = (
    _GLM_TOKENS + "{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\\nTools:' }}" + _TOOLS + "{%- endif %}"
    + _LAST_USER
    + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    + _THOUGHTS
    + r"""{%- set kept = loop.index0 > ns.user or (clear_thinking is defined and not clear_thinking) %}
{{- '<|assistant|>' + ('<think>' + thought.strip() if thought and kept else '') + '</think>' + content.strip() }}
{%- for c in m.tool_calls or [] %}
{{- '<tool_call>' + c.function.name + c.function.arguments | tojson(ensure_ascii=false) + '</tool_call>' }}
{%- endfor %}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
{{- '<tool_response>' + m.content + '</tool_response>' }}
{%- else %}{{- '<|' + m.role + '|>' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' + ('</think>' if enable_thinking is defined and not enable_thinking else '<think>') }}
{%- endif %}"""
)  # fmt: skip
"""Like GLM45; its prompt opens the thinking block, and `clear_thinking: false` keeps all thoughts."""

OLMO3 = r"""{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- if m.role == 'assistant' and loop.last %}{{- '<|endoftext|>' }}{%- else %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
"""Only the end of the conversation is eos."""

APERTUS = r"""{%- set ns = namespace(open=false) %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '' if ns.open else '<|assistant_start|>' }}{%- set ns.open = true %}{{- m.content }}
{%- if m.tool_calls %}{{- '<|tools_prefix|>' }}
{%- for c in m.tool_calls %}{{- c.function.name + ' ' + c.function.arguments | tojson(ensure_ascii=false) }}{%- endfor %}
{{- '<|tools_suffix|>' }}{%- endif %}
{%- elif m.role == 'tool' %}{{- '[' + m.content + ']' }}
{%- else %}
{{- '<|assistant_end|>' if ns.open }}{%- set ns.open = false %}
{{- '<|' + m.role + '_start|>' + m.content + '<|' + m.role + '_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant_start|>' }}{%- endif %}"""
"""The end of a turn is written once another speaks; behind a result, history has no header."""

R1_TOOLS = r"""{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.role == 'system' %}{{- m.content }}
{%- else %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1].lstrip() }}
{%- if m.tool_calls %}{{- '<｜tool▁calls▁begin｜>' }}
{%- for c in m.tool_calls %}{{- '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments | tojson(ensure_ascii=false) + '<｜tool▁call▁end｜>' }}{%- endfor %}
{{- '<｜tool▁calls▁end｜>' }}{%- endif %}{{- '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"""
"""Opens a thinking block, and never writes thoughts, not even beside calls."""

DEEPSEEK_V32 = (
    "{%- if thinking is not defined %}{%- set thinking = false %}{%- endif %}{{- bos_token }}"
    + _LAST_USER
    + r"""{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<｜Assistant｜>' }}
{%- if loop.index0 > ns.user and thinking %}{{- '<think>' + (m.reasoning_content or '') + '</think>' }}
{%- else %}{{- '</think>' }}{%- endif %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}{{- '<｜DSML｜invoke>' + c.function.name + ' ' + c.function.arguments | tojson(ensure_ascii=false) }}{%- endfor %}
{{- '<｜end▁of▁sentence｜>' }}
{%- elif m.role == 'tool' %}{{- '<｜DSML｜result>' + m.content }}
{%- else %}{{- '<｜User｜>' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}"""
)
"""`thinking` writes the thoughts of all turns since the last question."""

QWEN36 = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools:' }}" + _TOOLS + "{{- '<|im_end|>\\n' }}{%- endif %}"
    + _LAST_USER
    + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    + _THOUGHTS
    + r"""{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.user or (preserve_thinking is defined and preserve_thinking) %}
{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- content }}"""
    + _JSON_CALLS
    + r"""{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '\n</think>\n\n' }}{%- endif %}{%- endif %}"""
)  # fmt: skip
"""Drops earlier thoughts, unless `preserve_thinking` is set."""

STEP = QWEN36.replace(
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '\\n</think>\\n\\n' }}{%- endif %}", ""
).replace(" or (preserve_thinking is defined and preserve_thinking)", "")  # fmt: skip
"""Like QWEN36, without any switch: an answer without thoughts has an empty block."""

NEMOTRON3 = QWEN36.replace(
    "(preserve_thinking is defined and preserve_thinking)",
    "(truncate_history_thinking is defined and not truncate_history_thinking)",
)
"""`truncate_history_thinking: false` keeps earlier thoughts."""

KIMI_K2 = r"""{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_assistant|>assistant<|im_middle|><think>' + (m.reasoning_content or '') + '</think>' + m.content }}
{%- for c in m.tool_calls or [] %}
{{- '<|tool_call_begin|>' + c.function.name + '<|tool_call_argument_begin|>' + c.function.arguments | tojson(ensure_ascii=false) + '<|tool_call_end|>' }}
{%- endfor %}{{- '<|im_end|>' }}
{%- else %}{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}"""
"""Keeps all thoughts."""

MINIMAX_M2 = (
    "{{- ']~!b[]~b]system\\nBe kind.' }}" + _TOOLS + "{{- '[e~[\\n' }}" + _LAST_USER
    + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    + _THOUGHTS
    + r"""{{- ']~b]ai\n' }}
{%- if thought and loop.index0 > ns.user %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- content }}"""
    + _JSON_CALLS
    + r"""{{- '[e~[\n' }}
{%- elif m.role == 'tool' %}{{- ']~b]tool\n<response>' + m.content + '</response>[e~[\n' }}
{%- else %}{{- ']~b]' + m.role + '\n' + m.content + '[e~[\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ']~b]ai\n<think>\n' }}{%- endif %}"""
)  # fmt: skip
"""Its prompt opens a thinking block, and an answer without thoughts has none."""

HUNYUAN3 = (
    "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'no_think' %}{%- endif %}"
    "{{- bos_token + '<|reasoning_mode|>' + reasoning_effort }}"
    + _LAST_USER
    + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    + _THOUGHTS
    + r"""{{- '<|hy_Assistant|><think>' + (thought if loop.index0 > ns.user else '') + '</think>' + content }}
{%- if m.tool_calls %}{{- '<tool_calls>' }}
{%- for c in m.tool_calls %}{{- c.function.name + c.function.arguments | tojson(ensure_ascii=false) }}{%- endfor %}
{{- '</tool_calls><｜hy_eos:opensource｜>' }}
{%- elif not loop.last %}{{- '<｜hy_eos:opensource｜>' }}{%- endif %}
{%- elif m.role == 'tool' %}{{- '<tool_response>' + m.content + '</tool_response>' }}
{%- else %}{{- '<|hy_User|>' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|hy_Assistant|><think>' + ('</think>' if reasoning_effort == 'no_think' else '') }}
{%- endif %}"""
)
"""`reasoning_effort` opens or closes the thinking block; the last answer has no end."""

SEED_OSS = (
    _LAST_USER
    + r"""{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<seed:bos>assistant\n' }}
{%- if m.reasoning_content %}{{- '<seed:think>' + m.reasoning_content + '</seed:think>' }}{%- endif %}{{- m.content }}
{%- for c in m.tool_calls or [] %}{{- '<seed:tool_call>' + c.function.name + c.function.arguments | tojson(ensure_ascii=false) + '</seed:tool_call>' }}{%- endfor %}
{{- '<seed:eos>' }}
{%- else %}{{- '<seed:bos>' + m.role + '\n' + m.content + '<seed:eos>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<seed:bos>assistant\n' }}{%- endif %}"""
)

GEMMA4 = r"""{{- bos_token }}
{%- for m in messages %}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{%- if m.role == 'assistant' and m.reasoning_content and m.tool_calls %}{{- '<|channel>thought\n' + m.reasoning_content + '<channel|>' }}{%- endif %}
{{- m.content | trim }}
{%- for c in m.tool_calls or [] %}{{- '<|tool_call>call:' + c.function.name + c.function.arguments | tojson(ensure_ascii=false) + '<tool_call|>' }}{%- endfor %}
{{- '<turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\n' }}
{%- if enable_thinking is not defined or not enable_thinking %}{{- '<|channel>thought\n<channel|>' }}{%- endif %}{%- endif %}"""
"""By default, the prompt has an empty thinking block that history lacks."""

MAGISTRAL = r"""{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- ('[THINK]' + m.reasoning_content + '[/THINK]' if m.reasoning_content else '') + m.content }}
{%- for c in m.tool_calls or [] %}{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson(ensure_ascii=false) }}{%- endfor %}
{{- '</s>' }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}
{%- endfor %}"""

LLAMA4 = r"""{{- bos_token }}
{%- for m in messages %}
{{- '<|header_start|>' + m.role + '<|header_end|>\n\n' + m.content | trim }}
{%- for c in m.tool_calls or [] %}{{- '{"name": "' + c.function.name + '", "parameters": ' + c.function.arguments | tojson(ensure_ascii=false) + '}' }}{%- endfor %}
{{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}"""

HARMONY = r"""{%- set ns = namespace(final=-1) %}
{%- for m in messages %}{%- if m.role == 'assistant' and not m.tool_calls %}{%- set ns.final = loop.index0 %}{%- endif %}{%- endfor %}
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- if m.thinking and loop.index0 > ns.final %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{%- set c = m.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + c.name + '<|channel|>commentary json<|message|>' + c.arguments | tojson(ensure_ascii=false) + '<|call|>' }}
{%- elif m.role == 'assistant' %}
{%- if m.thinking and loop.last and not add_generation_prompt %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}
{%- elif m.role == 'tool' %}{{- '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
"""Thoughts of calls are dropped once an answer is there. It writes one call of a turn."""

FAMILY_TEMPLATES = {
    "GLM 4.5": GLM45,
    "GLM 4.7": GLM47,
    "Olmo 3": OLMO3,
    "Apertus": APERTUS,
    "DeepSeek R1": R1_TOOLS,
    "DeepSeek V3.2": DEEPSEEK_V32,
    "Qwen 3.6": QWEN36,
    "Step 3.5": STEP,
    "Nemotron 3": NEMOTRON3,
    "Kimi K2": KIMI_K2,
    "MiniMax M2": MINIMAX_M2,
    "Hunyuan 3": HUNYUAN3,
    "Seed-OSS": SEED_OSS,
    "Gemma 4": GEMMA4,
    "Magistral": MAGISTRAL,
    "Llama 4": LLAMA4,
    "gpt-oss": HARMONY,
}
"""Family -> its template."""
