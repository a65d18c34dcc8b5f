"""Every family of docs/models.md, taken through training, packing, adapters and export.

Eight families are tested in CI, the others by `make certify`. What comes of a family is recorded in
tests/records/models.json; `python tests/models/table.py` writes the record and the page anew.
"""

from pathlib import Path

import pytest
from models import certificate, families, table, templates
from template_sweep import DownloadError

NAMES = [
    pytest.param(name, marks=[] if name in families.CORE else pytest.mark.certify)
    for name in families.FAMILIES
]


@pytest.mark.parametrize("name", NAMES)
def test_a_family(name, tmp_path):
    recorded = table.read_record()[name]
    expected = {column: recorded[column] for column in certificate.COLUMNS}
    assert certificate.measure(name, tmp_path) == expected


@pytest.mark.slow
def test_chat_templates(pytestconfig):
    folder = Path(pytestconfig.cache.mkdir("template_sweep"))
    try:
        measured = templates.measure(folder)
    except DownloadError as error:
        pytest.skip(str(error))
    for name, recorded in table.read_record().items():
        assert measured[name] == {column: recorded[column] for column in templates.COLUMNS}, name


def test_the_page_has_the_record():
    record = table.read_record()
    assert list(record) == list(families.FAMILIES)
    assert table.table_of(table.PAGE.read_text(encoding="utf-8")) == table.render(record)


def test_a_refusal_is_told_below_the_table():
    values = dict.fromkeys(table.COLUMNS, "yes") | {"full": "no: cannot be built: a | b"}
    text = table.render({"Qwen3": values})
    assert "| Qwen3 | no |" in text
    assert text.endswith("- Qwen3, full: cannot be built: a | b\n")


def test_the_core_is_of_every_kind():
    assert len(families.CORE) == 8 and set(families.CORE) <= set(families.FAMILIES)
    assert len(families.FAMILIES) >= 40
