"""The trainer of the command line, whose methods are the commands."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Literal

from lit_sft.commands import certificate, doctor, preview
from lit_sft.commands import export as export_command
from lit_sft.datamodule import SFTDataModule
from lit_sft.memory_plan import Plan
from lit_sft.module import SFTModule
from lit_sft.trainer import SFTTrainer

log = logging.getLogger(__name__)


class CommandTrainer(SFTTrainer):
    """SFTTrainer with the commands that Lightning does not have.

    LightningCLI makes a subcommand of each method that `SFTCLI.subcommands` names. Its docstring is
    the help text, and its arguments are options.
    """

    plan = Plan()
    """The devices of the planned run, for `doctor`, which itself runs on one device."""

    def preview(
        self,
        model: SFTModule,
        datamodule: SFTDataModule,
        num_rows: int = 3,
        output: Literal["rich", "json"] = "rich",
        certify: bool = False,
    ) -> None:
        """Show rows of the training set as the model will see them.

        Args:
            model: Not needed.
            datamodule: Its training rows are shown.
            num_rows: Rows to show.
            output: For people (rich) or programs (json).
            certify: Show instead which shapes of rows the tokenizer and its chat template can
                train; no data is read.
        """
        if certify:
            certificate.certify(datamodule.data, output)
            return
        preview.preview(datamodule.data, num_rows, output)

    def doctor(
        self,
        model: SFTModule,
        datamodule: SFTDataModule,
        output: Literal["rich", "json"] = "rich",
    ) -> None:
        """Check data, memory, disk before a run, with two real steps; exit code 1 on error.

        Args:
            model: Its settings are used.
            datamodule: Its rows are examined.
            output: For people (rich) or programs (json).
        """
        sys.exit(doctor.doctor(self, self.plan, model, datamodule, output))

    def export(
        self,
        model: SFTModule,
        datamodule: SFTDataModule,
        ckpt_path: str = "last",
        output_dir: str = "hf",
        merge_lora: bool = False,
        dequantize: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        text_only: bool = False,
    ) -> None:
        """Turn a checkpoint into a Hugging Face directory.

        Args:
            model: The module that the checkpoint belongs to.
            datamodule: Its tokenizer and template are exported along.
            ckpt_path: Checkpoint, `last`, or `best`.
            output_dir: Directory to write.
            merge_lora: Merge the adapter into the base instead of writing an adapter directory.
            dequantize: Merge over a 4-bit base too, whose values are then written in bf16.
            dtype: Type of the written weights; null keeps theirs, which is fp32 where they were
                trained.
            text_only: Write the text of a multimodal model as a plain text model, instead of a
                directory like that of the model.
        """
        options = export_command.ExportOptions(merge_lora, dequantize, dtype, text_only)
        export_command.export_checkpoint(
            self, model, datamodule, ckpt_path, Path(output_dir), options
        )
        log.info("exported: %s", output_dir)
