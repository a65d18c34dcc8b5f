"""The fingerprint of a frozen base, which tells whether an adapter is used over the right one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lit_sft.errors import UserError

SAMPLE = 4096
"""Bytes per sample of a weight file."""
BASE_FILE = "base_fingerprint.json"
"""File of lit_sft in an adapter directory: the fingerprint of the base of its training."""
SAMPLES = 64
"""Samples per weight file, evenly spread. The header (names, types, shapes) is read, too."""


def check_base(saved: str | None, current: str | None) -> None:
    """Refuses a checkpoint that was trained over another frozen base.

    Args:
        saved: Fingerprint in the checkpoint. None if nothing was frozen.
        current: Fingerprint of the base of the model. None if nothing is frozen.

    Raises:
        UserError: They differ.
    """
    if saved is not None and current is not None and saved != current:
        raise UserError(
            f"the checkpoint was trained over another base ({saved}, here {current}): set"
            " model.model_name_or_path, model.revision and model.init to those of its run"
        )


def check_quantization(saved: str | None, current: str | None) -> None:
    """Refuses to resume over the same base in another quantization.

    Its values, and so the loss, would differ.

    Args:
        saved: `model.quantization` of the checkpoint.
        current: `model.quantization` of this run.

    Raises:
        UserError: They differ.
    """
    if saved != current:
        was, now = saved or "null", current or "null"
        raise UserError(
            f"the checkpoint was trained over its base with model.quantization {was}, now it is"
            f" {now}: set it to {was}, or resume.allow_other_data to true to go on over other"
            " values of the frozen weights"
        )


def record_base(adapter: Path, base: Path) -> None:
    """Writes the fingerprint of its base into an adapter directory.

    Args:
        adapter: The adapter directory.
        base: The directory with the weights of the base.
    """
    text = json.dumps({"base": _of_weights(base)}, indent=2)
    (adapter / BASE_FILE).write_text(f"{text}\n", encoding="utf-8")


def check_recorded_base(adapter: Path, base: str, base_name: str) -> bool:
    """Compares a base with the one that an adapter directory was trained over.

    Args:
        adapter: The adapter directory.
        base: Fingerprint of the base of the model.
        base_name: The user's name of that base, for messages.

    Returns:
        Whether the directory has a fingerprint. A directory that peft wrote has none.

    Raises:
        UserError: The adapter was trained over another base.
    """
    file = adapter / BASE_FILE
    if not file.is_file():
        return False
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))["base"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): remove it to compare names and shapes only"
        ) from error
    if recorded != base:
        raise UserError(
            f"the adapter {adapter} was trained over another base ({recorded}) than {base_name}"
            f" ({base}): set model.model_name_or_path to that base; or if it is only stored in"
            f" other files, remove {file.name}"
        )
    return True


def base_of(lm: Any, init: str, seed: int) -> str:
    """Returns the fingerprint of a causal LM, wherever its directory is.

    Args:
        lm: The causal LM, loaded from `lm.name_or_path`.
        init: `pretrained`, or `random`, where config and seed identify the base.
        seed: Seed of random weights.
    """
    folder = Path(lm.name_or_path)
    if init == "random":
        config = _short(hashlib.sha256((folder / "config.json").read_bytes()))
        return f"random, seed {seed}, config {config}"
    return _of_weights(folder)


def _of_weights(folder: Path) -> str:
    return f"weights {fingerprint(folder)}"


def fingerprint(folder: Path) -> str:
    """Returns a hash of the weights in a directory.

    It reads the size of each file, its beginning (in safetensors the header with all names, types
    and shapes) and 64 samples of 4 KiB. Training changes nearly every weight, so samples suffice,
    and a model of any size takes milliseconds.
    """
    digest = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    if not files:
        files = [*folder.glob("pytorch_model*.bin")]
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
            file.seek(0)
            digest.update(file.read(min(header, size) + SAMPLE))
            for number in range(SAMPLES):
                file.seek(max(0, size - SAMPLE) * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return _short(digest)


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])
