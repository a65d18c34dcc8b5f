"""The same questions to several models: the command, and what may stand on its page."""

import json
import re
import subprocess
import sys

import pytest
from running import REPOSITORY, chat_rows, environment, write_rows
from tiny import save_tiny, tiny_llama

from lit_sft.commands.compare import page


def compare(folder, *args):
    command = [sys.executable, REPOSITORY / "scripts" / "compare.py", *args]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def test_two_models_side_by_side(tmp_path):
    """Answers are those of `predict`, in the order of the rows, beside the references."""
    for seed in (0, 1):
        save_tiny(tmp_path / f"model{seed}", tiny_llama(seed=seed))
    write_rows(tmp_path / "rows.jsonl", chat_rows(5))
    options = ("--data", "rows.jsonl", "--num_questions", "3", "--max_new_tokens", "9")
    done = compare(tmp_path, "model0", "model1", *options)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert text.count("<tr>") == 1 + 3 and text.count("<td>") == 3 * 4
    assert [re.findall(r"<th>(.*?)</th>", text)] == [["Question", "model0", "model1", "reference"]]
    cells = re.findall(r"<td>(.*?)</td>", text, re.DOTALL)
    rows = [
        json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()
    ]
    assert cells[0::4] == [row[-2]["content"] for row in rows[:3]]
    assert cells[3::4] == [row[-1]["content"] for row in rows[:3]]
    assert cells[1::4] != cells[2::4]


def test_a_model_that_is_not_there(tmp_path):
    done = compare(tmp_path, "./gone")
    assert done.returncode == 1
    assert [
        line for line in done.stderr.splitlines() if line.startswith("error: ")
    ] == done.stderr.splitlines()[-1:]
    assert "there is no directory ./gone" in done.stderr


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", '"><img src=x>', "\x1b[2J", "{rows}"]
)
def test_answers_cannot_act(evil):
    text = page([evil], {"<b>": [evil]}, evil)
    assert "<script" not in text and "<img" not in text and "\x1b" not in text and "<b>" not in text
    assert not re.search(r"(src|href|url)\s*[=(]", text.replace("src=x&gt;", ""))
