"""The records of the settings: the same names as the constructors, and the same fingerprints in
every release.
"""

import inspect
import pickle
from dataclasses import FrozenInstanceError, fields
from types import SimpleNamespace
from typing import get_type_hints

import pytest
from running import write_rows
from tiny import save_tiny
from torch.optim import SGD

from lit_sft.callbacks.prediction_writer import _hash
from lit_sft.checkpoint.data_position import remember
from lit_sft.data.cache import cache_key
from lit_sft.datamodule import SFTDataModule
from lit_sft.errors import UserError
from lit_sft.model.generate import GenerationOptions
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model_builder import fingerprint
from lit_sft.module import SFTModule
from lit_sft.preprocessing import Preparation, Reading
from lit_sft.settings import DataConfig, ModelConfig

PAIRS = [(SFTModule, ModelConfig), (SFTDataModule, DataConfig)]


@pytest.mark.parametrize(("module", "record"), PAIRS)
def test_a_record_has_the_arguments_of_its_constructor(module, record):
    """Names, order and types; the constructor alone has the defaults."""
    arguments = list(inspect.signature(module.__init__).parameters)[1:]
    assert [field.name for field in fields(record)] == arguments
    types = get_type_hints(module.__init__)
    assert get_type_hints(record) == {name: types[name] for name in arguments}


@pytest.mark.parametrize(("module", "record"), PAIRS)
def test_every_argument_reaches_its_field(module, record):
    values = {
        name: object() for name in inspect.signature(module.__init__).parameters if name != "self"
    }
    allowed = {"lora": None, "trainable": None, "adapter_name_or_path": None, "quantization": None}
    allowed |= {"validation": None, "max_length": 7, "add_tokens": ["<a>"], "format": "alpaca"}
    allowed |= {"micro_batch_size": 3, "global_batch_size": 6, "max_samples": 5}
    allowed |= {"num_workers": 2, "seed": 11, "cache_max_gb": 4.5}
    values |= {name: value for name, value in allowed.items() if name in values}
    assert vars(module(**values).options) == values


def test_records_are_pickled_and_never_changed():
    data = SFTDataModule("rows.jsonl", column_mapping={"question": "prompt"}).options
    model = SFTModule("here", lora=LoraConfig(r=4), optimizer=SGD).options
    for record in (data, model):
        assert pickle.loads(pickle.dumps(record)) == record
        with pytest.raises(FrozenInstanceError):
            record.seed = 7


def test_the_refusals_of_the_data_settings():
    with pytest.raises(UserError, match="data.validation and data.val_size exclude each other"):
        SFTDataModule(validation="rows.jsonl", val_size=0.1)
    with pytest.raises(UserError, match="data.max_length is 1, it must be at least 2"):
        SFTDataModule(max_length=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "chatml"}, "data.format is 'chatml', expected auto, messages, sharegpt"),
        (
            {"format": "messages", "prompt_template": "{question}"},
            "data.prompt_template fills in columns, but data.format is messages",
        ),
    ],
)
def test_a_wrong_format_is_no_bad_row(options, said):
    """With `data.on_bad_row: skip` every row would be skipped for it."""
    with pytest.raises(UserError, match=said):
        SFTDataModule(on_bad_row="skip", **options)


# ---------------------------------------------------------------------- a release continues what an
# older one began


OUT_OF_RANGE = [
    {"micro_batch_size": 0},
    {"global_batch_size": -8},
    {"max_samples": 0},
    {"num_workers": -1},
    {"seed": -1},
    {"seed": 2**32},
    {"max_length": 1},
]


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_the_constructors_refuse_what_is_out_of_range(options):
    """From Python, too, where no parser looks at the values."""
    ((key, value),) = options.items()
    with pytest.raises(UserError, match=f"^data.{key} is {value}, it must be"):
        SFTDataModule(**options)
    if key == "seed":
        with pytest.raises(UserError, match=f"^model.seed is {value}, it must be from 0"):
            SFTModule(**options)


def test_a_half_written_predict_is_continued(tmp_path):
    model = save_tiny(tmp_path / "model")
    module = SFTModule(
        model,
        lora=LoraConfig(r=4),
        add_tokens=["<a>"],
        seed=7,
        generation=GenerationOptions(max_new_tokens=5),
    )
    found = fingerprint(module.options, "32-true", None)
    assert found.pop("model") == model
    assert [file for file, *_ in found.pop("files")] == [f"{model}/model.safetensors"]
    assert found == {
        "init": "'pretrained'",
        "dtype": "'auto'",
        "attn_implementation": "'auto'",
        "lora": (
            "LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules='all-linear',"
            " exclude_modules=None, modules_to_save=None, layers_to_transform=None,"
            " rank_pattern={}, alpha_pattern={}, trainable_token_indices=None, use_rslora=False,"
            " use_dora=False, init_lora_weights=True)"
        ),
        "adapter_name_or_path": "None",
        "quantization": "None",
        "add_tokens": "['<a>']",
        "generation": (
            "GenerationOptions(max_new_tokens=5, do_sample=False, temperature=1.0, top_p=1.0,"
            " top_k=None, num_return_sequences=1)"
        ),
        "seed": "7",
        "precision": "32-true",
    }
    assert _hash(found) == "b92e4639bba026ef"


def test_a_cache_and_a_position_are_found_again(tmp_path):
    model = save_tiny(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    module = SFTDataModule(
        rows,
        model_name_or_path=model,
        max_length=64,
        overlong="truncate",
        system_prompt="Be brief.",
        global_batch_size=4,
        seed=3,
        cache_dir=str(tmp_path),
    )
    preparation = module.data.preparation(module.data.open("train"))
    assert preparation.readings == {0: Reading("messages", None)}
    renderer = SimpleNamespace(fingerprint=lambda: {"tokenizer": "t", "train_on": "completions"})
    preparation = Preparation(**{**vars(preparation), "renderer": renderer})
    identity = preparation.identity(SimpleNamespace(fingerprint="rows-1")) | {
        "libraries": ["a", "b"]
    }
    assert cache_key(identity) == "3883586347d6ec2ada019325"
    caches = {"train": SimpleNamespace(fingerprint="e")}
    assert remember(identity, module.options, caches, SimpleNamespace(fingerprint="p")) == {
        "examples": "e",
        "settings": {
            "tokenizer": '"t"',
            "train_on": '"completions"',
            "cache": "10",
            "rows": '"rows-1"',
            "readings": '[[0, "messages", null]]',
            "libraries": '["a", "b"]',
            "prompt_template": "null",
            "system_prompt": '"Be brief."',
            "on_bad_row": '"error"',
            "max_length": "64",
            "overlong": '"truncate"',
        },
        "order": {"packing": "true", "global_batch_size": "4", "seed": "3"},
        "packs": "p",
        "validation": None,
    }
