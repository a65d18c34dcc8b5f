"""Time of the parts of a training step, beside a bare PyTorch loop on the same batches.

    python scripts/bench/step.py --config configs/smollm2_135m.yaml --data.train alpaca_en_demo.json

Takes the arguments of `fit`. After `WARM` optimizer steps, `MEASURED` steps are timed. After each
of them, a bare loop (autocast, the loss module, backward, scaling, clipping, the same optimizer)
takes the same batches, so other load on the machine affects both. `--profile` prints torch's table
of one more step. `--brief` skips the bare loop and half of the steps.

The last line is one JSON object: milliseconds per optimizer step for data, backbone, head and loss,
backward, optimizer and the rest (Lightning, logging); `lightning_share`, the additional time of the
step over the bare one; `mfu` against the peak of the device (on a CPU, of a matrix product).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_sft.callbacks.throughput import Throughput, peak_memory
from lit_sft.cli import main as main_module
from lit_sft.training.flops import peak_flops, step_cost

WARM, MEASURED, BRIEF = 2, 6, 3


class Anatomy(Callback):
    """Times the parts of each optimizer step, and makes a bare step after it."""

    def __init__(self, profile: bool = False, brief: bool = False) -> None:
        self.profile, self.brief = profile, brief
        self.last = WARM + (BRIEF if brief else MEASURED)
        self.parts: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self.batches: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wraps backbone, loss and optimizer in clocks."""
        model, (optimizer,) = pl_module.model, trainer.optimizers
        self.device = pl_module.device
        self._time(model.lm.base_model, "forward", "backbone")
        self._time(model, "forward", "forward")
        self._time(trainer.strategy, "backward", "backward")
        self._time_update(optimizer)
        for name in ("on_before_optimizer_step", "configure_gradient_clipping"):
            self._time(pl_module, name, "scaling and clipping")
        self.bare_step = bare_step(trainer, pl_module)
        half = torch.float16 if trainer.precision.startswith("16") else torch.bfloat16
        self.peak = peak_flops(
            self.device, torch.float32 if trainer.precision.startswith("32") else half
        )
        self.cost = step_cost(model.lm)
        self.began = self.ended = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _time(self, owner: Any, name: str, part: str) -> None:
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._now()
            result = plain(*args, **kwargs)
            self.parts[part] += self._now() - started
            return result

        setattr(owner, name, timed)

    def _time_update(self, optimizer: Any) -> None:
        plain = optimizer.step

        def timed(closure: Callable[[], Any] | None = None) -> Any:
            within = [0.0]

            def timed_closure() -> Any:
                started = self._now()
                result = closure() if closure else None
                within[0] += self._now() - started
                return result

            started = self._now()
            result = plain(timed_closure)
            self.parts["update"] += self._now() - started - within[0]
            return result

        optimizer.step = timed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the time since the last batch to the part `data`."""
        self.parts["data"] += self._now() - self.ended
        self.batches.append(batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stores the parts of an optimizer step, then makes a bare step."""
        self.ended = self._now()
        if trainer.fit_loop._should_accumulate():
            return
        parts, self.parts = self.parts, defaultdict(float)
        parts["step"] = self.ended - self.began
        if trainer.global_step > WARM:
            if not self.brief:
                started = self._now()
                self.bare_step(self.batches)
                parts["bare"] = self._now() - started
            parts["tokens"] = sum(sum(batch["lengths"]) for batch in self.batches)
            parts["operations"] = self.cost.of(
                parts["tokens"],
                sum(int((batch["labels"] >= 0).sum()) for batch in self.batches),
                sum(length**2 for batch in self.batches for length in batch["lengths"]),
            )
            self.steps.append(parts)
        if self.profile and trainer.global_step == self.last:
            with torch.profiler.profile() as profiler:
                self.bare_step(self.batches)
            print(
                profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30),
                flush=True,
            )
        self.batches, self.parts = [], defaultdict(float)
        self.began = self.ended = self._now()

    def report(self) -> dict[str, Any]:
        """Returns medians over the measured steps, in milliseconds."""

        def median(value: Callable[[dict[str, float]], float]) -> float:
            return statistics.median(value(step) for step in self.steps)

        whole = median(lambda s: s["step"])
        parts = {
            "data": median(lambda s: s["data"]),
            "backbone": median(lambda s: s["backbone"]),
            "head_and_loss": median(lambda s: s["forward"] - s["backbone"]),
            "backward": median(lambda s: s["backward"]),
            "optimizer": median(lambda s: s["scaling and clipping"] + s["update"]),
        }
        parts["rest"] = whole - sum(parts.values())
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "step_ms": round(1e3 * whole, 2),
            **{f"{name}_ms": round(1e3 * seconds, 2) for name, seconds in parts.items()},
            "tokens_per_second": round(median(lambda s: s["tokens"] / s["step"]), 1),
            "peak_gb": round(peak_memory(self.device) / 1e9, 3),
            **({} if self.brief else self._beside_bare(median)),
            "mfu": round(median(lambda s: s["operations"] / s["step"]) / self.peak, 4),
            "peak_tflops": round(self.peak / 1e12, 3),
        }

    @staticmethod
    def _beside_bare(
        median: Callable[[Callable[[dict[str, float]], float]], float],
    ) -> dict[str, float]:
        return {
            "bare_step_ms": round(1e3 * median(lambda s: s["bare"]), 2),
            "lightning_share": round(median(lambda s: 1 - s["bare"] / s["step"]), 4),
        }


def bare_step(trainer: L.Trainer, module: Any) -> Callable[[list[Any]], None]:
    """Makes one optimizer step as a hand-written loop would."""
    (optimizer,), model = trainer.optimizers, module.model
    limit = trainer.gradient_clip_val

    def run(batches: list[Any]) -> None:
        targets = 0
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "rows"}
            with precision(trainer.precision, module.device.type):
                output = model(**inputs)
            output.loss_sum.backward()
            targets = targets + output.num_targets
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in parameters], 1.0 / targets)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


@contextlib.contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Returns the autocast of Lightning's precision."""
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float16
    with torch.autocast(device, dtype, enabled=name.endswith("mixed")):
        yield


def main(args: list[str]) -> None:
    """Runs `fit` with these arguments, for a few steps."""
    anatomy = Anatomy(profile="--profile" in args, brief="--brief" in args)
    args = [arg for arg in args if arg not in ("--profile", "--brief")]

    class Bench(main_module.SFTCLI):
        """The real command line without checkpoints, answers and exports."""

        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks = [Throughput(), anatomy]  # type: ignore[attr-defined]
            return trainer

    with tempfile.TemporaryDirectory() as root:
        settings = {
            "trainer.max_steps": anatomy.last,
            "trainer.max_epochs": 1000,
            "trainer.limit_val_batches": 0,
            "trainer.default_root_dir": root,
            "trainer.enable_progress_bar": "false",
            "data.questions": "[]",
        }
        main_module.SFTCLI = Bench  # type: ignore[misc]
        # Ranks that Lightning would start read sys.argv; this benchmark has one.
        main_module.main(
            [
                "fit",
                *args,
                "--trainer.devices=1",
                *(f"--{key}={value}" for key, value in settings.items()),
            ]
        )
    print(json.dumps(anatomy.report()))


if __name__ == "__main__":
    main(sys.argv[1:])
