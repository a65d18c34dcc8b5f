"""Settings of Lightning's trainer that count forward passes, in terms of optimizer steps.

They are `trainer.limit_train_batches` and `trainer.val_check_interval`.
"""

from __future__ import annotations

from lit_sft.data.sampler import StepOrder
from lit_sft.errors import UserError


def limited_batches(order: StepOrder, limit: int | float | None) -> int:
    """Returns the forward passes of each rank in an epoch that is cut short.

    Args:
        order: The order of the training set.
        limit: `trainer.limit_train_batches`: a number of forward passes (int), a share of the epoch
            (float), or None for all of it.
    """
    if limit is None:
        return order.batches_per_epoch
    if isinstance(limit, int):
        return min(order.batches_per_epoch, limit)
    return int(order.batches_per_epoch * limit)


def validation_interval(
    order: StepOrder, interval: int | float, batches: int, each_epoch: bool = True
) -> int | float:
    """Returns when to validate: `trainer.val_check_interval`, in whole optimizer steps.

    A run cannot be resumed from within an optimizer step, so a share of an epoch is rounded to the
    end of a step.

    Args:
        order: The order of the training set.
        interval: Number of forward passes (int), or share of the epoch (float, 1.0 is all).
        batches: Forward passes of the epoch.
        each_epoch: Whether each epoch counts from 0. Then the interval must fit into an epoch.

    Returns:
        A number of forward passes, or 1.0 for the end of each epoch.

    Raises:
        UserError: The interval ends within an optimizer step, or is longer than the epoch.
    """
    if isinstance(interval, int) and each_epoch and interval > batches:
        raise UserError(
            f"trainer.val_check_interval {interval} counts forward passes, but an epoch has"
            f" {batches}: set it to at most that, or to 1.0 for the end of each epoch"
        )
    if isinstance(interval, int) and interval % order.accumulation:
        raise UserError(
            f"trainer.val_check_interval {interval} counts forward passes, {order.accumulation} of"
            f" which make an optimizer step: set it to a multiple of {order.accumulation}"
        )
    if isinstance(interval, int) or interval == 1.0:
        return interval
    steps = round(interval * batches / order.accumulation)
    return max(1, steps) * order.accumulation


def check_validations(order: StepOrder, by_clock: bool, over_epochs: bool) -> None:
    """Refuses validations that ranks would start at different times, or within a step.

    Args:
        order: The order of the training set.
        by_clock: Whether a validation is due after some time.
        over_epochs: Whether it is due after some forward passes, counted over all epochs.

    Raises:
        UserError: The clocks of several ranks would differ, or a validation would fall within an
            optimizer step.
    """
    if by_clock and order.world_size > 1:
        raise UserError(
            "trainer.val_check_interval by the clock would come on each rank at another time: set"
            " it to a number of forward passes"
        )
    if over_epochs and order.batches_per_epoch % order.accumulation:
        raise UserError(
            "trainer.check_val_every_n_epoch null counts forward passes over epochs, but one has"
            f" {order.batches_per_epoch}, no multiple of the {order.accumulation} of an optimizer"
            " step: leave it out"
        )
