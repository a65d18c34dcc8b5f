"""SFTDataModule: composes the data stages, and owns the order of the examples.

`data_pipeline` makes the examples, without Lightning. Here they are packed (`packing`), the packs
are assigned to optimizer steps and ranks (`sampler`), and those of a forward pass become a batch
(`collate`). The position of a run in its data is (epoch, optimizer steps done in it).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch.utils.data import DataLoader, Dataset

from lit_sft import intervals, lightning_internals, signals
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
from lit_sft.training import optim
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
    """The forward passes of one rank, indexed by (epoch, forward pass).

    A batch depends on its index only, so a resumed run needs no state of the loader.

    Args:
        cache: The tokenized examples.
        packs: Which examples share a row.
        order: Which packs are in which forward pass.
        rank: The rank.
    """

    def __init__(self, cache: ExampleCache, packs: Packs, order: StepOrder, rank: int) -> None:
        self.cache = cache
        self.packs = packs
        self.order = order
        self.rank = rank

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        epoch, batch = position
        packs = self._packs_of_epoch(epoch) if self.order.shuffle else self.packs
        examples = []
        for pack in self.order.packs(epoch, batch, self.rank):
            for index in packs[pack]:
                examples.append(self.cache[int(index)])
        return collate(examples)

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as the loader
    def _packs_of_epoch(self, epoch: int) -> Packs:
        return reshuffle(self.packs, self.order.seed, epoch)


class SFTDataModule(L.LightningDataModule):
    """Reads conversations and serves batches of tokens.

    Args:
        train: Training data: `builtin:NAME`, a hub id, file, glob or directory, or a list of {path,
            name, split, weight} that is mixed.
        validation: Validation data, like `train`. null validates on `val_size`, or not at all.
        val_size: Split validation rows off `train`, chosen by seed: a share (0.1) or a number
            (200). null splits none off.
        test: Data of the command `test`, like `train`. null has none.
        predict: Data of the command `predict`, like `train`, or a list of questions. null takes
            `questions`.
        questions: Questions that are answered before training, at each validation, and at the end.
        format: Format of the rows. `auto` recognizes it by the columns.
        chat_template: Chat template: a .jinja file, inline jinja, or `raw` for no template. null
            takes that of the tokenizer.
        chat_template_kwargs: Variables that are passed to the template, in training and for
            prompts.
        system_prompt: System message for conversations that have none. null adds none.
        column_mapping: Renames columns: {question: prompt, answer: completion}. null renames none.
        prompt_template: Text of the prompt, with {fields} that are filled from the row. null takes
            the columns as they are.
        on_bad_row: Stop at a row that cannot be read, or skip and count it.
        unproved: Stop at a row whose loss mask cannot be proved, or take the `lenient` mask and
            count it.
        train_on: Which tokens are targets: all assistant turns, the last one, or the whole text.
        max_length: Maximum number of tokens of an example. With packing, rows are filled up to it.
        overlong: What to do with an example that is longer than `max_length`.
        packing: Put several examples into a row, without attention between them.
        micro_batch_size: Rows per forward pass on each device.
        global_batch_size: Rows per optimizer step over all devices. Gradient accumulation follows
            from it.
        max_samples: Use only this number of rows, the first ones of each data set. null uses all.
        num_workers: Processes that build batches, and that tokenize. `auto` builds with none on a
            CPU and 2 on a GPU, and tokenizes with one per core.
        cache_dir: Directory of the tokenized data. null takes `lit_sft` in the user's cache
            directory.
        cache_max_gb: Size of `cache_dir`. What was not used for the longest time is removed, but
            nothing that was used in the last day. null removes nothing.
        model_name_or_path: Linked from model.model_name_or_path: the model whose tokenizer is used.
        revision: Linked from model.revision.
        trust_remote_code: Linked from model.trust_remote_code.
        add_tokens: Linked from model.add_tokens.
        adapter_name_or_path: Linked from model.adapter_name_or_path: its tokenizer is used if it
            has one.
        seed: Linked from seed_everything: seed of the order and of the validation split.
        allow_other_data: Linked from resume.allow_other_data: resume although data or template have
            changed.
    """

    def __init__(  # noqa: PLR0913 - the schema of `data`
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
        cache_max_gb: float | None = 100.0,
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
            cache_max_gb=cache_max_gb,
            model_name_or_path=model_name_or_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            add_tokens=add_tokens,
            adapter_name_or_path=adapter_name_or_path,
            seed=seed,
            allow_other_data=allow_other_data,
        )
        self.data = SFTData(self.options)
        """Tokenizer, template, rows and cached examples."""
        self.packs: dict[str, Packs] = {}
        """By data set: `train`, `validation`, `test`."""
        self.orders: dict[str, StepOrder] = {}
        """By data set."""
        self.sampler: PositionSampler | None = None
        """Of the training set. None before its loader is made."""
        self.predicted: set[int] = set()
        """Prompts of `predict` that an earlier run has answered."""
        self.position = (0, 0)
        """(epoch, optimizer steps done in it) where training begins."""
        self.steps_done = 0
        """Optimizer steps before `position`, in all epochs."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self.data.tokenizer

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the stop tokens of the template and of the data."""
        return self.data.stop_ids

    @property
    def turn_end_ids(self) -> list[int]:
        """Ids of the tokens that end trained turns and plain answers."""
        return self.data.turn_end_ids

    def prepare(self, stage: str) -> None:
        """Reads, renders and tokenizes the data of a stage (see `SFTData.prepare`)."""
        self.data.prepare(stage)

    # ------------------------------------------------------------------ batches

    def pack(self, name: str) -> Packs:
        """Decides which examples of a data set share a row."""
        lengths = self.data.caches[name].lengths
        if self.options.packing:
            return pack_examples(lengths, self.options.max_length)
        return one_per_pack(len(lengths))

    def setup(self, stage: str) -> None:
        """Packs the examples and fixes their order, for the number of ranks of this run."""
        self.prepare(stage)
        for name in self.data.caches:
            self.packs[name] = self.pack(name)
            self.orders[name] = self._order(name)
        if stage == "fit":
            self._setup_fit()

    def _order(self, name: str) -> StepOrder:
        """The order of a data set: shuffled and dealt by cost for training, as it is for others."""
        assert self.trainer is not None
        options = self.options
        packs = self.packs[name]
        world_size = self.trainer.world_size
        if name == "train":
            global_batch_size = options.global_batch_size
            costs = packs.costs(self.data.caches[name].lengths)
        else:
            # One micro-batch per rank and step, so nothing is accumulated.
            global_batch_size = options.micro_batch_size * world_size
            costs = None
        return StepOrder(
            num_packs=len(packs),
            global_batch_size=global_batch_size,
            micro_batch_size=options.micro_batch_size,
            world_size=world_size,
            seed=options.seed,
            shuffle=name == "train",
            costs=costs,
        )

    def _setup_fit(self) -> None:
        """Sets what follows from the order in the trainer: accumulation and validation interval."""
        trainer = self.trainer
        assert trainer is not None
        order = self.orders["train"]
        if trainer.accumulate_grad_batches not in (1, order.accumulation):
            raise UserError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: leave it"
                " out, it follows from data.global_batch_size / (data.micro_batch_size x devices)"
            )
        trainer.accumulate_grad_batches = order.accumulation
        self._set_validation_interval(trainer, order)
        total_steps = self.total_steps
        if total_steps is None:
            ends = any(isinstance(each, Timer | EarlyStopping) for each in trainer.callbacks)  # type: ignore[attr-defined]
            optim.check_open_end(trainer.lightning_module.options.lr_schedule, ends)  # type: ignore[union-attr, arg-type]
        elif total_steps < 1:
            raise UserError(
                "this run has no optimizer step: check trainer.max_epochs, trainer.max_steps and "
                "trainer.limit_train_batches"
            )
        elif total_steps < trainer.max_steps:
            log.warning(
                "trainer.max_steps %s is not reached: trainer.max_epochs %s ends the run after %s"
                " steps",
                *(f"{trainer.max_steps:,}", trainer.max_epochs, f"{total_steps:,}"),
            )
        in_all = "no number of steps ends the run"
        if total_steps is not None:
            in_all = f"{total_steps:,} steps in all"
        log.info(
            f"train: {self._fill()}; {order.steps_per_epoch:,} optimizer steps per epoch of"
            f" {order.global_batch_size} (micro-batch {order.micro_batch_size} x {order.world_size}"
            f" devices x accumulation {order.accumulation}); {in_all}"
        )

    def _set_validation_interval(self, trainer: L.Trainer, order: StepOrder) -> None:
        """Rounds `trainer.val_check_interval` to whole optimizer steps."""
        by_clock = lightning_internals.validates_by_clock(trainer)
        over_epochs = trainer.check_val_every_n_epoch is None
        counts_over_epochs = over_epochs and not by_clock and trainer.max_epochs != 1
        intervals.check_validations(order, by_clock, counts_over_epochs)
        if by_clock:
            return
        trainer.val_check_interval = intervals.validation_interval(
            order,
            trainer.val_check_interval,
            intervals.limited_batches(order, trainer.limit_train_batches),
            each_epoch=not over_epochs,
        )

    def _fill(self) -> str:
        """Describes for the log how the training examples fill their rows."""
        packs = self.packs["train"]
        max_length = self.options.max_length
        if not self.options.packing:
            return f"{len(packs):,} examples, without padding"
        fill = packs.num_tokens(self.data.caches["train"].lengths).mean() / max_length
        return f"{len(packs):,} packs of {max_length} tokens, filled to {fill:.1%}"

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run: those done before a resume, and those left.

        None if neither `trainer.max_epochs` nor `trainer.max_steps` ends the run.

        Lightning's `trainer.estimated_stepping_batches` is wrong in a resumed run (Lightning
        #20550).
        """
        trainer = self.trainer
        assert trainer is not None
        order = self.orders["train"]
        batches = intervals.limited_batches(order, trainer.limit_train_batches)
        per_epoch = -(-batches // order.accumulation)
        has_max_steps = trainer.max_steps != -1
        if trainer.max_epochs in (None, -1):
            return trainer.max_steps if has_max_steps else None
        epoch, done = self.position
        left_in_epoch = max(0, per_epoch - done)
        epochs_left = trainer.max_epochs - epoch - 1
        total = self.steps_done + left_in_epoch + per_epoch * epochs_left
        return min(total, trainer.max_steps) if has_max_steps else total

    def train_dataloader(self) -> DataLoader:
        """Serves the micro-batches of this rank, from `position` on."""
        return self._loader("train", self._begin_at_position())

    def _begin_at_position(self) -> PositionSampler:
        """Makes the sampler begin at `position`, and Lightning's fit loop, too.

        Lightning asks for the loader right after it has restored its loops, without a hook between
        the two. So this is the place to correct them.
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
        """Serves every validation example once, over all ranks."""
        if "validation" not in self.data.caches:
            return []
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader:
        """Serves every test example once, over all ranks."""
        return self._in_order("test")

    def _in_order(self, name: str) -> DataLoader:
        batches = range(self.orders[name].batches_per_epoch)
        return self._loader(name, [(0, batch) for batch in batches])

    def _loader(self, name: str, sampler: Any) -> DataLoader:
        """Makes the loader of a data set.

        Args:
            name: Of the data set.
            sampler: Yields (epoch, forward pass), the indices of `MicroBatches`.
        """
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
        """The prompts of the command `predict`, in the order of their file."""
        return self.data.asked_by_predict()

    def predict_dataloader(self) -> DataLoader:
        """Serves this rank's share of the prompts that are not in `predicted`."""
        assert self.trainer is not None
        generation = self.trainer.lightning_module.generation
        batches = self.prompt_batches(self.predict_prompts, generation, done=self.predicted)  # type: ignore[arg-type]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def prompt_batches(
        self, prompts: Sequence[Prompt], options: GenerationOptions, done: Collection[int] = ()
    ) -> list[Prompts]:
        """Returns this rank's share of some prompts, in batches (see `make_batches`).

        Args:
            prompts: The prompts.
            options: Length and sampling of the answers; they bound the size of a batch.
            done: Positions of prompts to leave out.
        """
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
        """Returns the position of the run and the fingerprint of its data.

        It is called between two optimizer steps, and valid for any number of ranks.
        """
        assert self.trainer is not None
        if "train" not in self.orders:
            return {}
        order = self.orders["train"]
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # trainer.limit_train_batches may end an epoch before the order does.
        is_at_end = done >= self.trainer.num_training_batches
        assert done % order.accumulation == 0 or is_at_end, (
            "checkpoints are saved between optimizer steps only"
        )
        epoch = self.trainer.current_epoch
        position = [epoch, -(-done // order.accumulation)]
        # A checkpoint from the validation at the end of an epoch stays in its epoch, so that a
        # resumed run validates first.
        if is_at_end and not self.trainer.validating:
            position = [epoch + 1, 0]
        return {"position": position, "data": self.data.fingerprint(self.packs["train"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes at the position of the checkpoint; refuses data that does not fit it.

        Raises:
            UserError: The run would continue over other data, or evaluate on rows that the
                checkpoint may have been trained on.
        """
        if "train" in self.orders:
            self.data.check_same(state["data"], self.packs["train"])
            # With our Checkpointer, `data_position.restore` follows and fits it to other batches.
            epoch, steps = state["position"]
            self.position = (epoch, steps)
        elif "train" in self.data.rows:
            self.data.check_split(state["data"])


def data_of(trainer: L.Trainer) -> SFTDataModule:
    """Returns the data module of a trainer."""
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]
