import pickle

import pytest

from lit_sft.data.cache import ExampleCache, cache_key, to_block, write_cache
from lit_sft.types import Example

EXAMPLES = [
    Example([1, 2, 3], [0, 1, 1], row=4),
    Example([9], [1], row=5, part=1),
    Example([7, 8], [0, 1], row=6),
]


def blocks():
    return [to_block(EXAMPLES[:2]), to_block([]), to_block(EXAMPLES[2:])]


def read(cache):
    return [
        (ids.tolist(), mask.tolist(), row)
        for ids, mask, row in (cache[i] for i in range(len(cache)))
    ]


def test_what_is_written_is_read(tmp_path):
    cache = write_cache(tmp_path / "c", blocks(), {"rows_read": 3})
    assert read(cache) == [([1, 2, 3], [0, 1, 1], 4), ([9], [1], 5), ([7, 8], [0, 1], 6)]
    assert cache.lengths.tolist() == [3, 1, 2]
    assert cache.parts.tolist() == [0, 1, 0]
    assert cache.meta == {"rows_read": 3}
    assert read(pickle.loads(pickle.dumps(cache))) == read(cache)


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    def broken():
        yield to_block(EXAMPLES[:1])
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_cache(tmp_path / "c", broken(), {})
    assert list(tmp_path.iterdir()) == []


def test_the_second_writer_keeps_the_first_result(tmp_path):
    write_cache(tmp_path / "c", blocks(), {})
    again = write_cache(tmp_path / "c", blocks(), {})
    assert len(again) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_truncated_file_is_noticed(tmp_path):
    write_cache(tmp_path / "c", blocks(), {})
    with (tmp_path / "c" / "input_ids.i32").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(OSError, match="input_ids"):
        ExampleCache(tmp_path / "c")


def test_empty(tmp_path):
    assert len(write_cache(tmp_path / "c", [], {})) == 0


def test_key_depends_on_every_part():
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1}) != cache_key({"a": 1, "b": 3})
