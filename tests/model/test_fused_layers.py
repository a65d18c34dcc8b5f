import copy

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_qwen3

from lit_sft.data.collate import collate
from lit_sft.model import fused_layers
from lit_sft.model.attention import packed
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.loss import CausalLMLoss


def batch(lengths=(5, 21, 3)):
    generator = torch.Generator().manual_seed(0)
    rows = [
        (
            torch.randint(0, 320, (n,), generator=generator).int().numpy(),
            torch.ones(n).byte().numpy(),
            0,
        )
        for n in lengths
    ]
    inputs = collate(rows)
    inputs.pop("rows")
    return inputs


def loss_and_gradients(lm, **autocast):
    model = CausalLMLoss(lm)
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        output = model(**batch())
    output.loss_sum.backward()
    return output.loss_sum.detach(), {
        name: p.grad for name, p in lm.named_parameters() if p.grad is not None
    }


def pair(make, adapt=None, seed=0):
    """The model as transformers and peft write it, and fused."""
    drawn = torch.Generator().manual_seed(seed)
    plain = make()
    packed.register()
    plain.set_attn_implementation(packed.PACKED)
    if adapt is not None:
        apply_lora(plain, LoraConfig(r=4, target_modules="all-linear", **adapt), seed=0)
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:  # zeros hide what A does
                torch.nn.init.normal_(parameter, std=0.1, generator=drawn)
    ours = copy.deepcopy(plain)
    return plain, ours, fused_layers.fuse_blocks(ours)


@pytest.mark.parametrize(
    "adapt",
    [None, {}, {"use_rslora": True}, {"use_dora": True}],
    ids=["full", "lora", "rslora", "dora"],
)
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_the_same_loss_and_gradients(make, adapt):
    plain, ours, replaced = pair(make, adapt)
    assert len(replaced) >= 2 * 3 + 1  # two norms and an MLP per block, and the last norm
    (loss, gradients), (our_loss, our_gradients) = (
        loss_and_gradients(lm, enabled=False) for lm in (plain, ours)
    )
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_the_output_of_an_adapter_may_be_changed_in_place():
    """Llama 4 adds the experts to the output of its shared expert in place."""
    plain, ours, _ = pair(tiny_llama, {})
    gradients = []
    for lm in (plain, ours):
        x = torch.linspace(-1, 1, 64).reshape(1, 2, 32).requires_grad_()
        out = lm.model.layers[0].self_attn.q_proj(x)
        out += 1
        out.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("adapt", "draws"), [(None, 1), ({}, 8)], ids=["full", "lora"])
def test_the_same_rounding_under_autocast(adapt, draws):
    """The forward pass rounds where transformers and peft do, or later, so both are as far from
    fp32. Of one draw of adapters the sums differ by up to a fifth, of eight by 3 %.
    """
    errors = [[], []]
    for seed in range(draws):
        plain, ours, _ = pair(tiny_llama, adapt, seed)
        exact_loss, exact = loss_and_gradients(plain, enabled=False)
        plain.zero_grad()
        for lm, found in zip((plain, ours), errors, strict=True):
            loss, gradients = loss_and_gradients(lm, enabled=True)
            torch.testing.assert_close(loss, exact_loss, rtol=1e-3, atol=0)
            for name, expected in exact.items():
                found.append(float((gradients[name] - expected).norm() / expected.norm()))
    assert max(errors[1]) < 1.5 * max(errors[0])
    assert sum(errors[1]) < 1.1 * sum(errors[0])


@pytest.mark.parametrize(("adapt", "share"), [(None, 0.75), ({}, 0.8)], ids=["full", "lora"])
def test_less_is_kept(adapt, share):
    kept = []
    for lm in pair(tiny_llama, adapt)[:2]:
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        held = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with held, torch.autocast("cpu", torch.bfloat16):
            lm.model(input_ids=batch((100, 150))["input_ids"], use_cache=False)
        weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
        kept.append(sum(size for place, size in storages.items() if place not in weights))
    assert kept[1] < share * kept[0], kept


def test_unfused_it_is_the_same_bit_for_bit():
    plain, ours, replaced = pair(tiny_llama, {})
    fused_layers.unfuse_blocks(ours, replaced)
    inputs = {"input_ids": batch()["input_ids"], "use_cache": False}
    assert torch.equal(ours.bfloat16()(**inputs).logits, plain.bfloat16()(**inputs).logits)


def test_adapters_that_are_off_or_merged_stay_off_and_merged():
    _, ours, replaced = pair(tiny_llama, {})
    layer = ours.model.layers[0].self_attn.q_proj
    assert "model.layers.0.self_attn.q_proj" in replaced
    x = torch.randn(2, 3, layer.in_features)
    adapted, base = layer(x), layer.base_layer(x)
    assert not torch.allclose(adapted, base)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base, rtol=0, atol=0)
    layer.enable_adapters(True)
    layer.merge()
    torch.testing.assert_close(layer(x), adapted)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_computes_something_else_stays(dtype, monkeypatch):
    """Also over a base in bf16, where fp32 adapters compute as autocast says; what is compared
    leaves no trace.
    """
    lm = tiny_llama().to(dtype)
    apply_lora(lm, LoraConfig(r=4, target_modules="all-linear"), seed=0)
    before = {name: parameter.clone() for name, parameter in lm.named_parameters()}
    right = fused_layers.fuse_blocks(lm)
    assert any(name.endswith("q_proj") for name in right)
    assert all(torch.equal(before[name], parameter) for name, parameter in lm.named_parameters())
    fused_layers.unfuse_blocks(lm, right)
    forward = fused_layers._LoraLinear.forward
    monkeypatch.setattr(
        fused_layers._LoraLinear,
        "forward",
        lambda ctx, *args: forward(ctx, *args[:-1], 2 * args[-1]),
    )
    assert not any(name.endswith("_proj") for name in fused_layers.fuse_blocks(lm))


def test_what_computes_something_else_stays():
    gemma_like = tiny_llama()
    for module in gemma_like.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: type(m).forward(m, x) + x  # not a plain norm
    gemma_like.config.hidden_act = "gelu"
    for layer in gemma_like.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert fused_layers.fuse_blocks(gemma_like) == []
    assert fused_layers.fuse_blocks(tiny_gpt2()) == []
