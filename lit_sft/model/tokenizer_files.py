"""Writes the files of a tokenizer so that transformers 4 and 5 load the same tokenizer from them.

transformers 5 writes a `tokenizer_config.json` that transformers 4 cannot read. So the files of the
source are copied, and only what the training changed is changed in them.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sft.model.load import PROCESSOR_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
OTHER_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates that have another name than `default`."""
_COPIED = (
    TOKENIZER,
    CONFIG,
    SPECIAL_TOKENS,
    TEMPLATE,
    f"{OTHER_TEMPLATES}/*.jinja",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""Files of a tokenizer, as patterns."""
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
"""Keys of a token in `added_tokens_decoder`."""
_LOADING = ("backend", "is_local", "local_files_only")
"""Keys that transformers 5 writes about how it loaded the tokenizer."""


@dataclass(frozen=True)
class TokenizerChanges:
    """What an exported tokenizer has different from its source."""

    chat_template: str | None = None
    """The chat template. None keeps that of the source."""
    eos_token: str | None = None
    """The eos token. None keeps that of the source."""
    added_tokens: Sequence[str] = ()
    """Tokens that are not in the files of the source."""


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    source: Path | None,
    changes: TokenizerChanges,
    directory: Path,
) -> None:
    """Writes the files of a tokenizer.

    Args:
        tokenizer: The tokenizer, with the added tokens.
        source: The directory that it was loaded from. None if it has no files of its own.
        changes: What is different from the source.
        directory: The directory to write to.
    """
    if changes.chat_template == default_template(tokenizer) and _holds_template(source):
        changes = replace(changes, chat_template=None)
    if source is None or not _is_copied(source, changes):
        _save(tokenizer, directory)
    else:
        _copy(source, directory)
        if changes.added_tokens:
            _add_tokens(tokenizer, changes.added_tokens, directory)
    config = _read(directory / CONFIG)
    changed = _for_transformers_4(config, tokenizer.model_input_names)
    if changes.eos_token is not None:
        changed["eos_token"] = changes.eos_token
        _change_special_tokens(directory / SPECIAL_TOKENS, changes.eos_token)
    if changes.chat_template is not None:
        if "chat_template" in changed:
            changed["chat_template"] = changes.chat_template
        _change_template(directory, changes.chat_template)
    if changed != config:
        _write(directory / CONFIG, changed)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the tokenizer's own chat template; of several, the one named `default`."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        return own.get("default")
    return own


def _holds_template(source: Path | None) -> bool:
    """Whether the files of the tokenizer have its template, and not those of a processor alone."""
    if source is None or not (source / CONFIG).is_file():
        return True
    return (source / TEMPLATE).is_file() or "chat_template" in _read(source / CONFIG)


def _change_template(directory: Path, template: str) -> None:
    """Writes a template to every file of a template, so that all programs render this one."""
    (directory / TEMPLATE).write_text(template, encoding="utf-8")
    # `tool_use` among them would be taken for prompts with tools.
    shutil.rmtree(directory / OTHER_TEMPLATES, ignore_errors=True)
    of_processor = directory / PROCESSOR_TEMPLATE
    if of_processor.is_file():
        _write(of_processor, {"chat_template": template})


def _is_copied(source: Path, changes: TokenizerChanges) -> bool:
    """Whether the files of the source can be taken: tokens are added to `tokenizer.json` only."""
    has_config = (source / CONFIG).is_file()
    return has_config and (not changes.added_tokens or (source / TOKENIZER).is_file())


def _copy(source: Path, directory: Path) -> None:
    """Copies the files of a tokenizer, and the Python files that its config names."""
    patterns = list(_COPIED)
    if "auto_map" in _read(source / CONFIG):
        patterns.append("*.py")
    for pattern in patterns:
        for file in source.glob(pattern):
            target = directory / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _save(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Lets transformers write the files, which then have its own names for the classes."""
    tokenizer.save_pretrained(directory)
    config = _read(directory / CONFIG)
    for key in _LOADING:
        config.pop(key, None)
    _write(directory / CONFIG, config)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], directory: Path) -> None:
    """Adds tokens to a copied `tokenizer.json`, and to the config if it lists added tokens."""
    from tokenizers import Tokenizer

    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    backend = Tokenizer.from_file(str(directory / TOKENIZER))
    backend.add_tokens([added[token] for token in tokens])
    backend.save(str(directory / TOKENIZER))
    config = _read(directory / CONFIG)
    if "added_tokens_decoder" not in config:
        return
    for token in tokens:
        listed = {name: getattr(added[token], name) for name in _FLAGS}
        config["added_tokens_decoder"][str(backend.token_to_id(token))] = listed
    _write(directory / CONFIG, config)


def _for_transformers_4(config: dict[str, Any], input_names: Sequence[str]) -> dict[str, Any]:
    """Replaces what only transformers 5 knows by the names that both know.

    Args:
        config: The content of `tokenizer_config.json`.
        input_names: Names of the tensors that the tokenizer makes.
    """
    config = copy.deepcopy(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # transformers 4 would add `token_type_ids`, which `generate` refuses.
        config.setdefault("model_input_names", list(input_names))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _change_special_tokens(path: Path, eos_token: str) -> None:
    """Changes the eos token in `special_tokens_map.json`, which old versions prefer."""
    if path.is_file():
        _write(path, {**_read(path), "eos_token": eos_token})


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
