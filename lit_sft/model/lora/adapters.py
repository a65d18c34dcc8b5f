"""LoRA and its relatives, through peft: new ones, and those of an adapter directory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_sft.errors import UserError
from lit_sft.model.random_state import own_random_state

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_INIT = re.compile(r"gaussian|orthogonal|olora|pissa|pissa_niter_\d+")


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685), with the names that peft gives to the same things."""

    r: int = 8
    """Rank of the update: an adapted [out, in] matrix gets r * (out + in) trained numbers."""
    lora_alpha: int = 8
    """The update is scaled by lora_alpha / r (with `use_rslora` by lora_alpha / sqrt(r))."""
    lora_dropout: float = 0.0
    """Share of the inputs of an adapter that is dropped in training, in [0, 1)."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear`: every linear layer but the head; or names such as [q_proj, v_proj]; or one regular expression."""
    exclude_modules: str | list[str] | None = None
    """Names, or one regular expression, of modules that are left out although `target_modules` names them."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter, such as [embed_tokens, lm_head]."""
    layers_to_transform: list[int] | None = None
    """Numbers of the decoder layers to adapt, from 0; all where null. Needs `target_modules` as a list."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks, by name or regular expression of the module: {down_proj: 32}."""
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    """Likewise other values of `lora_alpha`."""
    trainable_token_indices: list[int] | None = None
    """Ids of tokens whose embeddings are trained too, such as those of a chat template that the base never saw."""
    use_rslora: bool = False
    """Rank-stabilized scaling (arXiv:2312.03732)."""
    use_dora: bool = False
    """Direction and magnitude are trained apart (arXiv:2402.09353): better at low rank, slower."""
    init_lora_weights: bool | str = True
    """true: random A, zero B. Or gaussian, orthogonal, olora, pissa (arXiv:2404.02948), pissa_niter_N (faster SVD)."""

    def __post_init__(self) -> None:
        if self.r <= 0:
            raise UserError(f"model.lora.r is {self.r}; set a rank of at least 1, or model.lora to null for no adapter")
        if self.lora_alpha <= 0:
            raise UserError(f"model.lora.lora_alpha is {self.lora_alpha}; set a positive number, often r or 2 * r")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"model.lora.lora_dropout is {self.lora_dropout}; set a share from 0 to below 1")
        for name in ("rank_pattern", "alpha_pattern"):
            if any(value <= 0 for value in getattr(self, name).values()):
                raise UserError(f"model.lora.{name} is {getattr(self, name)}; every value must be at least 1")
        if not self.target_modules:
            raise UserError("model.lora.target_modules is empty; set all-linear or a list of module names")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError("model.lora.layers_to_transform needs model.lora.target_modules as a list of module names")
        if isinstance(self.init_lora_weights, str) and not _INIT.fullmatch(self.init_lora_weights):
            raise UserError(
                f"model.lora.init_lora_weights is {self.init_lora_weights!r}; set true, false, gaussian, orthogonal, "
                "olora, pissa or pissa_niter_N"
            )


def apply_lora(
    model: PreTrainedModel, config: LoraConfig, *, new_token_ids: Sequence[int] = (), seed: int = 0
) -> PeftModel:
    """Freezes the model and puts trainable fp32 adapters into it.

    The random numbers depend on `seed` alone, and the caller's random state stays as it was. Activation checkpointing
    must be the non-reentrant one: its gradients reach adapters over a frozen embedding without further preparation.

    Args:
        model: The base, which may be quantized to 4 bits.
        config: What is adapted, and how.
        new_token_ids: Ids whose rows of the embedding, and of the head, are trained as well.
        seed: Seed of the start values.

    Raises:
        UserError: If a name in the config fits no module of the model.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    _check_names(model, config)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            _compiled(pattern, f"model.lora.{key}")
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and _embeddings_among(model, config.target_modules):
        # One weight, adapted as two: merging would add both updates to it.
        raise UserError(
            "model.lora.target_modules names the embedding or the head, which share one weight in this model; "
            "put them into model.lora.modules_to_save instead"
        )
    tying = tied and _embeddings_among(model, config.modules_to_save or [])
    try:
        options = {**asdict(config), "trainable_token_indices": _token_rows(model, config, new_token_ids)}
        if config.target_modules == "all-linear":  # peft would adapt routers and experts, which cannot be merged
            options["target_modules"] = _all_linear(model)
        peft_config = PeftLoraConfig(task_type="CAUSAL_LM", ensure_weight_tying=tying, **options)
        with own_random_state(seed, _devices(model)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft corrects it by itself
            warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers
            adapted: Any = get_peft_model(model, peft_config)
    except ValueError as error:
        raise UserError(f"model.lora: {_first_line(error)}") from error
    for pattern in (*config.rank_pattern, *config.alpha_pattern):  # as peft matches them
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted.targeted_module_names):
            raise UserError(f"model.lora: the pattern {pattern!r} is the name of no adapted module")
    _train_in_fp32(adapted)
    return adapted


def is_adapter_dir(path: str) -> bool:
    """Whether the directory holds an adapter in peft's format."""
    return (Path(path) / "adapter_config.json").is_file()


def load_adapter(
    model: PreTrainedModel, path: str, *, base_name: str | None = None, trainable: bool = False
) -> PeftModel:
    """Loads an adapter directory over its base model.

    Args:
        model: The base; on the meta device it gets the modules and no values.
        path: The adapter directory.
        base_name: What the user calls the base; the adapter's own word for it must end in the same name.
        trainable: Whether the adapter will be trained further.

    Raises:
        UserError: If the adapter is not LoRA, or belongs to another model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    weights = Path(path) / "adapter_model.safetensors"
    if not is_adapter_dir(path) or not weights.is_file():
        raise UserError(f"{path} is no adapter directory (adapter_config.json and adapter_model.safetensors)")
    try:
        config: Any = PeftConfig.from_pretrained(path)
        if config.peft_type != "LORA":
            raise UserError(f"the adapter {path} is {config.peft_type.value}; only LoRA and its relatives are known")
        if base_name is not None:
            _check_base(path, config.base_model_name_or_path, base_name)
        with safe_open(weights, framework="pt") as file:
            saved = set(file.keys())
        config.inference_mode = not trainable
        with own_random_state(0, _devices(model)):  # peft draws start values before it reads the right ones
            if model.device.type == "meta":  # there is no place for values, which come from rank 0
                config.init_lora_weights = True
                adapted: Any = get_peft_model(model, config)
            else:
                adapted = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"the adapter {path} does not fit the base {base_name or model.name_or_path}: {_first_line(error)}"
        ) from error
    # peft only warns where the model has a place that the file does not fill.
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != expected:
        raise UserError(f"the adapter {path} belongs to another base than {model.name_or_path}: its tensors differ")
    if trainable:
        _train_in_fp32(adapted)
    return adapted


def _check_base(path: str, recorded: str | None, base_name: str) -> None:
    """Compares the last parts only: a model is copied to other folders, and a hub id becomes a folder of its name."""
    names = [Path(name).name.lower() for name in (recorded or "", base_name)]
    if names[0] and names[0] != names[1]:
        raise UserError(
            f"the adapter {path} was trained over {recorded}, not over {base_name}: set model.model_name_or_path to "
            "that; or if both are one model, correct base_model_name_or_path in its adapter_config.json"
        )


def _token_rows(model: Any, config: LoraConfig, new_token_ids: Sequence[int]) -> dict[str, list[int]] | None:
    """Which rows of which matrix are trained: of the embedding and, where it is another matrix, of the head.

    A matrix that `modules_to_save` trains as a whole is left out. peft itself wraps the head where it is tied.
    """
    ids = sorted({*(config.trainable_token_indices or ()), *new_token_ids})
    rows = model.get_input_embeddings().weight.shape[0]
    if ids and not 0 <= ids[0] <= ids[-1] < rows:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise UserError(f"model.lora.trainable_token_indices: there is no token {wrong}, only 0 to {rows - 1}")
    tied = model.config.get_text_config().tie_word_embeddings
    ends = [model.get_input_embeddings()] if tied else [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    whole = config.modules_to_save or []
    if tied and _embeddings_among(model, whole):
        return None
    found = {name: ids for name in names if not any(f".{name}".endswith(f".{w}") for w in whole)}
    return found if ids and found else None


def _check_names(model: PreTrainedModel, config: LoraConfig) -> None:
    """Refuses names that fit nothing: for peft it is enough if one target of a list is found."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = getattr(config, key)
        if wanted is None or wanted == "all-linear":
            continue
        if isinstance(wanted, str):
            unknown = [] if any(_compiled(wanted, f"model.lora.{key}").fullmatch(name) for name in names) else [wanted]
        else:
            unknown = [w for w in wanted if not any(f".{name}".endswith(f".{w}") for name in names)]
        if unknown:
            raise UserError(f"model.lora.{key}: no module is named {unknown[0]}; linear modules: {', '.join(linear)}")
    layers = model.config.get_text_config().num_hidden_layers
    for number in config.layers_to_transform or []:
        if not 0 <= number < layers:
            raise UserError(f"model.lora.layers_to_transform: there is no layer {number}, only 0 to {layers - 1}")


def _all_linear(model: Any) -> list[str]:
    """Names of the linear layers that text passes through, but the head: as short as they can be."""
    from transformers.pytorch_utils import Conv1D

    read, head = {id(module) for module in model.get_decoder().modules()}, model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if module is not head]
    wanted = {name for name, m in modules if isinstance(m, nn.Linear | Conv1D) and id(m) in read}
    short = {name.rpartition(".")[2] for name in wanted}
    named = {name for name, _ in modules if name.rpartition(".")[2] in short}
    return sorted(short if named == wanted else wanted)


def _embeddings_among(model: Any, wanted: str | list[str]) -> bool:
    """Whether input or output embedding are among the named modules (`all-linear` leaves both out)."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    if isinstance(wanted, str):
        return wanted != "all-linear" and any(re.fullmatch(wanted, name) for name in names)
    return any(f".{name}".endswith(f".{w}") for name in names for w in wanted)


def _train_in_fp32(model: PeftModel) -> None:
    """Lifts what is trained to fp32, where small updates are not lost; peft does so for its own matrices only."""
    from peft.utils import ModulesToSaveWrapper

    lift_trained(model)
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and wrapper.original_module.weight.dtype != torch.float32:
            for module in wrapper.modules_to_save.values():
                _cast_around(module, wrapper.original_module.weight.dtype)


def lift_trained(model: nn.Module) -> None:
    """Makes fp32 of the trained parameters that something has cast, as Lightning does with `bf16-true`."""
    # The public `to` and `float` would cast what is frozen, too. `_apply`, on which they are built, chooses tensor by
    # tensor; FSDP2 extends it, so that its shards follow the parameters.
    model._apply(lambda tensor: tensor.float() if tensor.requires_grad else tensor)


def _cast_around(module: nn.Module, dtype: torch.dtype) -> None:
    """Lets an fp32 module work between modules of another type, also without autocast."""

    def to_module(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(module.weight.dtype) if x.is_floating_point() else x for x in inputs)

    module.register_forward_pre_hook(to_module)
    module.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def _devices(model: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression: {error}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
