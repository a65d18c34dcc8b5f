"""lit_sft beside TRL's SFTTrainer on one GPU: tokens per second, FLOPs utilization and memory.

    python scripts/bench/gpu.py    # options: --cases 8b-lora, --only lit_sft, --compile, --venv DIR
    python scripts/bench/gpu.py --smoke --only lit_sft     # the same code on a CPU, in tiny shapes

Qwen3-0.6B and Llama-3-8B with random weights, full and with LoRA, in bf16 autocast (trained weights
in fp32, a frozen base in bf16). Rows are random token ids of chat-like lengths, three fifths of
them trained. Both sides get the same rows, and each packs them into `--max_length` tokens. Each
side runs in a process of its own, timed from the end of the warm-up to the end of the last
optimizer step. Tokens, targets and squares of lengths are counted from the batches, FLOPs as in
`train/mfu`. Memory is the peak of allocated memory in training. A case that does not fit according
to lit_sft's estimate is skipped on both sides. Neither a hub nor a tokenizer is needed.

lit_sft  SFTModule and SFTTrainer, as `fit` uses them.
TRL      packing (best fit, without padding), the fastest attention of its environment, its
         chunked loss, Liger's layers if installed. `--trl_attention` and `--trl_micro_batch_size`
         override them.

The last line is one JSON object, with the goals that were reached (null: not measured).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import sides
import torch
from speed import Speed

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.6b": ("Qwen3Config", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    }),
    "8b": ("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }),
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
CASES = ("0.6b-full", "0.6b-lora", "8b-lora", "8b-full")
MICRO_BATCH = {"0.6b": 4, "8b": 1}
"""Packs per forward pass."""
SMOKE = {"max_length": 256, "warm_steps": 1, "steps": 2, "global_batch_size": 4}
LENGTHS = (6.0, 0.8)
"""Mean and standard deviation of the logarithms: half of the rows have fewer than 404 tokens."""
GOALS = {"tokens_per_second": ("8b-lora", 14_000), "mfu": ("0.6b-full", 0.45)}
"""Figure -> case and goal on an H100."""
FASTER, ESTIMATE = 1.3, 0.15


def main() -> None:
    """Measures every case on both sides."""
    args = arguments()
    if args.side:
        print(json.dumps((train_trl if args.side == "trl" else train_lit_sft)(args)))
        return
    if not args.smoke and not torch.cuda.is_available():
        print(
            "error: there is no CUDA device: run this on a machine with one, or set --smoke",
            file=sys.stderr,
        )
        sys.exit(2)
    chosen = (args.only,) if args.only else sides.SIDES
    python = sides.interpreters(
        chosen, args.venv, lora=any(case.endswith("lora") for case in args.cases)
    )
    hidden = ("cases", "case", "only", "side", "venv", "work")
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    results: dict[str, dict[str, Any]] = {}
    for case in args.cases:
        with tempfile.TemporaryDirectory() as work:
            write_inputs(args, case, Path(work))
            results[case] = {}
            for side in chosen:
                if "left_out" in results[case].get("lit_sft", {}):
                    break
                try:
                    result = sides.run_side(
                        python[side], __file__, side, {**settings, "case": case, "work": work}
                    )
                except SystemExit as error:
                    # A case may run out of memory. The others are measured all the same.
                    result = {"failed": str(error.code)[-600:]}
                results[case][side] = result
                print(f"{case}, {side}: {json.dumps(result)}", flush=True)
    print(json.dumps(report(results)))


def arguments() -> argparse.Namespace:
    """Parses the command line. `--smoke` changes the defaults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", choices=sides.SIDES, help="measure one side only")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of a pack")
    parser.add_argument("--global_batch_size", type=int, default=8, help="packs per optimizer step")
    parser.add_argument(
        "--micro_batch_size", type=int, help=f"packs per forward pass, by default {MICRO_BATCH}"
    )
    parser.add_argument(
        "--trl_micro_batch_size", type=int, help="by default the same; 1 where TRL has SDPA only"
    )
    parser.add_argument("--trl_attention", help="attn_implementation of the TRL side")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--compile", action="store_true", help="on both sides")
    parser.add_argument(
        "--warm_steps", type=int, default=5, help="optimizer steps before the clock starts"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are timed")
    parser.add_argument(
        "--venv", type=Path, default=sides.TRL_VENV, help="has TRL; made where there is none"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    for name, kind in (("side", str), ("case", str), ("work", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    if "--smoke" in sys.argv:
        parser.set_defaults(**SMOKE)
    return parser.parse_args()


def write_inputs(args: argparse.Namespace, case: str, work: Path) -> None:
    """Writes a model directory without weights, and the rows for each side."""
    import shutil

    import numpy as np
    import transformers

    from lit_sft.data.cache import to_block, write_cache
    from lit_sft.data.stats import Counts
    from lit_sft.model_builder import model_directory
    from lit_sft.types import Example

    name, sizes = SHAPES[case.partition("-")[0]]
    shutil.copytree(model_directory("builtin:demo"), work / "model")
    config = getattr(transformers, name)(**{**sizes, **(TINY if args.smoke else {})})
    config.architectures = [name.replace("Config", "ForCausalLM")]
    config.save_pretrained(work / "model")
    random = np.random.default_rng(0)
    examples: list[Example] = []
    # a twentieth more than all steps take: no side packs without gaps
    left = 1.05 * args.max_length * args.global_batch_size * (args.warm_steps + args.steps)
    while left > 0:
        length = int(np.clip(random.lognormal(*LENGTHS), 16, args.max_length))
        mask = [int(position >= 0.4 * length) for position in range(length)]
        examples.append(
            Example(random.integers(3, config.vocab_size, length).tolist(), mask, row=len(examples))
        )
        left -= length
    sides.write_trl_rows(
        work / "rows.jsonl", write_cache(work / "rows", [to_block(examples)], vars(Counts()))
    )


def micro_batch(args: argparse.Namespace) -> int:
    """Returns the packs per forward pass of lit_sft."""
    return args.micro_batch_size or MICRO_BATCH[args.case.partition("-")[0]]


def train_lit_sft(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with lit_sft; returns only the expected memory if the step does not fit."""
    from lightning.pytorch.callbacks import Callback

    from lit_sft.data.cache import ExampleCache
    from lit_sft.datamodule import SFTDataModule
    from lit_sft.memory_plan import needed_memory

    class Rows(SFTDataModule):
        """A data module whose rows are token ids already."""

        def prepare(self, stage: str) -> None:
            self.data.caches["train"] = ExampleCache(args.work / "rows")

    class Clock(Callback):
        """Drives the clock."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.speed = Speed(pl_module.device, args.warm_steps)

        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            self.speed.add(batch)

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if not trainer.fit_loop._should_accumulate():
                self.speed.step_ended(trainer.global_step)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.result = self.speed.read(pl_module.model.lm, trainer.global_step)

    options = {
        "gradient_checkpointing": args.gradient_checkpointing,
        "compile": args.compile,
        "init": "random",
    }
    module = sides.lit_sft_module(args.work / "model", args.case.endswith("lora"), **options)
    datamodule = Rows(
        model_name_or_path=str(args.work / "model"),
        max_length=args.max_length,
        micro_batch_size=micro_batch(args),
        global_batch_size=args.global_batch_size,
    )
    clock, steps = Clock(), args.warm_steps + args.steps
    trainer = sides.lit_sft_trainer("cpu" if args.smoke else "cuda", [clock], max_steps=steps)
    datamodule.prepare("fit")
    expected = needed_memory(trainer, module, datamodule).total
    device = trainer.strategy.root_device
    if device.type == "cuda" and expected > (
        there := torch.cuda.get_device_properties(device).total_memory
    ):
        return {
            "left_out": (
                f"a step is expected to take {expected / 1e9:.1f} GB, the device has"
                f" {there / 1e9:.1f} GB"
            )
        }
    trainer.fit(module, datamodule)
    return {**clock.result, "expected_gb": round(expected / 1e9, 3)}


def train_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with TRL."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        """Counts the tokens of each forward pass."""

        def training_step(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
            clock.speed.add(inputs)
            return super().training_step(model, inputs, *rest, **kwargs)

    class Clock(TrainerCallback):
        """Drives the clock."""

        def on_train_begin(self, *args_: Any, **kwargs: Any) -> None:
            self.speed = Speed(torch.device("cpu" if args.smoke else "cuda:0"), args.warm_steps)

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            self.speed.step_ended(state.global_step)

        def on_train_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            self.result = self.speed.read(lm, state.global_step)

    attention = args.trl_attention or fastest_attention()
    # SDPA gets one mask over all packs of a forward pass, whose square it would compute
    usual = 1 if attention == "sdpa" and not args.smoke else micro_batch(args)
    lora, size = args.case.endswith("lora"), args.trl_micro_batch_size or usual
    config = sides.trl_config(
        args.work / "trl-run",
        max_steps=args.warm_steps + args.steps,
        packing=True,
        max_length=args.max_length,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=args.global_batch_size // size,
        gradient_checkpointing=args.gradient_checkpointing,
        torch_compile=args.compile,
        use_liger_kernel=not args.smoke and importlib.util.find_spec("liger_kernel") is not None,
        dataloader_num_workers=0 if args.smoke else 2,
        use_cpu=args.smoke,
    )
    with torch.device("cpu" if args.smoke else "cuda:0"):
        lm = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(args.work / "model"),
            dtype=torch.bfloat16 if lora else torch.float32,
            attn_implementation=attention,
        )
    clock = Clock()
    Trainer(
        lm,
        args=config,
        train_dataset=sides.trl_rows(args.work / "rows.jsonl"),
        processing_class=AutoTokenizer.from_pretrained(args.work / "model"),
        peft_config=sides.trl_lora() if lora else None,
        callbacks=[clock],
    ).train()
    return clock.result


def fastest_attention() -> str:
    """Chooses the attention of the TRL side; SDPA needs a mask over the packs."""
    names = {"flash_attn_interface": "flash_attention_3", "flash_attn": "flash_attention_2"}
    found = [
        name for package, name in names.items() if importlib.util.find_spec(package) is not None
    ]
    return found[0] if found and torch.cuda.is_available() else "sdpa"


def report(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Collects all figures, the ratios of the two sides, and the goals."""
    cases: dict[str, dict[str, Any]] = {}
    for case, of in results.items():
        ours, theirs = of.get("lit_sft", {}), of.get("trl", {})
        cases[case] = {
            f"{side}_{name}": value for side, found in of.items() for name, value in found.items()
        }
        if "peak_gb" in ours:
            cases[case]["estimate_ratio"] = round(ours["expected_gb"] / ours["peak_gb"], 3)
        if "peak_gb" in ours and "peak_gb" in theirs:
            for name, key in (("speed_ratio", "tokens_per_second"), ("memory_ratio", "peak_gb")):
                cases[case][name] = round(ours[key] / theirs[key], 3)

    def every(name: str, reached: Any) -> bool | None:
        values = [
            found[name]
            for found in cases.values()
            if name in found and found["lit_sft_device"] != "cpu"
        ]
        return all(map(reached, values)) if values else None

    goals = {
        f"{FASTER} times TRL's tokens per second": every(
            "speed_ratio", lambda ratio: ratio >= FASTER
        ),
        "peak at most TRL's": every("memory_ratio", lambda ratio: ratio <= 1),
        f"estimate within {ESTIMATE:.0%}": every(
            "estimate_ratio", lambda ratio: abs(ratio - 1) <= ESTIMATE
        ),
    }
    for name, (case, goal) in GOALS.items():
        found = cases.get(case, {})
        on_h100 = "H100" in found.get("lit_sft_device", "")
        goals[f"{case}: {name} at least {goal:,}"] = (
            found[f"lit_sft_{name}"] >= goal if on_h100 else None
        )
    return {"cases": cases, "goals": goals}


if __name__ == "__main__":
    main()
