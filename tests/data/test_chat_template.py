"""Finding the chat template."""

from __future__ import annotations

from datetime import date, datetime

import pytest
from chat_templates import (
    CHATML,
    FAMILIES,
    Family,
    assistant,
    byte_tokenizer,
    render_one,
    renderer_of,
    tokenizer_of,
    trained_texts,
    user,
)

from lit_sft.data.chat_template import PLAIN_TEMPLATE, kept_date, resolve_chat_template, with_date
from lit_sft.errors import UserError
from lit_sft.types import Conversation

ONE = Conversation((user("Hi"), assistant("Yes.")))
NO_TEMPLATE = Family(None, ("<pad>",), eos="</s>", bos="<s>")


def test_null_is_the_template_of_the_tokenizer():
    assert resolve_chat_template(tokenizer_of("chatml"), None) == CHATML


def test_a_tokenizer_with_named_templates_gives_its_default():
    tokenizer = byte_tokenizer(NO_TEMPLATE)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ 1 }}"}
    assert resolve_chat_template(tokenizer, None) == CHATML
    tokenizer.chat_template = {"tool_use": "{{ 1 }}", "rag": "{{ 2 }}"}
    with pytest.raises(
        UserError, match=r"named default, only tool_use, rag; set data\.chat_template"
    ):
        resolve_chat_template(tokenizer, None)


def test_raw_is_no_template():
    assert resolve_chat_template(tokenizer_of("chatml"), "raw") is None


def test_inline_text_and_file(tmp_path):
    tokenizer = tokenizer_of("chatml")
    assert resolve_chat_template(tokenizer, "{{ messages }}") == "{{ messages }}"
    path = tmp_path / "mine.jinja"
    path.write_text("{# 中文 #}" + CHATML, encoding="utf-8")
    assert resolve_chat_template(tokenizer, str(path)) == "{# 中文 #}" + CHATML


@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_fallback_writes_bos_only_where_the_tokenizer_would(adds_bos):
    tokenizer = byte_tokenizer(NO_TEMPLATE, adds_bos=adds_bos)
    assert (
        resolve_chat_template(tokenizer, None)
        == ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    )
    [example] = render_one(
        renderer_of(tokenizer), user("Hi"), assistant("Hello"), user("x"), assistant("Yes.")
    )
    text = "User:\nHi\n\nAssistant:\nHello</s>\n\nUser:\nx\n\nAssistant:\nYes.</s>\n\n"
    assert tokenizer.decode(example.input_ids) == ("<s>" if adds_bos else "") + text
    assert trained_texts(tokenizer, example) == ["Hello</s>", "Yes.</s>"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "missing.jinja",
            r"data\.chat_template 'missing\.jinja' cannot be read as a file .*No such file",
        ),
        (".", r"data\.chat_template '\.' cannot be read as a file .*directory"),
        ("chatml", r"data\.chat_template 'chatml' cannot be read as a file"),
        ("latin.jinja", r"'latin\.jinja' cannot be read as a file .*utf-8"),
        ("broken.jinja", r"broken\.jinja has a syntax error in line 3: .*endfor"),
        (
            "{% for message in messages %}",
            r"the inline data\.chat_template has a syntax error in line 1",
        ),
        ("{{ messages | nofilter }}", r"syntax error in line 1: No filter named 'nofilter'"),
        ("{% generation %}", r"syntax error in line 1"),
    ],
)
def test_what_is_no_template(setting, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}\nx\n{% endif %}\n")
    with pytest.raises(UserError, match=said) as error:
        resolve_chat_template(tokenizer_of("chatml"), setting)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"), [(None, "neither a chat template nor an eos"), ("raw", "no eos token")]
)
def test_nothing_would_end_an_answer(setting, said):
    tokenizer = byte_tokenizer(NO_TEMPLATE)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=said):
        resolve_chat_template(tokenizer, setting)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles(family):
    assert resolve_chat_template(tokenizer_of(family), None)


# ---- the date
# --------------------------------------------------------------------------------------------

DATED = {
    "llama-3.2": (
        """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}"""
    ),
    "smollm3": "{%- set today = strftime_now('%d %B %Y') -%}\n{{ 'Today Date: ' ~ today ~ '\\n' }}",
    "gpt-oss": (
        """{%- macro build_system_message() -%}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{%- endmacro -%}
{{- build_system_message() }}"""
    ),
    "of its own": (
        "\n  {% if true %}\n {{ 1 }}% {{ strftime_now('%A %-d.%-m.%y \"%j\"')|upper }}\n  {% endif"
        " %}\n\n"
    ),
}


@pytest.mark.parametrize("name", DATED)
def test_a_date_is_written_as_it_would_be_on_that_day(name, monkeypatch):
    from transformers.utils import chat_template_utils

    class ThatDay(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2025, 3, 4, 15, 16)

    template = DATED[name] + CHATML
    written, _ = renderer_of(
        tokenizer_of("chatml"), with_date(template, "2025-03-04")
    ).template.write(ONE)
    monkeypatch.setattr(chat_template_utils, "datetime", ThatDay)
    expected, _ = renderer_of(tokenizer_of("chatml"), template).template.write(ONE)
    assert written == expected and expected.startswith(
        ("\n", "Today Date: 04 Mar", "Current date: 2025-03-04")
    )
    if name == "llama-3.2":
        given = renderer_of(
            tokenizer_of("chatml"),
            with_date(template, "2025-03-04"),
            chat_template_kwargs={"date_string": "then"},
        ).template
        assert "then" in given.write(ONE)[0]


def test_the_date_of_a_file_is_todays_where_there_is_none(tmp_path):
    path = tmp_path / "cache" / "date"
    assert kept_date(path) == str(date.today()) and [
        file.name for file in path.parent.iterdir()
    ] == ["date"]
    path.write_text("2025-03-04")
    assert kept_date(path) == "2025-03-04" == path.read_text()
    path.write_text("4.3.2025")
    with pytest.raises(UserError, match="holds no date such as 2026-11-30"):
        kept_date(path)
