"""A run that ends before its first step leaves nothing, unless it wrote something worth keeping."""

import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from running import REPOSITORY, arguments, chat_rows, environment, run, version, write_rows
from terminal import refused
from tiny import save_tiny

from lit_sft import SFTDataModule, SFTModule, SFTTrainer
from lit_sft import trainer as trainer_module
from lit_sft.cli import main as main_module
from lit_sft.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failed")
    return save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(16))


@pytest.fixture
def settings(place, tmp_path):
    def get(**options):
        fast = {"data__packing": False, "data__global_batch_size": 4}
        return arguments(*place, tmp_path / "runs", **{**fast, **options})

    return get


class FailAt(Callback):
    """Raises an error when a hook is called at a step, perhaps after it has written a file."""

    def __init__(self, hook, step=0, file=None):
        self.step, self.file = step, file
        setattr(self, hook, self.fail)

    def fail(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step:
            if self.file:
                (version_of(trainer) / self.file).write_text("kept")
            raise UserError("failed")


def version_of(trainer):
    return next(each.folder for each in trainer.callbacks if hasattr(each, "save_config"))


@pytest.fixture
def fail_at(monkeypatch):
    def set_up(*args, **kwargs):
        make = trainer_module.run_callbacks
        monkeypatch.setattr(
            main_module, "run_callbacks", lambda *given: [*make(*given), FailAt(*args, **kwargs)]
        )

    return set_up


REFUSED = {
    "data": {"data__train": "gone.jsonl"},
    "monitor": {"checkpoint__monitor": "val/x", "data__val_size": 4},
    "no step": {"trainer__limit_train_batches": 0},
    "batch size": {"data__micro_batch_size": 3},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_a_refused_start_leaves_nothing(options, settings, tmp_path, capsys):
    refused(capsys, "fit", settings(**options))
    assert not (tmp_path / "runs").exists()


HOOKS = ("setup", "on_fit_start", "on_train_start", "on_train_batch_start")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_failure_before_the_first_step_leaves_nothing(hook, settings, fail_at, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    fail_at(hook)
    assert refused(capsys, "fit", settings()) == "failed"
    assert (tmp_path / "runs").is_dir() and not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_that_fails_leaves_nothing(
    command, settings, fail_at, place, tmp_path, capsys
):
    fail_at("setup")
    rows = {f"data__{'validation' if command == 'validate' else command}": place[1]}
    assert refused(capsys, command, settings(**rows)) == "failed"
    assert not (tmp_path / "runs").exists()


def test_what_somebody_else_wrote_is_kept(settings, fail_at, tmp_path, capsys):
    fail_at("on_train_start", file="mine.txt")
    refused(capsys, "fit", settings())
    folder = version(tmp_path / "runs")
    assert (folder / "mine.txt").read_text() == "kept" and (folder / "config.yaml").is_file()


def test_other_runs_are_kept(settings, fail_at, tmp_path, capsys):
    run("fit", settings(trainer__max_steps=1))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    logs = tmp_path / "runs" / "lightning_logs"
    before.pop(logs)
    fail_at("on_train_start")
    refused(capsys, "fit", settings(trainer__max_steps=1))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    after.pop(logs)
    assert after == before


def test_answers_before_training_are_kept(settings, fail_at, tmp_path, capsys):
    fail_at("on_train_batch_start")
    refused(capsys, "fit", settings(data__questions=["hi"]))
    assert list(version(tmp_path / "runs").glob("events.*"))


def test_a_step_is_kept(settings, fail_at, tmp_path, capsys):
    """Its settings may be worth a look, even if nothing was logged yet."""
    fail_at("on_train_batch_start", step=1)
    refused(capsys, "fit", settings(trainer__log_every_n_steps=50))
    assert (version(tmp_path / "runs") / "config.yaml").is_file()


@pytest.mark.slow
def test_two_ranks(settings, tmp_path):
    args = settings(trainer__devices=2, trainer__strategy="ddp", trainer__limit_train_batches=0)
    done = subprocess.run(
        [sys.executable, "-m", "lit_sft", "fit", *args],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
    )
    assert done.returncode == 1 and "no optimizer step" in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "runs").exists()


NO_CHECKPOINT = {"text": b"hello", "empty file": b"", "empty folder": None}


@pytest.mark.parametrize("content", NO_CHECKPOINT.values(), ids=NO_CHECKPOINT)
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export"])
def test_what_is_no_checkpoint(command, content, settings, tmp_path, capsys):
    """It is refused before anything is loaded."""
    path = tmp_path / "other"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    line = refused(capsys, command, [*settings(), f"--ckpt_path={path}"])
    assert line.startswith(f"--ckpt_path {path} is no checkpoint: give a path")
    assert not (tmp_path / "runs").exists()


def test_last_from_python(settings, place, tmp_path):
    """It resumes or is refused; Lightning alone would train anew, with a warning."""

    def fit(root, steps):
        trainer = SFTTrainer(
            accelerator="cpu",
            max_steps=steps,
            default_root_dir=root,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        module = SFTModule(place[0], generation={"max_new_tokens": 4}, evaluation=None, seed=1)
        data = SFTDataModule(
            train=place[1],
            model_name_or_path=place[0],
            packing=False,
            global_batch_size=4,
            max_length=128,
            cache_dir=str(tmp_path / "cache"),
            seed=1,
        )
        trainer.fit(module, data, ckpt_path="last")
        return trainer

    with pytest.raises(UserError, match="--ckpt_path last: there is no intact checkpoint"):
        fit(tmp_path / "nothing", 2)
    run("fit", settings(trainer__max_steps=1))
    trainer = fit(tmp_path / "runs", 2)
    assert trainer.global_step == 2
    saved = torch.load(version(tmp_path / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert trainer.fit_loop.epoch_loop.batch_progress.total.ready == 8
