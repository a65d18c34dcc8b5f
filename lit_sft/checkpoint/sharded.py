"""A state that is sharded over ranks: split into what each rank holds, and joined again for any
number of ranks.

A checkpoint is a tree of dicts and lists with tensors and plain values as leaves. Splitting it
gives the same tree on every rank, with an empty (meta) tensor of the whole shape in place of each
sharded one, and this rank's pieces of those by their place in the tree.
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
"""Where it begins in the whole tensor (one number for each dimension), and its values."""


def map_leaves(function: Callable[[str, Any], Any], tree: Any, place: str = "") -> Any:
    """A tree of the same form.

    Args:
        function: (place in the tree such as `optimizer_states/0/state/3/exp_avg`, leaf) to the new
            leaf.
        tree: Dicts, lists and tuples (which become lists) of leaves.
        place: Of the tree itself.
    """
    if isinstance(tree, dict):
        return {key: map_leaves(function, item, f"{place}/{key}") for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [map_leaves(function, item, f"{place}/{number}") for number, item in enumerate(tree)]
    return function(place.removeprefix("/"), tree)


def is_sharded(tree: Any) -> bool:
    """Whether ranks hold different parts of it."""
    found = []
    map_leaves(lambda place, leaf: found.append(place) if isinstance(leaf, DTensor) else None, tree)
    return bool(found)


def split(tree: Any) -> tuple[Any, dict[str, Piece]]:
    """The tree with meta tensors in place of sharded ones, and this rank's pieces of them."""
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
    """Where this rank's part begins in each dimension. torch has no public function for it."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return list(
        compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[
            1
        ]
    )


def _is_first_copy(tensor: DTensor) -> bool:
    """Of the ranks that hold the same part, one writes it."""
    coordinates: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    return all(p.is_shard() or c == 0 for p, c in zip(tensor.placements, coordinates, strict=True))


class StoredTensor:
    """A tensor whose pieces lie in files; indexing reads only what is asked for.

    Args:
        shape: Of the whole.
        dtype: Of the whole.
        pieces: Without overlap, together the whole.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> None:
        self.shape, self.dtype, self.pieces = torch.Size(shape), dtype, pieces

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """The region between start and stop of each dimension."""
        ranges = [range(length)[part] for length, part in zip(self.shape, index, strict=True)]
        result = torch.empty([len(r) for r in ranges], dtype=self.dtype)
        for offset, values in self.pieces:
            target, source = [], []
            for wanted, start, length in zip(ranges, offset, values.shape, strict=True):
                first = max(wanted.start, start)
                # Where the piece does not touch the region, the slice is empty.
                end = max(first, min(wanted.stop, start + length))
                target.append(slice(first - wanted.start, end - wanted.start))
                source.append(slice(first - start, end - start))
            result[tuple(target)] = values[tuple(source)]
        return result

    def whole(self) -> Tensor:
        """All of it in memory."""
        return self[tuple(slice(None) for _ in self.shape)]


def join(tree: Any, parts: Sequence[dict[str, Piece]]) -> Any:
    """The tree with `StoredTensor` tensors in place of the meta ones; nothing is read yet.

    Raises:
        ValueError: The pieces of a tensor are not the whole of it.
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
    """The tree with all tensors in memory, or mapped from one file."""
    return map_leaves(
        lambda _, leaf: leaf.whole() if isinstance(leaf, StoredTensor) else leaf, tree
    )


def gather(tree: Any, keep: bool) -> Any:
    """The tree with whole tensors in host memory, one gathered after the other. All ranks call it.

    Args:
        tree: With DTensors.
        keep: Whether this rank needs the result; on others it is without them.
    """

    def leaf(place: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if keep else None

    return map_leaves(leaf, tree)


def copy_into(target: Tensor, source: Tensor | StoredTensor) -> None:
    """Copies a saved tensor into one of this process; where that is sharded, only this rank's part
    is read.

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
    """The optimizer's values of one parameter, sharded as it is where they are of its shape."""

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
    """Copies a tree to host memory that is taken once and used again by the next copy.

    Tensors that share memory do so in the copy, so that tied weights are stored once.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, tree: Any) -> Any:
        """The copy; it is complete on return."""
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
            self.buffers[place] = buffer = torch.empty(
                like.shape, dtype=like.dtype, pin_memory=like.is_cuda
            )
        return buffer
