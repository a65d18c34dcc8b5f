import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
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


def llama_with_a_bias():
    lm = tiny_llama()
    lm.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 320))
    return lm


@pytest.fixture(params=[tiny_llama, llama_with_a_bias, tiny_qwen3, tiny_gpt2])
def lm(request):
    return packed(request.param())


@pytest.mark.parametrize(
    "options", [LossOptions(), LossOptions(label_smoothing=0.1), LossOptions(type="dft")], ids=str
)
def test_chunked_equals_the_models_own_logits(lm, options, monkeypatch):
    # Several chunks, of several pieces each.
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 3 * 320)
    monkeypatch.setattr(loss, "PIECE_ELEMENTS", {"cpu": 2 * 320})
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


@pytest.mark.parametrize(
    ("chunk_elements", "piece_elements", "chunks", "pieces"),
    [
        (3 * 320, 2 * 320, [3, 3, 1], [2, 1, 2, 1, 1]),
        (1, 1, [1] * 7, [1] * 7),  # the vocabulary is larger than a chunk
    ],
)
def test_only_one_chunk_of_logits_exists_at_a_time(
    chunk_elements, piece_elements, chunks, pieces, monkeypatch
):
    found = {"project": [], "logits": []}

    def record(name):
        method = getattr(loss.Head, name)

        def recorded(head, rows, *args):
            found[name].append(len(rows))
            return method(head, rows, *args)

        monkeypatch.setattr(loss.Head, name, recorded)

    record("project")
    record("logits")
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(loss, "PIECE_ELEMENTS", {"cpu": piece_elements})
    CausalLMLoss(packed(tiny_llama()))(**batch(lengths=(8,), share=1.0))
    assert found == {"project": chunks, "logits": pieces}


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
    assert (model(**inputs).loss_sum - plain(**inputs).loss_sum).abs() > 0.1
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


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_gradients_that_nobody_needs_are_not_computed(share, monkeypatch):
    """The gradient of a frozen head, and all of them in a validation, would cost time and memory
    for nothing.
    """
    made = []

    class RecordedSums(loss._Sums):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(loss, "_Sums", RecordedSums)
    lm = packed(tiny_llama())
    lm.lm_head.requires_grad_(False)
    model = CausalLMLoss(lm)
    model(**batch(share=share)).loss_sum.backward()
    frozen_head = made.pop()
    assert frozen_head.grad_hidden is not None and frozen_head.grad_weight is None
    assert lm.model.layers[0].mlp.up_proj.weight.grad.any() == (share > 0)
    lm.lm_head.requires_grad_(True)
    with torch.no_grad():
        model(**batch(share=share))
    validation = made.pop()
    assert validation.grad_hidden is None and validation.grad_weight is None


def test_autocast_computes_in_bf16_and_accumulates_in_fp32():
    model, inputs = CausalLMLoss(packed(tiny_llama())), batch(lengths=(60,), share=1.0)
    exact = model(**inputs).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    output.loss_sum.backward()
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum, exact, rtol=2e-2, atol=0)
    assert model.lm.lm_head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "factor", "differs"),
    [
        (torch.float32, 1.0, False),
        (torch.float32, 1.001, True),
        (torch.bfloat16, 1.01, False),  # as the rounding of another kernel
        (torch.bfloat16, 2.0, True),
    ],
)
def test_check_head_falls_back_where_the_model_does_more(dtype, factor, differs, caplog):
    class Scaled(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * factor
            return output

    lm = packed(tiny_llama()).to(dtype)
    lm.__class__ = Scaled
    model = CausalLMLoss(lm)
    model.check_head()
    assert model.own_logits == differs == ("own full logits" in caplog.text)


def test_adapted_head_uses_own_logits(caplog):
    lm = packed(tiny_llama())
    lm.lm_head = nn.Sequential(lm.lm_head)
    assert CausalLMLoss(lm).own_logits and "not a plain linear layer" in caplog.text


def test_rows_of_one_give_the_same_loss():
    lm, inputs = packed(tiny_llama()), batch(lengths=(5, 9, 3))
    shapes = []
    lm.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape))
    )
    model = CausalLMLoss(lm)
    expected = model(**inputs)
    model.separate_rows = True
    output = model(**inputs)
    assert shapes == [(1, 17), (3, 9)]
    torch.testing.assert_close(output.loss_sum, expected.loss_sum)
    assert output.num_targets == expected.num_targets


@pytest.mark.parametrize("separate_rows", [False, True])
def test_rows_that_are_not_packed_stay_as_they_are(separate_rows):
    lm, inputs = packed(tiny_llama()), batch(lengths=(12,))
    model = CausalLMLoss(lm)
    expected = model(**inputs)
    model.separate_rows = separate_rows
    rows = {name: inputs[name].expand(2, -1) for name in ("input_ids", "labels", "position_ids")}
    output = model(**rows)
    torch.testing.assert_close(output.loss_sum, 2 * expected.loss_sum)
    assert output.num_targets == 2 * expected.num_targets


def test_peft_would_drop_the_bias_of_a_head_whose_rows_are_trained():
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]})
    CausalLMLoss(get_peft_model(tiny_llama(), rows).get_base_model())
    with pytest.raises(UserError, match="the head of LlamaForCausalLM has a bias"):
        CausalLMLoss(get_peft_model(llama_with_a_bias(), rows).get_base_model())


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 1.0}, {"type": "dft", "label_smoothing": 0.1}]
)
def test_bad_options(options):
    with pytest.raises(UserError, match="model.loss.label_smoothing"):
        LossOptions(**options)
