"""Messages for wrong keys and values: one line with the key, its origin and a suggestion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from lit_sft.cli.arguments import Written, config_files, read_yaml, written
from lit_sft.errors import UserError

OF_KEY = r"""Parser key ["'](?P<key>[\w.]+)["']: ?"""
UNKNOWN = "unknown key {key} ({origin}): {suggestion}"

MESSAGES = (
    (r"does not accept option ['\"](?P<unknown>[\w.]+)['\"]", UNKNOWN),
    (r"Option ['\"](?P<unknown>[^'\"]+)['\"] is not accepted", UNKNOWN),
    (r"unrecognized arguments: --?(?P<unknown>[\w.]+)", UNKNOWN),
    (r"(?P<reason>unrecognized arguments: .*)", "{reason}; keys begin with --"),
    (
        OF_KEY + r".*callable class: (?P<reason>No module named '(?P<package>\w+)')\.? Got value",
        "{key} ({origin}): {reason}: `pip install {package}`, or choose another class",
    ),
    (
        OF_KEY + r".*Expected an import path or a subclass spec, but got (?P<given>\w+)",
        "{key} ({origin}): got {given}, expected {expected}",
    ),
    (OF_KEY + r".*callable class: (?P<reason>.*?)\.? Got value", "{key} ({origin}): {reason}"),
    (
        OF_KEY + r"(?P<types>.*(?:Got value|Given value|dot import path string)): (?P<given>.*)$",
        "{key} ({origin}): got {given}, expected {expected}",
    ),
    (
        OF_KEY + r"Unable to load config ['\"](?P<given>.*?)['\"](?: - |$)",
        "{key} ({origin}): got {given}, expected keys with values: leave it out for the defaults",
    ),
    (OF_KEY + r"(?P<reason>.*?)(?: - |$)", "{key} ({origin}): {reason}"),
    (
        r"^(?P<reason>(?:Problems parsing|Unexpected) config.*?)[ :]*$",
        "--config {files}: {reason}; expected keys with values, as --print_config shows",
    ),
)
"""(Pattern of jsonargparse's message, our message). The first pattern that matches is used.

The groups of the pattern fill our message: `unknown` and `key` become the whole dotted key and its
origin, `types` becomes the expected types in words.
"""
NOT_MET = (
    r"class_path '[\w.]*?(?P<name>\w+)':\s+(?:Requirement '([\w-]+)[^']*' not met|No module named"
    r" '(\w+)')"
)
"""jsonargparse's message when the package of a class is missing."""

OF_TRAINER = (
    (
        r"Trainer\(devices=|`devices` selected|You requested gpu",
        "trainer.devices {devices} cannot be had: set it to auto or to a number from 1",
    ),
    (
        r"No supported gpu backend|can not run on your system|torch_xla",
        "trainer.accelerator {accelerator} is not there: set it to auto or cpu, or see why torch"
        " finds none",
    ),
    (
        r"invalid accelerator name",
        "trainer.accelerator {accelerator} is not known: set it to auto, cpu or gpu",
    ),
    (
        r"invalid strategy name",
        "trainer.strategy {strategy} is not known: set it to auto, ddp or fsdp2 (a class needs"
        " class_path: and init_args:)",
    ),
)
"""(Pattern of Lightning's message, our message, which the settings of the trainer fill)."""

TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "keys with values",
    "NoneType": "null",
}
"""Names of types for users, in the order in which a message lists them."""
TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[([^]]*)\]")


def one_line(message: str, args: list[str], known: set[str]) -> str:
    """Rewrites an error message of jsonargparse as one line.

    Args:
        message: The message of jsonargparse.
        args: The command line, to find the origin of a wrong key.
        known: All right keys, dotted.

    Returns:
        Our message from `MESSAGES`; the first line of the message if no pattern matches.
    """
    text = " ".join(message.split())
    for pattern, answer in MESSAGES:
        match = re.search(pattern, text)
        if match is not None:
            return answer.format_map(_fields(match.groupdict(), args, known))
    return message.strip().partition("\n")[0]


def of_trainer(message: str, settings: Mapping[str, object]) -> str:
    """Rewrites the message of a trainer that could not be built.

    Args:
        message: Lightning's message.
        settings: The settings of the trainer.
    """
    for pattern, answer in OF_TRAINER:
        if re.search(pattern, message):
            return answer.format_map(settings)
    return f"trainer: {message}"


def missing_package(error: Exception, args: list[str]) -> Exception:
    """Rewrites the error of a class whose package is not installed; returns any other as it is."""
    match = re.search(NOT_MET, str(error))
    if match is None:
        return error
    name = match["name"]
    package = match[2] or match[3]
    named = [item for item in written(args) if str(item.value).rpartition(".")[2] == name]
    place = f"{named[-1].key.removesuffix('.class_path')} ({named[-1].origin}): " if named else ""
    return UserError(
        f"{place}{name} needs {package}: `pip install {package}`, or choose another class"
    )


def expected(text: str) -> str:
    """Describes the types in a message of jsonargparse, in words."""
    listed = re.search(r"Subtypes: \[(.*)\] Errors", text)
    text = re.sub(r"\b(list|dict)\[.*?\]+", r"<class '\1'>", listed[1] if listed else text)
    names: list[str] = []
    for name, choices in TYPE.findall(text):
        if choices:
            names += choices.replace("'", "").split(", ")
        elif name in TYPE_WORDS:
            names.append(TYPE_WORDS[name])
        elif "lit_sft" in text:
            # Our option groups are dataclasses, which users write as keys.
            names.append(TYPE_WORDS["dict"])
    return _either(sorted(dict.fromkeys(names), key=_rank)) or "a class, e.g. torch.optim.AdamW"


def shown(value: object) -> str:
    """Formats a value as YAML does."""
    return "null" if value is None else str(value)


def suggestion(key: str, known: set[str]) -> str:
    """Suggests the nearest right key.

    If a group is misspelled, it is replaced. Else the last part of the key is compared with keys of
    the same group, then with keys below the group, then with all keys. At the end whole keys are
    compared.
    """
    mended = _with_right_group(key, known)
    if mended is not None:
        return f"did you mean {mended}?"
    parent, _, name = key.rpartition(".")
    inside = f"{parent}." if parent else ""
    beside = {k for k in known if k.rpartition(".")[0] == parent}
    below = {k for k in known if k.startswith(inside)}
    for keys, cutoff in ((beside, 0.5), (below, 0.6), (known, 0.8)):
        names = difflib.get_close_matches(
            name, {k.rpartition(".")[2] for k in keys}, n=1, cutoff=cutoff
        )
        same = [k for k in keys if k.rpartition(".")[2] in names]
        best = difflib.get_close_matches(key, same, n=1, cutoff=0)
        if best:
            return f"did you mean {best[0]}?"
    best = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f"did you mean {best[0]}?" if best else "`--print_config` shows all keys"


def _with_right_group(key: str, known: set[str]) -> str | None:
    """Replaces the first group of a key that no right key has; None if no group is near.

    Returns:
        The whole key, or only the group if the rest is not known there.
    """
    right = ""
    parts = key.split(".")
    for position, part in enumerate(parts[:-1]):
        beside = {k.removeprefix(right).partition(".")[0] for k in known if k.startswith(right)}
        if part not in beside:
            near = difflib.get_close_matches(part, beside, n=1)
            if not near:
                return None
            whole = ".".join([f"{right}{near[0]}", *parts[position + 1 :]])
            return whole if whole in known else f"{right}{near[0]}"
        right += f"{part}."
    return None


def _fields(
    found: dict[str, str | None], args: list[str], known: set[str]
) -> dict[str, str | None]:
    """Returns the values that fill a message of `MESSAGES`, from the groups of its pattern."""
    if found.get("unknown"):
        key, origin = _place(str(found["unknown"]), args, known)
        return {**found, "key": key, "origin": origin, "suggestion": suggestion(key, known)}
    if found.get("key"):
        given = found.get("given")
        # Python's word; YAML's is null.
        given = "null" if given == "None" else given
        key, origin = _place(str(found["key"]), args, set(), given)
        return {
            **found,
            "given": given,
            "key": key,
            "origin": origin,
            "expected": expected(found.get("types") or ""),
        }
    return {**found, "files": _broken_files(args)}


def _broken_files(args: list[str]) -> str:
    """Names the config files that are no mapping; all of them if each is one."""
    files = config_files(args)
    broken = [file for file in files if not isinstance(read_yaml(file), Mapping)]
    return " or ".join(broken or files)


def _rank(name: str) -> int:
    """Sorts choices first, then types in the order of `TYPE_WORDS`.

    The order in the message is not stable: Python caches unions, so it depends on earlier imports.
    """
    words = list(TYPE_WORDS.values())
    return words.index(name) if name in words else -1


def _either(names: list[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _place(key: str, args: list[str], known: set[str], given: str | None = None) -> tuple[str, str]:
    """Finds the whole dotted key of which the parser named the end, and its origin.

    Args:
        key: The end of the key, as the parser names it.
        args: The command line.
        known: Right keys, which cannot be the wrong one.
        given: The refused value, if the message has it.
    """
    places = [item for item in written(args) if item.key == key or item.key.endswith(f".{key}")]
    places = [item for item in places if item.key == key or item.key not in known]
    exact = [item for item in places if shown(item.value) == given]
    last = (exact or places or [Written(key, None, "command line")])[-1]
    return last.key, last.origin
