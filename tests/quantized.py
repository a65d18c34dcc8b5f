"""Checkpoints in MXFP4 and FP8, made by hand, and what their weights stand for."""

import json

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

SIZES = dict(
    vocab_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=None,
    eos_token_id=0, pad_token_id=0,
)  # fmt: skip
LATENT = dict(
    hidden_size=160, intermediate_size=192, moe_intermediate_size=96, first_k_dense_replace=1, n_routed_experts=4,
    num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1, q_lora_rank=130, kv_lora_rank=512,
    qk_rope_head_dim=64, qk_nope_head_dim=16, v_head_dim=16,
)  # fmt: skip
"""As DeepSeek V3 has them: 576 rows in `kv_a_proj_with_mqa`."""
FP8 = {
    "DeepseekV3": LATENT | {"num_key_value_heads": 4},
    "Qwen3": dict(hidden_size=192, intermediate_size=288, head_dim=48),
    "Qwen3Moe": dict(
        hidden_size=192, intermediate_size=288, moe_intermediate_size=96, head_dim=48, num_experts=4,
        num_experts_per_tok=2,
    ),
}  # fmt: skip
"""Sizes that are no multiples of the blocks of 128."""
GPT_OSS = dict(
    hidden_size=64, intermediate_size=96, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
    layer_types=["sliding_attention", "full_attention"], sliding_window=8,
)  # fmt: skip
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
"""The numbers that four bits stand for in MXFP4."""


def plain(folder, name, **sizes):
    """Saves a random model in bf16."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes})
    lm = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16()
    lm.save_pretrained(folder)


def read(folder):
    """The tensors of a checkpoint of one file, by their names there."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def write(folder, tensors, quantization=None):
    """Replaces the tensors of a checkpoint, and says in its config how they are quantized."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if quantization is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": quantization}
        path.write_text(json.dumps(config))


def is_linear(name, tensor):
    """Whether a tensor is the weight of a linear layer that FP8 checkpoints quantize."""
    kept = (
        "embed",
        "lm_head",
        "mlp.gate.weight",
        "block_sparse_moe.gate.weight",
        "vision",
        "projector",
    )
    return tensor.ndim == 2 and not any(part in name for part in kept)


def blocks(weight, size):
    for top in range(0, weight.shape[0], size):
        for left in range(0, weight.shape[1], size):
            yield slice(top, top + size), slice(left, left + size)


def store_fp8(folder, block=128):
    """Quantizes the linear layers of a checkpoint by hand.

    Args:
        folder: The checkpoint.
        block: Width of the blocks that have a scale each. None for one scale a matrix.

    Returns:
        What each tensor stands for.
    """
    tensors = read(folder)
    expected = dict(tensors)
    for key, weight in expected.copy().items():
        if not is_linear(key, weight):
            continue
        weight = weight.float()
        if block is None:
            scale = (weight.abs().max() / 448).bfloat16()
            tensors[key] = (weight / scale.float()).to(torch.float8_e4m3fn)
            expected[key] = tensors[key].float() * scale.float()
            tensors[key.replace("weight", "activation_scale")] = torch.tensor(1.0)
        else:
            grid = [-(-side // block) for side in weight.shape]
            scale = torch.empty(grid)
            tensors[key] = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
            expected[key] = torch.empty(weight.shape)
            for number, (rows, columns) in enumerate(blocks(weight, block)):
                part = weight[rows, columns]
                factor = part.abs().max() / 448
                scale.view(-1)[number] = factor
                tensors[key][rows, columns] = (part / factor).to(torch.float8_e4m3fn)
                expected[key][rows, columns] = tensors[key][rows, columns].float() * factor
        tensors[f"{key}_scale_inv"] = scale
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic" if block else "static",
        "weight_block_size": [block, block] if block else None,
    }
    write(folder, tensors, quantization)
    return expected


def save_fp8(folder, name, block=128, **sizes):
    """Saves a random model in FP8.

    Returns:
        What each tensor stands for. The rows of a weight differ in size, so that a wrong scale
        shows.
    """
    plain(folder, name, **sizes)
    tensors = read(folder)
    for key, weight in tensors.items():
        if is_linear(key, weight):
            tensors[key] = weight * torch.logspace(-1, 1, len(weight))[:, None].to(weight.dtype)
    write(folder, tensors)
    return store_fp8(folder, block)


def store_mxfp4(folder):
    """Writes the experts of gpt-oss as its files have them, and returns what they stand for."""
    tensors = read(folder)
    expected = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(key).shape
        codes = torch.randint(16, (experts, outer, inner // 32, 32), generator=generator)
        exponents = torch.randint(-9, -3, (experts, outer, inner // 32), generator=generator)
        # Two numbers a byte, the first in its lower half.
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[f"{key}_blocks"] = packed.to(torch.uint8)
        tensors[f"{key}_scales"] = (exponents + 127).to(torch.uint8)
        values = torch.tensor(FP4)[codes] * torch.exp2(exponents.float())[..., None]
        expected[key] = values.flatten(2).mT
    write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    return expected


def save_mxfp4(folder, **sizes):
    """Saves a random gpt-oss in MXFP4, and returns what its tensors stand for."""
    plain(folder, "GptOss", **{**GPT_OSS, **sizes})
    return store_mxfp4(folder)
