"""Writes a trained language model back into the checkpoint that it was taken from.

That is a multimodal one, or one with layers for multi-token prediction. Servers know its class, its
names and its files. So every file is copied, and only the weights that were trained are replaced in
it: towers and multi-token prediction heads stay as they were, to the last bit. Those in FP8 become
plain weights, because a config cannot say that only they are quantized.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_sft.errors import UserError
from lit_sft.model.composite import (
    INDEX,
    SCALE,
    SINGLE_FILE,
    SourceNames,
    source_config,
    source_names,
    weight_files,
)
from lit_sft.model.dequantize import dequantize_left_out, fp8_block
from lit_sft.model.new_tokens import num_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_COPIED = ("README.md", "params.json", "config.json", "generation_config.json", INDEX)
"""Files that do not describe the export: a model card, the settings of other weight files, and what
is written anew.
"""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of weight files, of which only those that were trained are written."""


@dataclass(frozen=True)
class _Placed:
    """The trained tensors, and where the source has them."""

    lm: PreTrainedModel
    state: Mapping[str, Tensor]
    names: SourceNames
    target_of: Mapping[str, str]
    """The name in the model's `state_dict()` by the name in the source."""
    block: Sequence[int] | None
    """Rows and columns of a block of FP8 weights. None if there is one scale for each weight."""

    def value(self, name: str, cache: dict[str, dict[str, Tensor]]) -> Tensor:
        """Returns the trained value of a tensor of the source.

        Args:
            name: Its name in the source.
            cache: Gets the parts of tensors that loading joins from several ones, such as experts.
        """
        target = self.target_of[name]
        if len(self.names.of_tensor[target]) == 1:
            return self.state[target]
        if target not in cache:
            cache[target] = _separated(self.lm, target, self.state[target])
        return cache[target][name]


def write_back(
    lm: PreTrainedModel,
    state: Mapping[str, Tensor],
    source: Path,
    directory: Path,
    cast: Callable[[Tensor], Tensor],
) -> None:
    """Writes all files of a checkpoint, with the trained weights in place of its own.

    The tokenizer's files, `config.json` and `generation_config.json` are left to the caller.

    Args:
        lm: The causal LM, loaded from `source`.
        state: Its trained tensors.
        source: The checkpoint.
        directory: The directory to write to, which exists.
        cast: Casts a trained tensor to the dtype in which it is stored.

    Raises:
        UserError: A trained tensor has no place in the source.
    """
    files = weight_files(source)
    placed = _place(lm, state, source, [name for names in files.values() for name in names])
    for file in source.iterdir():
        is_weights = file.suffix in _WEIGHTS
        if file.is_file() and not is_weights and file.name not in _NOT_COPIED:
            shutil.copyfile(file, directory / file.name)
    for file_name, names in files.items():
        _write_file(placed, names, source / file_name, directory / file_name, cast)
    if list(files) != [SINGLE_FILE]:
        _write_index(source, directory, files)


def _place(
    lm: PreTrainedModel, state: Mapping[str, Tensor], source: Path, names: list[str]
) -> _Placed:
    """Finds the place of every trained tensor in the source.

    Raises:
        UserError: A tensor has none.
    """
    found = source_names(lm, state, names)
    strangers = sorted(state.keys() - found.of_tensor.keys() - set(lm.all_tied_weights_keys))
    if strangers:
        raise UserError(
            f"{source} has no weight that became {strangers[0]} of the {type(lm).__name__}, so it"
            " cannot be written back: export with --text_only true"
        )
    target_of: dict[str, str] = {}
    for target, sources in found.of_tensor.items():
        target_of |= dict.fromkeys(sources, target)
    return _Placed(lm, state, found, target_of, fp8_block(source_config(lm)))


def _separated(lm: PreTrainedModel, target: str, value: Tensor) -> dict[str, Tensor]:
    """Splits a tensor into those that loading joined, by their names in the source."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(lm, {target: value})


def _write_file(
    placed: _Placed,
    names: list[str],
    source: Path,
    target: Path,
    cast: Callable[[Tensor], Tensor],
) -> None:
    """Writes one weight file. A file without trained weights is copied.

    Raises:
        UserError: A trained tensor has another shape than in the source.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not any(name in placed.target_of or SCALE.search(name) for name in names):
        shutil.copyfile(source, target)
        return
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        for name in names:
            if SCALE.search(name):
                continue
            if name not in placed.target_of:
                tensors[name] = dequantize_left_out(file, name, placed.block)
                continue
            value = placed.value(name, parts)
            _check_shape(placed, name, value, file.get_slice(name).get_shape())
            # The copy of its own is for weights that share their memory, which is refused.
            tensors[name] = cast(value).detach().cpu().clone(memory_format=torch.contiguous_format)
    save_file(tensors, target, metadata=metadata)


def _check_shape(placed: _Placed, name: str, value: Tensor, before: list[int]) -> None:
    """Refuses a shape that training cannot have changed: only added tokens change one, by rows."""
    shape = list(value.shape)
    if shape == before:
        return
    rows = num_rows(placed.lm)
    has_new_rows = shape[1:] == before[1:] and shape[0] == rows
    if not has_new_rows:
        raise UserError(f"{name} is {before} in the source and {shape} in the trained model")


def _write_index(source: Path, directory: Path, files: Mapping[str, Any]) -> None:
    """Writes the index of the weight files, with their new size and without old scales."""
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    for name in list(index["weight_map"]):
        if SCALE.search(name):
            del index["weight_map"][name]
    size = sum(_bytes_of_tensors(directory / file_name) for file_name in files)
    index["metadata"] = {**index.get("metadata", {}), "total_size": size}
    text = json.dumps(index, indent=2) + "\n"
    (directory / INDEX).write_text(text, encoding="utf-8")


def _bytes_of_tensors(path: Path) -> int:
    """The size of a safetensors file without its header, whose length is its first number."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - header - 8
