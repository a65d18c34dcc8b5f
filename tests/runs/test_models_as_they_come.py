"""Models as they come: tokens without a row, weights that are quantized already, routers."""

import json

import pytest
import torch
import transformers
from quantized import FP8, save_fp8, save_mxfp4
from running import arguments, chat_rows, run, version, write_rows
from safetensors import safe_open
from terminal import log_lines, refused
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from lit_sft.model import load

EXPERTS = dict(
    vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, bos_token_id=None, eos_token_id=0,
)  # fmt: skip


def rows_with(tmp_path, answer):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": answer}]
    return write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 4)


def model_with(tmp_path, **special):
    """A model with as many rows as the tokenizer had before it got another token."""
    tokenizer = tiny_tokenizer()
    lm = tiny_llama(len(tokenizer))
    if special:
        tokenizer.add_special_tokens(special)
    else:
        tokenizer.add_tokens(["<answer>"])
    return save_tiny(tmp_path / "model", lm, tokenizer)


def test_a_token_without_a_row(tmp_path, capsys):
    place = model_with(tmp_path), rows_with(tmp_path, "<answer>2")
    line = refused(capsys, "fit", arguments(*place, tmp_path / "runs"))
    assert "the token '<answer>' has the id" in line and "model.add_tokens" in line
    with pytest.raises(SystemExit) as end:
        run("doctor", [*arguments(*place, tmp_path / "runs"), "--output=json"])
    assert end.value.code == 1
    [error] = json.loads(capsys.readouterr().out)["errors"]
    assert error == line


def test_the_remedy_gives_it_a_row(tmp_path):
    place = model_with(tmp_path), rows_with(tmp_path, "<answer>2")
    run("fit", arguments(*place, tmp_path / "runs", model__add_tokens=["<answer>"]))
    exported = version(tmp_path / "runs") / "hf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    config = transformers.AutoConfig.from_pretrained(exported)
    assert config.vocab_size > tokenizer.convert_tokens_to_ids("<answer>")


def test_a_token_without_a_row_in_a_question(tmp_path, capsys):
    place = model_with(tmp_path), rows_with(tmp_path, "2")
    line = refused(
        capsys, "fit", arguments(*place, tmp_path / "runs", data__questions=["<answer>"])
    )
    assert "the token '<answer>' has the id" in line


def test_a_pad_token_without_a_row(tmp_path, caplog):
    place = model_with(tmp_path, pad_token="[PAD]"), rows_with(tmp_path, "2")
    questions = ["Hi", "What is 1+1?"]
    run("fit", arguments(*place, tmp_path / "runs", data__questions=questions))
    assert "the pad token '[PAD]' has no row" in caplog.text


def refused_method(tmp_path, capsys, method, quantization):
    place = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(4))
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(config))
    options = {"model__lora": {"r": 2}, "model__quantization": quantization}
    return refused(capsys, "fit", arguments(*place, tmp_path / "runs", **options))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_weights_that_are_not_dequantized(method, quantization, tmp_path, capsys):
    line = refused_method(tmp_path, capsys, method, quantization)
    assert f"quantized ({method})" in line and "in bf16" in line and "nf4" not in line


def quantized_model(folder, method):
    """A model in FP8, whose last blocks are not whole, or in MXFP4; with the tiny tokenizer."""
    if method == "fp8":
        save_fp8(folder, "Qwen3", **FP8["Qwen3"])
    else:
        save_mxfp4(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "v_proj"]}])
@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_dequantized_weights_are_trained(method, lora, tmp_path):
    model = quantized_model(tmp_path / "model", method)
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(8))
    options = {"trainer__max_steps": 3, "model__lora": lora, "data__global_batch_size": 2}
    export = ["--dtype=bfloat16"]
    if lora is not None:
        # The frozen base is stored in bf16, and the merged model keeps that.
        options["trainer__precision"] = "bf16-mixed"
        export = ["--merge_lora=true"]
    run("fit", arguments(model, rows, tmp_path / "runs", **options))
    checkpoint = version(tmp_path / "runs") / "checkpoints" / "last.ckpt"
    exported = tmp_path / "exported"
    run("export", [f"--ckpt_path={checkpoint}", f"--output_dir={exported}", *export])
    config = json.loads((exported / "config.json").read_text())
    assert "quantization_config" not in config
    lm = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert {weight.dtype for weight in lm.parameters()} == {torch.bfloat16}
    with safe_open(exported / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert not any("scale" in name or "blocks" in name for name in names)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_adapters_over_dequantized_weights(quantization, tmp_path):
    """The export is compared with the model, over the base in its files."""
    model = quantized_model(tmp_path / "model", "fp8")
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(8))
    options = {"model__lora": {"r": 2}, "model__quantization": quantization}
    run("fit", arguments(model, rows, tmp_path / "runs", **options))
    checkpoint = version(tmp_path / "runs") / "checkpoints" / "last.ckpt"
    exported = tmp_path / "exported"
    run("export", [f"--ckpt_path={checkpoint}", f"--output_dir={exported}"])
    assert (exported / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_the_memory_of_dequantized_weights(method, tmp_path, capsys):
    """As of the same model in bf16."""
    model = quantized_model(tmp_path / "model", method)
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(8))
    with pytest.raises(SystemExit) as end:
        run("doctor", [*arguments(model, rows, tmp_path / "runs"), "--output=json"])
    assert end.value.code == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    lm = load.load_model(
        model, init="pretrained", dtype=torch.float32, attn_implementation="eager", seed=0
    )
    assert memory["weights"] == 4 * lm.num_parameters()


@pytest.mark.parametrize("asked", [True, False])
def test_a_router_loss_that_is_left_out_is_told(asked, tmp_path):
    """transformers has none for Llama 4."""
    sizes = {name: value for name, value in EXPERTS.items() if name != "num_experts_per_tok"}
    config = transformers.Llama4TextConfig(
        **sizes,
        num_experts_per_tok=1,
        intermediate_size_mlp=32,
        output_router_logits=asked,
        router_aux_loss_coef=0.5 if asked else 0.0,
    )
    model = save_tiny(tmp_path / "model", transformers.Llama4ForCausalLM(config), tiny_tokenizer())
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(4))
    with log_lines() as lines:
        run("fit", arguments(model, rows, tmp_path / "runs"))
    text = "\n".join(lines)
    assert ("router_aux_loss_coef 0.5" in text) == asked
    assert ("output_router_logits True" in text) == asked
