"""Measures all families, and writes what came of them to the record and to docs/models.md.

python tests/models/table.py            # all families, 4 minutes on a CPU
python tests/models/table.py Qwen3 ...  # these, and keeps what the record has of the others
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

TESTS = Path(__file__).parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path += [str(TESTS), str(TESTS.parent / "scripts")]

from models import certificate, families, templates  # noqa: E402

RECORD = TESTS / "records" / "models.json"
PAGE = TESTS.parent / "docs" / "models.md"
BEGIN, END = "<!-- The table of tests/models/table.py. -->\n", "<!-- End of the table. -->\n"
COLUMNS = (*certificate.COLUMNS, *templates.COLUMNS)
Record = Mapping[str, Mapping[str, str]]


def read_record() -> dict[str, dict[str, str]]:
    """Family -> column -> value."""
    found: dict[str, dict[str, str]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def render(record: Record) -> str:
    """The table in Markdown, and below it the reasons of what is refused."""
    head = ["family", *COLUMNS, "what is special"]
    lines = [_line(head), _line(["---"] * len(head))]
    reasons = []
    for name, values in record.items():
        cells = []
        for column in COLUMNS:
            value, _, reason = values[column].partition(": ")
            cells.append(value)
            if reason:
                reasons.append(f"- {name}, {column}: {reason}\n")
        lines.append(_line([name, *cells, families.FAMILIES[name].special]))
    return "".join([*lines, "\n", *reasons])


def _line(cells: Iterable[str]) -> str:
    texts = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(texts)} |\n"


def table_of(page: str) -> str:
    """The table that a page has."""
    _, _, rest = page.partition(BEGIN)
    return rest.partition(END)[0].strip() + "\n"


def main(names: list[str]) -> None:
    """Measures families, and writes record and page."""
    record = read_record() if names else {}
    for name in names or families.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            record[name] = certificate.measure(name, Path(folder))
        print(name, record[name], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        of_templates = templates.measure(Path(folder))
    record = {name: {**record[name], **of_templates[name]} for name in families.FAMILIES}
    write(record)


def write(record: Record) -> None:
    """Writes the record, and the table of the page."""
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{render(record)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
