"""The cache stays below its size, what is in use stays, and the command shows and cleans it."""

import logging
import os
import time

import pytest
from running import chat_rows, write_rows
from terminal import log_lines
from tiny import save_tiny

from lit_sft.cli import front_door
from lit_sft.data.cache import open_cache, to_block, write_cache
from lit_sft.data.cache_entries import COPIES, GRACE_SECONDS, list_entries, trim
from lit_sft.data.sources.cached_copies import cached_copy
from lit_sft.datamodule import SFTDataModule
from lit_sft.errors import UserError
from lit_sft.types import Example

DAYS_AGO = time.time() - 3 * GRACE_SECONDS


def make_entry(folder, digit, age=0.0):
    """A cache of one example with 1,000 tokens, last used `age` seconds before three days ago."""
    path = folder / (digit * 24)
    write_cache(path, [to_block([Example([1] * 1000, [1] * 1000, 0)])], {}, f"set {digit}")
    put_back(path, age)
    return path


def put_back(path, age=0.0):
    for file in [*path.glob("*"), path]:
        os.utime(file, (DAYS_AGO - age,) * 2)


def test_the_oldest_go_first_and_the_rest_stays(tmp_path):
    old, older, oldest = (make_entry(tmp_path, *of) for of in (("a", 0), ("b", 9), ("c", 99)))
    for name in ("chat_template_date", "notes.txt", "a" * 24 + ".12345678.error"):
        (tmp_path / name).write_text("x" * 10_000)
    (tmp_path / "mine").mkdir()
    entries = list_entries(tmp_path)
    assert [entry.path for entry in entries] == [oldest, older, old]
    assert [entry.name for entry in entries] == ["set c", "set b", "set a"]
    size = entries[0].size
    assert size == sum(file.stat().st_size for file in old.iterdir()) > 5000
    assert trim(tmp_path, 3 * size) == []
    assert [entry.path for entry in trim(tmp_path, 3 * size - 1)] == [oldest]
    open_cache(older)
    assert [entry.path for entry in trim(tmp_path, 0)] == [old]
    assert older.is_dir() and len(list(tmp_path.iterdir())) == 5


def test_copies_and_remains_are_entries(tmp_path):
    make = lambda: cached_copy(tmp_path / "sources", "0123456789abcdef.csv-2.arrow", write)  # noqa: E731
    written = []

    def write(target):
        written.append(target)
        with open(target, "wb") as file:
            file.write(b"x" * 100)

    copy = tmp_path / COPIES / os.path.basename(make())
    (tmp_path / COPIES / "tmpabcdefgh").mkdir()
    building = tmp_path / f"{'d' * 24}.{'0' * 32}.building"
    building.mkdir()
    (building / "input_ids.i32").write_bytes(b"x" * 50)
    assert trim(tmp_path, 0) == []
    put_back(building)
    put_back(tmp_path / COPIES / "tmpabcdefgh")
    os.utime(copy, (DAYS_AGO,) * 2)
    make()
    assert len(written) == 1 and len(trim(tmp_path, 0)) == 2 and copy.is_file()
    os.utime(copy, (DAYS_AGO,) * 2)
    assert [entry.size for entry in trim(tmp_path, 0)] == [100]
    make()
    assert len(written) == 2


def test_a_cache_that_is_removed_while_it_is_opened_is_made_anew(tmp_path, monkeypatch):
    path = make_entry(tmp_path, "a")

    def removed(opened):
        trim(tmp_path, 0)
        raise FileNotFoundError(opened)

    monkeypatch.setattr("lit_sft.data.cache.ExampleCache", removed)
    assert open_cache(path) is None and not list(tmp_path.iterdir())


def test_a_mapped_cache_is_read_after_its_removal(tmp_path):
    cache = open_cache(make_entry(tmp_path, "a"))
    put_back(cache.path)
    assert len(trim(tmp_path, 0)) == 1
    assert cache[0][0].tolist() == [1] * 1000


def test_a_run_keeps_to_the_size(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lit_sft")
    model = save_tiny(tmp_path / "model")
    old = make_entry(tmp_path / "cache", "a")

    def prepare(**options):
        train = write_rows(tmp_path / "train.jsonl", chat_rows(4))
        settings = {"model_name_or_path": model, "cache_dir": str(tmp_path / "cache"), **options}
        SFTDataModule(train=str(train), **settings).data.prepare("fit")

    prepare()
    prepare(cache_max_gb=None)
    assert old.is_dir()
    with log_lines() as lines:
        prepare(cache_max_gb=0)
    (entry,) = list_entries(tmp_path / "cache")
    assert entry.name.endswith("train.jsonl") and not old.exists()
    assert any("cache: removed 1 entries" in line for line in lines)
    for size in (-1, float("nan")):
        with pytest.raises(UserError, match="data.cache_max_gb is"):
            prepare(cache_max_gb=size)


def test_the_command(tmp_path, capsys):
    make_entry(tmp_path, "a")
    recent = make_entry(tmp_path, "b")
    os.utime(recent)
    place = ["--cache_dir", str(tmp_path)]
    assert front_door.answer(["cache", "list", *place]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and "used 3.0 days ago  set a" in out[0] and "used 0.0 days ago" in out[1]
    assert "2 entries" in out[2]
    assert front_door.answer(["cache", "clean", "--max_gb", "1", *place]) == 0
    assert "removed 0 entries" in capsys.readouterr().out
    assert front_door.answer(["cache", "clean", *place]) == 0
    out = capsys.readouterr().out
    assert "removed 1 entries" in out and "1 of them were used in the last day" in out
    assert [entry.path for entry in list_entries(tmp_path)] == [recent]
    assert front_door.answer(["cache", "list", "--cache_dir", str(tmp_path / "none")]) == 1
    assert "is no directory" in capsys.readouterr().err
    for wrong in (["cache"], ["cache", "empty"], ["cache", "clean", "--max_gb", "-1"]):
        with pytest.raises(SystemExit) as caught:
            front_door.answer(wrong)
        assert caught.value.code == 2
