"""Token mixers in packed rows: found by what they do, and equal to each example alone.

The lengths lie on both sides of the chunks of 16 and 64 tokens in which mixers compute, and of the
widths of convolutions. Those of 66 and 70 tokens share a call.
"""

import pytest
import torch
import transformers
from ranks import run_ranks
from terminal import log_lines
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

from lit_sft.model import fused_layers, load, mixers, parallel, self_check
from lit_sft.model.attention import packed
from lit_sft.model.loss import CausalLMLoss
from lit_sft.model_builder import apply_fast_paths, probe

LENGTHS = (70, 133, 1, 9, 66)
SIZES = dict(
    vocab_size=320, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, initializer_range=0.1, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    max_position_embeddings=256,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
DELTA = dict(
    head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
QWEN_EXPERTS = dict(num_experts=4, shared_expert_intermediate_size=16)
MAMBA = dict(
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16
)
HYBRID = ["linear_attention", "full_attention"] * 2
SHORT = ["conv", "full_attention"] * 2
FAMILIES = {
    "Qwen3_5": (DELTA | {"config": "Qwen3_5TextConfig"}, ["linear_attn"] * 3),
    "Qwen3_5Moe": (DELTA | EXPERTS | QWEN_EXPERTS | {"config": "Qwen3_5MoeTextConfig"}, ["linear_attn"] * 3),
    "Qwen3Next": (DELTA | EXPERTS | QWEN_EXPERTS, ["linear_attn"] * 3),
    "OlmoHybrid": (DELTA, ["linear_attn"] * 3),
    "NemotronH": (
        EXPERTS | dict(
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], head_dim=8, ssm_state_size=8,
            mamba_num_heads=4, mamba_head_dim=16, n_groups=1, chunk_size=16, n_routed_experts=4,
            moe_shared_expert_intermediate_size=16,
        ),
        ["mixer"],
    ),
    "GraniteMoeHybrid": (
        MAMBA | dict(layer_types=HYBRID, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16),
        ["mamba"] * 2,
    ),
    "Lfm2": (dict(layer_types=SHORT), ["conv"] * 2),
    "Lfm2Moe": (EXPERTS | dict(layer_types=SHORT, num_experts=4, num_dense_layers=2), ["conv"] * 2),
    "FalconH1": (MAMBA | dict(mamba_d_ssm=64), ["mamba"] * 4),
    "Bamba": (MAMBA | dict(attn_layer_indices=[1, 3]), ["mamba"] * 2),
    "KimiLinear": (
        EXPERTS | dict(
            layer_types=HYBRID, linear_head_dim=8, linear_num_heads=4, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4, num_local_experts=4,
        ),
        ["self_attn"] * 2,
    ),
    "Jamba": (
        dict(
            attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=8,
            mamba_dt_rank=4,
        ),
        ["mamba"] * 2,
    ),
    "Zamba2": (
        dict(
            layers_block_type=["linear_attention", "hybrid"] * 2, num_key_value_heads=4, n_mamba_heads=4,
            mamba_d_state=8, chunk_size=16, num_mem_blocks=1, adapter_rank=4,
        ),
        ["mamba"] * 4,
    ),
    "MiniMax": (
        dict(layer_types=HYBRID, head_dim=8, num_local_experts=4, num_experts_per_tok=2, block_size=16),
        ["self_attn"] * 2,
    ),
    "Mamba2": (dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=16), ["mixer"] * 4),
    "Llama": ({}, []),
    "Qwen3": (dict(head_dim=8), []),
    "Gemma3": (dict(head_dim=8, sliding_window=16, config="Gemma3TextConfig"), []),
    "Qwen3Moe": (EXPERTS | dict(head_dim=8, num_experts=4), []),
}  # fmt: skip
"""What each family needs beside `SIZES`, and the last names of the mixers in its layers."""
WITH_MIXERS = [name for name, (_, last_names) in FAMILIES.items() if last_names]
CORE = ("Qwen3_5", "GraniteMoeHybrid", "Lfm2", "Jamba")
"""A delta rule, a state space, a short convolution, and layers that keep the bounds."""


def families(names):
    """The names as parameters; those outside `CORE` are slow."""
    return [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in names]


def small(name, attention="auto", **more):
    sizes = SIZES | FAMILIES[name][0] | more
    config = getattr(transformers, sizes.pop("config", f"{name}Config"))(**sizes)
    kind = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    return load.with_attention(
        lambda chosen: kind._from_config(config, attn_implementation=chosen),
        packed.choose(attention),
    )


def built(name, attention="auto", **more):
    """A small model with the fast paths that its probe finds."""
    model = CausalLMLoss(small(name, attention, **more))
    apply_fast_paths(model, probe(model))
    return model.train()


def examples():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 320, (length,), generator=generator) for length in LENGTHS]


def loss_of_row(model):
    rows = examples()
    end = torch.tensor([-100])
    labels = torch.cat([torch.cat([ids[1:], end]) for ids in rows])[None]
    positions = torch.cat([torch.arange(len(ids)) for ids in rows])[None]
    return model(torch.cat(rows)[None], labels, positions, LENGTHS).loss_sum


def own_loss(lm):
    """The sum of transformers' losses of the examples, each alone, under its own attention."""
    total = torch.zeros(())
    for ids in examples():
        logits = lm(input_ids=ids[None], use_cache=False).logits[0]
        total = total + cross_entropy(logits[:-1], ids[1:], reduction="sum")
    return total


def gradients(lm):
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in lm.parameters()]


def joint_difference(ours, expected):
    difference = torch.stack([(a - b).norm() for a, b in zip(ours, expected, strict=True)]).norm()
    return float(difference / torch.stack([grad.norm() for grad in expected]).norm())


def compare(name, checkpointing=None, attention="auto"):
    """The relative differences of the loss and of all gradients from the examples alone."""
    own = small(name, "eager").train()
    expected = own_loss(own)
    expected.backward()
    model = built(name, attention)
    # Fused norms round differently, which moves the gradients of Olmo-Hybrid by 7e-6.
    fused_layers.unfuse_blocks(model.lm, model.fused)
    if checkpointing is not None:
        parallel.apply_gradient_checkpointing(model.lm, selective=checkpointing == "selective")
    loss = loss_of_row(model)
    loss.backward()
    assert not model.separate_rows
    loss_difference = abs(loss.item() - expected.item()) / expected.item()
    return loss_difference, joint_difference(gradients(model.lm), gradients(own))


@pytest.mark.parametrize("name", families(WITH_MIXERS))
def test_a_packed_row_equals_its_examples_alone(name):
    loss_difference, gradient_difference = compare(name)
    assert loss_difference < 1e-6 and gradient_difference < 1e-5


@pytest.mark.parametrize("name", families(FAMILIES))
def test_mixers_are_found_and_nothing_else(name):
    lm = small(name).eval()
    found = mixers.find_mixers(lm)
    assert [mixer.name.rpartition(".")[2] for mixer in found] == FAMILIES[name][1]
    # Jamba's layers do not pass the bounds on.
    assert all((mixer.layer is not None) == (name == "Jamba") for mixer in found)
    changed = [key for key, module in lm.named_modules() if "forward" in vars(module)]
    assert changed == []


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@pytest.mark.parametrize("name", CORE)
def test_recomputed_activations(name, checkpointing):
    loss_difference, gradient_difference = compare(name, checkpointing)
    assert loss_difference < 1e-6 and gradient_difference < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_under_other_attention(attention):
    loss_difference, gradient_difference = compare("Jamba", attention=attention)
    assert loss_difference < 1e-6 and gradient_difference < 1e-5


@pytest.mark.slow
def test_compiled_blocks():
    """A mixer and attention of the family whose layers hand over the bounds."""
    expected = loss_of_row(built("Jamba", num_hidden_layers=2))
    model = built("Jamba", num_hidden_layers=2)
    parallel.apply_compile(model.lm)
    loss = loss_of_row(model)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", families(WITH_MIXERS))
def test_in_bf16_the_same_mixers_are_found(name):
    found = mixers.find_mixers(small(name).eval().bfloat16())
    assert [mixer.name.rpartition(".")[2] for mixer in found] == FAMILIES[name][1]


@pytest.mark.parametrize("name", CORE)
def test_a_model_whose_mixers_are_not_found_gets_padded_rows(name, monkeypatch):
    monkeypatch.setattr(mixers, "find_mixers", lambda lm: [])
    model = CausalLMLoss(small(name))
    with log_lines() as lines:
        apply_fast_paths(model, probe(model))
    assert model.separate_rows
    assert any("padded row" in line and "time and memory" in line for line in lines)


def test_the_wrapped_modules_are_named_in_the_log(caplog):
    caplog.set_level("INFO", logger="lit_sft")
    built("Lfm2")
    assert "2 layers (Lfm2ShortConv) run example by example within a row" in caplog.text


def test_groups_of_similar_length():
    groups = mixers._groups([40, 100, 38, 1, 100, 39])
    assert groups == [[3], [2, 5, 0], [1, 4]]


def test_what_is_undone_is_as_before():
    lm = small("Jamba").eval()
    kinds = [type(module) for module in lm.modules()]
    found = mixers.find_mixers(lm)
    mixers.run_by_example(lm, found)
    assert self_check.packing_is_exact(lm)
    mixers.run_whole_rows(lm, found)
    assert not self_check.packing_is_exact(lm)
    assert [type(module) for module in lm.modules()] == kinds


def test_generation_is_left_alone():
    lm = small("Qwen3_5").eval()
    prompt = torch.arange(1, 9)[None]
    expected = lm.generate(prompt, max_new_tokens=8, do_sample=False)
    mixers.run_by_example(lm, mixers.find_mixers(lm))
    assert torch.equal(lm.generate(prompt, max_new_tokens=8, do_sample=False), expected)


def sharded_step(name, expected):
    """The loss and gradients of a rank, of a model sharded over two."""
    model = built(name)
    parallel.apply_gradient_checkpointing(model.lm)
    mesh = init_device_mesh("cpu", (2,))
    parallel.apply_fsdp2(model, model.lm, mesh, torch.float32)
    loss = loss_of_row(model)
    loss.backward()
    torch.testing.assert_close(loss.item(), expected["loss"], rtol=1e-6, atol=0)
    ours = []
    for key, parameter in model.lm.named_parameters():
        ours.append(parameter.grad.full_tensor())
        assert key in expected["gradients"]
    assert joint_difference(ours, list(expected["gradients"].values())) < 1e-5


@pytest.mark.parametrize("name", ["Jamba", pytest.param("Qwen3_5", marks=pytest.mark.slow)])
def test_sharded_over_two_ranks(name):
    """Sharding changes the class of each layer, as the hand-over of bounds does."""
    model = built(name)
    loss = loss_of_row(model)
    loss.backward()
    named = {key: parameter.grad for key, parameter in model.lm.named_parameters()}
    run_ranks(sharded_step, name, {"loss": loss.item(), "gradients": named})
