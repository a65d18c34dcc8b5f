"""README and docs are executed: commands, Python blocks, rows of data, settings; links and the file
tree are compared.

Commands run in a directory of their own, where the files they name exist, tiny. Of a command only
this is changed: what it would take from the hub is replaced by these files, runs are cut to a few
steps, and 8 devices are 2 CPU ranks. Several ranks, and what runs beside TRL are marked slow.
`scripts/setup.sh demo` is run by `demo/test_demo.py`; `scripts/setup.sh test` runs this.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from chat_templates import QWEN3
from running import REPOSITORY, chat_rows, environment, write_rows
from tiny import save_tiny, tiny_tokenizer

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = [*DOCUMENTS, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
TESTS = "scripts/setup.sh test"
DEMO = "scripts/setup.sh demo"
CUT_SHORT = {
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "model.generation.max_new_tokens": 4,
    "data.cache_dir": "cache",
}
SHORTER = {
    "scripts/full_vs_lora.py": ["--minutes", "0.02", "--methods", "lora"],
    "scripts/compare_with_trl.py": ["--seeds", "1", "--epochs", "1"],
}
FETCHING = re.compile(r"scripts/(verify_|compare_with_trl)")
"""Scripts that make an environment with TRL."""
LIMITS = "## Limits"
KEY = re.compile(
    r"`((?:trainer|model|data|checkpoint|early_stopping|resume)\.(?!py`)[a-z_.]+)\b(?!\()"
)
"""Settings in the text; a call, such as `trainer.predict(...)`, is none."""


class Step(NamedTuple):
    """A command or a Python block, in the order of its page."""

    page: Path
    language: str
    text: str

    @property
    def is_slow(self) -> bool:
        return "--trainer.devices" in self.text or bool(FETCHING.search(self.text))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of all fenced blocks."""
    return re.findall(
        r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def steps() -> list[Step]:
    found = []
    for page in DOCUMENTS:
        for language, text in blocks(page):
            if language == "python":
                found.append(Step(page, language, text))
            elif language == "bash":
                found += [
                    Step(page, language, line)
                    for line in text.replace("\\\n", " ").splitlines()
                    if line
                ]
    return [step for step in found if step.text not in (DEMO, TESTS)]


def blocks_in(language: str) -> list[str]:
    return [text for page in DOCUMENTS for other, text in blocks(page) if other == language]


@pytest.fixture(scope="module")
def place_of(tmp_path_factory):
    """Page -> working directory with the files that commands name, and one finished run in it."""
    made = {}

    def get(page: Path) -> Path:
        if page not in made:
            folder = made[page] = tmp_path_factory.mktemp(page.stem)
            for name in ("configs", "scripts"):
                (folder / name).symlink_to(REPOSITORY / name)
            # The recipes set `enable_thinking`, which only a template that reads it takes.
            qwen = tiny_tokenizer(chat_template=QWEN3)
            save_tiny(folder / "models" / "Qwen3-0.6B-Base", tokenizer=qwen)
            save_tiny(folder / "models" / "SmolLM2-135M-Instruct")
            for name in ("train.jsonl", "test.jsonl"):
                write_rows(folder / name, chat_rows(40))
            alpaca = [
                {"instruction": "abc " * n, "input": "", "output": "def " * n}
                for n in range(1, 101)
            ]
            (folder / "alpaca_en_demo.json").write_text(json.dumps(alpaca))
            validated = "--data.validation test.jsonl --trainer.val_check_interval 8"
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                lit_sft(f"fit --config configs/qwen.yaml {validated}", patch)
                lit_sft("predict --ckpt_path last", patch)
        return made[page]

    return get


def arguments(command: str) -> list[str]:
    """What follows `lit_sft` in a command, without the hub and cut short."""
    args = shlex.split(command, comments=True)
    settings = {**CUT_SHORT}
    if "--config" in args and "--ckpt_path" not in args or args[0] in ("fit", "preview", "doctor"):
        recipe = (
            yaml.safe_load(Path(args[args.index("--config") + 1]).read_text())
            if "--config" in args
            else {}
        )
        names = {"model.model_name_or_path": "models/Qwen3-0.6B-Base", "data.train": "train.jsonl"}
        for key, tiny in names.items():
            group, name = key.split(".")
            if not Path(recipe.get(group, {}).get(name, "")).exists() or not recipe:
                settings[key] = tiny
    if args[0] == "fit":
        settings["trainer.max_steps"] = 4 if "--ckpt_path" in args else 2
    ours = [f"--{key}={value}" for key, value in settings.items() if f"--{key}" not in args]
    return [args[0], *ours, *args[1:]] if "--config" not in args else [*args, *ours]


def lit_sft(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process."""
    from lit_sft.cli.main import main

    args = arguments(command)
    monkeypatch.setattr(sys, "argv", ["lit_sft", *args])
    try:
        main(args)
    except SystemExit as end:
        assert not end.code, command


def ranks(command: str, folder: Path) -> None:
    """A command with 2 ranks in place of 8."""
    launcher, _, rest = command.replace(" 8", " 2").partition(" -m lit_sft ")
    program = (
        [sys.executable]
        if launcher == "python"
        else [sys.executable, "-m", "torch.distributed.run"]
    )
    options = shlex.split(launcher)[1:]
    done = subprocess.run(
        [*program, *options, "-m", "lit_sft", *arguments(rest)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


STEPS = [
    pytest.param(
        step, id=f"{step.page.stem}-{number}", marks=[pytest.mark.slow] if step.is_slow else []
    )
    for number, step in enumerate(steps())
]


@pytest.mark.parametrize("step", STEPS)
def test_step_runs(step, place_of, monkeypatch):
    folder = place_of(step.page)
    monkeypatch.chdir(folder)
    program, *rest = shlex.split(step.text, comments=True) if step.language == "bash" else [""]
    if step.language == "python":
        exec(compile(step.text, str(step.page), "exec"), {})
    elif "--trainer.devices" in rest:
        ranks(step.text, folder)
    elif program == "python" and rest[:2] == ["-m", "lit_sft"]:
        lit_sft(step.text.partition(" -m lit_sft ")[2], monkeypatch)
    else:
        assert program == "python" and rest[0].startswith("scripts/"), f"no rule for {step.text}"
        subprocess.run(
            [sys.executable, *rest, *SHORTER.get(rest[0], [])], check=True, env=environment()
        )


def test_the_two_commands_come_first():
    assert [text for language, text in blocks(DOCUMENTS[0])][:2] == [DEMO + "\n", TESTS + "\n"]


def test_a_run_writes_what_is_said(place_of):
    (text,) = [text for text in blocks_in("text") if text.startswith("lightning_logs/version_0/")]
    folder, *entries = text.splitlines()
    names = [entry.split()[0] for entry in entries]
    found = {path.name for path in (place_of(DOCUMENTS[0]) / folder).iterdir()}
    missing = [
        name for name in names if not any(other.startswith(name.rstrip("/")) for other in found)
    ]
    assert missing == []
    checkpoints = {
        path.name for path in (place_of(DOCUMENTS[0]) / folder / "checkpoints").iterdir()
    }
    assert {"last.ckpt", "best.ckpt"} < checkpoints


def test_every_file_is_in_the_tree():
    """One line per file; `__init__.py` goes with its folder's line."""
    (text,) = [text for text in blocks_in("text") if text.startswith("lit_sft/\n")]
    listed, parents = set(), {}
    for line in text.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        path = parents.get(depth - 1, "") + name
        assert (REPOSITORY / path).exists(), (
            f"{path} is in the tree of docs/architecture.md, but not there"
        )
        parents[depth] = path
        if not name.endswith("/"):
            listed.add(path)
    files = [
        *(REPOSITORY / "lit_sft").rglob("*.py"),
        *filter(Path.is_file, (REPOSITORY / "scripts").rglob("*")),
    ]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert listed == {
        str(path.relative_to(REPOSITORY)) for path in files if path.name != "__init__.py"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_exist(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ] == []


@pytest.mark.parametrize("row", [row for text in blocks_in("json") for row in text.splitlines()])
def test_rows_are_read(row):
    from lit_sft.data.formats.columns import detect_format
    from lit_sft.data.formats.parse import to_conversation

    value = json.loads(row)
    conversation = to_conversation(value, format=detect_format([value], None, None)[0])
    assert conversation.text or conversation.messages[-1].role == "assistant"


@pytest.mark.parametrize("text", blocks_in("yaml"))
def test_settings_are_taken(text, tmp_path, monkeypatch, capsys):
    from lit_sft.cli.main import main

    path = tmp_path / "settings.yaml"
    path.write_text(text)
    args = ["fit", "--config", str(path), "--print_config"]
    monkeypatch.setattr(sys, "argv", ["lit_sft", *args])
    with pytest.raises(SystemExit) as end:
        main(args)
    assert not end.value.code, capsys.readouterr().err


def test_keys_exist(capsys):
    """Every key that a page names; those that README says are not there yet must not be there."""
    from lit_sft.cli.main import main
    from lit_sft.cli.parser import OneLineParser, known_keys

    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    known = set(known_keys(OneLineParser.commands["fit"]))
    for page in PAGES:
        text, _, limits = page.read_text(encoding="utf-8").partition(LIMITS)
        assert [key for key in KEY.findall(text) if key not in known] == [], page.name
        assert [key for key in KEY.findall(limits) if key in known] == [], page.name
