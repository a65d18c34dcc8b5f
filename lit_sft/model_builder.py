"""Model settings -> the module that computes the loss: the model stages, in visible order."""

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
    experts,
    fused_layers,
    load,
    mixers,
    neftune,
    new_tokens,
    parallel,
    quantization,
    routers,
    self_check,
    trainable,
)
from lit_sft.model.attention import packed
from lit_sft.model.attention.implementation import attention_of, set_attention
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.load import is_adapter_dir, load_adapter
from lit_sft.model.loss import CausalLMLoss, RouterOptions
from lit_sft.ranks import broadcast_from_rank_zero
from lit_sft.settings import ModelConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BUILTIN = "builtin:"
ONE_THREAD_BELOW = 5_000_000
"""Number of parameters below which a CPU runs one thread. After every small matrix product torch's
threads wait for each other. The built-in model (0.9 M) made 12,000 tokens/s on one thread, 16,000
on two free cores, but less than 1,000 on two busy ones.
"""


def model_directory(name_or_path: str, revision: str | None = None) -> str:
    """Returns the local directory of a built-in model, a directory or a hub id.

    Raises:
        UserError: There is no such model, or it cannot be downloaded.
    """
    if name_or_path.startswith(BUILTIN):
        return str(demo.model_dir(name_or_path.removeprefix(BUILTIN)))
    return resolve(name_or_path, revision=revision, allow_adapter=True)


def base_directory(path: str) -> str:
    """Returns the directory of the base of an adapter; any other directory is returned as it is.

    Args:
        path: A model directory, or an adapter directory whose `adapter_config.json` names the base.

    Raises:
        UserError: The base does not exist, or cannot be downloaded.
    """
    if not is_adapter_dir(path):
        return path
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    name = str(config.get("base_model_name_or_path"))
    # `export_hf` writes a base that exists nowhere else beside the adapter, with its absolute path.
    # That path is wrong after the directory was moved.
    exported_base = Path(path) / "base"
    if not Path(name).exists() and exported_base.is_dir():
        return str(exported_base)
    if name.startswith(BUILTIN):
        return model_directory(name)
    return resolve(name, revision=config.get("revision"), key=f"{path}: base_model_name_or_path")


def tokenizer_directory(name_or_path: str, revision: str | None = None) -> str:
    """Returns the directory of a model's tokenizer. An adapter may leave it to its base."""
    path = model_directory(name_or_path, revision)
    if (Path(path) / "tokenizer_config.json").is_file():
        return path
    return base_directory(path)


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
"""Settings that change the answers of a model, beside its files and the precision."""


def fingerprint(options: ModelConfig, precision: str, ckpt_path: str | None) -> dict[str, Any]:
    """Returns what the answers of a model depend on, as plain values.

    An interrupted `predict` continues only under the same fingerprint. So keys and values must not
    change between versions.

    Args:
        options: The arguments of `SFTModule`.
        precision: `trainer.precision`.
        ckpt_path: Checkpoint whose weights are used. None for those of the model.
    """
    path = model_directory(options.model_name_or_path, options.revision)
    files = [ckpt_path] if ckpt_path else _weight_files(path)
    stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    texts = {name: repr(getattr(options, name)) for name in FINGERPRINTED}
    # The fingerprints of earlier versions do not have it.
    texts["lora"] = texts["lora"].replace(", target_experts=False", "")
    return {**texts, "model": path, "files": stats, "precision": precision}


def _weight_files(path: str) -> list[str]:
    """The weight files of a model directory, and of its base if it holds an adapter."""
    files: list[str] = []
    for folder in {Path(path), Path(base_directory(path))}:
        for pattern in ("*.safetensors", "*.gguf", "pytorch_model*.bin"):
            files += map(str, folder.glob(pattern))
    return sorted(files)


def base_name(name_or_path: str) -> str:
    """Returns how an adapter names its base: a hub id, or the absolute path of a directory."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return str(path.absolute())
    return name_or_path


def refuse_adapter(options: ModelConfig) -> None:
    """Refuses an adapter directory in place of a model that is trained.

    Raises:
        UserError: `model.model_name_or_path` names an adapter directory.
    """
    if is_adapter_dir(model_directory(options.model_name_or_path, options.revision)):
        raise UserError(
            f"model.model_name_or_path {options.model_name_or_path} holds an adapter: set it to the"
            " base (and model.adapter_name_or_path to the adapter, to go on training it)"
        )


def stored_dtype(dtype: str, precision: str, is_base: bool) -> torch.dtype:
    """Returns the dtype in which the weights are stored.

    Trained weights are stored in fp32. In bf16, with AdamW at learning rates of SFT, only 16 % of
    the parameters changed at all in 200 steps; in fp32 all did.

    Args:
        dtype: `model.dtype`.
        precision: `trainer.precision`.
        is_base: Whether the weights are the frozen base of an adapter.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    half_types = {"bf16": torch.bfloat16, "16": torch.float16}
    compute_dtype = half_types.get(precision.split("-")[0], torch.float32)
    if is_base:
        return compute_dtype
    if not precision.endswith("-true"):
        return torch.float32
    if compute_dtype != torch.float32:
        log.warning(
            "trainer.precision %s rounds most updates of trained weights away; %s keeps them",
            precision,
            precision.replace("-true", "-mixed"),
        )
    return compute_dtype


@dataclass(frozen=True)
class FastPaths:
    """Which fast code paths a model uses.

    `probe` chooses those that give the same results as the model's own code on a few tokens.
    """

    attention: str
    """Attention implementation, by its name in transformers."""
    separate_rows: bool
    """Whether each example gets a padded row of its own, because the model would mix the examples
    of a pack.
    """
    one_by_one: bool
    """Whether each example gets a forward pass of its own, because padding would change it."""
    own_logits: bool
    """Whether the model's own, full logits are used in place of the chunked loss."""
    fused: list[str]
    """Names of the modules whose forward pass is replaced (see `fused_layers`)."""
    mixers: list[mixers.Mixer]
    """The modules that are called once per example of a packed row."""


class BuiltModel(NamedTuple):
    """The result of `build_model`."""

    loss: CausalLMLoss
    """The model and its loss."""
    adapter: PeftModel | None
    """peft's wrapper around the same layers. None without an adapter."""
    router_aux_loss_coef: float = 0.0
    """Weight of the loss that balances the experts."""


def build_model(
    options: ModelConfig,
    precision: str,
    *,
    sharded: bool = False,
    device: torch.device | None = None,
) -> BuiltModel:
    """Loads the model and prepares it for training.

    The order: load, new tokens, adapters or freezing, fast paths, noise, gradient checkpointing,
    compile. The strategy shards the model afterwards. For that (`sharded`), only rank 0 loads the
    weights. The other ranks build the same modules on the meta device, and sharding fills them, so
    they never hold the whole model.

    Args:
        options: The arguments of `SFTModule`.
        precision: `trainer.precision`.
        sharded: Whether the weights will be sharded over the ranks.
        device: The device that trains. The model is compared with its own code there, because
            kernels of state-space layers, for example, run on a GPU only. None, and a model that
            will be sharded and need not fit, leave it on the CPU.

    Returns:
        The model in training mode.

    Raises:
        UserError: The model cannot be loaded, or does not fit the options.
    """
    if sharded:
        built = _build_with_rank_zero(options, precision)
    else:
        built = _load(options, precision)
        if device is not None:
            built.loss.to(device)
        apply_fast_paths(built.loss, probe(built.loss))
    lm = built.loss.lm
    experts.group_experts(lm)
    _log_model(lm, options)
    router_aux_loss_coef = routers.choose_coefficient(lm, options.loss.router_aux_loss_coef)
    if routers.has_loss(lm):
        top_k = lm.config.get_text_config().num_experts_per_tok
        built.loss.routers = RouterOptions(top_k, needs_grad=router_aux_loss_coef > 0)
    if options.neftune_noise_alpha is not None:
        neftune.apply_neftune(built.loss, lm.get_input_embeddings(), options.neftune_noise_alpha)
    if options.gradient_checkpointing:
        is_selective = options.gradient_checkpointing == "selective"
        parallel.apply_gradient_checkpointing(lm, selective=is_selective)
    if options.compile:
        parallel.apply_compile(lm)
    built.loss.train()
    return built._replace(router_aux_loss_coef=router_aux_loss_coef)


def _build_with_rank_zero(options: ModelConfig, precision: str) -> BuiltModel:
    """Loads the weights on rank 0 only; the other ranks build on the meta device and follow it.

    Raises:
        UserError: On every rank, if rank 0 cannot build the model.
    """
    is_rank_zero = torch.distributed.get_rank() == 0
    found = None
    try:
        built = _load(options, precision, on_meta=not is_rank_zero)
        if is_rank_zero:
            # The ranks gather weights in each forward pass, so they need as many of them.
            paths = replace(probe(built.loss), one_by_one=False)
            found = (paths, built.loss.lm.generation_config)
    except Exception as error:
        # The other ranks wait for this broadcast.
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
    """Loads the model, adds new tokens and adapters, and freezes what is not trained."""
    named = model_directory(options.model_name_or_path, options.revision)
    path = base_directory(named)
    if options.trust_remote_code:
        log.warning(
            "model.trust_remote_code: Python code that comes with %s may run",
            options.model_name_or_path,
        )
    config = load.load_config(path, trust_remote_code=options.trust_remote_code)
    quantization.check_source(config, path, options.quantization)
    names_adapter = path != named
    dtype = stored_dtype(options.dtype, precision, options.is_adapted or names_adapter)
    lm = load.load_model(
        path,
        init=options.init,
        dtype=dtype,
        attn_implementation=packed.choose(options.attn_implementation),
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
    """Compares our fast code paths with the model's own code, on a few tokens.

    A path that gives other results is not used, with a warning.

    Raises:
        UserError: The model is not causal.
    """
    lm = model.lm
    name = type(lm).__name__
    chosen = attention_of(lm)
    # Other implementations may support 16 bits only, or GPUs only. `eager` replaces them here.
    runs_here = chosen in (packed.PACKED, "eager", "sdpa")
    with _attention(lm, chosen if runs_here else "eager"):
        found = mixers.find_mixers(lm)
    mixers.run_by_example(lm, found)
    lost = self_check.missing_feature(lm) if chosen == packed.PACKED else None
    if lost is not None:
        log.warning("%s needs %s: attention falls back to `eager`, exact but slower", name, lost)
    with _attention(lm, chosen if runs_here and lost is None else "eager"):
        if not self_check.is_causal(lm):
            raise UserError(
                f"{name} lets tokens see those that follow: take a causal language model, or set"
                " is_decoder to true in its config.json if it has that key"
            )
        if self_check.numbers_positions_itself(lm):
            raise UserError(
                f"{name} does not number the tokens of an example from 0, which is not supported:"
                " set model.model_name_or_path to another model"
            )
        model.check_head()
        fused = fused_layers.fuse_blocks(lm)
        # A window that exists only in the mask may be placed by the position in the row, instead of
        # the position in the example.
        separate_rows = lost is not None or not self_check.packing_is_exact(lm)
        one_by_one = separate_rows and not self_check.padding_is_exact(lm)
        fused_layers.unfuse_blocks(lm, fused)
    mixers.run_whole_rows(lm, found)
    paths = FastPaths(
        attention=_trained_attention(chosen, lost is not None, separate_rows),
        separate_rows=separate_rows,
        one_by_one=one_by_one,
        own_logits=model.own_logits,
        fused=fused,
        mixers=[] if separate_rows else found,
    )
    _log_rows(lm, paths)
    return paths


def _log_rows(lm: PreTrainedModel, paths: FastPaths) -> None:
    """Tells how the examples of a row are kept apart, if not by attention alone."""
    name = type(lm).__name__
    if paths.one_by_one:
        log.warning("%s: each example gets a forward pass of its own, exact but slow", name)
    elif paths.separate_rows:
        log.warning(
            "%s: each example gets a padded row of its own, exact but slower than packs: a step"
            " takes the time and memory of as many tokens as its longest example has, times the"
            " number of examples",
            name,
        )
    elif paths.mixers:
        kinds = sorted({type(lm.get_submodule(mixer.name)).__name__ for mixer in paths.mixers})
        log.info(
            "%s: %d layers (%s) run example by example within a row",
            name,
            len(paths.mixers),
            ", ".join(kinds),
        )


def _trained_attention(chosen: str, is_lossy: bool, separate_rows: bool) -> str:
    """Returns the attention implementation for training.

    Args:
        chosen: The implementation with which the model was loaded.
        is_lossy: Whether that one leaves out something that the model needs.
        separate_rows: Whether examples become padded rows. They need masks, which packed attention
            does not support.
    """
    if is_lossy:
        return "eager"
    if separate_rows and chosen == packed.PACKED:
        return "sdpa"
    return chosen


@contextmanager
def _attention(lm: PreTrainedModel, name: str) -> Iterator[None]:
    """Uses another attention implementation in a `with` block."""
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
    """Switches a model to the code paths that `probe` chose, on this rank or on rank 0."""
    if attention_of(model.lm) != paths.attention:
        set_attention(model.lm, paths.attention)
    model.separate_rows = paths.separate_rows
    model.one_by_one = paths.one_by_one
    model.own_logits = paths.own_logits
    model.fused = fused_layers.fuse_blocks(model.lm, known=paths.fused)
    mixers.run_by_example(model.lm, paths.mixers)


def _evaluated_adapter(lm: PreTrainedModel, folder: str, options: ModelConfig) -> PeftModel:
    """Loads an adapter that `model.model_name_or_path` names, for evaluation.

    Raises:
        UserError: It would be trained, or it was trained over another base.
    """
    if options.is_adapted or options.trainable is not None:
        refuse_adapter(options)
    base = base_fingerprint.base_of(lm, options.init, options.seed)
    base_fingerprint.check_recorded_base(Path(folder), base, str(lm.name_or_path))
    load.read_generation_config(lm, folder)
    return load_adapter(lm, folder)


def choose_trained(
    lm: PreTrainedModel, path: str, options: ModelConfig, on_meta: bool
) -> PeftModel | None:
    """Adds the new tokens, then decides what is trained: adapters, a part of the model, or all.

    Args:
        lm: The model.
        path: Its directory, with the tokenizer.
        options: The arguments of `SFTModule`.
        on_meta: Whether the model is on the meta device.

    Returns:
        peft's wrapper, or None without adapters.

    Raises:
        UserError: The options do not fit the model.
    """
    new_ids: list[int] = []
    if options.add_tokens:
        tokenizer = load.load_tokenizer(path, trust_remote_code=options.trust_remote_code)
        rows = new_tokens.num_rows(lm)
        new_ids = new_tokens.add_tokens(tokenizer, options.add_tokens, rows=rows)
        new_tokens.make_room(lm, new_ids)
    if options.lora is not None:
        lora = options.lora
        if on_meta:
            # Some start values are decomposed from the weights, which only rank 0 has. Sharding
            # fills these in.
            lora = replace(lora, init_lora_weights=True)
        return apply_lora(lm, lora, new_token_ids=new_ids, seed=options.seed)
    if options.adapter_name_or_path is not None:
        return _trained_adapter(lm, options.adapter_name_or_path, options)
    if options.trainable is None:
        trainable.freeze_unused(lm)
        return None
    trainable.set_trainable(lm, options.trainable)
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    if new_ids and not all(end.weight.requires_grad for end in ends):
        raise UserError(
            "model.add_tokens: the new tokens would not be trained; model.trainable must match"
            " the embedding and the head, by embed_tokens and lm_head in most models"
        )
    return None


def _trained_adapter(lm: PreTrainedModel, name_or_path: str, options: ModelConfig) -> PeftModel:
    """Loads the adapter of `model.adapter_name_or_path`, which is trained further.

    Raises:
        UserError: It is not a LoRA adapter, or it was trained over another base.
    """
    folder = resolve(name_or_path, key="model.adapter_name_or_path", allow_adapter=True)
    log.info("model.adapter_name_or_path: training continues from the adapter %s", name_or_path)
    base = base_fingerprint.base_of(lm, options.init, options.seed)
    base_name = options.model_name_or_path
    is_proved = base_fingerprint.check_recorded_base(Path(folder), base, base_name)
    # Without a fingerprint beside the adapter, the names of the base are compared.
    name_to_check = None if is_proved else base_name
    return load_adapter(lm, folder, base_name=name_to_check, trainable=True)
