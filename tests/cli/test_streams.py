"""What only prints does not end a run: encodings without a character, and readers that are gone."""

import io
import json
import os
import subprocess
import sys

import pytest
from running import REPOSITORY, arguments, chat_rows, environment, version, write_rows
from tiny import save_tiny

from lit_sft.cli.streams import KeepOn
from lit_sft.console import show


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    hello = {"role": "user", "content": "Grüße → 你好"}
    rows = [{"messages": [hello, {"role": "assistant", "content": "こ"}]}, *chat_rows(8)]
    settings = {
        "data__packing": False,
        "trainer__max_steps": 1,
        "data__questions": ["你?"],
        "trainer__enable_progress_bar": True,
    }
    train = write_rows(folder / "train.jsonl", rows)
    return folder / "runs", arguments(
        save_tiny(folder / "model"), train, folder / "runs", **settings
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_an_encoding_without_the_characters(encoding, args):
    done = subprocess.run(
        [sys.executable, "-m", "lit_sft", "fit", *args[1]],
        cwd=REPOSITORY,
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode(encoding)[-2000:]
    assert "First training example" in done.stdout.decode(encoding)


def test_a_reader_that_is_gone(args):
    """Standard output and error are pipes that nobody reads; the run ends as it should."""
    root, typed = args
    before = len(list(root.glob("lightning_logs/*"))) if root.exists() else 0
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_sft", "fit", *typed],
        cwd=REPOSITORY,
        env=environment(),
        stdout=write,
        stderr=write,
    )
    os.close(write)
    assert process.wait(240) == 0
    assert (version(root, before) / "hf" / "config.json").is_file()


def test_json_for_programs_is_escaped_and_not_lost(args):
    done = subprocess.run(
        [sys.executable, "-m", "lit_sft", "preview", *args[1], "--output=json", "--num_rows=1"],
        cwd=REPOSITORY,
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "你好" in str(json.loads(done.stdout.splitlines()[0]))


def test_tables_from_python(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    show("a → b")
    sys.stdout.flush()
    assert raw.getvalue() == b"a ? b\n"
    sys.stdout.close()
    show("nobody reads this")


def test_a_stream_keeps_on():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        flush = write

    stream = KeepOn(Gone())
    assert stream.write("abc") == 3 and not stream.isatty()
