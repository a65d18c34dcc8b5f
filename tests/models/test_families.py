"""The language models of multimodal families, from `fit` to an export of the shape of the source."""

import json

import pytest
import torch
import transformers
from models import families
from running import arguments, chat_rows, final_weights, run, version, write_rows
from safetensors.torch import load_file
from terminal import log_lines, refused
from tiny import save_tiny

from lit_sft.errors import UserError
from lit_sft.model import composite
from lit_sft.model.load import load_model
from lit_sft.model.lora.load import load_adapter

CORE = ("Qwen3.5", "Ministral 3")
IN_PARTS = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in CORE else pytest.mark.slow) for name in families.FAMILIES],
)  # fmt: skip
BOTH = pytest.mark.parametrize("name", CORE)
LORA = {"model__lora": {"r": 4}}
END_OF_TURN = 2
IDS = torch.arange(5, 29).reshape(2, 12)


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


def fit(place, root, **options):
    """Three steps. Returns the run's folder."""
    settings = {"data__global_batch_size": 4, "trainer__max_steps": 3, **options}
    fast = {"model__optimizer": "torch.optim.SGD", "model__optimizer__lr": 0.5}
    run("fit", arguments(*place, root, trainer__max_epochs=-1, **fast, **settings))
    return version(root)


def language_model(source):
    return load_model(
        str(source), init="pretrained", dtype=torch.float32, attn_implementation="eager", seed=0
    ).eval()


@torch.no_grad()
def logits(model):
    return composite.text_of(model)(input_ids=IDS).logits


def multimodal(folder):
    options = {"dtype": "auto", "attn_implementation": "eager"}
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def plain(folder):
    options = {"dtype": "auto", "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@IN_PARTS
def test_fit_and_export(name, place, tmp_path):
    source = families.Path(place(name)[0])
    with log_lines() as lines:
        folder = fit(place(name), tmp_path / "runs")
    assert sum("not loaded, and kept in exports" in line for line in lines) == 1
    before, after = families.tensors_of(source), families.tensors_of(folder / "hf")
    assert {file: list(found) for file, found in before.items()} == {
        file: list(found) for file, found in after.items()
    }
    for file, tensors in before.items():
        for key, value in tensors.items():
            exported = after[file][key]
            assert exported.dtype == value.dtype
            is_trained = families.is_text(key) and "e_score_correction" not in key
            assert torch.equal(exported, value) != is_trained, key
    for file in ("preprocessor_config.json", "tokenizer.json"):
        assert (folder / "hf" / file).read_bytes() == (source / file).read_bytes()
    config = json.loads((source / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == 0
    config["text_config"]["eos_token_id"] = END_OF_TURN
    assert json.loads((folder / "hf" / "config.json").read_text()) == config
    trained = language_model(source)
    weights = final_weights(tmp_path / "runs")
    trained.load_state_dict({key.removeprefix("model.lm."): v for key, v in weights.items()})
    expected = logits(trained)
    assert_same(logits(multimodal(folder / "hf")), expected)
    if composite.class_names(trained.config)[0]:
        assert_same(logits(plain(folder / "hf")), expected)


@BOTH
def test_a_resumed_run(name, place, tmp_path):
    fit(place(name), tmp_path / "whole")
    fit(place(name), tmp_path / "halves", trainer__max_steps=2)
    fit(place(name), tmp_path / "halves", ckpt_path="last")
    whole, halves = final_weights(tmp_path / "whole"), final_weights(tmp_path / "halves", 0)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


@IN_PARTS
def test_an_adapter(name, place, tmp_path):
    """It acts over the class of the checkpoint, and over the model that it was trained in."""
    from peft import PeftModel

    source = place(name)[0]
    folder = fit(place(name), tmp_path / "runs", **LORA) / "hf"
    over_source = PeftModel.from_pretrained(multimodal(source), folder).eval().get_base_model()
    over_text = load_adapter(language_model(source), str(folder)).eval()
    expected = logits(over_text)
    assert_same(logits(over_source), expected)
    assert (expected - logits(language_model(source))).abs().max() > 1e-3
    adapted = [name for name, _ in over_source.named_modules() if name.endswith("lora_A.default")]
    assert adapted and all(families.is_text(name) for name in adapted)
    run("validate", arguments(str(folder), place(name)[1], tmp_path / "again", data__validation=place(name)[1]))


@BOTH
def test_a_merged_adapter_and_a_checkpoint_are_exported(name, place, tmp_path):
    folder = fit(place(name), tmp_path / "runs", **LORA)
    ckpt = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    run("export", [ckpt, f"--output_dir={tmp_path / 'adapter'}"])
    run("export", [ckpt, f"--output_dir={tmp_path / 'merged'}", "--merge_lora=true"])
    merged = logits(multimodal(tmp_path / "merged"))
    over_text = load_adapter(language_model(place(name)[0]), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(merged, logits(over_text), rtol=0, atol=1e-4)
    text = [ckpt, f"--output_dir={tmp_path / 'text'}", "--text_only=true"]
    run("export", [*text, "--merge_lora=true"])
    assert_same(logits(plain(tmp_path / "text")), merged)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert "text_config" not in config and config["architectures"][0].endswith("ForCausalLM")
    names = load_file(tmp_path / "text" / "model.safetensors")
    assert "model.embed_tokens.weight" in names
    assert all(name.startswith(("model.layers", "model.embed", "model.norm", "lm_head")) for name in names)
