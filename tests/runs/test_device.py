"""What only a GPU shows, seen without one: where things are built, what is waited for, how answers
are made.
"""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.logger_connector import result
from running import arguments, chat_rows, run, scalars, write_rows
from tiny import save_tiny, tiny_qwen3, tiny_tokenizer

from lit_sft import errors
from lit_sft.callbacks import fail_together
from lit_sft.callbacks.checkpointer import Checkpointer, CheckpointOptions
from lit_sft.generation import answer as answer_module
from lit_sft.model import generate
from lit_sft.model.attention import cpu_kernel, packed
from lit_sft.model.attention.packed import pack_kwargs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    model = save_tiny(folder / "model", tiny_qwen3(len(tiny_tokenizer())))
    return model, write_rows(folder / "train.jsonl", chat_rows(16))


def settings(place, root, **options):
    return arguments(
        *place, root, **{"data__packing": False, "data__global_batch_size": 4, **options}
    )


@pytest.mark.parametrize(
    "options", [{}, {"model__lora": {"r": 2}}, {"model__neftune_noise_alpha": 5}], ids=str
)
def test_the_model_is_built_on_the_cpu_whatever_the_default_device(
    options, place, tmp_path, monkeypatch
):
    """Lightning makes the GPU the default device around `configure_model`: random start values
    would be others.
    """

    @contextlib.contextmanager
    def elsewhere(self, empty_init=None):
        with torch.device("meta"):
            yield

    run("fit", settings(place, tmp_path / "plain", **options))
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", elsewhere)
    run("fit", settings(place, tmp_path / "run", **options))
    losses = [scalars(tmp_path / name, "train/loss") for name in ("plain", "run")]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


@pytest.mark.parametrize("own", [False, True])
def test_numbers_for_a_bar_are_not_read_at_every_batch(own, place, tmp_path, monkeypatch):
    """To read one, a GPU would be waited for; a bar of the user's own gets them as ever."""
    reads = []
    monkeypatch.setattr(
        result, "convert_tensors_to_scalars", lambda value: reads.append(value) or value.item()
    )
    more = {"trainer__callbacks": [{"class_path": f"{__name__}.{Quiet.__name__}"}]} if own else {}
    run("fit", settings(place, tmp_path / "run", trainer__enable_progress_bar=True, **more))
    assert bool(reads) == own


class Quiet(TQDMProgressBar):
    """A bar of the user's own."""


def test_answers_in_fit_are_made_as_in_predict(place, tmp_path, monkeypatch):
    """Under the precision of the trainer, not in the type in which weights are stored."""
    seen, plain = [], generate.generate
    monkeypatch.setattr(
        answer_module,
        "generate",
        lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or plain(*a, **k),
    )
    options = {"trainer__precision": "bf16-mixed", "data__questions": ["abc"]}
    run("fit", settings(place, tmp_path / "run", **options))
    run("predict", ["--ckpt_path=last", f"--trainer.default_root_dir={tmp_path / 'run'}"])
    assert seen == [True] * 3  # before, after, predict


def test_the_clock_is_looked_at_every_few_seconds(monkeypatch):
    """And a step is late as soon as it was looked at."""
    now, late = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpointer = Checkpointer(CheckpointOptions(every_n_minutes=30), SimpleNamespace())
    looks = 0
    for step in range(1, 4001):  # half a second each
        now[0] += 0.5
        before = checkpointer.looked
        if checkpointer._is_late(SimpleNamespace(global_step=step, world_size=1), 1800.0):
            late.append(step)
            checkpointer.saved_at = now[0]
        looks += checkpointer.looked != before
    assert 150 < looks < 250
    assert len(late) == 1 and 3600 < late[0] <= 3600 + 20


def test_sdpa_does_not_ask_cudnn():
    """Which makes a plan for every length that it has not seen, and answers have a new one at every
    token.
    """
    torch.backends.cuda.enable_cudnn_sdp(True)
    packed.choose("sdpa")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_lengths_are_not_read_from_the_device(monkeypatch):
    lm = tiny_qwen3()
    packed.register()
    lm.set_attn_implementation(packed.PACKED)
    monkeypatch.setattr(
        cpu_kernel, "supports", lambda *_: False
    )  # as on a GPU without the flash kernel
    bounds = pack_kwargs((3, 4), torch.device("cpu"))
    inputs = {
        "input_ids": torch.arange(7)[None],
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    }
    expected = lm(**inputs, **bounds).logits
    unreadable = {name: bounds[name].to("meta") for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    assert torch.equal(lm(**inputs, **{**bounds, **unreadable}).logits, expected)
    with pytest.raises(NotImplementedError, match="meta"):  # what would wait for a GPU
        lm(**inputs, **{**bounds, **unreadable, "cu_seq_lens_host": None})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "out of memory",
        ),
        (
            "NCCL error in: a.cpp:1\nncclInvalidUsage\nLast error:\nDuplicate GPU detected",
            "Duplicate GPU detected",
        ),
    ],
)
def test_errors_of_the_device(text, words):
    assert words in errors.in_one_line(RuntimeError(text))


def test_a_failure_before_the_ranks_met_is_told():
    assert fail_together._is_first(RuntimeError("no device"), rank=3)
