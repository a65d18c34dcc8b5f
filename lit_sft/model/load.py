"""Model directory -> config, tokenizer and model, through plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_sft import hub
from lit_sft.errors import UserError
from lit_sft.model.random_state import own_random_state

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Reads the model's configuration.

    Raises:
        UserError: If transformers cannot make sense of it.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = dict(
        trust_remote_code=trust_remote_code, local_files_only=True, **_gguf_arguments(path)
    )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the model's config cannot be read: {_reason(error)}") from error
    return config


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; where it has no pad token, eos serves (masks go by position, so this
    harms nothing).

    Raises:
        UserError: If there is no tokenizer, or if it has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    gguf = {} if (Path(path) / "tokenizer.json").is_file() else _gguf_arguments(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True, **gguf
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the tokenizer cannot be loaded: {_reason(error)}") from error
    if gguf:
        # Transformers 5.17 takes a GGUF's bos for its eos.
        eos_id = load_config(path).eos_token_id
        tokenizer.eos_token = None if eos_id is None else tokenizer.convert_ids_to_tokens(eos_id)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{path}: the tokenizer has neither a pad nor an eos token; set one in its config"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str,
    *,
    init: Literal["pretrained", "random"],
    dtype: torch.dtype,
    attn_implementation: str,
    trust_remote_code: bool = False,
    seed: int,
    quantization_config: Any = None,
    on_meta: bool = False,
) -> PreTrainedModel:
    """Loads the causal LM, or builds it with random weights from its config.

    Random weights depend on `seed` only (drawn on the CPU, so that every device gets the same), and
    the caller's random state stays as it was. The model comes in training mode.

    Args:
        path: Local directory, as `hub.resolve` returns it.
        init: `pretrained` reads safetensors or one GGUF file (dequantized), `random` needs the
            config only.
        dtype: The type the weights are stored in.
        attn_implementation: As transformers names it: `sdpa`, `eager`, `flash_attention_2` or a
            registered function.
        trust_remote_code: Whether Python files beside the weights may be run.
        seed: Seed of the random weights.
        quantization_config: transformers' config of how pretrained weights are quantized, or None.
        on_meta: Build it without weights, on the meta device.

    Raises:
        UserError: If this is no causal LM, or if its weights cannot be read.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    _check_causal(config, path)
    arguments = dict(
        dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    if quantization_config is not None:
        # On the CPU, from where the strategy moves it.
        arguments |= {"quantization_config": quantization_config, "device_map": {"": "cpu"}}
    try:
        if on_meta or init == "random":
            model = _random_model(config, arguments, seed, "meta" if on_meta else "cpu")
        else:
            model = _pretrained_model(path, arguments)
    except (ImportError, ValueError) as error:
        if isinstance(error, UserError) or (
            "attn_implementation" not in str(error) and "Flash" not in str(error)
        ):
            raise
        raise UserError(
            f"model.attn_implementation {attn_implementation!r}: {_reason(error)}"
        ) from error
    model.train()
    return model


def read_generation_config(model: PreTrainedModel, path: str) -> None:
    """Takes over the generation config of another directory, an adapter's say, where it has one."""
    from transformers import GenerationConfig

    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


def _gguf_arguments(path: str) -> dict[str, str]:
    """`gguf_file` for transformers where the directory's weights are one GGUF file."""
    name = hub.gguf_file(path)
    return {} if name is None else {"gguf_file": name}


def _check_causal(config: PretrainedConfig, path: str) -> None:
    """Refuses other models; transformers itself would load an encoder or a classifier as a causal
    LM.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    remedy = "which is no causal language model; set model.model_name_or_path to another model"
    own_code = getattr(config, "auto_map", None) or {}
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
    if not causal_class and "AutoModelForCausalLM" not in own_code:
        raise UserError(f"{path} is a {config.model_type} model, {remedy}")
    names = config.architectures or ["causallm"]
    marks = (causal_class.lower() or "model", "causallm", "lmhead")
    if not any(mark in name.lower() for name in names for mark in marks):
        raise UserError(f"{path} holds a {names[0]}, {remedy}")


def _random_model(
    config: PretrainedConfig, arguments: dict[str, Any], seed: int, device: str
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    with own_random_state(seed), torch.device(device):
        model: PreTrainedModel = factory.from_config(config, **arguments)
    return model


def _pretrained_model(path: str, arguments: dict[str, Any]) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf: dict[str, Any] = dict(_gguf_arguments(path))
    if not gguf and not any(Path(path).glob("*.safetensors")):
        pickles = sorted(
            file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in Path(path).glob(pattern)
        )
        found = (
            f"only {pickles[0]}, which is not loaded because it can run code"
            if pickles
            else "no weights"
        )
        raise UserError(f"{path} has {found}; provide safetensors, or set model.init to random")
    if gguf:
        # Said aloud: otherwise the model may stay quantized, and could be neither trained nor
        # saved.
        gguf["quantization_config"] = GgufConfig(dequantize=True)
    factory: Any = AutoModelForCausalLM
    try:
        model, info = factory.from_pretrained(
            path,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **arguments,
            **gguf,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path}: the weights do not fit the config or are damaged: {_reason(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{path} lacks {len(missing)} weights of a causal language model, such as {missing[0]}"
        )
    loaded: PreTrainedModel = model
    return loaded


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code of its own; read that code and set model.trust_remote_code to"
            " true"
        )
    return f"{type(error).__name__}: {error}".splitlines()[0]
