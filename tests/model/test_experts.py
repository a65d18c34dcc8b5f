"""Experts: grouped products, adapters on experts."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from tiny import tiny_gpt_oss, tiny_llama, tiny_qwen3_moe, tiny_tokenizer

from lit_sft.errors import UserError
from lit_sft.model.experts import group_experts
from lit_sft.model.export import AdapterBase, ChatFormat, export_hf
from lit_sft.model.fused_layers import fuse_blocks
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.load import load_adapter
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.lora.merge import merge, merge_error
from lit_sft.model_builder import fingerprint
from lit_sft.module import SFTModule

IDS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))
BUILDS = [tiny_qwen3_moe, tiny_gpt_oss]
both = pytest.mark.parametrize("build", BUILDS)


def adapted(lm, **options):
    """The model with adapters on experts that are not zero."""
    generator = torch.Generator().manual_seed(1)
    model = apply_lora(lm, LoraConfig(r=4, lora_alpha=8, target_experts=True, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def loss_and_gradients(model):
    model.zero_grad()
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def assert_equal(ours, theirs, rtol=1e-5):
    """Losses and gradients, each gradient relative to its own largest number."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert merge_error(gradient, ours[1][name]) <= rtol, name


def typical_error(exact, rounded):
    """Of the median token: rounding changes the experts of some tokens."""
    return float((rounded.float() - exact).abs().amax(-1).median() / exact.abs().max())


# ------------------------------------------------------------------ grouped products


@both
@pytest.mark.parametrize("theirs", ["eager", "grouped_mm"])
def test_grouped_products_are_those_of_transformers(build, theirs):
    plain, ours = build(), build()
    plain.set_experts_implementation(theirs)
    group_experts(ours)
    assert_equal(loss_and_gradients(ours), loss_and_gradients(plain))


@both
def test_autocast_computes_experts_in_its_own_dtype(build, monkeypatch):
    """As in eager; transformers' grouped products stay in fp32."""
    import transformers.integrations.moe

    plain, ours = build(), build()
    plain.set_experts_implementation("eager")
    group_experts(ours)
    exact = logits(plain)
    seen = set()
    product = transformers.integrations.moe._grouped_linear

    def recorded(x, weight, *args, **kwargs):
        seen.update({x.dtype, weight.dtype})
        return product(x, weight, *args, **kwargs)

    monkeypatch.setattr(transformers.integrations.moe, "_grouped_linear", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, eager = logits(ours), logits(plain)
    assert seen == {torch.bfloat16}
    assert typical_error(exact, rounded) <= 1.5 * typical_error(exact, eager)


# ------------------------------------------------------------------ adapters


@both
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_low_rank_adapters_are_those_of_peft(build, options):
    theirs = adapted(build(), **options)
    ours = adapted(build(), **options)
    group_experts(ours.get_base_model())
    found = loss_and_gradients(ours)
    assert_equal(found, loss_and_gradients(theirs))
    experts = [name for name in found[1] if ".experts." in name]
    # A and B of two parameters in each of two layers.
    assert len(experts) == 8
    assert all(found[1][name].any() for name in experts)


def test_the_weights_of_experts_are_not_kept_once_more():
    """peft keeps W + delta of all experts for the backward pass."""
    kept = []
    for is_low_rank in (True, False):
        sizes = dict(num_experts=32, hidden_size=64, moe_intermediate_size=64)
        model = adapted(tiny_qwen3_moe(**sizes), target_modules=["q_proj"])
        if is_low_rank:
            group_experts(model.get_base_model())
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def note(tensor, weights=weights, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.train()(input_ids=IDS, labels=IDS).loss.backward()
        kept.append(sum(saved.values()))
    experts = 2 * 32 * 3 * 64 * 64 * 4
    assert kept[1] - kept[0] > experts / 2


@both
def test_recomputation_gives_the_same(build):
    plain, recomputed = adapted(build()), adapted(build())
    for model in (plain, recomputed):
        group_experts(model.get_base_model())
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(loss_and_gradients(recomputed), loss_and_gradients(plain), rtol=0)


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_any_rank_over_a_base_in_bf16(build, autocast):
    """Grouped products need rows of 16 bytes, and adapters are in fp32."""
    exact = logits(adapted(build()))
    lm = adapted(build().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = logits(lm)
        group_experts(lm.get_base_model())
        ours = logits(lm)
        loss, gradients = loss_and_gradients(lm)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())
    assert typical_error(exact, ours) <= 1.5 * typical_error(exact, theirs)


@both
@pytest.mark.parametrize("grouped", [False, True])
def test_merged_equals_unmerged(build, grouped):
    model = adapted(build())
    if grouped:
        group_experts(model.get_base_model())
    before = logits(model)
    assert merge_error(before, logits(build())) > 0.01
    merged = merge(model, probe_ids=IDS)
    assert type(merged) is type(build())
    assert merge_error(before, logits(merged)) <= 1e-5
    assert merged.state_dict().keys() == build().state_dict().keys()


@both
def test_merging_into_bf16_rounds_once(build):
    model = adapted(build().to(torch.bfloat16))
    outer = model.get_base_model().model.layers[1].mlp.experts
    name, weight = outer.parameter_name, outer.get_param()
    a, b = outer.lora_A["default"].weight, outer.lora_B["default"].weight
    delta = [b.detach()[:, e::4] @ a.detach()[4 * e : 4 * e + 4] for e in range(4)]
    delta = torch.stack(delta) * outer.scaling["default"]
    if build is tiny_gpt_oss:
        delta = delta.mT
    exact = (weight.float() + delta).to(torch.bfloat16)
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(getattr(merged.model.layers[1].mlp.experts, name), exact)


@both
def test_peft_loads_the_export(build, tmp_path):
    from peft import PeftModel

    build().save_pretrained(tmp_path / "base")
    model = adapted(build())
    group_experts(model.get_base_model())
    tokenizer = tiny_tokenizer()
    chat = ChatFormat(tokenizer, [tokenizer.eos_token_id])
    base = AdapterBase(str(tmp_path / "base"))
    export_hf(model, chat, tmp_path / "adapter", base=base)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert merge_error(logits(model), logits(loaded)) <= 1e-5
    # And so do we, to train it further.
    again = load_adapter(build(), str(tmp_path / "adapter"), trainable=True)
    group_experts(again.get_base_model())
    assert_equal(loss_and_gradients(again), loss_and_gradients(model))


@both
def test_a_base_that_exists_nowhere_else_is_exported_too(build, tmp_path):
    from peft import AutoPeftModelForCausalLM

    model = adapted(build())
    tokenizer = tiny_tokenizer()
    export_hf(model, ChatFormat(tokenizer, [tokenizer.eos_token_id]), tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert merge_error(logits(model), logits(loaded)) <= 1e-5


# ------------------------------------------------------------------ which ones


def names(lm, **options):
    model = apply_lora(lm, LoraConfig(r=2, target_experts=True, **options))
    return model.base_model.targeted_parameter_names


def test_layers_exclusions_and_ranks_are_honoured():
    one = names(tiny_qwen3_moe(), target_modules=["q_proj"], layers_to_transform=[1])
    assert sorted(one) == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    two = names(tiny_qwen3_moe(), exclude_modules=["layers.0.mlp.experts"])
    assert sorted(two) == sorted(one)
    config = LoraConfig(target_experts=True, rank_pattern={"experts.down_proj": 3})
    model = apply_lora(tiny_qwen3_moe(), config)
    experts = model.get_base_model().model.layers[0].mlp.experts
    ranks = {experts.parameter_name: experts.r["default"]}
    ranks[experts.base_layer.parameter_name] = experts.base_layer.r["default"]
    assert ranks == {"down_proj": 3, "gate_up_proj": 8}


def test_experts_are_left_out_by_default():
    model = apply_lora(tiny_qwen3_moe(), LoraConfig())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any("experts" in name for name in trained)


def tiny_glm4_moe():
    """A dense layer, then one with experts and a shared one. peft takes the names of their linear
    layers for experts.
    """
    sizes = dict(
        vocab_size=320, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**sizes)).eval()


MLP = ["down_proj", "gate_proj", "up_proj"]
DENSE = [f"model.layers.0.mlp.{name}" for name in MLP]
SHARED = [f"model.layers.1.mlp.shared_experts.{name}" for name in MLP]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [*DENSE, *SHARED]),
        ({"target_modules": ["q_proj", "down_proj"]}, [DENSE[0], SHARED[0]]),
        ({"target_modules": r".*layers\.1.*(q|up)_proj"}, [SHARED[2]]),
        ({"target_modules": r".*layers\.1.*q_proj"}, []),
        ({"exclude_modules": ["shared_experts.gate_proj"]}, [*DENSE, SHARED[0], SHARED[2]]),
    ],
    ids=str,
)
def test_dense_layers_and_shared_experts_are_not_taken_for_experts(options, expected, tmp_path):
    from peft import PeftModel

    model = apply_lora(tiny_glm4_moe(), LoraConfig(r=4, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    found = [
        name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
    ]
    found = [name.removeprefix("base_model.model.") for name in found]
    assert sorted(name for name in found if ".mlp." in name) == expected
    layers = {name.split(".")[2] for name in found if "q_proj" in name}
    assert layers == ({"1"} if isinstance(options.get("target_modules"), str) else {"0", "1"})
    plain = loss_and_gradients(model)
    fuse_blocks(model.get_base_model())
    assert_equal(loss_and_gradients(model), plain)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_glm4_moe(), tmp_path)
    assert merge_error(logits(model), logits(loaded)) <= 1e-5
    again = load_adapter(tiny_glm4_moe(), str(tmp_path))
    assert merge_error(logits(model), logits(again)) <= 1e-5
    before = logits(model)
    assert merge_error(before, logits(merge(model, probe_ids=IDS))) <= 1e-5


def test_a_pattern_fits_layers_that_are_named_as_parameters():
    model = apply_lora(tiny_glm4_moe(), LoraConfig(r=4, rank_pattern={"down_proj": 6}))
    shapes = {name: p.shape for name, p in model.named_parameters() if "lora_A" in name}
    assert {shape[0] for name, shape in shapes.items() if "down_proj" in name} == {6}
    assert {shape[0] for name, shape in shapes.items() if "down_proj" not in name} == {4}


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_what_they_do_not_have_is_refused(options):
    message = (
        r"peft cannot adapt model.layers.0.mlp.down_proj of this model with it; leave it out, or set"
        r" model.lora.target_modules to the other layers: \[k_proj, o_proj, q_proj, v_proj\]"
    )
    with pytest.raises(UserError, match=message):
        apply_lora(tiny_glm4_moe(), LoraConfig(**options))
    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert apply_lora(tiny_glm4_moe(), LoraConfig(target_modules=attention, **options))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"lora_dropout": 0.1},
            "model.lora.lora_dropout is 0.1, .* set it to 0.0, or model.lora.t",
        ),
        ({"use_dora": True}, "model.lora.use_dora is True, .* set it to False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, .* set it to true or gauss"),
    ],
)
def test_what_adapters_on_experts_do_not_have_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(target_experts=True, **wrong)


def test_the_names_of_experts_of_older_versions_are_refused():
    """They are parameters now."""
    with pytest.raises(UserError, match="named gate_proj; .*; model.lora.target_experts adapts th"):
        apply_lora(tiny_qwen3_moe(), LoraConfig(target_modules=["q_proj", "gate_proj"]))


def test_a_model_without_experts_is_refused():
    with pytest.raises(UserError, match="LlamaForCausalLM has no experts to adapt"):
        apply_lora(tiny_llama(), LoraConfig(target_experts=True))


def test_a_copy_is_not_needed():
    """The weights are read where they are, also after they were replaced."""
    lm = tiny_qwen3_moe()
    group_experts(lm)
    state = copy.deepcopy(lm.state_dict())
    other = tiny_qwen3_moe(seed=1)
    lm.load_state_dict(other.state_dict())
    assert merge_error(logits(other), logits(lm)) <= 1e-6
    lm.load_state_dict(state)
    assert merge_error(logits(tiny_qwen3_moe()), logits(lm)) <= 1e-6


@pytest.mark.parametrize("target_experts", [False, True])
def test_the_fingerprint_of_a_model_without_them_is_that_of_before(target_experts):
    """So a prediction that an earlier version began is continued."""
    module = SFTModule("builtin:demo", lora=LoraConfig(target_experts=target_experts))
    text = fingerprint(module.options, "32-true", None)["lora"]
    assert text.startswith("LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=")
    assert ("target_experts" in text) == target_experts
