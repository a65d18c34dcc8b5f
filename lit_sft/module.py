"""SFTModule: the model, the exact loss average, the metrics. `__init__` stores settings,
`configure_model` loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lit_sft.datamodule import data_of
from lit_sft.errors import UserError
from lit_sft.generation import answer as answer_module
from lit_sft.generation.scoring import EvaluationOptions
from lit_sft.model import base_fingerprint, memory_estimate, parallel, self_check, trainable
from lit_sft.model.export import AdapterBase, ChatFormat, export_hf
from lit_sft.model.generate import GenerationOptions, context_length, stop_token_ids
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.lora.precision import lift_trained
from lit_sft.model.loss import CausalLMLoss, LossOptions
from lit_sft.model_builder import base_name, build_model
from lit_sft.settings import ModelConfig
from lit_sft.training import optim
from lit_sft.training.seeding import seed_all
from lit_sft.training.token_metrics import TokenMetrics
from lit_sft.types import Batch, LossOutput, Prompts

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


@dataclass(frozen=True)
class _Unregistered:
    """Holds a module whose layers live in another one. `nn.Module` registers the modules that are
    assigned to it as submodules; it does not look into this record.
    """

    module: Any
    """Not `PeftModel`: jsonargparse would import peft to read that name, a fifth of the time of
    `--help`.
    """


class SFTModule(L.LightningModule):
    """A causal language model that learns to complete conversations.

    Args:
        model_name_or_path: Hub id, directory, or `builtin:NAME`.
        revision: Branch, tag or commit of the hub repository.
        trust_remote_code: Run model code that the repository brings.
        init: `pretrained` weights, or `random` ones from the config.
        dtype: Type of the stored weights. `auto`: trained ones in fp32 (with `bf16-true` and
            `16-true` in 16 bits), a frozen base in the type that `trainer.precision` computes in.
        trainable: Regular expressions on parameter names for partial fine-tuning; the rest is
            frozen.
        add_tokens: New tokens, which are never split and whose embeddings are trained.
        attn_implementation: `auto` takes packed attention where the architecture allows; else a
            name of transformers'.
        gradient_checkpointing: Recompute activations: a third more time with `full` (or true), less
            with `selective`.
        compile: Compile every decoder layer with torch.compile.
        loss: What is minimized.
        neftune_noise_alpha: Strength of the noise on the embeddings in training (NEFTune), often 5;
            null for none.
        lora: Train low-rank adapters instead of the weights.
        adapter_name_or_path: Go on training an existing adapter (directory or hub id) instead of
            making a new one.
        quantization: Keep the frozen base of an adapter in 4 bits (QLoRA).
        optimizer: Class and arguments of the optimizer.
        lr_schedule: Learning rate over optimizer steps.
        generation: How prompts are answered.
        evaluation: Answers compared with references at each validation; null to leave it out.
        seed: Seed of random weights and adapters.
    """

    def __init__(
        self,
        model_name_or_path: str = "Qwen/Qwen3-0.6B-Base",
        revision: str | None = None,
        trust_remote_code: bool = False,
        init: Literal["pretrained", "random"] = "pretrained",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        trainable: list[str] | None = None,
        add_tokens: list[str] | None = None,
        attn_implementation: str = "auto",
        gradient_checkpointing: bool | Literal["full", "selective"] = False,
        compile: bool = False,
        loss: LossOptions = LossOptions(),  # noqa: B008 - jsonargparse reads the default from here; never mutated
        neftune_noise_alpha: float | None = None,
        lora: LoraConfig | None = None,
        adapter_name_or_path: str | None = None,
        quantization: Literal["nf4"] | None = None,
        optimizer: Callable[[Iterable], Optimizer] = lambda params: AdamW(
            params, lr=8.0e-5, weight_decay=0.0
        ),
        lr_schedule: optim.ScheduleOptions = optim.ScheduleOptions(),  # noqa: B008
        generation: GenerationOptions = GenerationOptions(),  # noqa: B008
        evaluation: EvaluationOptions | None = EvaluationOptions(),  # noqa: B008
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.options = ModelConfig(
            model_name_or_path=model_name_or_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            init=init,
            dtype=dtype,
            trainable=trainable,
            add_tokens=add_tokens,
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            loss=loss,
            neftune_noise_alpha=neftune_noise_alpha,
            lora=lora,
            adapter_name_or_path=adapter_name_or_path,
            quantization=quantization,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            generation=generation,
            evaluation=evaluation,
            seed=seed,
        )
        self.generation = generation
        self.evaluation = evaluation
        # `on_load_checkpoint` compares, in one line.
        self.strict_loading = False
        self.model: CausalLMLoss | None = None
        self.base: str | None = None
        """Fingerprint of the frozen weights; None where all are trained."""
        self._peft = _Unregistered(None)
        self.saved_stop_ids: list[int] = []
        self.loss_scale = 1.0
        self.window: Tensor = torch.zeros(5, dtype=torch.float64)
        """Since the last optimizer step on this rank, then over all: loss sum, targets, tokens;
        what `Guard` adds.
        """
        self.guard: Callable[[Optimizer, Tensor, Tensor], None] = lambda optimizer, window, norm: (
            None
        )
        self.metrics = TokenMetrics()
        self.between_answers: Callable[[], None] = lambda: None
        self.in_bar = False
        """Whether a progress bar of the user's own shows the loss, too."""

    # ------------------------------------------------------------------ the model

    @property
    def adapter(self) -> Any:
        """Peft's wrapper (a `PeftModel`) around the layers of `model`; None without an adapter."""
        return self._peft.module

    @property
    def _shards_weights(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def configure_model(self) -> None:
        """Builds the model (see `build_model`). The strategy shards it afterwards (`shard`)."""
        if self.model is not None:
            return
        if self.trainer.strategy.root_device.type == "cpu":
            memory_estimate.keep_freed_memory()
        if self.options.quantization and self._shards_weights:
            raise UserError(
                "model.quantization: 4-bit weights are not sharded; set trainer.strategy to ddp or"
                " auto"
            )
        sharded = self._shards_weights and self.trainer.world_size > 1
        # Lightning makes the GPU the default device, which would draw other random start values.
        with torch.device("cpu"):
            model, adapter = build_model(self.options, self.trainer.precision, sharded=sharded)
        longest = data_of(self.trainer).data.longest
        self_check.check_length(model.lm, longest, context_length(model.lm.config))
        self.loss_scale = 1.0 / 1024 if self.trainer.precision.startswith("16") else 1.0
        if trainable.is_frozen(model.lm):
            self.base = base_fingerprint.base_of(model.lm, self.options.init, self.options.seed)
        self.model = model
        self._peft = _Unregistered(adapter)

    def use_merged(self, lm: Any) -> None:
        """Replaces the model by the one (a `PreTrainedModel`) that its adapter was merged into."""
        assert self.model is not None
        self.model.lm = lm
        self._peft = _Unregistered(None)

    def shard(self, mesh: Any, **options: bool) -> None:
        """Shards the model over a data-parallel mesh; called by our FSDP2 strategy after
        `configure_model`.
        """
        assert self.model is not None
        dtype = torch.bfloat16 if "bf16" in self.trainer.precision else torch.float32
        parallel.apply_fsdp2(self.model, self.model.lm, mesh, dtype, **options)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and casts as in torch, but buffers and the trained weights of an adapter keep their
        type and values.

        Lightning casts the whole module for `bf16-true` and `16-true`. Rotary frequencies in bf16
        change a logit by 13 % at position 2,900, and small updates of adapters are lost in 16 bits.
        """
        buffers = dict(self.named_buffers())
        adapter_weights = self._adapter_weights()
        super().to(*args, **kwargs)
        for name, buffer in self.named_buffers():
            buffer.data = buffers[name].to(buffer.device)
        if adapter_weights:
            lift_trained(self)
            # The cast has rounded them, so the values from before it (loaded or restored) are
            # copied back.
            with torch.no_grad():
                for name, weight in adapter_weights.items():
                    self.get_parameter(name).copy_(weight)
        return self

    def _adapter_weights(self) -> dict[str, Tensor]:
        """Trained weights by name; empty without an adapter."""
        if self.adapter is None:
            return {}
        return {
            name: weight.detach()
            for name, weight in self.named_parameters()
            if weight.requires_grad
        }

    # ------------------------------------------------------------------ training

    def forward(self, batch: Batch, count_correct: bool = False) -> LossOutput:
        """Sums over the targets of a batch."""
        assert self.model is not None
        inputs = {key: value for key, value in batch.items() if key != "rows"}
        return self.model(**inputs, count_correct=count_correct)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Begins an optimizer step: an empty window; what is random depends on (seed, step, rank)
        only.
        """
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.window = torch.zeros_like(self.window)
            seed_all(self.options.seed, self.trainer.global_step, self.trainer.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The *sum* of token losses; `on_before_optimizer_step` turns the gradient into that of the
        mean, once.
        """
        output = self(batch)
        self.window = self.window.to(self.device)
        self.window[0] += output.loss_sum.detach()
        # Numbers of the host: nothing is copied, nor waited for.
        self.window[1] += output.num_targets
        self.window[2] += sum(batch["lengths"]) if batch["rows"][0] >= 0 else 0
        return output.loss_sum * self.loss_scale

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradient of the sum -> gradient of the mean over all targets of the global batch.

        Undoes Lightning's division by `accumulate_grad_batches` (also in the last, partial window:
        Lightning #20350) and the mean over ranks of DDP and FSDP, and divides once by the number of
        targets. Runs before clipping.
        """
        if self.trainer.world_size > 1:
            # Lightning's would wait at a barrier first.
            torch.distributed.all_reduce(self.window)
        # Without a target all gradients are 0.
        num_targets = self.window[1].clamp(min=1)
        scale = (
            self.trainer.accumulate_grad_batches
            * self.trainer.world_size
            / (num_targets * self.loss_scale)
        )
        optim.scale_gradients(self.parameters(), scale)
        self.log("train/loss", (self.window[0] / num_targets).float(), prog_bar=self.in_bar)
        self.log("train/lr", torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm over all ranks, or by value, and logs the norm before that, under every
        strategy.
        """
        wanted = 0.0 if gradient_clip_algorithm == "value" else gradient_clip_val or 0.0
        # 0 is off, as in Lightning.
        limit = wanted if wanted > 0 else float("inf")
        norm = optim.clip_by_norm(self.parameters(), limit)
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log("train/grad_norm", norm)
        self.guard(optimizer, self.window, norm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """As in Lightning, which then keeps the gradients through the next forward pass, a
        validation or a save.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optim.clear_gradients(optimizer, self.trainer.strategy.model)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Not once more when the next step begins."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over two parameter groups, and the schedule by optimizer step."""
        groups = optim.parameter_groups(self.named_parameters())
        optimizer = self.options.optimizer(groups)
        is_scaled = self.trainer.precision == "16-mixed"
        optim.check_weights(optimizer, self._shards_weights, is_scaled)
        # With a scaler Lightning unscales the gradients before clipping; fused Adam would unscale
        # them itself, later.
        if not is_scaled:
            optim.prefer_fused(optimizer)

        # Under fsdp2 a resumed run knows its number of steps only after this method has run.
        def factor(step: int) -> float:
            return optim.lr_factor(self.options.lr_schedule, data_of(self.trainer).total_steps)(
                step
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the averages over all targets; answers are scored by the callback
        `Evaluation`.
        """
        self.metrics.update(self(batch, count_correct=True))

    def on_validation_epoch_end(self) -> None:
        """Logs the averages."""
        stage = "test" if self.trainer.testing else "val"
        for name, value in self.metrics.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss", sync_dist=True)
        self.metrics.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # ------------------------------------------------------------------ generation

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: of the tokenizer, the generation config, the template and the
        training set.
        """
        assert self.model is not None
        datamodule = data_of(self.trainer)
        extra = {*self.saved_stop_ids, *datamodule.stop_ids}
        return stop_token_ids(datamodule.tokenizer, self.model.lm.generation_config, extra)

    def answer(self, prompts: Prompts, options: GenerationOptions | None = None) -> list[list[str]]:
        """The answers to each prompt (see `generation.answer`), with `model.generation` unless told
        otherwise.
        """
        assert self.model is not None
        # The context lets callbacks ask the model in the same precision as `predict`.
        with self.trainer.precision_plugin.forward_context():
            return answer_module.answer(
                self.model,
                data_of(self.trainer).tokenizer,
                prompts,
                options=options or self.generation,
                stop_ids=self.stop_ids,
                seed=self.options.seed,
                synced=self._shards_weights,
            )

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """One record per prompt (see `generation.answer.records`)."""
        return answer_module.records(batch, self.answer(batch))

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what is frozen, and remembers what that was; and how answers end."""
        checkpoint |= {
            "base": self.base,
            "quantization": self.options.quantization,
            "stop_ids": self.stop_ids,
        }
        if self.base is not None:
            checkpoint["state_dict"] = trainable.trained(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses what does not belong to this model; takes back how answers end."""
        if "state_dict" in checkpoint:
            # Lightning's FSDP strategy has taken it out.
            trainable.check_fits(self, checkpoint["state_dict"])
        base_fingerprint.check_base(checkpoint["base"], self.base)
        # Only training must go on over the same bits. Who evaluates or merges over others has asked
        # for it by name.
        is_resumed = self.trainer.state.fn == "fit"
        if is_resumed and not data_of(self.trainer).options.allow_other_data:
            now = self.options.quantization
            base_fingerprint.check_quantization(checkpoint.get("quantization", now), now)
        self.saved_stop_ids = checkpoint["stop_ids"]

    # ------------------------------------------------------------------ export

    def export(
        self, output_dir: Path, state_dict: Mapping[str, Tensor] | None = None, **how: Any
    ) -> None:
        """Writes a Hugging Face directory: weights or adapter, tokenizer, chat template, stop
        tokens.

        Args:
            output_dir: Where to.
            state_dict: Whole weights of `model` by name, where they are sharded.
            **how: `dtype` and `check`, as in `export_hf`.
        """
        assert self.model is not None
        datamodule = data_of(self.trainer)
        options = self.options
        is_ours = options.init == "random" or options.add_tokens
        export_hf(
            self.adapter or self.model.lm,
            ChatFormat(datamodule.tokenizer, self.stop_ids, datamodule.data.chat_template),
            output_dir,
            base=(
                None
                if is_ours
                else AdapterBase(base_name(options.model_name_or_path), options.revision)
            ),
            state_dict=(
                None
                if state_dict is None
                else {k.removeprefix("lm."): v for k, v in state_dict.items()}
            ),
            **how,
        )
