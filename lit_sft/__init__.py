"""lit_sft: supervised fine-tuning of Hugging Face causal language models with PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_sft.datamodule import SFTDataModule
    from lit_sft.module import SFTModule
    from lit_sft.trainer import SFTTrainer

__version__ = "0.1.0"
__all__ = ["SFTDataModule", "SFTModule", "SFTTrainer", "__version__"]

_HOMES = {
    "SFTDataModule": "lit_sft.datamodule",
    "SFTModule": "lit_sft.module",
    "SFTTrainer": "lit_sft.trainer",
}


def __dir__() -> list[str]:
    """Lists the public names, also those that are not imported yet."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Imports a public class when it is first asked for: torch and Lightning take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
