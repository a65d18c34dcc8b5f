"""What docs/faults.md says of each fault: what happens, what is said, what is kept. Faults are real, not simulated,
wherever a test can cause them.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import REPOSITORY, arguments, chat_rows, environment, final_weights, run, scalars, version, write_rows
from terminal import log_lines, refused
from tiny import save_tiny, tiny_llama, tiny_tokenizer

START = "forkserver" if torch.cuda.is_available() else "fork"
PLAIN = {"data__packing": False, "data__global_batch_size": 4, "checkpoint__every_n_train_steps": 1}
ROWS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder, model, rows; the model's embedding of `z` is NaN, which is in none of the rows."""
    folder = tmp_path_factory.mktemp("faults")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    (token,) = tokenizer("z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    return folder, save_tiny(folder / "model", model, tokenizer), write_rows(folder / "train.jsonl", chat_rows(ROWS))


def bad_rows(folder, *numbers):
    """The rows, of which these have a `z`."""
    rows = chat_rows(ROWS)
    for number in numbers:
        rows[number]["messages"][0]["content"] += " z"
    return write_rows(folder / "bad.jsonl", rows)


def fit(model, rows, root, *more, **overrides):
    run("fit", [*arguments(model, rows, root, **{**PLAIN, **overrides}), *more])


def lines_of(text):
    return {int(word.rstrip(",;")) for before, word in zip(text.split(), text.split()[1:]) if before == "line"}


# ---------------------------------------------------------------------------------------------------- no number


def test_nan_stops_before_the_weights_are_touched(place, tmp_path, capsys):
    """The rows of the micro-batches are named, by file and line; the checkpoint before it is whole."""
    root = tmp_path / "runs"
    args = arguments(place[1], bad_rows(tmp_path, 7), root, **PLAIN)
    said = refused(capsys, "fit", args)
    assert "the loss is nan" in said and "bad.jsonl line 8;" in said and "faults.skip_steps" in said, said
