"""model/export.py: what is written is what was trained, and plain transformers and peft load it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from terminal import log_lines
from tiny import CHATML, save_tiny, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer

from lit_sft.errors import UserError
from lit_sft.model.attention import packed
from lit_sft.model.export import AdapterBase, ChatFormat, export_hf
from lit_sft.model.generate import stop_token_ids
from lit_sft.model.load import load_model, load_tokenizer, read_generation_config
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.load import load_adapter
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.lora.merge import merge
from lit_sft.model.new_tokens import add_tokens
from lit_sft.model.tokenizer_files import TokenizerChanges, write_tokenizer
from lit_sft.model.verify_export import verify_export

PROBES = [[5, 6, 7, 8], [100, 90, 80]]
IDS = torch.arange(5, 29).reshape(2, 12)


CHAT = ("turn_end_ids", "source", "added_tokens")


def export(model, path, *, tokenizer=None, stop_ids=(0, 2), chat_template=None, **options):
    more = {name: options.pop(name) for name in CHAT if name in options}
    chat = ChatFormat(tokenizer or tiny_tokenizer(), stop_ids, chat_template, **more)
    export_hf(model, chat, path, **options)


def plain(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def shake(model, seed=0):
    """Moves every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def stored_names(directory: Path, name: str = "model.safetensors") -> set[str]:
    from safetensors import safe_open

    with safe_open(directory / name, framework="pt") as file:
        return set(file.keys())


def read(directory: Path, name: str) -> dict:
    return json.loads((directory / name).read_text())


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3, tiny_gpt2])
def test_plain_transformers_loads_equal_logits(tmp_path, build, dtype):
    model = build().to(dtype).train()
    model.config.use_cache = False
    export(model, tmp_path / "hf")
    assert model.training and model.config.use_cache is False
    reloaded = plain(tmp_path / "hf")
    assert reloaded.dtype == dtype
    assert all(
        torch.equal(value, reloaded.state_dict()[name])
        for name, value in model.state_dict().items()
    )
    if dtype == torch.float32:  # `.to` above has also rounded the rotary buffers of the original
        assert torch.equal(logits(reloaded), logits(model))
    config = read(tmp_path / "hf", "config.json")
    assert config["use_cache"] is True and config["dtype"] == str(dtype).removeprefix("torch.")
    verify_export(tmp_path / "hf", model, tiny_tokenizer(), PROBES)


@pytest.mark.parametrize("gathered", [False, True])
def test_tied_weights_stay_tied_and_are_stored_once(tmp_path, gathered):
    model = tiny_qwen3()
    # Gathering from shards makes a copy of each name, also of two names of one weight.
    state = (
        {name: value.clone() for name, value in model.state_dict().items()} if gathered else None
    )
    export(model, tmp_path / "hf", state_dict=state)
    assert "lm_head.weight" not in stored_names(tmp_path / "hf")
    reloaded = plain(tmp_path / "hf")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert torch.equal(logits(reloaded), logits(model))


def test_untied_heads_are_stored(tmp_path):
    export(tiny_llama(), tmp_path / "hf")
    assert "lm_head.weight" in stored_names(tmp_path / "hf")


def test_the_given_state_is_what_is_written(tmp_path):
    model, trained = tiny_llama(seed=0), tiny_llama(seed=1)
    export(model, tmp_path / "hf", state_dict=trained.state_dict())
    assert torch.equal(logits(plain(tmp_path / "hf")), logits(trained))


def test_weights_can_be_written_in_another_type(tmp_path):
    model = tiny_llama()
    export(model, tmp_path / "hf", dtype=torch.bfloat16)
    assert plain(tmp_path / "hf").dtype == torch.bfloat16
    assert model.dtype == torch.float32
    verify_export(tmp_path / "hf", model, tiny_tokenizer(), PROBES)


def test_our_own_attention_leaves_no_trace(tmp_path):
    source = save_tiny(tmp_path / "base", tiny_llama())
    packed.register()
    model = load_model(
        source, init="pretrained", dtype=torch.float32, attn_implementation=packed.PACKED, seed=0
    )
    export(model, tmp_path / "hf")
    assert packed.PACKED not in (tmp_path / "hf" / "config.json").read_text()
    verify_export(tmp_path / "hf", model, tiny_tokenizer(), PROBES)


def test_everybody_may_read_what_the_umask_allows(tmp_path):
    export(tiny_llama(), tmp_path / "hf")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "hf").iterdir()}
    assert len(modes) == 1


# ------------------------------------------------------------------ tokenizer,
# template, stopping


def test_the_template_of_the_training_is_exported(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=None)
    template = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    export(tiny_llama(), tmp_path / "hf", tokenizer=tokenizer, chat_template=template)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == template
    messages = [{"role": "user", "content": "Hello"}]
    reloaded = load_tokenizer(str(tmp_path / "hf"))
    assert reloaded.apply_chat_template(messages, tokenize=False) == "Hello<|im_end|>"
    assert tokenizer.chat_template is None, "the caller's tokenizer was changed"


def test_without_a_template_the_tokenizer_keeps_its_own(tmp_path):
    export(tiny_llama(), tmp_path / "hf")
    assert load_tokenizer(str(tmp_path / "hf")).chat_template == tiny_tokenizer().chat_template


def says(model, token_id):
    """Makes the model answer with one token, whatever it is asked."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[token_id] = 50 * model.model.norm.weight
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def test_plain_transformers_stops_at_the_end_of_turn_of_the_template(tmp_path):
    """The base's eos is <|endoftext|>, the template's end of turn is <|im_end|>, as in
    Qwen3-Base.
    """
    model, tokenizer = says(tiny_llama(), 2), tiny_tokenizer()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    prompt = torch.tensor([[5, 6, 7]])
    assert model.generate(prompt, max_new_tokens=5, do_sample=False).shape[1] == 3 + 5
    stop_ids = stop_token_ids(
        tokenizer, model.generation_config, [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    )
    export(model, tmp_path / "hf", stop_ids=stop_ids)
    assert plain(tmp_path / "hf").generate(prompt, max_new_tokens=5)[0].tolist() == [5, 6, 7, 2]
    saved = read(tmp_path / "hf", "generation_config.json")
    assert saved["eos_token_id"] == [0, 2] and saved["pad_token_id"] == 0
    # transformers 4 replaces a config with this mark by one that stops at one token.
    assert not saved.get("_from_model_config")
    assert model.generation_config.eos_token_id == 0, "the caller's model was changed"


def saved_tokenizer(path, template=CHATML, **config):
    """A directory with the tiny tokenizer in the files of transformers 4, as most models have."""
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    settings = {
        "added_tokens_decoder": {
            "2": {
                "content": "<|im_end|>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": template,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    (path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    (path / "vocab.json").write_text("{}")
    return load_tokenizer(str(path))


def test_the_files_of_the_tokenizer_are_copied(tmp_path):
    tokenizer = saved_tokenizer(tmp_path)
    export(
        tiny_llama(),
        tmp_path / "hf",
        tokenizer=tokenizer,
        source=tmp_path,
        chat_template=tokenizer.chat_template,
    )
    for file in tmp_path.iterdir():
        if file.is_file():
            assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()


def test_the_token_that_ends_every_turn_is_the_eos_token(tmp_path, caplog):
    """So `generate(eos_token_id=tokenizer.eos_token_id)` stops there. The old one stops, too."""
    tokenizer = saved_tokenizer(tmp_path)
    caplog.set_level("INFO", logger="lit_sft")
    with log_lines() as lines:
        export(
            tiny_llama(), tmp_path / "hf", tokenizer=tokenizer, source=tmp_path, turn_end_ids=[2]
        )
    assert load_tokenizer(str(tmp_path / "hf")).eos_token_id == 2
    assert read(tmp_path / "hf", "config.json")["eos_token_id"] == 2
    assert read(tmp_path / "hf", "generation_config.json")["eos_token_id"] == [2, 0]
    assert read(tmp_path / "hf", "special_tokens_map.json")["eos_token"] == "<|im_end|>"
    before = read(tmp_path, "tokenizer_config.json")
    after = read(tmp_path / "hf", "tokenizer_config.json")
    assert after == {**before, "eos_token": "<|im_end|>"}
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (
        tmp_path / "tokenizer.json"
    ).read_bytes()
    assert lines == [
        "the eos token of the export is <|im_end|>, which ends every trained turn;"
        " generation_config.json also stops at <|endoftext|>"
    ]


@pytest.mark.parametrize(
    ("turn_end_ids", "template"),
    [([0, 2], CHATML), ([], CHATML), ([2], CHATML + "{{ eos_token }}")],
    ids=["several ends", "no turn", "the template writes eos"],
)
def test_the_eos_token_stays(tmp_path, turn_end_ids, template):
    tokenizer = saved_tokenizer(tmp_path, template)
    export(
        tiny_llama(),
        tmp_path / "hf",
        tokenizer=tokenizer,
        source=tmp_path,
        turn_end_ids=turn_end_ids,
    )
    assert load_tokenizer(str(tmp_path / "hf")).eos_token_id == 0
    assert read(tmp_path / "hf", "config.json")["eos_token_id"] == 0
    assert read(tmp_path / "hf", "generation_config.json")["eos_token_id"] == [0, 2]


def test_another_template_replaces_the_one_in_the_config(tmp_path):
    tokenizer = saved_tokenizer(tmp_path)
    template = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    export(
        tiny_llama(),
        tmp_path / "hf",
        tokenizer=tokenizer,
        source=tmp_path,
        chat_template=template,
    )
    assert read(tmp_path / "hf", "tokenizer_config.json")["chat_template"] == template
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == template


def named_templates(path, in_config):
    """A tokenizer with the templates `default` and `tool_use`, in its config or in files."""
    names = {"default": CHATML, "tool_use": CHATML + "{{ tools }}"}
    if in_config:
        listed = [{"name": name, "template": text} for name, text in names.items()]
        return saved_tokenizer(path, chat_template=listed)
    saved_tokenizer(path)
    config = read(path, "tokenizer_config.json")
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(names["default"])
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text(names["tool_use"])
    return load_tokenizer(str(path))


@pytest.mark.parametrize("in_config", [True, False])
def test_named_templates_are_those_of_the_source(tmp_path, in_config):
    """Another template stands alone: `tool_use` would be taken for prompts with tools."""
    tokenizer = named_templates(tmp_path, in_config)
    own = dict(tokenizer.chat_template)
    assert set(own) == {"default", "tool_use"}
    options = {"tokenizer": tokenizer, "source": tmp_path}
    export(tiny_llama(), tmp_path / "own", chat_template=CHATML, **options)
    assert load_tokenizer(str(tmp_path / "own")).chat_template == own
    other = CHATML.replace("assistant", "model")
    export(tiny_llama(), tmp_path / "other", chat_template=other, **options)
    assert load_tokenizer(str(tmp_path / "other")).chat_template == other


def test_the_template_of_a_processor(tmp_path):
    """Older multimodal checkpoints have no other; a text model needs it beside its tokenizer."""
    saved_tokenizer(tmp_path)
    config = read(tmp_path, "tokenizer_config.json")
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.chat_template == CHATML
    export(
        tiny_llama(), tmp_path / "hf", tokenizer=tokenizer, source=tmp_path, chat_template=CHATML
    )
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == CHATML
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(UserError, match=r"chat_template\.json holds no chat template"):
        load_tokenizer(str(tmp_path))


def test_another_template_replaces_that_of_a_processor(tmp_path):
    """transformers reads the file of a processor before `chat_template.jinja`."""
    tokenizer = saved_tokenizer(tmp_path)
    copied = tmp_path / "hf"
    copied.mkdir()
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    other = CHATML.replace("assistant", "model")
    write_tokenizer(tokenizer, tmp_path, TokenizerChanges(chat_template=other), copied)
    assert read(copied, "chat_template.json")["chat_template"] == other


@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
def test_every_kind_of_export_has_the_files_of_its_source(tmp_path, kind):
    """Tokenizer files of every format as they are, and the settings of sampling with unknown keys."""
    source = Path(save_tiny(tmp_path / "source"))
    saved_tokenizer(source)
    files = ("tokenizer.model", "merges.txt", "added_tokens.json", "spiece.model", "qwen.tiktoken")
    for name in files:
        (source / name).write_text("{}")
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    asked = {**settings, "eos_token_id": [2, 0], "pad_token_id": 0, "of_a_server": {"key": [1]}}
    (source / "generation_config.json").write_text(json.dumps(asked))
    tokenizer = load_tokenizer(str(source))
    model = load_model(
        str(source), init="pretrained", dtype=torch.float32, attn_implementation="sdpa", seed=0
    )
    read_generation_config(model, str(source))
    base = None
    if kind != "full":
        model = apply_lora(model, LoraConfig(r=2))
        base = AdapterBase(str(source))
    if kind == "merged":
        model, base = merge(model), None
    export(
        model,
        tmp_path / "hf",
        base=base,
        tokenizer=tokenizer,
        source=source,
        chat_template=tokenizer.chat_template,
    )
    for name in (*files, "tokenizer.json", "tokenizer_config.json", "vocab.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes(), name
    saved = read(tmp_path / "hf", "generation_config.json")
    assert {**saved, **asked, "eos_token_id": [0, 2]} == saved


def test_added_tokens_are_in_the_copied_files(tmp_path):
    tokenizer = saved_tokenizer(tmp_path)
    [new] = add_tokens(tokenizer, ["<answer>"])
    export(
        tiny_llama(),
        tmp_path / "hf",
        tokenizer=tokenizer,
        source=tmp_path,
        added_tokens=["<answer>"],
    )
    reloaded = load_tokenizer(str(tmp_path / "hf"))
    text = "a <answer>b<|im_end|>"
    assert new in reloaded(text).input_ids
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    listed = read(tmp_path / "hf", "tokenizer_config.json")["added_tokens_decoder"]
    assert listed[str(new)]["content"] == "<answer>" and not listed[str(new)]["special"]


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}


def test_the_config_has_the_keys_of_older_versions(tmp_path):
    """transformers 4 ignores `rope_parameters`, and would compute with the base 10,000."""
    export(tiny_llama(rope_parameters=dict(ROPE)), tmp_path / "hf", dtype=torch.bfloat16)
    config = read(tmp_path / "hf", "config.json")
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert plain(tmp_path / "hf").config.rope_parameters == ROPE


def test_older_keys_are_those_of_the_source(tmp_path):
    source = save_tiny(tmp_path / "base", tiny_llama(rope_parameters=dict(ROPE)))
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    older = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    file.write_text(json.dumps({**config, **older, "torch_dtype": "float32"}))
    model = load_model(
        source, init="pretrained", dtype=torch.float32, attn_implementation="sdpa", seed=0
    )
    export(model, tmp_path / "hf")
    saved = read(tmp_path / "hf", "config.json")
    assert {name: saved[name] for name in older} == older
    assert torch.equal(logits(plain(tmp_path / "hf")), logits(model))


def test_a_greedy_generation_config_with_sampling_options_is_mended(tmp_path):
    model = tiny_llama()
    model.generation_config.update(temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    export(model, tmp_path / "hf", stop_ids=[2])
    saved = read(tmp_path / "hf", "generation_config.json")
    assert "temperature" not in saved and "top_p" not in saved
    assert saved["repetition_penalty"] == 1.1 and saved["eos_token_id"] == 2


def test_a_sampling_generation_config_is_kept(tmp_path):
    model = tiny_llama()
    model.generation_config.update(do_sample=True, temperature=0.6)
    export(model, tmp_path / "hf")
    assert read(tmp_path / "hf", "generation_config.json")["temperature"] == 0.6


# -------------------------------------------------------------------------------------------------
# replacing, errors


def test_an_earlier_export_is_replaced_whole(tmp_path):
    export(tiny_llama(seed=0), tmp_path / "hf")
    (tmp_path / "hf" / "stale.txt").write_text("from the first run")
    export(tiny_llama(seed=1), tmp_path / "hf")
    assert torch.equal(logits(plain(tmp_path / "hf")), logits(tiny_llama(seed=1)))
    assert not (tmp_path / "hf" / "stale.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    export(tiny_llama(), tmp_path / "hf")
    before = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    tokenizer = tiny_tokenizer()

    def fail(self, directory):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        export(tiny_llama(seed=1), tmp_path / "hf", tokenizer=tokenizer)
    assert {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_other_peoples_files_and_the_base_are_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no model directory, so it is not replaced"):
        export(tiny_llama(), tmp_path)
    with pytest.raises(UserError, match="is no model directory, so it is not replaced"):
        export(tiny_llama(), tmp_path / "thesis.tex")
    source = save_tiny(tmp_path / "hf" / "base")
    model = load_model(
        source, init="pretrained", dtype=torch.float32, attn_implementation="sdpa", seed=0
    )
    for target in ("hf", "hf/base"):
        with pytest.raises(UserError, match="which holds the base model: set another output_dir"):
            export(model, tmp_path / target)
    assert (tmp_path / "thesis.tex").exists() and (
        tmp_path / "hf" / "base" / "config.json"
    ).exists()


def test_verification_notices_a_difference(tmp_path):
    export(tiny_llama(seed=0), tmp_path / "hf")
    with pytest.raises(UserError, match="the logits of the export .* are off"):
        verify_export(tmp_path / "hf", tiny_llama(seed=1), tiny_tokenizer(), PROBES)
    with pytest.raises(UserError, match="the tokenizer of the export"):
        verify_export(tmp_path / "hf", tiny_llama(seed=0), tiny_tokenizer(bos_token="<s>"), PROBES)
    config = read(tmp_path / "hf", "generation_config.json")
    (tmp_path / "hf" / "generation_config.json").write_text(
        json.dumps(config | {"suppress_tokens": list(range(200))})
    )
    with pytest.raises(UserError, match="the answers of the export"):
        verify_export(tmp_path / "hf", tiny_llama(seed=0), tiny_tokenizer(), PROBES)


def test_verification_disturbs_neither_the_model_nor_the_random_state(tmp_path):
    model = shake(apply_lora(tiny_llama(), LoraConfig()))
    export(model, tmp_path / "hf")
    model.train()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    verify_export(tmp_path / "hf", model, tiny_tokenizer(), PROBES)
    assert torch.equal(torch.rand(2), expected)
    assert all(module.training for module in model.modules())


# ------------------------------------------------------------------ adapters


def reload_adapter(path):
    """As a user of peft would."""
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(path)


def test_an_adapter_over_an_existing_base(tmp_path):
    source = save_tiny(tmp_path / "base", tiny_llama())
    base = load_model(
        source, init="pretrained", dtype=torch.float32, attn_implementation="sdpa", seed=0
    )
    model = shake(apply_lora(base, LoraConfig(r=2)))
    export(model, tmp_path / "hf", base=AdapterBase(source))
    assert read(tmp_path / "hf", "adapter_config.json")["base_model_name_or_path"] == source
    assert all(
        "lora_" in name for name in stored_names(tmp_path / "hf", "adapter_model.safetensors")
    )
    assert (
        not (tmp_path / "hf" / "base").exists()
        and not (tmp_path / "hf" / "model.safetensors").exists()
    )
    assert read(tmp_path / "hf", "generation_config.json")["eos_token_id"] == [0, 2]
    assert load_tokenizer(str(tmp_path / "hf")).chat_template
    assert torch.equal(logits(reload_adapter(tmp_path / "hf")), logits(model))
    verify_export(tmp_path / "hf", model, tiny_tokenizer(), PROBES)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
@pytest.mark.parametrize(
    "variant",
    [
        dict(),
        dict(use_dora=True),
        dict(modules_to_save=["lm_head"]),
        dict(init_lora_weights="pissa"),
    ],
    ids=str,
)
def test_a_base_made_here_is_saved_with_the_adapter(tmp_path, build, variant):
    model = shake(apply_lora(build(), LoraConfig(**variant)))
    export(model, tmp_path / "hf")
    assert read(tmp_path / "hf", "adapter_config.json")["base_model_name_or_path"] == str(
        tmp_path / "hf" / "base"
    )
    if "init_lora_weights" not in variant:  # which takes its start values out of the base
        assert torch.equal(logits(plain(tmp_path / "hf" / "base")), logits(build()))
    assert torch.allclose(logits(reload_adapter(tmp_path / "hf")), logits(model), rtol=0, atol=1e-5)
    verify_export(tmp_path / "hf", model, tiny_tokenizer(), PROBES)
    assert load_tokenizer(str(tmp_path / "hf" / "base")).chat_template


def test_start_values_that_change_the_base_bring_it_along(tmp_path):
    """Otherwise the adapter would lie over the unchanged base, or the change would have to be
    computed anew.
    """
    source = save_tiny(tmp_path / "base", tiny_llama())
    base = load_model(
        source, init="pretrained", dtype=torch.float32, attn_implementation="sdpa", seed=0
    )
    model = shake(apply_lora(base, LoraConfig(init_lora_weights="pissa_niter_4")))
    export(model, tmp_path / "hf", base=AdapterBase(source))
    assert torch.allclose(logits(reload_adapter(tmp_path / "hf")), logits(model), rtol=0, atol=1e-5)


def test_gathered_tensors_of_an_adapter(tmp_path):
    model = shake(apply_lora(tiny_qwen3(), LoraConfig(modules_to_save=["embed_tokens"])))
    state = {name: value.clone() for name, value in model.get_base_model().state_dict().items()}
    export(
        apply_lora(tiny_qwen3(), LoraConfig(modules_to_save=["embed_tokens"])),
        tmp_path / "hf",
        state_dict=state,
    )
    assert torch.equal(logits(reload_adapter(tmp_path / "hf")), logits(model))
    assert torch.equal(logits(plain(tmp_path / "hf" / "base")), logits(tiny_qwen3()))


def test_fp32_adapters_over_a_bf16_base(tmp_path):
    model = shake(apply_lora(tiny_llama().to(torch.bfloat16), LoraConfig()))
    export(model, tmp_path / "hf")
    assert plain(tmp_path / "hf" / "base").dtype == torch.bfloat16
    verify_export(tmp_path / "hf", model, tiny_tokenizer(), PROBES)


def test_an_exported_adapter_merges_to_the_model_it_was(tmp_path):
    model = shake(apply_lora(tiny_qwen3(), LoraConfig()))
    expected = logits(model)
    export(model, tmp_path / "hf")
    merged = merge(
        load_adapter(plain(tmp_path / "hf" / "base"), str(tmp_path / "hf")), probe_ids=IDS
    )
    export(merged, tmp_path / "merged")
    assert torch.allclose(
        logits(plain(tmp_path / "merged")),
        expected,
        rtol=0,
        atol=1e-5 * expected.abs().max().item(),
    )
    assert "lm_head.weight" not in stored_names(tmp_path / "merged")
