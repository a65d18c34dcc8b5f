"""LoRA adapters and their relatives, through peft."""
