"""Trains the same rows in two raw formats and compares the losses on held-out rows.

    python scripts/compare_formats.py
    python scripts/compare_formats.py --data alpaca_en_demo.json --trainer.max_steps 10
    python scripts/compare_formats.py --data alpaca_en_demo.json --model
    models/SmolLM2-135M-Instruct

The formats are configs/format_instruction.yaml and configs/format_question.yaml. Without `--data`,
the rows are 200 questions of the built-in task, and without `--model`, too, the model is the
built-in one with random weights, so nothing is downloaded. Further arguments, such as
`--trainer.max_steps 10`, go to both runs. The last line is one JSON object. For each format it has
two losses of the last checkpoint:

eval_loss    the mean over all tokens of the held-out rows, as trained. The formats have different
             tokens, so this shows how well each text is predicted, not which format answers better.
answer_loss  the mean over the tokens of the answers, which are the same text in both.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"
FORMATS = ("format_instruction", "format_question")
BUILT_IN_MODEL = ["--model.model_name_or_path=builtin:demo", "--model.init=random"]
NUM_BUILT_IN_ROWS = 200


def main() -> None:
    """Makes both runs and prints their losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data",
        help="rows with the columns instruction, input, output; by default, rows of the built-in"
        " task",
    )
    parser.add_argument("--model", help="another model than that of the recipes")
    parser.add_argument(
        "--output", type=Path, help="folder of the runs; by default they are thrown away"
    )
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or built_in_rows(Path(scratch) / "rows.jsonl")
        more += ["--data.train", data, *model_arguments(args)]
        root = args.output or Path(scratch)
        results = {name: compare(name, root / name, more) for name in FORMATS}
        without_input, rows = count_rows(data)
    if without_input:
        print(
            f"{without_input:,} of {rows:,} rows have an empty input: there format_question asks"
            " nothing"
        )
    for name, losses in results.items():
        print(
            f"{name}: eval loss {losses['eval_loss']:.4f}, of the answers alone"
            f" {losses['answer_loss']:.4f}"
        )
    print(json.dumps({"rows": rows, "rows_without_input": without_input, **results}))


def model_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments that choose the model; none for that of the recipes."""
    if args.model is not None:
        return ["--model.model_name_or_path", args.model]
    return [] if args.data else BUILT_IN_MODEL


def built_in_rows(path: Path) -> str:
    """Writes rows of the built-in task as JSON lines, and returns the path."""
    from lit_sft.demo import builtin as demo

    lines = []
    for row in demo.rows("arithmetic", "train")[:NUM_BUILT_IN_ROWS]:
        question, answer = (message["content"] for message in row["messages"])
        pair = {"instruction": "Answer the question.", "input": question, "output": answer}
        lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def compare(name: str, root: Path, more: list[str]) -> dict[str, float]:
    """Trains in one format, and returns the losses of the last checkpoint."""
    place = ["--trainer.default_root_dir", str(root)]
    run(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *place, *more])
    # The validations of the run may be of an earlier step, or there may be none.
    validate = ["validate", "--ckpt_path", "last", *place]
    run(validate)
    eval_loss = last_loss(root)
    run([*validate, "--data.train_on", "completions"])
    return {"eval_loss": eval_loss, "answer_loss": last_loss(root)}


def run(command: list[str]) -> None:
    """Runs a command of lit_sft, and exits if it fails."""
    if code := subprocess.run(
        [sys.executable, "-m", "lit_sft", *command], stdout=sys.stderr
    ).returncode:
        sys.exit(code)


def last_loss(root: Path) -> float:
    """Returns the newest validation loss in a folder of runs."""
    newest = max(
        root.glob("lightning_logs/version_*/metrics.csv"),
        key=lambda path: int(path.parent.name[8:]),
    )
    with newest.open() as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")][-1]


def count_rows(data: str) -> tuple[int, int]:
    """Counts rows with an empty input, and all rows."""
    from lit_sft.data.sources.open_rows import open_rows

    rows = open_rows(data)
    return sum(not rows[index].get("input") for index in range(len(rows))), len(rows)


if __name__ == "__main__":
    main()
