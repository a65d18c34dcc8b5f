"""What a training step does and what it leaves out: seen from its operations, not from its time."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from running import arguments, chat_rows, run, write_rows
from terminal import refused
from tiny import save_tiny, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from lit_sft.data.collate import collate
from lit_sft.model import loss, parallel
from lit_sft.model.attention import packed as attention_packed
from lit_sft.model.fused_layers import fuse_blocks
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.loss import CausalLMLoss

import numpy as np  # isort: skip


def batch(lengths=(40, 70, 9), share=0.5):
    rng = np.random.default_rng(0)
    made = [
        (rng.integers(0, 320, n).astype(np.int32), (rng.random(n) < share).astype(np.uint8), 0)
        for n in lengths
    ]
    return {key: value for key, value in collate(made).items() if key != "rows"}


def packed(**sizes):
    lm = tiny_llama(**sizes)
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
    return lm


class Watch(TorchDispatchMode):
    """Operations whose result has to come to the host, or whose shape only the device knows."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        indices = args[1] if "index.Tensor" in name or "index_put" in name else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or any(
            word in name for word in ("_local_scalar_dense", "nonzero", "masked_select")
        ):
            self.waits.append(name)
        return operation(*args, **(kwargs or {}))


def test_nothing_is_waited_for():
    """On a GPU the host would stand still in each of these. But for one: transformers looks whether
    rows are packed (`find_packed_sequence_indices`), which our attention knows already. The
    attention of a CPU is one operation here.
    """
    model, inputs = CausalLMLoss(packed()), batch()
    with Watch() as seen:
        model(**inputs).loss_sum.backward()
    assert seen.waits == ["aten._local_scalar_dense.default"]
    with Watch() as seen:  # and it is seen where it happens
        model(**{**inputs, "target_positions": None})
    assert any("nonzero" in name for name in seen.waits)


def test_positions_of_targets_are_those_of_the_labels():
    model, inputs = CausalLMLoss(packed()), batch()
    given, found = model(**inputs), model(**{**inputs, "target_positions": None})
    assert (
        torch.equal(given.loss_sum, found.loss_sum) and given.num_targets == found.num_targets > 0
    )


def test_the_head_runs_on_targets_only_and_in_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 10 * 320)
    seen, project = [], loss.Head.project
    monkeypatch.setattr(
        loss.Head, "project", lambda self, h, w: seen.append(len(h)) or project(self, h, w)
    )
    inputs = batch()
    CausalLMLoss(packed())(**inputs)
    assert max(seen) <= 10 and sum(seen) == (inputs["labels"] >= 0).sum() < inputs["labels"].numel()


def test_attention_costs_the_sum_of_squares(monkeypatch):
    shapes, kernel = [], torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def watched(query, *args, **kwargs):
        shapes.append(query.shape[2])
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", watched)
    lm = packed()
    CausalLMLoss(lm)(**batch(lengths=(40, 70, 9)))
    assert shapes == [40, 70, 9] * lm.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_several_chunks_against_fp64(dtype, monkeypatch, record_property):
    """Ours and torch's own, as far from fp64 as each is; the figures go into the report
    (`--junit-xml`).
    """
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 40 * 320)
    reference, inputs = packed(), batch(lengths=(200,), share=1.0)

    def gradient(own_logits, dtype):
        model = CausalLMLoss(copy.deepcopy(reference).to(dtype))
        model.own_logits = own_logits
        model(**inputs).loss_sum.backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    exact = gradient(True, torch.float64)
    errors = []
    for own_logits in (False, True):
        found = gradient(own_logits, dtype)
        errors.append(
            {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
        )
    ours, plain = errors
    record_property("relative error, ours and plain", (max(ours.values()), max(plain.values())))
    print(
        f"largest relative error in {dtype}: ours {max(ours.values()):.2g}, plain"
        f" {max(plain.values()):.2g}"
    )
    assert all(ours[name] < 1.5 * plain[name] + 1e-7 for name in ours), errors
    assert max(ours.values()) < (1e-5 if dtype == torch.float32 else 0.1)


def kept_bytes(lm, checkpointing):
    """What a forward pass keeps for the backward pass, weights and inputs left out."""
    fuse_blocks(lm)
    model, inputs = CausalLMLoss(lm).train(), batch(lengths=(200,))
    if checkpointing:
        parallel.apply_gradient_checkpointing(lm, selective=checkpointing == "selective")
    known = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(kept.values())


def test_gradient_checkpointing_keeps_less():
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}
    everything, full = (kept_bytes(packed(**sizes), how) for how in (False, "full"))
    assert full < 0.3 * everything


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_selective_checkpointing_recomputes_every_second_product(lora):
    """And none of attention's; over adapters it is the base's products that count."""
    products = {}
    for how in ("full", "selective"):
        lm = packed(hidden_size=64, intermediate_size=192)
        if lora:
            apply_lora(lm, LoraConfig(r=2))
        fuse_blocks(lm)
        model = CausalLMLoss(lm).train()
        parallel.apply_gradient_checkpointing(lm, selective=how == "selective")
        output = model(**batch(lengths=(50,)))
        with Products() as seen:
            output.loss_sum.backward()
        products[how] = seen
    assert (
        products["full"].attention == lm.config.num_hidden_layers
        and products["selective"].attention == 0
    )
    # q, k, v, o, gate, up, down: four of seven are kept
    saved = products["full"].of_base - products["selective"].of_base
    assert saved == 4 * lm.config.num_hidden_layers


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.attention = self.of_base = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        self.attention += "packed_attention_cpu.default" in name
        self.of_base += name == "aten.mm.default" and min(args[0].shape[1], args[1].shape[1]) > 2
        return operation(*args, **(kwargs or {}))


class After(Callback):
    """What is left when a step has ended."""

    def __init__(self):
        self.gradients, self.compiled = [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        left = sum(p.grad is not None for p in pl_module.parameters())
        self.gradients.append((trainer.fit_loop._should_accumulate(), left))
        self.compiled = sum(
            module._compiled_call_impl is not None for module in pl_module.modules()
        )


@pytest.fixture
def after(monkeypatch):
    """Watches a run of the command line."""
    from lit_sft import trainer as trainer_module
    from lit_sft.cli import main as main_module

    seen, make = After(), trainer_module.run_callbacks
    monkeypatch.setattr(main_module, "run_callbacks", lambda *args: [*make(*args), seen])
    return seen


def small_run(tmp_path, rows=16, **options):
    model, train = (
        save_tiny(tmp_path / "model"),
        write_rows(tmp_path / "train.jsonl", chat_rows(rows)),
    )
    settings = {"data__packing": False, "data__global_batch_size": 4, **options}
    run("fit", arguments(model, train, tmp_path / "run", **settings))
    return tmp_path / "run"


def test_gradients_are_freed_after_the_step(tmp_path, after):
    small_run(tmp_path, data__micro_batch_size=2)
    within, ended = (
        [left for accumulates, left in after.gradients if accumulates == which]
        for which in (True, False)
    )
    assert len(within) == len(ended) == 4 and min(within) > 0 and max(ended) == 0


def test_compile_reaches_every_block(tmp_path, after, monkeypatch):
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **how: setattr(self, "_compiled_call_impl", self._call_impl),
    )
    small_run(tmp_path, rows=4, model__compile=True)
    assert after.compiled == 2


def test_a_question_without_room_is_refused_before_training(tmp_path, capsys):
    model, train = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(4))
    args = arguments(model, train, tmp_path / "run", data__questions=["abc", "def " * 2000])
    message = refused(capsys, "fit", args)
    assert "data.questions[1]: a prompt of" in message and "exceed the model's context" in message
