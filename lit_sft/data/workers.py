"""Maps a function over items in worker processes, with results and errors in order."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, Literal, TypeVar

from lit_sft.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

MOST = 16
"""Largest number of workers. The process that collects their results cannot keep up with more."""

_TOKENIZERS_PARALLELISM = "TOKENIZERS_PARALLELISM"

_function: Callable[[Any], Any]
"""The function of this worker. It is set once, so that it is not pickled with every item."""


def num_workers_of(setting: int | Literal["auto"]) -> int:
    """Returns the number of processes for `data.num_workers`; `auto`: one per usable core.

    Raises:
        UserError: It is negative.
    """
    if setting != "auto":
        if setting < 0:
            raise UserError(f"data.num_workers is {setting}, expected auto or 0 and more")
        return setting
    if sys.platform == "linux":
        return min(MOST, len(os.sched_getaffinity(0)))
    return min(MOST, os.cpu_count() or 1)


def map_in_order(function: Callable[[T], R], items: Iterable[T], num_workers: int) -> Iterator[R]:
    """Calls `function` on every item, and yields the results in order.

    The workers compute at most two items each in advance.

    Args:
        function: Inherited by the workers on Linux; elsewhere pickled once per worker.
        items: Items to pickle.
        num_workers: Number of processes; 0 or 1: none, everything runs in this process.

    Raises:
        UserError: A worker died.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    # A fork takes milliseconds. Outside Linux it is unsafe or missing.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    results: deque[Future[R]] = deque()
    with _single_threaded_tokenizers():
        pool = ProcessPoolExecutor(num_workers, context, _start, (function,))
        try:
            for item in items:
                results.append(pool.submit(_call, item))
                if len(results) > 2 * num_workers:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenizes rows was killed, probably because memory ran out: lower"
                " data.num_workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Turns off the threads of `tokenizers` in workers that start inside the block.

    Each worker has one core, and threads do not survive a fork.
    """
    before = os.environ.get(_TOKENIZERS_PARALLELISM)
    os.environ[_TOKENIZERS_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TOKENIZERS_PARALLELISM]
        else:
            os.environ[_TOKENIZERS_PARALLELISM] = before


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # Only the parent handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_die_with_parent, daemon=True).start()
    # The garbage collector would write to memory pages shared with the parent, and so copy them.
    gc.freeze()
    gc.disable()


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    result = _function(item)
    gc.collect()
    return result
