"""A directory or hub id to loss and text: one concern per file, plain PyTorch, transformers and peft."""
