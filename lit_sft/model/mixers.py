"""Token mixers other than attention, example by example within a packed row.

State-space layers, gated delta rules and short convolutions carry a state along the row, from one
example into the next. They are found by what they do: if the first example of a row changes, their
output for the second one changes. In a packed row they are called once per example. All other
layers, attention among them, compute the whole row.

Kernels that take the bounds of the examples (flash-linear-attention, causal-conv1d) are called once
per example, too. transformers passes the bounds to the first only, so that its convolutions would
mix the examples without an error.

Letters: T tokens, D hidden size, S examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_sft.model.attention.packed import PACK_KWARGS
from lit_sft.model.self_check import LENGTHS, run_two_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

MAX_PADDING = 1.25
"""Computed tokens of mixers per token of the examples."""

_handed_bounds: ContextVar[Tensor | None] = ContextVar("bounds", default=None)
"""Bounds [S + 1] of the examples, for mixers to which their layer does not pass them on."""


class Mixer(NamedTuple):
    """A module that would mix the examples of a packed row."""

    name: str
    """Its name in the model."""
    layer: str | None
    """Name of the module around it that gets the bounds of the examples, but does not pass them on
    to the mixer. None if it does.
    """


@torch.no_grad()
def find_mixers(lm: PreTrainedModel) -> list[Mixer]:
    """Returns the innermost modules of a model that mix the examples of a packed row.

    A mixer that refuses the bounds counts. A mixer is left out if no layer around it gets the
    bounds. Modules without children, such as linear layers and norms, are not tried.
    """
    search = _Search()
    with _watched(lm, search):
        try:
            run_two_examples(lm)
        except Exception as error:
            # Many architectures pass no keyword arguments down to their layers.
            log.debug("%s with packed examples", type(lm).__name__, exc_info=error)
            return []
    innermost = []
    for name, layer in search.found.items():
        if not any(other.startswith(f"{name}.") for other in search.found):
            innermost.append(Mixer(name, layer))
    return innermost


class _Search:
    """Calls the modules of a model, and notes those whose examples are not independent."""

    def __init__(self) -> None:
        self.found: dict[str, str | None] = {}
        """Names of modules that mix examples, with `Mixer.layer`."""
        self._informed: list[str] = []
        """Names of the modules that have got the bounds and are not finished, outermost first."""
        self._is_comparing = False

    def call(self, name: str, own: Callable[..., Any], inputs: _Inputs) -> Any:
        """Calls a module, and once more with another first example."""
        if PACK_KWARGS.isdisjoint(inputs.kwargs):
            return self._compare(name, own, inputs)
        self._informed.append(name)
        try:
            return self._compare(name, own, inputs)
        finally:
            self._informed.pop()

    def _compare(self, name: str, own: Callable[..., Any], inputs: _Inputs) -> Any:
        output, is_mixer = _call(own, inputs)
        if self._is_comparing:
            return output
        self._is_comparing = True
        try:
            is_mixer = is_mixer or _depends_on_first(own, inputs, output)
        finally:
            self._is_comparing = False
        self._note(name, is_mixer)
        return output

    def _note(self, name: str, is_mixer: bool) -> None:
        if is_mixer and self._informed:
            layer = self._informed[-1]
            self.found[name] = None if layer == name else layer


class _Inputs(NamedTuple):
    """The arguments of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def without_bounds(self) -> _Inputs:
        kwargs = {key: value for key, value in self.kwargs.items() if key not in PACK_KWARGS}
        return _Inputs(self.args, kwargs)

    def map(self, change: Callable[[Any], Any]) -> _Inputs:
        """Returns the arguments after a change of each."""
        kwargs = {key: change(value) for key, value in self.kwargs.items()}
        return _Inputs(tuple(change(value) for value in self.args), kwargs)


@contextmanager
def _watched(lm: PreTrainedModel, search: _Search) -> Iterator[None]:
    """Calls the modules of a model through a search in a `with` block."""
    forwards = {}
    for name, module in lm.named_modules():
        if name and next(module.children(), None) is not None:
            forwards[module] = vars(module).get("forward")
            module.forward = _watched_forward(name, module.forward, search)
    try:
        yield
    finally:
        for module, forward in forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _watched_forward(name: str, own: Callable[..., Any], search: _Search) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = _Inputs(args, kwargs)
        if _find_states(inputs) is None:
            return own(*args, **kwargs)
        return search.call(name, own, inputs)

    return forward


def _find_states(inputs: _Inputs) -> Tensor | None:
    """Returns the first argument of the shape [1, T, D] with the tokens of `LENGTHS`, or None."""
    for value in (*inputs.args, *inputs.kwargs.values()):
        is_tensor = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
        if is_tensor and value.shape[:2] == (1, sum(LENGTHS)):
            return value  # type: ignore[no-any-return]
    return None


def _call(own: Callable[..., Any], inputs: _Inputs) -> tuple[Any, bool]:
    """Calls a module, without the bounds if it refuses them.

    Returns:
        Its output, and whether it refuses the bounds.
    """
    try:
        return own(*inputs.args, **inputs.kwargs), False
    except Exception:
        # Custom code may refuse keyword arguments that it does not know with any error.
        if PACK_KWARGS.isdisjoint(inputs.kwargs):
            raise
    inputs = inputs.without_bounds()
    return own(*inputs.args, **inputs.kwargs), True


def _depends_on_first(own: Callable[..., Any], inputs: _Inputs, output: Any) -> bool:
    """Whether the output of a module for the second example depends on the first one."""
    states = _find_states(inputs)
    assert states is not None
    first = LENGTHS[0]
    # Other values of the same size.
    changed = torch.cat([states[:, :first].flip(-1), states[:, first:]], dim=1)
    other, _ = _call(own, inputs.map(lambda value: changed if value is states else value))
    before, after = _first_tensor(output), _first_tensor(other)
    if before.shape[:2] != states.shape[:2]:
        return False
    before, after = before[:, first:].float(), after[:, first:].float()
    differences = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-6)
    # Experts round differently if other tokens are beside these.
    tolerance = 1e-4 if states.dtype == torch.float32 else 1e-2
    return not bool((differences < tolerance).all())


def _first_tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def run_by_example(lm: PreTrainedModel, mixers: Iterable[Mixer]) -> None:
    """Calls mixers once per example of a packed row, in place.

    Args:
        lm: The model, before gradient checkpointing, compile and sharding.
        mixers: The result of `find_mixers`, on this rank or on rank 0.
    """
    for mixer in mixers:
        module = lm.get_submodule(mixer.name)
        module.forward = _by_example(module.forward)  # type: ignore[method-assign]
    for layer in _layers_that_keep_bounds(lm, mixers):
        kind: Any = type(layer)
        layer.__class__ = _handing(kind)


def run_whole_rows(lm: PreTrainedModel, mixers: Iterable[Mixer]) -> None:
    """Undoes `run_by_example`."""
    for mixer in mixers:
        del lm.get_submodule(mixer.name).forward
    for layer in _layers_that_keep_bounds(lm, mixers):
        kind: Any = type(layer)
        layer.__class__ = kind.__base__


def _layers_that_keep_bounds(lm: PreTrainedModel, mixers: Iterable[Mixer]) -> list[nn.Module]:
    names = {mixer.layer for mixer in mixers if mixer.layer is not None}
    return [lm.get_submodule(name) for name in names]


def _by_example(own: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a forward pass that calls another one on examples as rows, and joins the outputs.

    Without bounds, in generation for example, it only calls the other one.
    """

    # The number of examples differs from pack to pack, and each would be compiled again.
    @torch.compiler.disable
    def forward(*args: Any, **kwargs: Any) -> Any:
        bounds = kwargs.get("cu_seq_lens_host", _handed_bounds.get())
        if bounds is None:
            return own(*args, **kwargs)
        inputs = _Inputs(args, kwargs).without_bounds()
        lengths = bounds.diff().tolist()
        parts: dict[int, Tensor] = {}
        for group in _groups(lengths):
            rows = inputs.map(partial(_as_rows, lengths=lengths, group=group))
            output = own(*rows.args, **rows.kwargs)
            for row, index in zip(_first_tensor(output), group, strict=True):
                parts[index] = row[None, : lengths[index]]
        joined = torch.cat([parts[index] for index in range(len(lengths))], dim=1)
        # The rest are states and attention weights, which training does not use.
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    return forward


def _groups(lengths: list[int]) -> list[list[int]]:
    """Groups examples of similar length, which become the padded rows of one call.

    One call per example would be slow for many short ones, and one call for all would compute a lot
    of padding.

    Args:
        lengths: [S] tokens of the examples.

    Returns:
        The indices of the examples in each group.
    """
    groups: list[list[int]] = []
    num_tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        length = lengths[index]
        num_tokens += length
        # This is the longest of the group so far.
        if groups and length * (len(groups[-1]) + 1) <= MAX_PADDING * num_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            num_tokens = length
    return groups


def _as_rows(value: Any, lengths: list[int], group: list[int]) -> Any:
    """Takes examples out of a row, as padded rows.

    No mask is needed: a causal module reads nothing to the right.

    Args:
        value: An argument of a module. Tensors [1, T, ...], also in tuples such as (cos, sin), are
            changed.
        lengths: [S] tokens of the examples.
        group: Indices of the examples to take.
    """
    if isinstance(value, tuple):
        return tuple(_as_rows(part, lengths, group) for part in value)
    if not isinstance(value, Tensor) or value.shape[:2] != (1, sum(lengths)):
        return value
    examples = value[0].split(lengths)
    rows = [examples[index] for index in group]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@lru_cache
def _handing(kind: Any) -> Any:
    """Makes a subclass of a layer that hands the bounds of the examples to the mixers in it.

    It is a subclass, because transformers recomputes the forward pass of the class in gradient
    checkpointing (`GradientCheckpointingLayer`). If only the forward pass of the instance handed
    them, the recomputation would miss them.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        token = _handed_bounds.set(kwargs.get("cu_seq_lens_host"))
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            _handed_bounds.reset(token)

    return type(kind.__name__, (kind,), {"forward": forward})
