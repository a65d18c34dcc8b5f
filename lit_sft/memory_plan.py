"""Estimates the memory of a training step, for this run or for a run that `doctor` plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lit_sft.datamodule import SFTDataModule
from lit_sft.errors import UserError
from lit_sft.model import load, memory_estimate
from lit_sft.model_builder import base_directory, choose_trained, model_directory, stored_dtype
from lit_sft.module import SFTModule
from lit_sft.training.optim import bytes_per_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """The devices of a planned run. `doctor` itself uses only one of them."""

    devices: int = 1
    """Number of devices, over all nodes."""
    sharded: bool = False
    """Whether weights, gradients and optimizer state are sharded over the devices."""

    @classmethod
    def of_settings(cls, devices: Any, num_nodes: int, strategy: Any, present: int) -> Plan:
        """Reads the plan from the settings of the trainer.

        Args:
            devices: `trainer.devices`. `auto` and -1 take all devices of this machine.
            num_nodes: `trainer.num_nodes`.
            strategy: `trainer.strategy`: a name, or a class with its arguments.
            present: Number of devices of this machine.

        Raises:
            UserError: `trainer.devices` is neither a number nor a list of numbers.
        """
        is_sharded = "fsdp" in str(strategy).lower()
        return cls(_devices_per_node(devices, present) * num_nodes, is_sharded)


def _devices_per_node(devices: Any, present: int) -> int:
    """Counts the devices that `trainer.devices` names (see `Plan.of_settings`)."""
    if devices in ("auto", -1, "-1"):
        return present
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    if isinstance(devices, list):
        return len(devices)
    if not str(devices).isdecimal():
        raise UserError(
            f"trainer.devices is {devices}; set it to auto, a number, or a list of numbers"
        )
    return int(devices)


def needed_memory(
    trainer: L.Trainer, module: SFTModule, datamodule: SFTDataModule, plan: Plan | None = None
) -> memory_estimate.MemoryEstimate:
    """Estimates the memory that a training step needs on each device.

    Args:
        trainer: Its precision and device are used.
        module: Its settings are used; no weights are loaded.
        datamodule: Its training set must be prepared.
        plan: The devices of the run. None takes those of the trainer.
    """
    if plan is None:
        is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        plan = Plan(trainer.world_size, is_sharded)
    options = module.options
    data = datamodule.options
    precision = trainer.precision
    lm, num_parameters, num_linear = _model_without_weights(options)
    adapted = options.is_adapted
    stored = stored_dtype(options.dtype, precision, adapted)
    trained_dtype = torch.float32 if adapted else stored
    computes_in_half = precision.startswith(("bf16", "16"))
    step = memory_estimate.StepShape(
        num_parameters=num_parameters,
        num_trained=lm.num_parameters(only_trainable=True),
        tokens=_longest_pack(datamodule) * data.micro_batch_size,
        stored_bytes=stored.itemsize,
        compute_bytes=2 if computes_in_half else 4,
        optimizer_bytes=bytes_per_parameter(options.optimizer, trained_dtype),
        gradient_checkpointing=options.gradient_checkpointing,
        accumulates=data.global_batch_size > data.micro_batch_size * plan.devices,
        shards=plan.devices if plan.sharded else 1,
        adapted=adapted,
        input_copies=not _is_plain_lora(options),
        normed_heads=any(name.endswith("q_norm") for name, _ in lm.named_modules()),
        on_cpu=trainer.strategy.root_device.type == "cpu",
        num_quantized=num_linear if options.quantization is not None else 0,
    )
    return memory_estimate.estimate(lm.config, step)


def _longest_pack(datamodule: SFTDataModule) -> int:
    """The number of tokens in the fullest row of the training set."""
    lengths = datamodule.data.caches["train"].lengths
    return int(datamodule.pack("train").num_tokens(lengths).max())


def _is_plain_lora(options: Any) -> bool:
    """Whether adapted layers keep no copy of their input. True without adapters, too."""
    if options.quantization is not None:
        return False
    lora = options.lora
    return lora is None or not (lora.use_dora or lora.lora_dropout)


def _model_without_weights(options: Any) -> tuple[PreTrainedModel, int, int]:
    """Builds the model on the meta device, and marks the trained parameters.

    Returns:
        The model, the number of parameters of its base, and how many of them belong to linear
        layers other than the head. bitsandbytes quantizes those, and no experts.
    """
    path = base_directory(model_directory(options.model_name_or_path, options.revision))
    lm = load.load_model(
        path,
        init=options.init,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=options.trust_remote_code,
        seed=0,
        on_meta=True,
    )
    num_parameters = lm.num_parameters()
    num_linear = 0
    for module in lm.modules():
        if isinstance(module, nn.Linear) and module is not lm.get_output_embeddings():
            num_linear += module.weight.numel()
    choose_trained(lm, path, options, on_meta=True)
    return lm, num_parameters, num_linear
