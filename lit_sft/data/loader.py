"""The loader that hands out batches, and knows how long it was waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch.utils.data import DataLoader

from lit_sft.types import Batch


class TimedLoader(DataLoader[Batch]):
    """A DataLoader that counts the seconds in which its next batch was not there yet."""

    waited = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - started
            yield batch
