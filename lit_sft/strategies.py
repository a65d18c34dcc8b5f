"""Which strategies there are, and our `fsdp2`: all devices share the data, every decoder layer is sharded."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from typing_extensions import override

from lit_sft.types import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 (`fully_shard`) over all devices of all nodes.

    Lightning's own default would make the devices of a node a tensor-parallel group and split the data over nodes only.

    Args:
        cpu_offload: Keep parameters, gradients and optimizer state in host memory between uses.
        reshard_after_forward: Gather a layer's parameters once more for the backward pass; false keeps them in between:
            more memory, less communication.
        sync_every_micro_batch: Reduce gradients in each micro-batch; false does so once per optimizer step: less
            communication, but every rank then holds the gradients of the whole model in fp32.
        save_distributed_checkpoint: Every rank writes its part into a directory; false gathers one file on rank 0.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        sync_every_micro_batch: bool = True,
        save_distributed_checkpoint: bool = False,
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.sync_every_micro_batch = sync_every_micro_batch

    @property
    def _sharded(self) -> Any:
        """The module that computes the loss."""
        assert self.lightning_module is not None
        return self.lightning_module.model

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @override
    def _get_process_group_backend(self) -> str:
        if self.cpu_offload and self.root_device.type == "cuda":  # the norm of offloaded gradients is summed on the CPU
            return "cpu:gloo,cuda:nccl"
        return super()._get_process_group_backend()

    @override
    def setup(self, trainer: L.Trainer) -> None:
        if trainer.precision.startswith("16"):
            raise UserError(
                f"trainer.strategy fsdp2 does not train in fp16: set trainer.precision "
                f"{trainer.precision} to bf16-mixed"
            )
        assert self.lightning_module is not None
        self.lightning_module.shard(  # type: ignore[operator]
            self.device_mesh["data_parallel"],
            cpu_offload=self.cpu_offload,
            reshard_after_forward=self.reshard_after_forward,
        )
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        super().model_to_device()
        if self.cpu_offload:  # which took the shards along
            self._sharded.to("cpu")
            for buffer in self._sharded.buffers():
                buffer.data = buffer.data.to(self.root_device)

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Lightning runs every micro-batch but the last of an optimizer step in it."""
        self._sharded.set_requires_gradient_sync(self.sync_every_micro_batch)
        yield
        self._sharded.set_requires_gradient_sync(True)


def register() -> None:
    """Makes `trainer.strategy: fsdp2` known to Lightning."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register(
            "fsdp2", FSDP2Strategy, description="FSDP2: fully sharded data parallel over all devices"
        )


def check(strategy: Strategy) -> None:
    """Refuses strategies under which the gradient would not be the mean over all targets.

    Raises:
        UserError: It is none of ours.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, FSDP2Strategy)):
        raise UserError(
            f"trainer.strategy {type(strategy).__name__} is not known to give the exact loss average: set it to auto, "
            "ddp, fsdp2 or fsdp"
        )
