"""Any source becomes the same rows: read one at a time, told by content, shared by processes."""

import gzip
import json
import multiprocessing
import os
import pickle
import re
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from terminal import log_lines

from lit_sft import hub
from lit_sft.data.sources import blocks, jsonl
from lit_sft.data.sources.open_rows import open_rows
from lit_sft.data.sources.rows import Rows, by_source, first_rows, limit, split_rows, subset
from lit_sft.errors import UserError

ROWS = [{"prompt": f"é {i}", "completion": "x\ny" * i} for i in range(5)]
STEPS = {"instruction": "1+1-1", "output": "1", "steps": [{"add": 2}, {"subtract": 1}]}
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(rows: Rows):
    return [rows[i] for i in range(len(rows))]


def write(path, text=LINES):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_as(path, suffix):
    """ROWS in a file of that kind."""
    table = pa.Table.from_pylist(ROWS)
    if suffix in (".jsonl", ".ndjson"):
        write(path)
    elif suffix == ".json":
        write(path, json.dumps(ROWS))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, 2)
    else:
        table.to_pandas().to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)


def compress(path, ending):
    raw = path.read_bytes()
    packed = path.with_name(path.name + ending)
    packed.write_bytes(
        gzip.compress(raw) if ending == ".gz" else pa.compress(raw, "zstd", asbytes=True)
    )
    return packed


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"]
)
def test_every_kind_of_file(suffix, ending, tmp_path):
    path = tmp_path / f"a{suffix}"
    write_as(path, suffix)
    if ending:
        path = compress(path, ending)
    for _ in range(2):  # the second time from the cache
        rows = open_rows(str(path), cache_dir=tmp_path / "cache")
        assert read(rows) == ROWS
    assert rows.columns() == ["prompt", "completion"]
    assert rows.where(2) == f"{path} " + ("line 3" if suffix in (".jsonl", ".ndjson") else "row 2")
    assert read(pickle.loads(pickle.dumps(rows))) == ROWS


@pytest.mark.parametrize("suffix", [".JSONL", ".Json", ".CSV", ".TSV", ".Parquet", ".ARROW"])
def test_the_case_of_suffixes_does_not_matter(suffix, tmp_path):
    write_as(tmp_path / f"a{suffix.lower()}", suffix.lower())
    packed = compress(tmp_path / f"a{suffix.lower()}", ".gz").rename(tmp_path / f"b{suffix}.GZ")
    (tmp_path / f"a{suffix.lower()}").rename(tmp_path / f"a{suffix}")
    for path in (tmp_path / f"a{suffix}", packed):
        assert read(open_rows(str(path), cache_dir=tmp_path / "cache")) == ROWS
    (tmp_path / "cache").rename(tmp_path / ".cache")
    assert read(open_rows(str(tmp_path), cache_dir=tmp_path / ".cache")) == ROWS * 2


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv", ".csv.gz"])
def test_a_copy_that_lost_a_part_is_made_anew(suffix, tmp_path):
    """Cut at the end of a line it would read as fewer rows."""
    write_as(tmp_path / "a.jsonl", ".jsonl")
    write_as(tmp_path / "a.csv", ".csv")
    for plain in (tmp_path / "a.jsonl", tmp_path / "a.csv"):
        compress(plain, ".gz")
    path, cache = str(tmp_path / f"a{suffix}"), tmp_path / "cache"
    assert len(open_rows(path, cache_dir=cache)) == len(ROWS)
    copies = [copy for copy in cache.rglob("*") if copy.is_file()]
    for copy in copies:
        copy.write_bytes(b"".join(copy.read_bytes().splitlines(keepends=True)[:-1]))
    jsonl._open_once.cache_clear()  # as in another process
    with log_lines() as lines:
        assert read(open_rows(path, cache_dir=cache)) == ROWS
        assert read(open_rows(path, cache_dir=cache)) == ROWS
    assert len([line for line in lines if "is damaged and made anew" in line]) == len(copies) > 0


def test_a_copy_has_its_name_only_when_it_is_on_disk(tmp_path, monkeypatch):
    write_as(tmp_path / "a.csv", ".csv")
    steps = []
    for name in ("fsync", "replace"):
        step = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, step=step: steps.append(name) or step(*args)
        )
    open_rows(str(tmp_path / "a.csv"), cache_dir=tmp_path / "cache")
    assert steps == ["fsync", "replace"]

    def fail(*_):
        raise OSError(28, "No space left on device", "copy")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        open_rows(str(tmp_path / "a.csv"), cache_dir=tmp_path / "other")
    assert list((tmp_path / "other" / "lit_sft_sources").iterdir()) == []


def test_arrow_files_that_are_no_streams(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(open_rows(str(tmp_path / "a.arrow"))) == ROWS


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    "text", [LINES, LINES.rstrip(), "\ufeff" + LINES, LINES.replace("\n", "\r\n"), " " + LINES]
)
def test_lines_wherever_blocks_end(block, text, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_SIZE", block)
    rows = open_rows(write(tmp_path / "a.jsonl", text))
    assert read(rows) == ROWS
    assert rows.where(4).endswith("line 5")


def test_blank_lines_are_skipped_but_counted(tmp_path):
    rows = open_rows(write(tmp_path / "a.jsonl", '\n{"a": 1}\n  \n\r\n{"a": 2}\n{"a": 3}\n\t'))
    assert read(rows) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [rows.where(i).split()[-1] for i in range(3)] == ["2", "5", "6"]


def test_lines_are_not_held(tmp_path):
    row = json.dumps({"text": "word " * 2000})
    path = write(tmp_path / "a.jsonl", f"{row}\n" * 200)
    assert len(pickle.dumps(open_rows(path))) < os.path.getsize(path) / 100


def test_a_row_of_ten_megabytes(tmp_path):
    row = {"text": "x" * 10_000_000}
    for path in (
        write(tmp_path / "a.jsonl", json.dumps(row)),
        write(tmp_path / "a.csv", f"text\n{row['text']}\n"),
    ):
        assert open_rows(path, cache_dir=tmp_path)[0] == row


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps({"version": 1, "data": ROWS}), ROWS),
        (json.dumps(ROWS, indent=2), ROWS),
        (json.dumps(ROWS[1]), [ROWS[1]]),
        (json.dumps(ROWS[1], indent=2), [ROWS[1]]),
        ('{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}]),
        (LINES, ROWS),
        (json.dumps({"prompt": None, "samples": ROWS}), ROWS),
        (json.dumps(STEPS), [STEPS]),
        (json.dumps(STEPS, indent=2), [STEPS]),
        (json.dumps({"q": "1+1", "history": ROWS}), [{"q": "1+1", "history": ROWS}]),
    ],
    ids=[
        "object around", "indented", "one row", "one row indented", "one conversation", "lines by another name",
        "object around, null", "one row with steps", "one row with steps indented", "one row with a history",
    ],
)  # fmt: skip
def test_shapes_of_json(text, expected, tmp_path):
    assert read(open_rows(write(tmp_path / "a.json", text))) == expected


def test_csv_fields_are_text(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffq,a\nNA,007\n"a ""b"",\nc",\n\n1e3,None\n')
    rows = read(open_rows(path, cache_dir=tmp_path))
    assert rows == [{"q": "NA", "a": "007"}, {"q": 'a "b",\nc', "a": ""}, {"q": "1e3", "a": "None"}]


PAIR = {"prompt": "Hi", "completion": "Hello; you"}
INDEX = "column 1 without a name"


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("prompt,completion\r\nHi,Hello; you\r\n", PAIR),
        ("\n\n prompt ,completion \nHi,Hello; you\n\n , \n,,\n", PAIR),
        ("prompt,completion,\nHi,Hello; you,\n", PAIR),
        ('"prompt", "completion"\n"Hi", "Hello; you"\n', PAIR),
        ("prompt, completion\nHi, Hello; you\n", PAIR),
        ("prompt,completion\nHi, Hello\n", {"prompt": "Hi", "completion": " Hello"}),
        ("prompt,completion,,\nHi,Hello; you\n", PAIR),
        ("prompt,completion\nHi,Hello; you,,\n", PAIR),
        (",prompt,completion\n0,Hi,Hello; you\n", {INDEX: "0", **PAIR}),
        ('prompt;completion\nHi;"Hello; you"\n', PAIR),
        ('\ufeffsep=;\r\nprompt;completion\r\nHi;"Hello; you"\r\n', PAIR),
        ('"sep=,"\nprompt,completion\nHi,Hello; you\n', PAIR),
        ('sep=;\na,b;c\n1;2\n', {"a,b": "1", "c": "2"}),
        ("prompt\tcompletion\nHi\tHello; you\n", PAIR),
        ("prompt|completion\nHi|Hello; you\n", PAIR),
        ("prompt\nHi; ho\n", {"prompt": "Hi; ho"}),
        ('"prompt;a"\nHi; ho\n', {"prompt;a": "Hi; ho"}),
        ('a,b\n"1 ""2""",x\n"3 \\"4\\", 5",y\n', {"a": '1 "2"', "b": "x"}),
        ('a,b\n"\\frac \\\\ \\"4\\", 5",\\n\n', {"a": '\\frac \\\\ "4", 5', "b": "\\n"}),
        ('a,b\n"C:\\\\x \\"4\\", 5",y\n', {"a": 'C:\\x "4", 5', "b": "y"}),
        ('a,b\n"C:\\",\\"\n', {"a": "C:\\", "b": '\\"'}),
    ],
)  # fmt: skip
def test_csv_as_it_is_written(text, row, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    assert read(open_rows(str(path), cache_dir=tmp_path))[0] == row


@pytest.mark.parametrize("options", [{}, {"escapechar": "\\", "doublequote": False}, {"sep": ";"}])
def test_csv_of_pandas(options, tmp_path):
    rows = [
        {"prompt": 'say "a, b"', "completion": "C:\\new\n;"},
        {"prompt": "c\r\n", "completion": '"'},
    ]
    pa.Table.from_pylist(rows).to_pandas().to_csv(tmp_path / "a.csv", **options)
    found = read(open_rows(str(tmp_path / "a.csv"), cache_dir=tmp_path))
    assert found == [{INDEX: str(i), **row} for i, row in enumerate(rows)]


def media_table():
    """One row with pictures and sound that cannot be decoded, also within its messages."""
    blob = {"bytes": b"not a picture", "path": None}
    features = datasets.Features({
        "messages": datasets.List({"role": datasets.Value("string"), "image": datasets.Image()}),
        "image": datasets.Image(),
        "pictures": datasets.List(datasets.Image()),
        "voice": datasets.Audio(),
        "film": datasets.Video(),
        "paper": datasets.Pdf(),
        "nothing": datasets.Image(),
        "notes": datasets.Json(),
    })  # fmt: skip
    row = {
        "messages": [{"role": "user", "image": blob}],
        "pictures": [blob],
        "notes": '{"a": [1]}',
        **dict.fromkeys(["image", "voice", "film", "paper"], blob),
    }
    return pa.Table.from_pylist([row], schema=features.arrow_schema)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "saved as numpy"])
def test_pictures_and_sound_are_not_decoded(kind, tmp_path):
    table = media_table()
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        file = tmp_path / "a.arrow"
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        dataset = datasets.Dataset.from_file(str(file))
        if kind == "saved as numpy":
            dataset = dataset.with_format("numpy", columns=["image"])
        if kind != "arrow":
            dataset.save_to_disk(path)
    rows = open_rows(str(path), cache_dir=tmp_path / "cache")
    assert rows.parts[0].rows.features["image"] == datasets.Image(decode=False)
    blob = {"bytes": b"not a picture"}
    expected = {**dict.fromkeys(["image", "voice", "film", "paper"], blob), "pictures": [blob]}
    message = {"role": "user", "image": blob}
    assert rows[0] == {"messages": [message], **expected, "nothing": None, "notes": {"a": [1]}}


def test_a_damaged_row_of_a_table(tmp_path):
    prompts = pa.StringArray.from_buffers(
        3, pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xff\xfec")
    )
    pyarrow.parquet.write_table(pa.table({"prompt": prompts}), tmp_path / "a.parquet")
    # A date that Python does not have.
    dates = pa.array([0, 10**15, 0], pa.timestamp("s"))
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("prompt", dates.type)])) as writer:
        writer.write_table(pa.table({"prompt": dates}))
    for name in ("a.parquet", "a.arrow"):
        rows = open_rows(str(tmp_path / name), cache_dir=tmp_path / "cache")
        with pytest.raises(UserError, match="the row cannot be read"):
            rows[1]
        assert list(rows[0]) == list(rows[2]) == ["prompt"]


def test_an_arrow_file_with_wrong_offsets(tmp_path):
    """Reading such a row would end the process."""
    table = pa.table({"prompt": ["a" * 9, "b" * 9]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    offsets = np.array([0, 9, 18], np.int32)
    content = (tmp_path / "a.arrow").read_bytes()
    assert content.count(offsets.tobytes()) == 1
    offsets[1] = 2**30
    broken = content.replace(np.array([0, 9, 18], np.int32).tobytes(), offsets.tobytes())
    (tmp_path / "a.arrow").write_bytes(broken)
    with pytest.raises(UserError, match="cannot read .*a.arrow"):
        open_rows(str(tmp_path / "a.arrow"))


def test_structs_lose_the_nulls_of_other_rows(tmp_path):
    rows = [
        {"m": [{"role": "a", "arguments": {"x": 1}}]},
        {"m": [{"role": "b", "name": "n"}]},
        {"m": None},
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(open_rows(str(tmp_path / "a.parquet"), cache_dir=tmp_path)) == rows


def test_the_fingerprint_is_the_content(tmp_path):
    one, two = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    rows = open_rows(one)
    assert rows.fingerprint == open_rows(two).fingerprint == open_rows(one).fingerprint
    assert (
        len(
            {
                rows.fingerprint,
                limit(rows, 4).fingerprint,
                subset(rows, [1, 0, 2, 3, 4]).fingerprint,
            }
        )
        == 3
    )
    date = os.stat(one)
    write(tmp_path / "a.jsonl", LINES.replace("é 3", "è 3"))
    os.utime(one, ns=(date.st_atime_ns, date.st_mtime_ns))
    changed = open_rows(one)
    assert changed.fingerprint != rows.fingerprint
    assert changed[3]["prompt"] == "è 3"


@pytest.mark.parametrize("text", ['{"prompt": "b"}', "{}"], ids=["rewritten", "truncated"])
def test_a_file_that_changes_while_it_is_read(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}')
    rows = open_rows(str(path))
    path.write_text(text)
    with pytest.raises(UserError, match="was changed during the run"):
        rows[0]


def test_a_changed_file_is_converted_anew(tmp_path):
    path = write(tmp_path / "a.csv", "q\nold\n")
    assert open_rows(path, cache_dir=tmp_path)[0] == {"q": "old"}
    write(tmp_path / "a.csv", "q\nnew\n")
    assert open_rows(path, cache_dir=tmp_path)[0] == {"q": "new"}


def read_ten_times(rows: Rows):
    return [read(rows) for _ in range(10)]


def test_forked_workers_share_the_open_file(tmp_path):
    rows = open_rows(write(tmp_path / "a.jsonl", "".join(f'{{"a": {i}}}\n' for i in range(1000))))
    assert rows[0] == {"a": 0}  # the file is open before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert (
            pool.map(read_ten_times, [rows, rows]) == [[[{"a": i} for i in range(1000)]] * 10] * 2
        )


def test_globs_and_directories(tmp_path):
    for name in ("b", "a", "sub/c"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"a": name}))
    write(tmp_path / "readme.md", "# no data")
    write(tmp_path / "dataset_info.json", "{}")
    rows = open_rows(str(tmp_path / "*.jsonl"))
    assert [row["a"] for row in read(rows)] == ["a", "b"]
    rows = open_rows(str(tmp_path))
    assert [row["a"] for row in read(rows)] == ["a", "b", "sub/c"]
    assert rows.where(2) == f"{tmp_path}/sub/c.jsonl line 1"
    assert rows.counts() == [(str(tmp_path), 3)]


def test_hidden_copies_in_a_directory_are_no_data(tmp_path):
    """But the directory itself may lie in one that is hidden."""
    folder = tmp_path / ".cache"
    for name in ("a", ".ipynb_checkpoints/a-checkpoint", "._a", "sub/.old/b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / f"{name}.jsonl", json.dumps({"a": name}))
    assert [row["a"] for row in read(open_rows(str(folder)))] == ["a"]


def names_read(spec):
    return [row["a"] for row in read(open_rows(str(spec)))]


def test_links_to_directories_are_followed_once(tmp_path):
    """Not in circles, not back up, and each directory by its own name."""
    for name in ("in/b", "in/sub/c", "out/a", "out/deep/d", "beside"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / f"{name}.jsonl", json.dumps({"a": name}))
    links = {
        "in/again": "sub",
        "in/circle": ".",
        "in/sub/up": "../..",
        "in/z": "../out",
        "out/back": "../in",
    }
    for link, target in (links | {"out/deep/own": ".", "in/file.jsonl": "../beside.jsonl"}).items():
        (tmp_path / link).symlink_to(target)
    assert names_read(tmp_path / "in") == ["in/b", "beside", "in/sub/c", "out/a", "out/deep/d"]
    (tmp_path / "link").symlink_to("in")
    assert names_read(tmp_path / "link") == names_read(tmp_path / "in")
    assert sorted(names_read(tmp_path / "in" / "**" / "*.jsonl")) == sorted(
        names_read(tmp_path / "in")
    )
    assert names_read(tmp_path / "in" / "*" / "c.jsonl") == ["in/sub/c"]


@pytest.mark.parametrize("spec", ["rows", "rows/*.jsonl", "rows/**", "rows/c.jsonl"])
def test_a_link_that_leads_nowhere_is_refused(spec, tmp_path):
    """What git-annex and DVC leave where the content was not fetched."""
    write(tmp_path / "rows" / "a.jsonl", json.dumps({"a": 1}))
    (tmp_path / "rows" / "c.jsonl").symlink_to("../annex/c")
    with pytest.raises(
        UserError, match=r"rows/c.jsonl` \(`data.train`\) is a link to `../annex/c`, which is not"
    ):
        open_rows(str(tmp_path / spec))


def test_a_link_of_another_split_may_lead_nowhere(tmp_path):
    write(tmp_path / "rows" / "train.jsonl", json.dumps({"a": 1}))
    (tmp_path / "rows" / "test.jsonl").symlink_to("../annex/test")
    assert names_read(tmp_path / "rows") == [1]
    with pytest.raises(UserError, match=r"rows/test.jsonl` \(`data.train`\) is a link to"):
        open_rows(str(tmp_path / "rows"), split="test")


def test_files_that_are_not_read_are_told(tmp_path):
    write(tmp_path / "rows" / "a.jsonl", json.dumps({"a": 1}))
    for name in (
        "README.md",
        "LICENSE",
        "license.txt",
        "load.py",
        "config.yaml",
        "dataset_info.json",
        ".git",
        "a.png",
    ):
        write(tmp_path / "rows" / name, "{}")
    with log_lines() as lines:
        assert names_read(tmp_path / "rows") == [1]
    assert lines == []
    write(tmp_path / "rows" / "more" / "b.jsonl.xz")
    write(tmp_path / "rows" / "c.zip")
    (tmp_path / "rows" / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "rows" / "pipe.jsonl")
    with log_lines() as lines:
        assert names_read(tmp_path / "rows") == [1]
    assert lines == [f"{tmp_path / 'rows'}: not read: c.zip, gone, more/b.jsonl.xz, pipe.jsonl"]
    for i in range(3000):
        write(tmp_path / "rows" / f"{i:04}.bin")
    with log_lines() as lines:
        names_read(tmp_path / "rows")
    assert lines[0].endswith(
        "not read: 0000.bin, 0001.bin, 0002.bin, 0003.bin, 0004.bin and 2,999 more"
    )


def test_directories_that_a_glob_does_not_read_are_told(tmp_path):
    write(tmp_path / "rows" / "a.jsonl", json.dumps({"a": 1}))
    write(tmp_path / "rows" / "more" / "b.jsonl", json.dumps({"a": 2}))
    with log_lines() as lines:
        assert names_read(tmp_path / "rows" / "*") == [1]
        assert names_read(tmp_path / "rows" / "**") == [1, 2]
    assert lines == [f"{tmp_path}/rows/*: not read: {tmp_path}/rows/more"]


def test_a_directory_that_cannot_be_read(tmp_path, monkeypatch):
    """Refused where it is the one that was named; below it (`lost+found` of a disk, say) it is
    told.
    """
    write(tmp_path / "rows" / "a.jsonl", json.dumps({"a": 1}))
    (tmp_path / "rows" / "sub").mkdir()
    scan = os.scandir

    def refuse_sub(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse_sub)
    with log_lines() as lines:
        assert names_read(tmp_path / "rows") == [1]
    refusal = (
        f"cannot read `{tmp_path}/rows/sub` (`data.train`): Permission denied; see the permissions"
    )
    assert lines == [refusal]
    with pytest.raises(UserError, match=re.escape(refusal)):
        open_rows(str(tmp_path / "rows" / "sub"))


def test_directories_with_splits(tmp_path):
    for name in ("data/train-00000-of-00001", "data/test-00000-of-00001", "dev/x", "gsm8k_train"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"a": name}))
    train, validation = (
        read(open_rows(str(tmp_path), split=split)) for split in ("train", "validation")
    )
    assert train == [{"a": "data/train-00000-of-00001"}, {"a": "gsm8k_train"}]
    assert validation == [{"a": "dev/x"}]


def test_saved_data_sets(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([3, 1])}).save_to_disk(
        tmp_path / "two"
    )
    assert read(open_rows(str(tmp_path / "one"))) == ROWS
    train, test = (open_rows(str(tmp_path / "two"), split=split) for split in ("train", "test"))
    assert (read(train), read(test)) == (ROWS, [ROWS[3], ROWS[1]])
    assert train.fingerprint != test.fingerprint
    with pytest.raises(
        UserError, match="no split validation but train, test; set `data.validation`"
    ):
        open_rows(str(tmp_path / "two"), split="validation", key="data.validation")
    assert read(open_rows([{"path": str(tmp_path / "two"), "split": "test"}])) == [ROWS[3], ROWS[1]]


def test_builtin_tasks():
    rows = open_rows(
        "builtin:sums", split="test", builtin=lambda name, split: [{"name": name, "split": split}]
    )
    assert read(rows) == [{"name": "sums", "split": "test"}]
    assert rows.where(0) == "builtin:sums row 0"


def mixture(tmp_path, seed=0, weights=(2.5, 0.4, 1)):
    paths = [
        write(tmp_path / f"{name}.jsonl", "".join(f'{{"{name}": {i}}}\n' for i in range(10)))
        for name in "abc"
    ]
    spec = [
        {"path": paths[0], "weight": weights[0]},
        {"path": paths[1], "weight": weights[1], "split": None},
        paths[2],
    ]
    return open_rows(spec, seed=seed)


def test_weights_multiply_rows(tmp_path):
    rows = mixture(tmp_path)
    assert [(name[-7:], count) for name, count in rows.counts()] == [
        ("a.jsonl", 25),
        ("b.jsonl", 4),
        ("c.jsonl", 10),
    ]
    first = [row["a"] for row in read(rows)[:25]]
    assert first[:20] == [*range(10), *range(10)]
    assert len(set(first[20:])) == 5
    assert rows.where(29).endswith("c.jsonl line 1")
    assert rows.source_ids().tolist() == [0] * 25 + [1] * 4 + [2] * 10
    assert [count for _, count in subset(rows, [38, 0, 1]).counts()] == [2, 0, 1]


def test_a_mixture_depends_on_its_seed_only(tmp_path):
    rows = mixture(tmp_path, seed=1)
    assert read(rows) == read(mixture(tmp_path, seed=1))
    assert rows.fingerprint == mixture(tmp_path, seed=1).fingerprint
    assert rows.fingerprint != mixture(tmp_path, seed=2).fingerprint
    assert rows.fingerprint != mixture(tmp_path, seed=1, weights=(2.5, 0.5, 1)).fingerprint


@pytest.mark.parametrize(("size", "count"), [(0.2, 20), (7, 7), (7.0, 7), (1, 1), (0.014, 1)])
def test_split(size, count):
    train, validation = split_rows(100, size, seed=3)
    assert len(validation) == count
    assert sorted([*train, *validation]) == list(range(100))
    assert np.array_equal(validation, split_rows(100, size, seed=3)[1])
    assert not np.array_equal(validation, split_rows(100, size, seed=4)[1])


@pytest.mark.parametrize(("rows", "share", "count"), [(4, 0.1, 1), (2, 0.01, 1), (4, 0.99, 3)])
def test_a_share_of_few_rows_leaves_a_row_on_each_side(rows, share, count):
    train, validation = split_rows(rows, share, seed=3)
    assert (len(train), len(validation)) == (rows - count, count)


def test_copies_of_a_row_stay_on_one_side(tmp_path):
    rows = mixture(tmp_path)
    train, validation = (
        subset(rows, chosen) for chosen in split_rows(len(rows), 0.5, 0, rows.origins)
    )
    assert not {str(row) for row in read(train)} & {str(row) for row in read(validation)}
    assert len({str(row) for row in read(validation)}) == len(validation) == 12
    assert len({str(row) for row in read(train)}) == 12 < len(train)


def test_limit(tmp_path):
    rows = open_rows(write(tmp_path / "a.jsonl"))
    assert read(limit(rows, 2)) == ROWS[:2]
    assert read(limit(rows, 99)) == ROWS
    assert limit(subset(rows, [4, 3, 2]), 2).where(1).endswith("line 4")


def test_limit_takes_of_each_member_in_proportion(tmp_path):
    rows = mixture(tmp_path)  # 25 + 4 + 10
    for count, expected in ((8, [5, 1, 2]), (39, [25, 4, 10]), (1, [1, 0, 0])):
        few = limit(rows, count)
        assert [n for _, n in few.counts()] == expected and len(few) == count
        assert read(few) == read(limit(mixture(tmp_path), count))
    assert read(limit(rows, 8))[:5] == read(rows)[:5]
    assert read(first_rows(rows, 8)) == read(limit(rows, 8)) and read(
        first_rows(rows, None)
    ) == read(rows)


def test_a_mixture_of_every_kind(tmp_path, monkeypatch):
    """File, glob, directory, saved data set and hub id, split by seed: every row of each once, and
    where it stands.
    """
    cache_hub_data(tmp_path / "hub", monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in (
        "file.jsonl",
        "glob/1.jsonl",
        "glob/2.jsonl",
        "folder/train.jsonl",
        "folder/test.jsonl",
    ):
        write(tmp_path / name)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    places = ["file.jsonl", "glob/*.jsonl", "folder", "saved"]
    rows = open_rows(
        [{"path": str(tmp_path / name), "weight": 2.0} for name in places] + ["me/tiny"]
    )
    n = len(ROWS)
    assert [count for _, count in rows.counts()] == [2 * n, 4 * n, 2 * n, 2 * n, n]
    train, validation = (
        subset(rows, chosen) for chosen in split_rows(len(rows), 0.2, 1, rows.origins)
    )
    assert not set(train.origins) & set(validation.origins)
    assert sorted({*train.origins, *validation.origins}) == list(range(6 * n))
    members = by_source(rows)
    assert [len(member) for member in members.values()] == [2 * n, 4 * n, 2 * n, 2 * n, n]
    assert members[4].name == "me/tiny" and read(members[4]) == ROWS
    assert [rows.source_of(i) for i in (0, 2 * n, 11 * n - 1)] == [0, 1, 4]


def cache_hub_data(root, monkeypatch):
    """What `datasets` leaves in its cache after it loaded `me/tiny` from the hub."""
    folder = root / "me___tiny" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    write_as(folder / "tiny-train.arrow", ".arrow")
    split = {"name": "train", "num_examples": len(ROWS), "dataset_name": "tiny"}
    info = {
        "config_name": "default",
        "dataset_name": "tiny",
        "version": "0.0.0",
        "splits": {"train": split},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_ids_come_from_the_cache_when_the_hub_is_away(offline, tmp_path, monkeypatch, caplog):
    cache_hub_data(tmp_path, monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    assert read(open_rows("me/tiny")) == ROWS
    assert ("HF_HUB_OFFLINE is set" if offline else "Name or service not known") in caplog.text
    first, second = (open_rows("me/tiny", split=f"train[{part}]") for part in (":2", "2:4"))
    assert read(first) + read(second) == ROWS[:4]
    assert first.fingerprint != second.fingerprint
    with pytest.raises(UserError, match="'me/tiny'.*split.*data.test"):
        open_rows("me/tiny", split="test", key="data.test")


def refuse(*_, **__):
    raise OSError("Name or service not known")


def test_hub_ids_fail_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.1)
    for answer, words in (
        (refuse, "Name or service not known"),
        (lambda *_, **__: time.sleep(5), "no answer within"),
    ):
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", answer)
        start = time.monotonic()
        with pytest.raises(UserError) as caught:
            open_rows("no-such/data-set", key="data.train")
        assert time.monotonic() - start < 2
        assert "\n" not in str(caught.value)
        for word in (
            "cannot get data set 'no-such/data-set'",
            words,
            "give a local file or directory in `data.train`",
        ):
            assert word in str(caught.value)


def test_a_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "me" / "tiny")
    with pytest.raises(UserError, match="name ends in none of"):
        open_rows("me/tiny")
