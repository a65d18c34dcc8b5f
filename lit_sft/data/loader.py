"""A DataLoader that measures how long training waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch.utils.data import DataLoader

from lit_sft.types import Batch


class TimedLoader(DataLoader[Batch]):
    """A DataLoader that adds up the time until each batch is ready."""

    waited = 0.0
    """Seconds that the consumer has waited for batches, since the loader was made."""

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
