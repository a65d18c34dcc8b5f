"""Model directory -> config, tokenizer and model, through transformers."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_sft import hub
from lit_sft.errors import UserError
from lit_sft.model import composite
from lit_sft.model.attention.implementation import attention_of
from lit_sft.model.attention.packed import PACKED
from lit_sft.model.dequantize import (
    forget_quantization,
    is_dequantized,
    loading_arguments,
    whole_and_partial_blocks,
)
from lit_sft.model.quantization import quantize_loaded
from lit_sft.model.random_state import own_random_state

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROCESSOR_TEMPLATE = "chat_template.json"
"""File with the chat template of a processor, as older multimodal checkpoints have it."""


def load_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Reads the model's config.

    Raises:
        UserError: transformers cannot read it.
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
    """Loads the tokenizer.

    Without a pad token, its eos token is used for padding. This is safe, because masks are computed
    from positions and not from ids.

    Raises:
        UserError: There is no tokenizer, or it has neither a pad nor an eos token.
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
        # transformers 5.17 takes the bos token of a GGUF file for its eos token.
        eos_id = load_config(path).eos_token_id
        tokenizer.eos_token = None if eos_id is None else tokenizer.convert_ids_to_tokens(eos_id)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{path}: the tokenizer has neither a pad nor an eos token; set one in its config"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(path)
    return tokenizer


def _processor_template(path: str) -> str | None:
    """Returns the chat template of a processor; None if it has no file of its own.

    Raises:
        UserError: The file cannot be read.
    """
    file = Path(path) / PROCESSOR_TEMPLATE
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} holds no chat template ({_reason(error)}); repair it, or remove it"
        ) from error


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
    """Loads the causal LM, or builds it with random weights.

    Of a multimodal model, only the language model is kept (see `composite`).

    Random weights depend on `seed` only: they are drawn on the CPU, so that they are the same for
    every device. The caller's random state is kept.

    Args:
        path: Local directory, from `hub.resolve`.
        init: `pretrained` reads safetensors, one GGUF file, or pytorch_model.bin; what is in GGUF,
            MXFP4 or FP8 is dequantized. `random` needs only the config.
        dtype: Dtype in which the weights are stored.
        attn_implementation: Name in transformers: `sdpa`, `eager`, `flash_attention_2`, or a
            registered function.
        trust_remote_code: Whether Python files beside the weights may be run.
        seed: Seed of the random weights.
        quantization_config: transformers' config to quantize pretrained weights, or None.
        on_meta: Whether to build the model without weights, on the meta device.

    Returns:
        The model in training mode.

    Raises:
        UserError: This is no causal LM and holds none, or its weights cannot be read.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    _check_causal(config, path)
    arguments: dict[str, Any] = dict(dtype=dtype, trust_remote_code=trust_remote_code)
    is_quantized_twice = quantization_config is not None and is_dequantized(config)
    if quantization_config is not None and not is_quantized_twice:
        # On the CPU; the strategy moves the model.
        arguments |= {"quantization_config": quantization_config, "device_map": {"": "cpu"}}

    def build(name: str | None) -> PreTrainedModel:
        named = {**arguments, "attn_implementation": name}
        if on_meta or init == "random":
            forget_quantization(config)
            return _random_model(config, named, seed, "meta" if on_meta else "cpu")
        model = _pretrained_model(config, path, {**loading_arguments(config), **named})
        if is_quantized_twice:
            quantize_loaded(model, quantization_config)
        return model

    try:
        model = with_attention(build, attn_implementation)
    except (ImportError, ValueError) as error:
        is_about_attention = "attn_implementation" in str(error) or "Flash" in str(error)
        if isinstance(error, ImportError) and not is_about_attention:
            # transformers names the package, in several lines. Gemma 3n needs timm, for example.
            raise UserError(f"{path} cannot be built: {' '.join(str(error).split())}") from error
        if isinstance(error, UserError) or not is_about_attention:
            raise
        raise UserError(
            f"model.attn_implementation {attn_implementation!r}: {_reason(error)}"
        ) from error
    model.train()
    return model


def with_attention(build: Callable[[str | None], PreTrainedModel], name: str) -> PreTrainedModel:
    """Builds a model with an attention implementation, or with one that its own code knows.

    Some models, such as Falcon, look the implementation up in a table of their own.

    Args:
        build: Builds the model with the attention implementation of that name in transformers. None
            takes the one that transformers prefers for the model.
        name: The implementation that is tried first.

    Raises:
        UserError: The user has chosen the implementation, and the model does not know it.
    """
    try:
        return build(name)
    except KeyError as error:
        if error.args != (name,):
            raise
        if name != PACKED:
            raise UserError(
                f"model.attn_implementation {name!r}: the model has no such attention; set it to"
                " auto"
            ) from error
    try:
        model = build(None)
    except KeyError:
        model = build("eager")
    log.warning(
        "%s has a table of its own attention code: attention falls back to `%s`, exact but slower",
        type(model).__name__,
        attention_of(model),
    )
    return model


def read_generation_config(model: PreTrainedModel, path: str) -> None:
    """Replaces the model's generation config by that of a directory, if it has one."""
    from transformers import GenerationConfig

    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


def _gguf_arguments(path: str) -> dict[str, str]:
    """Arguments that make transformers read a GGUF file, if the weights are one."""
    name = hub.gguf_file(path)
    return {} if name is None else {"gguf_file": name}


def _check_causal(config: PretrainedConfig, path: str) -> None:
    """Refuses a model that neither is a causal LM nor holds one.

    transformers would load an encoder or a classifier as one.
    """
    remedy = "which is no causal language model; set model.model_name_or_path to another model"
    own_code = getattr(config, "auto_map", None) or {}
    causal, multimodal = composite.class_names(config)
    known = [name.lower() for name in (causal, multimodal) if name]
    if not known and "AutoModelForCausalLM" not in own_code:
        raise UserError(f"{path} is a {config.model_type} model, {remedy}")
    names = config.architectures or ["causallm"]
    marks = (*(known or ["model"]), "causallm", "lmhead")
    if not any(mark in name.lower() for name in names for mark in marks):
        raise UserError(f"{path} holds a {names[0]}, {remedy}")


def _random_model(
    config: PretrainedConfig, arguments: dict[str, Any], seed: int, device: str
) -> PreTrainedModel:
    factory = composite.auto_class(config, trust_remote_code=arguments["trust_remote_code"])
    with own_random_state(seed), torch.device(device):
        model: PreTrainedModel = factory.from_config(config, **arguments)
    # Of the text model inside a multimodal one, the config has no name.
    model.name_or_path = config.name_or_path
    composite.keep_text(model)
    return model


def _pretrained_model(
    config: PretrainedConfig, path: str, arguments: dict[str, Any]
) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import GgufConfig

    gguf: dict[str, Any] = dict(_gguf_arguments(path))
    is_pickled = not gguf and _is_pickled(path)
    if gguf:
        # Without it, the model may stay quantized, and could be neither trained nor saved.
        gguf["quantization_config"] = GgufConfig(dequantize=True)
    factory = composite.auto_class(config, trust_remote_code=arguments["trust_remote_code"])
    try:
        with whole_and_partial_blocks(path):
            model, info = factory.from_pretrained(
                path,
                use_safetensors=not is_pickled,
                weights_only=True,
                output_loading_info=True,
                local_files_only=True,
                **arguments,
                **gguf,
            )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: its pytorch_model files need code to be read, which could do anything, or are"
            " damaged; provide safetensors"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path}: the weights do not fit the config or are damaged: {_reason(error)}"
        ) from error
    composite.keep_text(model)
    missing = sorted(set(info["missing_keys"]) & model.state_dict().keys())
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} weights of a causal language model, such as {missing[0]}"
        )
    if not gguf and not is_pickled:
        composite.log_left_out(model, config, Path(path))
    loaded: PreTrainedModel = model
    return loaded


def _is_pickled(path: str) -> bool:
    """Whether the weights are in `pytorch_model.bin` or its parts, without safetensors.

    Raises:
        UserError: The directory has neither.
    """
    folder = Path(path)
    if any(folder.glob("*.safetensors")):
        return False
    if any(folder.glob("pytorch_model*.bin")):
        log.info("%s holds pytorch_model.bin: only tensors are read from it, and no code", path)
        return True
    pickles: list[str] = []
    for pattern in ("*.bin", "*.pth", "*.pt"):
        pickles += [file.name for file in folder.glob(pattern)]
    found = "no weights"
    if pickles:
        found = f"only {min(pickles)}, which is not loaded because it can run code"
    raise UserError(f"{path} has {found}; provide safetensors, or set model.init to random")


def _reason(error: Exception) -> str:
    """The error in one line, with the remedy if the model needs its own code."""
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code of its own; read that code and set model.trust_remote_code to"
            " true"
        )
    return f"{type(error).__name__}: {error}".splitlines()[0]
