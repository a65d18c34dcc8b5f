"""A trained model -> a plain Hugging Face directory that transformers (or peft) loads without us."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_sft.errors import UserError
from lit_sft.model.evaluation_mode import evaluation_mode
from lit_sft.model.random_state import own_random_state

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# What only sampling reads; `save_pretrained` refuses a greedy generation config that has them.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# These start values are taken out of the base weights, which are then no longer those the adapter's base has on disk.
_INIT_CHANGES_BASE = ("pissa", "olora")


def export_hf(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    stop_ids: Sequence[int],
    chat_template: str | None = None,
    base_name_or_path: str | None = None,
    base_revision: str | None = None,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    check: Callable[[Path], None] | None = None,
    record_base: Callable[[Path, Path], None] | None = None,
) -> None:
    """Writes weights (or an adapter), tokenizer, chat template and generation config; all of it or nothing.

    The directory is written under another name and renamed when it is complete; an earlier export is replaced. Where
    the base of an adapter is nowhere else (random init, or start values that changed it), it is written to `base/`.

    Args:
        model: The causal LM, or the adapted model around it.
        tokenizer: Written as it is, but for the template.
        output_dir: Where to.
        stop_ids: What ends an answer, for `generation_config.json`: plain `generate` then stops where ours does.
        chat_template: The template of the training; None for the tokenizer's own.
        base_name_or_path: Of an adapter: hub id or directory of the base; None where it was made here.
        base_revision: Of that hub id.
        dtype: Type of the written weights of a whole model; None keeps theirs.
        state_dict: Full tensors by the names of the causal LM's own `state_dict()`, where the weights are sharded.
        check: Called with the directory; if it raises, the directory goes and an earlier export is back.
        record_base: Called with the directory of an adapter and that of its base, once both are written.

    Raises:
        UserError: If the directory holds something that must not be replaced.
    """
    target, adapted, lm = Path(output_dir), _is_adapted(model), _causal_lm(model)
    _check_target(target, [base_name_or_path or lm.name_or_path])
    state = dict(lm.state_dict() if state_dict is None else state_dict)
    settings = _generation_config(lm, tokenizer, stop_ids)
    tokenizer = copy.deepcopy(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with _replaced_when_complete(target, check) as staging:
        if adapted:
            base, start = Path(lm.name_or_path), str(_peft_config(model).init_lora_weights)
            if base_name_or_path is None or start.startswith(_INIT_CHANGES_BASE):
                base = staging / "base"
                _save_model(lm, _base_state(state), base, settings, None)
                tokenizer.save_pretrained(base)
                base_name_or_path, base_revision = str(target.absolute() / "base"), None
            _save_adapter(model, state, staging, base_name_or_path, base_revision)
            settings.save_pretrained(staging)
            if record_base is not None:
                record_base(staging, base)
        else:
            _save_model(lm, state, staging, settings, dtype)
        tokenizer.save_pretrained(staging)
        for file in staging.rglob("*.safetensors"):  # which would be readable by their owner alone
            shutil.copymode(staging / "generation_config.json", file)


@torch.no_grad()
def verify_export(
    output_dir: str | Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    probe_ids: Sequence[Sequence[int]],
) -> None:
    """Loads the export as anybody would and compares its logits and greedy answers to those of the model.

    Args:
        output_dir: What `export_hf` wrote.
        model: The model in memory, not sharded.
        tokenizer: Its tokenizer.
        probe_ids: Prompts as token ids.

    Raises:
        UserError: If they differ by more than rounding.
    """
    from transformers import AutoTokenizer

    reloaded, dtype = _reload(Path(output_dir), model), _stored_dtype(model)
    exact = dtype == _stored_dtype(reloaded)
    limit = 0.05 if not exact else 1e-5 if dtype == torch.float32 else 0.02
    stops = json.loads((Path(output_dir) / "generation_config.json").read_text()).get("eos_token_id")
    with evaluation_mode(model):
        for ids in probe_ids:
            prompt = torch.tensor([list(ids)], device=model.device)
            expected, found = (m(input_ids=prompt).logits.float() for m in (model, reloaded))
            error = float((found - expected).abs().max() / expected.abs().max())
            equal = torch.equal(found, expected)
            if not error <= limit:
                raise _not_equal(f"the logits of the export {output_dir} are off by {error:.2g} of their size")
            # In 16 bits the two most likely tokens can be too close to call, unless not a bit differs.
            is_close_call = not (equal or exact and dtype == torch.float32)
            if not is_close_call and _greedy(model, prompt, stops) != _greedy(reloaded, prompt, stops):
                raise _not_equal(f"the answers of the export {output_dir} differ from those of the model")
    text = tokenizer.decode(list(probe_ids[0]))
    load: Any = partial(AutoTokenizer.from_pretrained, trust_remote_code=_is_remote(tokenizer))
    if load(output_dir, local_files_only=True)(text).input_ids != tokenizer(text).input_ids:
        raise _not_equal(f"the tokenizer of the export {output_dir} differs from that of the model")


def _not_equal(what: str) -> UserError:
    return UserError(f"{what}: nothing was exported; report it with the model's name")


def _is_remote(thing: Any) -> bool:
    """Whether it runs code that came with its files, to which the user has agreed then."""
    return type(thing).__module__.partition(".")[0] == "transformers_modules"


def _is_adapted(model: Any) -> bool:
    from transformers import PreTrainedModel  # and not PeftModel, whose import takes seconds

    return not isinstance(model, PreTrainedModel)


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if _is_adapted(model) else model


def _peft_config(model: Any) -> Any:
    return model.peft_config["default"]


def _stored_dtype(model: Any) -> torch.dtype:
    """Of the base, where adapters of another type lie over it."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    return next(frozen, model.dtype)  # type: ignore[no-any-return]


def _greedy(model: Any, prompt: Tensor, stops: int | list[int] | None) -> list[int]:
    lm = _causal_lm(model)
    options: dict[str, Any] = dict(max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=stops)
    return lm.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()  # type: ignore[no-any-return]


def _generation_config(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> GenerationConfig:
    config: Any = copy.deepcopy(lm.generation_config)
    stops = [int(token_id) for token_id in stop_ids]
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:
        for name in _SAMPLING:
            setattr(config, name, None)
    return config


def _save_model(
    lm: Any, state: dict[str, Tensor], directory: Path, settings: GenerationConfig, dtype: torch.dtype | None
) -> None:
    # Weights gathered from shards are copies, in which transformers cannot see that they are tied.
    if lm.config.get_text_config().tie_word_embeddings:
        state = {name: value for name, value in state.items() if name not in lm.all_tied_weights_keys}
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    config = lm.config.get_text_config()
    in_training = lm.generation_config, getattr(config, "use_cache", None)
    lm.generation_config, config.use_cache = settings, True
    quantizer = vars(lm).pop("hf_quantizer", None)  # with it, transformers would not look at `state_dict`
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
    """The base's own tensors, under the names they had before adapters were put around its layers."""
    added = (".lora_", ".modules_to_save.", ".trainable_tokens_")
    own = {name: value for name, value in state.items() if not any(part in name for part in added)}
    return {re.sub(r"\.(token_adapter\.base_layer|base_layer|original_module)\.", ".", name): own[name] for name in own}


def _save_adapter(model: Any, state: Mapping[str, Tensor], directory: Path, base: str, revision: str | None) -> None:
    config = _peft_config(model)
    before = config.base_model_name_or_path, config.init_lora_weights
    config.base_model_name_or_path, config.revision = base, revision
    if str(config.init_lora_weights).startswith(_INIT_CHANGES_BASE):
        config.init_lora_weights = True  # or loading would change the saved base once more
    try:
        model.save_pretrained(
            str(directory),
            state_dict={f"base_model.model.{name}": value for name, value in state.items()},
            save_embedding_layers=False,  # `auto` asks the hub for the base's config
        )
    finally:
        config.base_model_name_or_path, config.init_lora_weights = before


def _check_target(target: Path, sources: Sequence[str | None]) -> None:
    for source in sources:
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(target.resolve()):
            raise UserError(f"the export would replace {target}, which holds the base model: set another output_dir")
    ours = any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not (target.is_dir() and (ours or not any(target.iterdir()))):
        raise UserError(f"{target} exists and is no model directory, so it is not replaced: set another output_dir")


@contextmanager
def _replaced_when_complete(target: Path, check: Callable[[Path], None] | None) -> Iterator[Path]:
    """A directory beside `target` that takes its place at the end, or vanishes after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    new.mkdir()
    try:
        yield new
        _sync(new)
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


def _sync(directory: Path) -> None:
    """Puts all of it on disk, before it takes the place of what was there."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _reload(directory: Path, model: PreTrainedModel | PeftModel) -> Any:
    from transformers import AutoModelForCausalLM

    load: Any = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=_is_remote(_causal_lm(model)))
    # peft draws random numbers before it loads the right ones
    with own_random_state(devices=[model.device]):
        if not _is_adapted(model):
            return load(directory, dtype="auto", local_files_only=True).to(model.device)
        from peft import PeftConfig, PeftModel

        config: Any = PeftConfig.from_pretrained(str(directory))
        quantized = getattr(model.config, "quantization_config", None)
        options: dict[str, Any] = (
            {} if quantized is None else {"quantization_config": quantized, "device_map": {"": "cpu"}}
        )
        options |= {"revision": config.revision, "dtype": _stored_dtype(model), "local_files_only": True}
        base = load(config.base_model_name_or_path, **options)
        return PeftModel.from_pretrained(base, str(directory)).to(model.device).eval()
