import pickle

import pytest
import torch
from terminal import log_lines
from tiny import tiny_gpt2, tiny_llama, tiny_qwen3

from lit_sft.errors import UserError
from lit_sft.model import parallel, self_check
from lit_sft.model.attention import cpu_kernel, own_scores
from lit_sft.model.attention import packed as attention_packed
from lit_sft.model.attention.implementation import attention_of
from lit_sft.model.attention.packed import pack_kwargs
from lit_sft.model.generate import GenerationOptions, generate, left_pad
from lit_sft.model.loss import CausalLMLoss
from lit_sft.model_builder import apply_fast_paths, probe


def hidden(lm, input_ids, lengths):
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = attention_of(lm) == attention_packed.PACKED
    kwargs = pack_kwargs(lengths, input_ids.device) if packed else {}
    return lm.base_model(
        input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs
    ).last_hidden_state


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gpt2])
def test_an_example_in_a_pack_equals_the_example_alone(make):
    lm = make()
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
    lengths = (4, 1, 7, 3)
    input_ids = torch.randint(0, 320, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    together = hidden(lm, input_ids, lengths).split(lengths, dim=1)
    for part, ids in zip(together, input_ids.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(part, hidden(lm, ids, (ids.shape[1],)), rtol=1e-5, atol=1e-5)
    assert self_check.packing_is_exact(lm)


def test_the_same_as_transformers_own_mask_for_packs():
    lm = tiny_llama()
    lengths = (6, 5, 2)
    input_ids = torch.randint(0, 320, (1, 13), generator=torch.Generator().manual_seed(0))
    expected = hidden(
        lm, input_ids, lengths
    )  # sdpa with a block-diagonal mask from the position ids
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
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
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
    torch.testing.assert_close(hidden(lm, input_ids, lengths), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_are_those_of_separate_calls(window):
    """Of the CPU's operation, by its own backward pass, in fp32; `opcheck` holds it to what
    torch.compile expects.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    grad = torch.randn(1, 12, 4, 8, generator=generator)
    made = []
    for run in (
        lambda *qkv: cpu_kernel.packed_attention_cpu(*qkv, bounds, 0.3, window)[0],
        lambda *qkv: attention_packed._per_segment(*qkv, 0.0, bounds, 0.3, window),
    ):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        out = run(*inputs)
        made.append([out, *torch.autograd.grad(out, inputs, grad)])
    for ours, expected in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(cpu_kernel.packed_attention_cpu, (*inputs, bounds, 0.3, window))


def inputs_and_grad(lengths, dtype=torch.float32):
    """Queries, keys, values, sinks and the gradient of a row of examples."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    shapes = [(1, 4, tokens, 8), (1, 2, tokens, 8), (1, 2, tokens, 8), (4,), (1, tokens, 4, 8)]
    *inputs, grad = (2 * torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(dtype) for x in inputs], grad.to(dtype)


def whole_square(query, key, value, sinks, lengths, window=None, cap=None):
    """Attention as the formula says: all scores of an example at once."""
    outs = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True):
        scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        hidden = (distance < 0) | (distance >= (window or q.shape[2]))
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat(
                [scores, sinks[None, :, None, None].expand(scores[..., :1].shape)], -1
            )
        shares = scores.softmax(-1)[..., : q.shape[2]]
        outs.append((shares @ v.repeat_interleave(2, 1)).transpose(1, 2))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("window", [None, 4])
def test_sinks_in_the_cpu_operation(window):
    """Results, and all gradients: those of the sinks, too."""
    lengths = (5, 1, 150)
    inputs, grad = inputs_and_grad(lengths)
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    made = []
    for run in (
        lambda q, k, v, s: cpu_kernel.packed_attention_cpu(q, k, v, bounds, None, window, s)[0],
        lambda q, k, v, s: whole_square(q, k, v, s, lengths, window),
    ):
        own = [x.clone().requires_grad_() for x in inputs]
        out = run(*own)
        made.append([out, *torch.autograd.grad(out, own, grad)])
    for ours, expected in zip(*made, strict=True):
        assert (ours - expected).norm() < 2e-6 * expected.norm()
    query, key, value, sinks = own
    torch.library.opcheck(
        cpu_kernel.packed_attention_cpu, (query, key, value, bounds, None, window, sinks)
    )


def test_gradients_of_sinks_in_bf16():
    """Longer than the examples whose backward pass is the kernel's."""
    lengths = (cpu_kernel.SHORT, cpu_kernel.BLOCK + 50)
    inputs, grad = inputs_and_grad(lengths, torch.bfloat16)
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    own = [x.clone().requires_grad_() for x in inputs]
    query, key, value, sinks = own
    out, _ = cpu_kernel.packed_attention_cpu(query, key, value, bounds, None, None, sinks)
    ours = torch.autograd.grad(out, own, grad)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(whole_square(*exact, lengths), exact, grad.double())
    for mine, true in zip(ours, expected, strict=True):
        assert (mine - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("window", "cap"), [(None, 3.0), (4, 3.0), (20, None), (None, None)])
def test_own_scores_block_by_block(window, cap, with_sinks, monkeypatch):
    monkeypatch.setattr(own_scores, "BLOCK", 16)
    lengths = (5, 1, 70)
    (*inputs, sinks), grad = inputs_and_grad(lengths)
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    made = []
    for is_ours in (True, False):
        own = [x.clone().requires_grad_() for x in (*inputs, sinks)]
        query, key, value, sink = own
        sink = sink if with_sinks else None
        if is_ours:
            scores = own_scores.Scores(window=window, cap=cap, sinks=sink)
            out = own_scores.attend_packed(query, key, value, bounds, scores)
        else:
            out = whole_square(query, key, value, sink, lengths, window, cap)
        made.append([out, *torch.autograd.grad(out, own, grad, materialize_grads=True)])
    for ours, expected in zip(*made, strict=True):
        assert (ours - expected).norm() <= 2e-6 * expected.norm()


LLAMA4 = dict(
    attention_chunk_size=4, floor_scale=5, num_hidden_layers=4, num_local_experts=2, intermediate_size_mlp=64,
)  # fmt: skip


@pytest.mark.parametrize("name", ["GptOss", "Gemma2", "Llama4Text"])
def test_answers_with_sinks_caps_and_chunks_are_those_of_eager(name):
    """Padded prompts, a cache, and a window that the answers pass."""
    if name == "Llama4Text":
        sizes = LLAMA4
    else:
        sizes = {**LOST[name][0], "sliding_window": 4}
    attention_packed.register()
    input_ids = torch.tensor([[0, 0, 5, 6, 9], [7, 8, 9, 10, 11]])
    mask = (input_ids > 0).long()
    answers = []
    for attention in (attention_packed.PACKED, "eager"):
        lm = small(name, attention, **sizes)
        answers.append(
            lm.generate(input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        )
    assert torch.equal(*answers)


@pytest.mark.parametrize(("kv_heads", "scaling"), [(1, None), (2, 0.3), (6, None)])
def test_gradients_in_bf16_are_as_exact_as_those_of_sdpa(kv_heads, scaling):
    """Against fp64, for examples of no block, of one and of several: our products beside the
    kernel's own backward.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = (40, cpu_kernel.SHORT, cpu_kernel.BLOCK, 2 * cpu_kernel.BLOCK + 1)
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs = [
        (2 * torch.randn(1, heads, sum(lengths), 64, generator=generator)).bfloat16()
        for heads in (6, kv_heads, kv_heads)
    ]
    grad = torch.randn(1, sum(lengths), 6, 64, generator=generator).bfloat16()

    def gradients(run, dtype):
        own = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(run(*own), own, grad.to(dtype))

    def by_sdpa(*qkv):
        return attention_packed._per_segment(*qkv, 0.0, bounds, scaling, None)

    exact = gradients(by_sdpa, torch.float64)
    made = gradients(
        lambda *qkv: cpu_kernel.packed_attention_cpu(*qkv, bounds, scaling, None)[0], torch.bfloat16
    )
    for ours, theirs, expected in zip(made, gradients(by_sdpa, torch.bfloat16), exact, strict=True):
        for part in zip(*(x.split(lengths, dim=2) for x in (ours, theirs, expected)), strict=True):
            error, usual = ((x.double() - part[2]).norm() / part[2].norm() for x in part[:2])
            assert error < 2 * usual < 0.02


def test_compiled_once_for_packs_of_any_number_of_examples(monkeypatch):
    """A tuple of lengths made code anew for each number of examples, until torch gave up
    compiling.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    # What other tests have compiled counts towards the limit of recompilations.
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend=counter, **kw)
    )
    lm = tiny_llama()
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
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


@pytest.mark.parametrize("name", ["GptOss", "Llama4Text"])
def test_compiled_and_checkpointed(name, monkeypatch):
    """Sinks, chunks and temperature, in whole and in selective checkpoints and compiled."""
    import transformers

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **kw: compile_module(self, backend="aot_eager", **kw),
    )

    attention_packed.register()
    sizes = dict(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, num_local_experts=2, num_experts_per_tok=1,
        intermediate_size_mlp=64, pad_token_id=0, sliding_window=4, attention_chunk_size=4, floor_scale=5,
    )  # fmt: skip
    config_class = getattr(transformers, f"{name}Config")
    known = {*config_class().to_dict(), *config_class.attribute_map}
    config = config_class(**{key: value for key, value in sizes.items() if key in known})
    lengths = (9, 3, 14)
    input_ids = torch.randint(1, 320, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    labels = input_ids.roll(-1, 1)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    made = []
    for change in ("none", "full", "selective", "compiled"):
        torch.manual_seed(0)
        causal_class = transformers.AutoModelForCausalLM
        lm = causal_class.from_config(config, attn_implementation=attention_packed.PACKED).train()
        if change in ("full", "selective"):
            parallel.apply_gradient_checkpointing(lm, selective=change == "selective")
        if change == "compiled":
            parallel.apply_compile(lm)
        loss = CausalLMLoss(lm)(input_ids, labels, position_ids, lengths).loss_sum
        loss.backward()
        made.append([loss, *(weight.grad for weight in lm.parameters() if weight.grad is not None)])
    for other in made[1:]:
        for ours, expected in zip(other, made[0], strict=True):
            assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_answers_leave_compiled_blocks_as_they_are(monkeypatch):
    """They would be compiled for every length and state of the cache, until torch compiles nothing
    more, nor a step.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    # What other tests have compiled counts towards the limit of recompilations.
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend=counter, **kw)
    )
    lm = tiny_llama(num_hidden_layers=6)
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
    parallel.apply_compile(lm)
    ids, mask = left_pad([[5, 6, 7, 8], [9, 10]], 0)
    answers = generate(
        lm, ids, mask, options=GenerationOptions(max_new_tokens=6), stop_ids=[], pad_id=0
    )
    assert counter.frame_count == 0 and all(len(answer) == 6 for answer in answers)
    hidden(lm, torch.arange(30)[None], (14, 16)).sum().backward()
    assert counter.frame_count == 1


def test_generation_goes_through_sdpa():
    lm = tiny_llama()
    input_ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = lm.generate(
        input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
    assert torch.equal(
        lm.generate(
            input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        ),
        expected,
    )


def test_a_state_space_model_is_found_out():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    lm = MambaForCausalLM(
        MambaConfig(
            vocab_size=320, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.5
        )
    )
    assert not self_check.packing_is_exact(lm)


def test_choose():
    assert attention_packed.choose("auto") == attention_packed.PACKED
    assert attention_packed.choose("sdpa") == "sdpa"


# ---------------------------------------------------------------------- what packed attention
# cannot do is found out

SIZES = dict(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LOST = {
    "Llama": ({}, None),
    "Qwen3": ({}, None),
    "Mistral": ({"sliding_window": 4}, None),
    "Gemma2": ({"sliding_window": 4, "attn_logit_softcapping": 5.0}, None),
    "GptOss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, None),  # sinks
    "Phimoe": (
        {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
        "a window of 4 tokens",
    ),
    "Mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "attention code of its own"),
    "Bloom": ({"n_head": 4, "n_layer": 2}, "mask of its own"),
}


def small(name, attn_implementation="eager", **sizes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes})
    kind = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    return kind._from_config(config, attn_implementation=attn_implementation).eval()


@pytest.mark.parametrize("name", LOST)
def test_missing_feature(name):
    sizes, expected = LOST[name]
    attention_packed.register()
    lost = self_check.missing_feature(small(name, attention_packed.PACKED, **sizes))
    assert lost is None if expected is None else expected in lost


@pytest.mark.parametrize("name", LOST)
def test_missing_feature_in_bf16(name):
    sizes, expected = LOST[name]
    attention_packed.register()
    lost = self_check.missing_feature(small(name, attention_packed.PACKED, **sizes).bfloat16())
    assert lost is None if expected is None else expected in lost


def test_rounding_in_bf16_is_no_loss():
    """It grows from layer to layer: the frozen base of every adapted model had been trained with
    `eager` for it.
    """
    attention_packed.register()
    lm = small("Llama", attention_packed.PACKED, num_hidden_layers=30, hidden_size=64).bfloat16()
    with log_lines() as lines:
        model = CausalLMLoss(lm)
        apply_fast_paths(model, probe(model))
    assert attention_of(lm) == attention_packed.PACKED and lines == []


def test_a_model_that_stumbles_is_one_of_them(monkeypatch):
    attention_packed.register()
    lm = small("Llama", attention_packed.PACKED)
    monkeypatch.setattr(lm.model, "forward", lambda **inputs: inputs["attention_mask"].shape)
    assert self_check.missing_feature(lm) == "attention code of its own"


@pytest.mark.parametrize("name", [name for name in LOST if LOST[name][1]])
def test_such_a_model_falls_back_aloud_and_is_exact(name):
    """A row of three examples, two of them longer than the window, beside each alone in the model
    as it is.
    """
    sizes, expected = LOST[name]
    attention_packed.register()
    lm, lengths = small(name, attention_packed.PACKED, **sizes), (9, 3, 6)
    model = CausalLMLoss(lm)
    with log_lines() as lines:
        apply_fast_paths(model, probe(model))
    assert attention_of(lm) == "eager"
    assert any(expected in line and "falls back to `eager`" in line for line in lines)
    input_ids = torch.randint(3, 320, (1, 18), generator=torch.Generator().manual_seed(0))
    labels = input_ids.roll(-1, 1)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    ours = model.eval()(input_ids, labels, position_ids, lengths).loss_sum
    own = small(name, **sizes)
    alone = [
        torch.nn.functional.cross_entropy(
            own(input_ids=ids, use_cache=False).logits[0], aims[0], reduction="sum"
        )
        for ids, aims in zip(input_ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
    ]
    torch.testing.assert_close(ours, sum(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "attention"), [("Llama", attention_packed.PACKED), ("Phimoe", "eager")]
)
def test_probing_changes_nothing_until_what_it_found_is_applied(name, attention):
    """Here, or on another rank that gets the record."""

    def replaced(lm):
        return [name for name, module in lm.named_modules() if "forward" in vars(module)]

    attention_packed.register()
    model, other = (
        CausalLMLoss(small(name, attention_packed.PACKED, **LOST[name][0])) for _ in range(2)
    )
    paths = pickle.loads(pickle.dumps(probe(model)))
    assert (
        model.lm.config._attn_implementation == attention_packed.PACKED and replaced(model.lm) == []
    )
    apply_fast_paths(other, paths)
    assert other.lm.config._attn_implementation == attention
    assert other.separate_rows == (attention == "eager")
    assert other.fused == replaced(other.lm) and bool(other.fused) == (name == "Llama")


@pytest.mark.parametrize(("tokens", "told"), [(3000, False), (6000, True)])
def test_the_memory_of_all_scores_is_told(tokens, told):
    with log_lines() as lines:
        self_check.warn_of_scores(small("Llama"), tokens)
        self_check.warn_of_scores(small("Llama", "sdpa"), tokens)
    # 4 heads, 2 layers, 4 bytes.
    expected = "a row of 6,000 tokens 0.6 GB in each of 2 layers, 1.2 GB in all"
    assert [expected in line for line in lines] == [True] * told


def test_a_model_that_sees_what_follows_is_refused():
    """Of its own loss, the mean over tokens it could read, nothing would tell."""
    from transformers import BertConfig, BertLMHeadModel

    sizes = {
        key: SIZES[key]
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    attention_packed.register()
    for is_decoder in (True, False):
        config = BertConfig(**sizes, intermediate_size=64, is_decoder=is_decoder)
        lm = BertLMHeadModel._from_config(config, attn_implementation=attention_packed.PACKED)
        assert self_check.is_causal(lm) or not is_decoder
    with pytest.raises(
        UserError, match="BertLMHeadModel lets tokens see those that follow.*is_decoder"
    ):
        probe(CausalLMLoss(lm))


# ---------------------------------------------------------------------- the kernel of GPUs, with a
# stand-in for it


def reference(
    query, key, value, bounds, _, longest, __, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`varlen_attn` as torch documents it, in plain torch: [T, H, K] -> [T, H, K]."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert bounds.dtype == torch.int32 and longest == int(bounds.diff().max())
    left, right = window_size
    outs = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= -right) & ((distance <= left) if left >= 0 else True)
        scores = (q @ k.mT).float() * (scale or q.shape[-1] ** -0.5)
        outs.append(
            (scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v).transpose(0, 1)
        )
    return torch.cat(outs)


def without_groups(query, key, value, bounds, _, longest, __, *, scale=None, window_size=(-1, -1)):
    """As an older torch has it, which sees by itself that heads share keys."""
    grouped = query.shape[1] != key.shape[1]
    return reference(
        query,
        key,
        value,
        bounds,
        _,
        longest,
        __,
        scale=scale,
        window_size=window_size,
        enable_gqa=grouped,
    )


@pytest.mark.parametrize("varlen", [reference, without_groups])
@pytest.mark.parametrize("window", [None, 4])
def test_the_flash_kernel_gets_lengths_window_and_groups(varlen, window, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    attention_packed._varlen_has_gqa_option.cache_clear()
    bounds = torch.tensor([0, 9, 12, 18], dtype=torch.int32)
    query, key, value = (torch.randn(1, heads, 18, 8) for heads in (4, 2, 2))
    ours = attention_packed._varlen(query, key, value, 9, bounds, None, window)
    expected = attention_packed._per_segment(query, key, value, 0.0, bounds, None, window)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    attention_packed._varlen_has_gqa_option.cache_clear()


def test_mixed_precision_reaches_the_flash_kernel(monkeypatch, caplog):
    """Rotary embeddings lift query and key to fp32 under autocast, which must not keep the kernel
    away.
    """
    caplog.set_level("INFO", "lit_sft")
    lm, seen = tiny_qwen3().train(), []
    attention_packed.register()
    lm.set_attn_implementation(attention_packed.PACKED)
    monkeypatch.setattr(
        attention_packed, "flash_supports", lambda query, value: query.dtype == torch.bfloat16
    )
    monkeypatch.setattr(
        attention_packed,
        "_varlen",
        lambda q, k, v, *_: seen.append((q.dtype, k.dtype)) or q.transpose(1, 2),
    )
    attention_packed._log_kernel.cache_clear()
    with log_lines() as lines, torch.autocast("cpu", torch.bfloat16):
        hidden(lm, torch.arange(3, 10)[None], (3, 4))
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert lines == [
        "packed attention: torch's variable-length flash kernel (cpu, bfloat16, head size 16)"
    ]


def test_flash_supports_nothing_on_a_cpu():
    query = torch.zeros(1, 4, 3, 64, dtype=torch.bfloat16)
    assert not attention_packed.flash_supports(query, query)
