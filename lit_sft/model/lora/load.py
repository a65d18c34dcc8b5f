"""Loads adapters in peft's format over their base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sft.errors import UserError
from lit_sft.model.lora.precision import train_in_fp32
from lit_sft.model.lora.source_names import renamed_for_model
from lit_sft.model.random_state import devices_of, own_random_state

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def is_adapter_dir(path: str) -> bool:
    """Whether the directory holds an adapter in peft's format."""
    return (Path(path) / "adapter_config.json").is_file()


def load_adapter(
    model: PreTrainedModel, path: str, *, base_name: str | None = None, trainable: bool = False
) -> PeftModel:
    """Loads an adapter directory over its base model.

    Args:
        model: The base. On the meta device, it gets modules without values.
        path: The adapter directory.
        base_name: The user's name of the base, which must end like the name in the adapter's
            config. None does not compare names.
        trainable: Whether the adapter will be trained further.

    Raises:
        UserError: The adapter is not LoRA, or belongs to another model.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    weights = Path(path) / "adapter_model.safetensors"
    if not is_adapter_dir(path) or not weights.is_file():
        raise UserError(
            f"{path} is no adapter directory (adapter_config.json and adapter_model.safetensors)"
        )
    try:
        with renamed_for_model(model, path) as folder:
            config = _read_config(folder, base_name)
            with safe_open(Path(folder) / weights.name, framework="pt") as file:
                saved = set(file.keys())
            adapted = _wrapped(model, folder, config, trainable)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the adapter {path} does not fit the base {base_name or model.name_or_path}: {reason}"
        ) from error
    # peft only warns about weights that the file lacks.
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != expected:
        raise UserError(
            f"the adapter {path} belongs to another base than {model.name_or_path}: its tensors"
            " differ"
        )
    if trainable:
        train_in_fp32(adapted)
    return adapted


def _read_config(path: str, base_name: str | None) -> Any:
    """Reads the adapter's config, and checks its kind and the name of its base."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(path)
    if config.peft_type != "LORA":
        raise UserError(
            f"the adapter {path} is {config.peft_type.value}; only LoRA and its relatives are known"
        )
    if base_name is not None:
        _check_base(path, config.base_model_name_or_path, base_name)
    return config


def _wrapped(model: PreTrainedModel, path: str, config: Any, trainable: bool) -> PeftModel:
    """Puts the adapter into the model, with its values unless the model is on the meta device."""
    from peft import PeftModel, get_peft_model

    config.inference_mode = not trainable
    # peft draws random start values before it reads the stored ones.
    with own_random_state(0, devices_of(model)):
        if model.device.type == "meta":
            # Sharding fills the values in from rank 0. Some start values are decomposed from the
            # weights, which are not here, so ask for others.
            config.init_lora_weights = True
            return get_peft_model(model, config)  # type: ignore[return-value]
        return PeftModel.from_pretrained(model, path, is_trainable=trainable)


def _check_base(path: str, recorded: str | None, base_name: str) -> None:
    """Compares the last parts of two names of a base.

    Only these agree if a model was copied to another directory, or downloaded from the hub.
    """
    recorded_last = Path(recorded or "").name.lower()
    if recorded_last and recorded_last != Path(base_name).name.lower():
        raise UserError(
            f"the adapter {path} was trained over {recorded}, not over {base_name}: set"
            " model.model_name_or_path to that; or if both are one model, correct"
            " base_model_name_or_path in its adapter_config.json"
        )
