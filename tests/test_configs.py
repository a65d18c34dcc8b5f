"""Every recipe in configs/ runs as it is written, on a tiny model and a few rows in place of what is fetched."""

import pytest
import yaml
from running import REPOSITORY, chat_rows, run, scalars, version, write_rows
from tiny import save_tiny

from lit_sft import parsing

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.max_steps": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.limit_val_batches": 2,
    "trainer.enable_progress_bar": "false",
    "model.generation.max_new_tokens": 4,
    "data.max_samples": 160,
    "data.max_length": 256,
    "data.questions": '["hi"]',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(160))


def flat(tree, prefix=""):
    """{dotted key: value} of what is no section."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def recipe(name):
    return yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())


def test_there_are_recipes():
    assert {"demo", "qwen", "qwen_packed", "smollm2_135m", "lora"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, place, tmp_path):
    """Two optimizer steps and the export; every setting of the file that is not replaced is that of the run."""
    _, model, rows = place
    written = dict(flat(yaml.safe_load(path.read_text())))
    replaced = {**SMALL, "trainer.default_root_dir": tmp_path, "data.cache_dir": tmp_path / "cache"}
    for key, substitute in {"model.model_name_or_path": model, "data.train": rows}.items():
        if not str(written[key]).startswith("builtin:"):
            replaced[key] = substitute
    run("fit", ["--config", path.stem, *(f"--{key}={value}" for key, value in replaced.items())])
    assert len(scalars(tmp_path, "train/loss")) == 2
    used = dict(flat(yaml.safe_load((version(tmp_path) / "config.yaml").read_text())))
    kept = written.keys() - replaced.keys()
    assert {key: used[key] for key in kept} == {key: written[key] for key in kept}
    weights = "adapter_model.safetensors" if "model.lora.r" in written else "model.safetensors"
    assert (version(tmp_path) / "hf" / weights).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_found_by_its_name(path):
    assert parsing.packaged_config(path.stem) == str(path)


def test_the_recipe_of_the_courses():
    """What people know from there, to the letter."""
    settings = dict(flat(recipe("qwen")))
    assert (
        settings.items()
        >= {
            "model.model_name_or_path": "Qwen/Qwen3-0.6B-Base",
            "model.optimizer.init_args.lr": 8e-5,
            "model.gradient_checkpointing": False,
            "trainer.max_epochs": 1,
            "trainer.log_every_n_steps": 2,
            "trainer.precision": "bf16-mixed",
            "data.train": "banghua/DL-SFT-Dataset",
            "data.packing": False,
            "data.micro_batch_size": 1,
            "data.global_batch_size": 8,
            "data.chat_template_kwargs.enable_thinking": False,
        }.items()
    )


def test_the_packed_variant_differs_in_packing_only():
    plain, packed = dict(flat(recipe("qwen"))), dict(flat(recipe("qwen_packed")))
    assert packed.pop("data.packing") is True and plain.pop("data.packing") is False
    assert packed == plain
