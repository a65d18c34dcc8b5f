"""`preview`: rows as people wrote them and as the model will see them, before a run; no weights
needed.
"""

import json
from pathlib import Path

import pytest
from running import arguments, environment, run, write_rows
from terminal import log_lines, refused
from tiny import save_tiny, tiny_tokenizer

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hello world"},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one [bold]"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "四"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "unseen"},
            {"role": "assistant", "content": "never"},
        ]
    },
]


@pytest.fixture
def args(tmp_path):
    """A directory that holds a config and a tokenizer only."""
    model = save_tiny(tmp_path / "model")
    (Path(model) / "model.safetensors").unlink()
    return arguments(model, write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "runs")


def preview(capsys, args, *more):
    capsys.readouterr()
    run("preview", [*args, *more])
    return capsys.readouterr().out


def records(capsys, args, *more):
    return [json.loads(line) for line in preview(capsys, args, "--output=json", *more).splitlines()]


def test_json_is_one_object_per_example(args, capsys):
    """Nothing else is on stdout."""
    first, second, third = records(capsys, args)
    tokenizer = tiny_tokenizer()
    assert [(r["row"], r["part"]) for r in (first, second, third)] == [(0, 0), (1, 0), (2, 0)]
    for record in (first, second, third):
        assert list(record) == ["row", "part", "text", "input_ids", "loss_mask"]
        assert len(record["input_ids"]) == len(record["loss_mask"]) and set(
            record["loss_mask"]
        ) == {0, 1}
        assert tokenizer.decode(record["input_ids"]) == record["text"]
    chat = tokenizer.apply_chat_template(ROWS[1]["messages"], tokenize=False)
    assert second["text"] == chat.removesuffix("\n") or second["text"] == chat
    assert trained(first) == ["Hello world<|im_end|>"]
    assert trained(second) == ["two<|im_end|>", "四<|im_end|>"]


def trained(record):
    """The texts of the runs of trained tokens."""
    tokenizer, texts, previous = tiny_tokenizer(), [], 0
    for token, mask in zip(record["input_ids"], record["loss_mask"], strict=True):
        if mask and not previous:
            texts.append([])
        if mask:
            texts[-1].append(token)
        previous = mask
    return [tokenizer.decode(ids) for ids in texts]


def test_num_rows(args, capsys):
    assert [record["row"] for record in records(capsys, args, "--num_rows=1")] == [0]
    assert len(records(capsys, args, "--num_rows=99")) == 3


def test_rich_starts_with_a_table_of_user_and_assistant(args, capsys):
    out = preview(capsys, args, "--num_rows=2")
    lines = [line for line in out.splitlines() if line.strip()]
    header = next(i for i, line in enumerate(lines) if "User" in line and "Assistant" in line)
    assert header <= 2  # after its title and its upper edge
    table, tokens = out.split("row 0, part 0")
    assert "hi" in table and "Hello world" in table and "one [bold]" in table and "四" in table
    assert "<|im_start|>" not in table and "<|im_start|>" in tokens
    assert "unseen" not in out and "trained (green)" in out


def test_it_leaves_no_run_behind(args, tmp_path, capsys):
    preview(capsys, args)
    assert not (tmp_path / "runs").exists()


def test_the_template_and_the_system_prompt_of_the_settings(args, capsys):
    record = records(capsys, args, "--data.system_prompt=Say it.", "--num_rows=1")[0]
    assert record["text"].startswith("<|im_start|>system\nSay it.<|im_end|>")
    raw = records(
        capsys,
        args,
        "--data.chat_template={% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    )
    assert raw[0]["text"] == "hi<|im_end|>Hello world<|im_end|>"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--num_rows=0", ["--num_rows is 0"]),
        ("--data.train=gone.jsonl", ["gone.jsonl", "data.train"]),
    ],
)
def test_bad_input(typed, words, args, capsys):
    line = refused(capsys, "preview", [*args, typed])
    assert all(word in line for word in words)


def test_a_bad_row(args, tmp_path, capsys):
    rows = write_rows(tmp_path / "bad.jsonl", [ROWS[0], {"messages": ROWS[0]["messages"][:1]}])
    assert "line 2" in refused(capsys, "preview", [*args, f"--data.train={rows}"])
    skip = [f"--data.train={rows}", "--data.on_bad_row=skip"]
    with log_lines() as lines:
        assert [record["row"] for record in records(capsys, args, *skip)] == [0]
    assert any("1 rows dropped" in line for line in lines)
    assert "Hello world" in preview(capsys, args, *skip)


@pytest.mark.slow
def test_stdout_of_a_real_process(args):
    """Log lines and warnings of libraries go to stderr."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "lit_sft", "preview", *args, "--output=json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=120, check=True
    )
    assert [json.loads(line)["row"] for line in done.stdout.splitlines()] == [0, 1, 2]
