"""model/adapters.py: LoRA through peft, and training a part of the model by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from tiny import tiny_gpt2, tiny_llama, tiny_qwen3

from lit_sft.errors import UserError
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.load import is_adapter_dir, load_adapter
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.lora.merge import merge, merge_error
from lit_sft.model.trainable import check_fits, set_trainable

IDS = torch.arange(5, 29).reshape(2, 12)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def shake(model, seed=0):
    """Moves every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def loss(model):
    return model.train()(IDS, labels=IDS).loss


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------ config


def test_names_and_defaults_are_those_of_peft():
    import peft

    theirs = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    deliberate = {"target_modules": "all-linear"}  # peft has no default for models it does not know
    for field in dataclasses.fields(LoraConfig):
        if field.name == "target_experts":  # peft's `target_parameters` of the model
            continue
        assert field.name in theirs, f"peft has no LoraConfig.{field.name}"
        expected = deliberate.get(field.name, theirs[field.name].default)
        assert (field.default, field.default_factory) == (
            expected,
            theirs[field.name].default_factory,
        ), field.name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(r=0), "model.lora.r is 0; set a rank of at least 1"),
        (dict(lora_alpha=0), "model.lora.lora_alpha is 0"),
        (dict(lora_dropout=1.0), "model.lora.lora_dropout is 1.0"),
        (dict(target_modules=[]), "model.lora.target_modules is empty"),
        (dict(layers_to_transform=[0]), "needs model.lora.target_modules as a list"),
        (dict(init_lora_weights="loftq"), "model.lora.init_lora_weights is 'loftq'"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            dict(target_modules=["q_proj", "kproj"]),
            "target_modules: no module is named kproj; .*: .*down_proj, gate_proj",
        ),
        (dict(target_modules=r"model\.layers\.9\..*"), r"no module is named model\\.layers"),
        (dict(target_modules="(q_proj"), "model.lora.target_modules: .* is no regular expression"),
        (dict(exclude_modules=["lm_hed"]), "exclude_modules: no module is named lm_hed"),
        (dict(modules_to_save=["embed"]), "modules_to_save: no module is named embed"),
        (
            dict(target_modules=["q_proj"], layers_to_transform=[0, 2]),
            "there is no layer 2, only 0 to 1",
        ),
    ],
)
def test_names_that_fit_nothing_are_refused(wrong, message):
    with pytest.raises(UserError, match=message.replace("\\\\", r"\\")):
        apply_lora(tiny_llama(), LoraConfig(**wrong))


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], r".*lm_head"])
def test_adapters_on_a_tied_embedding_are_refused(targets):
    with pytest.raises(UserError, match="put them into model.lora.modules_to_save"):
        apply_lora(tiny_qwen3(), LoraConfig(target_modules=targets))


# ------------------------------------------------------------------ apply


def test_only_the_adapters_are_trained_and_in_fp32_over_a_bf16_base():
    base = tiny_llama().to(torch.bfloat16)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = apply_lora(base, LoraConfig(r=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert (
        len(trained) == 2 * 7 * 2
    )  # A and B of seven linear layers in each of two blocks; not the head
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    kept = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(kept) == len(frozen)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_fresh_adapter_changes_nothing():
    model = tiny_llama()
    before = logits(model)
    assert torch.equal(logits(apply_lora(model, LoraConfig())), before)


def test_random_numbers_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = trained(apply_lora(tiny_llama(), LoraConfig(), seed=1))
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), drawn), "the caller's random state was disturbed"
    again = trained(apply_lora(tiny_llama(), LoraConfig(), seed=1))
    other = trained(apply_lora(tiny_llama(), LoraConfig(), seed=2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_adapter_in_the_first_step(build, checkpointing):
    model = apply_lora(build(), LoraConfig(r=2))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss(model).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert gradients
    assert [
        name for name, gradient in gradients.items() if gradient is None or not gradient.any()
    ] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
def test_whole_modules_are_trained_in_fp32_and_work_with_and_without_autocast(build):
    model = apply_lora(
        build().to(torch.bfloat16), LoraConfig(modules_to_save=["embed_tokens", "lm_head"])
    )
    whole = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert {p.dtype for p in whole} == {torch.float32}
    plain = loss(model)
    plain.backward()
    assert all(p.grad.any() for p in whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(model).item() == pytest.approx(plain.item(), rel=0.02)


def test_all_linear_leaves_out_what_peft_refuses():
    """In state-space layers whose kernels read a weight past its adapter."""
    sizes = dict(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4)
    lm = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(UserError, match="out_proj' is incompatible"):
        apply_lora(lm, LoraConfig(r=2, target_modules=["out_proj"]))
    adapted = apply_lora(lm, LoraConfig(r=2))
    names = {name.rpartition(".")[2] for name in adapted.targeted_module_names}
    assert names == {"dt_proj", "in_proj", "x_proj"}


def test_layers_and_exclusions_are_honoured():
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"]
    )
    names = trained(apply_lora(tiny_llama(), config)).keys()
    assert len(names) == 2 and all("layers.1.self_attn.q_proj" in name for name in names)


# ------------------------------------------------------------------ state


def test_a_state_that_does_not_fit_is_refused():
    state = trained(apply_lora(tiny_llama(), LoraConfig(r=2)))
    check_fits(apply_lora(tiny_llama(), LoraConfig(r=2), seed=9), state)
    with pytest.raises(UserError, match=r"lora_A.* is \[2, .* in the checkpoint and \[4, "):
        check_fits(apply_lora(tiny_llama(), LoraConfig(r=4)), state)
    with pytest.raises(UserError, match="lora_A.* is in the checkpoint only"):
        check_fits(apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])), state)


# ------------------------------------------------------------------ merge

VARIANTS = [
    dict(),
    dict(use_dora=True),
    dict(use_rslora=True),
    dict(init_lora_weights="pissa"),
    dict(init_lora_weights="olora"),
    dict(modules_to_save=["embed_tokens", "lm_head"]),
    dict(modules_to_save=["lm_head"]),
]


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_merged_equals_unmerged(build, variant):
    model = shake(apply_lora(build(), LoraConfig(**variant)))
    before = logits(model)
    merged = merge(model, probe_ids=IDS)
    assert type(merged) is type(build())
    assert merge_error(before, logits(merged)) <= 1e-5
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == merged.config.tie_word_embeddings == (build is tiny_qwen3)


@pytest.mark.parametrize(
    "variant", [dict(), dict(use_dora=True), dict(modules_to_save=["lm_head"])], ids=str
)
def test_merging_into_bf16_rounds_once_and_keeps_the_dtype(variant):
    model = shake(apply_lora(tiny_llama().to(torch.bfloat16), LoraConfig(**variant)))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    before = logits(model)
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    if "use_dora" not in variant:
        assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, exact.to(torch.bfloat16))
    assert merge_error(before, logits(merged)) < 0.05


def test_a_merge_that_changes_the_answers_is_refused(monkeypatch):
    from peft.tuners.lora.layer import Linear

    model = shake(apply_lora(tiny_llama(), LoraConfig()))
    monkeypatch.setattr(
        Linear, "get_delta_weight", lambda self, adapter: torch.zeros_like(self.weight)
    )
    with pytest.raises(UserError, match="merging changes the logits"):
        merge(model, probe_ids=IDS)


def test_a_merge_is_compared_with_what_was_trained():
    """Not with the model that is merged, where that is another: one out of a 4-bit base."""
    model = shake(apply_lora(tiny_llama(), LoraConfig()))
    trained = logits(model)
    with pytest.raises(UserError, match="merging changes the logits by 0.5 of their size"):
        merge(model, probe_ids=IDS, trained=2 * trained)


# ------------------------------------------------------------------ directory


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_directory_is_loaded_over_its_base(tmp_path, trainable):
    model = shake(apply_lora(tiny_qwen3(), LoraConfig(modules_to_save=["embed_tokens"])))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert is_adapter_dir(str(tmp_path)) and not is_adapter_dir(str(tmp_path / "absent"))
    loaded = load_adapter(tiny_qwen3(), str(tmp_path), trainable=trainable)
    assert torch.equal(logits(loaded), logits(model))
    assert any(p.requires_grad for p in loaded.parameters()) == trainable


def test_an_adapter_of_another_base_is_refused(tmp_path):
    config = LoraConfig(target_modules=["q_proj", "up_proj"])
    apply_lora(tiny_llama(), config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(UserError, match="does not fit the base"):
        load_adapter(tiny_llama(hidden_size=64), str(tmp_path))
    with pytest.raises(UserError, match="does not fit the base|belongs to another base"):
        load_adapter(tiny_gpt2(), str(tmp_path))
    with pytest.raises(UserError, match="belongs to another base"):
        load_adapter(tiny_llama(num_hidden_layers=3), str(tmp_path))
    with pytest.raises(UserError, match="is no adapter directory"):
        load_adapter(tiny_llama(), str(tmp_path / "absent"))


# ------------------------------------------------------------------ trainable


def test_parameters_are_trained_by_name():
    model = tiny_llama()
    set_trainable(model, [r"layers\.1\.mlp", "norm"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.norm.weight" in trained and "model.layers.1.mlp.up_proj.weight" in trained
    assert not any(
        "embed" in name or "layers.0.mlp" in name or "layers.1.self_attn" in name
        for name in trained
    )


def test_a_tied_weight_answers_to_both_of_its_names():
    model = tiny_qwen3()
    set_trainable(model, ["lm_head"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.embed_tokens.weight"
    ]


def test_patterns_that_match_nothing_or_do_not_compile_are_refused():
    with pytest.raises(
        UserError, match="'decoder' matches no parameter; .* such as model.embed_tokens.weight"
    ):
        set_trainable(tiny_llama(), ["norm", "decoder"])
    with pytest.raises(UserError, match=r"model.trainable: 'layers\[' is no regular expression"):
        set_trainable(tiny_llama(), ["layers["])


# -----------------------------------------------------------------------------------------------
# patterns and tokens


def test_ranks_differ_by_pattern_and_patterns_that_fit_nothing_are_refused():
    model = apply_lora(
        tiny_llama(), LoraConfig(r=2, rank_pattern={"down_proj": 5, r"layers\.1\..*q_proj": 3})
    )
    layers = model.get_base_model().model.layers
    assert (
        layers[0].mlp.down_proj.r["default"] == 5 and layers[0].self_attn.q_proj.r["default"] == 2
    )
    assert layers[1].self_attn.q_proj.r["default"] == 3
    for wrong in (dict(rank_pattern={"down": 5}), dict(alpha_pattern={"lm_head": 5})):
        with pytest.raises(UserError, match="is the name of no adapted module"):
            apply_lora(tiny_llama(), LoraConfig(**wrong))
    for key in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(
            UserError, match=rf"model.lora.{key}: 'q_proj\(' is no regular expression: missing \)"
        ):
            apply_lora(tiny_llama(), LoraConfig(**{key: {"q_proj(": 4}}))
    with pytest.raises(
        UserError, match="model.lora.rank_pattern is .*; every value must be at least 1"
    ):
        LoraConfig(rank_pattern={"q_proj": 0})


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
def test_some_rows_of_embedding_and_head_are_trained(build):
    from lit_sft.model.loss import CausalLMLoss

    model = apply_lora(build().to(torch.bfloat16), LoraConfig(r=2), new_token_ids=[7, 9])
    rows = {name: p for name, p in model.named_parameters() if "trainable_tokens" in name}
    assert len(rows) == (1 if build is tiny_qwen3 else 2)
    assert all(p.dtype == torch.float32 and p.shape == (2, 32) for p in rows.values())
    chunked = CausalLMLoss(model.get_base_model())
    chunked.check_head()
    assert not chunked.own_logits
    labels = torch.roll(IDS[:1], -1, dims=1)
    output = chunked.train()(input_ids=IDS[:1], labels=labels, position_ids=torch.arange(12)[None])
    expected = torch.nn.functional.cross_entropy(
        chunked.lm(IDS[:1]).logits[0].float(), labels[0], reduction="sum"
    )
    torch.testing.assert_close(output.loss_sum, expected, rtol=2e-3, atol=0)
    output.loss_sum.backward()
    assert all(p.grad.any() for p in rows.values())


def test_token_ids_that_do_not_exist_are_refused():
    with pytest.raises(
        UserError, match="trainable_token_indices: there is no token 320, only 0 to 319"
    ):
        apply_lora(tiny_llama(), LoraConfig(trainable_token_indices=[3, 320]))


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
def test_rows_merge_and_a_matrix_that_is_trained_whole_has_none(build):
    model = shake(apply_lora(build(), LoraConfig(), new_token_ids=[7, 9]))
    before = logits(model)
    merged = merge(model, probe_ids=IDS)
    assert merge_error(before, logits(merged)) <= 1e-5
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == (build is tiny_qwen3)
    whole = apply_lora(
        build(), LoraConfig(modules_to_save=["embed_tokens", "lm_head"]), new_token_ids=[7]
    )
    assert not any("trainable_tokens" in name for name in trained(whole))


def test_unmerging_gives_the_base_back_within_rounding():
    model = shake(apply_lora(tiny_llama().to(torch.bfloat16), LoraConfig()))
    base = {
        name: value.clone() for name, value in model.named_parameters() if not value.requires_grad
    }
    before = logits(model)
    model.merge_adapter()
    assert merge_error(before, logits(model)) < 0.05
    model.unmerge_adapter()
    assert merge_error(before, logits(model)) < 0.05
    for name, value in model.named_parameters():
        if name in base:
            torch.testing.assert_close(value, base[name], rtol=2**-7, atol=2e-3)
