"""What is done to a finished model from outside, in this order: gradient checkpointing, compile,
sharding.
"""

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
"""Of a matrix, one side to the other, from which on it is that of an adapter."""


def decoder_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """The blocks that are checkpointed, compiled and sharded one by one.

    Raises:
        UserError: The architecture does not name its blocks.
    """
    # Transformers has no public list of a model's blocks; FSDP of accelerate reads this one, too.
    names = set(lm._no_split_modules or ())
    layers = [module for module in lm.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(lm).__name__} does not say which of its modules are decoder layers: set"
            " trainer.strategy to ddp and model.compile to false"
        )
    return layers


def apply_gradient_checkpointing(lm: PreTrainedModel, selective: bool = False) -> None:
    """Keeps only the input of each block and recomputes the rest in the backward pass.

    Args:
        lm: The causal LM.
        selective: Keep what attention and every second matrix product gave as well (as torchtitan
            does): about half of the recomputation for a third of the memory.
    """
    # The reentrant variant gives no gradient to adapters over a frozen embedding (peft #1142,
    # transformers #42489).
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if selective:
        kwargs["context_fn"] = _keep_costly
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _keep_costly() -> Any:
    """Contexts of one checkpointed block: what is kept is counted anew in its forward pass and its
    recomputation.
    """
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    products = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operation)
        keep = "attention" in name or "varlen" in name
        if name == "aten.mm.default":
            inner, width = args[1].shape
            if inner < width * NARROW:
                # An adapter's second product costs little, its first has a small result.
                return CheckpointPolicy.PREFER_RECOMPUTE
            if width < inner * NARROW:
                return CheckpointPolicy.MUST_SAVE
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_compile(lm: PreTrainedModel) -> None:
    """Compiles every block in place (parameter names stay); lengths vary from batch to batch, so
    shapes are dynamic.

    All blocks share one piece of code for all packs. A second one is made where the first pack has
    as many tokens as the block has features somewhere, which torch takes for the same number.
    """
    for layer in decoder_layers(lm):
        layer.compile(dynamic=True)


def is_compiled(lm: nn.Module) -> bool:
    """Whether `nn.Module.compile` was called on a part of the model."""
    # torch has no public way to ask for it.
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
    """Shards each block, then the rest (embedding, norm, head) with the module that computes the
    loss.

    What is on the meta device on ranks other than 0 gets the values of rank 0.

    Args:
        loss: Module whose forward uses the head, so that it is gathered there.
        lm: The causal LM within it.
        mesh: Data-parallel mesh of one dimension.
        compute_dtype: Type of the gathered parameters; gradients are reduced in fp32.
        cpu_offload: Keep shards and optimizer state in host memory.
        reshard_after_forward: Free a block's gathered parameters between its forward and its
            backward pass.
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
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
            if cpu_offload
            else OffloadPolicy()
        ),
    }
    whole = {name: tensor.detach() for name, tensor in _tensors(loss).items()}
    for layer in decoder_layers(lm):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(loss, **options)
    register_fsdp_forward_method(loss, "generate")
    if mesh.size() > 1:
        _fill_from_rank_zero(loss, whole, mesh, cpu_offload)


def follow_rank_zero(loss: nn.Module) -> None:
    """Gives what was built on the meta device the types that rank 0 loaded. A collective call.

    Raises:
        UserError: On every rank, if rank 0 built something else than another, which it cannot fill
            then.
    """
    ours = _tensors(loss)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    rank_zero_shapes, dtypes = broadcast_from_rank_zero(
        (shapes, {name: tensor.dtype for name, tensor in ours.items()})
    )
    strangers = {name for name, _ in shapes.items() ^ rank_zero_shapes.items()}
    for name, module in loss.named_modules():
        # Tensors that are neither parameters nor buffers could not be filled.
        strangers |= {f"{name}.{key}" for key, value in vars(module).items() if _is_meta(value)}
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, sorted(strangers))
    if found := [name for names in everywhere for name in names]:
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
    """Gives every rank its shards of what rank 0 holds, one tensor after the other; buffers whole.

    Args:
        loss: The sharded module.
        whole: Its tensors before sharding, by name; only those of rank 0 have values. Used up.
        mesh: Data-parallel mesh.
        cpu_offload: Whether shards live in host memory.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if dist.get_rank() > 0:
        loss.to_empty(device="cpu" if cpu_offload else mesh.device_type)
    for name, tensor in _tensors(loss).items():
        full = whole.pop(name)
        full = (
            torch.empty_like(full, device=mesh.device_type)
            if full.is_meta
            else full.to(mesh.device_type)
        )
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(
                distribute_tensor(full.contiguous(), mesh, tensor.placements).to_local()
            )
        else:
            dist.broadcast(full := full.contiguous(), src=0)
            tensor.copy_(full)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those too that a state dict leaves out; tied ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The whole state on the CPU of rank 0 (empty elsewhere), whatever the sharding. A collective
    call.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state
