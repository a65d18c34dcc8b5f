"""Model settings to the module that computes the loss: composes the model stages, in visible order."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from lit_sft import demo
from lit_sft.model import adapters, attention, fused, load, parallel
from lit_sft.model.loss import CausalLMLoss

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

BUILTIN = "builtin:"
ONE_THREAD_BELOW = 5_000_000
"""Parameters below which a CPU runs one thread. The demo (0.9 M) made 12,000 tokens/s on one thread and 16,000 on two
free cores, but under 1,000 on two busy ones: torch's threads wait for each other after every small product.
"""


def model_directory(name_or_path: str, revision: str | None = None) -> str:
    """A built-in model, a directory or a hub id as a local directory.

    Raises:
        UserError: It is not to be had.
    """
    if name_or_path.startswith(BUILTIN):
        return str(demo.model_dir(name_or_path.removeprefix(BUILTIN)))
    return load.resolve(name_or_path, revision=revision)


def base_name(name_or_path: str) -> str:
    """What an adapter says it is an adapter of: the hub id, or the directory as an absolute path."""
    return str(Path(name_or_path).absolute()) if Path(name_or_path).is_dir() else name_or_path


def stored_dtype(dtype: str, precision: str, lora: bool) -> torch.dtype:
    """The type that weights are stored in.

    fp32 where they are trained: in bf16, AdamW at SFT learning rates moved 16 % of the parameters in 200 steps, in
    fp32 all.

    Args:
        dtype: `model.dtype`.
        precision: `trainer.precision`.
        lora: Whether the weights are the frozen base of an adapter.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.split("-")[0], torch.float32)
    if precision.endswith("-true") and half != torch.float32 and not lora:
        mixed = precision.replace("-true", "-mixed")
        log.warning("trainer.precision %s rounds most updates of trained weights away; %s keeps them", precision, mixed)
    return half if lora or precision.endswith("-true") else torch.float32


def build_model(options: SimpleNamespace, precision: str) -> tuple[CausalLMLoss, PeftModel | None]:
    """Loads the model; then, in this order: adapters or freezing, self-checks, gradient checkpointing, compile.

    Sharding comes after it, by the strategy.

    Args:
        options: The arguments of `SFTModule`, by name.
        precision: `trainer.precision`.

    Returns:
        The loss module in training mode, and peft's wrapper around the same layers where there is an adapter.

    Raises:
        UserError: The model is not to be had, or does not fit the options.
    """
    path = model_directory(options.model_name_or_path, options.revision)
    config = load.load_config(path, trust_remote_code=options.trust_remote_code)
    lm = load.load_model(
        path,
        init=options.init,
        dtype=stored_dtype(options.dtype, precision, options.lora is not None),
        attn_implementation=attention.choose(config, options.attn_implementation),
        trust_remote_code=options.trust_remote_code,
        seed=options.seed,
    )
    adapter = None
    if options.lora is not None:
        adapter = adapters.apply_lora(lm, options.lora, seed=options.seed)
    elif options.trainable is not None:
        adapters.set_trainable(lm, options.trainable)
    total, trained = (sum(p.numel() for p in lm.parameters() if p.requires_grad or n) for n in (True, False))
    log.info(
        f"model: {type(lm).__name__}, {total / 1e6:,.1f} M parameters in {str(lm.dtype).removeprefix('torch.')}, "
        f"{trained / total:.1%} trained, attention {lm.config._attn_implementation}"
    )
    if total < ONE_THREAD_BELOW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    model = CausalLMLoss(lm, options.loss)
    model.check_head()
    fused.fuse_blocks(lm)
    model.separate_rows = not attention.packs_are_exact(lm)
    if model.separate_rows:
        log.warning("%s mixes packed examples: each gets a padded row of its own, exact but slower", type(lm).__name__)
    if options.gradient_checkpointing:
        parallel.apply_gradient_checkpointing(lm)
    if options.compile:
        parallel.apply_compile(lm)
    return model.train(), adapter
