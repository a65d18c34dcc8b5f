"""The settings of model and data, as checked and immutable records.

The constructors of `SFTModule` and `SFTDataModule` are the schema of YAML and command line. So the
default and the documentation of every setting are there. The fields here have the same names, in
the same order.

Ranges are checked in `__post_init__`, here and in the records of options, instead of by types such
as `jsonargparse.typing.PositiveInt`: only the parser of the command line looks at those, and
constructors that are called from Python would accept any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer

from lit_sft.data.formats.columns import FORMATS, WITH_PROMPT_TEMPLATE
from lit_sft.errors import UserError
from lit_sft.generation.scoring import EvaluationOptions
from lit_sft.model.generate import GenerationOptions
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.loss import LossOptions
from lit_sft.training.optim import ScheduleOptions

MOST_SEED = 2**32 - 1
"""numpy seeds its generator with 32 bits."""


def check_seed(key: str, seed: int) -> None:
    """Checks a seed.

    Args:
        key: The setting, for the message.
        seed: Its value.

    Raises:
        UserError: It is out of range.
    """
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"{key} is {seed}, it must be from 0 to {MOST_SEED}")


def _check_least(key: str, value: int, least: int) -> None:
    """Checks that a number is not too small.

    Raises:
        UserError: It is.
    """
    if value < least:
        raise UserError(f"{key} is {value}, it must be at least {least}")


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of `SFTModule`.

    Raises:
        UserError: Two settings exclude each other, or one needs another.
    """

    model_name_or_path: str
    revision: str | None
    trust_remote_code: bool
    init: Literal["pretrained", "random"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    trainable: list[str] | None
    add_tokens: list[str] | None
    attn_implementation: str
    gradient_checkpointing: bool | Literal["full", "selective"]
    compile: bool
    loss: LossOptions
    neftune_noise_alpha: float | None
    lora: LoraConfig | None
    adapter_name_or_path: str | None
    quantization: Literal["nf4"] | None
    optimizer: Callable[[Iterable], Optimizer]
    lr_schedule: ScheduleOptions
    generation: GenerationOptions
    evaluation: EvaluationOptions | None
    seed: int

    def __post_init__(self) -> None:
        check_seed("model.seed", self.seed)
        self._check_what_is_trained()
        if self.quantization is not None:
            self._check_quantization(self.quantization)

    @property
    def is_adapted(self) -> bool:
        """Whether adapters are trained over a frozen base, be they new or loaded."""
        return self.lora is not None or self.adapter_name_or_path is not None

    def _check_what_is_trained(self) -> None:
        exclusive = ("lora", "adapter_name_or_path", "trainable")
        chosen = [name for name in exclusive if getattr(self, name) is not None]
        if len(chosen) > 1:
            names = " and ".join(f"model.{name}" for name in chosen)
            hint = ""
            if "adapter_name_or_path" in chosen:
                hint = "; an adapter directory brings its own settings"
            raise UserError(f"{names} exclude each other: set all but one of them to null{hint}")
        if self.add_tokens and self.adapter_name_or_path is not None:
            raise UserError(
                "model.add_tokens and model.adapter_name_or_path exclude each other: set one of"
                " them to null"
            )

    def _check_quantization(self, quantization: str) -> None:
        if not self.is_adapted:
            raise UserError(
                f"model.quantization {quantization} freezes the weights, so nothing would be"
                " trained: set model.lora as well, or model.quantization to null"
            )
        if self.init == "random":
            raise UserError(
                "model.quantization is for pretrained weights: set model.init to pretrained, or it"
                " to null"
            )
        if self.lora is None:
            return
        init = str(self.lora.init_lora_weights)
        if init.startswith(("pissa", "olora")):
            raise UserError(
                f"model.lora.init_lora_weights {init} takes its start values"
                " out of the base, which model.quantization has rounded to 4 bits: set one of them"
                " to its default"
            )


@dataclass(frozen=True)
class DataConfig:
    """The arguments of `SFTDataModule`.

    Raises:
        UserError: Two settings exclude each other, or a value is out of range.
    """

    train: str | list[str | dict[str, Any]]
    validation: str | list[str | dict[str, Any]] | None
    val_size: int | float | None
    test: str | list[str | dict[str, Any]] | None
    predict: str | list[str] | list[dict[str, Any]] | None
    questions: list[str]
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    system_prompt: str | None
    column_mapping: dict[str, str] | None
    prompt_template: str | None
    on_bad_row: Literal["error", "skip"]
    unproved: Literal["error", "lenient"]
    train_on: Literal["completions", "last_completion", "all"]
    max_length: int
    overlong: Literal["drop", "truncate", "error"]
    packing: bool
    micro_batch_size: int
    global_batch_size: int
    max_samples: int | None
    num_workers: int | Literal["auto"]
    cache_dir: str | None
    cache_max_gb: float | None
    model_name_or_path: str
    revision: str | None
    trust_remote_code: bool
    add_tokens: list[str] | None
    adapter_name_or_path: str | None
    seed: int
    allow_other_data: bool

    def __post_init__(self) -> None:
        if self.validation is not None and self.val_size is not None:
            raise UserError(
                "data.validation and data.val_size exclude each other: set one of them to null"
            )
        _check_least("data.max_length", self.max_length, 2)
        _check_least("data.micro_batch_size", self.micro_batch_size, 1)
        _check_least("data.global_batch_size", self.global_batch_size, 1)
        if self.max_samples is not None:
            _check_least("data.max_samples", self.max_samples, 1)
        if self.num_workers != "auto":
            _check_least("data.num_workers", self.num_workers, 0)
        check_seed("data.seed", self.seed)
        # Also false for nan.
        if self.cache_max_gb is not None and not self.cache_max_gb >= 0:
            raise UserError(
                f"data.cache_max_gb is {self.cache_max_gb}, it must be 0 or more, or null"
            )
        self._check_format()

    def _check_format(self) -> None:
        if self.format != "auto" and self.format not in FORMATS:
            raise UserError(f"data.format is {self.format!r}, expected auto, {', '.join(FORMATS)}")
        if self.prompt_template is None or self.format in ("auto", *WITH_PROMPT_TEMPLATE):
            return
        raise UserError(
            f"data.prompt_template fills in columns, but data.format is {self.format}: set one of"
            " them to its default"
        )
