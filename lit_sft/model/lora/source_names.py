"""Adapters over the language model of a multimodal checkpoint, by the names of its own class.

peft and servers look for the modules of an adapter by name in the class of the checkpoint. Where an
adapter has other names, its weights are left out, with a warning at most. So an adapter of a text
class is renamed when it is written, and renamed back when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lit_sft.errors import UserError
from lit_sft.model import composite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What peft puts before the name of a module."""
_APPLIED = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that choose among the modules. The full names of the chosen ones need no choice."""


def rename_for_source(model: Any, directory: Path) -> None:
    """Renames the modules of an adapter that peft has written, as its multimodal source has them.

    The full names of the adapted modules are written, because a short one, such as `q_proj`, would
    also match layers of a tower.

    Args:
        model: The `PeftModel`, over a model from a multimodal checkpoint.
        directory: The adapter directory.
    """
    names = _names_in_source(model.get_base_model())
    if not names:
        return
    config = _read(directory / CONFIG)
    adapted = dict.fromkeys(model.base_model.targeted_module_names)
    config["target_modules"] = sorted(composite.renamed(adapted, names))
    if config["target_parameters"]:
        parameters = dict.fromkeys(model.base_model.targeted_parameter_names)
        config["target_parameters"] = sorted(composite.renamed(parameters, names))
    config["rank_pattern"], config["alpha_pattern"] = _patterns(model, names)
    config |= dict.fromkeys(_APPLIED)
    if config["modules_to_save"]:
        whole = dict.fromkeys(_trained_whole(model))
        config["modules_to_save"] = sorted(composite.renamed(whole, names))
    if isinstance(config.get("trainable_token_indices"), dict):
        config["trainable_token_indices"] = composite.renamed(
            config["trainable_token_indices"], names
        )
    _write(directory / CONFIG, config)
    _rename_tensors(directory / WEIGHTS, directory / WEIGHTS, names)


@contextmanager
def renamed_for_model(lm: PreTrainedModel, path: str) -> Iterator[str]:
    """Yields the directory of an adapter whose modules are named as in the model.

    Args:
        lm: The causal LM.
        path: The adapter directory. Its modules may be named as in the model, or as in the
            multimodal checkpoint that the model was loaded from.

    Raises:
        UserError: The adapter has weights for a part of the checkpoint that is not loaded.
    """
    if composite.source_of(lm) is None:
        yield path
        return
    names = {there: here for here, there in _names_in_source(lm).items()}
    modules = _modules(Path(path) / WEIGHTS)
    if not _has_names_of_source(modules, names):
        yield path
        return
    _check_all_known(modules, names, path)
    with TemporaryDirectory() as folder:
        config = _read(Path(path) / CONFIG)
        _write(Path(folder) / CONFIG, _config_for_model(config, modules, names))
        _rename_tensors(Path(path) / WEIGHTS, Path(folder) / WEIGHTS, names)
        yield folder


def _has_names_of_source(modules: Mapping[str, bool], names: Mapping[str, str]) -> bool:
    """Whether the modules of an adapter have the names of the source, which are other ones.

    Args:
        modules: As from `_modules`.
        names: The names in the model of decoder and head, by their names in the source.
    """
    if all(here == there for there, here in names.items()):
        return False
    decoder = next(iter(names))
    return any(composite.is_under(module, decoder) for module in modules)


def _check_all_known(modules: Mapping[str, bool], names: Mapping[str, str], path: str) -> None:
    """Refuses an adapter with weights for a part of the checkpoint that is not loaded.

    Raises:
        UserError: It has such weights.
    """
    strangers = []
    for module in modules:
        if not any(composite.is_under(module, name) for name in names):
            strangers.append(module)
    if strangers:
        raise UserError(
            f"the adapter {path} also adapts {min(strangers)}, which is no part of the language"
            " model: train an adapter of the language model only"
        )


def _config_for_model(
    config: dict[str, Any], modules: Mapping[str, bool], names: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the config of an adapter with the names of the model."""
    parameters = dict.fromkeys(config.get("target_parameters") or [])
    adapted = {name for name, is_adapted in modules.items() if is_adapted}
    adapted = {name for name in adapted if not _is_by_parameter(name, parameters)}
    targets = sorted(composite.renamed(dict.fromkeys(adapted), names))
    config = config | {"target_modules": targets} | dict.fromkeys(_APPLIED)
    config["target_parameters"] = list(_renamed_or_kept(parameters, names)) or None
    for key in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        config[key] = _renamed_or_kept(config.get(key), names)
    whole = dict.fromkeys(config.get("modules_to_save") or [])
    config["modules_to_save"] = list(_renamed_or_kept(whole, names)) or None
    return config


def _is_by_parameter(module: str, parameters: Iterable[str]) -> bool:
    """Whether the weights of a module adapt one of the parameters in `target_parameters`.

    Args:
        module: Full name of the module. The wrappers of one layer of experts are nested.
        parameters: Full or short names of parameters.
    """
    layers = tuple(f".{name.rpartition('.')[0]}" for name in parameters)
    return f".{module.replace('.base_layer', '')}".endswith(layers)


def _names_in_source(lm: PreTrainedModel) -> dict[str, str]:
    """The names of decoder and head in the class of the source, by their names in the model.

    Empty if transformers has no such class.
    """
    multimodal = composite.multimodal_without_weights(lm)
    return {} if multimodal is None else composite.module_names(lm, multimodal)


def _patterns(model: Any, names: Mapping[str, str]) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas by the full name of the module, where they are not those of the config."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    config: Any = model.peft_config["default"]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module, ParamWrapper):
            # Those of one module wrap each other.
            name = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        if module.r["default"] != config.r:
            ranks[name] = module.r["default"]
        if module.lora_alpha["default"] != config.lora_alpha:
            alphas[name] = module.lora_alpha["default"]
    return composite.renamed(ranks, names), composite.renamed(alphas, names)


def _trained_whole(model: Any) -> list[str]:
    """The full names of the modules that the config names for being trained as a whole."""
    from peft.utils import ModulesToSaveWrapper

    config: Any = model.peft_config["default"]
    endings = tuple(f".{name}" for name in config.modules_to_save)
    found = []
    for name, module in model.get_base_model().named_modules():
        # peft also wraps a head that is tied to the embedding.
        if isinstance(module, ModulesToSaveWrapper) and f".{name}".endswith(endings):
            found.append(name)
    return found


def _modules(weights: Path) -> dict[str, bool]:
    """The modules that an adapter has weights for, and whether these are low-rank updates."""
    from safetensors import safe_open

    found = {}
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            module, mark, _ = name.removeprefix(_PREFIX).partition(".lora_")
            found[module if mark else module.rpartition(".")[0]] = bool(mark)
    return found


def _renamed_or_kept(entries: Any, names: Mapping[str, str]) -> Any:
    """Renames the entries with full names. Short names and patterns are kept."""
    if not isinstance(entries, dict):
        return entries
    kept: dict[str, Any] = {}
    for name, value in entries.items():
        kept |= composite.renamed({name: value}, names) or {name: value}
    return kept


def _rename_tensors(source: Path, target: Path, names: Mapping[str, str]) -> None:
    """Writes the tensors of an adapter under other names.

    Raises:
        UserError: A tensor belongs to none of the named modules.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = {}
    for name, value in load_file(source).items():
        tensors[name.removeprefix(_PREFIX)] = value
    renamed = composite.renamed(tensors, names)
    if len(renamed) != len(tensors):
        raise UserError(f"{source} has tensors that the language model does not have")
    save_file({_PREFIX + name: value for name, value in renamed.items()}, target, metadata)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
