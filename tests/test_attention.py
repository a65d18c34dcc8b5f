import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_qwen3

from lit_sft.model import attention, parallel
from lit_sft.model.loss import pack_kwargs


def hidden(lm, input_ids, lengths):
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = lm.config._attn_implementation == attention.PACKED
    kwargs = pack_kwargs(lengths, input_ids.device) if packed else {}
    return lm.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs).last_hidden_state


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gpt2])
def test_an_example_in_a_pack_equals_the_example_alone(make):
    lm = make()
    attention.register()
    lm.set_attn_implementation(attention.PACKED)
    lengths = (4, 1, 7, 3)
    input_ids = torch.randint(0, 320, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    together = hidden(lm, input_ids, lengths).split(lengths, dim=1)
    for part, ids in zip(together, input_ids.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(part, hidden(lm, ids, (ids.shape[1],)), rtol=1e-5, atol=1e-5)
    assert attention.packs_are_exact(lm, pack_kwargs)


def test_the_same_as_transformers_own_mask_for_packs():
    lm = tiny_llama()
    lengths = (6, 5, 2)
    input_ids = torch.randint(0, 320, (1, 13), generator=torch.Generator().manual_seed(0))
    expected = hidden(lm, input_ids, lengths)  # sdpa with a block-diagonal mask from the position ids
    attention.register()
    lm.set_attn_implementation(attention.PACKED)
    torch.testing.assert_close(hidden(lm, input_ids, lengths), expected, rtol=1e-5, atol=1e-5)


def test_sliding_window_is_honoured():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = MistralForCausalLM._from_config(config, attn_implementation="eager").eval()
    lengths = (9, 3, 6)
    input_ids = torch.randint(0, 320, (1, 18))
    expected = hidden(lm, input_ids, lengths)
    attention.register()
    lm.set_attn_implementation(attention.PACKED)
    torch.testing.assert_close(hidden(lm, input_ids, lengths), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_are_those_of_separate_calls(window):
    """Of the CPU's operation, by its own backward pass, in fp32; `opcheck` holds it to what torch.compile expects."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    grad = torch.randn(1, 12, 4, 8, generator=generator)
    made = []
    for run in (
        lambda *qkv: attention.cpu.packed_attention_cpu(*qkv, bounds, 0.3, window)[0],
        lambda *qkv: attention._per_segment(*qkv, bounds, 0.0, 0.3, window),
    ):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        out = run(*inputs)
        made.append([out, *torch.autograd.grad(out, inputs, grad)])
    for ours, expected in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(attention.cpu.packed_attention_cpu, (*inputs, bounds, 0.3, window))


def test_compiled_once_for_packs_of_any_number_of_examples(monkeypatch):
    """A tuple of lengths made code anew for each number of examples, until torch gave up compiling."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend=counter, **kw))
    lm = tiny_llama()
    attention.register()
    lm.set_attn_implementation(attention.PACKED)
    packs = [tuple(41 + (5 * i + j) % 7 for j in range(i)) for i in range(1, 12)]
    ids = [torch.arange(sum(lengths))[None] % 320 for lengths in packs]
    plain = [hidden(lm, *pack) for pack in zip(ids, packs, strict=True)]
    parallel.apply_compile(lm)
    graphs = []
    for pack, expected in zip(zip(ids, packs, strict=True), plain, strict=True):
        compiled = hidden(lm, *pack)
        compiled.sum().backward()
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs == [2] * len(packs)  # forward and backward, shared by all layers


def test_generation_goes_through_sdpa():
    lm = tiny_llama()
    input_ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = lm.generate(input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    attention.register()
    lm.set_attn_implementation(attention.PACKED)
    assert torch.equal(
        lm.generate(input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0), expected
    )


def test_a_state_space_model_is_found_out():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    lm = MambaForCausalLM(
        MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.5)
    )
    assert not attention.packs_are_exact(lm, pack_kwargs)


def test_choose():
    from transformers import Gemma2Config, LlamaConfig

    assert attention.choose(LlamaConfig(), "auto") == attention.PACKED
    assert attention.choose(LlamaConfig(), "sdpa") == "sdpa"
    assert attention.choose(Gemma2Config(), "auto") == "eager"  # its scores are soft-capped
