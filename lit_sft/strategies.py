"""Our `fsdp2` strategy: all devices share the data, every decoder layer is sharded."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from typing_extensions import override

from lit_sft.types import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 (`fully_shard`) over all devices.

    Lightning's own default would make the devices of a node a tensor-parallel group and split the data over nodes only.

    Args:
        cpu_offload: Keep parameters, gradients and optimizer state in host memory between uses.
        save_distributed_checkpoint: Every rank writes its part into a directory; false gathers one file on rank 0.
    """

    def __init__(self, cpu_offload: bool = False, save_distributed_checkpoint: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        self.cpu_offload = cpu_offload

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @override
    def setup(self, trainer: L.Trainer) -> None:
        if trainer.precision.startswith("16"):
            raise UserError(
                f"trainer.strategy fsdp2 does not train in fp16: set trainer.precision "
                f"{trainer.precision} to bf16-mixed"
            )
        assert self.lightning_module is not None
        self.lightning_module.shard(self.device_mesh["data_parallel"], self.cpu_offload)  # type: ignore[operator]
        super().setup(trainer)


def register() -> None:
    """Makes `trainer.strategy: fsdp2` known to Lightning."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register(
            "fsdp2", FSDP2Strategy, description="FSDP2: fully sharded data parallel over all devices"
        )
