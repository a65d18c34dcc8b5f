"""A training step as a GPU takes it, run without one: the branches of a GPU, on tensors that have
no values.

A build of torch without CUDA cannot run autograd over fake CUDA tensors, so there are two halves.
The forward pass and the gradients of the loss run on fake CUDA tensors, which refuse to be mixed
with tensors of the CPU. The whole step, with the backward pass, runs on the meta device. In both a
number that is read from the device is an error.
"""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_step import batch
from tiny import tiny_qwen3
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lit_sft.model import loss
from lit_sft.model.attention import packed
from lit_sft.model.fused_layers import fuse_blocks
from lit_sft.model.loss import CausalLMLoss, LossOptions
from lit_sft.training import optim

CUDA, META = 1, 14
"""Places of two devices in c10's list of device types (c10/core/DeviceType.h)."""


@pytest.fixture
def seen(monkeypatch):
    """Lets an H100 be there, and notes which of our ways to attend are taken."""
    taken = []
    for name in ("_varlen", "_per_segment"):
        plain = getattr(packed, name)
        monkeypatch.setattr(
            packed, name, lambda *args, name=name, plain=plain: taken.append(name) or plain(*args)
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    # The one number that transformers reads, see `test_nothing_is_waited_for`.
    monkeypatch.setattr(
        "transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None
    )
    return taken


def build(dtype):
    lm = tiny_qwen3().to(dtype).train()
    packed.register()
    lm.set_attn_implementation(packed.PACKED)
    fuse_blocks(lm)
    return CausalLMLoss(lm)


# ----------------------------------------------------------------------------------------------
# fake CUDA tensors


@pytest.fixture
def fake_cuda(monkeypatch):
    """A mode in which CUDA tensors can be made.

    Where torch is built with CUDA, the mode itself does what is needed. Other builds know no way to
    choose a CUDA device around an operation, so the one of the meta device, which does nothing,
    takes its place.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    missing = guards[CUDA] is None
    if missing:
        guards[CUDA] = guards[META]
    # Autocast switches itself off where there is no CUDA device.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    yield FakeTensorMode()
    if missing:
        guards[CUDA] = None


def moved(mode, tensor):
    fake = mode.from_tensor(tensor.detach())
    with mode:
        return fake.to("cuda:0")


def move_model(mode, model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(moved(mode, parameter)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, moved(mode, buffer))
    return model


def move_batch(mode, inputs):
    return {
        key: moved(mode, value) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
def test_forward_mixes_no_devices_and_reads_no_numbers(stored, seen, fake_cuda):
    model = move_model(fake_cuda, build(stored))
    inputs = move_batch(fake_cuda, batch())
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=stored == torch.float32)
    with fake_cuda, torch.no_grad(), autocast:
        output = model(**inputs, count_correct=True)
    assert seen == ["_varlen"] * model.lm.config.num_hidden_layers
    assert output.loss_sum.device == output.num_correct.device == torch.device("cuda:0")
    assert output.num_targets.device.type == "cpu"
    with pytest.raises(DataDependentOutputException), fake_cuda:
        output.loss_sum.item()
    with pytest.raises(RuntimeError, match="devices, cpu and cuda:0"), fake_cuda, torch.no_grad():
        model(**{**inputs, "position_ids": torch.zeros_like(inputs["position_ids"], device="cpu")})


def test_gradients_of_the_loss_mix_no_devices(fake_cuda, monkeypatch):
    """In two chunks of several pieces each."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 40 * 320)
    monkeypatch.setitem(loss.PIECE_ELEMENTS, "cuda", 16 * 320)
    hidden, weight, targets = (
        moved(fake_cuda, tensor)
        for tensor in (torch.zeros(64, 32), torch.zeros(320, 32), torch.zeros(64).long())
    )
    saved = []
    context = SimpleNamespace(
        needs_input_grad=(True, True, False),
        save_for_backward=lambda *tensors: saved.extend(tensors),
        mark_non_differentiable=lambda tensor: None,
    )
    with fake_cuda:
        task = loss._Task(
            loss.Head(weight, None, 1.0, None), LossOptions(), count_correct=True, needs_grad=True
        )
        total, _ = loss._ChunkedCrossEntropy.forward(
            context, hidden.bfloat16(), weight, None, targets, task
        )
    grad_hidden, grad_weight, grad_bias = saved
    assert {t.device for t in (total, grad_hidden, grad_weight)} == {torch.device("cuda:0")}
    assert grad_hidden.shape == (64, 32) and grad_hidden.dtype == torch.bfloat16
    assert (
        grad_weight.shape == (320, 32) and grad_weight.dtype == torch.float32 and grad_bias is None
    )


# ------------------------------------------------------------------------------------------------
# the whole step


@pytest.mark.parametrize(
    ("dtype", "way"), [(torch.bfloat16, "_varlen"), (torch.float32, "_per_segment")], ids=str
)
def test_a_whole_step_reads_no_numbers(dtype, way, seen, monkeypatch):
    """On the meta device, which passes for a GPU here; autocast does not know it. All operations
    have fake kernels.
    """
    autocast_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind: kind != "meta" and autocast_enabled(kind)
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    model = build(dtype).to("meta")
    inputs = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in batch().items()
    }
    output = model(**inputs)
    output.loss_sum.backward()
    optim.scale_gradients(model.parameters(), torch.ones((), device="meta"))
    norm = optim.clip_by_norm(model.parameters(), 1.0)
    assert seen == [way] * model.lm.config.num_hidden_layers
    assert norm.is_meta
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.is_meta
        assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == dtype
    with pytest.raises(RuntimeError, match="meta tensors"):
        norm.item()
