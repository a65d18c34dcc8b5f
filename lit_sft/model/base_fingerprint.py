"""The fingerprint of a frozen base: whether trained weights or an adapter lie over the base of
their training.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lit_sft.errors import UserError

SAMPLE = 4096
"""Bytes of a sample of a weights file."""
BASE_FILE = "base_fingerprint.json"
"""In an adapter directory: the fingerprint of the base that it was trained over. Of lit_sft, not of
peft.
"""
SAMPLES = 64
"""Samples of a file, evenly spread; the header (names, types, shapes) is read besides."""


def check_base(saved: str | None, current: str | None) -> None:
    """Refuses trained weights over another frozen base than that of their training.

    Args:
        saved: Fingerprint of the base in the checkpoint; None where nothing was frozen.
        current: Fingerprint of the base of the model.

    Raises:
        UserError: They differ.
    """
    if saved is not None and current is not None and saved != current:
        raise UserError(
            f"the checkpoint was trained over another base ({saved}, here {current}): set"
            " model.model_name_or_path, model.revision and model.init to those of its run"
        )


def check_quantization(saved: str | None, current: str | None) -> None:
    """Refuses to go on over the same base in other bits: its values, and so the loss, are others.

    Args:
        saved: `model.quantization` of the run that is resumed.
        current: That of this one.

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
    """Writes into an adapter directory which base it was trained over.

    Args:
        adapter: Directory of the adapter.
        base: Directory with the base's weights.
    """
    text = json.dumps({"base": _of_weights(base)}, indent=2)
    (adapter / BASE_FILE).write_text(f"{text}\n", encoding="utf-8")


def check_recorded_base(adapter: Path, base: str, base_name: str) -> bool:
    """Compares a base with the one that an adapter directory was trained over.

    Args:
        adapter: Directory of the adapter.
        base: Fingerprint of the base of the model.
        base_name: What the user calls that base.

    Returns:
        Whether the directory tells; one of peft's own does not.

    Raises:
        UserError: It is another base.
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
    """Fingerprint of a causal LM as it was loaded, wherever its directory lies.

    Args:
        lm: As transformers loaded it, from `lm.name_or_path`.
        init: `pretrained`, or `random`: then config and seed are the base.
        seed: Of random weights.
    """
    folder = Path(lm.name_or_path)
    if init == "random":
        return (
            f"random, seed {seed}, config"
            f" {_short(hashlib.sha256((folder / 'config.json').read_bytes()))}"
        )
    return _of_weights(folder)


def _of_weights(folder: Path) -> str:
    return f"weights {fingerprint(folder)}"


def fingerprint(folder: Path) -> str:
    """A hash of the weights in a directory.

    Of each file it reads the size, the beginning (in safetensors the header: all names, types and
    shapes) and 64 samples of 4 KiB: training changes them all, and a model of any size takes
    milliseconds.
    """
    digest = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
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
