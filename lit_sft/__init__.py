"""lit_sft: supervised fine-tuning of Hugging Face causal language models with PyTorch Lightning."""

__version__ = "0.1.0"
