"""A second oracle: the package `renderers`, which writes some families by hand, without a template.

It is fetched from the package registry. Its renderers build token ids message by message, so the
history is compared as text: a server of texts tokenizes it as a whole.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import Family
from template_oracle import Row, Server, family_of, histories, turn_of, turn_runs
from template_sweep import ROWS, DownloadError, templates_of

from lit_sft.types import Example

PACKAGES = ("renderers==0.1.12", "httpx")
"""The package imports httpx without asking for it."""
SPECIAL = (
    "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>", "<|image>", "<image|>",
    "<|audio>", "<audio|>", "<|video|>", "<|image|>", "<|audio|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED = ("<tool_response>", "</tool_response>")
"""Tokens that a renderer asks for, whether it writes them or not."""
FAMILIES = {
    "qwen3": "Qwen3RendererConfig",
    "qwen3_8": "Qwen38RendererConfig",
    "llama3_1": "Llama3RendererConfig",
    "nemotron_3_nano": "Nemotron3RendererConfig",
    "gemma4_v5": "Gemma4RendererConfig",
}
"""Template of TRL -> configuration of the renderer that writes the same."""
COMPARED = {
    "qwen3": 43,
    "qwen3_8": 43,
    "llama3_1": 41,
    "nemotron_3_nano": 43,
    "gemma4_v5": 41,
}
"""Trained turns of all rows."""


def install(folder: Path) -> None:
    """Installs the package beside the environment, once.

    Raises:
        DownloadError: It cannot be had.
    """
    if (folder / "renderers").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DownloadError(f"`pip install {PACKAGES[0]}` failed: {done.stderr[-300:]}")


def family_for_renderer(template: str) -> Family:
    family = family_of(template)
    special = tuple(dict.fromkeys((*family.special, *SPECIAL)))
    bos = "<|begin_of_text|>" if "<|start_header_id|>" in template else family.bos
    added = tuple(dict.fromkeys((*family.added, *ADDED)))
    return replace(family, special=special, bos=bos, added=added)


def judged(server: Server, renderers: list[Any], row: Row, example: Example) -> list[str]:
    """One verdict per trained turn of an example: `same`, or what differs."""
    found = []
    turns = histories(row)["moved:reasoning" in example.notes]
    tools = None if row.tools is None else list(row.tools)
    for begin, end in turn_runs(server, example):
        ids = example.input_ids
        number, _ = turn_of(row, server.tokenizer.decode(ids[begin:end]))
        assert number is not None
        # A turn may be without the switch of its row.
        verdicts = [
            compared(server, renderer, turns[: number + 1], tools, ids[:begin], ids[begin:end])
            for renderer in renderers
        ]
        found.append("same" if "same" in verdicts else verdicts[0])
    return found


def compared(
    server: Server, renderer: Any, turns: Any, tools: Any, prompt: list[int], answer: list[int]
) -> str:
    """Compares the last turn with what the renderer says that a model samples."""
    decode = server.tokenizer.decode
    fed = decode(renderer.render_ids(turns[:-1], tools=tools, add_generation_prompt=True))
    if fed != decode(prompt):
        return f"the prompt is {fed!r}, not {decode(prompt)!r}"
    rendered = renderer.render(turns, tools=tools)
    of_token = zip(rendered.token_ids, rendered.sampled_mask, rendered.message_indices, strict=True)
    sampled = [token for token, is_sampled, i in of_token if is_sampled and i == len(turns) - 1]
    # Of a thinking block that the prompt opens, the renderer samples the opening, too.
    opened = decode(sampled[: -len(answer)])
    if sampled[-len(answer) :] == answer and fed.endswith(opened):
        return "same"
    return f"the answer is {decode(sampled)!r}, not {decode(answer)!r}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_renderer_written_by_hand_trains_the_same(
    name: str, pytestconfig: Any, monkeypatch: Any
) -> None:
    folder = Path(pytestconfig.cache.mkdir("renderers"))
    try:
        install(folder)
        template = templates_of("trl", Path(pytestconfig.cache.mkdir("template_sweep")))[name]
    except DownloadError as error:
        pytest.skip(str(error))
    # At the end, so that packages of the environment come first.
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    from renderers import configs, create_renderer

    server = Server(template, family_for_renderer(template))
    config = getattr(configs, FAMILIES[name])
    renderers = [create_renderer(server.tokenizer, config())]
    if "enable_thinking" in config.model_fields:
        renderers.append(create_renderer(server.tokenizer, config(enable_thinking=False)))
    verdicts = []
    for shape, row in ROWS.items():
        [result] = server.renderer.render([row.conversation()], [0])
        if isinstance(result, list):
            for example in result:
                own = judged(server, renderers, row, example)
                verdicts += [(shape, verdict) for verdict in own]
    assert [verdict for verdict in verdicts if verdict[1] != "same"] == []
    assert len(verdicts) >= COMPARED[name]
