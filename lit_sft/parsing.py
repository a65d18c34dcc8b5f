"""What stands between the user's words and the parser: recipes by name, the run's own config, errors in one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from lit_sft import checkpointing, runs
from lit_sft.types import UserError

UNKNOWN_KEY = re.compile(
    r"(?:does not accept option|[Oo]ption|[Kk]ey) [\"']([\w.]+)[\"'](?: is not| .*not expected|$)"
    r"|unrecognized arguments: --?([\w.]+)"
)
"""How jsonargparse says that it does not know a key."""
WRONG_VALUE = re.compile(r"Parser key [\"']([\w.]+)[\"']: ?(.*?)(?:Got value|Given value): (.*)$")
EXPECTED = re.compile(r"Expected an? (typing\.Literal\[[^]]*\]|<class '[^']*'>|[\w.\[\], ]+)")
EVALUATING = ("validate", "test", "predict", "export")


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, with the file and the nearest right key for a wrong one."""

    commands: ClassVar[Mapping[str, LightningArgumentParser]] = {}
    """The parsers of all commands; an error may come from one that only knows a part of the keys."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        args = sys.argv[1:]
        known = set(known_keys(self.commands.get(args[0] if args else "", self)))
        rank_zero_only(print)(f"error: {one_line(message, args, known)}", file=sys.stderr)
        sys.exit(2)


def one_line(message: str, args: list[str], known: set[str]) -> str:
    """A parser's message in one line.

    Args:
        message: Of jsonargparse.
        args: The command line, to tell where a wrong key stands.
        known: All right keys, dotted.
    """
    text = " ".join(message.split())
    if match := UNKNOWN_KEY.search(text):
        key, origin = _origin(match[1] or match[2], args, known)
        return f"unknown key {key} ({origin})" + _suggestion(key, known)
    if match := WRONG_VALUE.search(text):
        expected = (
            " or ".join(dict.fromkeys(_type_name(name) for name in EXPECTED.findall(match[2]))) or match[2].strip()
        )
        key, origin = _origin(match[1], args, known, exact=True)
        return f"{key} ({origin}): got {match[3].strip()}, expected {expected}"
    if "parsing config" in text:
        return f"{', '.join(_config_files(args))}: {text}"
    return text


def _suggestion(key: str, known: set[str]) -> str:
    parent, _, name = key.rpartition(".")
    siblings = {k: k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(name, siblings.values(), n=1, cutoff=0.5)
    best = next((k for k, n in siblings.items() if close and n == close[0]), None)
    if best is None:
        best = next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.6)), None)
    return f": did you mean {best}?" if best else ": `--print_config` shows all keys"


def _type_name(name: str) -> str:
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", name).replace("typing.Literal", "").strip()
    return {"NoneType": "null", "int": "a whole number", "float": "a number", "str": "text"}.get(name, name)


def _origin(key: str, args: list[str], known: set[str], exact: bool = False) -> tuple[str, str]:
    """The whole dotted key that the parser named by its end, and where it was written."""
    typed = [arg[2:].split("=")[0] for arg in args if arg.startswith("--")]
    written = [(full, "command line") for full in typed]
    for file in _config_files(args):
        written += [(full, file) for full in _flatten(_read_yaml(file))]
    for full, origin in reversed(written):
        if full == key or (full.endswith(f".{key}") and (exact or full not in known)):
            return full, origin
    return key, "command line"


def known_keys(parser: LightningArgumentParser) -> Iterator[str]:
    """All keys of a parser, those within optional groups (`model.lora.r`) too."""
    for action in parser._actions:
        yield action.dest
        for kind in typing.get_args(getattr(action, "_typehint", None)):
            if dataclasses.is_dataclass(kind):
                yield from (f"{action.dest}.{field.name}" for field in dataclasses.fields(kind))


def _flatten(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from _flatten(value, f"{prefix}{key}.")


def _read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


def _config_files(args: list[str]) -> list[str]:
    return [value for flag, value in zip(args, args[1:], strict=False) if flag in ("--config", "-c")]


def packaged_config(name: str) -> str | None:
    """The file of a recipe that comes with the package (`--config demo`)."""
    for folder in (resources.files("lit_sft").joinpath("configs"), Path(__file__).parent.parent / "configs"):
        path = Path(str(folder)) / f"{name}.yaml"
        if path.is_file():
            return str(path)
    return None


def find_checkpoint(ckpt_path: str | None, logs: Path, subcommand: str) -> str | None:
    """The checkpoint that is meant: a path, or with `last` the newest intact one (None where `fit` starts anew).

    Raises:
        UserError: There is none.
    """
    if ckpt_path == "last":
        found = checkpointing.find_last(logs)
        if found is None and subcommand != "fit":
            raise UserError(
                f"--ckpt_path last: there is no intact checkpoint below {logs}; run `fit` first, or give a path"
            )
        return None if found is None else str(found)
    if ckpt_path is not None and not Path(ckpt_path).exists():
        raise UserError(f"--ckpt_path {ckpt_path}: there is no such checkpoint")
    return ckpt_path


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
            args[place] = str(find_checkpoint(args[place], _logs(args), args[0]))
            folder = runs.run_folder(args[place])
            if folder is not None:
                args = [args[0], "--config", str(folder / runs.CONFIG), *args[1:]]
    return args


def _logs(args: list[str]) -> Path:
    """`lightning_logs` of the run that is meant, before anything is parsed."""
    key = "--trainer.default_root_dir"
    root = next((value for flag, value in zip(args, args[1:], strict=False) if flag == key), None)
    root = root or next((arg.removeprefix(f"{key}=") for arg in args if arg.startswith(f"{key}=")), ".")
    return Path(root) / runs.LOGS
