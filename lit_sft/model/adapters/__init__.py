"""Which weights are trained: LoRA and its relatives through peft, or a part of the model chosen by name."""

from lit_sft.model.adapters.lora import LoraConfig, apply_lora, is_adapter_dir, lift_trained, load_adapter
from lit_sft.model.adapters.merging import dequantized, logits, merge, merge_error
from lit_sft.model.adapters.trained import freeze_unread, set_trainable

__all__ = [
    "LoraConfig",
    "apply_lora",
    "dequantized",
    "freeze_unread",
    "is_adapter_dir",
    "lift_trained",
    "load_adapter",
    "logits",
    "merge",
    "merge_error",
    "set_trainable",
]
