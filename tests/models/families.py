"""Tiny checkpoints of model families, in the shape that their publishers give them: class names, nesting of
the configs, kinds of layers, quantized weights.

A shape is taken from the config class of transformers and from the checkpoint that its documentation names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from quantized import store_fp8, store_mxfp4
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
TEXT = {**SIZES, "head_dim": 8}
SIGLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
               "out_hidden_size": 32}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
          "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
"""Experts by the names of DeepSeek."""
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
          "num_key_value_heads": 4}  # fmt: skip
INDEXER = {"index_topk": 16, "index_head_dim": 8, "index_n_heads": 2}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
             "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
MULTIPLIERS = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
               "attention_multiplier": 0.125}  # fmt: skip
DELTA_LAYERS = ["linear_attention"] * 3 + ["full_attention"]
HYBRID_LAYERS = ["linear_attention", "full_attention"] * 2
WINDOW_LAYERS = ["sliding_attention"] * 3 + ["full_attention"]
MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4,
             "original_max_position_embeddings": 32}  # fmt: skip
DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
SHORT_CONVOLUTIONS = ["conv", "full_attention"] * 2
LINEAR_LATENT = {
    **LATENT, "layer_types": DELTA_LAYERS, "linear_head_dim": 8, "linear_num_heads": 4, "num_experts": 4,
    "num_experts_per_token": 2, "moe_intermediate_size": 16, "q_lora_rank": None, "mlp_layer_types": DENSE_FIRST,
}  # fmt: skip
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "head_dim": 8, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4, "n_mamba_heads": 4,
    "mamba_d_state": 8, "chunk_size": 16, "num_mem_blocks": 1, "adapter_rank": 4,
}  # fmt: skip
STATE_SPACE = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
RWKV = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32,
        "intermediate_size": 64, "bos_token_id": None, "eos_token_id": 0, "context_length": 512}  # fmt: skip
MTP = "mtp.layers.0.mlp.down_proj.weight"
NEXT_LAYER = "model.layers.4.eh_proj.weight"
"""Of the layer behind the last one, which predicts the token after the next."""


def _text(prefix: str, sizes: dict[str, Any] = SIZES, **more: Any) -> Callable[[], Any]:
    """A maker of the config of a text model."""
    return lambda: getattr(transformers, f"{prefix}Config")(**{**sizes, **more})


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
    vision = {**SIGLIP, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
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


def _mistral4() -> Any:
    text = {**SIZES, **LATENT, **ROUTED, "head_dim": 16, "first_k_dense_replace": 0, "model_type": "mistral4", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        "partial_rotary_factor": 0.5,
    }}  # fmt: skip
    return _mistral3(text, tie_word_embeddings=False)


def _gemma3n() -> Any:
    text = {
        **TEXT, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4,
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "model_type": "gemma3n_text",
    }  # fmt: skip
    return transformers.Gemma3nConfig(text_config=text)


def _deepseek_v4() -> Any:
    layers = ["heavily_compressed_attention", "compressed_sparse_attention"] * 2
    return transformers.DeepseekV4Config(
        **{**SIZES, "intermediate_size": 16}, head_dim=8, q_lora_rank=16, n_routed_experts=4, num_experts_per_tok=2,
        o_groups=2, o_lora_rank=8, index_n_heads=2, index_head_dim=8, index_topk=16, sliding_window=16, layer_types=layers,
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"], compress_rates={layers[0]: 8, layers[1]: 4}, hc_mult=2,
    )  # fmt: skip


def _fp8_by_matrix(folder: Path) -> None:
    """As Mistral stores its models: towers and the head are not quantized."""
    store_fp8(folder, block=None)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    config["quantization_config"]["modules_to_not_convert"] = kept
    path.write_text(json.dumps(config))


@dataclass(frozen=True)
class Family:
    """A family, and what its row in docs/models.md says."""

    config: Callable[[], Any]
    published: str
    """A checkpoint of this shape on the hub."""
    special: str
    """What is special about it in training."""
    template: str | None = None
    """Its chat template, as package/name of `template_sweep`."""
    store: Callable[[Path], None] | None = None
    """Quantizes a checkpoint as the published one is."""
    has_own_tower: bool = True
    """Whether transformers builds its tower without another package."""
    extra: tuple[str, ...] = ()
    """Tensors of the published checkpoint for which transformers has no module."""


FAMILIES: dict[str, Family] = {
    "Qwen2.5": Family(
        _text("Qwen2"), "Qwen/Qwen2.5-7B-Instruct", "biases of q, k and v", "trl/qwen2_5",
    ),
    "Qwen1.5 MoE": Family(
        _text("Qwen2Moe", **SHARED_EXPERT, decoder_sparse_step=1), "Qwen/Qwen1.5-MoE-A2.7B", "a gated shared expert",
    ),
    "Qwen3": Family(
        _text("Qwen3", TEXT, tie_word_embeddings=True), "Qwen/Qwen3-0.6B",
        "the template drops the reasoning of earlier turns", "trl/qwen3",
    ),
    "Qwen3 MoE": Family(
        _text("Qwen3Moe", TEXT, **EXPERTS, norm_topk_prob=True), "Qwen/Qwen3-30B-A3B", "128 experts",
        "trl/qwen3_instruct_2507",
    ),
    "Qwen3-Next": Family(
        _text("Qwen3Next", TEXT, **SHARED_EXPERT, **DELTA_NET), "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "gated delta nets in three of four layers", "trl/qwen3_instruct_2507", extra=(MTP,),
    ),
    "Qwen3.5": Family(
        lambda: _qwen3_5("Qwen3_5"), "Qwen/Qwen3.5-27B",
        "gated delta nets in three of four layers; a vision tower; a head for multi-token prediction",
        "trl/qwen3_5_think", extra=(MTP,),
    ),
    "Qwen3.5 MoE": Family(
        lambda: _qwen3_5("Qwen3_5Moe", **SHARED_EXPERT), "Qwen/Qwen3.5-35B-A3B",
        "as Qwen3.5, with experts stored as one tensor", "trl/qwen3_6", extra=(MTP,),
    ),
    "Llama 3": Family(
        _text("Llama", TEXT, rope_parameters=LLAMA3_ROPE), "meta-llama/Llama-3.1-8B-Instruct",
        "scaled rotary frequencies; the template of 3.2 writes the date", "trl/llama3_1",
    ),
    "Llama 4": Family(
        _llama4, "meta-llama/Llama-4-Scout-17B-16E", "attention in chunks, layers without positions, a vision tower",
        "axolotl/llama4",
    ),
    "Mistral 7B": Family(
        _text("Mistral", TEXT, sliding_window=16), "mistralai/Mistral-7B-v0.1", "a window in every layer",
        "axolotl/mistral_v1",
    ),
    "Mixtral": Family(
        _text("Mixtral", TEXT, num_local_experts=4, num_experts_per_tok=2), "mistralai/Mixtral-8x7B-v0.1", "8 experts",
        "axolotl/mistral_v1",
    ),
    "Ministral 3": Family(
        lambda: _mistral3({"model_type": "ministral3", "tie_word_embeddings": False}, tie_word_embeddings=True),
        "mistralai/Ministral-3-8B-Instruct-2512", "FP8 with one scale for each matrix; a vision tower",
        "llama.cpp/mistralai-Ministral-3-14B-Reasoning-2512", store=_fp8_by_matrix,
    ),
    "Mistral Small 3": Family(
        lambda: _mistral3({"model_type": "mistral"}, tie_word_embeddings=False),
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "a vision tower",
        "llama.cpp/Mistral-Small-3.2-24B-Instruct-2506",
    ),
    "Mistral Small 4": Family(
        _mistral4, "mistralai/Mistral-Small-4-119B-2603", "latent attention, experts, a vision tower",
    ),
    "Gemma 2": Family(
        _text("Gemma2", TEXT, sliding_window=16, query_pre_attn_scalar=8), "google/gemma-2-9b-it",
        "caps on scores and logits; no system role", "llama.cpp/google-gemma-2-2b-it",
    ),
    "Gemma 3 text": Family(
        _text("Gemma3Text", TEXT, sliding_window=16, query_pre_attn_scalar=8), "google/gemma-3-1b-it",
        "windows in five of six layers", "trl/gemma3",
    ),
    "Gemma 3": Family(
        _gemma3, "google/gemma-3-4b-it", "windows in five of six layers; a vision tower", "trl/gemma3",
    ),
    "Gemma 3n": Family(
        _gemma3n, "google/gemma-3n-E4B-it", "several residual streams, embeddings for each layer, shared keys and values",
        "axolotl/gemma3n", has_own_tower=False,
    ),
    "Gemma 4": Family(
        _gemma4, "google/gemma-4-e2b-it", "embeddings for each layer; a vision tower", "trl/gemma4_v5",
    ),
    "Phi-3": Family(
        _text("Phi3", sliding_window=16, num_key_value_heads=4, rope_parameters=LONG_ROPE),
        "microsoft/Phi-3-mini-128k-instruct", "one matrix for q, k and v; rotary frequencies by length", "trl/phi3",
    ),
    "Phi-4": Family(
        _text("Phi3", sliding_window=None), "microsoft/phi-4", "Phi-3 without windows", "axolotl/phi_4",
    ),
    "Phi-3.5 MoE": Family(
        _text("Phimoe", num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True),
        "microsoft/Phi-3.5-MoE-instruct", "layer norms, a head with a bias, experts chosen one after the other",
        "trl/phi3_5",
    ),
    "GLM-4": Family(
        _text("Glm4", TEXT), "zai-org/GLM-4-9B-0414", "norms before and after each layer; interleaved rotation of half the width",
    ),
    "GLM-4.5": Family(
        _text("Glm4Moe", TEXT, **ROUTED, use_qk_norm=True, attention_bias=True), "zai-org/GLM-4.5",
        "a turn is ended by the role of the next one; a layer for multi-token prediction", "trl/glm4moe",
        extra=(NEXT_LAYER,),
    ),
    "GLM-4.7 Flash": Family(
        _text("Glm4MoeLite", **LATENT, **EXPERTS, n_routed_experts=4, mlp_layer_types=DENSE_FIRST), "zai-org/GLM-4.7-Flash",
        "latent attention", "llama.cpp/GLM-4.7-Flash", extra=(NEXT_LAYER,),
    ),
    "GLM-5": Family(
        _text("GlmMoeDsa", **LATENT, **ROUTED, **INDEXER, mlp_layer_types=DENSE_FIRST), "zai-org/GLM-5",
        "sparse attention: an indexer, which no gradient reaches, selects tokens", extra=(NEXT_LAYER,),
    ),
    "GLM-4.5V": Family(_glm4v_moe, "zai-org/GLM-4.5V", "GLM-4.5 with a vision tower"),
    "DeepSeek V2": Family(
        _text("DeepseekV2", **{**LATENT, **ROUTED, "q_lora_rank": None, "topk_method": "greedy"}),
        "deepseek-ai/DeepSeek-V2-Lite", "latent attention", "axolotl/deepseek_v2",
    ),
    "DeepSeek V3": Family(
        _text("DeepseekV3", **LATENT, **ROUTED), "deepseek-ai/DeepSeek-V3.1",
        "latent attention; FP8 in blocks; a layer for multi-token prediction", "trl/deepseekv3", store=store_fp8,
        extra=(NEXT_LAYER,),
    ),
    "DeepSeek V3.2": Family(
        _text("DeepseekV32", **LATENT, **ROUTED, **INDEXER, mlp_layer_types=DENSE_FIRST), "deepseek-ai/DeepSeek-V3.2-Exp",
        "sparse attention: an indexer, which no gradient reaches, selects tokens", "llama.cpp/deepseek-ai-DeepSeek-V3.2", extra=(NEXT_LAYER,),
    ),
    "DeepSeek V4": Family(
        _deepseek_v4, "deepseek-ai/DeepSeek-V4-Flash-Base", "compressed keys, hyper-connections, experts by hash",
        "llama.cpp/deepseek-ai-DeepSeek-V4",
    ),
    "gpt-oss": Family(
        _text("GptOss", TEXT, num_local_experts=4, num_experts_per_tok=2, sliding_window=16), "openai/gpt-oss-20b",
        "sinks, windows, experts in MXFP4; the Harmony template", "trl/gptoss", store=store_mxfp4,
    ),
    "Kimi K2.5": Family(_kimi, "moonshotai/Kimi-K2.5", "DeepSeek V3 with a vision tower", "llama.cpp/Kimi-K2-Thinking"),
    "Kimi Linear": Family(
        _text("KimiLinear", **LINEAR_LATENT), "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        "delta attention in three of four layers", "llama.cpp/moonshotai-Kimi-K2",
    ),
    "MiniMax-01": Family(
        _text("MiniMax", TEXT, layer_types=HYBRID_LAYERS, num_local_experts=4, num_experts_per_tok=2, block_size=16),
        "MiniMaxAI/MiniMax-Text-01-hf", "lightning attention", "llama.cpp/MiniMax-M1",
    ),
    "MiniMax M2": Family(
        _text("MiniMaxM2", TEXT, num_local_experts=4, num_experts_per_tok=2), "MiniMaxAI/MiniMax-M2",
        "norms over all heads together; FP8 in blocks", "llama.cpp/MiniMax-M2", store=store_fp8,
    ),
    "Granite 3": Family(
        _text("Granite", **MULTIPLIERS), "ibm-granite/granite-3.3-8b-instruct", "multipliers on embedding, residuals and logits",
        "llama.cpp/ibm-granite-granite-3.3-2B-Instruct",
    ),
    "Granite 3 MoE": Family(
        _text("GraniteMoe", **MULTIPLIERS, num_local_experts=4, num_experts_per_tok=2), "ibm-granite/granite-3.1-3b-a800m-instruct",
        "multipliers; experts stored as one tensor", "llama.cpp/ibm-granite-granite-3.3-2B-Instruct",
    ),
    "Granite 4": Family(
        _text("GraniteMoeHybrid", **MULTIPLIERS, **MAMBA, layer_types=HYBRID_LAYERS, num_local_experts=4,
              num_experts_per_tok=2, shared_intermediate_size=16),
        "ibm-granite/granite-4.0-h-small", "Mamba 2 in most layers, a shared expert, no positions",
        "llama.cpp/ibm-granite-granite-4.0",
    ),
    "OLMo 2": Family(_text("Olmo2"), "allenai/OLMo-2-1124-7B-Instruct", "norms after each layer only"),
    "Olmo 3": Family(
        _text("Olmo3", sliding_window=16), "allenai/Olmo-3-7B-Instruct", "windows in three of four layers",
    ),
    "Olmo Hybrid": Family(
        _text("OlmoHybrid", **DELTA_NET, layer_types=DELTA_LAYERS), "allenai/Olmo-Hybrid-7B",
        "gated delta nets in three of four layers",
    ),
    "OLMoE": Family(
        _text("Olmoe", num_experts=4, num_experts_per_tok=2), "allenai/OLMoE-1B-7B-0924-Instruct", "64 experts",
    ),
    "SmolLM3": Family(
        _text("SmolLM3", tie_word_embeddings=True), "HuggingFaceTB/SmolLM3-3B", "every fourth layer without positions",
        "llama.cpp/HuggingFaceTB-SmolLM3-3B",
    ),
    "LFM2": Family(
        _text("Lfm2", layer_types=SHORT_CONVOLUTIONS, block_ff_dim=64), "LiquidAI/LFM2-1.2B", "short convolutions",
        "trl/lfm2_v2",
    ),
    "LFM2 MoE": Family(
        _text("Lfm2Moe", **EXPERTS, layer_types=SHORT_CONVOLUTIONS, num_dense_layers=2), "LiquidAI/LFM2-8B-A1B",
        "short convolutions, experts", "llama.cpp/LFM2-8B-A1B",
    ),
    "LFM3": Family(
        _text("Lfm3", TEXT, layer_types=["conv", "sliding_attention", "conv", "full_attention"], sliding_window=16),
        "LiquidAI/LFM3-1.7B", "short convolutions, windows",
    ),
    "Falcon-H1": Family(
        _text("FalconH1", **MAMBA, mamba_d_ssm=64), "tiiuae/Falcon-H1-1.5B-Deep-Instruct",
        "Mamba 2 and attention side by side in each layer", "axolotl/falcon_h1",
    ),
    "Nemotron-H": Family(
        _text("NemotronH", **NEMOTRON), "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Mamba 2, attention and experts as layers of their own",
        "trl/nemotron_3_nano",
    ),
    "Bamba": Family(_text("Bamba", **MAMBA, attn_layer_indices=[1, 3]), "ibm-fms/Bamba-9.8b-2.2T-hf", "Mamba 2 in most layers"),
    "Jamba": Family(
        _text("Jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=8,
              mamba_dt_rank=4),
        "ai21labs/Jamba-v0.1", "Mamba 1 in most layers, experts in every second one", "axolotl/jamba",
    ),
    "Zamba2": Family(
        _text("Zamba2", **ZAMBA), "Zyphra/Zamba2-2.7B", "Mamba 2; blocks of attention that layers share",
    ),
    "Mamba": Family(_text("Mamba", STATE_SPACE), "state-spaces/mamba-2.8b-hf", "state spaces only"),
    "Mamba 2": Family(
        _text("Mamba2", STATE_SPACE, num_heads=4, head_dim=16, n_groups=1, chunk_size=16), "state-spaces/mamba2-2.8b",
        "state spaces only",
    ),
    "Falcon Mamba": Family(_text("FalconMamba", STATE_SPACE), "tiiuae/falcon-mamba-7b-instruct", "state spaces only"),
    "RWKV-4": Family(_text("Rwkv", RWKV), "RWKV/rwkv-4-169m-pile", "a recurrent network"),
    "Command R7B": Family(
        _text("Cohere2", TEXT, sliding_window=16, logit_scale=0.25), "CohereLabs/c4ai-command-r7b-12-2024",
        "attention and MLP side by side; every fourth layer without positions", "trl/cohere2",
    ),
    "Command A+": Family(
        _text("Cohere2Moe", TEXT, sliding_window=16, num_experts=4, num_experts_per_tok=2), "CohereLabs/command-a-plus-05-2026",
        "Command R7B with experts", "llama.cpp/Cohere2MoE",
    ),
    "Ernie 4.5": Family(_text("Ernie4_5", TEXT), "baidu/ERNIE-4.5-0.3B-PT", "interleaved rotation"),
    "Ernie 4.5 MoE": Family(
        _text("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1,
              moe_layer_start_index=1, moe_layer_end_index=3),
        "baidu/ERNIE-4.5-21B-A3B-PT", "experts chosen with a correction that no gradient reaches",
    ),
    "Hunyuan": Family(
        _text("HunYuanDenseV1", TEXT), "tencent/Hunyuan-7B-Instruct", "norms of q and k after the rotation",
    ),
    "Hunyuan MoE": Family(
        _text("HunYuanMoEV1", TEXT, num_experts=4, moe_topk=2), "tencent/Hunyuan-A13B-Instruct", "a shared expert",
    ),
    "Seed-OSS": Family(
        _text("SeedOss", TEXT, attention_dropout=0.0, residual_dropout=0.0), "ByteDance-Seed/Seed-OSS-36B-Instruct",
        "a budget for reasoning in the template", "llama.cpp/ByteDance-Seed-OSS",
    ),
    "Apertus": Family(
        _text("Apertus"), "swiss-ai/Apertus-8B-Instruct-2509", "an activation with parameters (xIELU), no gate",
        "llama.cpp/Apertus-8B-Instruct",
    ),
    "Arcee": Family(_text("Arcee", TEXT), "arcee-ai/AFM-4.5B", "squared ReLU, no gate"),
    "dots.llm1": Family(
        _text("Dots1", TEXT, **ROUTED), "rednote-hilab/dots.llm1.inst", "experts as in DeepSeek V3, plain attention",
    ),
    "EXAONE 4": Family(
        _text("Exaone4", sliding_window=16, sliding_window_pattern=4), "LGAI-EXAONE/EXAONE-4.0-32B",
        "norms after each layer only; full attention without positions", "axolotl/exaone4",
    ),
    "StarCoder2": Family(_text("Starcoder2", sliding_window=16), "bigcode/starcoder2-7b", "layer norms, biases, no gate"),
    "nanochat": Family(_text("NanoChat"), "karpathy/nanochat-d32", "norms without weights, capped logits"),
    "MiMo V2": Family(
        _text("MiMoV2Flash", TEXT, **ROUTED, v_head_dim=8, sliding_window=16, layer_types=WINDOW_LAYERS,
              mlp_layer_types=DENSE_FIRST),
        "XiaomiMiMo/MiMo-V2-Flash", "sinks in layers with windows; FP8 in blocks", store=store_fp8,
    ),
    "Qwen3-VL": Family(
        lambda: _qwen_vl("Qwen3VL", {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
        "Qwen/Qwen3-VL-4B-Instruct", "positions in three dimensions; a vision tower", "trl/qwen3_vl",
    ),
    "Qwen2.5-VL": Family(
        lambda: _qwen_vl("Qwen2_5_VL", {"fullatt_block_indexes": [0]}), "Qwen/Qwen2.5-VL-7B-Instruct",
        "positions in three dimensions; a vision tower", "trl/qwen2_5_vl",
    ),
    "InternVL 3": Family(_internvl, "OpenGVLab/InternVL3-1B-hf", "Qwen with a vision tower"),
    "SmolVLM": Family(_smolvlm, "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "Llama with a vision tower", "trl/smolvlm"),
    "LFM2-VL": Family(_lfm2_vl, "LiquidAI/LFM2-VL-1.6B", "LFM2 with a vision tower", "trl/lfm2_2_5_vl"),
}  # fmt: skip


NO_TEXT_CLASS = {"Qwen3-VL", "Qwen2.5-VL", "GLM-4.5V"}
"""Families for whose text alone transformers has no class."""
CORE = ("Qwen3", "Qwen3.5", "Llama 4", "Ministral 3", "Gemma 3", "GLM-4.5", "gpt-oss", "Granite 4")
"""Families of CI, one of each kind; the others are in `make certify`."""
PREPROCESSOR = b'{"image_mean": [0.5, 0.5, 0.5],\n   "do_resize": true}'


def has_tower(name: str) -> bool:
    """Whether a family is a language model inside a multimodal checkpoint."""
    config = FAMILIES[name].config()
    return bool(config.get_text_config() is not config)


def build(name: str) -> Any:
    """A tiny random model of a family."""
    config = FAMILIES[name].config()
    factory: Any = transformers.AutoModelForCausalLM
    if has_tower(name):
        factory = transformers.AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = factory.from_config(config).eval()
    for key, table in model.named_buffers():
        # The experts of each token in DeepSeek V4, which are zeros in a random model.
        if key.endswith("tid2eid"):
            tokens, chosen = (torch.arange(size) for size in table.shape)
            table.copy_((tokens[:, None] + chosen) % config.n_routed_experts)
    return model


def save(name: str, directory: Path, **options: Any) -> str:
    """Writes a checkpoint of a family, quantized as the published one, with the files that belong to its images.

    Qwen3.5 comes in several files.
    """
    family = FAMILIES[name]
    size = {"max_shard_size": "60KB"} if name.startswith("Qwen3.5") else {}
    if family.has_own_tower:
        build(name).to(options.get("dtype", torch.float32)).save_pretrained(directory, **size)
    else:
        # The config is all that is read before the package is missed.
        family.config().save_pretrained(directory)
        save_file({}, directory / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(directory)
    # Some families have a tokenizer class of their own, which splits text in its own way.
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    if has_tower(name):
        (directory / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    for tensor in family.extra:
        _add_tensor(directory, tensor)
    if family.store is not None and not options.get("plain"):
        family.store(directory)
    return str(directory)


def _add_tensor(directory: Path, name: str) -> None:
    """Adds a tensor to the last weight file of a checkpoint."""
    file = max(directory.glob("*.safetensors"))
    tensors = load_file(file)
    tensors[name] = torch.arange(128, dtype=torch.bfloat16).reshape(4, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    path = directory / "model.safetensors.index.json"
    if path.exists():
        index = json.loads(path.read_text())
        index["weight_map"][name] = file.name
        path.write_text(json.dumps(index))


def tensors_of(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint by file and name."""
    return {file.name: load_file(file) for file in sorted(directory.glob("*.safetensors"))}


def is_text(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to its language model."""
    parts = ("visual", "vision", "audio", "projector", "connector", "mtp", "eh_proj")
    return not any(part in name for part in parts)
