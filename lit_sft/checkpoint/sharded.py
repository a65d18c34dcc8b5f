"""Splits a state that is sharded over ranks into parts, and joins them for any number of ranks.

A checkpoint is a tree of dicts and lists whose leaves are tensors and plain values. `split` returns
two things. The first is the same tree on every rank, in which a meta tensor of the full shape
replaces each sharded tensor. The second is the pieces of this rank, by their place in the tree.

torch.distributed.checkpoint does the same, but its index is a pickle, and reading a pickle can run
code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_sft.errors import UserError

Piece = tuple[list[int], Tensor]
"""The offset of a piece in the whole tensor (one number per dimension), and its values."""


def map_leaves(function: Callable[[str, Any], Any], tree: Any, place: str = "") -> Any:
    """Returns a tree of the same form with new leaves.

    Args:
        function: Takes the place of a leaf (`optimizer_states/0/state/3/exp_avg`) and the leaf, and
            returns the new leaf.
        tree: Dicts, lists and tuples of leaves. Tuples become lists.
        place: The place of `tree` itself.
    """
    if isinstance(tree, dict):
        return {key: map_leaves(function, item, f"{place}/{key}") for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [map_leaves(function, item, f"{place}/{number}") for number, item in enumerate(tree)]
    return function(place.removeprefix("/"), tree)


def is_sharded(tree: Any) -> bool:
    """Whether a tree holds a tensor that is sharded over ranks."""
    found = []
    map_leaves(lambda place, leaf: found.append(place) if isinstance(leaf, DTensor) else None, tree)
    return bool(found)


def split(tree: Any) -> tuple[Any, dict[str, Piece]]:
    """Replaces sharded tensors by meta tensors, and returns this rank's pieces of them, too."""
    pieces: dict[str, Piece] = {}

    def leaf(place: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        local = value.to_local()
        if local.numel() and _is_first_copy(value):
            pieces[place] = (local_offset(value), local)
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return map_leaves(leaf, tree), pieces


def local_offset(tensor: DTensor) -> list[int]:
    """Returns the offset of this rank's part in each dimension.

    torch has no public function for it.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return list(offset)


def _is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank writes its part: of the ranks that hold the same part, one does."""
    coordinates: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    return all(p.is_shard() or c == 0 for p, c in zip(tensor.placements, coordinates, strict=True))


class StoredTensor:
    """A tensor whose pieces lie in files. Indexing reads only the region that is asked for.

    Args:
        shape: Shape of the whole tensor.
        dtype: Its dtype.
        pieces: Pieces without overlap that make up the whole tensor.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.pieces = pieces

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """Returns a region, given by one slice per dimension."""
        ranges = [range(length)[part] for length, part in zip(self.shape, index, strict=True)]
        result = torch.empty([len(r) for r in ranges], dtype=self.dtype)
        for offset, values in self.pieces:
            target, source = [], []
            for wanted, start, length in zip(ranges, offset, values.shape, strict=True):
                first = max(wanted.start, start)
                # If the piece lies outside of the region, the slice is empty.
                end = max(first, min(wanted.stop, start + length))
                target.append(slice(first - wanted.start, end - wanted.start))
                source.append(slice(first - start, end - start))
            result[tuple(target)] = values[tuple(source)]
        return result

    def whole(self) -> Tensor:
        """Returns the whole tensor in memory."""
        return self[tuple(slice(None) for _ in self.shape)]


def join(tree: Any, parts: Sequence[dict[str, Piece]]) -> Any:
    """Replaces meta tensors by `StoredTensor`s; nothing is read yet.

    Args:
        tree: The tree that `split` returned.
        parts: The pieces of each rank.

    Raises:
        ValueError: Pieces of a tensor are missing.
    """

    def leaf(place: str, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_meta):
            return value
        pieces = [part[place] for part in parts if place in part]
        found = sum(prod(values.shape) for _, values in pieces)
        if found != value.numel():
            raise ValueError(f"{found} of the {value.numel()} numbers of {place} are there")
        return StoredTensor(value.shape, value.dtype, pieces)

    return map_leaves(leaf, tree)


def whole(tree: Any) -> Any:
    """Replaces `StoredTensor`s by tensors in memory."""
    return map_leaves(
        lambda _, leaf: leaf.whole() if isinstance(leaf, StoredTensor) else leaf, tree
    )


def gather(tree: Any, keep: bool) -> Any:
    """Gathers sharded tensors in host memory, one after the other. All ranks call it.

    Args:
        tree: A tree with DTensors.
        keep: Whether this rank needs the result. On other ranks None replaces the tensors.
    """

    def leaf(place: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if keep else None

    return map_leaves(leaf, tree)


def copy_into(target: Tensor, source: Tensor | StoredTensor) -> None:
    """Copies a saved tensor into a tensor of this process.

    If `target` is sharded, only this rank's part is read.

    Raises:
        UserError: The shapes differ.
    """
    if target.shape != source.shape:
        raise UserError(
            f"a tensor of the checkpoint is {list(source.shape)}, that of the model"
            f" {list(target.shape)}"
        )
    with torch.no_grad():
        if isinstance(target, DTensor):
            local = target.to_local()
            ends = zip(local_offset(target), local.shape, strict=True)
            local.copy_(source[tuple(slice(start, start + length) for start, length in ends)])
        else:
            target.copy_(source.whole() if isinstance(source, StoredTensor) else source)


def shard_like(parameter: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the optimizer state of one parameter; values of its shape are sharded like it.

    Args:
        parameter: The parameter, sharded or not.
        saved: Its optimizer state in the checkpoint.
    """

    def leaf(place: str, value: Any) -> Any:
        if not isinstance(value, Tensor | StoredTensor):
            return value
        if value.shape == parameter.shape:
            own = torch.empty_like(parameter, dtype=value.dtype)
        else:
            own = torch.empty(value.shape, dtype=value.dtype)
        copy_into(own, value)
        return own

    return map_leaves(leaf, dict(saved))


class HostCopy:
    """Copies a tree to host memory, which is allocated once and reused by the next copy.

    Tensors that share memory share it in the copy, too, so that tied weights are stored once.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, tree: Any) -> Any:
        """Returns the copy, complete."""
        seen: dict[tuple, Tensor] = {}

        def leaf(place: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_meta:
                return value
            key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in seen or not value.numel():
                seen[key] = self._buffer(place, value).copy_(value.detach(), non_blocking=True)
            return seen[key]

        copy = map_leaves(leaf, tree)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copy

    def _buffer(self, place: str, like: Tensor) -> Tensor:
        buffer = self.buffers.get(place)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self.buffers[place] = buffer
        return buffer
