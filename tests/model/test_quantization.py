"""model/quantization.py: a 4-bit base on the CPU, for real."""

import importlib.util

import pytest
import torch
from tiny import save_tiny, tiny_llama, tiny_qwen3, tiny_tokenizer

from lit_sft.errors import UserError
from lit_sft.model import quantization
from lit_sft.model.load import load_model
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.lora.merge import dequantized, merge, merge_error
from lit_sft.model.loss import CausalLMLoss
from lit_sft.module import SFTModule

IDS = torch.arange(5, 37).reshape(1, 32)


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen3], ids=["untied", "tied"])
def source(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), request.param(len(tiny_tokenizer())))


def load(source, dtype=torch.bfloat16):
    return load_model(
        source,
        init="pretrained",
        dtype=dtype,
        attn_implementation="sdpa",
        seed=0,
        quantization_config=quantization.nf4(dtype),
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapted(source, **config):
    model = apply_lora(load(source), LoraConfig(r=4, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_layers_are_in_four_bits_and_embedding_and_head_are_not(source):
    model = load(source)
    layer = model.model.layers[0].mlp.up_proj.weight
    assert layer.dtype == torch.uint8 and layer.numel() == 32 * 64 // 2
    assert layer.quant_state.quant_type == "nf4" and layer.quant_state.nested
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}


def test_evaluation_leaves_the_weights_as_they_are(source):
    """bitsandbytes would repack them on CPUs with bf16 instructions (on others this cannot
    fail).
    """
    model = load(source)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.data.clone()
    in_training = model.train()(IDS).logits
    assert torch.equal(logits(model), in_training)
    assert torch.equal(weight.data, before) and weight.quant_state.nested


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "config", [dict(), dict(use_dora=True), dict(modules_to_save=["lm_head"])], ids=str
)
def test_the_chunked_loss_equals_the_models_own_and_reaches_every_adapter(
    source, checkpointing, config
):
    lm = apply_lora(load(source), LoraConfig(r=4, **config)).get_base_model()
    model = CausalLMLoss(lm)
    model.check_head()
    assert not model.own_logits
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    labels = torch.roll(IDS, -1, dims=1)
    positions = torch.arange(32)[None]
    output = model.train()(input_ids=IDS, labels=labels, position_ids=positions)
    expected = torch.nn.functional.cross_entropy(
        lm(IDS).logits[0].float(), labels[0], reduction="sum"
    )
    torch.testing.assert_close(output.loss_sum, expected, rtol=2e-3, atol=0)
    output.loss_sum.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == 14 and all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    "config", [dict(), dict(use_dora=True), dict(modules_to_save=["lm_head"])], ids=str
)
def test_the_adapters_over_dequantized_weights_are_the_same_model(source, config):
    model = adapted(source, **config)
    before = logits(model)
    again = dequantized(model)
    assert {p.dtype for p in again.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {b.dtype for b in again.buffers()} == {
        torch.float32
    }  # rotary frequencies in bf16 would be others
    assert merge_error(before, logits(again)) < 0.02
    merged = merge(again, probe_ids=IDS)
    assert "quantization_config" not in merged.config.to_dict()
    assert merge_error(before, logits(merged)) < 0.05
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == merged.config.tie_word_embeddings


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="model.quantization nf4 needs bitsandbytes: `pip install bitsandbytes`"
    ):
        quantization.nf4(torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            dict(quantization="nf4"),
            "freezes the weights, so nothing would be trained: set model.lora",
        ),
        (
            dict(quantization="nf4", lora=LoraConfig(), init="random"),
            "set model.init to pretrained",
        ),
        (
            dict(quantization="nf4", lora=LoraConfig(init_lora_weights="pissa")),
            "has rounded to 4 bits",
        ),
        (
            dict(lora=LoraConfig(), trainable=["norm"]),
            "model.lora and model.trainable exclude each other",
        ),
        (
            dict(lora=LoraConfig(), adapter_name_or_path="there"),
            (
                "model.lora and model.adapter_name_or_path exclude each other: .* brings its own"
                " settings"
            ),
        ),
        (
            dict(adapter_name_or_path="there", add_tokens=["<new>"]),
            "model.add_tokens and model.adapter_name_or_path exclude each other",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        SFTModule(**wrong)


@pytest.mark.parametrize("kind", ["Mamba", "Rwkv"])
def test_models_whose_code_reads_weights_are_refused(kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")()
    quantization.check_source(config, "x", None)
    with pytest.raises(
        UserError, match=f"quantization nf4: the code of {kind.lower()} models .* null"
    ):
        quantization.check_source(config, "x", "nf4")
