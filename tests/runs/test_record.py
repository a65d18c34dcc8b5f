"""Twenty optimizer steps in twelve ways equal what the first release computed: losses, gradient
norms and weights.

The record in `records/training.json` was made before the package was reorganized. On the machine
and with the library versions of the record, everything must be equal bit for bit. Other processors
and versions round otherwise, so there the bounds of `scripts/verify_equivalence.py` apply. A change
that is meant to change the numbers writes a new record:

    python tests/runs/test_record.py
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[2] / "scripts"), str(Path(__file__).parents[1])]
import running  # noqa: E402
from verify_equivalence import BF16_LIMIT, LIMIT, base, options, read, write_rows  # noqa: E402

RECORD = Path(__file__).parents[1] / "records" / "training.json"
STEPS = 20
PRECISIONS = {
    "fp32": {"trainer.precision": "32-true"},
    "bf16-mixed": {"trainer.precision": "bf16-mixed"},
}
TRAINED: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model.lora.r": 4, "model.lora.lora_alpha": 16},
}
RANKS: dict[str, dict[str, Any]] = {
    "one process": {"trainer.devices": 1, "data.micro_batch_size": 2},
    "ddp": {"trainer.devices": 2, "trainer.strategy": "ddp"},
    "fsdp2": {"trainer.devices": 2, "trainer.strategy": "fsdp2"},
}
WAYS = {
    f"{precision}, {trained}, {ranks}": {
        **PRECISIONS[precision],
        **TRAINED[trained],
        **RANKS[ranks],
    }
    for precision in PRECISIONS
    for trained in TRAINED
    for ranks in RANKS
}
# Packs, accumulation over a partial last window, validation, and answers in between (weights are
# cast for them).
COMMON = {
    "trainer.max_epochs": -1,
    "trainer.max_steps": STEPS,
    "trainer.num_sanity_val_steps": 0,
    "model.optimizer": "torch.optim.AdamW",
    "model.optimizer.lr": 1e-3,
    "model.lr_schedule.type": "cosine",
    "model.lr_schedule.warmup_ratio": 0.1,
    "model.generation.max_new_tokens": 4,
    "data.val_size": 8,
    "data.max_length": 128,
    "data.packing": True,
    "data.global_batch_size": 4,
    "data.micro_batch_size": 1,
    "data.questions": ["abc"],
}


def machine() -> dict[str, str]:
    """What decides how a processor rounds."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [
        line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags"))
    ]
    processor = hashlib.sha256(" ".join(names[:2]).encode()).hexdigest()[:16]
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "lightning")}
    return {
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        **packages,
    } | {"python": platform.python_version()}


def run(way: str, folder: Path) -> dict[str, Any]:
    """Twenty steps from random weights."""
    root = folder / "run"
    settings = {**base(write_rows(folder / "train.jsonl", 48), root), **COMMON, **WAYS[way]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        running.run("fit", options(settings), subprocesses=settings["trainer.devices"] > 1)
    finally:
        torch.set_num_threads(threads)
    result = read(root)
    weights = {
        name: weight.detach().cpu().contiguous() for name, weight in sorted(result.weights.items())
    }
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().tobytes())
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "weight_norm": {name: float(weight.double().norm()) for name, weight in weights.items()},
        "sha256": digest.hexdigest(),
    }


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_twenty_steps_equal_the_record(way, tmp_path):
    record = json.loads(RECORD.read_text())
    expected, ours = record["ways"][way], run(way, tmp_path)
    assert len(ours["loss"]) == STEPS
    if record["machine"] == machine():
        assert ours == expected
        return
    limit = BF16_LIMIT if "bf16" in way else LIMIT
    assert ours["weight_norm"].keys() == expected["weight_norm"].keys()
    # Rounding grows over twenty AdamW steps; the first loss has seen one forward pass only.
    assert largest_difference(ours["loss"][:1], expected["loss"][:1]) <= limit
    assert largest_difference(ours["loss"], expected["loss"]) <= 10 * limit
    assert largest_difference(ours["grad_norm"], expected["grad_norm"]) <= 100 * limit


def main() -> None:
    """Writes the record anew."""
    ways = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            ways[way] = run(way, Path(folder))
        print(f"{way}: loss {ways[way]['loss'][0]:.6f} -> {ways[way]['loss'][-1]:.6f}", flush=True)
    RECORD.write_text(json.dumps({"machine": machine(), "ways": ways}, indent=1) + "\n")


if __name__ == "__main__":
    main()
