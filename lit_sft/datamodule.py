"""SFTDataModule: composes the data stages, owns the order of the examples and the position in
it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from torch.utils.data import DataLoader, Dataset

from lit_sft import lightning_internals, signals
from lit_sft.data.cache import ExampleCache
from lit_sft.data.collate import collate
from lit_sft.data.loader import TimedLoader
from lit_sft.data.packing import Packs, one_per_pack, pack_examples, reshuffle
from lit_sft.data.sampler import PositionSampler, StepOrder
from lit_sft.data_pipeline import SFTData
from lit_sft.errors import UserError
from lit_sft.generation.prompts import Prompt, make_batches
from lit_sft.model.generate import GenerationOptions
from lit_sft.settings import DataConfig
from lit_sft.types import Batch, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)

QUESTIONS = [
    "Give me an 1-sentence introduction of LLM.",
    "Calculate 1+1-1",
    "What's the difference between thread and process?",
]


class MicroBatches(Dataset[Batch]):
    """Forward passes of one rank, by (epoch, number); holds no state but what follows from
    these.
    """

    def __init__(self, cache: ExampleCache, packs: Packs, order: StepOrder, rank: int) -> None:
        self.cache = cache
        self.packs = packs
        self.order = order
        self.rank = rank

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        packs = self._of_epoch(position[0]) if self.order.shuffle else self.packs
        chosen = self.order.packs(*position, self.rank)
        return collate([self.cache[int(index)] for pack in chosen for index in packs[pack]])

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as the loader
    def _of_epoch(self, epoch: int) -> Packs:
        return reshuffle(self.packs, self.order.seed, epoch)


class SFTDataModule(L.LightningDataModule):
    """Conversations in, batches out.

    Args:
        train: `builtin:NAME`, hub id, file, glob, directory, or a list of {path, name, split,
            weight}.
        validation: Likewise; exclusive with `val_size`.
        val_size: Share (0.1) or rows (200) split off `train`, chosen by seed.
        test: Likewise, for `test`.
        predict: Likewise, for `predict`; or a list of questions. null: `questions`.
        questions: Answered before training, at each validation and after it.
        format: `auto` decides from the columns.
        chat_template: null: the tokenizer's own; a .jinja file; inline jinja; or `raw` (no
            template).
        chat_template_kwargs: Passed to the template, in training and for prompts.
        system_prompt: Put before conversations that have none.
        column_mapping: {column: our name}, e.g. {question: prompt, answer: completion}.
        prompt_template: Raw text with {fields}, filled from the row.
        on_bad_row: What to do with a row that cannot be read.
        unproved: What to do with a row whose mask cannot be proved.
        train_on: Which tokens are targets.
        max_length: Tokens of a row; with packing every row is filled up to it.
        overlong: What to do with examples longer than `max_length`.
        packing: Put several examples into a row, without attention across them.
        micro_batch_size: Rows per forward pass and device.
        global_batch_size: Rows per optimizer step over all devices; accumulation follows from it.
        max_samples: Use only the first rows of each set.
        num_workers: Processes that build batches (`auto`: 0 on a CPU, else 2) and that tokenize
            (one per core).
        cache_dir: Folder of tokenized data. null: `lit_sft` in the user's cache folder.
        model_name_or_path: Linked from the model: whose tokenizer is used.
        revision: Linked from the model.
        trust_remote_code: Linked from the model.
        add_tokens: Linked from the model.
        adapter_name_or_path: Linked from the model: whose tokenizer is used where it has one.
        seed: Linked from seed_everything: order and split.
        allow_other_data: Linked from resume: go on although data or template changed.
    """

    def __init__(
        self,
        train: str | list[str | dict[str, Any]] = "banghua/DL-SFT-Dataset",
        validation: str | list[str | dict[str, Any]] | None = None,
        val_size: int | float | None = None,
        test: str | list[str | dict[str, Any]] | None = None,
        predict: str | list[str] | list[dict[str, Any]] | None = None,
        questions: list[str] = QUESTIONS,  # noqa: B006 - never mutated
        format: Literal[
            "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"
        ] = "auto",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] = {},  # noqa: B006
        system_prompt: str | None = None,
        column_mapping: dict[str, str] | None = None,
        prompt_template: str | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        unproved: Literal["error", "lenient"] = "error",
        train_on: Literal["completions", "last_completion", "all"] = "completions",
        max_length: int = 2048,
        overlong: Literal["drop", "truncate", "error"] = "drop",
        packing: bool = True,
        micro_batch_size: int = 1,
        global_batch_size: int = 8,
        max_samples: int | None = None,
        num_workers: int | Literal["auto"] = "auto",
        cache_dir: str | None = None,
        model_name_or_path: str = "Qwen/Qwen3-0.6B-Base",
        revision: str | None = None,
        trust_remote_code: bool = False,
        add_tokens: list[str] | None = None,
        adapter_name_or_path: str | None = None,
        seed: int = 42,
        allow_other_data: bool = False,
    ) -> None:
        super().__init__()
        self.options = DataConfig(
            train=train,
            validation=validation,
            val_size=val_size,
            test=test,
            predict=predict,
            questions=questions,
            format=format,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            system_prompt=system_prompt,
            column_mapping=column_mapping,
            prompt_template=prompt_template,
            on_bad_row=on_bad_row,
            unproved=unproved,
            train_on=train_on,
            max_length=max_length,
            overlong=overlong,
            packing=packing,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            max_samples=max_samples,
            num_workers=num_workers,
            cache_dir=cache_dir,
            model_name_or_path=model_name_or_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            add_tokens=add_tokens,
            adapter_name_or_path=adapter_name_or_path,
            seed=seed,
            allow_other_data=allow_other_data,
        )
        self.data = SFTData(self.options)
        self.orders: dict[str, StepOrder] = {}
        self.packs: dict[str, Packs] = {}
        self.sampler: PositionSampler | None = None
        self.predicted: set[int] = set()
        """Prompts of `predict` that an earlier run has answered."""
        self.position = (0, 0)
        """(epoch, optimizer steps done in it) where training begins."""
        self.steps_done = 0
        """Optimizer steps before that position, in all epochs."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one tokenizer, of the model."""
        return self.data.tokenizer

    @property
    def stop_ids(self) -> list[int]:
        """Stop tokens of template and data."""
        return self.data.stop_ids

    def prepare(self, stage: str) -> None:
        """Reads, renders and tokenizes what a stage needs (see `SFTData.prepare`)."""
        self.data.prepare(stage)

    # ------------------------------------------------------------------ batches

    def pack(self, name: str) -> Packs:
        """Which examples of a data set share a row."""
        lengths = self.data.caches[name].lengths
        if self.options.packing:
            return pack_examples(lengths, self.options.max_length)
        return one_per_pack(len(lengths))

    def setup(self, stage: str) -> None:
        """Fixes the order of examples for this number of ranks, and with it Lightning's
        accumulation.
        """
        self.prepare(stage)
        assert self.trainer is not None
        options = self.options
        world_size = self.trainer.world_size
        for name, cache in self.data.caches.items():
            packs = self.pack(name)
            is_train = name == "train"
            self.packs[name] = packs
            self.orders[name] = StepOrder(
                num_packs=len(packs),
                global_batch_size=(
                    options.global_batch_size if is_train else options.micro_batch_size * world_size
                ),
                micro_batch_size=options.micro_batch_size,
                world_size=world_size,
                seed=options.seed,
                shuffle=is_train,
                costs=packs.costs(cache.lengths) if is_train else None,
            )
        if stage == "fit":
            self._setup_fit()

    def _setup_fit(self) -> None:
        trainer = self.trainer
        assert trainer is not None
        order = self.orders["train"]
        if trainer.accumulate_grad_batches not in (1, order.accumulation):
            raise UserError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: leave it"
                " out, it follows from data.global_batch_size / (data.micro_batch_size x devices)"
            )
        trainer.accumulate_grad_batches = order.accumulation
        self._set_validations(trainer, order)
        if self.total_steps < 1:
            raise UserError(
                "this run has no optimizer step: check trainer.max_epochs, trainer.max_steps and "
                "trainer.limit_train_batches"
            )
        log.info(
            f"train: {self._fill()}; {order.steps_per_epoch:,} optimizer steps per epoch of"
            f" {order.global_batch_size} (micro-batch {order.micro_batch_size} x {order.world_size}"
            f" devices x accumulation {order.accumulation}); {self.total_steps:,} steps in all"
        )

    def _set_validations(self, trainer: L.Trainer, order: StepOrder) -> None:
        """Moves `trainer.val_check_interval` to the end of an optimizer step."""
        by_clock = lightning_internals.validates_by_clock(trainer)
        over_epochs = trainer.check_val_every_n_epoch is None
        order.check_validations(by_clock, over_epochs and not by_clock and trainer.max_epochs != 1)
        if by_clock:
            return
        trainer.val_check_interval = order.validation_interval(
            trainer.val_check_interval,
            order.limited_batches(trainer.limit_train_batches),
            each_epoch=not over_epochs,
        )

    def _fill(self) -> str:
        """How the training examples fill their rows, for the log."""
        packs = self.packs["train"]
        if not self.options.packing:
            return f"{len(packs):,} examples, without padding"
        fill = packs.num_tokens(self.data.caches["train"].lengths).mean() / self.options.max_length
        return f"{len(packs):,} packs of {self.options.max_length} tokens, filled to {fill:.1%}"

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, done and left.

        `trainer.estimated_stepping_batches` is wrong in a resumed run (Lightning #20550).
        """
        trainer = self.trainer
        assert trainer is not None
        order = self.orders["train"]
        per_epoch = -(-order.limited_batches(trainer.limit_train_batches) // order.accumulation)
        if trainer.max_epochs in (None, -1):
            return per_epoch * 1000 if trainer.max_steps == -1 else trainer.max_steps
        epoch, done = self.position
        left = max(0, per_epoch - done) + per_epoch * (trainer.max_epochs - epoch - 1)
        by_epochs = self.steps_done + left
        return by_epochs if trainer.max_steps == -1 else min(by_epochs, trainer.max_steps)

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank, from the stored position on."""
        return self._loader("train", self._begin_at_position())

    def _begin_at_position(self) -> PositionSampler:
        """Applies the position to the order of the examples and to Lightning's fit loop.

        Lightning asks for the loader right after it has restored its loops; there is no hook
        between the two.
        """
        assert self.trainer is not None
        epoch, steps = self.position
        if steps == 0:
            lightning_internals.begin_new_epoch(self.trainer)
        self.sampler = PositionSampler(self.orders["train"])
        self.sampler.start = self.position
        self.sampler.epoch = epoch
        return self.sampler

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Every validation example once over all ranks."""
        return self._in_order("validation") if "validation" in self.data.caches else []

    def test_dataloader(self) -> DataLoader:
        """Every test example once over all ranks."""
        return self._in_order("test")

    def _in_order(self, name: str) -> DataLoader:
        return self._loader(
            name, [(0, batch) for batch in range(self.orders[name].batches_per_epoch)]
        )

    def _loader(self, name: str, sampler: Any) -> DataLoader:
        assert self.trainer is not None
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        num_workers = self.options.num_workers
        if num_workers == "auto":
            num_workers = 0 if on_cpu else 2
        dataset = MicroBatches(
            self.data.caches[name], self.packs[name], self.orders[name], self.trainer.global_rank
        )
        return TimedLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            pin_memory=not on_cpu,
            num_workers=num_workers,
            worker_init_fn=signals.shield_worker,
        )

    # ------------------------------------------------------------------ prompts

    @cached_property
    def predict_prompts(self) -> list[Prompt]:
        """What `predict` answers, in the order of its file."""
        return self.data.asked_by_predict()

    def predict_dataloader(self) -> DataLoader:
        """This rank's share of the prompts that are not in `predicted`."""
        assert self.trainer is not None
        generation = self.trainer.lightning_module.generation
        batches = self.prompt_batches(self.predict_prompts, generation, done=self.predicted)  # type: ignore[arg-type]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def prompt_batches(
        self, prompts: Sequence[Prompt], options: GenerationOptions, done: Collection[int] = ()
    ) -> list[Prompts]:
        """This rank's batches of some prompts (see `make_batches`)."""
        assert self.trainer is not None
        return make_batches(
            prompts,
            options,
            pad_id=self.tokenizer.pad_token_id,  # type: ignore[arg-type]
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            done=done,
        )

    # ------------------------------------------------------------------ position

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands between two optimizer steps, whatever the number of ranks."""
        assert self.trainer is not None
        if "train" not in self.orders:
            return {}
        order = self.orders["train"]
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # With trainer.limit_train_batches an epoch ends before the order does.
        is_at_end = done >= self.trainer.num_training_batches
        assert done % order.accumulation == 0 or is_at_end, (
            "checkpoints are saved between optimizer steps only"
        )
        epoch = self.trainer.current_epoch
        position = [epoch, -(-done // order.accumulation)]
        # In the validation at the end of an epoch the epoch is not over yet: a resumed run
        # validates first.
        if is_at_end and not self.trainer.validating:
            position = [epoch + 1, 0]
        return {"position": position, "data": self.data.fingerprint(self.packs["train"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses data that does not fit the checkpoint. Its position is restored by
        `data_position.restore`.

        Raises:
            UserError: The data is not that of the checkpoint, or validates on rows that it may be
                trained on.
        """
        if "train" in self.orders:
            self.data.check_same(state["data"], self.packs["train"])
        elif "train" in self.data.rows:
            self.data.check_split(state["data"])


def data_of(trainer: L.Trainer) -> SFTDataModule:
    """Returns the data module of a trainer."""
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]
