"""The language models of multimodal families, from `fit` to an export of the shape of the source."""

import json

import peft
import pytest
import torch
from models import families
from models.certificate import assert_same, fit, language_model, logits, multimodal, plain
from quantized import read, store_fp8
from running import arguments, chat_rows, final_weights, run, write_rows
from safetensors.torch import load_file, save_file
from terminal import refused
from tiny import save_tiny

from lit_sft.errors import UserError
from lit_sft.model import composite
from lit_sft.model.experts import group_experts
from lit_sft.model.export import AdapterBase, ChatFormat, export_hf
from lit_sft.model.load import load_tokenizer
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.load import load_adapter
from lit_sft.model.lora.lora_config import LoraConfig

CORE = ("Qwen3.5", "Ministral 3")
BOTH = pytest.mark.parametrize("name", CORE)
LORA = {"model__lora": {"r": 4}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(name) -> a checkpoint of that family, and rows."""
    folder = tmp_path_factory.mktemp("families")
    rows = write_rows(folder / "train.jsonl", chat_rows(12))

    def get(name):
        if not (folder / name).exists():
            families.save(name, folder / name)
        return str(folder / name), rows

    return get


@pytest.mark.slow
@BOTH
def test_a_resumed_run(name, place, tmp_path):
    fit(place(name), tmp_path / "whole")
    fit(place(name), tmp_path / "halves", trainer__max_steps=2)
    fit(place(name), tmp_path / "halves", ckpt_path="last")
    whole, halves = final_weights(tmp_path / "whole"), final_weights(tmp_path / "halves", 0)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


WITH_EXPERTS = ("Qwen3.5 MoE", "Llama 4", "GLM-4.5V", "Kimi K2.5")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_an_adapter_on_experts(name, place, tmp_path):
    test_an_adapter(name, place, tmp_path, target_experts=True)


@BOTH
def test_an_adapter(name, place, tmp_path, **options):
    """It acts over the class of the checkpoint, and over the model that it was trained in."""
    source = place(name)[0]
    lm = language_model(source)
    base = logits(lm)
    adapted = apply_lora(lm, LoraConfig(r=4, modules_to_save=["embed_tokens"], **options))
    group_experts(lm)
    changed(adapted)
    expected = logits(adapted.get_base_model())
    chat = ChatFormat(load_tokenizer(source), stop_ids=[0])
    export_hf(
        adapted, chat, tmp_path / "hf", base=AdapterBase(source), source=composite.source_of(lm)
    )
    over_source = peft.PeftModel.from_pretrained(multimodal(source), tmp_path / "hf").eval()
    assert_same(logits(over_source.get_base_model()), expected)
    over_text = load_adapter(language_model(source), str(tmp_path / "hf")).eval()
    assert_same(logits(over_text.get_base_model()), expected)
    assert (expected - base).abs().max() > 0.1
    adapted = [name for name, _ in over_source.named_modules() if name.endswith("lora_A.default")]
    assert any(".experts." in name for name in adapted) == bool(options)
    assert adapted and all(families.is_text(name) for name in adapted)


def changed(model):
    """Other values in place of the start values, which change nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_an_adapter_of_a_tower_is_refused(place, tmp_path):
    """And one of the text class, whose names have another beginning, is taken as it is."""
    source = place("Qwen3.5")[0]
    tower = peft.get_peft_model(
        multimodal(source), peft.LoraConfig(target_modules=["q_proj", "qkv"])
    )
    tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(UserError, match="also adapts model.visual.blocks.0.attn.qkv, which is no"):
        load_adapter(language_model(source), str(tmp_path / "tower"))
    text = changed(peft.get_peft_model(plain(source), peft.LoraConfig(target_modules=["q_proj"])))
    text.save_pretrained(tmp_path / "text")
    ours = load_adapter(language_model(source), str(tmp_path / "text")).eval()
    assert_same(logits(ours.get_base_model()), logits(text.get_base_model()))


def test_a_16_bit_export_and_added_tokens(place, tmp_path):
    """What training changes in the config, and nothing else: rows and dtype."""
    source = families.Path(
        families.save("Mistral Small 3", tmp_path / "model", dtype=torch.bfloat16)
    )
    tokens = [f"<new{number}>" for number in range(30)]
    rows = place("Ministral 3")[1]
    folder = fit((str(source), rows), tmp_path / "runs", model__add_tokens=tokens)
    run(
        "export",
        [
            f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}",
            f"--output_dir={tmp_path / 'half'}",
            "--dtype=bfloat16",
        ],
    )
    before = json.loads((source / "config.json").read_text())
    assert before["dtype"] == "bfloat16" and before["text_config"]["vocab_size"] == 320
    for hf, dtype in ((folder / "hf", "float32"), (tmp_path / "half", "bfloat16")):
        config = json.loads((hf / "config.json").read_text())
        assert config["dtype"] == dtype
        assert config["text_config"]["vocab_size"] == 384
        model = multimodal(hf)
        assert (
            model.dtype == getattr(torch, dtype) and len(model.get_input_embeddings().weight) == 384
        )
    [stored] = families.tensors_of(source).values()
    [exported] = families.tensors_of(folder / "hf").values()
    for name, value in exported.items():
        assert value.dtype == (torch.float32 if families.is_text(name) else torch.bfloat16)
        assert families.is_text(name) or torch.equal(value, stored[name])


def test_a_weight_without_a_place_in_the_source(place, tmp_path):
    source = families.Path(families.save("Ministral 3", tmp_path / "model"))
    lm = language_model(source)
    tensors = load_file(source / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    chat = ChatFormat(load_tokenizer(str(source)), stop_ids=[0])
    with pytest.raises(
        UserError, match="has no weight that became model.language_model.norm.weight"
    ):
        export_hf(lm, chat, tmp_path / "hf", source=source)
    assert not (tmp_path / "hf").exists()


def test_layers_that_are_not_loaded_stay_in_the_export_of_a_text_model(tmp_path):
    """As plain weights, because those of DeepSeek V3 are in FP8, too."""
    source = families.Path(families.save("DeepSeek V3", tmp_path / "model", plain=True))
    expected = store_fp8(source)
    assert read(source)[families.NEXT_LAYER].dtype == torch.float8_e4m3fn
    lm = language_model(source)
    chat = ChatFormat(load_tokenizer(str(source)), stop_ids=[0])
    export_hf(lm, chat, tmp_path / "hf", source=composite.source_with_more(lm))
    exported = read(tmp_path / "hf")
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(exported[name].float(), value.float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen3-VL", "no class for the text of a Qwen3VLForConditionalGeneration"),
        (None, "is a text model already"),
    ],
    ids=str,
)
def test_text_that_has_no_class_of_its_own(name, said, place, tmp_path, capsys):
    model = place(name)[0] if name else save_tiny(tmp_path / "model")
    folder = fit((model, place("Qwen3.5")[1]), tmp_path / "runs")
    ckpt = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    options = [ckpt, f"--output_dir={tmp_path / 'text'}", "--text_only=true"]
    assert said in refused(capsys, "export", options)


@pytest.mark.parametrize("name", ["Qwen3.5", pytest.param("Ministral 3", marks=pytest.mark.slow)])
def test_a_merged_adapter_and_a_checkpoint_are_exported(name, place, tmp_path):
    folder = fit(place(name), tmp_path / "runs", **LORA)
    ckpt = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    adapter = tmp_path / "adapter"
    run("export", [ckpt, f"--output_dir={adapter}"])
    options = {"data__validation": place(name)[1]}
    run("validate", arguments(str(adapter), place(name)[1], tmp_path / "again", **options))
    run("export", [ckpt, f"--output_dir={tmp_path / 'merged'}", "--merge_lora=true"])
    merged = logits(multimodal(tmp_path / "merged"))
    over_text = load_adapter(language_model(place(name)[0]), str(adapter)).eval()
    torch.testing.assert_close(merged, logits(over_text), rtol=0, atol=1e-4)
    text = [ckpt, f"--output_dir={tmp_path / 'text'}", "--text_only=true"]
    run("export", [*text, "--merge_lora=true"])
    assert_same(logits(plain(tmp_path / "text")), merged)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert "text_config" not in config and config["architectures"][0].endswith("ForCausalLM")
    names = load_file(tmp_path / "text" / "model.safetensors")
    assert "model.embed_tokens.weight" in names
    assert all(
        name.startswith(("model.layers", "model.embed", "model.norm", "lm_head")) for name in names
    )
