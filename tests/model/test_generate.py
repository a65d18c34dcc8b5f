"""model/generate.py: batches of prompts give the texts that each prompt gives alone."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer

from lit_sft.errors import UserError
from lit_sft.model.attention import packed
from lit_sft.model.decode import decode_completion
from lit_sft.model.generate import GenerationOptions, generate, left_pad
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.lora_config import LoraConfig

PROMPTS = [[5, 6, 7], [40], list(range(60, 80)), [9, 8, 7, 6, 5, 4], [100, 200, 300]]
# Wide weights make answers that wander instead of repeating one token.
WILD = dict(initializer_range=0.4)


def answers(lm, prompts=PROMPTS, stop_ids=(), pad_id=0, synced=False, entry=None, **options):
    options = GenerationOptions(**{"max_new_tokens": 12, **options})
    input_ids, attention_mask = left_pad(prompts, pad_id)
    return generate(
        lm,
        input_ids,
        attention_mask,
        options=options,
        stop_ids=stop_ids,
        pad_id=pad_id,
        synced=synced,
        entry=entry,
    )


def greedy_by_hand(lm, prompt, steps=12):
    """The definition: the arg max of the whole sequence so far, without cache, without padding."""
    ids = list(prompt)
    lm.eval()
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(lm(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_left_pad():
    input_ids, attention_mask = left_pad([[5, 6, 7], [8]], pad_id=3)
    assert input_ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64


@pytest.mark.parametrize("implementation", ["sdpa", "eager", packed.PACKED])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3, tiny_gpt2])
def test_a_batch_equals_its_prompts_one_by_one(build, implementation):
    packed.register()
    lm = build(**WILD)
    lm.set_attn_implementation(implementation)
    together = answers(lm)
    assert len({token for ids in together for token in ids}) > 12, (
        "the answers are too dull to prove anything"
    )
    assert together == [answers(lm, [prompt])[0] for prompt in PROMPTS]
    assert together == [greedy_by_hand(lm, prompt) for prompt in PROMPTS]


def test_weights_that_are_cast_meanwhile_keep_what_hangs_on_them():
    """DDP reduces gradients by hooks on these nodes; tied weights are cast once."""
    lm = tiny_llama(tie_word_embeddings=True)
    weights = dict(lm.named_parameters())

    def nodes():
        return {
            name: weight.expand_as(weight).grad_fn.next_functions[0][0]
            for name, weight in weights.items()
        }

    seen = []
    lm.model.register_forward_pre_hook(lambda *_: seen.append([p.dtype for p in lm.parameters()]))
    before = nodes()  # and held, as DDP does
    with torch.autocast("cpu", torch.bfloat16):
        answers(lm)
    assert seen[0] == [torch.bfloat16] * len(weights)
    assert all(node is before[name] for name, node in nodes().items())
    assert all(parameter is weights[name] for name, parameter in lm.named_parameters())


def test_the_pad_id_does_not_matter():
    lm = tiny_llama(**WILD)
    assert answers(lm, pad_id=0) == answers(lm, pad_id=6)


def test_answers_end_with_the_first_stop_id():
    lm = tiny_llama(**WILD)
    whole = answers(lm)
    stops = [whole[0][4], whole[1][2]]
    for cut, ids in zip(answers(lm, stop_ids=stops), whole, strict=True):
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
        assert cut == ids[: end + 1]


def test_without_stop_ids_the_length_alone_ends_an_answer():
    lm = tiny_llama(**WILD)
    first = answers(lm)[0]
    lm.generation_config.eos_token_id = lm.config.eos_token_id = first[3]
    assert answers(lm)[0] == first


def test_decoding_drops_the_stop_and_special_tokens():
    tokenizer = tiny_tokenizer()
    hello = tokenizer("Hello , world").input_ids
    assert decode_completion(tokenizer, [*hello, 2], [0, 2]) == "Hello , world"
    assert decode_completion(tokenizer, hello, [0, 2]) == "Hello , world"
    assert decode_completion(tokenizer, [1, *hello], [0, 2]) == "Hello , world"
    assert decode_completion(tokenizer, [*hello, hello[-1]], [hello[-1]]) == "Hello , world"
    assert decode_completion(tokenizer, [], [2]) == ""


def test_greedy_takes_nothing_from_the_models_own_generation_config(caplog):
    lm = tiny_llama(**WILD)
    plain = answers(lm)
    own = dict(
        do_sample=True,
        temperature=9.0,
        top_p=0.5,
        top_k=3,
        repetition_penalty=1e9,
        no_repeat_ngram_size=1,
    )
    lm.generation_config.update(
        **own, max_length=5, min_length=30, suppress_tokens=plain[0][:1], num_beams=3
    )
    before = lm.generation_config.to_dict()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        assert answers(lm) == plain
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []
    assert lm.generation_config.to_dict() == before


def test_sampling_follows_its_options():
    lm = tiny_llama(**WILD)
    torch.manual_seed(0)
    drawn = answers(lm, do_sample=True, num_return_sequences=3)
    assert len(drawn) == 3 * len(PROMPTS) and len(set(map(tuple, drawn[:3]))) > 1
    torch.manual_seed(0)
    assert answers(lm, do_sample=True, num_return_sequences=3) == drawn
    greedy = answers(lm)
    assert answers(lm, do_sample=True, top_k=1) == greedy
    assert answers(lm, do_sample=True, top_p=1e-6) == greedy
    assert answers(lm, do_sample=True, temperature=1e-4) == greedy


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_model_in_training_is_put_back_as_it_was(gradient_checkpointing):
    lm = tiny_llama(**WILD, attention_dropout=0.5)
    expected = answers(lm)
    lm.train()
    lm.model.norm.eval()  # a part that someone put into evaluation mode on purpose stays there
    lm.config.use_cache = False
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    lm.model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: calls.append(inputs[0].shape[1])
    )
    assert answers(lm) == expected
    assert calls == [20, *[1] * 11], "the cache of keys and values was not used"
    assert [name for name, module in lm.named_modules() if not module.training] == ["model.norm"]
    assert lm.config.use_cache is False
    assert lm.is_gradient_checkpointing == gradient_checkpointing
    assert lm(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.requires_grad


def test_modes_come_back_after_an_error():
    lm = tiny_llama().train()
    own = lm.generation_config

    def fail(**arguments):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        answers(lm, entry=fail)
    assert lm.training and lm.model.layers[0].training and lm.generation_config is own


def test_autocast_to_bf16_casts_the_weights_once():
    """They are those of a bf16 model while it answers, and afterwards the very same fp32
    tensors.
    """
    lm, inside, half = tiny_llama(**WILD), [], tiny_llama(**WILD)
    for (
        parameter
    ) in half.parameters():  # and not the rotary frequencies, which no checkpoint has in bf16
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = answers(half)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in lm.named_parameters()}

    def entry(**arguments):
        inside.append(({p.dtype for p in lm.parameters()}, torch.is_autocast_enabled("cpu")))
        return lm.generate(**arguments)

    with torch.autocast("cpu", torch.bfloat16):
        assert answers(lm, entry=entry) == expected
        assert torch.is_autocast_enabled("cpu")
    assert inside == [({torch.bfloat16}, False)]
    for name, parameter in lm.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(
            parameter, before[name][1]
        ), name


@pytest.mark.parametrize("synced", [False, True])
def test_other_weights_stay_as_they_are_stored(synced):
    """Under autocast to fp16, where they may overflow; and where sharding has its own type for
    them.
    """
    lm, inside = tiny_llama(**WILD), []

    def entry(synced_gpus, **arguments):
        inside.append({p.dtype for p in lm.parameters()})
        return lm.generate(**arguments)

    expected = answers(lm)
    with torch.autocast("cpu", torch.bfloat16 if synced else torch.float16):
        assert answers(lm, entry=entry, synced=synced) == expected
    assert inside == [{torch.float32}]


def test_fp32_adapters_over_a_bf16_base_answer():
    lm = tiny_llama(**WILD).to(torch.bfloat16)
    expected = answers(lm)
    apply_lora(lm, LoraConfig(modules_to_save=["embed_tokens", "lm_head"]))
    assert answers(lm) == expected  # fresh adapters change nothing


def test_a_frozen_head_is_not_copied_for_every_prompt():
    lm, contiguous = tiny_llama().requires_grad_(False), []
    plain = lm.lm_head.forward
    lm.lm_head.forward = lambda x: contiguous.append(x.is_contiguous()) or plain(x)
    answers(lm)
    assert len(contiguous) == 12 and all(contiguous)
    assert not lm.lm_head._forward_pre_hooks


def test_the_entry_is_called_in_place_of_generate():
    lm = tiny_llama(**WILD)
    calls = []

    def entry(**arguments):
        calls.append(arguments["synced_gpus"])
        return lm.generate(**arguments)

    assert answers(lm, entry=entry) == answers(lm)
    assert calls == [False]


def test_a_prompt_without_room_is_refused():
    lm = tiny_llama(max_position_embeddings=32)
    assert len(answers(lm, [list(range(5, 25))], max_new_tokens=12)[0]) == 12
    with pytest.raises(
        UserError, match="a prompt of 20 tokens and model.generation.max_new_tokens 13 .* 32 tokens"
    ):
        answers(lm, [list(range(5, 25)), [5]], max_new_tokens=13)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(do_sample=True, temperature=0.0), "temperature is 0.0"),
        (dict(do_sample=True, top_p=1.5), "top_p is 1.5"),
        (dict(do_sample=True, top_k=0), "top_k is 0"),
        (dict(do_sample=True, num_return_sequences=0), "num_return_sequences is 0"),
        (
            dict(temperature=0.7),
            "temperature has no effect on greedy answers; set do_sample to true",
        ),
        (dict(num_return_sequences=2), "num_return_sequences has no effect on greedy answers"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(UserError, match=f"model.generation.{message}"):
        GenerationOptions(**wrong)
