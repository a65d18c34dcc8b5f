"""What a terminal, or the log of a job, shows of a training."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest
from running import REPOSITORY, arguments, chat_rows, environment, run, scalars, write_rows
from terminal import log_lines
from tiny import save_tiny

from lit_sft.callbacks import progress
from lit_sft.callbacks.progress import Progress

STEP_LINE = r"step (\d) of 4: loss \d\.\d{4}, [\d,]+ tokens/s, \d:\d\d:\d\d left"


def settings(folder, rows=16, **options):
    """Of four steps."""
    model, train = save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(rows))
    return arguments(
        model, train, folder / "run", data__packing=False, data__global_batch_size=4, **options
    )


def lines_of(args):
    with log_lines() as lines:
        run("fit", args)
    return [line for line in lines if line.startswith("step ")]


@pytest.mark.parametrize(("every", "steps"), [(0.0, "1234"), (1e9, "4")])
def test_lines_of_a_job(every, steps, tmp_path, monkeypatch):
    """Not more often than they may come; the last always."""
    monkeypatch.setattr(progress, "LINES_EVERY", every)
    found = [
        re.fullmatch(STEP_LINE, line)
        for line in lines_of(settings(tmp_path, data__micro_batch_size=2))
    ]
    assert "".join(match[1] for match in found) == steps


def test_a_validation_is_told(tmp_path):
    args = settings(tmp_path, data__validation=write_rows(tmp_path / "val.jsonl", chat_rows(3)))
    told = [line for line in lines_of(args) if " of " not in line]
    assert len(told) == 1 and told[0].startswith(
        f"step 4: val/loss {scalars(tmp_path / 'run', 'val/loss')[0]:.4f}, "
    )


def on_a_terminal(columns, *args):
    """What `lit_sft ARGS` writes to a terminal of that width."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(REPOSITORY)
        os.execve(
            sys.executable, [sys.executable, "-m", "lit_sft", *args], environment(TERM="xterm")
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # it has ended
            break
        if not read:
            break
        written += read
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())


def test_the_bar_takes_one_line_and_others_stand_above_it(tmp_path):
    options = {
        "data__micro_batch_size": 2,
        "data__validation": write_rows(tmp_path / "val.jsonl", chat_rows(3)),
    }
    args = settings(tmp_path, trainer__enable_progress_bar=True, **options)
    shown = re.split(r"[\r\n]+", on_a_terminal(80, "fit", *args))
    bars = [line for line in shown if line.startswith("Epoch 0/0")]
    assert re.search(
        r"8/8 \d:\d\d:\d\d • \d:\d\d:\d\d [\d.]+it/s loss: \d\.\d{3} tokens/s: [\d,]+ *$", bars[-1]
    )
    assert all(len(line) <= 80 for line in bars)
    assert any(line.startswith("packed attention: ") for line in shown)
    assert not any("shards" in line or line.startswith(" ") and line.strip() for line in shown)
    assert [line.split(",")[0][:16] for line in shown if line.startswith("step ")] == [
        "step 4: val/loss"
    ]


def test_the_bar_reads_numbers_twice_a_second_at_most(monkeypatch):
    reads = []
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.RichProgressBar._update_metrics", lambda *_: reads.append(1)
    )

    class Loop:
        training = True

    trainer = Loop()
    trainer.fit_loop = trainer.epoch_loop = trainer.batch_progress = trainer
    trainer.is_last_batch = False
    bar = Progress()
    for now in (10.0, 10.1, 10.4, 10.6, 10.7):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        bar._update_metrics(trainer, None)
    assert len(reads) == 2
    trainer.is_last_batch = True
    bar._update_metrics(trainer, None)
    assert len(reads) == 3


def test_a_bar_of_the_users_own_is_left(tmp_path):
    """And none comes where none is wanted."""
    from lightning.pytorch.callbacks import TQDMProgressBar

    assert Progress.is_wanted({}) and not Progress.is_wanted({"enable_progress_bar": False})
    assert not Progress.is_wanted({"callbacks": [TQDMProgressBar()]})
    bar = [
        {
            "class_path": "lightning.pytorch.callbacks.TQDMProgressBar",
            "init_args": {"refresh_rate": 0},
        }
    ]
    run("fit", settings(tmp_path, trainer__enable_progress_bar=True, trainer__callbacks=bar))
    assert len(scalars(tmp_path / "run", "train/loss")) == 4
