"""Makes a saved `config.json` readable for transformers 4 and for transformers 5.

transformers 5 writes `rope_parameters` and `dtype`. transformers 4 ignores the first, and would
compute with the default rotary base without an error; before 4.56, it ignores the second, too. Both
versions read the older keys, so these are written beside the new ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")
_NOT_KEPT = ("quantization_config", "transformers_version")
"""Keys of the source that are not true of the saved model."""


def complete_config(
    directory: Path, source: Path | None, *, dtype: str | None, eos_token_id: int | None
) -> None:
    """Adds older keys to the `config.json` of a directory, and changes dtype and eos token.

    Args:
        directory: Its config was written by transformers 5.
        source: The directory of the model before training, whose older keys are kept. None if it
            has none.
        dtype: Name of the stored dtype, such as `bfloat16`. None keeps the one that was written.
        eos_token_id: The new eos token. None keeps the one that was written.
    """
    path = directory / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    original: dict[str, Any] = {}
    if source is not None and (source / CONFIG).is_file():
        original = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    _complete(config, original, dtype, eos_token_id)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def change_config(
    directory: Path,
    source: Path,
    *,
    dtype: str,
    vocab_size: int | None,
    eos_token_id: int | None,
) -> None:
    """Copies the `config.json` of a checkpoint, and changes what training has changed.

    Args:
        directory: The directory to write to.
        source: The checkpoint.
        dtype: Name of the dtype of the trained weights, such as `bfloat16`.
        vocab_size: The new number of rows of the embedding. None keeps that of the source.
        eos_token_id: The new eos token. None keeps that of the source.
    """
    text = (source / CONFIG).read_text(encoding="utf-8")
    config = json.loads(text)
    inner = config.get("text_config", config)
    named = {part[key] for part in (config, inner) for key in _DTYPE_KEYS if key in part}
    if named != {dtype}:
        # Without it, transformers takes the dtype of the first weight, which may be a tower's.
        config["dtype"] = dtype
    if vocab_size is not None:
        inner.setdefault("vocab_size", vocab_size)
    for part in (config, inner):
        # Weights in MXFP4 or FP8 were dequantized when they were loaded.
        part.pop("quantization_config", None)
        _change(part, dtype, vocab_size, eos_token_id)
    if config != json.loads(text):
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def _change(
    config: dict[str, Any], dtype: str, vocab_size: int | None, eos_token_id: int | None
) -> None:
    """Changes dtype, rows and eos token where a config names them."""
    for name in _DTYPE_KEYS:
        if config.get(name) is not None:
            config[name] = dtype
    if vocab_size is not None and "vocab_size" in config:
        config["vocab_size"] = vocab_size
    if eos_token_id is not None and _is_other_eos(config, eos_token_id):
        config["eos_token_id"] = eos_token_id


def _complete(
    config: dict[str, Any],
    original: Mapping[str, Any],
    dtype: str | None,
    eos_token_id: int | None,
) -> None:
    """Completes a config, and the config of the text model inside it."""
    # A text model can be a part of its source.
    text_source = original.get("text_config", {})
    if text_source.get("model_type") == config.get("model_type"):
        original = text_source
    if dtype is not None:
        config["dtype"] = dtype
    if eos_token_id is not None and _is_other_eos(config, eos_token_id):
        config["eos_token_id"] = eos_token_id
    _add_older_keys(config, original)
    if isinstance(config.get("text_config"), dict):
        _complete(config["text_config"], text_source, dtype, eos_token_id)


def _is_other_eos(config: Mapping[str, Any], eos_token_id: int) -> bool:
    """Whether a config names eos tokens without this one."""
    if "eos_token_id" not in config:
        return False
    named = config["eos_token_id"]
    return eos_token_id not in (named if isinstance(named, list) else [named])


def _add_older_keys(config: dict[str, Any], original: Mapping[str, Any]) -> None:
    """Adds the keys that transformers 4 reads in place of the new ones."""
    for name, value in original.items():
        # transformers 5 keeps keys that it does not know. What it left out has a new name.
        if not name.startswith("_") and name not in _NOT_KEPT:
            config.setdefault(name, value)
    if config.get("dtype") is not None:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    # Without a base of their own, the parameters are one dict per kind of layer, and only the
    # source tells the older keys of such a model.
    if "rope_theta" not in rope:
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    top_level = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in rope.items() if name not in top_level}
    if scaling.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", scaling)
