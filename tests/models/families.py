"""Tiny checkpoints of multimodal families, in the shape that their publishers give them: class names,
nesting of the configs, kinds of layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
               "out_hidden_size": 32}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
             "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}  # fmt: skip
MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _qwen3_5(prefix: str, **more: Any) -> Any:
    text = {**TEXT, **DELTA_NET, **more, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
        "mrope_section": [1, 1, 2], "mrope_interleaved": True,
    }}  # fmt: skip
    vision = {**QWEN_VISION, "num_position_embeddings": 16}
    return _config(prefix, text, vision, **QWEN_TOKENS)


QWEN_TOKENS = {"image_token_id": 319, "video_token_id": 318, "vision_start_token_id": 317,
               "vision_end_token_id": 316}  # fmt: skip


def _config(prefix: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Any:
    kind = getattr(transformers, f"{prefix}Config")
    return kind(text_config=text, vision_config=vision, **more)


def _llama4() -> Any:
    text = {
        **TEXT, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 64, "model_type": "llama4_text",
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16,
        "projector_output_dim": 16, "model_type": "llama4_vision_model",
    }  # fmt: skip
    return _config("Llama4", text, vision, image_token_index=319)


def _mistral3(text: dict[str, Any], **more: Any) -> Any:
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    return _config("Mistral3", {**TEXT, **text}, vision, image_token_index=10, **more)


def _qwen_vl(prefix: str, vision: dict[str, Any], **more: Any) -> Any:
    text = {**TEXT, "rope_parameters": dict(MULTIMODAL_ROPE), **more}
    return _config(prefix, text, {**QWEN_VISION, **vision}, **QWEN_TOKENS)


def _gemma3() -> Any:
    text = {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 8, "model_type": "gemma3_text"}
    tokens = {"image_token_index": 319, "boi_token_index": 318, "eoi_token_index": 317,
              "mm_tokens_per_image": 4}  # fmt: skip
    return _config("Gemma3", text, {**SIGLIP, "model_type": "siglip_vision_model"}, **tokens)


def _gemma4() -> Any:
    text = {**TEXT, "sliding_window": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320,
            "global_head_dim": 8, "model_type": "gemma4_text"}  # fmt: skip
    vision = {**SIGLIP, "num_key_value_heads": 2, "head_dim": 8}
    return _config("Gemma4", text, vision, audio_config=None)


def _glm4v_moe() -> Any:
    text = {
        **TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "partial_rotary_factor": 1.0, "model_type": "glm4v_moe_text",
        "rope_parameters": dict(MULTIMODAL_ROPE),
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
              "patch_size": 4, "out_hidden_size": 32, "image_size": 8}  # fmt: skip
    return _config("Glm4vMoe", text, vision, **QWEN_TOKENS)


def _kimi() -> Any:
    text = {
        **TEXT, "model_type": "deepseek_v3", "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    text.pop("head_dim")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2}  # fmt: skip
    return _config("Kimi_K25", text, vision, image_token_id=319, video_token_id=318)


def _internvl() -> Any:
    vision = {**SIGLIP, "image_size": [8, 8], "patch_size": [4, 4], "model_type": "internvl_vision"}
    text = {**TEXT, "model_type": "qwen3"}
    return _config("InternVL", text, vision, image_token_id=319)


def _smolvlm() -> Any:
    text = {**TEXT, "model_type": "llama"}
    return _config("SmolVLM", text, {**SIGLIP, "model_type": "smolvlm_vision"}, image_token_id=319)


def _lfm2_vl() -> Any:
    text = {
        **TEXT,
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention"] * 2,
        "block_ff_dim": 64,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "patch_size": 4, "num_patches": 16,
              "model_type": "siglip2_vision_model"}  # fmt: skip
    return _config("Lfm2Vl", text, vision, image_token_id=319, projector_hidden_size=32)


FAMILIES: dict[str, Callable[[], Any]] = {
    "Qwen3.5": lambda: _qwen3_5("Qwen3_5"),
    "Qwen3.5 MoE": lambda: _qwen3_5("Qwen3_5Moe", shared_expert_intermediate_size=16, **EXPERTS),
    "Llama 4": _llama4,
    "Ministral 3": lambda: _mistral3({"model_type": "ministral3", "tie_word_embeddings": False}, tie_word_embeddings=True),
    "Mistral Small 3": lambda: _mistral3({"model_type": "mistral"}, tie_word_embeddings=False),
    "Qwen3-VL": lambda: _qwen_vl("Qwen3VL", {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    "Qwen2.5-VL": lambda: _qwen_vl("Qwen2_5_VL", {"fullatt_block_indexes": [0]}),
    "Gemma 3": _gemma3,
    "Gemma 4": _gemma4,
    "GLM-4V MoE": _glm4v_moe,
    "Kimi K2.5": _kimi,
    "InternVL": _internvl,
    "SmolVLM": _smolvlm,
    "LFM2-VL": _lfm2_vl,
}  # fmt: skip


NO_TEXT_CLASS = {"Qwen3-VL", "Qwen2.5-VL", "GLM-4V MoE"}
"""Families for whose text alone transformers has no class."""
PREPROCESSOR = b'{"image_mean": [0.5, 0.5, 0.5],\n   "do_resize": true}'
MTP = "mtp.layers.0.mlp.down_proj.weight"


def build(name: str) -> Any:
    """A tiny random model of a family."""
    config = FAMILIES[name]()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config).eval()


def save(name: str, directory: Path, **options: Any) -> str:
    """Writes a checkpoint of a family, with the files that belong to its images. Qwen3.5 also has a
    head for multi-token prediction, in the last of several files.
    """
    is_in_parts = name.startswith("Qwen3.5")
    size = {"max_shard_size": "60KB"} if is_in_parts else {}
    build(name).to(options.get("dtype", torch.float32)).save_pretrained(directory, **size)
    tiny_tokenizer().save_pretrained(directory)
    # Some families have a tokenizer class of their own, which splits text in its own way.
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    if is_in_parts:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        last = max(index["weight_map"].values())
        tensors = load_file(directory / last)
        tensors[MTP] = torch.arange(32, dtype=torch.bfloat16)
        save_file(tensors, directory / last, metadata={"format": "pt"})
        index["weight_map"][MTP] = last
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(directory)


def tensors_of(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint by file and name."""
    return {file.name: load_file(file) for file in sorted(directory.glob("*.safetensors"))}


def is_text(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to its language model."""
    parts = ("visual", "vision", "projector", "connector", "mtp")
    return not any(part in name for part in parts)
