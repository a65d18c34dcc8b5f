"""Rows per second from a file to tokenized, masked examples: lit_sft beside TRL's SFTTrainer.

    python scripts/fetch_smollm2.py
    python scripts/bench_data.py --data gsm8k_train.jsonl
    python scripts/bench_data.py --second_start 1000000

Both sides prepare the same rows. They take turns, each in a new process, and prepare one row before
the clock starts, so imports do not count. Medians of the repetitions are reported. The clock
measures:

lit_sft  `SFTData.prepare` with an empty cache: reading the file, rendering, proving the masks,
         tokenizing, writing.
TRL      the construction of an SFTTrainer (completion-only loss, a tiny model) with all rows, minus
         the same with one row: with its defaults (`trl_rows_per_second`), and with one process per
         core in `dataset_num_proc` (`trl_parallel_rows_per_second`). The rows are conversational
         prompts and completions in an existing Arrow file, without caching.

`--second_start` prepares that many made-up rows, and times a new process that finds them in the
cache. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REQUIREMENTS = ("torch==2.13.0", "trl==1.16.*")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PAIR = {"question": "prompt", "answer": "completion"}
"""Column mapping for rows with columns that no format knows."""


def main() -> None:
    """Compares the two sides, or times a second start."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="file of rows, in any format that data.train takes"
    )
    parser.add_argument(
        "--second_start",
        type=int,
        metavar="ROWS",
        help="time a second start on made-up rows instead",
    )
    parser.add_argument("--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--venv",
        type=Path,
        default=Path("~/.cache/lit_sft/trl-venv"),
        help="made where there is none",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--num_proc", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    if (args.data is None) == (args.second_start is None):
        parser.error("give --data FILE or --second_start ROWS")
    if not (args.tokenizer / "tokenizer.json").is_file():
        parser.error(
            f"there is no tokenizer in {args.tokenizer}: run scripts/fetch_smollm2.py, or set"
            " --tokenizer"
        )
    with tempfile.TemporaryDirectory() as scratch:
        args.data = args.data or Path(scratch) / "rows.jsonl"
        print(
            json.dumps(
                compare(args, Path(scratch)) if args.second_start is None else second_start(args)
            )
        )


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs both sides in turn, and returns the rows per second of each."""
    python = trl_python(args.venv.expanduser())
    rows = write_pairs(args.data, pairs := scratch / "pairs.jsonl")
    settings: dict[str, list[float]] = {
        "lit_sft": [],
        "trl": [],
        f"trl, {os.cpu_count()} processes": [],
    }
    for repetition in range(args.repetitions):
        for name, times in settings.items():
            data = args.data if name == "lit_sft" else pairs
            more = ["--num_proc", str(os.cpu_count())] if name.endswith("processes") else []
            side = name.partition(",")[0]
            times.append(
                run_side(sys.executable if side == "lit_sft" else python, side, data, args, more)[
                    "seconds"
                ]
            )
            print(
                f"{repetition + 1}. {name}: {times[-1]:.2f} s, {rows / times[-1]:,.0f} rows per"
                " second",
                flush=True,
            )
    speeds = {name: rows / statistics.median(times) for name, times in settings.items()}
    trl, parallel = speeds["trl"], speeds[f"trl, {os.cpu_count()} processes"]
    return {
        "rows": rows,
        "lit_sft_rows_per_second": round(speeds["lit_sft"], 1),
        "trl_rows_per_second": round(trl, 1),
        "ratio": round(speeds["lit_sft"] / trl, 2),
        "trl_parallel_rows_per_second": round(parallel, 1),
        "ratio_to_parallel": round(speeds["lit_sft"] / parallel, 2),
    }


def second_start(args: argparse.Namespace) -> dict[str, Any]:
    """Prepares made-up rows, then times the same in a new process."""
    with args.data.open("w") as file:
        for index in range(args.second_start):
            row = {
                "prompt": f"What is {index} plus {index % 97}?",
                "completion": f"It is {index + index % 97}.",
            }
            file.write(json.dumps(row) + "\n")
    with tempfile.TemporaryDirectory() as cache:
        first, again = (
            run_side(sys.executable, "lit_sft", args.data, args, [], {"LIT_SFT_BENCH_CACHE": cache})
            for _ in range(2)
        )
    return {
        "rows": args.second_start,
        "first_seconds": round(first["seconds"], 2),
        "second_seconds": round(again["seconds"], 2),
        "packing_seconds": round(again["packing_seconds"], 2),
        "first_peak_megabytes": first["peak_megabytes"],
        "second_peak_megabytes": again["peak_megabytes"],
    }


def run_side(
    python: str,
    side: str,
    data: Path,
    args: argparse.Namespace,
    more: list[str],
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Makes one measurement in a process of its own."""
    command = [
        python,
        __file__,
        "--side",
        side,
        "--data",
        str(data),
        "--tokenizer",
        str(args.tokenizer),
    ]
    command += ["--max_length", str(args.max_length), *more]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )
    if done.returncode:
        sys.exit(f"error: the {side} side failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def trl_python(venv: Path) -> str:
    """Returns the interpreter of an environment with TRL, after making it if it does not exist."""
    python = venv / "bin" / "python"
    if (
        python.exists()
        and subprocess.run([python, "-c", "import trl"], capture_output=True).returncode == 0
    ):
        return str(python)
    print(f"installing TRL into {venv}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    torch, *others = REQUIREMENTS
    attempts = [[torch]]
    if sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        # The CPU build avoids gigabytes of CUDA libraries.
        attempts = [[f"{torch}+cpu"], ["--index-url", TORCH_CPU_INDEX, torch]]
    if all(subprocess.run([*install, *attempt]).returncode for attempt in attempts):
        sys.exit(
            f"error: {torch} cannot be installed into {venv}; is a package index within reach?"
        )
    if subprocess.run([*install, *others]).returncode:
        sys.exit(
            f"error: {' '.join(others)} cannot be installed into {venv}; is a package index within"
            " reach?"
        )
    return str(python)


def write_pairs(data: Path, path: Path) -> int:
    """Writes the rows for TRL as prompt and completion, and returns their number."""
    from lit_sft.data.formats.columns import detect_format
    from lit_sft.data.formats.parse import conversation_to_prompt, to_conversation
    from lit_sft.data.sources.open_rows import open_rows

    rows = open_rows(str(data))
    mapping = PAIR if set(PAIR) <= set(rows.columns()) else None
    format, _ = detect_format(rows.head(20), mapping, None)
    with path.open("w", encoding="utf-8") as file:
        for index in range(len(rows)):
            conversation = to_conversation(rows[index], format=format, column_mapping=mapping)
            prompt, _ = conversation_to_prompt(conversation)
            count = len(prompt.messages)
            messages = [message.to_dict() for message in conversation.messages]
            file.write(
                json.dumps({"prompt": messages[:count], "completion": messages[count:]}) + "\n"
            )
    return len(rows)


def measure_lit_sft(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of a preparation, with an empty cache or with the one that is given."""
    import resource

    from lit_sft.data.sources.open_rows import open_rows
    from lit_sft.datamodule import SFTDataModule

    mapping = PAIR if set(PAIR) <= set(open_rows(str(args.data)).columns()) else None
    options = {
        "column_mapping": mapping,
        "model_name_or_path": str(args.tokenizer),
        "max_length": args.max_length,
    }
    with tempfile.TemporaryDirectory() as scratch:
        SFTDataModule(train=str(args.data), max_samples=1, cache_dir=scratch, **options).prepare(
            "fit"
        )
        cache_dir = os.environ.get("LIT_SFT_BENCH_CACHE", scratch)
        datamodule = SFTDataModule(train=str(args.data), cache_dir=cache_dir, **options)
        assert datamodule.data.renderer
        started = time.perf_counter()
        datamodule.prepare("fit")
        seconds = time.perf_counter() - started
        datamodule.pack("train")
        packing_seconds = time.perf_counter() - started - seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"seconds": seconds, "packing_seconds": packing_seconds, "peak_megabytes": peak}


def measure_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the additional seconds that an SFTTrainer takes with all rows instead of one."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 8)
    numbers = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **numbers))
    with tempfile.TemporaryDirectory() as scratch:
        rows = datasets.load_dataset(
            "json", data_files=str(args.data), split="train", cache_dir=scratch
        )

        def construct(train: datasets.Dataset, num_proc: int | None) -> float:
            config = SFTConfig(
                scratch,
                max_length=args.max_length,
                completion_only_loss=True,
                dataset_num_proc=num_proc,
                use_cpu=True,
                bf16=False,
                report_to="none",
            )
            started = time.perf_counter()
            SFTTrainer(model, args=config, train_dataset=train, processing_class=tokenizer)
            return time.perf_counter() - started

        # The first construction imports modules and compiles templates.
        construct(rows.select([0]), None)
        one = construct(rows.select([0]), None)
        return {"seconds": construct(rows, args.num_proc) - one}


SIDES = {"lit_sft": measure_lit_sft, "trl": measure_trl}


if __name__ == "__main__":
    main()
