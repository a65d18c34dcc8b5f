"""Weights in MXFP4 and FP8 are loaded as the plain weights that they stand for."""

import json
import shutil

import pytest
import torch
from quantized import FP8, save_fp8, save_mxfp4
from safetensors import safe_open
from safetensors.torch import save_file

from lit_sft.errors import UserError
from lit_sft.model import dequantize, load, quantization


def loaded(folder, dtype):
    config = load.load_config(str(folder))
    assert dequantize.is_dequantized(config)
    return load.load_model(
        str(folder), init="pretrained", dtype=dtype, attn_implementation="eager", seed=0
    )


def saved_again(lm, folder):
    """The tensors of the model after it is saved, by the names of its files."""
    lm.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def check_values(lm, folder, expected, dtype):
    found = saved_again(lm, folder)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(dtype)), name
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert all(weight.requires_grad for weight in lm.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FP8)
def test_blocks_of_fp8(name, dtype, tmp_path):
    expected = save_fp8(tmp_path / "source", name, **FP8[name])
    check_values(loaded(tmp_path / "source", dtype), tmp_path / "again", expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Mistral", "Ministral3"])
def test_one_scale_for_each_tensor(name, dtype, tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=16)
    expected = save_fp8(tmp_path / "source", name, None, **sizes)
    check_values(loaded(tmp_path / "source", dtype), tmp_path / "again", expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4(dtype, tmp_path):
    expected = save_mxfp4(tmp_path / "source")
    check_values(loaded(tmp_path / "source", dtype), tmp_path / "again", expected, dtype)


def test_scales_as_exponents():
    weight = torch.tensor([[1.0, 2.0, 3.0]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[127, 130]], dtype=torch.uint8)
    values = dequantize.dequantize_blocks(weight, scales, (2, 2), torch.float32)
    assert values.tolist() == [[1.0, 2.0, 24.0]]


def test_scales_that_do_not_fit_are_refused(tmp_path):
    save_fp8(tmp_path, "Qwen3", **FP8["Qwen3"])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit the blocks in FP8"):
        loaded(tmp_path, torch.float32)


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_nf4_of_dequantized_weights(method, tmp_path):
    """The same four bits as of the model in bf16, loaded by transformers."""
    source, plain = tmp_path / "source", tmp_path / "plain"
    if method == "fp8":
        expected = save_fp8(source, "Qwen3", **FP8["Qwen3"])
    else:
        expected = save_mxfp4(source)
    shutil.copytree(source, plain)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    weights = {name: value.bfloat16().contiguous() for name, value in expected.items()}
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    states = []
    for folder in (source, plain):
        lm = load.load_model(
            str(folder),
            init="pretrained",
            dtype=torch.bfloat16,
            attn_implementation="eager",
            seed=0,
            quantization_config=quantization.nf4(torch.bfloat16),
        )
        assert lm.is_loaded_in_4bit
        states.append(lm.state_dict())
    ours, theirs = states
    assert sorted(ours) == sorted(theirs) and any("absmax" in name for name in ours)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
