"""Every setting with wrong values, and pairs of settings: a run is planned, or refused in one line.

A case is `fit` on a tiny model, in this process, up to its first step. `python
tests/cli/test_every_setting.py` runs all cases and says how many there are; the test takes a part
of them, drawn by a seed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import typing
from argparse import Action
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from running import arguments, chat_rows, write_rows
from tiny import save_tiny

from lit_sft import errors
from lit_sft import trainer as trainer_module
from lit_sft.cli import main as main_module
from lit_sft.cli.parser import OneLineParser, known_keys
from lit_sft.lightning_internals import option_type, parser_actions

WRONG = {
    "null": "null",
    "keys": '{"a": {"b": 1}}',
    "text": "nonsense",
    "negative": "-1",
    "zero": "0",
    "fraction": "0.3",
    "huge": "1000000000000",
    "empty": "",
    "list": "[1, null]",
}
BATCH = 24
"""Cases of one child; what a case leaves in its process is seen by the later ones only."""
SECONDS = 60
"""A case that takes longer hangs."""
SAMPLE = 48
"""Cases of the test."""
PLANNED = 70
"""Exit code of a case that reached its first step."""
BASE = {
    "data__packing": False,
    "data__max_samples": 8,
    "data__val_size": 2,
    "data__global_batch_size": 4,
    "model__lora": {"r": 2},
    "model__evaluation": {"num_samples": 2},
    "early_stopping": {"patience": 2},
}


class Planned(Callback):
    """Ends the run where its first step would begin."""

    def on_train_start(self, trainer, pl_module):
        raise SystemExit(PLANNED)


def launch(*args: Any, **kwargs: Any) -> None:
    """Takes the place of the start of further ranks."""
    raise SystemExit(PLANNED)


def fit_actions() -> list[Action]:
    """The options of `fit`."""
    with tempfile.TemporaryFile("w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        argv = sys.argv
        try:
            sys.argv = ["lit_sft", "fit", "--print_config"]
            main_module.main(["fit", "--print_config"])
        except SystemExit:
            pass
        finally:
            sys.stdout, sys.argv = before, argv
    return parser_actions(OneLineParser.commands["fit"])


def all_keys() -> list[str]:
    fit_actions()
    keys = set(known_keys(OneLineParser.commands["fit"]))
    return sorted(keys - {"config", "print_config", "help"})


def single_cases() -> list[list[str]]:
    """Each key with each wrong value."""
    return [[f"--{key}={value}"] for key in all_keys() for value in WRONG.values()]


def choices() -> dict[str, list[str]]:
    """Settings of few values -> the values as text."""
    found = {}
    for action in fit_actions():
        kind = option_type(action)
        values = _values(kind)
        if len(values) > 1 and not action.dest.endswith(".help"):
            found[action.dest] = list(dict.fromkeys(values))
    return found


def _values(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if typing.get_origin(kind) is typing.Literal:
        return [
            json.dumps(value) if isinstance(value, bool) else str(value)
            for value in typing.get_args(kind)
        ]
    values = []
    for each in typing.get_args(kind):
        if each is bool or typing.get_origin(each) is typing.Literal:
            values += _values(each)
        elif each is type(None):
            values.append("null")
    # Of other types, such as a number or null, there are no few values.
    return values if len(values) > 1 else []


def pairwise(options: dict[str, list[str]], seed: int = 0) -> list[dict[str, str]]:
    """Rows in which every two values of different settings meet at least once (greedy)."""
    draw = random.Random(seed)
    pairs = set()
    for first, second in itertools.combinations(options, 2):
        for one, other in itertools.product(options[first], options[second]):
            pairs.add(((first, one), (second, other)))
    order = list(options)
    rank = {key: position for position, key in enumerate(order)}
    rows = []
    while pairs:
        row = dict(min(pairs))
        for key in draw.sample(order, len(order)):
            if key not in row:
                row[key] = max(options[key], key=lambda value: _news(key, value, row, pairs, rank))
        rows.append(row)
        pairs -= set(itertools.combinations(sorted(row.items(), key=lambda item: rank[item[0]]), 2))
    return rows


def _news(key: str, value: str, row: dict[str, str], pairs: set, rank: dict[str, int]) -> int:
    """How many pairs a value adds to a row."""
    count = 0
    for item in row.items():
        pair = sorted([(key, value), item], key=lambda each: rank[each[0]])
        count += tuple(pair) in pairs
    return count


def pair_cases(place: tuple[str, str]) -> list[list[str]]:
    """Rows of settings that meet in pairs; values that are refused alone are left out."""
    options = choices()
    alone = [(key, value) for key, values in options.items() for value in values]
    results = outcomes([[f"--{key}={value}"] for key, value in alone], place)
    for (key, value), result in zip(alone, results, strict=True):
        if result != "planned":
            options[key].remove(value)
    options = {key: values for key, values in options.items() if len(values) > 1}
    return [[f"--{key}={value}" for key, value in row.items()] for row in pairwise(options)]


# ------------------------------------------------------------------ running


def outcomes(cases: list[list[str]], place: tuple[str, str]) -> list[str]:
    """What became of each case: `planned`, `refused`, or what is wrong."""
    # The children of a process that has imported everything import nothing.
    _warm_up(place)
    results = []
    for start in range(0, len(cases), BATCH):
        results += _of_batch(cases[start : start + BATCH], place)
    return results


def _warm_up(place: tuple[str, str]) -> None:
    """Runs the case without a wrong value in this process."""
    make = trainer_module.run_callbacks
    main_module.run_callbacks = lambda *args: [*make(*args), Planned()]
    argv = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        code = _run([], place, Path(folder))
    main_module.run_callbacks, sys.argv = make, argv
    assert code == PLANNED


def _of_batch(cases: list[list[str]], place: tuple[str, str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            try:
                _run_batch(cases, place, Path(folder))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        results = [path.read_text() for path in sorted(Path(folder).glob("case*.result"))]
    if len(results) < len(cases):
        # A signal ended the child, and the cases behind this one were not run.
        results.append("the process was killed")
        results += _of_batch(cases[len(results) :], place)
    return results[: len(cases)]


def _run_batch(cases: list[list[str]], place: tuple[str, str], folder: Path) -> None:
    make = trainer_module.run_callbacks
    main_module.run_callbacks = lambda *args: [*make(*args), Planned()]
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    _SubprocessScriptLauncher.launch = launch
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for number, case in enumerate(cases):
        said = folder / f"case{number:03d}.said"
        output = said.open("w", buffering=1)
        sys.stdout = sys.stderr = output
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        errors._reported = None
        signal.alarm(SECONDS)
        code = _run(case, place, folder)
        signal.alarm(0)
        output.flush()
        (folder / f"case{number:03d}.result").write_text(_judge(code, said.read_text()))


def _run(case: list[str], place: tuple[str, str], folder: Path) -> Any:
    base = {**BASE, "data__cache_dir": f"{Path(place[1]).parent}/cache"}
    args = ["fit", *arguments(*place, folder / "runs", **base), *case]
    sys.argv = ["lit_sft", *args]
    try:
        main_module.main(args)
    except SystemExit as left:
        return left.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return 0


def _judge(code: Any, said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said or "not foreseen" in said:
        return f"a traceback: {lines[-1:] or said[-300:]}"
    if code in (0, PLANNED) and not lines:
        return "planned"
    if code in (1, 2) and len(lines) == 1:
        return "refused"
    return f"exit code {code}: {said[-300:]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("every"))


def make_place(folder: Path) -> tuple[str, str]:
    return save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(16))


def wrong(cases: list[list[str]], place: tuple[str, str]) -> dict[str, str]:
    """The cases that neither end in a plan nor in one line."""
    results = zip(cases, outcomes(cases, place), strict=True)
    return {
        " ".join(case): result for case, result in results if result not in ("planned", "refused")
    }


def test_rows_of_pairs_hold_all_pairs():
    options = {"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["1", "2"], "d": ["1", "2", "3"]}
    rows = pairwise(options)
    for first, second in itertools.combinations(options, 2):
        for pair in itertools.product(options[first], options[second]):
            assert any((row[first], row[second]) == pair for row in rows)
    assert len(rows) <= 14


def test_some_wrong_values(place):
    assert wrong(random.Random(0).sample(single_cases(), SAMPLE), place) == {}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder))
        singles, pairs = single_cases(), pair_cases(place)
        pattern = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
        cases = [case for case in [*singles, *pairs] if pattern.search(" ".join(case))]
        found = wrong(cases, place)
    for case, result in found.items():
        print(f"{case}\n    {result}")
    print(
        f"{len(singles)} wrong values, {len(pairs)} rows of pairs; {len(cases)} run, {len(found)} wrong"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
    main()
