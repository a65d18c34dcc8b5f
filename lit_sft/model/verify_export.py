"""Reloads an export with transformers or peft, and compares it with the model in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_sft.errors import UserError
from lit_sft.model.composite import auto_class, class_names, is_remote, text_of
from lit_sft.model.dequantize import (
    is_dequantized,
    loading_arguments,
    whole_and_partial_blocks,
)
from lit_sft.model.evaluation_mode import evaluation_mode
from lit_sft.model.experts import has_experts
from lit_sft.model.export import causal_lm, is_adapted
from lit_sft.model.lora.merge import merge_error
from lit_sft.model.quantization import quantize_loaded
from lit_sft.model.random_state import own_random_state

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def verify_export(
    output_dir: str | Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    probe_ids: Sequence[Sequence[int]],
) -> None:
    """Compares logits, greedy answers and tokenizer of an export with those of the model.

    Args:
        output_dir: The directory that `export_hf` wrote.
        model: The model in memory, not sharded.
        tokenizer: The tokenizer of the model.
        probe_ids: Prompts as token ids.

    Raises:
        UserError: They differ by more than rounding.
    """
    reloaded = _reload(Path(output_dir), model)
    settings = json.loads((Path(output_dir) / "generation_config.json").read_text())
    stops = settings.get("eos_token_id")
    with evaluation_mode(model):
        for ids in probe_ids:
            prompt = torch.tensor([list(ids)], device=model.device)
            answers_may_differ = _check_logits(output_dir, model, reloaded, prompt)
            if answers_may_differ:
                continue
            if _greedy(model, prompt, stops) != _greedy(reloaded, prompt, stops):
                raise _not_equal(
                    f"the answers of the export {output_dir} differ from those of the model"
                )
    _check_tokenizer(output_dir, tokenizer, probe_ids[0])


def _check_logits(output_dir: str | Path, model: Any, reloaded: Any, prompt: Tensor) -> bool:
    """Compares the logits for a prompt.

    Returns:
        Whether rounding may change which token is the most likely. In 16 bits it may, unless the
        logits are equal bit for bit.

    Raises:
        UserError: They differ by more than rounding.
    """
    dtype = _stored_dtype(model)
    is_stored_alike = dtype == _stored_dtype(reloaded)
    if not is_stored_alike:
        limit = 0.05
    elif dtype == torch.float32:
        limit = 1e-5
    else:
        limit = 0.02
    expected = model(input_ids=prompt).logits
    found = text_of(causal_lm(reloaded))(input_ids=prompt).logits
    is_fp32 = is_stored_alike and dtype == torch.float32
    error = merge_error(expected, found, is_routed=not is_fp32 and has_experts(model))
    # Also refuses NaN.
    if not error <= limit:
        raise _not_equal(
            f"the logits of the export {output_dir} are off by {error:.2g} of their size"
        )
    return not is_fp32 and not torch.equal(found.float(), expected.float())


def _check_tokenizer(
    output_dir: str | Path, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> None:
    from transformers import AutoTokenizer

    load: Any = partial(AutoTokenizer.from_pretrained, trust_remote_code=is_remote(tokenizer))
    text = tokenizer.decode(list(ids))
    if load(output_dir, local_files_only=True)(text).input_ids != tokenizer(text).input_ids:
        raise _not_equal(f"the tokenizer of the export {output_dir} differs from that of the model")


def _not_equal(what: str) -> UserError:
    return UserError(f"{what}: nothing was exported; report it with the model's name")


def _stored_dtype(model: Any) -> torch.dtype:
    """The dtype of the stored weights. With adapters, that of the frozen base."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    return next(frozen, model.dtype)  # type: ignore[no-any-return]


def _greedy(model: Any, prompt: Tensor, stops: int | list[int] | None) -> list[int]:
    """The prompt and its greedy completion, as token ids."""
    output = text_of(causal_lm(model)).generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=stops,
    )
    return output[0].tolist()  # type: ignore[no-any-return]


def _reload(directory: Path, model: PreTrainedModel | PeftModel) -> Any:
    """Loads the export with transformers or peft only."""
    options: dict[str, Any] = {
        "trust_remote_code": is_remote(causal_lm(model)),
        "local_files_only": True,
    }
    # peft draws random start values before it loads the stored ones.
    with own_random_state(devices=[model.device]):
        if not is_adapted(model):
            loaded = _load(str(directory), options | {"dtype": "auto"}, is_base=False)
            return loaded.to(model.device)
        from peft import PeftConfig, PeftModel

        config: Any = PeftConfig.from_pretrained(str(directory))
        base = _reload_base(config, options, model)
        return PeftModel.from_pretrained(base, str(directory)).to(model.device).eval()


def _reload_base(adapter: Any, options: dict[str, Any], model: Any) -> Any:
    """Loads the base that the config of an adapter names, quantized as that of the model."""
    name = adapter.base_model_name_or_path
    options = options | {"revision": adapter.revision, "dtype": _stored_dtype(model)}
    source = _config_of(name, options)
    quantized: Any = getattr(model.config, "quantization_config", None)
    if quantized is None or is_dequantized(source):
        options |= loading_arguments(source)
    else:
        options |= {"quantization_config": quantized, "device_map": {"": "cpu"}}
    with whole_and_partial_blocks(name):
        base = _load(name, options, is_base=True)
    if quantized is not None and is_dequantized(source):
        quantize_loaded(base, quantized)
    return base


def _load(name: str, options: dict[str, Any], *, is_base: bool) -> Any:
    """Loads a model.

    Args:
        name: Directory or hub id.
        options: Arguments of `from_pretrained`.
        is_base: Whether it is the base of an adapter. Over a multimodal checkpoint, servers and
            peft look for its modules in the multimodal class.
    """
    from transformers import AutoModelForImageTextToText

    config = _config_of(name, options)
    factory = auto_class(config, trust_remote_code=options["trust_remote_code"])
    if is_base and class_names(config)[1]:
        factory = AutoModelForImageTextToText
    return factory.from_pretrained(name, **options)


def _config_of(name: str, options: dict[str, Any]) -> Any:
    """Loads the config of a model with those of the options that say where it is."""
    from transformers import AutoConfig

    places = ("trust_remote_code", "local_files_only", "revision")
    return AutoConfig.from_pretrained(
        name, **{key: options[key] for key in places if key in options}
    )
