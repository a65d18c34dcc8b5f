"""checkpointing/: files and directories of parts, written at once or in the background, whole or
not there.
"""

import json
import os
import subprocess
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from terminal import log_lines

from lit_sft.callbacks.checkpointer import Checkpointer, CheckpointOptions
from lit_sft.checkpoint import files
from lit_sft.checkpoint import sharded as checkpoint_sharded
from lit_sft.checkpoint.files import KeepPolicy, is_intact
from lit_sft.checkpoint.find import find_checkpoint, find_last
from lit_sft.checkpoint.io import CheckpointFiles, open_checkpoint, read_checkpoint
from lit_sft.errors import UserError

WHOLE = torch.arange(35.0).reshape(7, 5)


def sharded(path):
    """A checkpoint as two ranks write it: rows 0 to 3 of a tensor, and the rest."""
    folder = files.aside(path)
    files.clear(path, is_folder=True)
    files.write({"state_dict/w": ([0, 0], WHOLE[:4].clone())}, folder / files.PART.format(0))
    files.write({"state_dict/w": ([4, 0], WHOLE[4:].clone())}, folder / files.PART.format(1))
    files.write(
        {"state_dict": {"w": torch.empty(7, 5, device="meta")}, "step": 3}, folder / files.STATE
    )
    files.put_in_place(path)
    return path


def place(tmp_path, step=1, version=0):
    run = tmp_path / f"version_{version}"
    run.mkdir(parents=True, exist_ok=True)
    return files.path_of(run, step)


# ------------------------------------------------------------------ shards


def test_a_directory_is_read_as_one(tmp_path):
    checkpoint = read_checkpoint(sharded(place(tmp_path)))
    assert torch.equal(checkpoint["state_dict"]["w"], WHOLE) and checkpoint["step"] == 3


@pytest.mark.parametrize("rows", [(0, 4), (2, 6), (4, 7), (6, 6), (0, 7)])
def test_a_region_is_read_from_its_pieces(rows, tmp_path):
    spread = open_checkpoint(sharded(place(tmp_path)))["state_dict"]["w"]
    assert torch.equal(spread[rows[0] : rows[1], 1:3], WHOLE[rows[0] : rows[1], 1:3])


def test_a_missing_piece_is_noticed():
    tree = {"w": torch.empty(7, 5, device="meta")}
    with pytest.raises(ValueError, match="20 of the 35 numbers of w"):
        checkpoint_sharded.join(tree, [{"w": ([0, 0], WHOLE[:4])}])


def test_tied_weights_are_copied_once():
    tied = torch.ones(3)
    copy_once = checkpoint_sharded.HostCopy()
    first = copy_once({"a": tied, "b": tied.detach(), "c": [1, None]})
    assert first["a"].data_ptr() == first["b"].data_ptr() != tied.data_ptr() and first["c"] == [
        1,
        None,
    ]
    address = first["a"].data_ptr()
    tied += 1
    second = copy_once({"a": tied, "b": tied, "c": [2, None]})
    assert second["a"].data_ptr() == address and torch.equal(second["a"], tied), (
        "memory is used again"
    )


# ------------------------------------------------------------------ intact or not


def damage(path, kind):
    part = path / files.PART.format(1) if path.is_dir() else path
    data = part.read_bytes()
    if kind == "truncated":
        part.write_bytes(data[:-20])
    elif kind == "changed":
        middle = data.index(WHOLE[5].numpy().tobytes())
        part.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif kind == "missing":
        part.unlink()
    else:
        (path / files.MANIFEST).unlink()


@pytest.mark.parametrize("kind", ["truncated", "changed", "missing", "without a manifest"])
def test_a_damaged_directory_is_passed_over(kind, tmp_path):
    older, newer = sharded(place(tmp_path, 1)), sharded(place(tmp_path, 2))
    assert find_last(tmp_path) == newer
    damage(newer, kind)
    with log_lines() as lines:
        assert find_last(tmp_path) == older
    assert lines == [f"{newer} is torn: passed over"]
    with pytest.raises(UserError, match="is damaged; use an earlier one"):
        read_checkpoint(newer)


@pytest.mark.parametrize("kind", ["truncated", "changed"])
def test_a_damaged_file(kind, tmp_path):
    path = tmp_path / "step=000001.ckpt"
    files.write({"w": WHOLE}, path)
    assert is_intact(path)
    damage(path, kind)
    assert not is_intact(path)


def test_a_part_that_runs_code_is_refused(tmp_path):
    path = sharded(place(tmp_path))
    torch.save({"state_dict/w": os.system}, path / files.PART.format(0))
    (path / files.MANIFEST).unlink()
    files.write_manifest(path)
    assert is_intact(path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)


# ------------------------------------------------------------------ saving


def test_a_resumed_run_looks_at_its_own_clock(monkeypatch):
    """Steps of earlier starts took none of its time: it would not look again for thousands of
    steps.
    """
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    trainer = SimpleNamespace(
        global_step=1500, world_size=1, checkpoint_callbacks=[], ckpt_path=None
    )
    checkpointer, late = Checkpointer(CheckpointOptions(), CheckpointFiles()), []
    checkpointer.on_train_start(trainer, None)
    for _ in range(20):
        now, trainer.global_step = now + 1, trainer.global_step + 1
        late.append(checkpointer._is_late(trainer, 10.0))
    assert late.index(True) == 10


@pytest.mark.parametrize("async_save", [False, True])
def test_links_and_leftovers(async_save, tmp_path):
    writer = CheckpointFiles(async_save)
    folder = place(tmp_path).parent
    for step, best in ((1, True), (2, False), (3, False), (4, False)):
        writer.save_checkpoint({"step": step}, place(tmp_path, step), KeepPolicy(best, keep_last=2))
        (folder / ".step=000009.ckpt.tmp").write_text("of a save that was killed")
    writer.save_checkpoint({"step": 5}, place(tmp_path, 5), KeepPolicy(False, keep_last=2))
    writer.wait()
    names = {"step=000001.ckpt", "step=000004.ckpt", "step=000005.ckpt", "last.ckpt", "best.ckpt"}
    assert {path.name for path in folder.iterdir()} == names
    assert os.readlink(folder / "last.ckpt") == "step=000005.ckpt"
    assert os.readlink(folder / "best.ckpt") == "step=000001.ckpt"


@pytest.mark.parametrize("before", ["file", "directory"])
@pytest.mark.parametrize("now", ["file", "directory"])
def test_a_checkpoint_of_a_run_that_went_another_way_is_replaced(before, now, tmp_path):
    for kind in (before, now):
        if kind == "directory":
            sharded(place(tmp_path))
        else:
            CheckpointFiles().save_checkpoint({"state_dict": {"w": WHOLE}}, place(tmp_path))
    assert torch.equal(read_checkpoint(place(tmp_path))["state_dict"]["w"], WHOLE)
    assert [path.name for path in place(tmp_path).parent.iterdir()] == [place(tmp_path).name]


def test_the_newest_stays_the_newest_when_the_clock_is_turned_back(tmp_path):
    writer, future = CheckpointFiles(), time.time_ns() + 10**12
    for version, step in ((0, 7), (1, 2)):
        writer.save_checkpoint({"step": step}, place(tmp_path, step, version))
        os.utime(place(tmp_path, step, version), ns=(future, future))
    writer.save_checkpoint({"step": 8}, place(tmp_path, 8), KeepPolicy(False, keep_last=2))
    assert find_last(tmp_path) == place(tmp_path, 8)


def test_a_new_checkpoint_is_the_newest_on_a_clock_of_whole_seconds(tmp_path):
    second = 1_700_000_000 * 10**9
    for step in (1, 2):
        CheckpointFiles().save_checkpoint({"step": step}, place(tmp_path, step))
        os.utime(place(tmp_path, step), ns=(second, second))
    files.keep(place(tmp_path, 1), KeepPolicy(False, keep_last=2))
    assert files.modified(place(tmp_path, 1)) > second


def test_the_last_of_a_copied_run_is_the_one_that_its_link_names(tmp_path):
    writer = CheckpointFiles()
    for step in (1, 2, 3):
        writer.save_checkpoint(
            {"step": step}, place(tmp_path, step), KeepPolicy(False, keep_last=3)
        )
    for step, age in ((3, 9), (1, 5), (2, 1)):  # copied in this order, without their times
        os.utime(place(tmp_path, step), (time.time() - age,) * 2)
    assert find_last(tmp_path) == place(tmp_path, 3)
    writer.save_checkpoint(
        {"step": 2}, place(tmp_path, 2), KeepPolicy(False, keep_last=3)
    )  # went back and on from 1
    assert find_last(tmp_path) == place(tmp_path, 2)
    place(tmp_path, 2).write_text("torn")
    assert find_last(tmp_path) == place(tmp_path, 1), "the newest of the rest"


class Slow:
    """`files.write` that waits until it may go on, or fails."""

    def __init__(self, monkeypatch, error=None):
        self.may_go_on, self.write, self.error = threading.Event(), files.write, error
        monkeypatch.setattr(files, "write", self)

    def __call__(self, value, path):
        assert self.may_go_on.wait(30)
        if self.error:
            raise self.error
        self.write(value, path)


def test_the_background_keeps_the_moment_and_the_earlier_checkpoint(tmp_path, monkeypatch):
    writer, weight, keep = (
        CheckpointFiles(async_save=True),
        torch.zeros(4),
        KeepPolicy(False, keep_last=1),
    )
    writer.save_checkpoint({"w": weight}, place(tmp_path, 1), keep)
    writer.wait()
    slow = Slow(monkeypatch)
    writer.save_checkpoint({"w": weight}, place(tmp_path, 2), keep)
    weight += 1  # training goes on
    assert find_last(tmp_path) == place(tmp_path, 1)
    assert os.readlink(place(tmp_path).parent / "last.ckpt") == place(tmp_path, 1).name
    slow.may_go_on.set()
    writer.wait()
    assert find_last(tmp_path) == place(tmp_path, 2) and not place(tmp_path, 1).exists()
    assert torch.equal(read_checkpoint(place(tmp_path, 2))["w"], torch.zeros(4))


@pytest.mark.parametrize("noticed_by", ["check", "wait", "the next save"])
def test_an_error_in_the_background_is_raised_once(noticed_by, tmp_path, monkeypatch):
    writer = CheckpointFiles(async_save=True)
    slow = Slow(monkeypatch, OSError(28, "No space left on device"))
    writer.save_checkpoint({"w": WHOLE}, place(tmp_path, 1))
    writer.check()  # not yet
    slow.may_go_on.set()
    writer.teardown()
    with pytest.raises(
        UserError,
        match="could not be written .No space left on device.; earlier ones are untouched",
    ):
        if noticed_by == "the next save":
            writer.save_checkpoint({"w": WHOLE}, place(tmp_path, 2))
        else:
            getattr(writer, noticed_by)()
    writer.wait()
    assert list(place(tmp_path).parent.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_is_full(async_save, small_disk):
    """For real: one line, the earlier checkpoint stays whole, nothing half-written stays."""
    writer, keep = CheckpointFiles(async_save), KeepPolicy(False, keep_last=2)
    writer.save_checkpoint({"w": torch.ones(100_000)}, place(small_disk, 1), keep)
    with pytest.raises(UserError, match="could not be written .*earlier ones are untouched"):
        writer.save_checkpoint(
            {"w": torch.ones(100_000), "v": torch.ones(90_000)}, place(small_disk, 2), keep
        )
        writer.wait()
    names = {path.name for path in place(small_disk).parent.iterdir()}
    assert names == {"step=000001.ckpt", "last.ckpt"} and find_last(small_disk) == place(
        small_disk, 1
    )


def test_the_manifest_names_every_part(tmp_path):
    sizes = json.loads((sharded(place(tmp_path)) / files.MANIFEST).read_text())["files"]
    assert sorted(sizes) == ["part-0.pt", "part-1.pt", "state.pt"]


# ------------------------------------------------------------------ links


def test_without_symbolic_links(tmp_path, monkeypatch):
    """Some mounts have none: small text files in their place."""

    def refuse(*args, **kwargs):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    writer, logs = CheckpointFiles(), tmp_path / "lightning_logs"
    for step, best in ((1, True), (2, False), (3, False)):
        writer.save_checkpoint({"step": step}, place(logs, step), KeepPolicy(best, keep_last=1))
    folder = place(logs).parent
    assert {path.name for path in folder.iterdir()} == {
        "step=000001.ckpt",
        "step=000003.ckpt",
        "last.ckpt",
        "best.ckpt",
    }
    os.utime(place(logs, 1))  # copied without its times
    assert (folder / "last.ckpt").read_text() == "step=000003.ckpt" and find_last(logs) == place(
        logs, 3
    )
    assert find_checkpoint("best", logs, "validate") == str(place(logs, 1))
    assert find_checkpoint(str(folder / "best.ckpt"), logs, "validate") == str(place(logs, 1))
    assert files.go_back(place(logs, 1), 1, best_step=1)
    assert find_last(logs) == place(logs, 1) and not place(logs, 3).exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_going_back_sets_the_rest_aside_once_more(kind, tmp_path):
    """A save that was killed before its link was switched leaves a second one of the same step."""
    for _ in range(2):
        for step in (1, 2, 3):
            if kind == "directory":
                sharded(place(tmp_path, step))
            else:
                CheckpointFiles().save_checkpoint({"step": step}, place(tmp_path, step))
        assert not files.go_back(place(tmp_path, 1), 1, best_step=None)
        assert find_last(tmp_path) == place(tmp_path, 1)
    names = {"last.ckpt", "step=000001.ckpt", ".step=000002.ckpt.later", ".step=000003.ckpt.later"}
    assert {path.name for path in place(tmp_path).parent.iterdir()} == names
    files.keep(place(tmp_path, 1), KeepPolicy(False, keep_last=2))
    assert {path.name for path in place(tmp_path).parent.iterdir()} == {
        "last.ckpt",
        "step=000001.ckpt",
    }


def test_a_checkpoint_that_is_gone_back_to_is_the_newest_of_all_runs(tmp_path):
    for version, step in ((0, 1), (0, 2), (1, 1)):
        files.clear(place(tmp_path, step, version), is_folder=False)
        files.write({"step": step}, place(tmp_path, step, version))
    assert find_last(tmp_path) == place(tmp_path, 1, version=1)
    files.go_back(place(tmp_path, 1), 1, best_step=None)
    assert find_last(tmp_path) == place(tmp_path, 1)


def test_the_best_step_is_that_of_its_file(tmp_path):
    """Also after a validation by the clock, within a step, which is saved after the step."""
    checkpointer, saved = Checkpointer(CheckpointOptions(), CheckpointFiles()), []
    checkpointer.best_score, checkpointer.best_step, checkpointer.improved = 0.5, 4, True
    trainer: Any = SimpleNamespace(
        global_step=5,
        log_dir=str(tmp_path),
        strategy=SimpleNamespace(
            broadcast=lambda value: value, save_checkpoint=lambda *args, **_: saved.append(args)
        ),
        _checkpoint_connector=SimpleNamespace(
            dump_checkpoint=lambda weights_only: checkpointer.state_dict()
        ),
    )
    checkpointer.save(trainer)
    ((state, path),) = saved
    assert state["best_step"] == 5 and path.name == "step=000005.ckpt"


@pytest.mark.parametrize("where", ["checkpoints", "own"])
def test_a_file_of_the_users_that_a_run_went_back_to(where, tmp_path):
    """Nothing else may be left of the way up to there."""
    own = tmp_path / "version_0" / where / "good.ckpt"
    for path in (place(tmp_path, 9), own, place(tmp_path, 1, version=1)):
        files.clear(path, is_folder=False)
        files.write({"step": 3}, path)
    files.go_back(own, 3, best_step=None)
    assert find_last(tmp_path) == own and not place(tmp_path, 9).exists()
    CheckpointFiles().save_checkpoint(
        {"step": 4}, place(tmp_path, 4), KeepPolicy(False, keep_last=1)
    )
    assert find_last(tmp_path) == place(tmp_path, 4) and own.exists()
