"""The hook of an optimizer step is called when Lightning has made one, and at no other time."""

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset, RandomIterableDataset
from torch.utils.data import DataLoader

from lit_sft.callbacks.step_callback import StepCallback, is_between_steps


class Recording(StepCallback):
    def __init__(self):
        self.called, self.stepped, self.seen, self.lightnings = [], [], [], []
        self.step = 0

    def on_step_end(self, trainer, pl_module, batch):
        self.called.append(trainer.fit_loop.total_batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step > self.step:
            self.stepped.append(trainer.fit_loop.total_batch_idx)
        self.step = trainer.global_step

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(is_between_steps(trainer))
        self.lightnings.append(not trainer.fit_loop._should_accumulate())


@pytest.mark.parametrize(
    "data", [RandomDataset(32, 8), RandomIterableDataset(32, 8)], ids=["sized", "endless"]
)
@pytest.mark.parametrize("accumulation", [1, 3, 20])
@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 7}, {"max_steps": 4}], ids=str)
def test_steps(data, accumulation, limits, tmp_path):
    record = Recording()
    torch.manual_seed(0)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[record],
        accumulate_grad_batches=accumulation,
        val_check_interval=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, **limits, **quiet},
    )
    trainer.fit(BoringModel(), DataLoader(data), DataLoader(RandomDataset(32, 1)))
    assert record.called == record.stepped and len(record.called) == trainer.global_step > 0
    assert record.seen == record.lightnings and len(record.seen) > 0
    if accumulation == 3 and not limits:
        assert record.called == [2, 5, 7, 10, 13, 15], "the last, partial windows count"
        assert False in record.seen and True in record.seen, "the test can fail"
