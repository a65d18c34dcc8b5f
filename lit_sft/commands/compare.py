"""Asks several models the same questions, and shows the answers side by side as an HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lit_sft.console import visible
from lit_sft.datamodule import SFTDataModule
from lit_sft.generation.answer import answer, records
from lit_sft.generation.prompts import check_room, make_batches
from lit_sft.model.generate import GenerationOptions, context_length, stop_token_ids
from lit_sft.model_builder import build_model
from lit_sft.module import SFTModule


def ask(
    name_or_path: str, options: GenerationOptions, dtype: str = "auto", **data_options: Any
) -> list[dict[str, Any]]:
    """Loads one model and generates its answers.

    Args:
        name_or_path: Hub id, model directory or adapter directory.
        options: Length and sampling of the answers.
        dtype: Dtype of the weights; `auto` is bf16 on a GPU and fp32 on a CPU.
        **data_options: Arguments of `SFTDataModule`: `predict` names the questions.

    Returns:
        Records in the order of the questions (see `generation.answer.records`).

    Raises:
        UserError: The model or the questions cannot be loaded.
    """
    data = SFTDataModule(model_name_or_path=name_or_path, **data_options).data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    module = SFTModule(model_name_or_path=name_or_path, dtype=dtype)  # type: ignore[arg-type]
    prompts = data.asked_by_predict()
    model, _ = build_model(module.options, "32-true")
    check_room(prompts, options.max_new_tokens, context_length(model.lm.config))
    model.to(device)
    stop_ids = stop_token_ids(data.tokenizer, model.lm.generation_config, data.stop_ids)
    found = []
    for batch in make_batches(prompts, options, data.tokenizer.pad_token_id):  # type: ignore[arg-type]
        texts = answer(
            model,
            data.tokenizer,
            batch,
            options=options,
            stop_ids=stop_ids,
            seed=module.options.seed,
        )
        found += records(batch, texts)
    return sorted(found, key=lambda record: record["index"])


def page(questions: Sequence[str], columns: Mapping[str, Sequence[str]], note: str) -> str:
    """Returns the answers as one self-contained HTML page.

    Args:
        questions: One per row.
        columns: Name of a model (or `reference`) -> its answers.
        note: Line below the title.
    """
    width = 100 / (len(columns) + 1)
    heads = "".join(f"<th>{_text(name)}</th>" for name in ("Question", *columns))
    rows = []
    for row, question in enumerate(questions):
        cells = (question, *(answers[row] for answers in columns.values()))
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return _PAGE.format(note=_text(note), width=f"{width:.1f}", heads=heads, rows="\n".join(rows))


def _text(text: str) -> str:
    return html.escape(visible(text)) or "<i>empty</i>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Answers side by side</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem; }}
h1 {{ font-size: 1.3rem; margin: 0; }}
p {{ opacity: .7; margin: .2rem 0 1.2rem; }}
table {{ border-collapse: collapse; table-layout: fixed; width: 100%; min-width: 40rem; }}
th, td {{ border: 1px solid #8886; padding: .5rem .7rem; width: {width}%; }}
th, td {{ text-align: left; vertical-align: top; }}
th {{ position: sticky; top: 0; overflow-wrap: anywhere; }}
th {{ background: light-dark(#eef1f5, #2a2e35); }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
td:first-child {{ font-weight: 600; }}
i {{ opacity: .5; }}
</style>
</head>
<body>
<h1>Answers side by side</h1>
<p>{note}</p>
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""
