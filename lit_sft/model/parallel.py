"""Gradient checkpointing, compile and sharding: applied to a finished model, in this order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_sft.errors import UserError
from lit_sft.ranks import broadcast_from_rank_zero

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


NARROW = 0.1
"""A matrix whose sides have a smaller ratio than this is taken for that of an adapter."""


def decoder_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """Returns the decoder layers (blocks), which are compiled and sharded one by one.

    Raises:
        UserError: The architecture does not name its blocks.
    """
    # transformers has no public list of a model's blocks. Accelerate's FSDP reads this one, too.
    names = set(lm._no_split_modules or ())
    layers = [module for module in lm.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(lm).__name__} does not say which of its modules are decoder layers: set"
            " trainer.strategy to ddp and model.compile to false"
        )
    return layers


def apply_gradient_checkpointing(lm: PreTrainedModel, selective: bool = False) -> None:
    """Saves only the input of each block, and recomputes its activations in the backward pass.

    Args:
        lm: The causal LM.
        selective: Also save the results of attention and of every second matrix product, as
            torchtitan does. That takes a third of the memory for about half of the recomputation.
    """
    # With the reentrant variant, adapters over a frozen embedding get no gradient (peft #1142,
    # transformers #42489).
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if selective:
        kwargs["context_fn"] = _save_costly_results
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _save_costly_results() -> Any:
    """Makes the contexts of one selectively checkpointed block.

    Every second matrix product is saved. The forward pass and its recomputation count the products
    separately, so that they agree.
    """
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    # By whether it is the recomputation.
    num_products = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operation)
        is_saved = "attention" in name or "varlen" in name
        if name == "aten.mm.default":
            inner, width = args[1].shape
            # The second product of an adapter is cheap, and the result of its first is small.
            if inner < width * NARROW:
                return CheckpointPolicy.PREFER_RECOMPUTE
            if width < inner * NARROW:
                return CheckpointPolicy.MUST_SAVE
            num_products[context.is_recompute] += 1
            is_saved = num_products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_compile(lm: PreTrainedModel) -> None:
    """Compiles every block in place, with dynamic shapes because lengths vary.

    The names of parameters stay. All blocks share one compiled graph, for packs of any length. A
    second one is compiled if the number of tokens in the first pack is also a width in the block,
    because torch takes them for the same dimension.
    """
    for layer in decoder_layers(lm):
        layer.compile(dynamic=True)


def is_compiled(lm: nn.Module) -> bool:
    """Whether `nn.Module.compile` was called on a part of the model."""
    # torch has no public way to tell.
    return any(module._compiled_call_impl is not None for module in lm.modules())


def apply_fsdp2(
    loss: nn.Module,
    lm: PreTrainedModel,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
) -> None:
    """Shards each block, then embedding, norm and head together with the loss.

    The ranks other than 0, whose weights are on the meta device, get their shards from rank 0.

    Args:
        loss: Module whose forward uses the head, so that the head is gathered there.
        lm: The causal LM within it.
        mesh: Data-parallel mesh of one dimension.
        compute_dtype: Dtype of the gathered parameters. Gradients are reduced in fp32.
        cpu_offload: Whether shards and optimizer state are in host memory.
        reshard_after_forward: Whether a block frees its gathered parameters between its forward and
            backward pass.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    offload_policy = OffloadPolicy()
    if cpu_offload:
        offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": offload_policy,
    }
    whole = {name: tensor.detach() for name, tensor in _tensors(loss).items()}
    for layer in decoder_layers(lm):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(loss, **options)
    register_fsdp_forward_method(loss, "generate")
    if mesh.size() > 1:
        _fill_from_rank_zero(loss, whole, mesh, cpu_offload)


def follow_rank_zero(loss: nn.Module) -> None:
    """Casts tensors on the meta device to the dtypes of rank 0. A collective call.

    Args:
        loss: The model, with weights on rank 0 only.

    Raises:
        UserError: On every rank, if a rank has built other tensors than rank 0, or tensors that
            cannot be filled from it.
    """
    ours = _tensors(loss)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    dtypes = {name: tensor.dtype for name, tensor in ours.items()}
    rank_zero_shapes, dtypes = broadcast_from_rank_zero((shapes, dtypes))
    strangers = {name for name, _ in shapes.items() ^ rank_zero_shapes.items()}
    for name, module in loss.named_modules():
        # Tensors that are neither parameters nor buffers cannot be filled.
        strangers |= {f"{name}.{key}" for key, value in vars(module).items() if _is_meta(value)}
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, sorted(strangers))
    found = [name for names in everywhere for name in names]
    if found:
        raise UserError(
            f"the model is built differently without its weights ({found[0]}): set trainer.strategy"
            " to ddp"
        )
    for name, tensor in ours.items():
        tensor.data = tensor.data.to(dtypes[name])


@torch.no_grad()
def _fill_from_rank_zero(
    loss: nn.Module, whole: dict[str, Tensor], mesh: DeviceMesh, cpu_offload: bool
) -> None:
    """Distributes the weights of rank 0, one tensor at a time, and its whole buffers.

    Args:
        loss: The sharded module.
        whole: Its tensors before sharding, by name. Only those of rank 0 have values. The dict is
            emptied, so that each tensor is freed.
        mesh: Data-parallel mesh.
        cpu_offload: Whether shards are in host memory.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if dist.get_rank() > 0:
        loss.to_empty(device="cpu" if cpu_offload else mesh.device_type)
    for name, tensor in _tensors(loss).items():
        full = whole.pop(name)
        if full.is_meta:
            full = torch.empty_like(full, device=mesh.device_type)
        else:
            full = full.to(mesh.device_type)
        full = full.contiguous()
        if isinstance(tensor, DTensor):
            shard = distribute_tensor(full, mesh, tensor.placements)
            tensor.to_local().copy_(shard.to_local())
        else:
            dist.broadcast(full, src=0)
            tensor.copy_(full)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers by name, also non-persistent ones. Tied weights appear once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Gathers the full state dict on the CPU of rank 0. A collective call.

    Returns:
        Tensors by name. Empty on other ranks.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state
