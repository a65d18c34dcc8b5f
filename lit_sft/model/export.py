"""A trained model -> a Hugging Face directory, which transformers or peft load without lit_sft."""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_sft.errors import UserError
from lit_sft.files import sync_tree
from lit_sft.model import composite
from lit_sft.model.base_fingerprint import record_base
from lit_sft.model.composite_export import write_back
from lit_sft.model.config_files import change_config, complete_config
from lit_sft.model.lora.source_names import rename_for_source
from lit_sft.model.tokenizer_files import TokenizerChanges, default_template, write_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Only sampling reads these. `save_pretrained` refuses a greedy generation config that has them.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# These start values of adapters change the base weights, which then differ from those on disk.
_INIT_CHANGES_BASE = ("pissa", "olora")


@dataclass(frozen=True)
class ChatFormat:
    """What is exported beside the weights, so that others prompt the model as we do."""

    tokenizer: PreTrainedTokenizerBase
    """Written as its source has it, except for the chat template and the eos token."""
    stop_ids: Sequence[int]
    """Ids that end an answer. In `generation_config.json` they make transformers' `generate` stop
    where ours does.
    """
    chat_template: str | None = None
    """The chat template of the training. None for the tokenizer's own."""
    turn_end_ids: Collection[int] = ()
    """Ids that end the trained turns. If there is only one, it becomes the eos token."""
    source: Path | None = None
    """The directory that the tokenizer was loaded from. None if it was not loaded from files."""
    added_tokens: Sequence[str] = ()
    """Tokens that were added to those of the source."""

    @property
    def eos_token_id(self) -> int | None:
        """The eos token of the export: the token that ends every trained turn.

        It is the tokenizer's own if turns end in several tokens. It is also the tokenizer's own if
        the chat template writes `eos_token` somewhere, because another token would change what
        the template writes.
        """
        own = self.tokenizer.eos_token_id
        template = self.chat_template or default_template(self.tokenizer) or ""
        if len(self.turn_end_ids) != 1 or "eos_token" in template:
            return own
        [end] = self.turn_end_ids
        return end


@dataclass(frozen=True)
class AdapterBase:
    """The base that an exported adapter names in its config."""

    name_or_path: str
    """Hub id or directory."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""


def export_hf(
    model: PreTrainedModel | PeftModel,
    chat: ChatFormat,
    output_dir: str | Path,
    *,
    base: AdapterBase | None = None,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes weights or adapter, tokenizer, chat template and generation config, all or nothing.

    The directory is written under another name, and renamed when it is complete. An earlier export
    is replaced. If the base of an adapter exists nowhere else (random weights, or start values that
    changed it), it is written to `base/`. An adapter gets the fingerprint of its base.

    Args:
        model: The causal LM, or the `PeftModel` around it.
        chat: Tokenizer, chat template and stop tokens.
        output_dir: The directory to write.
        base: The base of an adapter. None if it exists nowhere else.
        source: The multimodal checkpoint that the model is the language model of, and that its
            weights are written back into. None writes a plain text model.
        dtype: Dtype of the written weights of a whole model. None keeps theirs.
        state_dict: If the weights are sharded, the full tensors, by the names in the causal LM's
            own `state_dict()`.
        check: Called with the directory. If it raises, the directory is removed and an earlier
            export restored.

    Raises:
        UserError: The directory holds something that must not be replaced.
    """
    target = Path(output_dir)
    lm = causal_lm(model)
    _check_target(target, lm.name_or_path if base is None else base.name_or_path)
    state = dict(lm.state_dict() if state_dict is None else state_dict)
    saved = _Saved(_generation_config(lm, chat), _new_eos(chat), dtype, source)
    with _replaced_when_complete(target, check) as staging:
        if not is_adapted(model):
            _save_model(lm, state, staging, saved)
        else:
            base_directory = Path(lm.name_or_path)
            if base is None or _init_changed_base(model):
                base_directory = staging / "base"
                _save_model(lm, _base_state(state), base_directory, replace(saved, dtype=None))
                _write_tokenizer(chat, base_directory)
                base = AdapterBase(str(target.absolute() / "base"))
            _save_adapter(model, state, staging, base)
            if source is not None:
                rename_for_source(model, staging)
            saved.generation_config.save_pretrained(staging)
            record_base(staging, base_directory)
        _write_tokenizer(chat, staging)
        # safetensors writes files that only their owner can read.
        for file in staging.rglob("*.safetensors"):
            shutil.copymode(staging / "generation_config.json", file)


@dataclass(frozen=True)
class _Saved:
    """What is written beside the weights of a whole model."""

    generation_config: GenerationConfig
    eos_token_id: int | None
    """The new eos token. None keeps that of the model."""
    dtype: torch.dtype | None
    """Dtype of the written weights. None keeps theirs."""
    source: Path | None
    """The multimodal checkpoint to write the weights back into. None writes a plain text model."""

    def cast(self, value: Tensor) -> Tensor:
        """Casts a tensor to the dtype in which it is written."""
        if self.dtype is None or not value.is_floating_point():
            return value
        return value.to(self.dtype)


def _new_eos(chat: ChatFormat) -> int | None:
    """The eos token that ends every trained turn, None if there is none; logs a change."""
    eos = chat.eos_token_id
    if eos is None or eos not in chat.turn_end_ids:
        return None
    if eos != chat.tokenizer.eos_token_id:
        others = [_token(chat, token_id) for token_id in chat.stop_ids if token_id != eos]
        log.info(
            "the eos token of the export is %s, which ends every trained turn;"
            " generation_config.json also stops at %s",
            _token(chat, eos),
            ", ".join(others),
        )
    return eos


def _token(chat: ChatFormat, token_id: int) -> str:
    """The text of a token."""
    return str(chat.tokenizer.convert_ids_to_tokens(token_id))


def _write_tokenizer(chat: ChatFormat, directory: Path) -> None:
    """Writes the tokenizer with the chat template and the eos token of the training."""
    eos = chat.eos_token_id
    eos_token = None
    if eos is not None and eos != chat.tokenizer.eos_token_id:
        eos_token = _token(chat, eos)
    changes = TokenizerChanges(chat.chat_template, eos_token, chat.added_tokens)
    write_tokenizer(chat.tokenizer, chat.source, changes, directory)


def is_adapted(model: Any) -> bool:
    """Whether this is a `PeftModel`."""
    # It does not ask for PeftModel, whose import takes seconds.
    from transformers import PreTrainedModel

    return not isinstance(model, PreTrainedModel)


def causal_lm(model: Any) -> Any:
    """Returns the causal LM: the model itself, or the one inside a `PeftModel`."""
    if is_adapted(model):
        return model.get_base_model()
    return model


def _peft_config(model: Any) -> Any:
    return model.peft_config["default"]


def _init_changed_base(model: Any) -> bool:
    """Whether the start values of the adapter changed the base weights."""
    return str(_peft_config(model).init_lora_weights).startswith(_INIT_CHANGES_BASE)


def _generation_config(lm: PreTrainedModel, chat: ChatFormat) -> GenerationConfig:
    """The model's generation config, with the stop and pad tokens of the chat format."""
    config: Any = copy.deepcopy(lm.generation_config)
    stops = [int(token_id) for token_id in chat.stop_ids]
    # The eos token comes first.
    stops.sort(key=lambda token_id: (token_id != chat.eos_token_id, token_id))
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    config.pad_token_id = chat.tokenizer.pad_token_id
    # transformers 4 would replace such a config by one from config.json, which has one stop token.
    config._from_model_config = False
    if not config.do_sample:
        for name in _SAMPLING:
            setattr(config, name, None)
    return config


def _save_model(lm: Any, state: dict[str, Tensor], directory: Path, saved: _Saved) -> None:
    """Writes a whole model.

    Args:
        lm: The causal LM. Its settings are changed while it is written.
        state: Its tensors.
        directory: The directory to write.
        saved: What is written beside the weights.
    """
    if saved.source is not None:
        _write_back(lm, state, saved.source, directory, saved)
        return
    if composite.is_composite(lm.config) or composite.source_of(lm) is not None:
        lm, state = _text_model(lm, state)
    config = lm.config.get_text_config()
    # Weights gathered from shards are copies, so transformers cannot detect that they are tied.
    left_out = lm.all_tied_weights_keys
    written = {}
    for name, value in state.items():
        if name not in left_out:
            written[name] = saved.cast(value)
    in_training = lm.generation_config, getattr(config, "use_cache", None)
    lm.generation_config = saved.generation_config
    config.use_cache = True
    # With a quantizer, transformers would ignore `state_dict`.
    quantizer = vars(lm).pop("hf_quantizer", None)
    try:
        lm.save_pretrained(directory, state_dict=written)
    finally:
        lm.generation_config, config.use_cache = in_training
        if quantizer is not None:
            lm.hf_quantizer = quantizer
    source = Path(lm.name_or_path) if lm.name_or_path else None
    dtype = None if saved.dtype is None else str(saved.dtype).removeprefix("torch.")
    complete_config(directory, source, dtype=dtype, eos_token_id=saved.eos_token_id)


def _write_back(
    lm: Any, state: dict[str, Tensor], source: Path, directory: Path, saved: _Saved
) -> None:
    """Writes the weights of a language model back into its multimodal checkpoint (see `source`)."""
    directory.mkdir(exist_ok=True)
    write_back(lm, state, source, directory, saved.cast)
    saved.generation_config.save_pretrained(directory)
    rows = lm.config.get_text_config().vocab_size
    has_new_rows = rows != composite.source_config(lm).get_text_config().vocab_size
    stored = saved.dtype or lm.get_input_embeddings().weight.dtype
    change_config(
        directory,
        source,
        dtype=str(stored).removeprefix("torch."),
        vocab_size=rows if has_new_rows else None,
        eos_token_id=saved.eos_token_id,
    )


def _text_model(lm: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Turns the language model of a multimodal checkpoint into the plain text model.

    Returns:
        The text model without weights, and its tensors. If transformers has no class for it, those
        that are given.
    """
    text = composite.text_without_weights(lm)
    if text is None:
        return lm, state
    text.name_or_path = lm.name_or_path
    renamed = composite.renamed(state, composite.module_names(lm, text))
    strangers = renamed.keys() ^ text.state_dict().keys()
    strangers -= set(text.all_tied_weights_keys)
    if strangers:
        raise UserError(
            f"{min(strangers)} is not in both the {type(lm).__name__} and the"
            f" {type(text).__name__}: export without --text_only"
        )
    return text, renamed


def _base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the base, by the names that they had before peft wrapped its layers."""
    of_adapter = (".lora_", ".modules_to_save.", ".trainable_tokens_")
    wrappers = re.compile(r"(\.(token_adapter\.base_layer|base_layer|original_module))+\.")
    base = {}
    for name, value in state.items():
        if not any(part in name for part in of_adapter):
            base[wrappers.sub(".", name)] = value
    return base


def _save_adapter(
    model: Any, state: Mapping[str, Tensor], directory: Path, base: AdapterBase
) -> None:
    """Writes the adapter weights, and a config that names the base."""
    config = _peft_config(model)
    before = config.base_model_name_or_path, config.init_lora_weights
    config.base_model_name_or_path = base.name_or_path
    config.revision = base.revision
    if _init_changed_base(model):
        # Otherwise loading the adapter would change the saved base again.
        config.init_lora_weights = True
    try:
        model.save_pretrained(
            str(directory),
            state_dict={f"base_model.model.{name}": value for name, value in state.items()},
            # The default `auto` would ask the hub for the base's config.
            save_embedding_layers=False,
        )
    finally:
        config.base_model_name_or_path, config.init_lora_weights = before


def _check_target(target: Path, source: str | None) -> None:
    """Refuses to replace the directory of the base, and directories that hold no model."""
    if source and Path(source).exists() and Path(source).resolve().is_relative_to(target.resolve()):
        raise UserError(
            f"the export would replace {target}, which holds the base model: set another output_dir"
        )
    if not target.exists():
        return
    holds_model = any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    is_replaceable = target.is_dir() and (holds_model or not any(target.iterdir()))
    if not is_replaceable:
        raise UserError(
            f"{target} exists and is no model directory, so it is not replaced: set another"
            " output_dir"
        )


@contextmanager
def _replaced_when_complete(target: Path, check: Callable[[Path], None] | None) -> Iterator[Path]:
    """Yields a directory beside `target`, which replaces it at the end.

    After an error, in the block or in `check`, the directory is removed and `target` is as before.
    """
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
