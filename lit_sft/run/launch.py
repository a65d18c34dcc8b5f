"""Ranks that a launcher has started, as `torchrun`, `accelerate launch` or the pods of a job do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from typing_extensions import override

from lit_sft.errors import UserError

AUTO = ("auto", -1, "-1")
"""Values of `trainer.devices` that leave the number open."""


class StartedRanks(TorchElasticEnvironment):
    """Ranks that their environment numbers, as `torchrun` does; a pod without LOCAL_RANK has one.

    Lightning by itself only recognizes those of `torchrun`.
    """

    @override
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    @override
    def node_rank(self) -> int:
        per_node = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return int(os.environ.get("GROUP_RANK", self.global_rank() // int(per_node)))


@dataclass(frozen=True)
class Started:
    """How many ranks a launcher has started."""

    world_size: int
    per_node: int | None
    """None if the launcher does not say."""


def started() -> Started | None:
    """Returns the ranks of the launcher; None if this process may start the other ranks itself.

    A cluster of SLURM is checked elsewhere (`slurm`).
    """
    environ = os.environ
    elastic = TorchElasticEnvironment.detect()
    # Lightning's own launcher gives the ranks that it starts no RANK.
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    if SLURMEnvironment.detect() and not elastic:
        return None
    world_size = int(environ["WORLD_SIZE"])
    if world_size == 1 and not elastic:
        return None
    if "LOCAL_WORLD_SIZE" in environ:
        return Started(world_size, int(environ["LOCAL_WORLD_SIZE"]))
    return Started(world_size, None if "LOCAL_RANK" in environ else 1)


def is_one_of_many() -> bool:
    """Whether a launcher or SLURM has started other ranks beside this process."""
    ranks = started()
    if ranks is not None:
        return ranks.world_size > 1
    return SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def take_ranks(trainer: Any, asks_for_nodes: bool) -> list[StartedRanks]:
    """Makes the trainer's settings those of the ranks that a launcher has started.

    Args:
        trainer: The settings of the trainer; `devices` is completed if it is `auto`, and
            `num_nodes` too if the user has not set it.
        asks_for_nodes: Whether the user has set `num_nodes`.

    Returns:
        The cluster environment for the trainer's plugins; empty if no launcher has started ranks.

    Raises:
        UserError: There are more or fewer ranks than the settings ask for.
    """
    ranks = started()
    if ranks is None or _names_an_environment(trainer):
        return []
    if ranks.world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {ranks.world_size}, but MASTER_ADDR is not set, so the ranks could not"
            " meet: set MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE"
        )
    per_node = ranks.per_node or ranks.world_size // trainer.num_nodes
    num_nodes = max(1, ranks.world_size // max(1, per_node))
    if trainer.devices in AUTO:
        trainer.devices = per_node
        if not asks_for_nodes:
            trainer.num_nodes = num_nodes
    has_all = _number(trainer.devices) * trainer.num_nodes == ranks.world_size
    if not has_all or _number(trainer.devices) != per_node:
        raise UserError(
            f"the launcher has started {ranks.world_size} ranks (WORLD_SIZE), {per_node} on each"
            f" node, but trainer.devices is {trainer.devices} and trainer.num_nodes"
            f" {trainer.num_nodes}: set trainer.devices to {per_node} and trainer.num_nodes to"
            f" {num_nodes}, or start the program without the launcher"
        )
    return [StartedRanks()]


def _names_an_environment(trainer: Any) -> bool:
    """Whether the user has set a cluster environment among the trainer's plugins."""
    plugins = trainer.plugins or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    return any("Environment" in str(plugin) for plugin in plugins)


def _number(devices: Any) -> int:
    """Returns how many devices `trainer.devices` names: a number, a list, or '0,1'."""
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part] if "," in devices else int(devices)
    return len(devices) if isinstance(devices, list) else devices
