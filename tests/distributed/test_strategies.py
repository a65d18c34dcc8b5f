"""Strategies: what `auto` is, what is refused, where weights are while they are loaded, when
gradients are reduced.
"""

import contextlib
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from ranks import run_ranks
from running import (
    REPOSITORY,
    arguments,
    chat_rows,
    environment,
    final_weights,
    run,
    scalars,
    version,
    write_rows,
)
from terminal import log_lines
from tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_qwen3
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from lit_sft.checkpoint.io import read_checkpoint
from lit_sft.distributed.fsdp2 import FSDP2Strategy, check
from lit_sft.errors import UserError
from lit_sft.model import parallel
from lit_sft.model.load import load_model
from lit_sft.model.lora.apply import apply_lora
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model_builder import build_model
from lit_sft.module import SFTModule


def options(path, **changes):
    """Arguments of `build_model`."""
    return SFTModule(str(path), **{"dtype": "float32", "seed": 3, **changes}).options


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    for name, model in (("llama", tiny_llama()), ("qwen3", tiny_qwen3()), ("gpt2", tiny_gpt2())):
        save_tiny(folder / name, model)
    save_adapter(folder / "qwen3", folder / "adapter")
    tiny_llama().config.save_pretrained(folder / "empty")
    write_rows(folder / "train.jsonl", chat_rows(37))
    return folder


def save_adapter(base, folder):
    """An adapter of the base that is not what a new one begins with; magnitudes and a module
    trained whole as well.
    """
    lm = load_model(
        str(base), init="pretrained", dtype=torch.float32, attn_implementation="sdpa", seed=0
    )
    model = apply_lora(lm, LoraConfig(r=2, use_dora=True, modules_to_save=["model.norm"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)


# ---------------------------------------------------------------------- which strategies there are


@pytest.mark.parametrize(("devices", "kind"), [(1, SingleDeviceStrategy), (2, DDPStrategy)])
def test_auto_is_one_device_or_ddp(devices, kind):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="auto",
        logger=False,
        enable_checkpointing=False,
    )
    assert type(trainer.strategy) is kind


def test_ddp_keeps_gradients_once():
    for chosen, expected in (({}, True), ({"gradient_as_bucket_view": False}, False)):
        strategy = DDPStrategy(**chosen)
        check(strategy)
        assert strategy._ddp_kwargs["gradient_as_bucket_view"] is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [
                '--trainer.strategy={"class_path":'
                ' "lightning.pytorch.strategies.ModelParallelStrategy"}'
            ],
            "exact loss average",
        ),
        (
            ["--trainer.strategy=fsdp2", "--model.optimizer=bitsandbytes.optim.AdamW8bit"],
            "AdamW8bit of bitsandbytes does not take sharded weights",
        ),
    ],
)
def test_refused_in_one_line(place, tmp_path, capsys, settings, message):
    args = arguments(str(place / "llama"), str(place / "train.jsonl"), tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        run("fit", [*args, *settings])
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert end.value.code == 1
    assert line.startswith("error: ") and message in line


def test_fsdp2_refuses_fp16():
    with pytest.raises(UserError, match="16-mixed to bf16-mixed"):
        FSDP2Strategy().setup(SimpleNamespace(precision="16-mixed"))


def test_fsdp1_is_refused():
    with pytest.raises(UserError, match="FSDPStrategy is not known to give the exact loss average"):
        check(FSDPStrategy())


# ---------------------------------------------------------------------- loading without the whole
# model on every rank

CASES = {
    "untied": ("llama", {}),
    "tied": ("qwen3", {}),
    "other names, buffers": ("gpt2", {}),
    "random": ("qwen3", {"init": "random"}),
    "stored in bf16": ("qwen3", {"dtype": "bfloat16"}),
    "adapters": ("qwen3", {"dtype": "bfloat16", "lora": LoraConfig(r=2)}),
    "adapters by SVD": ("llama", {"lora": LoraConfig(r=2, init_lora_weights="pissa")}),
    "adapters with magnitudes": ("llama", {"lora": LoraConfig(r=2, use_dora=True)}),
    "a head of its own": (
        "qwen3",
        {"lora": LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"])},
    ),
    "a part": ("llama", {"trainable": ["lm_head"]}),
    "new tokens": ("qwen3", {"add_tokens": ["<|tool|>"]}),
    "new tokens and adapters": ("qwen3", {"add_tokens": ["<|tool|>"], "lora": LoraConfig(r=2)}),
    "an existing adapter": ("qwen3", {"dtype": "bfloat16", "adapter_name_or_path": "adapter"}),
}


def check_loading(folder):
    """Every rank gets the values of rank 0, and holds none before."""
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for case, (name, changes) in CASES.items():
        if "adapter_name_or_path" in changes:
            changes = {
                **changes,
                "adapter_name_or_path": str(folder / changes["adapter_name_or_path"]),
            }
        settings = options(folder / name, **changes)
        alone, *_ = build_model(settings, "32-true")
        expected = {
            key: tensor.detach().clone() for key, tensor in parallel._tensors(alone).items()
        }
        model, *_ = build_model(settings, "32-true", sharded=True)
        assert all(
            tensor.is_meta == (dist.get_rank() > 0) for tensor in parallel._tensors(model).values()
        ), case
        parallel.apply_fsdp2(model, model.lm, mesh, torch.float32)
        found = parallel._tensors(model)
        assert list(found) == list(expected), case
        for key, tensor in found.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert whole.dtype == expected[key].dtype, (case, key)
            assert torch.equal(whole, expected[key]), (case, key)
            assert tensor.requires_grad == dict(parallel._tensors(alone))[key].requires_grad, (
                case,
                key,
            )
        tied = [
            lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
            for lm in (model.lm, alone.lm)
        ]
        assert tied[0] == tied[1], case
        inputs = {"input_ids": torch.arange(12)[None], "labels": torch.arange(1, 13)[None]}
        losses = [
            m(**inputs, position_ids=torch.arange(12)[None]).loss_sum.item() for m in (model, alone)
        ]
        if settings.dtype == "float32":  # else sharding computes in fp32 what alone is bf16
            assert losses[0] == pytest.approx(losses[1], rel=1e-6), case
        assert model.lm.generation_config.to_dict() == alone.lm.generation_config.to_dict(), case


def check_failure(folder):
    """Nobody waits for a rank 0 that has no weights."""
    with pytest.raises(UserError, match="no weights"):
        build_model(options(folder / "empty"), "32-true", sharded=True)


# ---------------------------------------------------------------------- adapters


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_fp32_adapters_over_a_bf16_base(place, tmp_path, strategy):
    ranks = {} if strategy == "auto" else {"trainer__devices": 2, "trainer__strategy": strategy}
    settings = {
        "model__lora__r": 2,
        "model__optimizer": "torch.optim.SGD",
        "model__optimizer__lr": 0.1,
    }
    root = tmp_path / strategy
    args = arguments(
        str(place / "qwen3"),
        str(place / "train.jsonl"),
        root,
        trainer__precision="bf16-mixed",
        **settings,
        **ranks,
    )
    output = run("fit", args, subprocesses=True)
    assert "in bfloat16" in output
    state = read_checkpoint(version(root) / "checkpoints" / "last.ckpt")["state_dict"]
    lora_b = [name for name in state if "lora_B" in name]
    assert len(lora_b) == 2 * 7  # layers, linear modules in each
    assert all(
        state[name].dtype == torch.float32 and state[name].abs().max() > 0 for name in lora_b
    )


# ---------------------------------------------------------------------- when gradients are reduced


def check_difference(folder):
    """What rank 0 could not fill is refused on every rank."""
    changes = {"trainable": ["lm_head"]} if dist.get_rank() else {"lora": LoraConfig(r=2)}
    with pytest.raises(UserError, match="built differently"):
        build_model(options(folder / "llama", **changes), "32-true", sharded=True)


def check_reductions(folder):
    """fsdp2 reduces gradients in each micro-batch, or once."""
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model, *_ = build_model(options(folder / "llama"), "32-true", sharded=True)
    parallel.apply_fsdp2(model, model.lm, mesh, torch.float32)
    inputs = {"input_ids": torch.arange(12)[None], "labels": torch.arange(1, 13)[None]}
    gradients = []
    for every, expected in ((True, 4), (False, 1)):
        strategy = FSDP2Strategy(sync_every_micro_batch=every)
        strategy._lightning_module = SimpleNamespace(model=model)
        with mock.patch.object(
            _fsdp_param_group, "foreach_reduce", wraps=_fsdp_param_group.foreach_reduce
        ) as reduce:
            for last in (False, False, False, True):
                with contextlib.nullcontext() if last else strategy.block_backward_sync():
                    model(**inputs, position_ids=torch.arange(12)[None]).loss_sum.backward()
        assert reduce.call_count == expected * 3  # two layers and the rest
        gradients.append([p.grad.full_tensor() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1])


def check_all(folder):
    check_loading(folder)
    check_failure(folder)
    check_difference(folder)
    check_reductions(folder)


def test_two_ranks(place):
    """In one pair of processes, which take longer to start than to check."""
    run_ranks(check_all, place)


def check_ddp(folder):
    entered = []
    no_sync = torch.nn.parallel.DistributedDataParallel.no_sync

    def counting(self):
        entered.append(1)
        return no_sync(self)

    torch.nn.parallel.DistributedDataParallel.no_sync = counting
    settings = {"data__packing": False, "data__global_batch_size": 16, "data__micro_batch_size": 4}
    args = arguments(str(folder / "llama"), str(folder / "train.jsonl"), folder / "ddp", **settings)
    run("fit", [*args, "--trainer.strategy=ddp"])
    assert len(entered) == (4 - 1) + (4 - 1) + (
        2 - 1
    )  # all micro-batches but the last of each step


def test_ddp_reduces_once_per_step(place):
    run_ranks(check_ddp, place, world_size=1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_answers_between_steps_change_no_step(strategy, tmp_path):
    """Under bf16-mixed, whose weights are cast for them: DDP once lost the hooks that reduce its
    gradients to that.
    """
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(24))
    spread = {
        "trainer__devices": 2,
        "trainer__strategy": strategy,
        "trainer__precision": "bf16-mixed",
    }
    plain_sgd = {
        "model__optimizer": "torch.optim.SGD",
        "model__optimizer__lr": 0.1,
        "trainer__gradient_clip_val": None,
    }
    asking = {
        "data__questions": ["abc"],
        "model__evaluation": {"num_samples": 2},
        "trainer__val_check_interval": 0.5,
    }
    runs = []
    for name, more in (("silent", {"model__evaluation": None}), ("asking", asking)):
        root = tmp_path / name
        options = {
            "data__val_size": 4,
            "data__packing": False,
            "data__global_batch_size": 4,
            **spread,
            **plain_sgd,
        }
        run("fit", arguments(model, rows, root, **{**options, **more}), subprocesses=True)
        runs.append(
            (scalars(root, "train/loss"), scalars(root, "train/grad_norm"), final_weights(root))
        )
    silent, asked = runs
    assert len(asked[0]) == 5 and asked[:2] == silent[:2]
    assert all(torch.equal(silent[2][name], weight) for name, weight in asked[2].items())


def test_ranks_that_train_alone_are_found(tmp_path):
    """As with the cast that once cut DDP off its gradients."""
    program = tmp_path / "program.py"
    program.write_text(ALONE)
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(24))
    spread = {
        "trainer__devices": 2,
        "trainer__strategy": "ddp",
        "data__packing": False,
        "data__global_batch_size": 4,
    }
    args = arguments(model, rows, tmp_path / "run", **spread)
    env = environment(PYTHONPATH=str(REPOSITORY))
    command = [sys.executable, program, "fit", *args]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1, done.stderr[-2000:]
    assert re.search(r"step 3: the gradient norms of the ranks differ by \d+\.\d%", said[0])


ALONE = """
import torch
from lit_sft import module
from lit_sft.cli import main as cli

start = module.SFTModule.on_train_batch_start

def on_train_batch_start(self, batch, batch_idx):
    start(self, batch, batch_idx)
    if self.trainer.global_step == 2:
        for parameter in self.parameters():
            stored = parameter.data
            parameter.data = stored.to(torch.bfloat16)
            parameter.data = stored

module.SFTModule.on_train_batch_start = on_train_batch_start
cli.main()
"""


def test_fsdp_is_fsdp2(tmp_path):
    """Also where Lightning would run its loops in inference mode, in which FSDP2 cannot gather:
    under NCCL.
    """
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(8))
    args = arguments(model, rows, tmp_path / "run", trainer__strategy="fsdp", data__test=rows)
    nccl = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_backend=lambda: "nccl"
    )
    with log_lines() as lines, mock.patch("lightning.pytorch.loops.utilities.dist", nccl):
        run("fit", args)
        ckpt = f"--ckpt_path={version(tmp_path / 'run') / 'checkpoints' / 'last.ckpt'}"
        for command in ("test", "predict"):
            run(command, [ckpt, '--data.questions=["abc"]'])
    assert any("FSDP2 is taken" in line for line in lines)
    assert (version(tmp_path / "run") / "predictions.jsonl").read_text().count("\n") == 1
    assert len(scalars(tmp_path / "run", "test/loss")) == 1
