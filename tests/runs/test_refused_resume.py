"""A resume that is refused was not there: settings, logs and checkpoints of the run are what they
were before it.
"""

import csv
import shutil
import subprocess
import sys

import pytest
import torch
from running import REPOSITORY, arguments, chat_rows, environment, run, scalars, version, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from terminal import log_lines, refused
from tiny import save_tiny, tiny_llama

from lit_sft.checkpoint.data_position import check_same
from lit_sft.checkpoint.files import step_of
from lit_sft.checkpoint.io import read_checkpoint
from lit_sft.datamodule import SFTDataModule
from lit_sft.errors import UserError
from lit_sft.run.loggers import MetricsFile

SIX_STEPS = {
    "data__packing": False,
    "data__global_batch_size": 4,
    "data__val_size": 4,
    "trainer__max_epochs": 2,
    "checkpoint__every_n_train_steps": 1,
    "checkpoint__keep_last": 9,
}
DDP = ("--trainer.devices=2", "--trainer.strategy=ddp")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, rows, and a run that has ended."""
    folder = tmp_path_factory.mktemp("refused")
    model, rows = save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(16))
    save_tiny(folder / "wide", tiny_llama(intermediate_size=96))
    run("fit", arguments(model, rows, folder / "runs", **SIX_STEPS))
    return folder


@pytest.fixture
def root(place, tmp_path):
    shutil.copytree(place / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def settings(place, root, step, model="model", **options):
    checkpoint = f"--ckpt_path={version(root) / 'checkpoints' / f'step={step:06d}.ckpt'}"
    return [
        *arguments(
            str(place / model), str(place / "train.jsonl"), root, **{**SIX_STEPS, **options}
        ),
        checkpoint,
    ]


def forget_after(root, step):
    """Removes later checkpoints, as if the run had been killed before it saved them."""
    for path in (version(root) / "checkpoints").glob("step=*.ckpt"):
        if step_of(path) > step:
            path.unlink()


def contents(root):
    """What every file below holds, but the lock."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


def curves(root):
    events = EventAccumulator(str(version(root)), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


REFUSED = {
    "data": (6, {"data__system_prompt": "Be brief."}, 'system_prompt (null, now "Be brief.")'),
    "model": (6, {"model": "wide"}, "the checkpoint does not fit the model"),
    "an older checkpoint": (
        2,
        {"data__system_prompt": "Be brief."},
        'system_prompt (null, now "Be brief.")',
    ),
}


@pytest.mark.parametrize(("step", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_nothing_is_changed(step, options, said, place, root, capsys):
    before, drawn = contents(root), curves(root)
    assert said in refused(
        capsys, "fit", settings(place, root, step, **{"trainer__max_epochs": 3, **options})
    )
    assert contents(root) == before and curves(root) == drawn
    assert len(drawn["train/loss"]) == 6


def test_averaged_weights_are_refused(place, root, capsys):
    """A checkpoint of Lightning's `WeightAveraging` holds the average in `state_dict`."""
    path = version(root) / "checkpoints" / "step=000006.ckpt"
    averaged = {**read_checkpoint(path), "averaging_state": {}}
    # Its tensors are mapped from the file.
    path.unlink()
    torch.save(averaged, path)
    before = contents(root)
    line = refused(capsys, "fit", settings(place, root, 6, trainer__max_epochs=3))
    assert line.startswith("the checkpoint holds averaged weights")
    assert contents(root) == before


def test_what_fails_before_the_first_batch_changes_nothing(place, root, capsys, monkeypatch):
    """The checkpoint is restored by then."""

    def fail(self):
        raise UserError("no loader")

    monkeypatch.setattr(SFTDataModule, "train_dataloader", fail)
    before, drawn = contents(root), curves(root)
    assert refused(capsys, "fit", settings(place, root, 2, trainer__max_steps=5)) == "no loader"
    assert contents(root) == before and curves(root) == drawn


def test_then_it_goes_on(place, root, capsys):
    """What it does again is dropped, and its settings are those of the folder."""
    forget_after(root, 2)
    refused(capsys, "fit", settings(place, root, 2, data__system_prompt="Be brief."))
    run("fit", settings(place, root, 2, trainer__max_steps=5))
    assert_five_steps(root)


def assert_five_steps(root, max_steps=5):
    assert f"max_steps: {max_steps}" in (version(root) / "config.yaml").read_text()
    drawn = curves(root)
    assert [step for step, _ in drawn["train/loss"]] == list(range(5)) and len(
        scalars(root, "train/loss")
    ) == 5
    assert [value for _, value in drawn["val/loss"]] == pytest.approx(scalars(root, "val/loss"))


def test_where_no_step_is_left(place, root):
    """Lightning calls no hook of training then; the settings stay those that the steps were made
    with.
    """
    forget_after(root, 5)
    run("fit", settings(place, root, 5, trainer__max_steps=5))
    assert_five_steps(root, max_steps=-1)


@pytest.mark.slow
def test_on_two_ranks(place, root):
    forget_after(root, 2)
    before, drawn = contents(root), curves(root)
    args = [*settings(place, root, 2, data__system_prompt="Be brief."), *DDP]
    command = [sys.executable, "-m", "lit_sft", "fit", *args]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env=environment()
    )
    assert done.returncode == 1 and "system_prompt" in done.stderr, done.stderr
    assert contents(root) == before and curves(root) == drawn
    run("fit", [*settings(place, root, 2, trainer__max_steps=5), *DDP], subprocesses=True)
    assert_five_steps(root)
    assert not version(root, 1).exists()


def pack(place, root, *more, **options):
    packed = {
        "data__packing": True,
        "data__global_batch_size": 2,
        "trainer__max_steps": 4,
        **options,
    }
    rows = str(place / "train.jsonl")
    return [
        *arguments(
            str(place / "model"), rows, root, **{**SIX_STEPS, "data__val_size": None, **packed}
        ),
        *more,
    ]


def test_another_length_of_packs(place, tmp_path, capsys):
    """No example changes, but which of them share a row: some would be trained twice and others
    never.
    """
    root, steps = tmp_path / "runs", {"trainer__max_steps": 6}
    run("fit", pack(place, root))
    before = contents(root)
    line = refused(
        capsys, "fit", pack(place, root, "--ckpt_path=last", data__max_length=200, **steps)
    )
    assert "max_length (128, now 200): restore that" in line
    assert contents(root) == before
    run("fit", pack(place, root, "--ckpt_path=last", data__micro_batch_size=2, **steps))
    assert len(scalars(root, "train/loss")) == 6


def test_another_length_that_packs_alike(place, tmp_path):
    saved = []
    for length in (400, 500):
        module = SFTDataModule(
            train=str(place / "train.jsonl"),
            model_name_or_path=str(place / "model"),
            cache_dir=str(tmp_path),
            max_samples=2,
            max_length=length,
        )
        module.prepare("fit")
        saved.append(module.data.fingerprint(module.pack("train")))
    check_same(*saved)


def test_other_validation_rows_are_told(place, tmp_path):
    """They are no reason to refuse, but losses of different rows are compared."""
    root, other = tmp_path / "runs", write_rows(tmp_path / "other.jsonl", chat_rows(4, seed=1))
    mine = {
        "data__val_size": None,
        "data__validation": str(place / "train.jsonl"),
        "trainer__max_steps": 4,
    }
    said = "validation: other examples than before the checkpoint"
    for more, count in (
        ({}, 0),
        ({"trainer__max_steps": 5}, 0),
        ({"trainer__max_steps": 6, "data__validation": other}, 1),
    ):
        args = arguments(
            str(place / "model"), str(place / "train.jsonl"), root, **{**SIX_STEPS, **mine, **more}
        )
        resume = ["--ckpt_path=last"] if root.exists() else []
        with log_lines() as lines:
            run("fit", [*args, *resume])
        assert sum(line.startswith(said) for line in lines) == count


def test_validation_rows_split_off_other_rows_are_refused(place, root, tmp_path, capsys):
    """Most of them were trained by then."""
    last = f"--ckpt_path={version(root) / 'checkpoints' / 'last.ckpt'}"
    run("validate", [last])
    before = contents(root)
    longer = write_rows(tmp_path / "longer.jsonl", chat_rows(17))
    others = (
        "--data.max_samples=12",
        "--data.val_size=5",
        "--seed_everything=2",
        f"--data.train={longer}",
    )
    for other in others:
        line = refused(capsys, "validate", [last, other])
        assert line.startswith("data.val_size splits off other rows") and "data.validation" in line
    assert contents(root) == before
    run("validate", [last, others[0], "--resume.allow_other_data=true"])
    run("validate", [last, others[0], "--data.val_size=null", f"--data.validation={longer}"])


def test_half_a_row_is_left_alone_until_there_is_another(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(torn := "a,step\n1.0,0\n2.0,1\n3.")
    file = MetricsFile(str(tmp_path))
    assert path.read_text() == torn
    file.log_metrics({"a": 4.0}, step=2)
    file.save()
    with path.open() as lines:
        assert [(row["a"], row["step"]) for row in csv.DictReader(lines)] == [
            ("1.0", "0"),
            ("2.0", "1"),
            ("4.0", "2"),
        ]
