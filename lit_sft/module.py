"""SFTModule: the model, the exact loss average, the metrics, and generation.

`__init__` only stores settings. `configure_model` loads the model.

The loss average is exact: every target token of the global batch has the same weight, whatever the
number of micro-batches and ranks. Two methods make it:

1. `training_step` returns the *sum* of the token losses of a micro-batch, and adds its numbers of
   targets and tokens to `window`.
2. `on_before_optimizer_step` sums `window` over all ranks. Then one multiplication turns the
   gradient of the sum into the gradient of the mean.
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
from lit_sft.model import (
    base_fingerprint,
    composite,
    memory_estimate,
    new_tokens,
    parallel,
    self_check,
    trainable,
)
from lit_sft.model.export import AdapterBase, ChatFormat, export_hf
from lit_sft.model.generate import GenerationOptions, context_length, stop_token_ids
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.lora.precision import lift_trained
from lit_sft.model.loss import CausalLMLoss, LossOptions
from lit_sft.model.routers import RouterSums
from lit_sft.model_builder import base_name, build_model
from lit_sft.settings import ModelConfig
from lit_sft.training import optim
from lit_sft.training.seeding import seed_all
from lit_sft.training.token_metrics import TokenMetrics
from lit_sft.types import Batch, LossOutput, Prompts

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

LOSS_SUM, NUM_TARGETS, NUM_TOKENS, NORM_SUM, NORM_SQUARE_SUM = range(5)
"""Entries of `SFTModule.window`.

The callback `Guard` sets the last two before the sum over ranks: the gradient norm of the step
before, as this rank has it, and its square. Their sums tell whether all ranks have the same norm.
"""
WINDOW_SIZE = 5


@dataclass(frozen=True)
class _Unregistered:
    """Holds a module that must not become a submodule, because another submodule has its layers.

    `nn.Module` registers every module that is assigned to an attribute, but not one in a record.
    """

    module: Any
    """A `PeftModel` or None. The type is not named: jsonargparse would import peft to read it,
    which takes a fifth of the time of `--help`.
    """


class SFTModule(L.LightningModule):
    """A causal language model that is fine-tuned on conversations.

    Args:
        model_name_or_path: Model to train: a hub id, a directory, or `builtin:NAME`.
        revision: Branch, tag or commit of the hub repository. null takes its default branch.
        trust_remote_code: Run Python code that comes with the model.
        init: Start from the `pretrained` weights, or from `random` ones that fit the config.
        dtype: Type in which the weights are stored. `auto` stores trained weights in fp32 (with
            precision `bf16-true` or `16-true` in 16 bits), and a frozen base in the type in which
            `trainer.precision` computes.
        trainable: Regular expressions on parameter names: train only the parameters that match.
            null trains all of them, or the adapters.
        add_tokens: Tokens to add to the vocabulary; their embeddings are trained. null adds none.
        attn_implementation: `auto` takes packed attention if the architecture allows it; or a name
            that transformers knows, such as `sdpa` or `eager`.
        gradient_checkpointing: Save memory by recomputing activations in the backward pass: `full`
            or true takes a third more time, `selective` less.
        compile: Compile every decoder layer with torch.compile.
        loss: Loss of a target token.
        neftune_noise_alpha: Strength of the NEFTune noise on the embeddings in training, often 5.
            null adds no noise.
        lora: Train low-rank adapters over frozen weights. null trains the weights.
        adapter_name_or_path: Continue to train this adapter (a directory or hub id). null does not
            load one.
        quantization: Store the frozen base of an adapter in 4 bits (QLoRA). null does not quantize.
        optimizer: Class and arguments of the optimizer.
        lr_schedule: Learning rate over the optimizer steps.
        generation: How prompts are answered: length and sampling.
        evaluation: Compare generated answers with references at each validation. null skips this.
        seed: Linked from seed_everything: seed of random weights, dropout, noise and sampling.
    """

    def __init__(  # noqa: PLR0913 - the schema of `model`
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
        # `on_load_checkpoint` compares names and shapes, with an error in one line.
        self.strict_loading = False
        self.model: CausalLMLoss | None = None
        """The model and its loss. None before `configure_model`."""
        self.num_rows = 0
        """Rows of the embedding, after `configure_model`."""
        self.base: str | None = None
        """Fingerprint of the frozen weights. None if all weights are trained."""
        self._peft = _Unregistered(None)
        self.saved_stop_ids: list[int] = []
        """Stop tokens of the run that made the loaded checkpoint."""
        self.saved_turn_end_ids: list[int] = []
        """Those of them that end its trained turns."""
        self.loss_scale = 1.0
        """Factor on the loss in the backward pass. In fp16 a sum of losses would overflow."""
        self.window: Tensor = torch.zeros(WINDOW_SIZE, dtype=torch.float64)
        """[5] sums of the current optimizer step: of this rank until `on_before_optimizer_step`,
        then of all ranks. The entries are named by `LOSS_SUM` and its neighbors.
        """
        self.routers = RouterSums(coefficient=0, num_ranks=1)
        """What the routers did in the current optimizer step."""
        self.guard: Callable[[Optimizer, Tensor, Tensor], None] = _accept_step
        """Called with the optimizer, the window and the gradient norm before weights change."""
        self.metrics = TokenMetrics()
        self.between_answers: Callable[[], None] = lambda: None
        """Called between two batches of prompts; a preempted run leaves there."""
        self.in_bar = False
        """Whether `train/loss` is shown in the progress bar: if the user has configured one."""

    # ------------------------------------------------------------------ the model

    @property
    def adapter(self) -> Any:
        """The `PeftModel` around the layers of `model`, or None without an adapter."""
        return self._peft.module

    @property
    def _shards_weights(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def configure_model(self) -> None:
        """Builds the model (see `build_model`). The strategy shards it afterwards, by `shard`."""
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
        # Lightning makes the GPU the default device. Random weights would differ from a CPU's.
        with torch.device("cpu"):
            model, adapter, router_aux_loss_coef = build_model(
                self.options,
                self.trainer.precision,
                sharded=sharded,
                device=self.trainer.strategy.root_device,
            )
        data = data_of(self.trainer).data
        self.num_rows = new_tokens.num_rows(model.lm)
        new_tokens.check_rows(data.tokenizer, data.largest_id, self.num_rows)
        self_check.check_length(model.lm, data.longest, context_length(model.lm.config))
        settings = data_of(self.trainer).options
        is_packed = settings.packing and not model.separate_rows
        self_check.warn_of_scores(model.lm, settings.max_length if is_packed else data.longest)
        if self.trainer.precision.startswith("16"):
            self.loss_scale = 1.0 / 1024
        if trainable.is_frozen(model.lm):
            self.base = base_fingerprint.base_of(model.lm, self.options.init, self.options.seed)
        self.routers = RouterSums(router_aux_loss_coef, self.trainer.world_size)
        self.model = model
        self._peft = _Unregistered(adapter)

    def use_merged(self, lm: Any) -> None:
        """Replaces the adapted model by a `PreTrainedModel` that its adapter was merged into."""
        assert self.model is not None
        self.model.lm = lm
        self._peft = _Unregistered(None)

    def shard(self, mesh: Any, **options: bool) -> None:
        """Shards the model over a data-parallel mesh.

        The strategy `fsdp2` calls it after `configure_model`.

        Args:
            mesh: Device mesh of one dimension.
            **options: `cpu_offload` and `reshard_after_forward` of `parallel.apply_fsdp2`.
        """
        assert self.model is not None
        dtype = torch.bfloat16 if "bf16" in self.trainer.precision else torch.float32
        parallel.apply_fsdp2(self.model, self.model.lm, mesh, dtype, **options)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and casts as in torch, except for buffers and trained adapter weights.

        Lightning casts the whole module for `bf16-true` and `16-true`. But rotary frequencies in
        bf16 change a logit by 13 % at position 2,900, and in 16 bits small updates of adapter
        weights are rounded away. So these are moved, and keep their dtype and values.
        """
        buffers = dict(self.named_buffers())
        adapter_weights = self._adapter_weights()
        super().to(*args, **kwargs)
        for name, buffer in self.named_buffers():
            buffer.data = buffers[name].to(buffer.device)
        if adapter_weights:
            lift_trained(self)
            # The cast has rounded the adapter weights, so copy the values from before it back.
            with torch.no_grad():
                for name, weight in adapter_weights.items():
                    self.get_parameter(name).copy_(weight)
        return self

    def _adapter_weights(self) -> dict[str, Tensor]:
        """The trained weights by name. Empty without an adapter."""
        if self.adapter is None:
            return {}
        trained = {}
        for name, weight in self.named_parameters():
            if weight.requires_grad:
                trained[name] = weight.detach()
        return trained

    # ------------------------------------------------------------------ training

    def forward(self, batch: Batch, count_correct: bool = False) -> LossOutput:
        """Sums the loss over the targets of a batch (see `CausalLMLoss.forward`)."""
        assert self.model is not None
        inputs = {key: value for key, value in batch.items() if key != "rows"}
        return self.model(**inputs, count_correct=count_correct)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """At the beginning of an optimizer step, clears the window and seeds all random states.

        What is random in a step depends on (seed, step, rank) only, so a resumed run draws the
        same numbers.
        """
        is_new_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        if is_new_step:
            self.window = torch.zeros_like(self.window)
            self.routers.clear()
            optim.use_training_weights(self.trainer.optimizers[0])
            seed_all(self.options.seed, self.trainer.global_step, self.trainer.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the *sum* of the token losses of a micro-batch, and counts its targets.

        No average is taken here: `on_before_optimizer_step` divides once, by the number of targets
        in the whole optimizer step. The loss that balances experts is added as a sum, too.
        """
        output = self(batch)
        is_filler = batch["rows"][0] < 0
        num_tokens = 0 if is_filler else sum(batch["lengths"])
        self.window = self.window.to(self.device)
        self.window[LOSS_SUM] += output.loss_sum.detach()
        # These two are numbers on the host, so a GPU is not synchronized.
        self.window[NUM_TARGETS] += output.num_targets
        self.window[NUM_TOKENS] += num_tokens
        loss_sum = output.loss_sum
        if output.routing is not None:
            balance = self.routers.add(output.routing, output.num_targets, is_filler)
            loss_sum = loss_sum if balance is None else loss_sum + balance
        return loss_sum * self.loss_scale

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turns the gradient of the summed loss into the gradient of the mean over all targets.

        The gradients arrive divided by two numbers: Lightning has divided every loss by
        `accumulate_grad_batches` (also in the last, partial step of an epoch: Lightning #20350),
        and DDP and FSDP2 have taken the mean over ranks. One factor undoes both, undoes
        `loss_scale`, and divides by the number of targets of the global batch. It is applied before
        clipping.
        """
        if self.trainer.world_size > 1:
            # Not `strategy.reduce`, which would wait at a barrier first.
            torch.distributed.all_reduce(self.window)
        # Without any target all gradients are 0, and so is the loss.
        num_targets = self.window[NUM_TARGETS].clamp(min=1)
        divided_by = self.trainer.accumulate_grad_batches * self.trainer.world_size
        optim.scale_gradients(self.parameters(), divided_by / (num_targets * self.loss_scale))
        loss = (self.window[LOSS_SUM] / num_targets).float()
        self.log("train/loss", loss, prog_bar=self.in_bar)
        for name, value in self.routers.metrics().items():
            self.log(f"train/{name}", value)
        self.log("train/lr", torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients by norm or by value, and logs the norm before clipping.

        The norm is that over all ranks, under every strategy.
        """
        by_value = gradient_clip_algorithm == "value"
        limit = float("inf")
        # A value of 0 switches clipping off, as in Lightning.
        if not by_value and gradient_clip_val and gradient_clip_val > 0:
            limit = gradient_clip_val
        norm = optim.clip_by_norm(self.parameters(), limit)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log("train/grad_norm", norm)
        self.guard(optimizer, self.window, norm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Frees the gradients right after the step.

        Lightning would keep them until the next step begins, through a validation or a save.
        Validations, saves and exports lie between two steps, so they get the evaluation weights.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optim.use_evaluation_weights(self.trainer.optimizers[0])
        optim.clear_gradients(optimizer, self.trainer.strategy.model)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Does nothing: `optimizer_step` has cleared the gradients."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns the optimizer, with two parameter groups, and the schedule by optimizer step."""
        groups = optim.parameter_groups(self.named_parameters())
        dtype = groups[0]["params"][0].dtype
        embeddings = {id(weight) for weight in self._embedding_weights()}
        optimizer = optim.build(self.options.optimizer, groups, dtype, embeddings)
        is_scaled = self.trainer.precision == "16-mixed"
        optim.check_weights(optimizer, self._shards_weights, is_scaled)
        # With a gradient scaler, Lightning unscales the gradients before clipping. Fused Adam would
        # unscale them itself, after clipping.
        if not is_scaled:
            optim.prefer_fused(optimizer)

        # `total_steps` is read at each step: under fsdp2, a resumed run knows it only after this
        # method has run.
        def factor(step: int) -> float:
            total_steps = data_of(self.trainer).total_steps
            return optim.lr_factor(self.options.lr_schedule, total_steps)(step)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _embedding_weights(self) -> list[Tensor]:
        """Lists the weights of the embeddings and the head."""
        assert self.model is not None
        lm = self.model.lm
        weights: list[Tensor] = []
        for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            if module is not None:
                weights += list(module.parameters())
        return weights

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the averages over all targets.

        Generated answers are scored elsewhere, by the callback `Evaluation`.
        """
        self.metrics.update(self(batch, count_correct=True))

    def on_validation_epoch_end(self) -> None:
        """Logs loss, perplexity and token accuracy, averaged over all targets of all ranks."""
        stage = "test" if self.trainer.testing else "val"
        for name, value in self.metrics.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss", sync_dist=True)
        self.metrics.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # ------------------------------------------------------------------ generation

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer.

        They come from the tokenizer, the generation config, the chat template, the training set,
        and the loaded checkpoint.
        """
        assert self.model is not None
        datamodule = data_of(self.trainer)
        extra = {*self.saved_stop_ids, *datamodule.stop_ids}
        return stop_token_ids(datamodule.tokenizer, self.model.lm.generation_config, extra)

    @property
    def turn_end_ids(self) -> list[int]:
        """The ids that end trained turns, of the data and of the loaded checkpoint."""
        return sorted({*self.saved_turn_end_ids, *data_of(self.trainer).turn_end_ids})

    def answer(
        self, prompts: Prompts, options: GenerationOptions | None = None
    ) -> list[list[answer_module.Answer]]:
        """Generates the answers to each prompt (see `generation.answer`).

        Args:
            prompts: B prompts.
            options: Length and sampling. None takes `model.generation`.

        Returns:
            B lists of answers.
        """
        assert self.model is not None
        tokenizer = data_of(self.trainer).tokenizer
        new_tokens.check_id(tokenizer, int(prompts["input_ids"].max()), self.num_rows)
        # Callbacks call this outside of a step. The context gives them the precision of `predict`.
        with self.trainer.precision_plugin.forward_context():
            return answer_module.answer(
                self.model,
                tokenizer,
                prompts,
                options=options or self.generation,
                stop_ids=self.stop_ids,
                seed=self.options.seed,
                synced=self._shards_weights,
            )

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Returns one record per prompt (see `generation.answer.records`).

        Batches hold prompts of similar length, so the records are not in the order of the data:
        sort them by `index`.
        """
        return answer_module.records(batch, self.answer(batch))

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves frozen weights out, and stores the fingerprint of the base and the stop tokens."""
        checkpoint |= {
            "base": self.base,
            "quantization": self.options.quantization,
            "stop_ids": self.stop_ids,
            "turn_end_ids": self.turn_end_ids,
        }
        if self.base is not None:
            checkpoint["state_dict"] = trainable.trained(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the stop tokens.

        Raises:
            UserError: The checkpoint belongs to another model or another base, or its base is
                quantized differently.
        """
        # Lightning's FSDP strategy takes the weights out before this hook.
        if "state_dict" in checkpoint:
            trainable.check_fits(self, checkpoint["state_dict"])
        base_fingerprint.check_base(checkpoint["base"], self.base)
        # Only a resumed training needs the same quantization. To evaluate or merge over another
        # one is a choice of the user.
        is_resumed = self.trainer.state.fn == "fit"
        if is_resumed and not data_of(self.trainer).options.allow_other_data:
            now = self.options.quantization
            base_fingerprint.check_quantization(checkpoint.get("quantization", now), now)
        self.saved_stop_ids = checkpoint["stop_ids"]
        # Checkpoints of earlier versions do not have it. Then the chat template alone tells.
        self.saved_turn_end_ids = checkpoint.get("turn_end_ids", [])

    # ------------------------------------------------------------------ export

    def export(
        self,
        output_dir: Path,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        text_only: bool = False,
        **how: Any,
    ) -> None:
        """Writes a Hugging Face directory (see `export_hf`).

        Args:
            output_dir: The directory.
            state_dict: Full weights of `model` by name, if the model is sharded.
            text_only: Whether to write the text of a multimodal model as a plain text model.
            **how: `dtype` and `check`, as in `export_hf`.
        """
        assert self.model is not None
        datamodule = data_of(self.trainer)
        options = self.options
        # Random weights and added tokens make a base that exists nowhere else.
        base = None
        if options.init != "random" and not options.add_tokens:
            base = AdapterBase(base_name(options.model_name_or_path), options.revision)
        source = None
        if options.init != "random" and not text_only:
            source = composite.source_of(self.model.lm)
            if source is None and self.adapter is None:
                source = composite.source_with_more(self.model.lm)
        if state_dict is not None:
            state_dict = {name.removeprefix("lm."): value for name, value in state_dict.items()}
        chat = ChatFormat(
            tokenizer=datamodule.tokenizer,
            stop_ids=self.stop_ids,
            chat_template=datamodule.data.chat_template,
            turn_end_ids=self.turn_end_ids,
            source=Path(datamodule.data.tokenizer_source),
            added_tokens=options.add_tokens or (),
        )
        export_hf(
            self.adapter or self.model.lm,
            chat,
            output_dir,
            base=base,
            source=source,
            state_dict=state_dict,
            **how,
        )


def _accept_step(optimizer: Optimizer, window: Tensor, norm: Tensor) -> None:
    """The `guard` of a module without the callback `Guard`: every step is taken."""
