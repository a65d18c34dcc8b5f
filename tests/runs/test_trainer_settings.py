"""Settings of Lightning's that users bring along: each does what it says, or is refused in one
line.
"""

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.trainer.connectors.logger_connector import result
from running import arguments, chat_rows, environment, run, scalars, version, write_rows
from safetensors.torch import load_file
from terminal import log_lines, refused
from tiny import save_tiny

from lit_sft import trainer as trainer_module
from lit_sft.checkpoint.files import KeepPolicy, keep
from lit_sft.checkpoint.find import find_last
from lit_sft.checkpoint.io import read_checkpoint
from lit_sft.cli import main as main_module
from lit_sft.cli import terminal_log
from lit_sft.errors import UserError
from lit_sft.run import slurm


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    return save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(32))


def settings(place, root, **options):
    return arguments(
        *place, root, **{"data__packing": False, "data__global_batch_size": 8, **options}
    )


@pytest.mark.parametrize(
    "logger",
    [
        False,
        {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "elsewhere"},
        },
    ],
    ids=str,
)
def test_loggers_do_not_move_the_run(place, tmp_path, monkeypatch, logger):
    """Checkpoints, settings and export lie in the run's folder, and a resume finds them."""
    monkeypatch.chdir(tmp_path)
    args = settings(place, tmp_path / "runs", trainer__logger=logger, trainer__max_steps=2)
    with log_lines() as lines:
        run("fit", args)
    folder = version(tmp_path / "runs")
    assert {"checkpoints", "config.yaml", "hf"} <= {path.name for path in folder.iterdir()}
    assert not any("was removed" in line for line in lines)
    with log_lines() as lines:
        run("fit", [*args, "--trainer.max_steps=4", "--ckpt_path=last"])
    assert any(line.startswith("resumed") and line.endswith("at step 2") for line in lines)
    assert (
        find_last(folder.parent).name == "step=000004.ckpt"
        and not (tmp_path / "runs" / "checkpoints").exists()
    )


def test_a_clipping_value_of_0_is_none(place, tmp_path):
    """As in Lightning; it would train nothing."""
    for name, value in (("zero", 0), ("none", None)):
        run("fit", settings(place, tmp_path / name, trainer__gradient_clip_val=value))
    assert scalars(tmp_path / "zero", "train/loss") == scalars(tmp_path / "none", "train/loss")


class AskToStop(Callback):
    """Within an optimizer step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 9:
            trainer.should_stop = True


def test_a_stop_that_is_asked_for_within_a_step_comes_at_its_end(place, tmp_path, monkeypatch):
    make = trainer_module.run_callbacks
    monkeypatch.setattr(main_module, "run_callbacks", lambda *args: [*make(*args), AskToStop()])
    run("fit", settings(place, tmp_path / "runs"))
    folder = version(tmp_path / "runs")
    assert find_last(folder.parent).name == "step=000002.ckpt" and (folder / "hf").is_dir()
    assert len(scalars(tmp_path / "runs", "train/loss")) == 2


def stops(args):
    """What a run says of its early end."""
    with log_lines() as lines:
        run("fit", args)
    return [line for line in lines if line.startswith("stopped")]


def test_max_time_ends_a_run_in_order(place, tmp_path, monkeypatch):
    """Also one that is resumed, which has nothing left of it."""
    args = settings(place, tmp_path / "runs", trainer__max_time="00:00:00:01")
    with monkeypatch.context() as patch:
        looks = itertools.count()  # it is over after a few, within the first step
        patch.setattr(
            Timer, "time_elapsed", lambda self, stage="train": 0.0 if next(looks) < 6 else 1e9
        )
        assert stops(args) == [
            "stopped at step 1 of 4: trainer.max_time is over (it counts earlier starts, too)"
        ]
    assert find_last(version(tmp_path / "runs").parent).name == "step=000001.ckpt"
    args.append("--ckpt_path=last")
    assert stops(args) == [
        "stopped at step 1 of 4: trainer.max_time is over (it counts earlier starts, too)"
    ]
    assert (
        stops([*args, "--trainer.max_time=00:00:00:01", "--trainer.max_steps=1"]) == []
    )  # it is done
    assert stops([*args, "--trainer.max_time=99999:00:00:00"]) == []  # more than the seconds above


def test_early_stopping_says_so(place, tmp_path, monkeypatch):
    """A resumed run ends for the same reason, until there is more patience, and then for reasons of
    its own.
    """
    options = {
        "data__val_size": 4,
        "trainer__max_epochs": 5,
        "model__optimizer": "torch.optim.AdamW",
    }
    options |= {
        "model__optimizer__lr": 0.0,
        "early_stopping": {"monitor": "val/loss", "patience": 2},
    }
    args = settings(place, tmp_path / "runs", **options)
    assert stops(args) == ["stopped at step 12 of 20: val/loss did not improve for 2 validations"]
    args.append("--ckpt_path=last")
    assert stops(args) == ["stopped at step 12 of 20: val/loss did not improve for 2 validations"]
    args.append("--early_stopping.patience=9")
    assert stops([*args, "--trainer.max_epochs=6"]) == []
    make = trainer_module.run_callbacks
    monkeypatch.setattr(main_module, "run_callbacks", lambda *args: [*make(*args), AskToStop()])
    args += ["--trainer.limit_val_batches=0", "--trainer.max_epochs=8"]
    assert stops(args) == ["stopped at step 26 of 32: a callback asked for it"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed_everything": True}, "seed_everything must be a number"),
        ({"seed_everything": -1}, "seed_everything is -1, it must be from 0 to 4294967295"),
        ({"trainer__overfit_batches": 2}, "trainer.overfit_batches must be 0"),
    ],
    ids=str,
)
def test_what_cannot_be(place, tmp_path, capsys, options, words):
    assert words in refused(
        capsys, "fit", settings(place, tmp_path / "runs", data__val_size=4, **options)
    )


BY_CLOCK = {"trainer__val_check_interval": "00:00:00:00", "trainer__check_val_every_n_epoch": None}
INTERRUPTED = """
import os, signal, sys
from lightning.pytorch.callbacks import Callback
from lit_sft import signals
from lit_sft.cli import main as cli
class Interrupt(Callback):
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.fit_loop._should_accumulate():
            os.kill(os.getpid(), signal.SIGTERM)
make = cli.run_callbacks
cli.run_callbacks = lambda *args: [Interrupt(), *make(*args)]
signals.install()
cli.main(sys.argv[1:])
"""


def test_a_signal_in_a_validation_within_a_step(place, tmp_path):
    """The step ends, is saved, and the run leaves."""
    args = ["fit", *settings(place, tmp_path / "runs", data__val_size=4, **BY_CLOCK)]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *args],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    assert "stopped by SIGTERM after step 1, which is saved" in done.stderr
    assert find_last(version(tmp_path / "runs").parent).name == "step=000001.ckpt"


def test_an_evaluation_beside_a_training_writes_elsewhere(place, tmp_path):
    """It would change columns under the run's hands."""
    root = tmp_path / "runs"
    run("fit", settings(place, root, data__test=place[1], trainer__max_steps=1))
    before = (version(root) / "metrics.csv").read_text()
    with (version(root) / ".lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another open file: as by another process
        run("test", [f"--ckpt_path={version(root)}", f"--trainer.default_root_dir={root}"])
    assert (version(root) / "metrics.csv").read_text() == before
    assert len(scalars(root, "test/loss", 1)) == 1
    run("test", [f"--ckpt_path={version(root)}", f"--trainer.default_root_dir={root}"])
    assert len(scalars(root, "test/loss")) == 1


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_of_a_run_that_cannot_be_written_writes_elsewhere(
    command, place, tmp_path, monkeypatch
):
    """Another user's, say."""
    rows = {"data__validation": place[1], "data__test": place[1], "data__predict": ["x"]}
    run("fit", settings(place, tmp_path / "theirs", trainer__max_steps=1, **rows))
    folder, access = version(tmp_path / "theirs"), os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != folder and access(path, mode)
    )
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with log_lines() as lines:
        run(command, [f"--ckpt_path={folder}", f"--trainer.default_root_dir={tmp_path / 'ours'}"])
    assert (
        f"{folder}: it cannot be written; this run writes into {version(tmp_path / 'ours')}"
        in lines
    )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    written = "predictions.jsonl" if command == "predict" else "metrics.csv"
    assert (version(tmp_path / "ours") / written).is_file() and not version(
        tmp_path / "theirs", 1
    ).exists()


def test_the_logs_of_a_run_that_was_moved_lie_with_it(place, tmp_path):
    """`trainer.default_root_dir` in its settings is that of before, where another run may have its
    number now.
    """
    run(
        "fit", settings(place, tmp_path / "before", trainer__max_steps=1, data__validation=place[1])
    )
    shutil.copytree(tmp_path / "before", tmp_path / "now", symlinks=True)
    others = (version(tmp_path / "before") / "metrics.csv").read_bytes()
    run("validate", [f"--ckpt_path={version(tmp_path / 'now')}"])
    # That of the last step of `fit`, and that of `validate`.
    assert len(scalars(tmp_path / "now", "val/loss")) == 2
    args = settings(place, tmp_path / "before", trainer__max_steps=2, data__validation=place[1])
    run("fit", [*args, f"--ckpt_path={version(tmp_path / 'now')}"])
    assert len(scalars(tmp_path / "now", "train/loss")) == 2
    assert (version(tmp_path / "before") / "metrics.csv").read_bytes() == others


def test_bad_rows_are_skipped_in_what_is_answered_too(place, tmp_path):
    bad = {"messages": [{"role": "nobody", "content": "x"}]}
    rows = write_rows(tmp_path / "rows.jsonl", [*chat_rows(3), bad, *chat_rows(3, seed=1)])
    more = {
        "data__validation": rows,
        "data__on_bad_row": "skip",
        "model__evaluation": {"metrics": ["token_f1"]},
    }
    run("fit", settings(place, tmp_path / "runs", **more))
    lines = (version(tmp_path / "runs") / "evaluation.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["step"] == 0 for line in lines) == 6


def test_a_checkpoint_that_vanishes_is_passed_over(tmp_path, monkeypatch):
    """Runs share `lightning_logs`, and drop their own at any time."""
    from lit_sft.checkpoint import files

    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "step=000002.ckpt"
    torch.save({}, path)
    gone = tmp_path / "version_1" / "checkpoints" / "step=000009.ckpt"
    monkeypatch.setattr(files, "own_checkpoints", lambda run: [gone, path])
    keep(path, KeepPolicy(False, keep_last=1))
    assert find_last(tmp_path) == path


def test_files_of_the_users_own_callbacks_are_kept(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("step=3.ckpt", "step=000001.ckpt", "step=000002.ckpt"):
        torch.save({}, folder / name)
    keep(folder / "step=000002.ckpt", KeepPolicy(False, keep_last=1))
    assert {path.name for path in folder.iterdir()} == {
        "step=3.ckpt",
        "step=000002.ckpt",
        "last.ckpt",
    }


@pytest.fixture
def restarted_job(monkeypatch):
    monkeypatch.setattr(slurm, "job_id", lambda: "7")
    monkeypatch.setattr(slurm, "num_restarts", lambda: 1)


def test_each_srun_of_a_job_has_its_own_run(tmp_path, monkeypatch, restarted_job):
    for number, step in enumerate(("0", "1")):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        folder = tmp_path / f"version_{number}"
        folder.mkdir()
        slurm.remember(folder)
    assert slurm.own_run(tmp_path) == "version_1"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert slurm.own_run(tmp_path) == "version_0"
    for copy in ("version_7", "version_0_backup"):
        shutil.copytree(tmp_path / "version_0", tmp_path / copy)
    assert slurm.own_run(tmp_path) == "version_0"


def test_each_command_of_a_job_without_srun_has_its_own_run(tmp_path, monkeypatch, restarted_job):
    commands = [["lit_sft", "fit", "--a=1"], ["lit_sft", "fit", "--a=2"]]
    for number, command in enumerate(commands):
        monkeypatch.setattr(sys, "argv", command)
        folder = tmp_path / f"version_{number}"
        folder.mkdir()
        slurm.remember(folder)
    assert slurm.own_run(tmp_path) == "version_1"
    monkeypatch.setattr(sys, "argv", [*commands[0], "--ckpt_path", "last"])
    assert slurm.own_run(tmp_path) == "version_0"


def test_other_tokens_by_no_setting_are_refused(place, tmp_path):
    from lit_sft.datamodule import SFTDataModule

    module = SFTDataModule(
        model_name_or_path=place[0],
        train=place[1],
        max_length=128,
        cache_dir=str(tmp_path / "cache"),
    )
    module.prepare("fit")
    packs = module.pack("train")
    saved = module.data.fingerprint(packs)
    module.data.check_same(saved, packs)
    with pytest.raises(UserError, match="the tokens themselves, by no setting"):
        module.data.check_same({**saved, "examples": "others"}, packs)


def test_a_rate_that_the_checkpoint_overrides_is_said(place, tmp_path):
    run("fit", settings(place, tmp_path / "runs", trainer__max_steps=1))
    more = {
        "trainer__max_steps": 2,
        "model__optimizer__lr": 0.5,
        "model__lr_schedule__type": "constant",
    }
    with log_lines() as lines:
        run("fit", [*settings(place, tmp_path / "runs", **more), "--ckpt_path=last"])
    assert sum("goes on as in the checkpoint: lr 8e-05, not 0.5" in line for line in lines) == 1


def test_another_optimizer_does_not_go_on(place, tmp_path, capsys):
    root = tmp_path / "runs"
    run("fit", settings(place, root, trainer__max_steps=1))
    args = [*settings(place, root, trainer__max_steps=2), "--ckpt_path=last"]
    line = refused(capsys, "fit", [*args, "--model.optimizer=torch.optim.SGD"])
    assert line.startswith(
        "model.optimizer is SGD of torch, and the checkpoint holds the state of AdamW of torch: set"
    )
    run(
        "validate",
        ["--ckpt_path=last", f"--data.validation={place[1]}", f"--trainer.default_root_dir={root}"],
    )
    path = find_last(version(root).parent)
    old = {key: value for key, value in read_checkpoint(path).items() if key != "optimizer"}
    torch.save(old, path.with_suffix(".tmp"))  # not over it: its tensors are read from there
    path.with_suffix(".tmp").replace(path)
    run("fit", args)  # an old checkpoint does not say
    assert find_last(path.parent.parent.parent).name == "step=000002.ckpt"


def test_a_list_of_files(place, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", chat_rows(8, seed=3))
    run(
        "fit",
        settings(
            (place[0], None), tmp_path / "runs", data__train=[place[1], other], trainer__max_steps=5
        ),
    )
    assert len(scalars(tmp_path / "runs", "train/loss")) == 5  # 40 rows


def test_a_home_directory_for_the_runs(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = settings(
        place, Path("~/runs"), trainer__max_steps=1, data__cache_dir=str(tmp_path / "cache")
    )
    run("fit", args)
    with log_lines() as lines:
        run("fit", [*args, "--trainer.max_steps=2", "--ckpt_path=last"])
    assert (tmp_path / "runs" / "lightning_logs" / "version_0" / "metrics.csv").is_file()
    assert any(line.startswith("resumed") for line in lines)


def test_a_run_stands_for_its_newest_checkpoint(place, tmp_path, capsys):
    run("fit", settings(place, tmp_path / "runs", trainer__max_steps=1))
    folder = version(tmp_path / "runs")
    run("export", [f"--ckpt_path={folder}", f"--output_dir={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    assert "this run has no intact checkpoint" in refused(
        capsys, "export", [f"--ckpt_path={folder}", "--output_dir=x"]
    )


def test_others_may_read_a_shared_cache(place, tmp_path):
    before = os.umask(0o022)
    try:
        run(
            "fit",
            settings(
                place,
                tmp_path / "runs",
                trainer__max_steps=1,
                data__cache_dir=str(tmp_path / "shared"),
            ),
        )
    finally:
        os.umask(before)
    folders = [path for path in (tmp_path / "shared").rglob("*") if path.is_dir()]
    assert folders and all(path.stat().st_mode & 0o055 == 0o055 for path in folders)


def test_an_empty_history_is_none():
    from lit_sft.data.formats.parse import to_conversation

    row = {"instruction": "a", "input": "", "output": "b", "history": None}
    assert len(to_conversation(row, format="alpaca").messages) == 2


def test_a_dry_run_lies_where_others_do(place, tmp_path):
    run("fit", settings(place, tmp_path / "runs", trainer__fast_dev_run=True))
    (found,) = (tmp_path / "runs").rglob("last.ckpt")
    assert read_checkpoint(found)["global_step"] == 1 and not (tmp_path / "None").exists()


def own_checkpoints(folder, **options):
    return [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(folder), **options},
        }
    ]


def test_checkpoints_of_the_users_own_callback_come_between_steps(place, tmp_path):
    """Resumed at step 4, a multiple of 2, it would save once more after the first micro-batch of
    step 5.
    """
    own = own_checkpoints(tmp_path / "own", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    args = settings(place, tmp_path / "runs", trainer__callbacks=own)
    run("fit", args)
    run("fit", [*args, "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert {path.name for path in (tmp_path / "own").iterdir()} == {
        f"step={n}.ckpt" for n in (2, 4, 6, 8)
    }


def test_fp16_weights_are_not_trained_by_an_eps_of_0(place, tmp_path, capsys):
    args = settings(place, tmp_path / "runs", trainer__precision="16-true", trainer__max_steps=2)
    line = refused(capsys, "fit", args)
    assert (
        line.startswith("model.optimizer's eps 1e-08 is 0")
        and "set trainer.precision to 16-mixed" in line
    )
    larger = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.eps=1e-4"]
    for name, more in {"lora": ["--model.lora.r=2"], "eps": larger}.items():
        run("fit", [*args, f"--trainer.default_root_dir={tmp_path / name}", *more])
        assert len(scalars(tmp_path / name, "train/loss")) == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EMAWeightAveraging", {}),
        ("WeightAveraging", {}),
        ("StochasticWeightAveraging", {"swa_lrs": 0.01}),
    ],
)
def test_averages_of_weights_are_refused(name, options, place, tmp_path, capsys):
    own = [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": options}]
    for command in ("fit", "doctor"):
        line = refused(capsys, command, settings(place, tmp_path / "runs", trainer__callbacks=own))
        assert line.startswith(f"trainer.callbacks: {name} is not supported")


def test_doctor_leaves_out_callbacks_that_save(place, tmp_path, capsys):
    """Those that need a logger get one, which writes nothing."""
    own = own_checkpoints(tmp_path / "own", every_n_train_steps=1)
    monitors = ("LearningRateMonitor", "DeviceStatsMonitor")
    own += [{"class_path": f"lightning.pytorch.callbacks.{name}"} for name in monitors]
    with pytest.raises(SystemExit) as caught:
        run("doctor", settings(place, tmp_path / "runs", trainer__callbacks=own))
    assert (
        caught.value.code == 0
        and not (tmp_path / "own").exists()
        and not (tmp_path / "runs").exists()
    )


def test_apples_gpu(place, tmp_path, capsys, monkeypatch):
    """It has no float64."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for chosen in ("gpu", "mps"):
        args = settings(place, tmp_path / "runs", trainer__accelerator=chosen)
        assert f"trainer.accelerator {chosen}: Apple's GPU" in refused(capsys, "fit", args)
    with log_lines() as lines:
        run(
            "fit",
            settings(place, tmp_path / "runs", trainer__accelerator="auto", trainer__max_steps=1),
        )
    assert sum("the CPU is taken" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("own", "options", "words"),
    [
        ({"train_time_interval": "00:00:00:01"}, {}, "checkpoint.every_n_minutes in its place"),
        (
            {},
            {"data__val_size": 4, **BY_CLOCK},
            "its save_on_train_epoch_end to true",
        ),
    ],
    ids=["time", "validation"],
)
def test_checkpoints_within_a_step_are_refused(place, tmp_path, capsys, own, options, words):
    args = settings(
        place,
        tmp_path / "runs",
        trainer__callbacks=own_checkpoints(tmp_path / "own", **own),
        **options,
    )
    assert words in refused(capsys, "fit", args)


def test_the_best_checkpoint_by_name(place, tmp_path, capsys, monkeypatch):
    root = tmp_path / "runs"
    args = settings(place, root, data__val_size=4, trainer__max_epochs=2)
    run("fit", args)
    best = version(root) / "checkpoints" / "best.ckpt"
    best.unlink()
    best.symlink_to("step=000004.ckpt")  # the last is 8
    here = f"--trainer.default_root_dir={root}"
    run("export", ["--ckpt_path=best", here, f"--output_dir={tmp_path / 'out'}"])
    saved, exported = (
        read_checkpoint(best)["state_dict"],
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert all(torch.equal(saved[f"model.lm.{name}"], tensor) for name, tensor in exported.items())
    assert "there is no such checkpoint" in refused(capsys, "fit", [*args, "--ckpt_path=best"])
    best.unlink()
    assert "holds no intact best.ckpt" in refused(capsys, "validate", ["--ckpt_path=best", here])
    monkeypatch.chdir(tmp_path)  # where no run lies
    assert "--ckpt_path best: there is no intact checkpoint" in refused(
        capsys, "validate", ["--ckpt_path=best"]
    )


@pytest.mark.skipif(find_spec("wandb") is not None, reason="is installed")
def test_a_logger_whose_package_is_not_there(place, tmp_path, capsys):
    args = settings(place, tmp_path / "runs", trainer__logger="WandbLogger")
    words = (
        "trainer.logger (command line): WandbLogger needs wandb: `pip install wandb`, or choose"
        " another class"
    )
    assert refused(capsys, "fit", args) == words


def test_advice_on_ranks_is_not_shown(monkeypatch):
    """Lightning gives it for what all ranks log alike."""
    monkeypatch.setattr(result, "_distributed_is_initialized", lambda: True)
    monkeypatch.setattr(result, "warning_cache", result.WarningCache())
    with warnings.catch_warnings(record=True) as caught:
        terminal_log.set_up()
        logged = result._ResultCollection(training=False)
        logged.log(
            "on_validation_epoch_end", "val/loss", torch.tensor(1.0), on_step=False, on_epoch=True
        )
        logged.metrics(on_step=False)
        assert "val/loss" in logged.metrics(on_step=False)["callback"] and not caught
