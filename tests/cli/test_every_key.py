"""Every key that a user may write, misspelled: the program refuses it in one line that names the
key and the right one, or counts it in a line of the log.

A case is `fit` in this process with one key misspelled. `python -m pytest -m ""
tests/cli/test_every_key.py` runs all of them; the default run takes a part, drawn by a seed.
"""

import copy
import random

import pytest
import yaml
from terminal import refused
from tiny import tiny_tokenizer

from lit_sft.cli.main import main
from lit_sft.data.chat_template import ChatTemplate
from lit_sft.data.formats.columns import FIRST_COLUMNS, report_unread
from lit_sft.data.formats.parse import to_conversation
from lit_sft.errors import UserError

# Every group and class that may stand in the settings, beside those of the demo recipe.
GROUPS = """
trainer:
  strategy: {class_path: lightning.pytorch.strategies.DDPStrategy}
  logger:
  - {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: x}}
  - {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: x}}
  callbacks:
  - {class_path: lightning.pytorch.callbacks.LearningRateMonitor}
  - {class_path: lightning.pytorch.callbacks.ModelCheckpoint}
  profiler: {class_path: lightning.pytorch.profilers.PyTorchProfiler}
  plugins:
  - {class_path: lightning.pytorch.plugins.environments.SLURMEnvironment}
model:
  lora: {r: 4}
data:
  train:
  - {path: 'builtin:arithmetic', weight: 1.0}
early_stopping: {}
"""
CLASSES = {
    "trainer.strategy": [
        "lightning.pytorch.strategies.DDPStrategy",
        "lit_sft.distributed.fsdp2.FSDP2Strategy",
    ],
    "trainer.logger": [
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.loggers.CSVLogger",
    ],
    "trainer.callbacks[0]": [
        "lightning.pytorch.callbacks.EMAWeightAveraging",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.callbacks.RichModelSummary",
        "lightning.pytorch.callbacks.ThroughputMonitor",
    ],
    "trainer.profiler": [
        "lightning.pytorch.profilers.PyTorchProfiler",
        "lightning.pytorch.profilers.SimpleProfiler",
    ],
    "model.optimizer": ["torch.optim.Muon", "torch.optim.SGD"],
}
"""Setting -> classes that are chosen there, with and without `**kwargs`."""
OF_CLASSES = ("strategy", "logger", "callbacks", "profiler", "plugins")
"""Settings below `trainer` that take classes."""
REQUIRED = {
    "lightning.pytorch.loggers.TensorBoardLogger": {"save_dir": "x"},
    "lightning.pytorch.loggers.CSVLogger": {"save_dir": "x"},
    "lightning.pytorch.callbacks.ThroughputMonitor": {"batch_size_fn": "builtins.len"},
}
"""Arguments without which jsonargparse builds no class."""
SAMPLE = 12
"""Cases of the default run."""


def misspelled(name):
    """A name with its second letter twice."""
    return name[:2] + name[1:] if len(name) > 1 else 2 * name


def keys_below(tree, path=()):
    """The paths of all keys in nested mappings and lists."""
    items = enumerate(tree) if isinstance(tree, list) else ()
    items = tree.items() if isinstance(tree, dict) else items
    for key, value in items:
        if isinstance(key, str):
            yield (*path, key)
        yield from keys_below(value, (*path, key))


def dotted(path):
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(parts).removeprefix(".")


def with_misspelled(tree, path):
    tree = copy.deepcopy(tree)
    group = tree
    for part in path[:-1]:
        group = group[part]
    group[misspelled(path[-1])] = group.pop(path[-1])
    return tree


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """All settings of `fit`, as `--print_config` shows them."""
    return all_settings(tmp_path_factory.mktemp("settings"))


def all_settings(folder):
    (folder / "groups.yaml").write_text(GROUPS)
    args = ["fit", "--config", "demo", "--config", str(folder / "groups.yaml"), "--print_config"]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("sys.argv", ["lit_sft", *args])
        patch.setattr("sys.stdout.write", printed.append)
        with pytest.raises(SystemExit):
            main(args)
    return yaml.safe_load("".join(printed))


def group_of(path):
    """The part of the test that a key belongs to."""
    if path[0] == "trainer" and len(path) > 1 and path[1] in OF_CLASSES:
        return path[1]
    return path[0] if path[0] in ("trainer", "model", "data") else "others"


def without_other_classes(settings, path):
    """Settings in which a key stands without the classes of other settings: they take long."""
    kept = {}
    for name, value in settings["trainer"].items():
        if name not in OF_CLASSES or name == group_of(path):
            kept[name] = value
    return {**settings, "trainer": kept}


def problem(line, path):
    """What a refusal does not say; None if it names the misspelled and the right key."""
    wrong = dotted((*path[:-1], misspelled(path[-1])))
    if wrong not in line:
        return f"{wrong} is not named: {line:.300}"
    if f"did you mean {dotted(path)}" not in line:
        return f"{dotted(path)} is not suggested: {line:.300}"
    return None


def check(paths, settings, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    problems = {}
    for path in paths:
        tree = with_misspelled(without_other_classes(settings, path), path)
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        try:
            line = refused(capsys, "fit", ["--config", str(file)], code=2)
        except AssertionError as error:
            problems[dotted(path)] = str(error)[:300]
            continue
        found = problem(line, path)
        if found is not None:
            problems[dotted(path)] = found
    assert problems == {}


def parsed_paths(settings):
    """The keys that the parser knows; those of a mixture are read with the data."""
    return [path for path in keys_below(settings) if path[:3] != ("data", "train", 0)]


def test_settings_hold_every_group(settings):
    paths = set(map(dotted, keys_below(settings)))
    assert {"model.lora.r", "early_stopping.patience", "trainer.logger[1].init_args.name"} <= paths
    assert len(paths) > 200


def test_some_settings(settings, tmp_path, capsys):
    paths = random.Random(0).sample(parsed_paths(settings), SAMPLE)
    check(paths, settings, tmp_path, capsys)


@pytest.mark.parametrize(
    "path", [("data", "chat_template_kwargs"), ("model", "lora", "rank_pattern")]
)
def test_an_empty_group(path, settings, tmp_path, capsys):
    check([path], settings, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("group", [*OF_CLASSES, "trainer", "model", "data", "others"])
def test_all_settings(group, settings, tmp_path, capsys):
    paths = [path for path in parsed_paths(settings) if group_of(path) == group]
    assert paths
    check(paths, settings, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "class_path"), [(key, path) for key, paths in CLASSES.items() for path in paths]
)
@pytest.mark.parametrize("part", ["init_args", "dict_kwargs"])
def test_arguments_of_classes(setting, class_path, part, settings, tmp_path, capsys):
    """Also of those that pass further arguments on, where a wrong one could be dropped."""
    chosen = {"class_path": class_path, "init_args": REQUIRED.get(class_path, {})}
    chosen[part] = {**chosen.get(part, {}), "not_an_argument": 1}
    group, _, name = setting.partition(".")
    value = [chosen] if name.endswith("[0]") else chosen
    tree = {**settings, group: {**settings[group], name.removesuffix("[0]"): value}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    line = refused(capsys, "fit", ["--config", str(file)], code=2)
    assert f"unknown key {setting}.{part}.not_an_argument ({file})" in line


@pytest.mark.parametrize("key", ["path", "weight"])
def test_keys_of_a_mixture(key, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    member = {"path": "builtin:arithmetic", "weight": 1.0}
    member[misspelled(key)] = member.pop(key)
    file.write_text(yaml.safe_dump({"data": {"train": [member]}}))
    args = ["--config", "demo", "--config", str(file), f"--trainer.default_root_dir={tmp_path}"]
    line = refused(capsys, "fit", args)
    assert "data.train[0]" in line and misspelled(key) in line and key in line


# ------------------------------------------------------------------ rows

CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief.", "name": "me"},
        {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
        {"role": "assistant", "reasoning_content": "x", "weight": 1, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "a", "name": "add"},
        {"role": "assistant", "content": "2", "train": True},
    ],
    "tools": [{"type": "function", "function": {"name": "add"}}],
}
CONVERSATION = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2", "weight": 1}]
ROWS = {
    "messages": MESSAGES,
    "sharegpt": {"conversations": CONVERSATION, "system": "Be brief.", "tools": MESSAGES["tools"]},
    "alpaca": {
        "instruction": "1+1?",
        "input": "x",
        "output": "2",
        "system": "Be brief.",
        "history": [["0+0?", "0"]],
    },
    "prompt_completion": {"prompt": "1+1?", "completion": "2", "system": "Be brief."},
    "text": {"text": "1+1=2"},
}
"""Format -> a row in which every key is read."""
FREE = (("tools", 0), ("messages", 2, "tool_calls", 0, "function", "arguments"))
"""What is below these belongs to the user's tools and goes to the template as it is."""


def row_cases():
    for format, row in ROWS.items():
        for path in keys_below(row):
            if not any(path[: len(free)] == free and len(path) > len(free) for free in FREE):
                yield format, path


def test_every_key_of_the_rows_is_read():
    for format, row in ROWS.items():
        assert report_unread([row], format, None, None) == []
        assert not [note for note in to_conversation(row, format=format).notes if "key" in note]


@pytest.mark.parametrize(("format", "path"), list(row_cases()), ids=str)
def test_keys_of_rows(format, path):
    """A column or a key of a turn ends in an error, or in a line that names it."""
    row = with_misspelled(ROWS[format], path)
    wrong = misspelled(path[-1])
    lines = report_unread([row], format, None, None)
    try:
        lines += to_conversation(row, format=format).notes
    except UserError as error:
        # A row without its first column names the columns that it has.
        lines.append(str(error))
    # A key that is missing is named as it should be, among those that are there.
    assert any(wrong in line or path[-1] in line for line in lines), lines


@pytest.mark.parametrize("column", [*FIRST_COLUMNS, "question"])
def test_column_mapping(column):
    row = {column: "x", "answer": "y"}
    with pytest.raises(UserError, match=f"names `{misspelled(column)}`.*{column}"):
        to_conversation(row, format="text", column_mapping={misspelled(column): "text"})


def test_template_variables():
    tokenizer = tiny_tokenizer()
    text = "{% if think %}{{ tone }}{% endif %}{{ messages[0]['content'] }}"
    for name in ("think", "tone"):
        with pytest.raises(UserError, match=f"sets `{misspelled(name)}`.*did you mean `{name}`"):
            ChatTemplate(tokenizer, text, {misspelled(name): True})
