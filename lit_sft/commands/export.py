"""`export`: a checkpoint to a Hugging Face directory, on one CPU process, compared with the model
in memory.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from lit_sft import lightning_internals
from lit_sft.checkpoint.io import read_checkpoint
from lit_sft.datamodule import QUESTIONS, SFTDataModule
from lit_sft.errors import UserError
from lit_sft.model import fused_layers
from lit_sft.model.attention.implementation import set_attention
from lit_sft.model.lora import merge
from lit_sft.model.verify_export import verify_export
from lit_sft.module import SFTModule


def export_checkpoint(
    trainer: L.Trainer,
    module: SFTModule,
    datamodule: SFTDataModule,
    ckpt_path: str,
    output_dir: Path,
    merge_lora: bool,
    dequantize: bool,
    dtype: str | None,
) -> None:
    """Loads, merges if asked to, writes, and compares logits and greedy answers to the default
    questions.

    Raises:
        UserError: The checkpoint is not one of this model, merging needs a word of consent, or what
            was written answers differently and is gone again.
    """
    if merge_lora and module.options.quantization is not None and not dequantize:
        raise UserError(
            "--merge_lora true over a 4-bit base: say --dequantize true to write its rounded"
            " values, with the adapter, in bf16; or --model.quantization null to merge into the"
            " base that was quantized, which was not trained on"
        )
    trainer.strategy.connect(module)
    module.trainer = datamodule.trainer = trainer
    lightning_internals.attach_datamodule(trainer, module, datamodule)
    module.configure_model()
    assert module.model is not None
    checkpoint = read_checkpoint(ckpt_path, without=("optimizer_states",))
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    # The exported model runs in plain transformers: the same layers give the same bits.
    fused_layers.unfuse_blocks(module.model.lm, module.model.fused)
    data = datamodule.data
    probes = [data.renderer.prompt(data.question(text)) for text in QUESTIONS]
    if merge_lora:
        if module.adapter is None:
            raise UserError("--merge_lora true, but the checkpoint has no adapter: leave it out")
        plain, probe = module.adapter, torch.tensor(probes[:1])
        before = merge.logits(plain, probe)
        if module.options.quantization is not None:
            plain = merge.dequantized(plain)
        module.use_merged(merge.merge(plain, probe, before))
    set_attention(module.model.lm, "sdpa")
    if dtype is not None and module.adapter is not None:
        raise UserError(
            f"--dtype {dtype} is for whole models, and an adapter stays as it is: add --merge_lora"
            " true"
        )
    trained = module.adapter or module.model.lm
    stored = None if dtype is None else getattr(torch, dtype)

    def check(folder: Path) -> None:
        verify_export(folder, trained, datamodule.tokenizer, probes)

    module.export(output_dir, dtype=stored, check=check)
