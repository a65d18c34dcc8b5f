"""What is done to a finished model from outside, in this order: gradient checkpointing, compile, sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_sft.types import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def decoder_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """The blocks that are checkpointed, compiled and sharded one by one.

    Raises:
        UserError: The architecture does not name its blocks.
    """
    names = set(lm._no_split_modules or ())
    layers = [module for module in lm.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(lm).__name__} does not say which of its modules are decoder layers: set trainer.strategy to "
            "ddp and model.compile to false"
        )
    return layers


def apply_gradient_checkpointing(lm: PreTrainedModel, selective: bool = False) -> None:
    """Keeps only the input of each block and recomputes the rest in the backward pass.

    Args:
        lm: The causal LM.
        selective: Keep what attention and every second matrix product gave as well (as torchtitan does): about half of
            the recomputation for a third of the memory.
    """
    # The reentrant variant gives no gradient to adapters over a frozen embedding (peft #1142, transformers #42489).
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if selective:
        kwargs["context_fn"] = _keep_costly
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _keep_costly() -> Any:
    """Contexts of one checkpointed block: what is kept is counted anew in its forward pass and its recomputation."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    products = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operation)
        keep = "attention" in name or "varlen" in name
        if name == "aten.mm.default":
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_compile(lm: PreTrainedModel) -> None:
    """Compiles every block in place (parameter names stay); lengths vary from batch to batch, so shapes are dynamic."""
    for layer in decoder_layers(lm):
        layer.compile(dynamic=True)


def apply_fsdp2(
    loss: nn.Module, lm: PreTrainedModel, mesh: DeviceMesh, compute_dtype: torch.dtype, cpu_offload: bool
) -> None:
    """Shards each block, then the rest (embedding, norm, head) with the module that computes the loss.

    Args:
        loss: Module whose forward uses the head, so that it is gathered there.
        lm: The causal LM within it.
        mesh: Data-parallel mesh of one dimension.
        compute_dtype: Type of the gathered parameters; gradients are reduced in fp32.
        cpu_offload: Keep shards and optimizer state in host memory.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for layer in decoder_layers(lm):
        fully_shard(layer, **options)
    fully_shard(loss, **options)
    register_fsdp_forward_method(loss, "generate")


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The whole state on the CPU of rank 0 (empty elsewhere), whatever the sharding. A collective call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def wrap_layers_with_fsdp(strategy_options: dict[str, Any], lm: PreTrainedModel) -> None:
    """Tells Lightning's FSDPStrategy (FSDP1) to wrap the decoder layers, unless the user gave a policy."""
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    strategy_options.setdefault("auto_wrap_policy", ModuleWrapPolicy({type(layer) for layer in decoder_layers(lm)}))
    strategy_options.setdefault("use_orig_params", True)
