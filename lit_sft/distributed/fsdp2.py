"""The strategy `fsdp2`, which shards every decoder layer, and the check of other strategies."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.optim import Optimizer
from typing_extensions import override

from lit_sft import lightning_internals
from lit_sft.checkpoint import sharded
from lit_sft.checkpoint.io import CheckpointFiles, open_checkpoint
from lit_sft.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 (`fully_shard`) over all devices of all nodes.

    By default Lightning would make the devices of a node a tensor-parallel group, and split the
    data over nodes only.

    Args:
        cpu_offload: Keep parameters, gradients and optimizer state in host memory between uses.
        reshard_after_forward: Free a layer's gathered parameters after its forward pass, and gather
            them again for the backward pass. False needs more memory and less communication.
        sync_every_micro_batch: Reduce gradients in each micro-batch. False reduces them once per
            optimizer step. This needs less communication, but every rank then holds the gradients
            of the whole model in fp32.
        save_distributed_checkpoint: Every rank writes its part into a directory. False gathers one
            file on rank 0.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        sync_every_micro_batch: bool = True,
        save_distributed_checkpoint: bool = True,
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.sync_every_micro_batch = sync_every_micro_batch

    @property
    def _sharded(self) -> Any:
        """The sharded module, which computes the loss."""
        assert self.lightning_module is not None
        return self.lightning_module.model

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        if self._checkpoint_io is None:
            self._checkpoint_io = CheckpointFiles()
        super().setup_environment()

    @override
    def _get_process_group_backend(self) -> str:
        if self.cpu_offload and self.root_device.type == "cuda":
            # The norm of offloaded gradients is reduced on the CPU, which NCCL cannot do.
            return "cpu:gloo,cuda:nccl"
        return super()._get_process_group_backend()

    @override
    def setup(self, trainer: L.Trainer) -> None:
        if trainer.precision.startswith("16"):
            raise UserError(
                "trainer.strategy fsdp2 does not train in fp16: set trainer.precision "
                f"{trainer.precision} to bf16-mixed"
            )
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            # FSDP2 cannot gather in inference mode. Lightning turns it off for FSDP1 and gloo only.
            loop.inference_mode = False
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
        if self.cpu_offload:
            # Lightning has moved the shards to the device, too.
            self._sharded.to("cpu")
            for buffer in self._sharded.buffers():
                buffer.data = buffer.data.to(self.root_device)

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Turns off the reduction of gradients, as `sync_every_micro_batch` says.

        Lightning runs every micro-batch of an optimizer step but the last in this context.
        """
        self._sharded.set_requires_gradient_sync(self.sync_every_micro_batch)
        yield
        self._sharded.set_requires_gradient_sync(True)

    # ------------------------------------------------------------------ checkpoints
    # They hold the same tree as a checkpoint of one device.

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Saves the part of every rank, or gathers the whole state in one file of rank 0."""
        if not self._save_distributed_checkpoint:
            checkpoint = sharded.gather(checkpoint, keep=self.is_global_zero)
        if self._save_distributed_checkpoint or self.is_global_zero:
            self.checkpoint_io.save_checkpoint(
                checkpoint, filepath, storage_options=storage_options
            )

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return open_checkpoint(checkpoint_path)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        saved = checkpoint["state_dict"]
        for name in own.keys() & saved.keys():
            sharded.copy_into(own[name], saved[name])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = []
            for group in optimizer.param_groups:
                parameters += group["params"]
            own = {}
            for number, values in state["state"].items():
                own[number] = sharded.shard_like(parameters[number], values)
            optimizer.load_state_dict({**state, "state": own})


def register() -> None:
    """Registers `fsdp2` with Lightning as a value of `trainer.strategy`."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register(
            "fsdp2",
            FSDP2Strategy,
            description="FSDP2: fully sharded data parallel over all devices",
        )


def check(strategy: Strategy) -> None:
    """Refuses strategies that are not known to give the exact loss average.

    For DDP it also turns off the copies of gradients beside DDP's buckets.

    Raises:
        UserError: The strategy is neither one device, DDP nor `fsdp2`.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)):
        raise UserError(
            f"trainer.strategy {type(strategy).__name__} is not known to give the exact loss"
            " average: set it to auto, ddp or fsdp2"
        )
    if isinstance(strategy, DDPStrategy):
        lightning_internals.share_gradient_buckets(strategy)
