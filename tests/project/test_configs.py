"""Every recipe in configs/ runs as it is written, on a tiny model and a few rows in place of what
is fetched.
"""

import json
import subprocess
import sys

import pytest
import yaml
from chat_templates import QWEN3
from running import REPOSITORY, chat_rows, environment, run, scalars, version, write_rows
from tiny import save_tiny, tiny_tokenizer

from lit_sft.recipes import recipes

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
    # The recipes set `enable_thinking`, which only a template that reads it takes.
    model = save_tiny(folder / "model", tokenizer=tiny_tokenizer(chat_template=QWEN3))
    return folder, model, write_rows(folder / "train.jsonl", chat_rows(160))


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
    assert {"demo", "qwen", "qwen_packed", "smollm2_135m", "lora"} <= {
        path.stem for path in RECIPES
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, place, tmp_path):
    """Two optimizer steps and the export; every setting of the file that is not replaced is that of
    the run.
    """
    _, model, rows = place
    written = dict(flat(yaml.safe_load(path.read_text())))
    if "data.prompt_template" in written:
        texts = [
            {"instruction": "Add", "input": f"{n} + 1", "output": str(n + 1)} for n in range(160)
        ]
        rows = write_rows(tmp_path / "alpaca.jsonl", texts)
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
    assert recipes()[path.stem] == path


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


def test_the_pair_of_formats():
    """The values of the courses, and nothing but the template differs."""
    first, second = (dict(flat(recipe(f"format_{name}"))) for name in ("instruction", "question"))
    assert first.pop("data.prompt_template") == "指令：{instruction}\n输入：{input}\n回答："
    assert second.pop("data.prompt_template") == "问题：{input}\n回答："
    assert first == second
    expected = {
        "trainer.max_steps": 30,
        "model.optimizer.init_args.lr": 5e-5,
        "model.lr_schedule.warmup_steps": 3,
        "data.chat_template": "raw",
        "data.train_on": "all",
        "data.max_length": 512,
        "data.micro_batch_size": 2,
        "data.global_batch_size": 2,
    }
    assert first.items() >= expected.items()


@pytest.mark.slow
def test_formats_are_compared_without_any_file(tmp_path):
    """As it stands, with built-in rows and the built-in model."""
    command = [sys.executable, "scripts/compare_formats.py", "--trainer.max_steps", "2"]
    command += ["--trainer.accelerator=cpu", f"--data.cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["rows"], result["rows_without_input"]) == (200, 0)
    assert result["format_question"]["eval_loss"] > 0


@pytest.mark.slow
def test_formats_are_compared(place, tmp_path):
    """Both losses of both formats, on a tiny model; rows without an input are counted."""
    rows = [
        {"instruction": "Add", "input": f"{n} + 1" if n else "", "output": str(n + 1)}
        for n in range(40)
    ]
    command = [
        sys.executable,
        "scripts/compare_formats.py",
        "--data",
        write_rows(tmp_path / "rows.jsonl", rows),
    ]
    command += [
        "--model",
        place[1],
        "--trainer.accelerator=cpu",
        # Less than trainer.val_check_interval: the runs do not validate.
        "--trainer.max_steps=4",
    ]
    command += [f"--data.cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result.pop("rows"), result.pop("rows_without_input")) == (40, 1)
    assert set(result) == {"format_instruction", "format_question"}
    for losses in result.values():
        assert 0 < losses["eval_loss"] < 7 and 0 < losses["answer_loss"] < 7
        assert losses["eval_loss"] != losses["answer_loss"]
