"""Model settings to the module that computes the loss: composes the model stages, in visible order."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from lit_sft.demo import builtin as demo
from lit_sft.errors import UserError
from lit_sft.hub import resolve
from lit_sft.model import (
    base_fingerprint,
    fused_layers,
    load,
    neftune,
    new_tokens,
    parallel,
    quantization,
    self_check,
    trainable,
)
from lit_sft.model.attention import packed
from lit_sft.model.attention.implementation import attention_of, set_attention
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.load import is_adapter_dir, load_adapter
from lit_sft.model.loss import CausalLMLoss
from lit_sft.ranks import broadcast_from_rank_zero

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BUILTIN = "builtin:"
ONE_THREAD_BELOW = 5_000_000
"""Parameters below which a CPU runs one thread. The demo (0.9 M) made 12,000 tokens/s on one thread and 16,000 on two
free cores, but under 1,000 on two busy ones: torch's threads wait for each other after every small product."""


def model_directory(name_or_path: str, revision: str | None = None) -> str:
    """A built-in model, a directory or a hub id as a local directory.

    Raises:
        UserError: It is not to be had.
    """
    if name_or_path.startswith(BUILTIN):
        return str(demo.model_dir(name_or_path.removeprefix(BUILTIN)))
    return resolve(name_or_path, revision=revision, allow_adapter=True)


def base_directory(path: str) -> str:
    """The model of an adapter directory (as `adapter_config.json` names it); any other directory itself.

    Raises:
        UserError: It is not to be had.
    """
    if not is_adapter_dir(path):
        return path
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    name = str(config.get("base_model_name_or_path"))
    own = Path(path) / "base"  # a base that was made by us; its path is no longer true where the directory was moved
    if not Path(name).exists() and own.is_dir():
        return str(own)
    if name.startswith(BUILTIN):
        return model_directory(name)
    return resolve(name, revision=config.get("revision"), key=f"{path}: base_model_name_or_path")


def tokenizer_directory(name_or_path: str, revision: str | None = None) -> str:
    """Where a model's tokenizer is: beside it, or beside the base of an adapter that has none."""
    path = model_directory(name_or_path, revision)
    return path if (Path(path) / "tokenizer_config.json").is_file() else base_directory(path)


def fingerprint(options: SimpleNamespace, precision: str, ckpt_path: str | None) -> dict[str, Any]:
    """What the answers of a model depend on, as plain values.

    Args:
        options: The arguments of `SFTModule`, by name.
        precision: `trainer.precision`.
        ckpt_path: Checkpoint whose weights are used, if any.
    """
    path = model_directory(options.model_name_or_path, options.revision)
    folders = {Path(path), Path(base_directory(path))}  # of an adapter, and of its base
    weights = [str(file) for folder in folders for kind in ("*.safetensors", "*.gguf") for file in folder.glob(kind)]
    files = [ckpt_path] if ckpt_path else sorted(weights)
    stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    names = "init dtype attn_implementation lora adapter_name_or_path quantization add_tokens generation seed".split()
    return {name: repr(getattr(options, name)) for name in names} | {
        "model": path,
        "files": stats,
        "precision": precision,
    }


def base_name(name_or_path: str) -> str:
    """What an adapter says it is an adapter of: the hub id, or the directory as an absolute path."""
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path


def is_adapted(options: SimpleNamespace) -> bool:
    """Whether the base is frozen and adapters are trained over it, new ones or those of a directory."""
    return options.lora is not None or options.adapter_name_or_path is not None


def refuse_adapter(options: SimpleNamespace) -> None:
    """Raises a UserError where an adapter directory is named in place of a model that is to be trained."""
    if is_adapter_dir(model_directory(options.model_name_or_path, options.revision)):
        raise UserError(
            f"model.model_name_or_path {options.model_name_or_path} holds an adapter: set it to the base (and "
            "model.adapter_name_or_path to the adapter, to go on training it)"
        )


def check_options(options: SimpleNamespace) -> None:
    """Refuses model settings that do not go together.

    Raises:
        UserError: Two of them exclude each other, or one needs another.
    """
    chosen = [name for name in ("lora", "adapter_name_or_path", "trainable") if getattr(options, name) is not None]
    if len(chosen) > 1:
        names = " and ".join(f"model.{name}" for name in chosen)
        brings = "; an adapter directory brings its own settings" if "adapter_name_or_path" in chosen else ""
        raise UserError(f"{names} exclude each other: set all but one of them to null{brings}")
    if options.add_tokens and options.adapter_name_or_path is not None:
        raise UserError("model.add_tokens and model.adapter_name_or_path exclude each other: set one of them to null")
    if options.quantization is None:
        return
    if not is_adapted(options):
        raise UserError(
            f"model.quantization {options.quantization} freezes the weights, so nothing would be trained: set "
            "model.lora as well, or model.quantization to null"
        )
    if options.init == "random":
        raise UserError("model.quantization is for pretrained weights: set model.init to pretrained, or it to null")
    if options.lora is not None and str(options.lora.init_lora_weights).startswith(("pissa", "olora")):
        raise UserError(
            f"model.lora.init_lora_weights {options.lora.init_lora_weights} takes its start values out of the base, "
            "which model.quantization has rounded to 4 bits: set one of them to its default"
        )


def stored_dtype(dtype: str, precision: str, lora: bool) -> torch.dtype:
    """The type that weights are stored in.

    fp32 where they are trained: in bf16, AdamW at SFT rates moved 16 % of the parameters in 200 steps, in fp32 all.

    Args:
        dtype: `model.dtype`.
        precision: `trainer.precision`.
        lora: Whether the weights are the frozen base of an adapter.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.split("-")[0], torch.float32)
    if precision.endswith("-true") and half != torch.float32 and not lora:  # adapters stay in fp32
        mixed = precision.replace("-true", "-mixed")
        log.warning("trainer.precision %s rounds most updates of trained weights away; %s keeps them", precision, mixed)
    return half if lora or precision.endswith("-true") else torch.float32


def build_model(
    options: SimpleNamespace, precision: str, *, sharded: bool = False
) -> tuple[CausalLMLoss, PeftModel | None]:
    """Loads the model; then in this order: new tokens, adapters or freezing, checks, noise, checkpointing, compile.

    Sharding comes after it, by the strategy. With `sharded` only rank 0 has weights; the others build the same modules
    on the meta device, and sharding fills them: no other rank ever holds the whole model.

    Args:
        options: The arguments of `SFTModule`, by name.
        precision: `trainer.precision`.
        sharded: Whether the ranks of the process group will share the weights.

    Returns:
        The loss module in training mode, and peft's wrapper around the same layers where there is an adapter.

    Raises:
        UserError: The model is not to be had, or does not fit the options.
    """
    if not sharded:
        return _build(options, precision)
    is_rank_zero = torch.distributed.get_rank() == 0
    try:
        model, adapter = _build(options, precision, on_meta=not is_rank_zero)
    except Exception as error:
        if is_rank_zero:  # the others must not wait for weights
            broadcast_from_rank_zero(str(error))
        raise
    lm = model.lm
    attends = attention_of(lm)
    facts = broadcast_from_rank_zero(
        (model.own_logits, model.separate_rows, model.fused, lm.generation_config, attends)
    )
    if isinstance(facts, str):
        raise UserError(f"rank 0: {facts}")
    model.own_logits, model.separate_rows, model.fused, lm.generation_config, attends = facts
    set_attention(lm, attends)
    if not is_rank_zero:
        fused_layers.fuse_blocks(model.lm, model.fused)
    parallel.follow_rank_zero(model)
    return model, adapter


def _build(options: SimpleNamespace, precision: str, on_meta: bool = False) -> tuple[CausalLMLoss, PeftModel | None]:
    named = model_directory(options.model_name_or_path, options.revision)
    path = base_directory(named)
    if options.trust_remote_code:
        log.warning("model.trust_remote_code: Python code that comes with %s may run", options.model_name_or_path)
    config = load.load_config(path, trust_remote_code=options.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None and options.quantization is None:
        raise UserError(f"{path} holds quantized weights: set model.quantization to nf4, or use the model as it was")
    dtype = stored_dtype(options.dtype, precision, is_adapted(options) or path != named)
    lm = load.load_model(
        path,
        init=options.init,
        dtype=dtype,
        attn_implementation=packed.choose(config, options.attn_implementation),
        trust_remote_code=options.trust_remote_code,
        seed=options.seed,
        quantization_config=None if options.quantization is None else quantization.nf4(dtype),
        on_meta=on_meta,
    )
    adapter = choose_trained(lm, path, options, on_meta) if path == named else _evaluated_adapter(lm, named, options)
    total, trained = lm.num_parameters(), lm.num_parameters(only_trainable=True)
    if total < ONE_THREAD_BELOW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    model = CausalLMLoss(lm, options.loss)
    if not on_meta:
        check(model)
    log.info(
        f"model: {type(lm).__name__}, {total / 1e6:,.1f} M parameters in "
        f"{options.quantization or str(lm.dtype).removeprefix('torch.')}, "
        f"{trained / total:.1%} trained, attention {attention_of(lm)}"
    )
    if options.neftune_noise_alpha is not None:
        neftune.apply_neftune(model, lm.get_input_embeddings(), options.neftune_noise_alpha)
    if options.gradient_checkpointing:
        parallel.apply_gradient_checkpointing(lm, selective=options.gradient_checkpointing == "selective")
    if options.compile:
        parallel.apply_compile(lm)
    return model.train(), adapter


def check(model: CausalLMLoss) -> None:
    """Compares our ways with the model's own on a few tokens; where they differ, its own are used, with a warning.

    Raises:
        UserError: The model is not causal.
    """
    lm, lost, chosen = model.lm, None, attention_of(model.lm)
    if is_foreign := chosen not in (packed.PACKED, "eager", "sdpa"):  # it may know 16 bits only, on a GPU only
        set_attention(lm, "eager")
    if chosen == packed.PACKED and (lost := self_check.what_is_lost(lm)):
        log.warning("%s needs %s: attention falls back to `eager`, exact but slower", type(lm).__name__, lost)
        set_attention(lm, "eager")
    if not self_check.is_causal(lm):
        cure = "take a causal language model, or set is_decoder to true in its config.json if it has that key"
        raise UserError(f"{type(lm).__name__} lets tokens see those that follow: {cure}")
    model.check_head()
    model.fused = fused_layers.fuse_blocks(lm)
    # a window that is in the mask only may be cut at places of the row, not of the example
    model.separate_rows = lost is not None or not self_check.packs_are_exact(lm)
    if model.separate_rows:
        log.warning("%s: each example gets a padded row of its own, exact but slower than packs", type(lm).__name__)
        if attention_of(lm) == packed.PACKED:  # which makes no masks
            set_attention(lm, "sdpa")
    if is_foreign:
        set_attention(lm, chosen)


def _evaluated_adapter(lm: PreTrainedModel, folder: str, options: SimpleNamespace) -> PeftModel:
    """The adapter directory that was named in place of a model: for answers and scores, not to be trained."""
    if is_adapted(options) or options.trainable is not None:
        refuse_adapter(options)
    base_fingerprint.check_recorded_base(
        Path(folder), base_fingerprint.base_of(lm, options.init, options.seed), str(lm.name_or_path)
    )
    load.read_generation_config(lm, folder)
    return load_adapter(lm, folder)


def choose_trained(lm: PreTrainedModel, path: str, options: SimpleNamespace, on_meta: bool) -> PeftModel | None:
    """Makes room for new tokens; then decides what is trained: adapters, which are returned, a part, or all."""
    new_ids: list[int] = []
    if options.add_tokens:
        tokenizer = load.load_tokenizer(path, trust_remote_code=options.trust_remote_code)
        new_ids = new_tokens.add_tokens(tokenizer, options.add_tokens)
        new_tokens.make_room(lm, new_ids)
    if options.lora is not None:
        # start values that decompose the weights need weights; rank 0 has both
        lora = replace(options.lora, init_lora_weights=True) if on_meta else options.lora
        return apply_lora(lm, lora, new_token_ids=new_ids, seed=options.seed)
    if options.adapter_name_or_path is not None:
        folder = resolve(options.adapter_name_or_path, key="model.adapter_name_or_path", allow_adapter=True)
        log.info("adapter: goes on from %s", options.adapter_name_or_path)
        name, base = options.model_name_or_path, base_fingerprint.base_of(lm, options.init, options.seed)
        is_proved = base_fingerprint.check_recorded_base(Path(folder), base, name)
        return load_adapter(lm, folder, base_name=None if is_proved else name, trainable=True)
    if options.trainable is not None:
        trainable.set_trainable(lm, options.trainable)
        ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
        if new_ids and not all(end.weight.requires_grad for end in ends):
            raise UserError(
                "model.add_tokens: the new tokens would not be trained; model.trainable must match the embedding and "
                "the head, by embed_tokens and lm_head in most models"
            )
    else:
        trainable.freeze_unread(lm)
    return None
