"""Shows the answers of several models side by side as an HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from lit_sft.console import visible


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
