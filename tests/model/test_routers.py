"""The loss that balances experts, and what is logged about routers."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from ranks import run_ranks
from tiny import tiny_gpt_oss, tiny_llama, tiny_qwen3_moe

from lit_sft.errors import UserError
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.loss import CausalLMLoss, LossOptions, RouterOptions
from lit_sft.model.routers import RouterSums, choose_coefficient
from lit_sft.model.trainable import set_trainable
from lit_sft.types import IGNORE_INDEX, Routing

COEFFICIENT = 0.5
BUILDS = [tiny_qwen3_moe, tiny_gpt_oss]
both = pytest.mark.parametrize("build", BUILDS)


def watched(lm):
    model = CausalLMLoss(lm)
    model.routers = RouterOptions(top_k=2, needs_grad=True)
    return model.train()


def example(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 320, (length,), generator=generator)


def forward(model, *examples):
    """One row of examples, in which every token but the first of each is a target."""
    end = torch.tensor([IGNORE_INDEX])
    return model(
        torch.cat(examples)[None],
        torch.cat([torch.cat([ids[1:], end]) for ids in examples])[None],
        torch.cat([torch.arange(len(ids)) for ids in examples])[None],
        tuple(len(ids) for ids in examples),
    )


def gradients(lm):
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def step(model, micro_batches, num_ranks=1):
    """The gradients of one optimizer step of this rank, before they are summed over ranks."""
    sums = RouterSums(COEFFICIENT, num_ranks)
    model.zero_grad()
    targets = 0
    for examples in micro_batches:
        output = forward(model, *examples)
        (output.loss_sum + sums.add(output.routing, output.num_targets, False)).backward()
        targets += int(output.num_targets)
    return sums, gradients(model.lm), targets


def assert_close(found, expected, divisor=1.0):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name] / divisor, value, rtol=0, atol=1e-5 * scale)


# ------------------------------------------------------------------ the loss


@both
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("own_logits", [False, True])
def test_one_micro_batch_has_the_loss_of_transformers(build, checkpointing, own_logits):
    theirs, ids = build(router_aux_loss_coef=COEFFICIENT).train(), example(40)
    outputs = theirs(input_ids=ids[None], labels=ids[None], output_router_logits=True)
    outputs.loss.backward()
    model = watched(build())
    model.own_logits = own_logits
    if checkpointing:
        options = {"use_reentrant": False}
        model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    sums, found, targets = step(model, [[ids]])
    assert_close(found, gradients(theirs), targets)
    assert sums.metrics()["router_aux_loss"].item() == pytest.approx(outputs.aux_loss.item())
    without = build().train()
    without(input_ids=ids[None], labels=ids[None]).loss.backward()
    name = next(
        name for name, p in model.lm.named_parameters() if "router" in name or "gate.w" in name
    )
    assert (gradients(without)[name] - gradients(theirs)[name]).abs().max() > 1e-4


@both
@pytest.mark.parametrize("one_by_one", [False, True])
def test_padding_does_not_count(build, one_by_one):
    """A padded row, or a forward pass, for each example has the sums of the examples alone."""
    examples = [example(30), example(7, seed=1), example(18, seed=2)]
    model = watched(build())
    alone = [forward(model, ids).routing for ids in examples]
    model.separate_rows, model.one_by_one = True, one_by_one
    found = forward(model, *examples).routing
    assert found.num_tokens == 55
    assert found.counts.sum(1).tolist() == [110, 110]
    for value, parts in zip(found[:3], list(zip(*alone, strict=True))[:3], strict=True):
        torch.testing.assert_close(value, sum(parts))


def _on_each_rank(examples, expected):
    rank = torch.distributed.get_rank()
    model = watched(tiny_qwen3_moe())
    sums, found, _ = step(model, [[examples[rank]]], num_ranks=2)
    for gradient in found.values():
        torch.distributed.all_reduce(gradient)
    assert_close(found, expected["gradients"])
    for name, value in sums.metrics().items():
        torch.testing.assert_close(value, expected["metrics"][name])


def test_two_ranks_have_the_loss_of_one():
    """Of unequal numbers of tokens."""
    examples = [example(40), example(12, seed=1)]
    model = watched(tiny_qwen3_moe(attn_implementation="eager"))
    model.separate_rows = True
    sums, found, _ = step(model, [examples])
    expected = {"gradients": found, "metrics": sums.metrics()}
    run_ranks(_on_each_rank, examples, expected)


def test_accumulation_keeps_the_counts_of_the_step():
    """The second micro-batch is balanced by the tokens of both."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (4, 10), (3, 5)
    parts = [
        Routing(
            torch.rand(2, 4, generator=generator) * count,
            torch.rand(4, generator=generator) * count,
            torch.ones(()),
            count,
        )
        for count in tokens
    ]
    sums = RouterSums(COEFFICIENT, num_ranks=1)
    terms = [
        sums.add(part, torch.tensor(number), False)
        for part, number in zip(parts, targets, strict=True)
    ]
    counts = [part.counts.sum(0) for part in parts]
    frequencies = [counts[0] / 8, (counts[0] + counts[1]) / 28]
    for part, count, number, frequency, term in zip(
        parts, tokens, targets, frequencies, terms, strict=True
    ):
        expected = COEFFICIENT * number * 4 * (frequency * part.probs / (2 * count)).sum()
        torch.testing.assert_close(term, expected)
    whole = (counts[0] + counts[1]) / 28 * (parts[0].probs + parts[1].probs) / 28
    torch.testing.assert_close(sums.metrics()["router_aux_loss"], 4 * whole.sum())
    sums.clear()
    assert sums.metrics() == {}
    torch.testing.assert_close(sums.add(parts[0], torch.tensor(3), False), terms[0])


def test_a_filler_does_not_count():
    part = Routing(torch.ones(1, 4), torch.ones(4, requires_grad=True), torch.ones(()), 2)
    sums = RouterSums(COEFFICIENT, num_ranks=1)
    term = sums.add(part, torch.tensor(0), True)
    term.backward()
    assert term == 0 and not part.probs.grad.any()
    assert all(value == 0 for value in sums.metrics().values())


# ------------------------------------------------------------------ statistics


def test_load_and_entropy_are_those_of_their_definition():
    """Over several micro-batches: the most loaded expert of a layer, beside an even load."""
    lm = tiny_qwen3_moe()
    model = watched(lm)
    batches = [example(40), example(25, seed=1)]
    sums = RouterSums(0.0, num_ranks=1)
    counts, entropies = torch.zeros(2, 4), []
    for ids in batches:
        output = forward(model, ids)
        assert sums.add(output.routing, output.num_targets, False) is None
        with torch.no_grad():
            logits = lm(input_ids=ids[None], output_router_logits=True).router_logits
        for number, layer in enumerate(logits):
            for token in layer:
                probs = token.softmax(0).tolist()
                entropies.append(-sum(p * math.log(p) for p in probs))
                for expert in token.topk(2).indices:
                    counts[number, expert] += 1
    metrics = sums.metrics()
    assert metrics.keys() == {"expert_load_max", "router_entropy"}
    assert metrics["expert_load_max"].item() == pytest.approx(float((counts / 130).max() * 4))
    assert metrics["router_entropy"].item() == pytest.approx(sum(entropies) / len(entropies), 1e-5)


def test_routers_are_not_watched_in_evaluation():
    model = watched(tiny_qwen3_moe())
    with torch.no_grad():
        assert forward(model, example(9)).routing is None
    assert forward(model.eval(), example(9)).routing is None
    assert forward(model.train(), example(9)).routing is not None


# ------------------------------------------------------------------ when


@pytest.mark.parametrize(
    ("prepare", "wanted", "expected"),
    [
        (lambda lm: None, None, 0.25),
        (lambda lm: None, 0.1, 0.1),
        (lambda lm: None, 0.0, 0.0),
        (lambda lm: set_trainable(lm, ["self_attn"]), None, 0.0),
        (lambda lm: set_trainable(lm, ["mlp.gate"]), None, 0.25),
        (lambda lm: set_trainable(lm, ["mlp.experts"]), None, 0.25),
        (lambda lm: apply_lora(lm, LoraConfig(r=2)), None, 0.0),
        (lambda lm: apply_lora(lm, LoraConfig(r=2, target_experts=True)), None, 0.25),
    ],
)
def test_the_loss_is_added_where_routers_or_experts_are_trained(prepare, wanted, expected):
    lm = tiny_qwen3_moe(router_aux_loss_coef=0.25)
    prepare(lm)
    assert choose_coefficient(lm, wanted) == expected


def test_what_is_added_or_left_out_is_told(caplog):
    caplog.set_level(logging.INFO)
    lm = tiny_qwen3_moe(router_aux_loss_coef=0.25)
    choose_coefficient(lm, None)
    assert "experts is added, times 0.25 (the model's config)" in caplog.text
    choose_coefficient(lm, 0.0)
    assert "is left out (model.loss.router_aux_loss_coef 0)" in caplog.text


def test_a_coefficient_without_effect_is_refused():
    with pytest.raises(UserError, match="transformers has no such loss for LlamaForCausalLM"):
        choose_coefficient(tiny_llama(), 0.1)
    frozen = tiny_qwen3_moe()
    apply_lora(frozen, LoraConfig(r=2))
    with pytest.raises(UserError, match="neither routers nor experts are trained"):
        choose_coefficient(frozen, 0.1)
    with pytest.raises(UserError, match="router_aux_loss_coef is -1, it must be 0 or more"):
        LossOptions(router_aux_loss_coef=-1)
