"""Asks several models the same questions; answers side by side in the terminal and as HTML.

    python scripts/compare.py models/SmolLM2-135M-Instruct lightning_logs/version_0/hf
    python scripts/compare.py Qwen/Qwen3-0.6B-Base lightning_logs/version_0 --data test.jsonl
    --num_questions 20

A model is a hub id, a model directory, an adapter directory, a checkpoint, or the folder of a run.
A run answers with its own settings, such as `data.chat_template_kwargs`. Every model answers
through `predict`, in a process of its own, so the answers are those of `predict`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lit_sft.commands.compare import page
from lit_sft.console import answers_table, console
from lit_sft.datamodule import QUESTIONS


def main() -> None:
    """Asks every model and shows the answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "models",
        nargs="+",
        help="hub ids, model directories, adapter directories, checkpoints or folders of runs",
    )
    parser.add_argument("--questions", nargs="+", default=QUESTIONS)
    parser.add_argument("--data", help="rows to ask instead, as data.predict takes them")
    parser.add_argument("--num_questions", type=int, help="only the first rows of --data")
    parser.add_argument("--system_prompt", help="default: none, or that of the run")
    parser.add_argument("--chat_template", help="where a model has none")
    parser.add_argument("--chat_template_kwargs", help="""'{"enable_thinking": false}'""")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument(
        "--precision", help="as trainer.precision; default: bf16-mixed, or that of the run"
    )
    parser.add_argument("--output", type=Path, default=Path("compare.html"))
    compare(parser.parse_args())


def compare(args: argparse.Namespace) -> None:
    """Prints the table and writes the page."""
    asked = _settings(args)
    columns = {}
    for name in args.models:
        records = ask(name, asked)
        columns[name] = [record["prediction"] for record in records]
    if any("reference" in record for record in records):
        columns["reference"] = [record.get("reference", "") for record in records]
    questions = [record["prompt"] for record in records]
    console().print(answers_table(questions, columns))
    note = f"Answers of up to {args.max_new_tokens} tokens."
    args.output.write_text(page(questions, columns, note), encoding="utf-8")
    print(f"page: {args.output}")


def _settings(args: argparse.Namespace) -> list[str]:
    """The settings of `predict` that all models share. Those that are not given stay theirs."""
    settings = {
        "data.predict": args.data or json.dumps(list(args.questions)),
        "data.max_samples": args.num_questions,
        "data.system_prompt": args.system_prompt,
        "data.chat_template": args.chat_template,
        "data.chat_template_kwargs": args.chat_template_kwargs,
        "model.generation.max_new_tokens": args.max_new_tokens,
        "trainer.precision": args.precision,
    }
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]


def ask(name: str, settings: list[str]) -> list[dict[str, Any]]:
    """Lets one model answer, and returns its records in the order of the questions.

    Args:
        name: A model, a checkpoint, or the folder of a run.
        settings: Further arguments of `predict`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "predictions.jsonl"
        which = [f"--model.model_name_or_path={name}", f"--trainer.default_root_dir={scratch}"]
        if _is_run(Path(name)):
            which = [f"--ckpt_path={name}"]
        command = [sys.executable, "-m", "lit_sft", "predict", *which, *settings]
        done = subprocess.run(
            [*command, f"--predict_output={output}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr.strip().splitlines()[-1])
        # `splitlines` would also split at line separators within a text.
        lines = output.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _is_run(path: Path) -> bool:
    """Whether a path is a checkpoint or the folder of a run."""
    return path.suffix == ".ckpt" or (path / "checkpoints").is_dir()


if __name__ == "__main__":
    main()
