"""model/neftune.py: noise on the embeddings, sized by the length of each example."""

import pytest
import torch
from tiny import tiny_qwen3

from lit_sft.errors import UserError
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.loss import CausalLMLoss
from lit_sft.model.neftune import apply_neftune

ALPHA, HIDDEN = 5.0, 32
LENGTHS = (2, 30, 8)


@pytest.fixture
def noisy():
    """A loss module with noise, and what its embedding last returned."""
    model = CausalLMLoss(tiny_qwen3())
    apply_neftune(model, model.lm.get_input_embeddings(), ALPHA)
    seen = []
    model.lm.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.detach())
    )
    return model, seen


def batch(lengths=LENGTHS):
    ids = torch.arange(3, 3 + sum(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "lengths": lengths}


def noise(model, seen, inputs, seed=0):
    torch.manual_seed(seed)
    output = model.train()(**inputs)
    return seen[-1] - model.lm.get_input_embeddings().weight.detach()[inputs["input_ids"]], output


def test_each_example_of_a_pack_has_noise_for_its_own_length(noisy):
    found, output = noise(*noisy, batch())
    for part, length in zip(found[0].split(LENGTHS), LENGTHS, strict=True):
        limit = ALPHA / (length * HIDDEN) ** 0.5
        assert 0.8 * limit < part.abs().max() <= limit * 1.0001
        assert part.pow(2).mean().item() == pytest.approx(limit**2 / 3, rel=0.3)  # uniform
    output.loss_sum.backward()
    assert noisy[0].lm.get_input_embeddings().weight.grad.any()


def test_padded_rows_of_one_example_each_have_the_same_sizes(noisy):
    model, seen = noisy
    model.separate_rows = True
    torch.manual_seed(0)
    model.train()(**batch())
    assert seen[-1].shape == (3, 30, HIDDEN)
    padded = torch.nn.utils.rnn.pad_sequence(
        list(batch()["input_ids"][0].split(LENGTHS)), batch_first=True
    )
    found = seen[-1] - model.lm.get_input_embeddings().weight.detach()[padded]
    for row, length in zip(found, LENGTHS, strict=True):
        limit = ALPHA / (length * HIDDEN) ** 0.5
        assert 0.8 * limit < row.abs().max() <= limit * 1.0001


def test_the_noise_follows_the_seed_and_ends_with_training(noisy):
    model, seen = noisy
    first, again, other = (noise(model, seen, batch(), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.eval()(**batch())
    assert torch.equal(
        seen[-1], model.lm.get_input_embeddings().weight.detach()[batch()["input_ids"]]
    )


def test_over_a_wrapped_bf16_embedding():
    lm = tiny_qwen3().to(torch.bfloat16)
    apply_lora(lm, LoraConfig(), new_token_ids=[7, 8])
    model = CausalLMLoss(lm)
    clean = model.train()(**batch()).loss_sum
    apply_neftune(model, lm.get_input_embeddings(), ALPHA)
    assert model(**batch()).loss_sum != clean
    assert model.eval()(**batch()).loss_sum == clean


def test_a_strength_that_is_none_is_refused():
    model = CausalLMLoss(tiny_qwen3())
    with pytest.raises(UserError, match="model.neftune_noise_alpha is 0; set a positive number"):
        apply_neftune(model, model.lm.get_input_embeddings(), 0)
