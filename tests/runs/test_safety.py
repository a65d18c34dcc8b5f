"""Nothing that a file brings is run, and no secret is written down."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from chat_templates import CHATML
from running import REPOSITORY, arguments, chat_rows, environment, run, version, write_rows
from terminal import log_lines, refused
from tiny import save_tiny

from lit_sft import errors

TOKEN = "hf_" + "aBcDeFgH" * 4
PASSWORD = "correct-horse"
IN_ENVIRONMENT = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "DB_PASSWORD": PASSWORD,
}
ADDRESS = f"https://me:{PASSWORD}@example.com/x"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(8))


def args(place, root, **overrides):
    return arguments(
        *place[1:], root, **{"trainer__max_steps": 1, "data__packing": False, **overrides}
    )


# ------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"token {TOKEN}.", "token <hidden>."),
        ("https://me:secret@host/a", "https://<hidden>@host/a"),
        ("https://" + TOKEN + "@huggingface.co", "https://<hidden>@huggingface.co"),
        ("hf_model user@host https://host/a:b@c models/hf_tiny", None),
        ("data.train: a@b.jsonl, max_new_tokens: 100, <|im_start|>", None),
    ],
)
def test_redact(text, hidden, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert errors.redact(text) == (text if hidden is None else hidden)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"]
)
def test_a_secret_of_the_environment_is_hidden(name, monkeypatch):
    monkeypatch.setenv(name, "known-by-its-name")
    assert errors.redact("it is known-by-its-name") == "it is <hidden>"


def test_redact_by_name(monkeypatch):
    assert errors.redact(os.environ.get("PWD", "/some/where")) == os.environ.get(
        "PWD", "/some/where"
    )
    monkeypatch.setenv("SOME_API_KEY", "visible-otherwise")
    assert errors.redact("it is visible-otherwise") == "it is <hidden>"
    settings = {
        "api_key": "x",
        "pad_token": "<pad>",
        "max_new_tokens": 3,
        "a": [{"password": "y", "b": True}],
    }
    kept = {
        "api_key": "<hidden>",
        "pad_token": "<pad>",
        "max_new_tokens": 3,
        "a": [{"password": "<hidden>", "b": True}],
    }
    assert errors.redact_settings(settings) == kept


def test_secrets_reach_no_file_and_no_line(place, tmp_path):
    """A run with secrets in its environment and its settings; all it wrote and said is searched for
    them.
    """
    root = tmp_path / "runs"
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(root), "prefix": TOKEN},
    }
    settings = {
        # The template reads the variables, and writes none of them.
        "data__chat_template": "{% if api_key and address and more %}{% endif %}" + CHATML,
        "data__chat_template_kwargs": {
            "api_key": "not-in-the-environment",
            "address": ADDRESS,
            "more": [TOKEN],
        },
    }
    env = environment(**IN_ENVIRONMENT)
    command = [sys.executable, "-m", "lit_sft"]
    done = subprocess.run(
        [*command, "fit", *args(place, root, **settings)],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    failed = subprocess.run(
        [*command, "fit", *args(place, root, data__train=ADDRESS, trainer__logger=logger)],
        cwd=REPOSITORY, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert failed.returncode == 1 and "<hidden>@example.com" in failed.stderr, failed.stderr
    secrets = [*IN_ENVIRONMENT.values(), "not-in-the-environment"]
    texts = {"said": (done.stdout + done.stderr + failed.stdout + failed.stderr).encode()}
    texts |= {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert any("events.out" in name for name in texts) and any(
        "config.yaml" in name for name in texts
    )
    assert [
        name for name, text in texts.items() if any(secret.encode() in text for secret in secrets)
    ] == []
    config = yaml.safe_load((version(root) / "config.yaml").read_text())
    assert config["data"]["chat_template_kwargs"]["address"] == "https://<hidden>@example.com/x"


def test_a_hidden_setting_is_not_taken_for_the_secret(place, tmp_path, capsys):
    root = tmp_path / "runs"
    run("fit", args(place, root, data__system_prompt=f"use {TOKEN}"))
    predict = [
        "--ckpt_path",
        str(version(root) / "checkpoints" / "last.ckpt"),
        '--data.predict=["a"]',
    ]
    assert "data.system_prompt held a secret" in refused(capsys, "predict", predict)
    run("predict", [*predict, "--data.system_prompt=use another"])


def test_tracebacks_are_redacted(capsys):
    try:
        raise ZeroDivisionError(f"at {TOKEN}")
    except ZeroDivisionError as error:
        errors.report_error(error)
    err = capsys.readouterr().err
    assert (
        "Traceback" in err
        and TOKEN not in err
        and err.splitlines()[-1].startswith("error: ZeroDivisionError: at <hid")
    )


def test_log_lines_are_redacted():
    record = logging.LogRecord("lit_sft", logging.INFO, "", 0, "token %s", (TOKEN,), None)
    assert errors.RedactingFormatter("%(message)s").format(record) == "token <hidden>"


# ------------------------------------------------------------------ code

LOADS = re.compile(
    r"torch\.load\(.*|pickle\.(?!UnpicklingError)\w+|np\.load\(.*|\bdill\b|joblib|yaml\.(?:load|unsafe_load)\(|\beval\(|\bexec\("
)


def test_nothing_is_unpickled_or_evaluated():
    """The only reader of pickles is torch's restricted one."""
    found = [
        f"{path.name}: {match[0]}"
        for path in (REPOSITORY / "lit_sft").rglob("*.py")
        for match in LOADS.finditer(path.read_text())
        if "weights_only=True" not in match[0] and not match[0].startswith("eval(")
    ]
    assert found == []
    assert LOADS.search("x = torch.load(path)")


@pytest.mark.parametrize(
    "where", ["state_dict", "optimizer_states", "callbacks", "loops", "SFTDataModule"]
)
def test_a_pickle_that_runs_code_is_refused(where, place, tmp_path, capsys):
    """Wherever it hides in a checkpoint that is otherwise right."""
    root, trace = tmp_path / "runs", tmp_path / "it_ran"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    run("fit", args(place, root))
    path = version(root) / "checkpoints" / "step=000001.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    inside = checkpoint[where]
    inside.append(Malicious()) if isinstance(inside, list) else inside.update(extra=Malicious())
    torch.save(checkpoint, path)
    said = refused(capsys, "fit", [*args(place, root, trainer__max_steps=2), f"--ckpt_path={path}"])
    assert "cannot be read as a checkpoint of lit_sft" in said and not trace.exists()


TEMPLATES = {
    "reaches classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches globals": "{{ raise_exception.__globals__['os'].system('true') }}",
    "imports": "{% import 'os' as os %}{{ os.system('true') }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "changes the row": "{% set _ = messages.append(1) %}",
    "never ends": "{% for i in range(1000000000) %}{% endfor %}",
}


@pytest.mark.parametrize("attack", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_run_in_a_sandbox(attack, place, tmp_path, capsys):
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    said = refused(
        capsys, "fit", args(place, tmp_path / "runs", data__chat_template=attack + chatml)
    )
    assert "template" in said, said


def test_code_of_a_model_is_not_run(place, tmp_path, capsys):
    """Unless it is asked for, and then the log says so."""
    trace, folder = tmp_path / "it_ran", tmp_path / "model"
    folder.mkdir()
    for path in Path(place[1]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "mine.py").write_text(
        f"open({str(trace)!r}, 'w')\n"
        "from transformers import LlamaConfig\nclass Mine(LlamaConfig):\n    model_type = 'mine'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"model__model_name_or_path": folder}
    said = refused(capsys, "fit", args(place, tmp_path / "runs", **settings))
    assert "model.trust_remote_code" in said and not trace.exists()
    with log_lines() as lines, pytest.raises(SystemExit):
        run("fit", args(place, tmp_path / "runs", **settings, model__trust_remote_code=True))
    assert any("model.trust_remote_code" in line and str(folder) in line for line in lines), lines


def test_a_script_is_no_data_set(place, tmp_path, capsys):
    script, trace = tmp_path / "data.py", tmp_path / "it_ran"
    script.write_text(f"open({str(trace)!r}, 'w')\n")
    (tmp_path / "folder").mkdir()
    script.rename(tmp_path / "folder" / "folder.py")
    for path in (tmp_path / "folder" / "folder.py", tmp_path / "folder"):
        refused(capsys, "fit", args(place, tmp_path / "runs", data__train=path))
    assert not trace.exists()
