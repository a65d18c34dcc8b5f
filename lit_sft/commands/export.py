"""`export`: writes a checkpoint as a Hugging Face directory, and verifies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch

from lit_sft import lightning_internals
from lit_sft.checkpoint.io import read_checkpoint
from lit_sft.datamodule import QUESTIONS, SFTDataModule
from lit_sft.errors import UserError
from lit_sft.model import composite, fused_layers
from lit_sft.model.attention.implementation import set_attention
from lit_sft.model.lora import merge
from lit_sft.model.loss import CausalLMLoss
from lit_sft.model.verify_export import verify_export
from lit_sft.module import SFTModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExportOptions:
    """What is written of a checkpoint."""

    merge_lora: bool = False
    """Whether to merge the adapter into the base."""
    dequantize: bool = False
    """Whether to merge even into a 4-bit base."""
    dtype: str | None = None
    """Dtype of the written weights. None keeps theirs."""
    text_only: bool = False
    """Whether to write the text of a multimodal model as a plain text model."""


def export_checkpoint(
    trainer: L.Trainer,
    module: SFTModule,
    datamodule: SFTDataModule,
    ckpt_path: str,
    output_dir: Path,
    options: ExportOptions,
) -> None:
    """Loads a checkpoint, merges its adapter if asked to, writes the directory and verifies it.

    The written model must give the same logits and greedy answers as the model in memory.

    Args:
        trainer: A trainer for one CPU process.
        module: The module that the checkpoint belongs to.
        datamodule: Its tokenizer and template are exported along.
        ckpt_path: The checkpoint.
        output_dir: The directory to write.
        options: What is written.

    Raises:
        UserError: The checkpoint belongs to another model, an option does not fit it, or the
            written model answers differently (the directory is removed then).
    """
    is_quantized = module.options.quantization is not None
    if options.merge_lora and is_quantized and not options.dequantize:
        raise UserError(
            "--merge_lora true over a 4-bit base: say --dequantize true to write its rounded"
            " values, with the adapter, in bf16; or --model.quantization null to merge into the"
            " base that was quantized, which was not trained on"
        )
    model = _load(trainer, module, datamodule, ckpt_path)
    data = datamodule.data
    probes = [data.renderer.prompt(data.question(text)) for text in QUESTIONS]
    if options.merge_lora:
        _merge_adapter(module, torch.tensor(probes[:1]))
    set_attention(model.lm, "sdpa")
    if options.dtype is not None and module.adapter is not None:
        raise UserError(
            f"--dtype {options.dtype} is for whole models, and an adapter stays as it is: add"
            " --merge_lora true"
        )
    if options.text_only:
        _check_text_only(module, model.lm)
    trained = module.adapter or model.lm
    stored = None if options.dtype is None else getattr(torch, options.dtype)

    def check(folder: Path) -> None:
        verify_export(folder, trained, datamodule.tokenizer, probes)

    module.export(output_dir, dtype=stored, check=check, text_only=options.text_only)


def _check_text_only(module: SFTModule, lm: PreTrainedModel) -> None:
    """Refuses to write a plain text model where there is none to write.

    Raises:
        UserError: An adapter is exported, the model is no part of a multimodal checkpoint, or
            transformers has no class for its text alone.
    """
    if module.adapter is not None:
        raise UserError(
            "--text_only true is for whole models, and an adapter stays as it is: add"
            " --merge_lora true"
        )
    if not composite.is_composite(lm.config) and composite.source_of(lm) is None:
        raise UserError(
            f"--text_only true, but {module.options.model_name_or_path} is a text model already:"
            " leave it out"
        )
    if composite.text_without_weights(lm) is None:
        raise UserError(
            f"--text_only true: transformers has no class for the text of a {type(lm).__name__}"
            " alone: leave it out"
        )


def _load(
    trainer: L.Trainer, module: SFTModule, datamodule: SFTDataModule, ckpt_path: str
) -> CausalLMLoss:
    """Loads the weights of a checkpoint into the module, without starting a run."""
    trainer.strategy.connect(module)
    module.trainer = datamodule.trainer = trainer
    lightning_internals.attach_datamodule(trainer, module, datamodule)
    module.configure_model()
    assert module.model is not None
    checkpoint = read_checkpoint(ckpt_path, without=("optimizer_states",))
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    # The exported model runs in plain transformers. Only the same layers give the same bits.
    fused_layers.unfuse_blocks(module.model.lm, module.model.fused)
    return module.model


def _merge_adapter(module: SFTModule, probe: torch.Tensor) -> None:
    """Merges the adapter into the base.

    Args:
        module: Has the loaded adapter.
        probe: [1, T] token ids, for which the merged model must give the same logits.
    """
    if module.adapter is None:
        raise UserError("--merge_lora true, but the checkpoint has no adapter: leave it out")
    before = merge.logits(module.adapter, probe)
    adapter = module.adapter
    if module.options.quantization is not None:
        adapter = merge.dequantized(adapter)
    module.use_merged(merge.merge(adapter, probe, before))
