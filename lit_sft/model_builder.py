"""Model settings to the module that computes the loss: composes the model stages, in visible
order.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from lit_sft.settings import ModelConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BUILTIN = "builtin:"
ONE_THREAD_BELOW = 5_000_000
"""Parameters below which a CPU runs one thread. The demo (0.9 M) made 12,000 tokens/s on one thread
and 16,000 on two free cores, but under 1,000 on two busy ones: torch's threads wait for each other
after every small product.
"""


def model_directory(name_or_path: str, revision: str | None = None) -> str:
    """A built-in model, a directory or a hub id as a local directory.

    Raises:
        UserError: It is not to be had.
    """
    if name_or_path.startswith(BUILTIN):
        return str(demo.model_dir(name_or_path.removeprefix(BUILTIN)))
    return resolve(name_or_path, revision=revision, allow_adapter=True)


def base_directory(path: str) -> str:
    """The model of an adapter directory (as `adapter_config.json` names it); any other directory
    itself.

    Raises:
        UserError: It is not to be had.
    """
    if not is_adapter_dir(path):
        return path
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    name = str(config.get("base_model_name_or_path"))
    # A base that was made by us; its path is no longer true where the directory was moved.
    own = Path(path) / "base"
    if not Path(name).exists() and own.is_dir():
        return str(own)
    if name.startswith(BUILTIN):
        return model_directory(name)
    return resolve(name, revision=config.get("revision"), key=f"{path}: base_model_name_or_path")


def tokenizer_directory(name_or_path: str, revision: str | None = None) -> str:
    """Where a model's tokenizer is: beside it, or beside the base of an adapter that has none."""
    path = model_directory(name_or_path, revision)
    return path if (Path(path) / "tokenizer_config.json").is_file() else base_directory(path)


FINGERPRINTED = (
    "init",
    "dtype",
    "attn_implementation",
    "lora",
    "adapter_name_or_path",
    "quantization",
    "add_tokens",
    "generation",
    "seed",
)
"""Settings that change the answers of a model, besides its files and the precision."""


def fingerprint(options: ModelConfig, precision: str, ckpt_path: str | None) -> dict[str, Any]:
    """What the answers of a model depend on, as plain values.

    A `predict` that was stopped continues only under the same fingerprint, so its keys and texts
    must stay as they are.

    Args:
        options: The arguments of `SFTModule`.
        precision: `trainer.precision`.
        ckpt_path: Checkpoint whose weights are used, if any.
    """
    path = model_directory(options.model_name_or_path, options.revision)
    files = [ckpt_path] if ckpt_path else _weight_files(path)
    stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    texts = {name: repr(getattr(options, name)) for name in FINGERPRINTED}
    return {**texts, "model": path, "files": stats, "precision": precision}


def _weight_files(path: str) -> list[str]:
    """Files with weights in a model directory; for an adapter directory also those of its base."""
    files: list[str] = []
    for folder in {Path(path), Path(base_directory(path))}:
        for pattern in ("*.safetensors", "*.gguf"):
            files += map(str, folder.glob(pattern))
    return sorted(files)


def base_name(name_or_path: str) -> str:
    """What an adapter says it is an adapter of: the hub id, or the directory as an absolute
    path.
    """
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path


def refuse_adapter(options: ModelConfig) -> None:
    """Raises a UserError where an adapter directory is named in place of a model that is to be
    trained.
    """
    if is_adapter_dir(model_directory(options.model_name_or_path, options.revision)):
        raise UserError(
            f"model.model_name_or_path {options.model_name_or_path} holds an adapter: set it to the"
            " base (and model.adapter_name_or_path to the adapter, to go on training it)"
        )


def stored_dtype(dtype: str, precision: str, lora: bool) -> torch.dtype:
    """The type that weights are stored in.

    fp32 where they are trained: in bf16, AdamW at SFT rates moved 16 % of the parameters in 200
    steps, in fp32 all.

    Args:
        dtype: `model.dtype`.
        precision: `trainer.precision`.
        lora: Whether the weights are the frozen base of an adapter.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.split("-")[0], torch.float32)
    if precision.endswith("-true") and half != torch.float32 and not lora:
        # Adapters stay in fp32.
        mixed = precision.replace("-true", "-mixed")
        log.warning(
            "trainer.precision %s rounds most updates of trained weights away; %s keeps them",
            precision,
            mixed,
        )
    return half if lora or precision.endswith("-true") else torch.float32


@dataclass(frozen=True)
class FastPaths:
    """Which of our faster ways a model takes, as a comparison with its own on a few tokens has
    shown.
    """

    attention: str
    """Attention implementation, by its name in transformers."""
    separate_rows: bool
    """Each example gets a padded row of its own, because the model would mix the examples of a
    pack.
    """
    own_logits: bool
    """The model's own full logits are used in place of the chunked loss."""
    fused: list[str]
    """Modules whose forward pass is replaced (see `fused_layers`)."""


class BuiltModel(NamedTuple):
    """What `build_model` makes."""

    loss: CausalLMLoss
    """The model and its loss."""
    adapter: PeftModel | None
    """peft's wrapper around the same layers where there is an adapter."""


def build_model(options: ModelConfig, precision: str, *, sharded: bool = False) -> BuiltModel:
    """Loads the model; then in this order: new tokens, adapters or freezing, checks, noise,
    checkpointing, compile.

    Sharding comes after it, by the strategy. With `sharded` only rank 0 has weights; the others
    build the same modules on the meta device, and sharding fills them: no other rank ever holds the
    whole model.

    Args:
        options: The arguments of `SFTModule`.
        precision: `trainer.precision`.
        sharded: Whether the ranks of the process group will share the weights.

    Returns:
        The model in training mode.

    Raises:
        UserError: The model is not to be had, or does not fit the options.
    """
    if sharded:
        built = _build_with_rank_zero(options, precision)
    else:
        built = _load(options, precision)
        apply_fast_paths(built.loss, probe(built.loss))
    lm = built.loss.lm
    _log_model(lm, options)
    if options.neftune_noise_alpha is not None:
        neftune.apply_neftune(built.loss, lm.get_input_embeddings(), options.neftune_noise_alpha)
    if options.gradient_checkpointing:
        parallel.apply_gradient_checkpointing(
            lm, selective=options.gradient_checkpointing == "selective"
        )
    if options.compile:
        parallel.apply_compile(lm)
    built.loss.train()
    return built


def _build_with_rank_zero(options: ModelConfig, precision: str) -> BuiltModel:
    """Loads the weights on rank 0, which tells the other ranks what it found; they build on the
    meta device.
    """
    is_rank_zero = torch.distributed.get_rank() == 0
    found = None
    try:
        built = _load(options, precision, on_meta=not is_rank_zero)
        if is_rank_zero:
            found = (probe(built.loss), built.loss.lm.generation_config)
    except Exception as error:
        # The other ranks must not wait for weights.
        if is_rank_zero:
            broadcast_from_rank_zero(str(error))
        raise
    found = broadcast_from_rank_zero(found)
    if isinstance(found, str):
        raise UserError(f"rank 0: {found}")
    paths, built.loss.lm.generation_config = found
    apply_fast_paths(built.loss, paths)
    parallel.follow_rank_zero(built.loss)
    return built


def _load(options: ModelConfig, precision: str, on_meta: bool = False) -> BuiltModel:
    """The model with new tokens and adapters, or with its frozen part frozen."""
    named = model_directory(options.model_name_or_path, options.revision)
    path = base_directory(named)
    if options.trust_remote_code:
        log.warning(
            "model.trust_remote_code: Python code that comes with %s may run",
            options.model_name_or_path,
        )
    config = load.load_config(path, trust_remote_code=options.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None and options.quantization is None:
        raise UserError(
            f"{path} holds quantized weights: set model.quantization to nf4, or use the model as"
            " it was"
        )
    names_adapter = path != named
    dtype = stored_dtype(options.dtype, precision, options.is_adapted or names_adapter)
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
    if names_adapter:
        adapter: PeftModel | None = _evaluated_adapter(lm, named, options)
    else:
        adapter = choose_trained(lm, path, options, on_meta)
    if lm.num_parameters() < ONE_THREAD_BELOW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return BuiltModel(CausalLMLoss(lm, options.loss), adapter)


def _log_model(lm: PreTrainedModel, options: ModelConfig) -> None:
    total, trained = lm.num_parameters(), lm.num_parameters(only_trainable=True)
    log.info(
        f"model: {type(lm).__name__}, {total / 1e6:,.1f} M parameters in "
        f"{options.quantization or str(lm.dtype).removeprefix('torch.')}, "
        f"{trained / total:.1%} trained, attention {attention_of(lm)}"
    )


def probe(model: CausalLMLoss) -> FastPaths:
    """Compares our ways with the model's own on a few tokens. Where they differ its own are used,
    with a warning.

    Raises:
        UserError: The model is not causal.
    """
    lm = model.lm
    name = type(lm).__name__
    chosen = attention_of(lm)
    lost = self_check.what_is_lost(lm) if chosen == packed.PACKED else None
    if lost is not None:
        log.warning("%s needs %s: attention falls back to `eager`, exact but slower", name, lost)
    # Implementations from elsewhere may know 16 bits only, or a GPU only, so `eager` stands in for
    # them.
    runs_here = chosen in (packed.PACKED, "eager", "sdpa")
    with _attention(lm, chosen if runs_here and lost is None else "eager"):
        if not self_check.is_causal(lm):
            cure = (
                "take a causal language model, or set is_decoder to true in its config.json if it"
                " has that key"
            )
            raise UserError(f"{name} lets tokens see those that follow: {cure}")
        model.check_head()
        fused = fused_layers.fuse_blocks(lm)
        # A window that is only in the mask may be cut at places of the row, and not of the example.
        separate_rows = lost is not None or not self_check.packs_are_exact(lm)
        fused_layers.unfuse_blocks(lm, fused)
    if separate_rows:
        log.warning(
            "%s: each example gets a padded row of its own, exact but slower than packs", name
        )
    return FastPaths(
        attention=_trained_attention(chosen, lost is not None, separate_rows),
        separate_rows=separate_rows,
        own_logits=model.own_logits,
        fused=fused,
    )


def _trained_attention(chosen: str, is_lossy: bool, separate_rows: bool) -> str:
    """Under which attention the model is trained.

    Args:
        chosen: What it was loaded with.
        is_lossy: Whether that leaves out a part of what the model asks for.
        separate_rows: Padded rows need masks, which packed attention does not make.
    """
    if is_lossy:
        return "eager"
    if separate_rows and chosen == packed.PACKED:
        return "sdpa"
    return chosen


@contextmanager
def _attention(lm: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs a block under another attention implementation."""
    before = attention_of(lm)
    if name == before:
        yield
        return
    set_attention(lm, name)
    try:
        yield
    finally:
        set_attention(lm, before)


def apply_fast_paths(model: CausalLMLoss, paths: FastPaths) -> None:
    """Lets a model take the ways that `probe` found exact, here or on rank 0."""
    if attention_of(model.lm) != paths.attention:
        set_attention(model.lm, paths.attention)
    model.separate_rows = paths.separate_rows
    model.own_logits = paths.own_logits
    model.fused = fused_layers.fuse_blocks(model.lm, known=paths.fused)


def _evaluated_adapter(lm: PreTrainedModel, folder: str, options: ModelConfig) -> PeftModel:
    """The adapter directory that was named in place of a model: for answers and scores, not to be
    trained.
    """
    if options.is_adapted or options.trainable is not None:
        refuse_adapter(options)
    base_fingerprint.check_recorded_base(
        Path(folder), base_fingerprint.base_of(lm, options.init, options.seed), str(lm.name_or_path)
    )
    load.read_generation_config(lm, folder)
    return load_adapter(lm, folder)


def choose_trained(
    lm: PreTrainedModel, path: str, options: ModelConfig, on_meta: bool
) -> PeftModel | None:
    """Makes room for new tokens; then decides what is trained: adapters, which are returned, a
    part, or all.
    """
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
        folder = resolve(
            options.adapter_name_or_path, key="model.adapter_name_or_path", allow_adapter=True
        )
        log.info("adapter: goes on from %s", options.adapter_name_or_path)
        name = options.model_name_or_path
        base = base_fingerprint.base_of(lm, options.init, options.seed)
        is_proved = base_fingerprint.check_recorded_base(Path(folder), base, name)
        return load_adapter(lm, folder, base_name=None if is_proved else name, trainable=True)
    if options.trainable is not None:
        trainable.set_trainable(lm, options.trainable)
        ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
        if new_ids and not all(end.weight.requires_grad for end in ends):
            raise UserError(
                "model.add_tokens: the new tokens would not be trained; model.trainable must match"
                " the embedding and the head, by embed_tokens and lm_head in most models"
            )
    else:
        trainable.freeze_unread(lm)
    return None
