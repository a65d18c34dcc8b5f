"""Takes a tiny checkpoint of a family through training, packing, adapters and export, and says what came of it.

What cannot be right in any family is an assertion. What is refused is a value, with its reason.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from models import families
from running import arguments, chat_rows, final_weights, run, version, write_rows
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_sft.errors import UserError
from lit_sft.model import composite, load, quantization
from lit_sft.model.attention import packed
from lit_sft.model.lora.load import load_adapter
from lit_sft.model.loss import CausalLMLoss
from lit_sft.model_builder import FastPaths, apply_fast_paths, probe

COLUMNS = ("full", "LoRA", "QLoRA", "packed", "fused", "export")
LORA = {"model__lora": {"r": 4}}
QLORA = {**LORA, "model__quantization": "nf4"}
UNTRAINED = (
    "e_score_correction_bias", "expert_bias", "moe_statics", "tid2eid", "ffn.gate.bias", "layer_scalar", "act_fn.beta", "act_fn.eps",
    "query_decay", "key_decay", "diagonal_decay", "slope_rate", ".indexer.",
)  # fmt: skip
"""Tensors of language models that no gradient reaches."""
SCALES = re.compile(r"(\.weight_scale_inv|\.activation_scale|_scales)$")
"""Tensors of quantized weights that have no place among plain ones."""
IDS = torch.arange(5, 29).reshape(2, 12)
LENGTHS = (20, 60, 40)
"""Of examples in one row, on both sides of the windows and chunks in the configs of `families`."""


class Refused(Exception):
    """A command ended with this line."""


def measure(name: str, folder: Path) -> dict[str, str]:
    """Takes a family through the chain: the value of each column."""
    source = Path(families.save(name, folder / "source"))
    rows = write_rows(folder / "train.jsonl", chat_rows(12))
    place = str(source), rows
    try:
        paths, model = _fast_paths(source)
    except UserError as error:
        reason = str(error).removeprefix(f"{source} ")
        return {**dict.fromkeys(COLUMNS, "-"), "full": f"no: {reason}"}
    values = {"packed": _packed(source, model, paths), "fused": _fused(model, paths)}
    values["full"], values["export"] = _full(place, folder / "full")
    values["LoRA"] = _lora(place, folder / "lora")
    values["QLoRA"] = _qlora(place, folder / "qlora")
    return {column: values[column] for column in COLUMNS}


def fit(place: tuple[str, str], root: Path, **options: Any) -> Path:
    """Trains for three steps of packed rows. Returns the run's folder.

    Raises:
        Refused: The run ended with an error for the user.
    """
    settings = {"data__global_batch_size": 4, "trainer__max_steps": 3, **options}
    fast = {"model__optimizer": "torch.optim.SGD", "model__optimizer__lr": 0.5}
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            run("fit", arguments(*place, root, trainer__max_epochs=-1, **fast, **settings))
    except SystemExit as end:
        *_, line = output.getvalue().strip().splitlines()
        raise Refused(line.removeprefix("error: ")) from end
    return version(root)


def language_model(source: Path | str) -> Any:
    return load.load_model(
        str(source), init="pretrained", dtype=torch.float32, attn_implementation="eager", seed=0
    ).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = composite.text_of(model)(input_ids=IDS).logits
    return found


def multimodal(folder: Path | str) -> Any:
    return _reloaded(transformers.AutoModelForImageTextToText, folder)


def plain(folder: Path | str) -> Any:
    return _reloaded(transformers.AutoModelForCausalLM, folder)


def _reloaded(factory: Any, folder: Path | str) -> Any:
    return factory.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()


def own_class(folder: Path | str) -> Any:
    """The model as plain transformers loads it, in the class that its config names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return plain(folder) if not composite.is_composite(config) else multimodal(folder)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def trained_model(source: Path, root: Path) -> Any:
    """The model of a source with the weights of the last checkpoint of a run."""
    trained = language_model(source)
    weights = {key.removeprefix("model.lm."): value for key, value in final_weights(root).items()}
    trained.load_state_dict(weights)
    return trained


def _full(place: tuple[str, str], root: Path) -> tuple[str, str]:
    """Trains all weights. The export is the source with other weights, and has the logits of the training."""
    source = Path(place[0])
    try:
        folder = fit(place, root)
    except Refused as refused:
        return f"no: {refused}", "-"
    expected = logits(trained_model(source, root))
    assert_same(logits(own_class(folder / "hf")), expected)
    _check_tensors(source, folder / "hf")
    _check_files(source, folder / "hf")
    config = transformers.AutoConfig.from_pretrained(source)
    if not composite.is_composite(config) or not composite.class_names(config)[0]:
        return "yes", "yes"
    # The text class of transformers reads it, too.
    assert_same(logits(plain(folder / "hf")), expected)
    return "yes", "yes, as text too"


def _check_tensors(source: Path, folder: Path) -> None:
    """The names and files are those of the source, without scales; what is trained has changed."""
    before, after = families.tensors_of(source), families.tensors_of(folder)
    assert {file: _plain_names(found) for file, found in before.items()} == {
        file: set(found) for file, found in after.items()
    }
    for file, tensors in before.items():
        for key, value in tensors.items():
            if SCALES.search(key) or key.endswith("_blocks"):
                continue
            found = after[file][key]
            if value.dtype == torch.float8_e4m3fn:
                assert found.dtype.itemsize > 1
                continue
            assert found.dtype == value.dtype, key
            is_same = torch.equal(found, value)
            if not families.is_text(key) or any(name in key for name in UNTRAINED):
                assert is_same, key
            else:
                # The few tokens need not choose every expert.
                assert not is_same or ".experts." in key, key


def _plain_names(names: Iterable[str]) -> set[str]:
    """Names without those of scales, and those of weights in MXFP4 as they are without."""
    found = set()
    for name in names:
        if not SCALES.search(name):
            found.add(name.removesuffix("_blocks"))
    return found


def _check_files(source: Path, folder: Path) -> None:
    """The files beside the weights are those of the source, except for the token that ends turns."""
    for name in ("tokenizer.json", "preprocessor_config.json"):
        if (source / name).exists():
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    before, after = _config(source), _config(folder)
    assert "quantization_config" not in after
    assert before.pop("quantization_config", None) is None or before
    for config in (before, after):
        config.get("text_config", config).pop("eos_token_id")
    if "text_config" in before:
        assert after == before
    else:
        assert before.items() <= after.items()


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _lora(place: tuple[str, str], root: Path) -> str:
    """Trains an adapter, which peft puts over the source."""
    try:
        folder = fit(place, root, trainer__max_steps=1, **LORA)
    except Refused as refused:
        return f"no: {refused}"
    adapter = str(folder / "hf")
    base = language_model(place[0])
    before = logits(base)
    expected = logits(load_adapter(base, adapter).eval().get_base_model())
    over_source = peft.PeftModel.from_pretrained(own_class(place[0]), adapter).eval()
    assert_same(logits(over_source.get_base_model()), expected)
    assert not torch.equal(expected, before)
    adapted = load_file(folder / "hf" / "adapter_model.safetensors")
    assert all(families.is_text(key) for key in adapted)
    return _apart_from_experts(base, any(".experts." in key for key in adapted))


def _apart_from_experts(lm: Any, has_experts: bool) -> str:
    routed = any(".experts." in key for key, _ in lm.named_parameters())
    return "yes" if has_experts or not routed else "no experts"


def _qlora(place: tuple[str, str], root: Path) -> str:
    """Trains an adapter over a base in NF4."""
    try:
        fit(place, root, trainer__max_steps=1, **QLORA)
    except Refused as refused:
        return f"no: {refused}"
    lm = load.load_model(
        place[0], init="pretrained", dtype=torch.float32, attn_implementation="eager", seed=0,
        quantization_config=quantization.nf4(torch.float32),
    )  # fmt: skip
    in_four_bits = [key for key, p in lm.named_parameters() if type(p).__name__ == "Params4bit"]
    return _apart_from_experts(lm, any(".experts." in key for key in in_four_bits))


def _fast_paths(source: Path) -> tuple[FastPaths, CausalLMLoss]:
    chosen = packed.choose("auto")
    lm = load.load_model(
        str(source), init="pretrained", dtype=torch.float32, attn_implementation=chosen, seed=0
    )
    model = CausalLMLoss(lm.eval())
    paths = probe(model)
    apply_fast_paths(model, paths)
    return paths, model


@torch.no_grad()
def _packed(source: Path, model: CausalLMLoss, paths: FastPaths) -> str:
    """The loss of examples in one row is the sum of transformers' own, each alone."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 320, (length,), generator=generator) for length in LENGTHS]
    own = language_model(source)
    theirs = sum(_own_loss(own, ids) for ids in rows)
    end = torch.tensor([-100])
    labels = torch.cat([torch.cat([ids[1:], end]) for ids in rows])[None]
    positions = torch.cat([torch.arange(len(ids)) for ids in rows])[None]
    ours = model.eval()(torch.cat(rows)[None], labels, positions, LENGTHS).loss_sum
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    if paths.one_by_one:
        return "one by one"
    if paths.separate_rows:
        return "padded"
    return "by example" if paths.mixers else "yes"


def _own_loss(lm: Any, ids: Tensor) -> Tensor:
    # A copy, because `dynamic` rotary frequencies remember the example before.
    text = composite.text_of(copy.deepcopy(lm))
    found = text(input_ids=ids[None], use_cache=False).logits[0]
    return cross_entropy(found[:-1].float(), ids[1:], reduction="sum")


def _fused(model: CausalLMLoss, paths: FastPaths) -> str:
    kinds = set()
    for name in paths.fused:
        is_norm = type(model.lm.get_submodule(name)).__name__.endswith("Norm")
        kinds.add("norms" if is_norm else "MLPs")
    return ", ".join(sorted(kinds, reverse=True)) or "no"
