"""What docs/faults.md says of each fault: what happens, what is said, what is kept. Faults are
real, not simulated, wherever a test can cause them.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import (
    REPOSITORY,
    arguments,
    chat_rows,
    environment,
    final_weights,
    run,
    run_forked,
    scalars,
    version,
    write_rows,
)
from terminal import log_lines, refused
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from lit_sft.callbacks import nan_guard
from lit_sft.checkpoint.files import step_of
from lit_sft.module import SFTModule

PLAIN = {"data__packing": False, "data__global_batch_size": 4, "checkpoint__every_n_train_steps": 1}
ROWS = 24
BAD = 2
"""A row of the third step."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder, model, rows; the model's embedding of `z` is NaN, which is in none of the rows."""
    folder = tmp_path_factory.mktemp("faults")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    (token,) = tokenizer("z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    return (
        folder,
        save_tiny(folder / "model", model, tokenizer),
        write_rows(folder / "train.jsonl", chat_rows(ROWS)),
    )


def bad_rows(folder, *numbers):
    """The rows, of which these have a `z`."""
    rows = chat_rows(ROWS)
    for number in numbers:
        rows[number]["messages"][0]["content"] += " z"
    return write_rows(folder / "bad.jsonl", rows)


def fit(model, rows, root, *more, **overrides):
    run("fit", [*arguments(model, rows, root, **{**PLAIN, **overrides}), *more])


# ------------------------------------------------------------------ no number


def checkpoints(root):
    """Step -> its checkpoint."""
    files = (version(root) / "checkpoints").glob("step=*.ckpt")
    return {step_of(path): torch.load(path, weights_only=True) for path in files}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nan_stops_and_the_run_can_go_on(place, tmp_path, capsys):
    """Everything that was saved is finite; the step is the next of the newest checkpoint; skipping
    gets past it.
    """
    root, rows = tmp_path / "runs", bad_rows(tmp_path, BAD)
    said = refused(
        capsys, "fit", arguments(place[1], rows, root, **PLAIN, checkpoint__keep_last=99)
    )
    saved = checkpoints(root)
    step = int(said.split("step ")[1].split(":")[0])
    assert max(saved) == step - 1 and "bad.jsonl line 3;" in said and "faults.skip_steps" in said, (
        said
    )
    assert all(scalar == scalar for scalar in scalars(root, "train/loss")[:-1])
    with log_lines() as lines:
        fit(place[1], rows, root, "--ckpt_path=last", faults__skip_steps=1)
    assert max(checkpoints(root)) == ROWS // 4
    assert any("left out (1 in a row, 1 in all)" in line and "line 3" in line for line in lines), (
        lines
    )


@pytest.fixture(scope="module")
def skipped(place):
    """The folder of a run that left one step out, and the row's file."""
    rows = bad_rows(place[0], BAD)
    fit(place[1], rows, place[0] / "skipped", faults__skip_steps=1, checkpoint__keep_last=99)
    return place[0] / "skipped", rows


def test_a_skipped_step_changes_nothing(skipped):
    """Neither weights nor moments nor their counters; it is counted, and the schedule goes on."""
    saved = checkpoints(skipped[0])
    losses, counts = scalars(skipped[0], "train/loss"), scalars(skipped[0], "train/skipped_steps")
    (step,) = [number for number, loss in enumerate(losses, 1) if loss != loss]
    assert counts == [0.0] * (step - 1) + [1.0] * (len(losses) - step + 1)
    before, after, last = saved[step - 1], saved[step], saved[max(saved)]
    unchanged = {k: v for k, v in before["state_dict"].items() if not torch.isnan(v).any()}
    assert_equal(unchanged, {k: after["state_dict"][k] for k in unchanged})
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (before, after)]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert_equal(one, other)
    assert last["optimizer_states"][0]["state"][0]["step"] == len(losses) - 1
    assert after["lr_schedulers"][0]["last_epoch"] == step


def test_resumed_before_and_after_a_skipped_step(skipped, place, tmp_path):
    losses = scalars(skipped[0], "train/loss")
    (step,) = [number for number, loss in enumerate(losses, 1) if loss != loss]
    for at in (step - 1, step):
        root = tmp_path / f"runs_{at}"
        shutil.copytree(skipped[0], root, symlinks=True)
        for path in (version(root) / "checkpoints").glob("step=*.ckpt"):
            if step_of(path) > at:
                path.unlink()
        fit(
            place[1],
            skipped[1],
            root,
            "--ckpt_path=last",
            faults__skip_steps=1,
            checkpoint__keep_last=99,
        )
        assert scalars(root, "train/skipped_steps") == scalars(skipped[0], "train/skipped_steps")
        for name, weight in final_weights(root).items():
            assert torch.equal(weight.nan_to_num(), final_weights(skipped[0])[name].nan_to_num())


def test_a_fused_optimizer_skips_by_itself(skipped, place, tmp_path, monkeypatch, capsys):
    """As on a GPU, where the host looks one step later: the same steps are left out, the same
    weights come out.
    """
    monkeypatch.setattr(nan_guard, "_can_defer", lambda optimizer, numbers: True)
    fused = {
        "model__optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 8e-5, "weight_decay": 0.0},
        }
    }
    fused["model__optimizer"]["init_args"]["fused"] = True
    root, rows = tmp_path / "runs", skipped[1]
    fit(place[1], rows, root, faults__skip_steps=1, checkpoint__every_n_train_steps=4, **fused)
    losses = scalars(root, "train/loss")
    assert losses == pytest.approx(scalars(skipped[0], "train/loss"), nan_ok=True)
    state = torch.load(version(root) / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["state"][0]["step"] == len(losses) - 1
    assert not any(torch.isnan(weight).sum() > 64 for weight in state["state_dict"].values())
    stopped = arguments(place[1], rows, tmp_path / "stopped", **PLAIN, **fused)
    assert "the loss is nan" in refused(capsys, "fit", stopped)
    saved, (step,) = (
        checkpoints(tmp_path / "stopped"),
        [n for n, loss in enumerate(losses, 1) if loss != loss],
    )
    assert max(saved, default=0) == step - 1, "a step was saved before it was looked at"


def test_too_many_skips_in_a_row(place, tmp_path, capsys):
    args = arguments(
        place[1], bad_rows(tmp_path, *range(ROWS)), tmp_path / "runs", **PLAIN, faults__skip_steps=2
    )
    said = refused(capsys, "fit", args)
    assert said.startswith("step 3: ") and "after 2 that were left out" in said


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_gradient_explosion(limit, place, tmp_path, capsys, monkeypatch):
    """The loss is a number, its gradient is none, or larger than asked for: all rows of the step
    are named.
    """
    configure = SFTModule.configure_model

    def exploding(module):
        configure(module)
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient: gradient * torch.inf)

    if limit is None:
        monkeypatch.setattr(SFTModule, "configure_model", exploding)
    args = arguments(*place[1:], tmp_path / "runs", **PLAIN, faults__grad_norm_limit=limit)
    said = refused(capsys, "fit", args)
    assert (
        said.startswith("step 1: the loss is ") and len(set(re.findall(r"line (\d+)", said))) == 4
    ), said
    assert ("above faults.grad_norm_limit 0.001" if limit else "the gradient norm nan") in said
    assert not checkpoints(tmp_path / "runs")


def test_clipping_by_value_hides_no_explosion(place, tmp_path, capsys, monkeypatch):
    """It would make a finite number of an infinite one."""
    configure = SFTModule.configure_model

    def exploding(module):
        configure(module)
        module.model.lm.get_output_embeddings().weight.register_hook(
            lambda gradient: gradient.fill_(torch.inf)
        )

    monkeypatch.setattr(SFTModule, "configure_model", exploding)
    by_value = {"trainer__gradient_clip_algorithm": "value", "trainer__gradient_clip_val": 0.5}
    said = refused(capsys, "fit", arguments(*place[1:], tmp_path / "runs", **{**PLAIN, **by_value}))
    assert said.startswith("step 1: the loss is ") and "the gradient norm inf" in said


@pytest.mark.parametrize(("key", "value"), [("skip_steps", -1), ("grad_norm_limit", 0)])
def test_wrong_options(key, value, place, tmp_path, capsys):
    args = arguments(*place[1:], tmp_path / "runs", **{f"faults__{key}": value})
    assert f"faults.{key} is {value}" in refused(capsys, "fit", args)


def test_an_error_that_is_not_foreseen_has_its_own_exit_code(place, tmp_path, capsys, monkeypatch):
    def training_step(module, batch, batch_idx):
        raise ZeroDivisionError("nobody foresaw it")

    monkeypatch.setattr(SFTModule, "training_step", training_step)
    with pytest.raises(SystemExit) as end:
        run("fit", arguments(*place[1:], tmp_path / "runs", **PLAIN))
    said = capsys.readouterr().err
    assert end.value.code == 3 and "Traceback" in said
    assert errors(said) == [
        "error: ZeroDivisionError: nobody foresaw it (not foreseen: the traceback is above)"
    ]


# ------------------------------------------------------------------ ranks

BREAKING = """
import os, sys, time
from lit_sft import errors, module
from lit_sft.cli import main as cli

step = module.SFTModule.training_step

def training_step(self, batch, batch_idx):
    if self.trainer.global_step == 2 and str(self.trainer.global_rank) in os.environ["BREAKS"].split(","):
        if os.environ["KIND"] == "bug":
            raise ZeroDivisionError("nobody foresaw it")
        raise errors.UserError("mend your rows")
    if self.trainer.global_step == 2 and os.environ["KIND"] == "deaf":
        time.sleep(600)  # as in a collective of NCCL, which does not notice
    return step(self, batch, batch_idx)

module.SFTModule.training_step = training_step
cli.main()
"""


def fit_breaking(place, folder, launcher, **variables):
    """Runs `fit` on 2 ranks of which some fail; (exit code, stderr)."""
    (folder / "program.py").write_text(BREAKING)
    settings = {**PLAIN, "trainer__devices": 2, "trainer__strategy": "ddp"}
    args = arguments(*place[1:], folder / "runs", **settings)
    command = [sys.executable, *launcher, str(folder / "program.py"), "fit", *args]
    env = environment(PYTHONPATH=str(REPOSITORY), PYTHONUNBUFFERED="1", **variables)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def errors(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2")
FAILING = {
    "both, foreseen": ("0,1", "user", (), "error: mend your rows"),
    "rank 1, not foreseen": ("1", "bug", (), "error: rank 1: ZeroDivisionError: nobody foresaw it"),
    "rank 0, rank 1 is deaf": ("0", "deaf", (), "error: mend your rows"),
    "rank 1, rank 0 is deaf": ("1", "deaf", (), "error: rank 1: mend your rows"),
    "torchrun, rank 1": ("1", "user", TORCHRUN, "error: rank 1: mend your rows"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kind", "launcher", "said"), FAILING.values(), ids=FAILING)
def test_a_rank_fails(ranks, kind, launcher, said, place, tmp_path):
    """All ranks end within the minute of the time limit, and one of them tells why, in one line."""
    code, err = fit_breaking(place, tmp_path, launcher, BREAKS=ranks, KIND=kind)
    assert code != 0 and len(errors(err)) == 1 and errors(err)[0].startswith(said), err[-3000:]
    assert ("Traceback" in err) == (kind == "bug") or launcher, err[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_nan_on_one_rank(strategy, place, tmp_path):
    settings = {**PLAIN, "trainer__devices": 2, "trainer__strategy": strategy}
    inputs = place[1], bad_rows(tmp_path, BAD)
    codes, err = run_forked("fit", arguments(*inputs, tmp_path / "runs", **settings))
    assert codes == [1, 1] and len(errors(err)) == 1, err[-3000:]
    assert re.search(
        r"^error: step 3: the loss is nan.*rank \d: \S+bad.jsonl line 3;", errors(err)[0]
    ), err[-3000:]
    if strategy == "ddp":
        return
    root = tmp_path / "skipping"
    run("fit", arguments(*inputs, root, **settings, faults__skip_steps=1), subprocesses=True)
    assert scalars(root, "train/skipped_steps")[-1] == 1


# ------------------------------------------------------------------ the surroundings


@pytest.fixture
def at_step_2(monkeypatch):
    """Does something before the third step of the run of a test."""

    def set_up(do):
        start = SFTModule.on_train_batch_start

        def on_train_batch_start(module, batch, batch_idx):
            if (
                module.trainer.global_step == 2
                and batch_idx % module.trainer.accumulate_grad_batches == 0
            ):
                do(module.trainer)
            return start(module, batch, batch_idx)

        monkeypatch.setattr(SFTModule, "on_train_batch_start", on_train_batch_start)

    return set_up


@pytest.mark.parametrize("log_every", [1, 1000])
def test_the_log_folder_is_removed(log_every, place, tmp_path, at_step_2, capsys):
    """The next row of metrics.csv, or the next checkpoint, ends the run; no half folder is made."""
    root = tmp_path / "runs"
    at_step_2(lambda trainer: shutil.rmtree(version(root)))
    args = arguments(*place[1:], root, **PLAIN, trainer__log_every_n_steps=log_every)
    line = refused(capsys, "fit", args)
    assert f"{version(root)} was removed during the run" in line
    assert not version(root).exists() and not version(root, 1).exists()


def test_a_data_worker_is_killed(place, tmp_path, at_step_2, capsys):
    def kill(trainer):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(1)

    at_step_2(kill)
    rows = write_rows(tmp_path / "many.jsonl", chat_rows(200))
    settings = {**PLAIN, "data__num_workers": 1, "checkpoint__every_n_train_steps": None}
    said = refused(capsys, "fit", arguments(place[1], rows, tmp_path / "runs", **settings))
    assert "a process that builds batches died" in said and "data.num_workers" in said


def cache_of(folder):
    (path,) = (path for path in (folder / "cache").iterdir() if (path / "meta.json").exists())
    return path


@pytest.mark.parametrize("name", ["input_ids.i32", "loss_mask.u8", "rows.i64"])
def test_a_flipped_bit_in_the_cache(name, place, tmp_path, capsys):
    args = arguments(*place[1:], tmp_path / "runs", **PLAIN)
    run("fit", args)
    path = cache_of(tmp_path)
    content = bytearray((path / name).read_bytes())
    content[0] ^= 2
    (path / name).write_bytes(content)
    said = refused(capsys, "fit", args)
    assert f"the cache {path} is damaged at example 0" in said and "remove it" in said


def test_a_cache_that_is_not_whole_is_made_anew(place, tmp_path):
    args = arguments(*place[1:], tmp_path / "runs", **PLAIN)
    run("fit", args)
    path = cache_of(tmp_path)
    meta = (path / "meta.json").read_text()
    (path / "meta.json").write_text(meta.replace('"rows_kept": 24', '"rows_kept": 25'))
    with log_lines() as lines:
        run("fit", args)
    assert any("is damaged" in line and "made anew" in line for line in lines), lines


def test_the_cache_is_removed_during_the_run(place, tmp_path, at_step_2):
    """Its files stay mapped."""
    at_step_2(lambda trainer: shutil.rmtree(tmp_path / "cache"))
    fit(*place[1:], tmp_path / "runs")
    assert len(scalars(tmp_path / "runs", "train/loss")) == ROWS // 4


@pytest.mark.parametrize("how", ["truncated", "rewritten"])
def test_data_that_changes_during_the_run(how, place, tmp_path, at_step_2, capsys):
    """Examples come from the cache, and what is asked at validation is read before the first
    step.
    """
    path = Path(write_rows(tmp_path / "val.jsonl", chat_rows(8)))

    def change(trainer):
        text = path.read_text()
        path.write_text(text[:50] if how == "truncated" else text.replace("aaa", "bbb"))

    at_step_2(change)
    settings = {**PLAIN, "data__validation": path, "model__evaluation": {"num_samples": 4}}
    fit(*place[1:], tmp_path / "runs", **settings)
    references = [
        json.loads(line)["reference"]
        for line in (version(tmp_path / "runs") / "evaluation.jsonl").open()
    ]
    assert len(references) == 2 * 4 and references[:4] == references[4:]  # before and after


def test_training_data_that_grows_during_the_run(place, tmp_path, at_step_2):
    """What a checkpoint knows of the data is what it was at the start."""
    path = Path(write_rows(tmp_path / "train.jsonl", chat_rows(ROWS)))
    before = path.read_text()
    at_step_2(lambda trainer: path.write_text(before + before[: before.index("\n") + 1]))
    fit(place[1], path, tmp_path / "runs", data__val_size=4)
    path.write_text(before)
    fit(
        place[1],
        path,
        tmp_path / "runs",
        "--ckpt_path=last",
        data__val_size=4,
        trainer__max_epochs=2,
    )
    assert len(scalars(tmp_path / "runs", "train/loss")) == 2 * (ROWS - 4) // 4


def test_no_place_for_the_cache(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = arguments(
        *place[1:], tmp_path / "runs", **PLAIN, data__cache_dir=tmp_path / "file" / "cache"
    )
    assert "Not a directory" in refused(capsys, "fit", args)


@pytest.mark.parametrize("key", ["trainer__default_root_dir", "data__cache_dir"])
def test_a_read_only_disk(key, place, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting needs root")
    try:
        said = refused(
            capsys, "fit", arguments(*place[1:], tmp_path / "runs", **{**PLAIN, key: disk})
        )
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "Read-only file system" in said and str(disk) in said


@pytest.mark.parametrize(
    ("size", "key"), [(16, "data__cache_dir"), (200, "trainer__default_root_dir")]
)
def test_a_full_disk(size, key, place, tmp_path, capsys):
    """Of a few KiB, for real."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting needs root")
    try:
        said = refused(
            capsys, "fit", arguments(*place[1:], tmp_path / "runs", **{**PLAIN, key: disk})
        )
        assert not list(disk.rglob("step=*.ckpt")) and not list(disk.rglob("meta.json"))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "No space left on device" in said or "is the disk full?" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 21474836480 bytes."
        ),
    ],
)
def test_out_of_memory(error, place, tmp_path, capsys, at_step_2):
    """What was asked for, what `doctor` expects, and the settings that take less, with their
    values.
    """

    def fail(trainer):
        raise error

    at_step_2(fail)
    said = refused(
        capsys, "fit", arguments(*place[1:], tmp_path / "runs", **PLAIN, data__micro_batch_size=2)
    )
    assert "20.00 GiB more" in said and re.search(r"`doctor` expects \d+\.\d\d GiB", said)
    for knob in (
        "data.micro_batch_size (2)",
        "data.max_length (128)",
        "model.gradient_checkpointing",
        "model.lora",
    ):
        assert knob in said


def test_the_clock_jumps(place, tmp_path, monkeypatch):
    """Only the monotonic clock decides when to save."""
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + 1e6)
    root = tmp_path / "runs"
    fit(*place[1:], root, checkpoint__every_n_train_steps=None, checkpoint__every_n_minutes=30)
    assert set(checkpoints(root)) == {ROWS // 4}
