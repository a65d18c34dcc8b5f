"""A trained model -> a plain Hugging Face directory that transformers (or peft) loads without
us.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_sft.errors import UserError
from lit_sft.files import sync_tree
from lit_sft.model.base_fingerprint import record_base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# What only sampling reads; `save_pretrained` refuses a greedy generation config that has them.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# These start values are taken out of the base weights, which are then no longer those the adapter's
# base has on disk.
_INIT_CHANGES_BASE = ("pissa", "olora")


@dataclass(frozen=True)
class ChatFormat:
    """How an exported model is talked to: what is written beside its weights."""

    tokenizer: PreTrainedTokenizerBase
    """Written as it is, but for the template."""
    stop_ids: Sequence[int]
    """Ids that end an answer, for `generation_config.json`: plain `generate` then stops where ours
    does.
    """
    chat_template: str | None = None
    """The template of the training; None for the tokenizer's own."""


@dataclass(frozen=True)
class AdapterBase:
    """Where whoever loads an exported adapter finds its base."""

    name_or_path: str
    """Hub id or directory."""
    revision: str | None = None
    """Of a hub id."""


def export_hf(
    model: PreTrainedModel | PeftModel,
    chat: ChatFormat,
    output_dir: str | Path,
    *,
    base: AdapterBase | None = None,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes weights (or an adapter), tokenizer, chat template and generation config; all of it or
    nothing.

    The directory is written under another name and renamed when it is complete; an earlier export
    is replaced. Where the base of an adapter is nowhere else (random init, or start values that
    changed it), it is written to `base/`. An adapter gets the fingerprint of its base.

    Args:
        model: The causal LM, or the adapted model around it.
        chat: Tokenizer, chat template and stop tokens.
        output_dir: Where to.
        base: The base of an adapter; None where it was made here.
        dtype: Type of the written weights of a whole model; None keeps theirs.
        state_dict: Full tensors by the names of the causal LM's own `state_dict()`, where the
            weights are sharded.
        check: Called with the directory; if it raises, the directory goes and an earlier export is
            back.

    Raises:
        UserError: If the directory holds something that must not be replaced.
    """
    target = Path(output_dir)
    lm = causal_lm(model)
    _check_target(target, lm.name_or_path if base is None else base.name_or_path)
    state = dict(lm.state_dict() if state_dict is None else state_dict)
    settings = _generation_config(lm, chat)
    tokenizer = copy.deepcopy(chat.tokenizer)
    if chat.chat_template is not None:
        tokenizer.chat_template = chat.chat_template
    with _replaced_when_complete(target, check) as staging:
        if not is_adapted(model):
            _save_model(lm, state, staging, settings, dtype)
        else:
            base_directory = Path(lm.name_or_path)
            if base is None or _start_changed_base(model):
                base_directory = staging / "base"
                _save_model(lm, _base_state(state), base_directory, settings, None)
                tokenizer.save_pretrained(base_directory)
                base = AdapterBase(str(target.absolute() / "base"))
            _save_adapter(model, state, staging, base)
            settings.save_pretrained(staging)
            record_base(staging, base_directory)
        tokenizer.save_pretrained(staging)
        # safetensors writes files that only their owner can read.
        for file in staging.rglob("*.safetensors"):
            shutil.copymode(staging / "generation_config.json", file)


def is_adapted(model: Any) -> bool:
    """Whether this is peft's wrapper around a model."""
    # And not PeftModel, whose import takes seconds.
    from transformers import PreTrainedModel

    return not isinstance(model, PreTrainedModel)


def causal_lm(model: Any) -> Any:
    """The causal LM: the model itself, or the one that adapters were put into."""
    return model.get_base_model() if is_adapted(model) else model


def _peft_config(model: Any) -> Any:
    return model.peft_config["default"]


def _start_changed_base(model: Any) -> bool:
    return str(_peft_config(model).init_lora_weights).startswith(_INIT_CHANGES_BASE)


def _generation_config(lm: PreTrainedModel, chat: ChatFormat) -> GenerationConfig:
    config: Any = copy.deepcopy(lm.generation_config)
    stops = [int(token_id) for token_id in chat.stop_ids]
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    config.pad_token_id = chat.tokenizer.pad_token_id
    if not config.do_sample:
        for name in _SAMPLING:
            setattr(config, name, None)
    return config


def _save_model(
    lm: Any,
    state: dict[str, Tensor],
    directory: Path,
    settings: GenerationConfig,
    dtype: torch.dtype | None,
) -> None:
    # Weights gathered from shards are copies, in which transformers cannot see that they are tied.
    if lm.config.get_text_config().tie_word_embeddings:
        state = {
            name: value for name, value in state.items() if name not in lm.all_tied_weights_keys
        }
    if dtype is not None:
        state = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in state.items()
        }
    config = lm.config.get_text_config()
    in_training = lm.generation_config, getattr(config, "use_cache", None)
    lm.generation_config, config.use_cache = settings, True
    # With it, transformers would not look at `state_dict`.
    quantizer = vars(lm).pop("hf_quantizer", None)
    try:
        lm.save_pretrained(directory, state_dict=state)
    finally:
        lm.generation_config, config.use_cache = in_training
        if quantizer is not None:
            lm.hf_quantizer = quantizer
    if dtype is not None:
        written = json.loads((directory / "config.json").read_text())
        written["dtype"] = str(dtype).removeprefix("torch.")
        (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def _base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's own tensors, under the names they had before adapters were put around its
    layers.
    """
    added = (".lora_", ".modules_to_save.", ".trainable_tokens_")
    own = {name: value for name, value in state.items() if not any(part in name for part in added)}
    return {
        re.sub(r"\.(token_adapter\.base_layer|base_layer|original_module)\.", ".", name): own[name]
        for name in own
    }


def _save_adapter(
    model: Any, state: Mapping[str, Tensor], directory: Path, base: AdapterBase
) -> None:
    config = _peft_config(model)
    before = config.base_model_name_or_path, config.init_lora_weights
    config.base_model_name_or_path = base.name_or_path
    config.revision = base.revision
    if _start_changed_base(model):
        # Otherwise loading would change the saved base once more.
        config.init_lora_weights = True
    try:
        model.save_pretrained(
            str(directory),
            state_dict={f"base_model.model.{name}": value for name, value in state.items()},
            # `auto` asks the hub for the base's config.
            save_embedding_layers=False,
        )
    finally:
        config.base_model_name_or_path, config.init_lora_weights = before


def _check_target(target: Path, source: str | None) -> None:
    """Refuses to replace the directory that the model came from, and directories that hold no
    model.
    """
    if source and Path(source).exists() and Path(source).resolve().is_relative_to(target.resolve()):
        raise UserError(
            f"the export would replace {target}, which holds the base model: set another output_dir"
        )
    ours = any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not (target.is_dir() and (ours or not any(target.iterdir()))):
        raise UserError(
            f"{target} exists and is no model directory, so it is not replaced: set another"
            " output_dir"
        )


@contextmanager
def _replaced_when_complete(target: Path, check: Callable[[Path], None] | None) -> Iterator[Path]:
    """A directory beside `target` that takes its place at the end, or vanishes after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    new.mkdir()
    try:
        yield new
        sync_tree(new)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        try:
            if check is not None:
                check(target)
        except BaseException:
            os.rename(target, new)
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
