"""The command line: one line for what is wrong, which key and where; recipes by name; which setting
wins.
"""

import inspect
import json
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from running import REPOSITORY, arguments, chat_rows, environment, run, scalars, version, write_rows
from terminal import log_lines, refused
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoTokenizer

import lit_sft
from lit_sft.cli import arguments as cli_arguments
from lit_sft.cli import front_door
from lit_sft.cli.errors import MESSAGES, one_line
from lit_sft.cli.main import OURS, SFTCLI
from lit_sft.cli.trainer import CommandTrainer
from lit_sft.recipes import recipes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(16))


@pytest.fixture
def args(place, tmp_path):
    """Arguments of a run of one step; overrides as for `arguments`."""
    _, model, rows = place

    def get(**overrides):
        small = {"data__packing": False, "trainer__max_steps": 1}
        return arguments(model, rows, tmp_path / "runs", **{**small, **overrides})

    return get


def config(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------ the front door


def program(*args, cwd=REPOSITORY):
    """`python -m lit_sft ARGS`: (exit code, stdout, stderr)"""
    env = environment(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(
        [sys.executable, "-m", "lit_sft", *args], cwd=cwd, capture_output=True, text=True, env=env
    )
    return done.returncode, done.stdout, done.stderr


def lists_the_commands(text):
    """Whether there is one line for each, and it is about this program."""
    lines = text.splitlines()
    listed = {
        name: [line for line in lines if line.startswith(f"  {name} ")]
        for name in front_door.COMMANDS
    }
    return text.startswith("usage: lit-sft") and all(len(found) == 1 for found in listed.values())


def test_no_command():
    code, out, err = program()
    assert code == 2 and out == "" and lists_the_commands(err)


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_of_the_program(flag):
    code, out, err = program(flag)
    assert code == 0 and err == "" and lists_the_commands(out) and "Lightning" not in out


def test_version():
    for word in ("--version", "-V", "version"):
        assert program(word) == (0, f"lit-sft {lit_sft.__version__}\n", "")


def test_a_config_that_is_no_text(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"data:\n  train: \xff\xfe\n")
    line = refused(capsys, "fit", ["--config", str(path)], code=2)
    assert f"--config {path} is no UTF-8 text" in line and "save it as UTF-8" in line


ALL = "fit, validate, test, predict, preview, doctor, export, cache, recipes"
NO_COMMAND = {
    "pedict": "there is no command `pedict`: did you mean predict?",
    "train": f"there is no command `train`: the commands are {ALL}",
    "--config": f"the command comes first, before --config: one of {ALL}",
}


@pytest.mark.parametrize(("typed", "said"), NO_COMMAND.items(), ids=NO_COMMAND)
def test_a_command_that_does_not_exist(typed, said):
    assert program(typed, "demo", "fit") == (2, "", f"error: {said}\n")


def test_commands_are_those_of_the_program():
    """What is listed without an import of Lightning is what there is, and our docstrings say the
    same.
    """
    assert set(front_door.COMMANDS) == set(SFTCLI.subcommands())
    for name in OURS:
        assert (
            inspect.getdoc(getattr(CommandTrainer, name)).splitlines()[0]
            == front_door.COMMANDS[name]
        )


ANYWHERE = [
    ["export", "--help"],
    ["predict", "--ckpt_path", "last", "--help"],
    ["predict", "-h", "--ckpt_path=gone.ckpt"],
    ["fit", "--config", "gone.yaml", "--data.max_length=many", "--help"],
]


@pytest.mark.parametrize("typed", ANYWHERE, ids=" ".join)
def test_help_of_a_command_needs_nothing(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(typed[0], typed[1:])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.startswith(f"usage: lit-sft {typed[0]} ")
    assert front_door.COMMANDS[typed[0]] in out and "--data.max_length" in out


@pytest.mark.parametrize("typed", [["export"], ["predict", "--ckpt_path", "last"]], ids=" ".join)
def test_print_config_needs_no_run(typed, tmp_path, monkeypatch, capsys):
    """But says that what it prints is not what a run was made with."""
    monkeypatch.chdir(tmp_path)
    with log_lines() as lines, pytest.raises(SystemExit) as caught:
        run(typed[0], [*typed[1:], "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (
        caught.value.code == 0
        and printed["ckpt_path"] == "last"
        and printed["data"]["max_length"] == 2048
    )
    assert len(lines) == 1 and lines[0].startswith(
        "the config of no run is read: --ckpt_path last: there is no"
    )


# ------------------------------------------------------------------ messages

UNKNOWN = "unknown key data.lenght (command line): did you mean data.length?"
NO_CLASS = (
    'Parser key "data.kind":\n  Type X expects a function or a callable class: {}. Got value:'
    " gone.Y"
)
UNION = """Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: x"""
SAID = [
    ("Subcommand 'fit' does not accept option 'data.lenght'", UNKNOWN),
    ("Option 'lenght' is not accepted", UNKNOWN),
    ("unrecognized arguments: --data.lenght=3 --x", UNKNOWN),
    ("unrecognized arguments: demo", "unrecognized arguments: demo; keys begin with --"),
    (
        NO_CLASS.format("No module named 'gone'"),
        (
            "data.kind (command line): No module named 'gone': `pip install gone`, or choose"
            " another class"
        ),
    ),
    (
        NO_CLASS.format("Expected an import path or a subclass spec, but got None"),
        "data.kind (command line): got null, expected a class, e.g. torch.optim.AdamW",
    ),
    (
        NO_CLASS.format("module 'torch' has no attribute 'Y'"),
        "data.kind (command line): module 'torch' has no attribute 'Y'",
    ),
    (
        f'Parser key "length":\n  {UNION}',
        "data.length (command line): got x, expected a whole number or null",
    ),
    (
        "Parser key \"data\": Unable to load config 'null'",
        ("data (command line): got null, expected keys with values: leave it out for the defaults"),
    ),
    (
        "Parser key \"data.kind\": 'z' not among choices ['a', 'b'] - or so",
        "data.kind (command line): 'z' not among choices ['a', 'b']",
    ),
    (
        "Unexpected config: - data\n",
        (
            "--config gone.yaml: Unexpected config: - data; expected keys with values, as"
            " --print_config shows"
        ),
    ),
]
TYPED_WORDS = [
    "fit",
    "--config",
    "gone.yaml",
    "--data.lenght=3",
    "--data.length=x",
    "--data.kind=gone.Y",
]


@pytest.mark.parametrize(
    ("row", "message", "said"), [(row, *texts) for row, texts in enumerate(SAID)]
)
def test_every_row_of_messages(row, message, said):
    """What jsonargparse says in the wording of its release, and that no earlier row takes it."""
    text = " ".join(message.split())
    assert [bool(re.search(pattern, text)) for pattern, _ in MESSAGES[: row + 1]] == [
        False
    ] * row + [True]
    assert one_line(message, TYPED_WORDS, {"data.length", "data.kind"}) == said


def test_each_row_of_messages_is_tested():
    assert len(SAID) == len(MESSAGES)


def test_a_message_that_no_row_fits():
    """Its first line."""
    assert one_line("\nsomething new: x\n  and how it came\n", ["fit"], set()) == "something new: x"


# ------------------------------------------------------------------ unknown keys

TYPED = {
    "--data.max_lenght=3": "data.max_lenght (command line): did you mean data.max_length?",
    "--trainer.max_epoch=3": (
        "trainer.max_epoch (command line): did you mean trainer.max_epochs?"
    ),  # no abbreviations
    "--modle.dtype=auto": "modle.dtype (command line): did you mean model.dtype?",
    "--max_length=3": "max_length (command line): did you mean data.max_length?",
    "--model.generation.max_tokens=3": "did you mean model.generation.max_new_tokens?",
    "--model.lora.lora_alhpa=3": (
        "model.lora.lora_alhpa (command line): did you mean model.lora.lora_alpha?"
    ),
    '--model.lora={"r": 4, "rnk": 3}': "model.lora.rnk (command line): ",
    "--model.optimizer.lrr=3": (
        "model.optimizer.lrr (command line): did you mean model.optimizer.init_args.lr?"
    ),
    "--early_stopping.patienc=3": "did you mean early_stopping.patience?",
    "-data.max_length=3": "did you mean data.max_length?",
    "--zzz=3": "zzz (command line): `--print_config` shows all keys",
}


@pytest.mark.parametrize(("typed", "expected"), TYPED.items(), ids=TYPED)
def test_unknown_key_on_the_command_line(typed, expected, args, capsys):
    line = refused(capsys, "fit", [*args(), typed], code=2)
    assert line.startswith("unknown key ") and expected in line


IN_FILES = {
    "data: {max_lenght: 3}": ("data.max_lenght", "data.max_length"),
    "modle: {dtype: auto}": ("modle.dtype", "model.dtype"),
    "trainer: {max_epoch: 3}": ("trainer.max_epoch", "trainer.max_epochs"),
    "model: {generation: {max_tokens: 3}}": (
        "model.generation.max_tokens",
        "model.generation.max_new_tokens",
    ),
    "model: {lora: {r: 4, lora_alhpa: 3}}": ("model.lora.lora_alhpa", "model.lora.lora_alpha"),
    "model: {evaluation: {num_sample: 4}}": (
        "model.evaluation.num_sample",
        "model.evaluation.num_samples",
    ),
    "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1, momentun: 1}}}": (
        "model.optimizer.init_args.momentun",
        "model.optimizer.init_args.momentum",
    ),
    "early_stopping: {moniter: val/loss}": ("early_stopping.moniter", "early_stopping.monitor"),
    "fit: {data: {max_length: 3}}": ("fit.data.max_length", "data.max_length"),
}


@pytest.mark.parametrize(("text", "keys"), IN_FILES.items(), ids=IN_FILES)
def test_unknown_key_in_a_file(text, keys, args, tmp_path, capsys):
    file = config(tmp_path, text)
    line = refused(capsys, "fit", ["--config", file, *args()], code=2)
    assert line == f"unknown key {keys[0]} ({file}): did you mean {keys[1]}?"


# ------------------------------------------------------------------ wrong values

VALUES = {
    "data: {max_length: many}": "data.max_length (FILE): got many, expected a whole number",
    "data: {max_length: null}": "data.max_length (FILE): got null, expected a whole number",
    "data: {packing: maybe}": "data.packing (FILE): got maybe, expected true or false",
    "data: {overlong: cut}": "data.overlong (FILE): got cut, expected drop, truncate or error",
    "data: {val_size: lots}": (
        "data.val_size (FILE): got lots, expected a whole number, a number or null"
    ),
    "data: {questions: hello}": "data.questions (FILE): got hello, expected a list",
    "model: {lora: {rank_pattern: null}}": (
        "model.lora.rank_pattern (FILE): got null, expected keys with values"
    ),
    "model: {optimizer: null}": "model.optimizer (FILE): got null, expected a class",
    "data: null": "data (FILE): got null, expected keys with values",
    "trainer: 3": "trainer (FILE): got 3, expected keys with values",
    "model: {generation: [3]}": "model.generation (FILE): got [3], expected keys with values",
    "model: {lora: 3}": "model.lora (FILE): got 3, expected keys with values or null",
    "model: {lora: {r: x}}": "model.lora.r (FILE): got x, expected a whole number",
    "model: {optimizer: {class_path: torch.optim.AdamWW}}": (
        "module 'torch.optim' has no attribute 'AdamWW'"
    ),
    "model: {optimizer: {class_path: not_there.optim.AdamW8bit}}": (
        "model.optimizer (FILE): cannot import not_there.optim.AdamW8bit: No module named"
        " 'not_there': `pip install not_there`, or choose another class"
    ),
    "data: {model_name_or_path: gpt2}": (
        "data.model_name_or_path (FILE): follows from model.model_name_or_path"
    ),
    "data: {seed: 3}": "data.seed (FILE): follows from int(seed_everything): leave it out",
}


CALLBACK = "lightning.pytorch.callbacks.LearningRateMonitor"
CLASSES = {
    "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LearningRateMonitorr}]}": (
        "trainer.callbacks (FILE): cannot import lightning.pytorch.callbacks.LearningRateMonitorr:"
        " module 'lightning.pytorch.callbacks' has no attribute 'LearningRateMonitorr': did you"
        " mean LearningRateMonitor?"
    ),
    "trainer: {callbacks: [{class_path: gone.Callback}]}": (
        "trainer.callbacks (FILE): cannot import gone.Callback: No module named 'gone': `pip"
        " install gone`, or choose another class"
    ),
    "trainer: {logger: lightning.pytorch.loggers.CSVLoggerr}": (
        "trainer.logger (FILE): cannot import lightning.pytorch.loggers.CSVLoggerr"
    ),
    "trainer: {strategy: {class_path: lit_sft.distributed.fsdp2.FSDP3Strategy}}": (
        "trainer.strategy (FILE): cannot import lit_sft.distributed.fsdp2.FSDP3Strategy"
    ),
    "trainer: {plugins: [{class_path: lit_sft.gone.Plugin}]}": (
        "trainer.plugins (FILE): cannot import lit_sft.gone.Plugin: there is no module lit_sft.gone"
    ),
    f"trainer: {{callbacks: [{{class_path: {CALLBACK}, init_args: {{log_momentun: true}}}}]}}": (
        "unknown key trainer.callbacks[0].init_args.log_momentun (FILE): did you mean"
        " trainer.callbacks[0].init_args.log_momentum?"
    ),
    f"trainer: {{callbacks: [{{class_path: {CALLBACK}, dict_kwargs: {{log_momentun: true}}}}]}}": (
        f"unknown key trainer.callbacks[0].dict_kwargs.log_momentun (FILE): {CALLBACK} takes no"
        " such argument: did you mean trainer.callbacks[0].dict_kwargs.log_momentum?"
    ),
    "model: {optimizer: {class_path: torch.optim.AdamW, dict_kwargs: {lrr: 1}}}": (
        "unknown key model.optimizer.dict_kwargs.lrr (FILE): torch.optim.AdamW takes no such"
        " argument: did you mean model.optimizer.dict_kwargs.lr?"
    ),
    (
        "trainer: {logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args:"
        " {save_dir: x}, dict_kwargs: {max_queu: 1}}}"
    ): (
        "unknown key trainer.logger.dict_kwargs.max_queu (FILE):"
        " lightning.pytorch.loggers.TensorBoardLogger takes no such argument: did you mean"
        " trainer.logger.dict_kwargs.max_queue?"
    ),
    (
        "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, dict_kwargs:"
        " {static_grap: true}}}"
    ): (
        "unknown key trainer.strategy.dict_kwargs.static_grap (FILE):"
        " lightning.pytorch.strategies.DDPStrategy takes no such argument: did you mean"
        " trainer.strategy.dict_kwargs.static_graph?"
    ),
    # Lightning drops what the profilers of torch do not take.
    "trainer: {profiler: {class_path: PyTorchProfiler, dict_kwargs: {profile_memoryy: true}}}": (
        "unknown key trainer.profiler.dict_kwargs.profile_memoryy (FILE):"
    ),
    "trainer: {callbacks: [{cllass_path: lightning.pytorch.callbacks.Timer}]}": (
        "unknown key trainer.callbacks[0].cllass_path (FILE): did you mean"
        " trainer.callbacks[0].class_path?"
    ),
    "trainer: {sttrategy: {class_path: lightning.pytorch.strategies.DDPStrategy}}": (
        "unknown key trainer.sttrategy.class_path (FILE): did you mean trainer.strategy?"
    ),
}


@pytest.mark.parametrize(("text", "expected"), CLASSES.items(), ids=CLASSES)
def test_classes_and_their_arguments(text, expected, tmp_path, capsys):
    file = config(tmp_path, text)
    line = refused(capsys, "fit", ["--config", file], code=2)
    assert expected.replace("FILE", file) in line, line


@pytest.mark.parametrize(("text", "expected"), VALUES.items(), ids=VALUES)
def test_wrong_value(text, expected, tmp_path, capsys):
    file = config(tmp_path, text)
    assert expected.replace("FILE", file) in refused(capsys, "fit", ["--config", file], code=2)


def test_the_wrong_value_on_the_command_line_is_not_blamed_on_the_file(tmp_path, capsys):
    file = config(tmp_path, "data: {max_length: 64}")
    line = refused(capsys, "fit", ["--config", file, "--data.max_length=many"], code=2)
    assert line == "data.max_length (command line): got many, expected a whole number"


SETTINGS = {
    "model__lr_schedule__warmup_ratio": (1.5, ["model.lr_schedule.warmup_ratio is 1.5", "[0, 1)"]),
    "trainer__accumulate_grad_batches": (
        3,
        ["trainer.accumulate_grad_batches is 3", "data.global_batch_size"],
    ),
    "trainer__use_distributed_sampler": (True, ["trainer.use_distributed_sampler must be false"]),
    "trainer__enable_checkpointing": (False, ["trainer.enable_checkpointing must be true"]),
    "trainer__strategy": ("dpp", ["trainer.strategy dpp is not known: set it to auto, ddp or"]),
    "trainer__accelerator": ("x", ["trainer.accelerator x is not known: set it to auto"]),
    "trainer__devices": (0, ["trainer.devices 0 cannot be had: set it to auto"]),
    "data__micro_batch_size": (
        3,
        ["data.global_batch_size 8", "data.micro_batch_size 3 x 1 devices"],
    ),
    "trainer__max_steps": (0, ["no optimizer step", "trainer.max_steps"]),
    "trainer__max_epochs": (0, ["no optimizer step", "trainer.max_epochs"]),
    "trainer__limit_train_batches": (0, ["no optimizer step", "trainer.limit_train_batches"]),
    "trainer__check_val_every_n_epoch": (0, ["trainer.check_val_every_n_epoch is 0"]),
    "checkpoint__keep_last": (0, ["checkpoint.keep_last is 0", "positive"]),
    "ckpt_path": ("gone.ckpt", ["--ckpt_path gone.ckpt", "no such checkpoint"]),
}


@pytest.mark.parametrize(
    ("key", "value", "words"), [(k, *v) for k, v in SETTINGS.items()], ids=SETTINGS
)
def test_wrong_setting(key, value, words, args, tmp_path, capsys):
    line = refused(capsys, "fit", args(**{key: value}))
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("**/*.ckpt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["fit", "doctor"])
def test_an_accelerator_that_is_not_there(command, args, capsys):
    line = refused(capsys, command, args(trainer__accelerator="gpu"))
    assert line.startswith("trainer.accelerator gpu is not there: set it to auto or cpu")


def test_validation_and_val_size_exclude_each_other(args, place, capsys):
    line = refused(capsys, "fit", args(data__validation=place[2], data__val_size=0.1))
    assert "data.validation and data.val_size" in line


# ------------------------------------------------------------------ files

CONFIGS = {
    "broken": ("data:\n  max_length: [1, 2\n  format: auto\n", ": line 3, column 9: "),
    "tab": ("data:\n\tmax_length: 3\n", ": line 2, column 1: "),
    "two documents": ("data: {}\n---\ndata: {}\n", ": line 2, column 1: "),
    "empty": ("", " is empty: expected keys with values"),
    "comments": ("# data: {}\n", " is empty: expected keys with values"),
    "list": ("- data\n", " holds no keys: expected keys with values"),
    "text": ("data\n", " holds no keys: expected keys with values"),
}


@pytest.mark.parametrize(("text", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_broken_config(text, expected, tmp_path, capsys):
    file = config(tmp_path, text)
    line = refused(capsys, "fit", ["--config", file], code=2)
    assert line.startswith(f"--config {file}{expected}")


TWICE = {
    "a section": (
        "trainer: {devices: 1}\nmodel: {}\ntrainer: {max_epochs: 3}\n",
        "trainer",
        "1 and 3",
    ),
    "nested": (
        "data:\n  max_length: 64\n  packing: true\n  max_length: 32\n",
        "data.max_length",
        "2 and 4",
    ),
    "a list": (
        "data:\n  train:\n  - path: a\n    weight: 1\n    weight: 2\n",
        "data.train[0].weight",
        "4 and 5",
    ),
    "of a class": (
        "model:\n  optimizer:\n    class_path: torch.optim.SGD\n    init_args:\n      lr: 1\n      lr: 2\n",
        "model.optimizer.init_args.lr",
        "5 and 6",
    ),
    "in one line": ("model: {lora: {r: 4, r: 8}}\n", "model.lora.r", None),
}


@pytest.mark.parametrize(("text", "key", "lines"), TWICE.values(), ids=TWICE)
def test_a_key_twice(text, key, lines, tmp_path, capsys):
    file = config(tmp_path, text)
    line = refused(capsys, "fit", ["--config", file, "--print_config"], code=2)
    place = "line 1" if lines is None else f"lines {lines}"
    assert line.startswith(f"--config {file}: {key} is written twice, in {place}, ")


def test_a_dotted_key_beside_its_group(tmp_path, capsys):
    file = config(tmp_path, "trainer.max_epochs: 3\ntrainer: {devices: 1}\n")
    line = refused(capsys, "fit", ["--config", file], code=2)
    assert "trainer.max_epochs in line 1 stands beside trainer in line 2" in line


def test_a_key_twice_in_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_arguments, "recipes", lambda: {"mine": tmp_path / "mine.yaml"})
    config(tmp_path, "data: {}\ndata: {}\n")
    line = refused(capsys, "fit", ["--config", "mine"], code=2)
    assert line.startswith("--config mine: data is written twice, in lines 1 and 2")


@pytest.mark.parametrize(
    ("typed", "origin"),
    [
        ("--model.lora={r: 4, r: 8}", "--model.lora: r "),
        ("--model=lora:\n  r: 4\n  r: 8", "--model: lora.r "),
        ('--data.chat_template_kwargs={"a": 1, "a": 2}', "--data.chat_template_kwargs: a "),
        ("--model.optimizer.init_args={lr: 1, lr: 2}", "--model.optimizer.init_args: lr "),
    ],
)
def test_a_key_twice_on_the_command_line(typed, origin, capsys):
    line = refused(capsys, "fit", [typed, "--print_config"], code=2)
    assert line.startswith(f"{origin}is written twice")


@pytest.mark.parametrize("in_file", [True, False])
def test_a_key_twice_in_an_included_file(in_file, tmp_path, capsys):
    keys = tmp_path / "keys.yaml"
    keys.write_text("devices: 1\ndevices: 2\n")
    typed = [f"--trainer={keys}"]
    if in_file:
        typed = ["--config", config(tmp_path, "trainer: keys.yaml\n")]
    line = refused(capsys, "fit", typed, code=2)
    assert line.startswith(f"{keys}: devices is written twice")


def test_texts_that_look_like_keys_are_texts(tmp_path, capsys):
    template = "Q: {prompt}\nQ: {more}\nA: "
    printed = print_config(capsys, [f"--data.prompt_template={template}"])
    assert printed["data"]["prompt_template"] == template


def test_merged_mappings_are_no_double_keys(tmp_path, capsys):
    text = "model:\n  lora: &a {r: 4}\ndata:\n  chat_template_kwargs: {<<: *a, <<: {s: 1}}\n"
    printed = print_config(capsys, ["--config", config(tmp_path, text)])
    assert printed["data"]["chat_template_kwargs"] == {"r": 4, "s": 1}


def test_the_nearest_config_is_named(tmp_path, capsys):
    file = config(tmp_path, "data: {}\n")
    for typed, nearest in (("demoo", "demo"), (file.replace("mine", "mnie"), file)):
        line = refused(capsys, "fit", ["--config", typed], code=2)
        assert line.endswith(f": did you mean {nearest}?")


@pytest.mark.parametrize(
    "typed", [["--config", "gone.yaml"], ["--config=gone.yaml"], ["-c", "gone.yaml"]]
)
def test_missing_config(typed, capsys):
    line = refused(capsys, "fit", typed, code=2)
    assert line.startswith("--config gone.yaml: there is no such file")


def test_a_recipe_by_its_name_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipes()["qwen"].name == "qwen.yaml" and "gone" not in recipes()
    printed = print_config(capsys, ["--config", "qwen"])
    assert (
        printed["data"]["train"] == "banghua/DL-SFT-Dataset" and printed["data"]["packing"] is False
    )


def print_config(capsys, args):
    with pytest.raises(SystemExit) as caught:
        run("fit", [*args, "--print_config"])
    assert caught.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_print_config_parses_back(args, tmp_path, capsys):
    printed = print_config(
        capsys,
        [
            *args(),
            '--model.lora={"r": 3}',
            "--early_stopping.patience=9",
            "--model.optimizer.lr=0.25",
        ],
    )
    assert printed["model"]["lora"]["r"] == 3 and printed["early_stopping"]["patience"] == 9
    assert printed["model"]["optimizer"]["init_args"]["lr"] == 0.25
    assert print_config(capsys, ["--config", config(tmp_path, yaml.safe_dump(printed))]) == printed


OLD, NEW = "lit_sft.strategies.FSDP2Strategy", "lit_sft.distributed.fsdp2.FSDP2Strategy"


@pytest.mark.parametrize("place", ["file", "json", "key", "name"])
def test_the_class_path_of_an_older_config(place, tmp_path, capsys):
    """As it stood in the documentation and in the config.yaml of runs."""
    settings = {"class_path": OLD, "init_args": {"cpu_offload": True}}
    typed = {
        "file": ["--config", config(tmp_path, yaml.safe_dump({"trainer": {"strategy": settings}}))],
        "json": [f"--trainer.strategy={json.dumps(settings)}"],
        "key": [
            f"--trainer.strategy.class_path={OLD}",
            "--trainer.strategy.init_args.cpu_offload=true",
        ],
        "name": ["--trainer.strategy", OLD, "--trainer.strategy.cpu_offload=true"],
    }
    strategy = print_config(capsys, typed[place])["trainer"]["strategy"]
    assert strategy["class_path"] == NEW and strategy["init_args"]["cpu_offload"] is True


def test_later_settings_win(args, tmp_path, capsys):
    """Defaults < first file < second file < command line."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("data: {max_length: 11, max_samples: 11, micro_batch_size: 11}")
    second.write_text("data: {max_length: 22, max_samples: 22}")
    printed = print_config(
        capsys, ["--config", str(first), "--config", str(second), "--data.max_length=33"]
    )
    data = printed["data"]
    assert [
        data[k] for k in ("max_length", "max_samples", "micro_batch_size", "global_batch_size")
    ] == [33, 22, 11, 8]


# ------------------------------------------------------------------ the run's config


@pytest.fixture(scope="module")
def finished(place):
    """The folder of a run with settings that are not the defaults."""
    folder, model, rows = place
    root = folder / "finished"
    run(
        "fit",
        arguments(
            model,
            rows,
            root,
            data__packing=False,
            trainer__max_steps=1,
            data__system_prompt="Say it.",
            data__test=rows,
        ),
    )
    return root


def parsed(monkeypatch, command, args):
    """The settings that a command ends up with, without running it."""
    from lit_sft.cli import main as main_module

    seen = {}

    def keep(self):
        seen.update(self.config[command].as_dict())
        raise SystemExit(0)

    monkeypatch.setattr(main_module.SFTCLI, "before_instantiate_classes", keep)
    with pytest.raises(SystemExit):
        run(command, args)
    return seen


@pytest.mark.parametrize("command", ["validate", "test", "predict", "export"])
def test_commands_read_the_config_of_the_run(command, finished, tmp_path, monkeypatch):
    """Defaults < the run's config.yaml < --config < command line."""
    ckpt = version(finished) / "checkpoints" / "last.ckpt"
    (tmp_path / "mine.yaml").write_text("data: {max_length: 64, micro_batch_size: 2}")
    typed = [
        "--config",
        str(tmp_path / "mine.yaml"),
        "--data.micro_batch_size=4",
        f"--ckpt_path={ckpt}",
    ]
    got = parsed(monkeypatch, command, typed)
    assert (
        got["model"]["model_name_or_path"].endswith("model")
        and got["data"]["system_prompt"] == "Say it."
    )
    assert got["trainer"]["precision"] == "32-true"
    assert (
        got["data"]["max_length"],
        got["data"]["micro_batch_size"],
        got["data"]["on_bad_row"],
    ) == (64, 4, "error")


def test_a_resume_reads_the_config_of_its_run(finished, tmp_path, monkeypatch):
    """`fit --ckpt_path last` alone goes on with the settings of the first start, and each setting
    that is another now is told.
    """
    (tmp_path / "mine.yaml").write_text("data: {max_length: 64, packing: false}")
    where = f"--trainer.default_root_dir={finished}"
    typed = [where, "--ckpt_path=last"]
    got = parsed(monkeypatch, "fit", typed)
    assert got["data"]["system_prompt"] == "Say it." and got["trainer"]["max_steps"] == 1
    more = ["--config", str(tmp_path / "mine.yaml"), "--trainer.max_steps=5", "--model.lora.r=4"]
    with log_lines() as lines:
        got = parsed(monkeypatch, "fit", [*more, *typed])
    assert got["data"]["max_length"] == 64 and got["trainer"]["max_steps"] == 5
    told = [line for line in lines if line.endswith("(the run to resume)")]
    assert told == [
        f"data.max_length: 64 ({tmp_path / 'mine.yaml'}) instead of 128 (the run to resume)",
        "trainer.max_steps: 5 (command line) instead of 1 (the run to resume)",
        "model.lora.r: 4 (command line) instead of null (the run to resume)",
    ]


@pytest.mark.parametrize("in_file", [False, True])
def test_last_is_looked_up_in_the_right_place(in_file, finished, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(f"trainer: {{default_root_dir: {finished}}}")
    where = (
        ["--config", str(tmp_path / "mine.yaml")]
        if in_file
        else [f"--trainer.default_root_dir={finished}"]
    )
    got = parsed(monkeypatch, "predict", [*where, "--ckpt_path", "last"])
    assert (
        got["ckpt_path"].startswith(str(version(finished)))
        and got["data"]["system_prompt"] == "Say it."
    )


def test_test_and_export_without_config(finished, tmp_path):
    ckpt = f"--ckpt_path={version(finished) / 'checkpoints' / 'last.ckpt'}"
    run("test", [ckpt])
    assert len(scalars(finished, "test/loss")) == 1
    run("export", [ckpt, f"--output_dir={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("command", ["test", "predict", "export"])
def test_no_checkpoint(command, tmp_path, capsys):
    line = refused(capsys, command, ["--ckpt_path=last", f"--trainer.default_root_dir={tmp_path}"])
    assert (
        line.startswith("--ckpt_path last: there is no intact checkpoint") and str(tmp_path) in line
    )


# ------------------------------------------------------------------ bad input

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
GOOD = {"messages": [USER, ANSWER]}
ROWS = {
    "no answer": ({"messages": [USER]}, ["line 3", "without an answer"]),
    "wrong type": ({"messages": "hi"}, ["line 3", "`messages`", "list", "string"]),
    "wrong content": (
        {"messages": [{**USER, "content": 5}, ANSWER]},
        ["line 3", "content` is an int", "a string"],
    ),
}


@pytest.mark.parametrize(("row", "words"), ROWS.values(), ids=ROWS)
def test_bad_row(row, words, args, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, GOOD, row, GOOD])
    line = refused(capsys, "fit", args(data__train=file))
    assert file in line and all(word in line for word in words), line


def test_skipped_rows_are_counted(args, tmp_path):
    bad = [row for row, _ in ROWS.values()]
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, *bad, GOOD])
    for _ in range(2):  # told again when the examples come from the cache
        with log_lines() as lines:
            run("fit", args(data__train=file, data__on_bad_row="skip"))
        assert any("2 of 5 rows kept" in line for line in lines), lines
        assert any(line.startswith("train: 3 rows dropped") for line in lines), lines


def test_overlong_rows_are_counted(args, tmp_path):
    long = {"messages": [USER, {**ANSWER, "content": "hello " * 99}]}
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, long, GOOD])
    with log_lines() as lines:
        run("fit", args(data__train=file))
    assert "train: 1 rows dropped: longer than data.max_length 128" in lines


def test_missing_file(args, capsys):
    line = refused(capsys, "fit", args(data__train="gone.jsonl"))
    assert "file not found: `gone.jsonl`" in line and "`data.train`" in line


def test_empty_data_set(args, tmp_path, capsys):
    line = refused(capsys, "fit", args(data__train=write_rows(tmp_path / "none.jsonl", [])))
    assert "none.jsonl" in line and "empty" in line


def test_max_length_smaller_than_every_row(args, capsys):
    line = refused(capsys, "fit", args(data__max_length=4))
    assert "data.train" in line and "data.max_length is 4" in line and "16 rows" in line


@pytest.mark.parametrize("exists", [True, False])
def test_no_model(exists, args, tmp_path, capsys):
    folder = tmp_path / "no_model"
    if exists:
        folder.mkdir()
    line = refused(capsys, "fit", args(model__model_name_or_path=folder))
    assert line.startswith("model.model_name_or_path: ") and str(folder) in line


def test_a_tokenizer_without_template_falls_back(args, tmp_path):
    model = save_tiny(tmp_path / "plain", tokenizer=tiny_tokenizer(chat_template=None))
    run("fit", args(model__model_name_or_path=model))
    exported = AutoTokenizer.from_pretrained(version(tmp_path / "runs") / "hf")
    text = exported.apply_chat_template([USER, ANSWER], tokenize=False)
    assert text.startswith("User:\nhi\n\nAssistant:\nhello<|endoftext|>")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.num_workers", -1, ["data.num_workers"]),
        ("trainer.devices", "x", ["trainer", "devices"]),
        ("early_stopping.monitor", "val/los", ["early_stopping.monitor", "val/los"]),
    ],
)
def test_wrong_setting_that_a_library_finds(key, value, words, args, place, capsys):
    line = refused(capsys, "fit", [*args(data__validation=place[2]), f"--{key}={value}"])
    assert all(word in line for word in words), line


@pytest.fixture
def silent_hub():
    """The address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.model_name_or_path", "Qwen/Qwen3-0.6B-Base"),
        pytest.param("data.train", "banghua/DL-SFT-Dataset", marks=pytest.mark.slow),
    ],
)
def test_a_hub_that_does_not_answer(key, value, args, tmp_path, silent_hub):
    """One sentence within seconds, which names the id and the key; a real process, so that its exit
    code counts.
    """
    environ = environment(HF_ENDPOINT=silent_hub, HF_HOME=str(tmp_path / "hf"))
    del environ["HF_HUB_OFFLINE"]
    command = [sys.executable, "-m", "lit_sft", "fit", *args(), f"--{key}={value}"]
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=environ
    )
    took = time.monotonic() - started
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and value in last and key in last
    assert took < 40, f"{took:.0f} s, most of it imports; the hub is given 3 s"
