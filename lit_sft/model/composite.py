"""The language model inside a multimodal checkpoint: its class, its parts, its names in the source.

Such a checkpoint has a config with a text config inside. If transformers has a class for its text
alone, that class is trained. For the others, the whole class is built, and the parts that text does
not pass through are removed. The text config alone would not do: in Mistral 3, for example, only
the outer config says that embedding and head are tied.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

SCALE = re.compile(r"\.(weight_scale_inv|weight_scale|activation_scale|input_scale)$")
"""Scales of FP8 weights and of their inputs (`dequantize`)."""
_NO_PART = re.compile(rf"{SCALE.pattern}|_(blocks|scales)$|\.weight\.|\.inv_freq$")
"""What belongs to quantized weights, and the rotary frequencies of old checkpoints."""
READ_BY_TEXT = {"gemma3n": ("embed_vision", "embed_audio")}
"""By model type: parts of a multimodal model whose sizes its code reads for text, too."""


def is_composite(config: PretrainedConfig) -> bool:
    """Whether the config is that of a multimodal model, with a text config inside."""
    return config.get_text_config() is not config


def is_tied(lm: PreTrainedModel) -> bool:
    """Whether embedding and head share one weight.

    The config does not tell it of every class: of a composite one, text config and outer config may
    differ.

    Args:
        lm: The causal LM, without adapters.
    """
    head: Any = lm.get_output_embeddings()
    embedding: Any = lm.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def class_names(config: PretrainedConfig) -> tuple[str, str]:
    """Returns the names of transformers' classes for a config.

    Returns:
        The class of the causal LM, and that of the model with image and text. Empty if there is
        none.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL,
    )

    causal = CAUSAL.get(config.model_type, "")
    multimodal = ""
    if is_composite(config) and not config.is_encoder_decoder:
        multimodal = MULTIMODAL.get(config.model_type, "")
    return causal, multimodal


def auto_class(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Returns transformers' auto class that loads the causal LM of a config.

    Args:
        config: Config of the checkpoint.
        trust_remote_code: Whether Python code that comes with the model may run.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal, multimodal = class_names(config)
    own_code = getattr(config, "auto_map", None) or {}
    has_own_class = trust_remote_code and "AutoModelForCausalLM" in own_code
    if causal or has_own_class or not multimodal:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def keep_text(lm: PreTrainedModel) -> None:
    """Removes towers and projectors from a multimodal model. A text model is left as it is.

    So is a class that does not have its decoder beside them, such as one that comes with the model.
    """
    if not is_composite(lm.config):
        return
    decoder = lm.get_decoder()
    inner = lm.base_model
    children = dict(inner.named_children())
    if inner is lm or not any(child is decoder for child in children.values()):
        return
    kept = READ_BY_TEXT.get(lm.config.model_type, ())
    for name, child in children.items():
        if child is not decoder and name not in kept:
            setattr(inner, name, None)


def source_of(lm: PreTrainedModel) -> Path | None:
    """Returns the multimodal checkpoint that the model was loaded from, None if it was another."""
    source = Path(lm.name_or_path or "")
    if not (source / "config.json").is_file():
        return None
    if not any((source / name).is_file() for name in (SINGLE_FILE, INDEX)):
        return None
    return source if is_composite(source_config(lm)) else None


def source_with_more(lm: PreTrainedModel) -> Path | None:
    """Returns the text checkpoint of a model that has weights which the model does not have.

    These are mostly layers for multi-token prediction, which transformers does not load.

    Args:
        lm: The causal LM, without adapters.

    Returns:
        The checkpoint. None if the model has all its weights, or one that is not in it.
    """
    source = Path(lm.name_or_path or "")
    if not any((source / name).is_file() for name in (SINGLE_FILE, INDEX)):
        return None
    found = names_in(lm, source)
    if not found.left_out:
        return None
    strangers = lm.state_dict().keys() - found.of_tensor.keys() - set(lm.all_tied_weights_keys)
    if not strangers:
        return source
    log.warning(
        "the export is without %s of %s, which also lacks a place for %s",
        _parts(found.left_out),
        source,
        min(strangers),
    )
    return None


def source_config(lm: PreTrainedModel) -> PretrainedConfig:
    """Returns the config of the directory that the model was loaded from."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(
        str(lm.name_or_path), trust_remote_code=is_remote(lm), local_files_only=True
    )
    return config


def is_remote(thing: Any) -> bool:
    """Whether this object's code came with the model. Then the user has agreed to run it."""
    return type(thing).__module__.partition(".")[0] == "transformers_modules"


def weight_files(source: Path) -> dict[str, list[str]]:
    """Returns the names of the tensors in each weight file that transformers would read.

    Args:
        source: A directory with `model.safetensors` or its index.
    """
    from safetensors import safe_open

    if (source / SINGLE_FILE).is_file():
        with safe_open(source / SINGLE_FILE, framework="pt") as file:
            return {SINGLE_FILE: list(file.keys())}
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    files: dict[str, list[str]] = defaultdict(list)
    for name, file_name in index["weight_map"].items():
        files[file_name].append(name)
    return dict(files)


@dataclass(frozen=True)
class SourceNames:
    """How the tensors of a model are named in its checkpoint."""

    of_tensor: Mapping[str, list[str]]
    """The names in the checkpoint by the name in the model's `state_dict()`. There are several if
    loading joins tensors, such as those of experts.
    """
    left_out: list[str]
    """The names in the checkpoint of tensors that the model does not have, without scales."""


def source_names(
    lm: PreTrainedModel, state: Mapping[str, Tensor], names: Iterable[str]
) -> SourceNames:
    """Finds which tensors of a checkpoint became which tensors of the model.

    transformers' own renaming is asked in the direction of loading. The reverse direction is not
    complete: prefixes are lost for models that were built without weights, and for Llama 4.

    Args:
        lm: The causal LM.
        state: Its tensors, by the names in `state_dict()`, which may be on the meta device.
        names: The names in the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    renamings: list[Any] = []
    converters = []
    for conversion in get_model_conversion_mapping(lm):
        if isinstance(conversion, WeightConverter):
            converters.append(conversion)
        else:
            renamings.append(conversion)
    of_tensor: dict[str, list[str]] = defaultdict(list)
    left_out = []
    own = dict(state)
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, lm.base_model_prefix, own)
        if target in state:
            of_tensor[target].append(name)
        elif not _NO_PART.search(name):
            left_out.append(name)
    return SourceNames(of_tensor, left_out)


def names_in(lm: PreTrainedModel, source: Path) -> SourceNames:
    """Finds which tensors of a checkpoint became which tensors of the model loaded from it.

    Args:
        lm: The causal LM.
        source: A directory with `model.safetensors` or its index.
    """
    names = []
    for found in weight_files(source).values():
        names += found
    return source_names(lm, lm.state_dict(), names)


def log_left_out(lm: PreTrainedModel, config: PretrainedConfig, source: Path) -> None:
    """Logs in one line which parts of a checkpoint are not trained.

    Args:
        lm: The causal LM that was loaded from it.
        config: The config of the checkpoint.
        source: The checkpoint.
    """
    left_out = names_in(lm, source).left_out
    if left_out:
        log.info(
            "the language model of the %s is trained; not loaded, and kept in exports: %s",
            (config.architectures or [config.model_type])[0],
            _parts(left_out),
        )


def _parts(names: Iterable[str]) -> str:
    """The parts of a model that some tensors are in, with their numbers."""
    texts = []
    for part, count in Counter(map(_part_of, names)).items():
        texts.append(f"{part} ({count} tensors)")
    return ", ".join(texts)


def _part_of(name: str) -> str:
    """The part of the model that a tensor is in: `model.visual`, `model.layers.61`, `mtp`."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return ".".join(parts[:3])
    return ".".join(parts[:2]) if parts[0] == "model" else parts[0]


def module_names(ours: PreTrainedModel, theirs: PreTrainedModel) -> dict[str, str]:
    """Returns the names of decoder and head in another class around the same language model.

    Args:
        ours: A causal LM.
        theirs: A model with the same decoder, which may be without weights.

    Returns:
        Names in `theirs` by names in `ours`.
    """
    names = {}
    for ends in (
        (ours.get_decoder(), theirs.get_decoder()),
        (ours.get_output_embeddings(), theirs.get_output_embeddings()),
    ):
        here, there = (
            _name_of(model, module) for model, module in zip((ours, theirs), ends, strict=True)
        )
        names[here] = there
    return names


def text_of(model: Any) -> Any:
    """Returns what computes the logits of text: the model, or the causal LM inside it.

    The forward pass of Llama 4 fails without an image.
    """
    decoder = model.get_decoder()
    return model if decoder.get_output_embeddings() is None else decoder


def _name_of(model: nn.Module, wanted: Any) -> str:
    [name] = [name for name, module in model.named_modules() if module is wanted]
    return name


def renamed(entries: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the entries whose module is named, under its new name.

    Args:
        entries: Anything by the name of a module or tensor.
        names: From `module_names`.
    """
    found = {}
    for name, value in entries.items():
        for old, new in names.items():
            if is_under(name, old):
                rest = name.removeprefix(old).lstrip(".")
                found[f"{new}.{rest}".strip(".")] = value
    return found


def is_under(name: str, module: str) -> bool:
    """Whether a module or tensor is the named module or within it. The model itself has no name."""
    return not module or f"{name}.".startswith(f"{module}.")


def multimodal_without_weights(lm: PreTrainedModel) -> PreTrainedModel | None:
    """Builds the class of the checkpoint that a model was loaded from, on the meta device.

    Returns:
        The model, or None if transformers has no class for images and text for it.
    """
    from transformers import AutoModelForImageTextToText

    if is_remote(lm) or not class_names(source_config(lm))[1]:
        return None
    return _on_meta(AutoModelForImageTextToText, source_config(lm))


def text_without_weights(lm: PreTrainedModel) -> PreTrainedModel | None:
    """Builds the plain text model of a language model on the meta device.

    Args:
        lm: The causal LM, whose class may be multimodal.

    Returns:
        The model, or None if transformers has no class for its text alone.
    """
    from transformers import AutoModelForCausalLM

    config: Any = copy.deepcopy(lm.config.get_text_config())
    causal, _ = class_names(config)
    if not causal:
        return None
    config.tie_word_embeddings = bool(lm.all_tied_weights_keys)
    return _on_meta(AutoModelForCausalLM, config, dtype=lm.dtype)


def _on_meta(factory: Any, config: PretrainedConfig, **arguments: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = factory.from_config(
            config, attn_implementation="eager", **arguments
        )
    return model
