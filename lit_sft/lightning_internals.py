"""Private attributes of Lightning that the package touches, each with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning as L

# ---------------------------------------------------------------------- Lightning


def validates_by_clock(trainer: L.Trainer) -> bool:
    """Whether `trainer.val_check_interval` is a time, which Lightning keeps in this attribute only."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


def begin_new_epoch(trainer: L.Trainer) -> None:
    """Lets the fit loop begin an epoch, and not continue the one of the checkpoint.

    With `max_steps` and no `max_epochs` Lightning "restarts" an epoch that is over, too, and then ends the next one at
    once. The public setter of the fit loop turns the flag on again in that case, so the attribute behind it is set.
    """
    fit_loop = trainer.fit_loop
    fit_loop._restarting = False
    fit_loop.epoch_loop.restarting = False
