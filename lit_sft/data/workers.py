"""One function over many items in worker processes; the results come in order, and an error at its
item's turn.
"""

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
"""Workers: the process that takes what they make keeps no more of them busy."""

_TOKENIZERS_PARALLELISM = "TOKENIZERS_PARALLELISM"

_function: Callable[[Any], Any]
"""What this worker calls; set when it starts, so that it is not sent along with every item."""


def num_workers_of(setting: int | Literal["auto"]) -> int:
    """Processes for `data.num_workers`: `auto` is one for each core that this process may use.

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
    """Calls `function` on every item; workers are at most two items each ahead of what was taken.

    Args:
        function: Inherited by the workers on Linux; pickled, once for each, elsewhere.
        items: Small enough to be pickled.
        num_workers: Up to 1: no processes, everything is done here.

    Raises:
        UserError: A worker died.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    # A fork takes milliseconds; elsewhere it is unsafe or missing, and workers import everything
    # anew.
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
    """For workers that start meanwhile: each has one core, and the threads of `tokenizers` do not
    survive a fork.
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
    # The parent handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_die_with_parent, daemon=True).start()
    # The garbage collector would touch, and so copy, the memory pages that are shared with the
    # parent.
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
