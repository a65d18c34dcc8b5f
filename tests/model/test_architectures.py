"""The loss of examples in one row, beside transformers' own loss of each example alone.

The lengths lie on both sides of every threshold in the configs: windows, chunks, selections,
lengths from which rotary frequencies change. `CORE` holds one architecture of each kind; the slow
test builds every causal architecture that transformers has.
"""

import copy
import json
import sys
from collections import Counter

import pytest
import torch
import transformers
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from lit_sft.errors import UserError
from lit_sft.model import load, parallel
from lit_sft.model.attention import packed
from lit_sft.model.loss import CausalLMLoss
from lit_sft.model_builder import apply_fast_paths, probe

LENGTHS = (20, 60, 40)
SMALL = dict(
    vocab_size=320, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=64, initializer_range=0.1, bos_token_id=None, eos_token_id=0, pad_token_id=0, is_decoder=True,
    max_position_embeddings=256, original_max_position_embeddings=32, use_sliding_window=True, max_window_layers=1,
    layer_types=None, mlp_bias=False, output_router_logits=False,
    # the same under other names
    n_embd=32, n_layer=4, n_head=4, n_positions=256, n_inner=64, d_model=32, n_heads=4, n_layers=4, ffn_dim=64,
    word_embed_proj_dim=32, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=64, encoder_layers=1, d_ff=64,
    d_kv=8, num_layers=4, num_heads=4, ffn_hidden_size=64, head_size=8, attention_hidden_size=32, num_kv_heads=2,
    n_kv_heads=2, embedding_size=32, global_head_dim=8, num_global_key_value_heads=2, num_kv_shared_layers=0,
    emb_dim=32, rotary_dim=4, query_pre_attn_scalar=8, lru_width=32, vocab_size_per_layer_input=320,
    hidden_size_per_layer_input=8,
    # thresholds
    sliding_window=16, sliding_window_size=16, attention_window_size=16, window_size=16, local_attention=16,
    attention_chunk_size=16, floor_scale=16, index_topk=16, keep_window_size=16, index_block_size=8,
    index_topk_blocks=1, index_local_blocks=1, block_size=16, chunk_size=16, mamba_chunk_size=16,
    # experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_k=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, moe_ffn_hidden_size=16, expert_ffn_hidden_size=16,
    dense_intermediate_size=32, expert_dim=16, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
    moe_layer_freq=1, moe_layer_start_index=1,
    # latent attention, state spaces, linear attention
    q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, index_n_heads=2,
    index_head_dim=8, state_size=4, ssm_state_size=4, mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16,
    mamba_expand=2, mamba_num_heads=4, mamba_head_dim=16, n_groups=1, mamba_n_groups=1, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, conv_L_cache=3,
    # no dropout
    dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, activation_dropout=0.0, layerdrop=0.0,
)  # fmt: skip
"""Sizes and thresholds by their names in any config; a config takes those that it has."""

LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
FACTORS = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LATENT = {"num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 2}
CORE = {
    "plain": ("llama", {}, "packed"),
    "longrope": ("phi3", {"rope_parameters": LONG_ROPE | FACTORS}, "packed"),
    "dynamic": (
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
        "packed",
    ),
    "windows": ("mistral", {}, "packed"),
    "soft caps": ("gemma2", {}, "packed"),
    "sinks": ("gpt_oss", {}, "packed"),
    "chunks, temperature": ("llama4_text", {}, "packed"),
    "sparse attention": ("deepseek_v32", LATENT, "one by one"),
    "shared sparse attention": ("glm_moe_dsa", LATENT, "one by one"),
    "linear attention": ("qwen3_5_text", {}, "packed"),
    "attention table": ("falcon", {}, "packed"),
    "experts": ("mixtral", {}, "packed"),
}


MORE = dict.fromkeys(
    ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4",
     "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), LATENT,
) | dict.fromkeys(("cwm", "emu3", "modernbert-decoder"), {"bos_token_id": 1})  # fmt: skip
"""What single kinds need beside `SMALL`."""


def small_config(kind, **more):
    """A config of a kind with what `SMALL` has for it."""
    config_class = CONFIG_MAPPING[kind]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    return config_class(**{key: value for key, value in SMALL.items() if key in known} | more)


def small_model(kind, attention, **more):
    config = small_config(kind, **more)
    torch.manual_seed(0)
    model_class = getattr(transformers, CAUSAL[kind])
    chosen = packed.choose(attention)
    return load.with_attention(
        lambda name: model_class._from_config(config, attn_implementation=name), chosen
    )


def examples():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 320, (length,), generator=generator) for length in LENGTHS]


def loss_of(model, group):
    """The sum of the losses of examples in one row."""
    ends = torch.tensor([-100])
    labels = torch.cat([torch.cat([ids[1:], ends]) for ids in group])[None]
    positions = torch.cat([torch.arange(len(ids)) for ids in group])[None]
    return model(torch.cat(group)[None], labels, positions, tuple(map(len, group))).loss_sum


def own_loss(lm, ids):
    """transformers' loss of one example alone, under its own attention.

    A copy, because `dynamic` rotary frequencies remember the example before.
    """
    lm = copy.deepcopy(lm)
    logits = lm(input_ids=ids[None], use_cache=False).logits[0]
    return cross_entropy(logits[:-1].float(), ids[1:], reduction="sum"), lm


def rows_of(model):
    if model.one_by_one:
        return "one by one"
    return "padded" if model.separate_rows else "packed"


def compare(kind, attention="auto", **more):
    """The losses of one row, of another order, alone, and transformers' own; and the way taken."""
    own = small_model(kind, attention, **more).eval()
    own.set_attn_implementation("eager")
    own.config._attn_implementation = "eager"
    model = CausalLMLoss(small_model(kind, attention, **more)).eval()
    apply_fast_paths(model, probe(model))
    rows = examples()
    with torch.no_grad():
        theirs = sum(own_loss(own, ids)[0] for ids in rows)
        alone = sum(loss_of(model, [ids]) for ids in rows)
        ours = [loss_of(model, rows), loss_of(model, rows[::-1]), alone]
    return ours, theirs, rows_of(model)


@pytest.mark.parametrize("name", CORE)
def test_a_row_of_examples_is_the_same_as_each_alone(name):
    kind, more, way = CORE[name]
    ours, theirs, taken = compare(kind, **more)
    for loss in ours:
        torch.testing.assert_close(loss, theirs, rtol=2e-5, atol=0)
    assert taken == way


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["longrope", "dynamic", "chunks, temperature", "sparse attention"])
def test_under_other_attention(name, attention):
    kind, more, _ = CORE[name]
    ours, theirs, _ = compare(kind, attention, **more)
    for loss in ours:
        torch.testing.assert_close(loss, theirs, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    "name",
    ["longrope", "dynamic", "sparse attention", "soft caps", "sinks", "chunks, temperature"],
)
def test_gradients_of_a_row(name):
    kind, more, _ = CORE[name]
    model = CausalLMLoss(small_model(kind, "auto", **more)).eval()
    expected = [torch.zeros_like(weight) for weight in model.lm.parameters()]
    own = small_model(kind, "eager", **more).eval()
    for ids in examples():
        loss, lm = own_loss(own, ids)
        loss.backward()
        for total, weight in zip(expected, lm.parameters(), strict=True):
            total += 0 if weight.grad is None else weight.grad
    apply_fast_paths(model, probe(model))
    loss_of(model, examples()).backward()
    ours = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.lm.parameters()]
    difference = torch.stack([(a - b).norm() for a, b in zip(ours, expected, strict=True)]).norm()
    assert difference < 1e-5 * torch.stack([grad.norm() for grad in expected]).norm()


def built(name):
    """A small model with the fast paths that its probe finds."""
    kind, more, _ = CORE[name]
    model = CausalLMLoss(small_model(kind, "auto", **more)).train()
    apply_fast_paths(model, probe(model))
    return model


def sharded_step(name, expected_loss, expected):
    """The loss and gradients of a rank, of a model sharded over two."""
    model = built(name)
    parallel.apply_fsdp2(model, model.lm, init_device_mesh("cpu", (2,)), torch.float32)
    loss = loss_of(model, examples())
    loss.backward()
    torch.testing.assert_close(loss.item(), expected_loss, rtol=1e-6, atol=0)
    for key, parameter in model.lm.named_parameters():
        found = parameter.grad.full_tensor()
        size = float(expected[key].abs().max())
        torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-6 * size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sinks", "chunks, temperature"])
def test_sharded_over_two_ranks(name):
    """The sinks are parameters beside the layers' matrices, and both kinds need own attention."""
    model = built(name)
    loss = loss_of(model, examples())
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.lm.named_parameters()}
    run_ranks(sharded_step, name, loss.item(), gradients)


def test_padded_rows_of_long_and_short_examples():
    """The rotary frequencies of an example do not depend on the longest row beside it."""
    kind, more, _ = CORE["longrope"]
    own = small_model(kind, "eager", **more).eval()
    model = CausalLMLoss(small_model(kind, "sdpa", **more)).eval()
    model.separate_rows = True
    with torch.no_grad():
        theirs = sum(own_loss(own, ids)[0] for ids in examples())
        torch.testing.assert_close(loss_of(model, examples()), theirs, rtol=2e-5, atol=0)


def test_positions_that_do_not_begin_at_0_are_refused():
    with pytest.raises(UserError, match="does not number the tokens of an example from 0"):
        compare("roberta")


def check_size(kind):
    """Vision towers and byte models keep their full sizes, which would take minutes."""
    with torch.device("meta"):
        lm = getattr(transformers, CAUSAL[kind])._from_config(small_config(kind))
    if lm.num_parameters() > 10_000_000:
        raise ValueError("it does not become small")


def sweep(kinds):
    """{kind: packed, padded, one by one, or why it is none of them}."""
    found = {}
    for kind in kinds:
        try:
            check_size(kind)
            ours, theirs, way = compare(kind, **MORE.get(kind, {}))
            exact = all(abs(loss - theirs) < 2e-5 * theirs for loss in ours)
            found[kind] = way if exact else f"wrong: {ours} {theirs}"
        except UserError as error:
            found[kind] = f"refused: {error}"
        except Exception as error:
            # Most of these do not fit the sizes of `SMALL`.
            found[kind] = f"not built: {type(error).__name__}: {error}"[:200]
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_architecture():
    found = sweep(CAUSAL)
    counts = Counter(way.partition(":")[0] for way in found.values())
    assert counts["wrong"] == 0, [kind for kind, way in found.items() if way.startswith("wrong")]
    assert counts["packed"] + counts["padded"] + counts["one by one"] >= 110


if __name__ == "__main__":
    results = sweep(sys.argv[1:] or CAUSAL)
    print(json.dumps(results, indent=1))
    print(Counter(way.partition(":")[0] for way in results.values()))
