"""Asks several models the same questions; answers side by side in the terminal and as HTML.

    python scripts/compare.py models/SmolLM2-135M-Instruct lightning_logs/version_0/hf
    python scripts/compare.py Qwen/Qwen3-0.6B-Base banghua/Qwen3-0.6B-SFT --data test.jsonl
    --num_questions 20

A model is a hub id, a model directory or an adapter directory. One is loaded at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from lit_sft.commands.compare import ask, page
from lit_sft.console import answers_table, console
from lit_sft.datamodule import QUESTIONS
from lit_sft.errors import UserError
from lit_sft.model.generate import GenerationOptions


def main() -> None:
    """Asks every model and shows the answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "models", nargs="+", help="hub ids, model directories or adapter directories"
    )
    parser.add_argument("--questions", nargs="+", default=QUESTIONS)
    parser.add_argument("--data", help="rows to ask instead, as data.predict takes them")
    parser.add_argument("--num_questions", type=int, help="only the first rows of --data")
    parser.add_argument("--system_prompt")
    parser.add_argument("--chat_template", help="where a model has none")
    parser.add_argument(
        "--chat_template_kwargs",
        type=json.loads,
        default={},
        help="""'{"enable_thinking": false}'""",
    )
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    parser.add_argument("--output", type=Path, default=Path("compare.html"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        compare(args)
    except UserError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def compare(args: argparse.Namespace) -> None:
    """Prints the table and writes the page."""
    options = GenerationOptions(max_new_tokens=args.max_new_tokens)
    asked = {
        "predict": args.data or args.questions,
        "max_samples": args.num_questions,
        "system_prompt": args.system_prompt,
        "chat_template": args.chat_template,
        "chat_template_kwargs": args.chat_template_kwargs,
    }
    columns = {}
    for name in args.models:
        records = ask(name, options, args.dtype, **asked)
        columns[name] = [record["prediction"] for record in records]
    if any("reference" in record for record in records):
        columns["reference"] = [record.get("reference", "") for record in records]
    questions = [record["prompt"] for record in records]
    console().print(answers_table(questions, columns))
    note = f"Greedy answers of up to {args.max_new_tokens} tokens."
    args.output.write_text(page(questions, columns, note), encoding="utf-8")
    print(f"page: {args.output}")


if __name__ == "__main__":
    main()
