"""The help of the commands."""

import re

import pytest
from running import run

from lit_sft.cli import command_help
from lit_sft.cli.settings import REFUSED_OF_TRAINER

COMMANDS = ("fit", "validate", "test", "predict", "preview", "doctor", "export")


def shown(command, capsys, monkeypatch, width=80):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as caught:
        run(command, ["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_a_sentence(command, capsys, monkeypatch):
    text = shown(command, capsys, monkeypatch)
    assert text.startswith(f"usage: lit-sft {command} [--config FILE]")
    keys = re.findall(r"^  --([\w.]+)", text, re.MULTILINE)
    assert len(keys) == len(set(keys)) > 80
    # The line of a setting is followed by its sentence.
    without = re.findall(r"^  --([\w.]+).*\n(?! {6}\S)", text, re.MULTILINE)
    assert without == []
    assert "Path to a configuration file" not in text and "``" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_help_fits_the_terminal(width, capsys, monkeypatch):
    text = shown("fit", capsys, monkeypatch, width)
    assert max(map(len, text.splitlines())) <= min(width, 100)
    assert len(text.splitlines()) < 400


def test_our_defaults_are_shown_and_refused_settings_are_not(capsys, monkeypatch):
    text = shown("fit", capsys, monkeypatch, 120)
    for line in (
        "  --trainer.precision  [bf16-mixed]",
        "  --trainer.log_every_n_steps  a whole number or null  [10]",
        "  --model.optimizer  [torch.optim.AdamW with lr: 8e-05, weight_decay: 0.0]",
        "  --model.lora.r  a whole number  [8]",
    ):
        assert line in text.splitlines()
    shown_of_trainer = set(re.findall(r"^  --trainer\.(\w+)", text, re.MULTILINE))
    assert shown_of_trainer == set(command_help.OF_TRAINER)
    assert REFUSED_OF_TRAINER and not [
        key for key in REFUSED_OF_TRAINER if f"trainer.{key}" in text
    ]


def test_groups_and_keys_come_most_used_first(capsys, monkeypatch):
    text = shown("fit", capsys, monkeypatch)
    keys = re.findall(r"^  --([\w.]+)", text, re.MULTILINE)
    groups = list(dict.fromkeys(key.split(".")[0] for key in keys if "." in key))
    assert groups == [group for group in command_help.GROUPS if group]
    assert keys[0] == "config" and keys.index("data.train") < keys.index("data.cache_dir")
