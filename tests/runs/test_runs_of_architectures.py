"""Architectures that are not a plain Llama, from `fit` to an export that is compared: windows,
caps, sinks, experts, state spaces, a vision tower beside the text, code that comes with the model.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from running import arguments, chat_rows, run, version, write_rows
from terminal import log_lines, refused
from tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer

from lit_sft.cli import main as main_module
from lit_sft.model import trainable
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.lora_config import LoraConfig

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}


def gemma3():
    text = transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=16, query_pre_attn_scalar=8
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    tokens = {
        "image_token_index": 319,
        "boi_token_index": 318,
        "eoi_token_index": 317,
        "mm_tokens_per_image": 4,
    }
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    )


def of(name, **more):
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config)


MODELS = {
    "caps and windows": lambda: of(
        "Gemma2", head_dim=8, sliding_window=16, query_pre_attn_scalar=8
    ),
    "a vision tower": gemma3,
    "windows": lambda: of("Mistral", sliding_window=16),
    "sinks": lambda: of("GptOss", num_local_experts=4, sliding_window=16, **EXPERTS),
    "experts": lambda: of("Qwen3Moe", num_experts=4, moe_intermediate_size=16, **EXPERTS),
    "biases": lambda: of("Qwen2", tie_word_embeddings=True),
    "short convolutions in packed rows": lambda: of("Lfm2", layer_types=["conv", "full_attention"]),
    "a state space": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=320,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            bos_token_id=None,
            eos_token_id=0,
        )
    ),
}
LORA = {"model__lora": {"r": 4}}
ON_EXPERTS = {"model__lora": {"r": 4, "target_experts": True}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(name) -> a directory with that model."""
    folder = tmp_path_factory.mktemp("architectures")

    def get(name):
        if not (folder / name).exists():
            torch.manual_seed(0)
            save_tiny(folder / name, MODELS[name](), tiny_tokenizer())
        return str(folder / name), write_rows(folder / "train.jsonl", chat_rows(16))

    return get


def trained(place, name, root, **options):
    run(
        "fit",
        arguments(
            *place(name), root, data__global_batch_size=4, data__questions=["abc"], **options
        ),
    )
    return version(root)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in MODELS]
    + [(name, LORA) for name in ("caps and windows", "a vision tower", "experts", "biases")]
    + [(name, ON_EXPERTS) for name in ("experts", "sinks")],
    ids=str,
)
def test_fit_and_export(name, options, place, tmp_path):
    folder = trained(place, name, tmp_path / "runs", trainer__precision="bf16-mixed", **options)
    merge = ["--merge_lora=true"] if options else []
    run(
        "export",
        [
            f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}",
            f"--output_dir={tmp_path / 'out'}",
            *merge,
        ],
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (
        folder / "hf" / ("adapter_model.safetensors" if options else "model.safetensors")
    ).is_file()


def test_a_doctor_for_a_state_space(place, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run("doctor", [*arguments(*place("a state space"), tmp_path / "runs"), "--output=json"])
    assert end.value.code == 0 and json.loads(capsys.readouterr().out)["errors"] == []


@pytest.mark.parametrize("name", ["a vision tower", "experts"])
def test_all_linear_is_what_text_passes_through(name):
    """Neither experts, which are no linear layers, nor a tower that no gradient reaches."""
    model = apply_lora(MODELS[name](), LoraConfig(r=2))
    adapted = [n for n, _ in model.named_modules() if n.endswith("lora_A.default")]
    assert adapted and not any("vision" in n or "experts" in n or ".gate." in n for n in adapted)
    attention = [n for n in adapted if "q_proj" in n]
    assert len(attention) == 2


def test_a_tower_is_not_trained():
    model = gemma3()
    trainable.freeze_unused(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all("vision" in name or "projector" in name for name in frozen)
    plain = tiny_llama()
    trainable.freeze_unused(plain)
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("strategy", ["auto", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, LORA], ids=str)
def test_bf16_true_casts_weights_and_nothing_else(strategy, options, tmp_path, monkeypatch):
    """What was trained, and what plain transformers loads, have the same rotary frequencies;
    adapters stay in fp32.
    """
    model = save_tiny(tmp_path / "model", tiny_llama(max_position_embeddings=4096))
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(8))
    settings = {"trainer__precision": "bf16-true", "trainer__strategy": strategy, **options}
    see, make = SeeTypes(), main_module.run_callbacks
    monkeypatch.setattr(main_module, "run_callbacks", lambda *given: [*make(*given), see])
    run("fit", arguments(model, rows, tmp_path / "runs", data__global_batch_size=4, **settings))
    assert see.buffers == {torch.float32}
    if options:
        assert (see.trained, see.frozen) == ({torch.float32}, {torch.bfloat16})
    else:
        assert (see.trained, see.frozen) == ({torch.bfloat16}, set())
    assert (version(tmp_path / "runs") / "hf").is_dir()


class SeeTypes(Callback):
    """Keeps the types of buffers and parameters; a shard has the type that it is stored in."""

    def on_train_end(self, trainer, pl_module):
        self.buffers = {buffer.dtype for buffer in pl_module.buffers()}
        self.trained, self.frozen = set(), set()
        for parameter in pl_module.parameters():
            kinds = self.trained if parameter.requires_grad else self.frozen
            kinds.add(getattr(parameter, "_local_tensor", parameter).dtype)


def test_one_device_may_be_sharded(place, tmp_path):
    folder = trained(place, "biases", tmp_path / "runs", trainer__strategy="fsdp2")
    assert transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").num_parameters() > 0


def test_learned_positions_end(tmp_path, capsys):
    """A row beyond them is one line for `fit` and `doctor`; rotary positions go on, with a
    warning.
    """
    long = {
        "messages": [
            {"role": "user", "content": "abc"},
            {"role": "assistant", "content": "xyz " * 120},
        ]
    }
    rows = write_rows(tmp_path / "train.jsonl", [*chat_rows(4), long])
    model = save_tiny(tmp_path / "gpt2", tiny_gpt2())
    args = arguments(model, rows, tmp_path / "runs", data__max_length=1024)
    line = refused(capsys, "fit", args)
    assert (
        "data.max_length: the longest example has" in line
        and "learned positions for 256 only" in line
    )
    with log_lines(), pytest.raises(SystemExit) as end:
        run("doctor", [*args, "--output=json"])
    assert end.value.code == 1
    assert "learned positions for 256 only" in json.loads(capsys.readouterr().out)["errors"][0]
    llama = save_tiny(tmp_path / "llama", tiny_llama())
    with log_lines() as lines:
        run("fit", arguments(llama, rows, tmp_path / "runs", data__max_length=1024))
    assert any("the model was made for 256" in line for line in lines)


def test_attention_of_another_kind_is_taken_as_it_is(tmp_path):
    """It may compute in 16 bits only: what is compared at the start does not run through it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen = []

    def half_only(module, query, key, value, attention_mask, **kwargs):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        assert torch.is_autocast_enabled("cpu"), "called outside of training"
        seen.append(query.dtype)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("half_only", half_only)
    AttentionMaskInterface.register("half_only", sdpa_mask)
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(8))
    settings = {"trainer__precision": "bf16-mixed", "model__attn_implementation": "half_only"}
    run("fit", arguments(model, rows, tmp_path / "runs", data__global_batch_size=4, **settings))
    assert set(seen) == {torch.bfloat16}


def test_code_that_comes_with_the_model(tmp_path):
    """Agreed to once, it may run in the comparison of the export too."""
    model = Path(save_tiny(tmp_path / "model"))
    (model / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type ="
        " 'ownllama'\n"
    )
    (model / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "ownllama", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (model / "config.json").write_text(json.dumps(config))
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(8))
    settings = {"data__global_batch_size": 4, "model__trust_remote_code": True}
    run("fit", arguments(str(model), rows, tmp_path / "runs", **settings))
    ckpt = version(tmp_path / "runs") / "checkpoints" / "last.ckpt"
    run("export", [f"--ckpt_path={ckpt}", f"--output_dir={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "modeling_own.py").is_file()


def test_a_home_directory_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny(tmp_path / "model")
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(8))
    run("fit", arguments("~/model", rows, tmp_path / "runs", data__global_batch_size=4, **LORA))
    ckpt = version(tmp_path / "runs") / "checkpoints" / "last.ckpt"
    run("export", [f"--ckpt_path={ckpt}", f"--output_dir={tmp_path / 'out'}"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
