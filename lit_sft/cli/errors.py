"""What stands between the user's words and the parser: recipes by name, the run's own config, errors in one line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar, NamedTuple, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lit_sft import errors
from lit_sft.checkpoint import find
from lit_sft.errors import UserError
from lit_sft.run import folder as run_folder

UNKNOWN_KEY = re.compile(
    r"(?:does not accept option|[Oo]ption|[Kk]ey) [\"']([\w.]+)[\"'](?: is not| .*not expected|$)"
    r"|unrecognized arguments: --?([\w.]+)"
)
"""How jsonargparse says that it does not know a key."""
WRONG_VALUE = re.compile(r"Parser key [\"']([\w.]+)[\"']: ?(.*)$")
WRONG_CLASS = re.compile(r"expects a function or a callable class: (.*?)\.? Got value")
NOT_INSTALLED = re.compile(r"^No module named '(\w+)'$")
NOT_MET = re.compile(r"class_path '[\w.]*?(\w+)':\s+(?:Requirement '([\w-]+)[^']*' not met|No module named '(\w+)')")
"""How jsonargparse says that a class, when it is made, misses a package."""
GIVEN = re.compile(r".*(?:Got value|Given value|dot import path string): (.*)$")
TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[([^]]*)\]")
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "keys with values",
    "NoneType": "null",
}
"""Types as people call them, in the order in which a message names them."""
EVALUATING = ("validate", "test", "predict", "export")


class Written(NamedTuple):
    """A key that the user wrote."""

    key: str
    """Dotted."""
    value: Any
    origin: str
    """A file, or `command line`."""


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, with the file and the nearest right key for a wrong one."""

    commands: ClassVar[Mapping[str, LightningArgumentParser]] = {}
    """The parsers of all commands; an error may come from one that only knows a part of the keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # an abbreviation may be the misspelling of another key

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse does it, and refuses what that takes without a word: a null, a value in place of keys."""
        config = super().parse_args(*args, **kwargs)
        if (command := config.get("subcommand")) is not None:
            values = {item.key: item for item in written(sys.argv[1:])}
            for action in self.commands[command]._actions:
                if action.dest in values and (problem := _problem(action, values[action.dest], config[command])):
                    self.error(f"{action.dest} ({values[action.dest].origin}): {problem}")
        return config

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        args = sys.argv[1:]
        known = set(known_keys(self.commands.get(args[0] if args else "", self), written(args)))
        rank_zero_only(print)(errors.redact(f"error: {one_line(message, args, known)}"), file=sys.stderr)
        sys.exit(2)


def _problem(action: Any, item: Written, config: Any) -> str | None:
    """What is wrong with a written value that jsonargparse has let pass."""
    kind = getattr(action, "_typehint", None)
    if "-->" in action.option_strings[0]:
        source = action.option_strings[0].split(" -->")[0]
        return None if item.value == config.get(item.key) else f"follows from {source}: leave it out"
    if kind is None and not isinstance(item.value, Mapping | str):  # a group; a text is a file of it
        return f"got {_shown(item.value)}, expected keys with values"
    if kind is not None and item.value is None and type(None) not in typing.get_args(kind):
        kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else [kind]
        return f"got null, expected {_expected(' '.join(map(str, kinds)))}"
    return None


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def one_line(message: str, args: list[str], known: set[str]) -> str:
    """A parser's message in one line.

    Args:
        message: Of jsonargparse.
        args: The command line, to tell where a wrong key stands.
        known: All right keys, dotted.
    """
    text = " ".join(message.split())
    if match := UNKNOWN_KEY.search(text):
        key, origin = _place(match[1] or match[2], args, known)
        return f"unknown key {key} ({origin})" + _suggestion(key, known)
    if match := WRONG_VALUE.search(text):
        given = GIVEN.search(match[2])
        key, origin = _place(match[1], args, set(), given[1] if given else None)
        if reason := WRONG_CLASS.search(match[2]):
            missing = NOT_INSTALLED.search(reason[1])
            remedy = f": `pip install {missing[1]}`, or choose another class" if missing else ""
            return f"{key} ({origin}): {reason[1]}{remedy}"
        if given is None:
            return f"{key} ({origin}): {match[2].split(' - ')[0]}"
        return f"{key} ({origin}): got {given[1]}, expected {_expected(match[2])}"
    if text.startswith(("Problems parsing config", "Unexpected config")):
        files = _config_files(args)
        broken = [file for file in files if not isinstance(_read_yaml(file), Mapping)] or files
        return f"--config {' or '.join(broken)}: {text.strip(' :')}; expected keys with values, as --print_config shows"
    return f"{text}; keys begin with --" if text.startswith("unrecognized arguments") else text


def missing_package(error: Exception, args: list[str]) -> Exception:
    """The error itself; or in one line, that a class which the command line names needs a package."""
    if (match := NOT_MET.search(str(error))) is None:
        return error
    name, package = match[1], match[2] or match[3]
    named = [item for item in written(args) if str(item.value).rpartition(".")[2] == name]
    place = f"{named[-1].key.removesuffix('.class_path')} ({named[-1].origin}): " if named else ""
    return UserError(f"{place}{name} needs {package}: `pip install {package}`, or choose another class")


def _expected(text: str) -> str:
    """The types that a message names, in words."""
    listed = re.search(r"Subtypes: \[(.*)\] Errors", text)
    text = re.sub(r"\b(list|dict)\[.*?\]+", r"<class '\1'>", listed[1] if listed else text)
    names: list[str] = []
    for name, choices in TYPE.findall(text):
        if choices:
            names += choices.replace("'", "").split(", ")
        elif name in WORDS or "lit_sft" in text:  # options of ours are written as keys
            names.append(WORDS.get(name, WORDS["dict"]))
    # Python caches unions, so that the order of their types depends on what was imported before
    ranks = list(WORDS.values())
    names = sorted(dict.fromkeys(names), key=lambda name: ranks.index(name) if name in ranks else -1)
    return _either(names) or "a class, e.g. torch.optim.AdamW"


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _suggestion(key: str, known: set[str]) -> str:
    """The nearest right key: among those beside it, below them, anywhere by its last part, or by the whole of it."""
    parent, _, name = key.rpartition(".")
    inside = f"{parent}." if parent else ""
    beside = {k for k in known if k.rpartition(".")[0] == parent}
    below = {k for k in known if k.startswith(inside)}
    for keys, cutoff in ((beside, 0.5), (below, 0.6), (known, 0.8)):
        names = difflib.get_close_matches(name, {k.rpartition(".")[2] for k in keys}, n=1, cutoff=cutoff)
        same = [k for k in keys if k.rpartition(".")[2] in names]
        if best := difflib.get_close_matches(key, same, n=1, cutoff=0):
            return f": did you mean {best[0]}?"
    best = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f": did you mean {best[0]}?" if best else ": `--print_config` shows all keys"


def _place(key: str, args: list[str], known: set[str], given: str | None = None) -> tuple[str, str]:
    """The whole dotted key that the parser named by its end, and where it was written.

    Args:
        key: As the parser names it.
        args: The command line.
        known: Keys that cannot be meant.
        given: The value that the parser complains about.
    """
    places = [item for item in written(args) if item.key == key or item.key.endswith(f".{key}")]
    places = [item for item in places if item.key == key or item.key not in known]
    exact = [item for item in places if _shown(item.value) == given]
    last = (exact or places or [Written(key, None, "command line")])[-1]
    return last.key, last.origin


def known_keys(parser: LightningArgumentParser, given: Iterable[Written] = ()) -> Iterator[str]:
    """All keys of a parser, those within optional groups (`model.lora.r`) and of the chosen classes too."""
    classes = {item.key.removesuffix(".class_path"): item.value for item in given if isinstance(item.value, str)}
    for action in parser._actions:
        if f"--{action.dest}" not in action.option_strings or action.dest.endswith(".help"):
            continue
        yield action.dest
        for kind in typing.get_args(getattr(action, "_typehint", None)):
            if dataclasses.is_dataclass(kind):
                yield from (f"{action.dest}.{field.name}" for field in dataclasses.fields(kind))
        if isinstance(action.default, Mapping) and "class_path" in action.default:
            yield from (f"{action.dest}.class_path", f"{action.dest}.init_args")
            path = str(classes.get(action.dest, action.default["class_path"]))
            if isinstance(chosen := locate(path) or locate(f"torch.optim.{path}"), type):
                yield from (f"{action.dest}.init_args.{name}" for name in inspect.signature(chosen).parameters)


def written(args: list[str]) -> list[Written]:
    """All keys that the user wrote, in files and on the command line; the later one wins."""
    items: list[Written] = []
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        flag, equals, value = arg.partition("=")
        if arg in ("--config", "-c"):
            items += _flatten(_read_yaml(following), following)
        elif flag.startswith("--"):
            tree = {flag[2:]: _parse_yaml(value if equals else following)}
            items += _flatten(tree, "command line")
    return items


def _flatten(tree: Any, origin: str, prefix: str = "") -> Iterator[Written]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield Written(f"{prefix}{key}", value, origin)
            yield from _flatten(value, origin, f"{prefix}{key}.")


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a text that looks like a date
        return text


def _read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError):
        return None


def _config_files(args: list[str]) -> list[str]:
    return [value for flag, value in zip(args, args[1:], strict=False) if flag in ("--config", "-c")]


def packaged_config(name: str) -> str | None:
    """The file of a recipe that comes with the package (`--config demo`)."""
    for folder in (resources.files("lit_sft").joinpath("configs"), Path(__file__).parents[2] / "configs"):
        path = Path(str(folder)) / f"{name}.yaml"
        if path.is_file():
            return str(path)
    return None


def expand_arguments(args: list[str]) -> list[str]:
    """The command line with recipes in place of their names, and the run's config.yaml below everything else.

    Commands that evaluate a checkpoint read the config.yaml of the run it lies in, before `--config`, so it is weaker.

    Raises:
        UserError: A checkpoint or a file is not there.
    """
    flags = ("--config=", "--ckpt_path=")
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith(flags) else [arg])]
    for position, (flag, value) in enumerate(zip(args, args[1:], strict=False)):
        if flag in ("--config", "-c") and not Path(value).is_file():
            packaged = packaged_config(value)
            if packaged is None:
                raise UserError(f"--config {value}: there is no such file, and no recipe of that name in the package")
            args[position + 1] = packaged
    if args and args[0] in EVALUATING:
        if "--ckpt_path" not in args[:-1] and args[0] == "export":
            args += ["--ckpt_path", "last"]
        if "--ckpt_path" in args[:-1]:
            place = args.index("--ckpt_path") + 1
            args[place] = str(find.find_checkpoint(args[place], _logs(args), args[0]))
            folder = run_folder.run_folder(args[place])
            if folder is not None:
                args = [args[0], "--config", str(folder / run_folder.CONFIG), *args[1:]]
    return args


def _logs(args: list[str]) -> Path:
    """`lightning_logs` of the run that is meant, before anything is parsed."""
    roots = [item.value for item in written(args) if item.key == "trainer.default_root_dir" and item.value is not None]
    return Path(roots[-1] if roots else ".").expanduser() / run_folder.LOGS
