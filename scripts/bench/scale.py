"""How cost grows with the length of a pack and with the number of rows: what grows faster than the work is a defect.

    python scripts/fetch_smollm2.py
    python scripts/bench/scale.py

On made-up rows: tokens per second and peak memory of a training step for packs of 512 to `--longest` tokens
(`scripts/bench/step.py`), and seconds and peak memory of the preparation for 1,000 to `--most_rows` rows
(`scripts/bench_data.py --second_start`). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORDS = 150
"""Of an answer: rows of about 200 tokens, as in Alpaca, whatever the pack."""


def main() -> None:
    """Measures both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--longest", type=int, default=16384, help="tokens of the longest pack")
    parser.add_argument("--most_rows", type=int, default=1_000_000)
    args = parser.parse_args()
    report: dict[str, Any] = {"packs": {}, "rows": {}}
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "rows.jsonl"
        answer = "it is what it is and so on " * (WORDS // 8)
        rows = [{"prompt": f"What is {index}?", "completion": answer} for index in range(16 * args.longest // WORDS)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        length = 512
        while length <= args.longest:
            settings = {
                "model.model_name_or_path": args.model,
                "data.train": data,
                "data.cache_dir": Path(work) / "cache",
                "data.max_length": length,
                "data.global_batch_size": 1,
                "model.evaluation": "null",
            }
            step = last_line(HERE / "step.py", *(f"--{key}={value}" for key, value in settings.items()))
            report["packs"][length] = {key: step[key] for key in ("tokens_per_second", "peak_gb", "mfu")}
            print(f"packs of {length}: {report['packs'][length]}", flush=True)
            length *= 2
    count = 1000
    while count <= args.most_rows:
        report["rows"][count] = last_line(
            HERE.parent / "bench_data.py", "--second_start", str(count), "--tokenizer", str(args.model)
        )
        print(f"{count} rows: {report['rows'][count]}", flush=True)
        count *= 10
    print(json.dumps(report))


def last_line(script: Path, *arguments: str) -> Any:
    """What a script prints last, as an object."""
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {script.name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
