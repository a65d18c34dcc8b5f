"""The same questions to several models: the command, and what may stand on its page."""

import html
import json
import re
import subprocess
import sys

import pytest
from running import REPOSITORY, arguments, chat_rows, environment, run, version, write_rows
from tiny import CHATML, save_tiny, tiny_llama

from lit_sft.checkpoint.io import read_checkpoint
from lit_sft.commands.compare import page
from lit_sft.console import visible


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


@pytest.mark.parametrize("settings", [{}, {"model__lora": {"r": 2}}], ids=["full", "lora"])
def test_one_precision_for_all_answers(tmp_path, settings):
    """Answers of the base in `fit`, in `predict` and on the page are equal: in bf16, not in fp32.

    Large weights make a model whose answers depend on the type.
    """
    model = save_tiny(tmp_path / "model", tiny_llama(initializer_range=0.3))
    rows, root = write_rows(tmp_path / "rows.jsonl", chat_rows(8)), tmp_path / "runs"
    questions = ["What is a thread?", "Hello", "1+1"]
    asked = {"data__questions": questions, "model__generation__max_new_tokens": 40}
    bf16 = {"trainer__precision": "bf16-mixed", **asked}
    run("fit", arguments(model, rows, root, trainer__max_steps=1, **bf16, **settings))
    checkpoint = version(root) / "checkpoints" / "last.ckpt"
    before = read_checkpoint(checkpoint)["callbacks"]["Answers"]["before"]

    def predict(name, **precision):
        output = tmp_path / f"{name}.jsonl"
        args = arguments(model, rows, tmp_path / name, **{**bf16, **precision})
        run("predict", [*args, f"--predict_output={output}"])
        return [json.loads(line)["prediction"] for line in output.read_text().split("\n")[:-1]]

    assert predict("bf16") == before
    assert predict("fp32", trainer__precision="32-true") != before
    command = ("model", "runs/lightning_logs/version_0", "--questions", *questions)
    done = compare(tmp_path, *command, "--max_new_tokens", "40")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td>(.*?)</td>", text, re.DOTALL)
    assert cells[1::3] == [html.escape(visible(answer)) for answer in before]


def test_a_run_answers_with_its_own_settings(tmp_path):
    """Its chat template and the variables of it, as in its training."""
    model = save_tiny(tmp_path / "model")
    rows, root = write_rows(tmp_path / "rows.jsonl", chat_rows(8)), tmp_path / "runs"
    template = "{{ word }}" + CHATML
    own = {"data__chat_template": template, "data__chat_template_kwargs": {"word": "a b c d"}}
    steps = {"trainer__max_steps": 1, "model__optimizer__lr": 0.0, "data__questions": ["Hello"]}
    precision = {"trainer__precision": "bf16-mixed", "model__generation__max_new_tokens": 30}
    run("fit", arguments(model, rows, root, **own, **steps, **precision))
    checkpoint = version(root) / "checkpoints" / "last.ckpt"
    [before] = read_checkpoint(checkpoint)["callbacks"]["Answers"]["before"]
    options = ("--questions", "Hello", "--max_new_tokens", "30")
    done = compare(tmp_path, str(checkpoint), "model", *options)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td>(.*?)</td>", text, re.DOTALL)
    assert cells[1] == html.escape(visible(before)) != cells[2]


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
