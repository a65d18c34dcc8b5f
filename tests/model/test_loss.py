import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_gpt2, tiny_llama, tiny_qwen3
from torch import nn

from lit_sft.data.collate import collate
from lit_sft.errors import UserError
from lit_sft.model import loss
from lit_sft.model.attention import packed as attention_packed
from lit_sft.model.attention.packed import pack_kwargs
from lit_sft.model.loss import CausalLMLoss, LossOptions
from lit_sft.types import IGNORE_INDEX


def batch(lengths=(5, 9, 3), vocab=320, seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    rows = [
        (rng.integers(0, vocab, n).astype(np.int32), (rng.random(n) < share).astype(np.uint8), 0)
        for n in lengths
    ]
    inputs = collate(rows)
    inputs.pop("rows")
    return inputs


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def packed(lm):
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
    return lm


@pytest.fixture(params=["llama", "qwen3_tied", "gpt2"])
def lm(request):
    return packed(
        {"llama": tiny_llama, "qwen3_tied": tiny_qwen3, "gpt2": tiny_gpt2}[request.param]()
    )


@pytest.mark.parametrize(
    "options", [LossOptions(), LossOptions(label_smoothing=0.1), LossOptions(type="dft")], ids=str
)
def test_chunked_equals_the_models_own_logits(lm, options, monkeypatch):
    monkeypatch.setattr(
        loss, "CHUNK_ELEMENTS", 3 * 320
    )  # three targets per chunk, so that there are several
    model, inputs = CausalLMLoss(lm, options), batch()
    ours = model(**inputs, count_correct=True)
    ours.loss_sum.backward()
    our_grads = gradients(model)
    model.own_logits = True
    plain = model(**inputs)
    plain.loss_sum.backward()
    assert ours.num_targets == plain.num_targets == (inputs["labels"] != IGNORE_INDEX).sum()
    assert ours.num_correct == plain.num_correct
    torch.testing.assert_close(ours.loss_sum, plain.loss_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grads, gradients(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own_logits", [False, True])
@pytest.mark.parametrize(
    "options", [LossOptions(label_smoothing=0.1), LossOptions(type="dft")], ids=str
)
def test_models_are_compared_by_the_plain_loss(options, own_logits):
    """Without gradients, as in validation: dft's loss rises while a model gets better, and would
    choose the worst.
    """
    lm, inputs = packed(tiny_llama()), batch()
    model, plain = CausalLMLoss(lm, options), CausalLMLoss(lm)
    model.own_logits = plain.own_logits = own_logits
    assert abs(float(model(**inputs).loss_sum - plain(**inputs).loss_sum)) > 0.1
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss_sum, plain(**inputs).loss_sum)


def test_the_loss_is_that_of_plain_cross_entropy():
    lm, inputs = packed(tiny_llama()), batch(lengths=(12,))
    logits = lm(input_ids=inputs["input_ids"]).logits
    expected = F.cross_entropy(
        logits[0], inputs["labels"][0], reduction="sum", ignore_index=IGNORE_INDEX
    )
    torch.testing.assert_close(CausalLMLoss(lm)(**inputs).loss_sum, expected)


def test_gradient_is_as_exact_as_the_plain_path():
    """Against fp64: the chunked fp32 gradient is at most twice as far off as torch's own."""
    reference = packed(tiny_llama())
    inputs = batch(lengths=(40,), share=1.0)

    def head_grad(dtype, own_logits):
        model = CausalLMLoss(copy.deepcopy(reference).to(dtype))
        model.own_logits = own_logits
        if dtype == torch.float64:
            logits = model.lm(input_ids=inputs["input_ids"]).logits
            F.cross_entropy(logits[0], inputs["labels"][0], reduction="sum").backward()
        else:
            model(**inputs).loss_sum.backward()
        return model.lm.lm_head.weight.grad.double()

    exact = head_grad(torch.float64, own_logits=True)
    ours, plain = (
        (head_grad(torch.float32, own) - exact).norm() / exact.norm() for own in (False, True)
    )
    assert ours < 2 * plain + 1e-7, (ours, plain)
    assert ours < 1e-5


@pytest.mark.parametrize(
    "config",
    [{"final_logit_softcapping": 3.0}, {"logit_scale": 0.5}, {"logits_scaling": 4.0}],
    ids=lambda c: next(iter(c)),
)
def test_head_honours_what_the_config_says(config):
    """The scaled and capped head against autograd through the same formula."""
    lm = packed(tiny_llama())
    for key, value in config.items():
        setattr(lm.config, key, value)
    model, inputs = CausalLMLoss(lm), batch()
    examples = pack_kwargs(inputs["lengths"], torch.device("cpu"))
    hidden = lm.model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], **examples
    )
    logits = (
        lm.lm_head(hidden.last_hidden_state)[0]
        * config.get("logit_scale", 1.0)
        / config.get("logits_scaling", 1.0)
    )
    if cap := config.get("final_logit_softcapping"):
        logits = cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(
        logits, inputs["labels"][0], reduction="sum", ignore_index=IGNORE_INDEX
    )
    expected.backward()
    grads = gradients(model)
    output = model(**inputs)
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model), grads, rtol=1e-4, atol=1e-5)


def test_no_target_is_zero_and_still_reaches_every_parameter():
    model = CausalLMLoss(packed(tiny_llama()))
    inputs = batch(share=0.0)
    output = model(**inputs)
    output.loss_sum.backward()
    assert output.loss_sum == 0 and output.num_targets == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_frozen_head_gets_no_gradient():
    lm = packed(tiny_llama())
    lm.lm_head.requires_grad_(False)
    CausalLMLoss(lm)(**batch()).loss_sum.backward()
    assert lm.lm_head.weight.grad is None and lm.model.layers[0].mlp.up_proj.weight.grad.any()


def test_autocast_computes_in_bf16_and_accumulates_in_fp32():
    model, inputs = CausalLMLoss(packed(tiny_llama())), batch(lengths=(60,), share=1.0)
    exact = model(**inputs).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    output.loss_sum.backward()
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum, exact, rtol=2e-2, atol=0)
    assert model.lm.lm_head.weight.grad.dtype == torch.float32


def test_check_head_falls_back_where_the_model_does_more(caplog):
    class Scaled(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    lm = packed(tiny_llama())
    lm.__class__ = Scaled
    model = CausalLMLoss(lm)
    model.check_head()
    assert model.own_logits and "own full logits" in caplog.text
    plain = CausalLMLoss(packed(tiny_llama()))
    plain.check_head()
    assert not plain.own_logits


def test_adapted_head_uses_own_logits(caplog):
    lm = packed(tiny_llama())
    lm.lm_head = nn.Sequential(lm.lm_head)
    assert CausalLMLoss(lm).own_logits and "not a plain linear layer" in caplog.text


def test_rows_of_one_give_the_same_loss():
    lm, inputs = packed(tiny_llama()), batch()
    model = CausalLMLoss(lm)
    expected = model(**inputs)
    model.separate_rows = True
    output = model(**inputs)
    torch.testing.assert_close(output.loss_sum, expected.loss_sum)
    assert output.num_targets == expected.num_targets


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 1.0}, {"type": "dft", "label_smoothing": 0.1}]
)
def test_bad_options(options):
    with pytest.raises(UserError, match="model.loss.label_smoothing"):
        LossOptions(**options)
