"""What a run logs: the same scalars in TensorBoard's events and in metrics.csv, and the answers as
text.
"""

import csv
import math
import shutil

import pytest
from running import arguments, chat_rows, run, version, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import save_tiny

TRAIN = {"train/loss", "train/grad_norm", "train/lr", "train/tokens_per_second", "train/num_tokens"}
VALIDATION = {"val/loss", "val/perplexity", "val/token_accuracy", "val/exact_match"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tensorboard")
    model, rows = save_tiny(place / "model"), write_rows(place / "train.jsonl", chat_rows(16))
    options = {
        "data__packing": False,
        "data__global_batch_size": 4,
        "data__val_size": 4,
        "trainer__max_epochs": 2,
    }
    asked = {
        "data__questions": ["Calculate 1+1-1", "a|b <b>"],
        "model__evaluation": {"num_samples": 3},
    }
    run("fit", arguments(model, rows, place / "runs", **options, **asked))
    return version(place / "runs")


@pytest.fixture(scope="module")
def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


@pytest.fixture(scope="module")
def table(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_scalars_of_every_step_are_in_both(events, table):
    assert events.Tags()["scalars"] and TRAIN | VALIDATION <= set(events.Tags()["scalars"])
    for name in TRAIN | VALIDATION - {"val/exact_match"}:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in logged] == (
            list(range(6)) if name in TRAIN else [2, 5]
        )  # 12 rows, 4 per step
        in_csv = [
            (int(row["step"]), pytest.approx(float(row[name]), rel=1e-6))
            for row in table
            if row[name]
        ]
        assert logged == in_csv


def test_values(events, table):
    """Tokens are counted over the whole run, perplexity is exp of the loss, the rest is in its
    range.
    """
    tokens = [event.value for event in events.Scalars("train/num_tokens")]
    assert (
        tokens == sorted(tokens) and len(set(tokens)) == 6 and tokens[5] == 2 * tokens[2]
    )  # two equal epochs
    assert all(event.value > 0 for name in TRAIN for event in events.Scalars(name))
    for loss, perplexity in zip(
        events.Scalars("val/loss"), events.Scalars("val/perplexity"), strict=True
    ):
        assert perplexity.value == pytest.approx(math.exp(loss.value), rel=1e-5)
    for name in ("val/token_accuracy", "val/exact_match"):
        assert all(0 <= event.value <= 1 for event in events.Scalars(name))


def test_the_learning_rate_is_that_of_the_step(table):
    """Of a cosine over 6 steps whose first is the warm-up."""
    wanted = [1.0, *(0.5 * (1 + math.cos(math.pi * (step - 1) / 5)) for step in range(1, 6))]
    assert [float(row["train/lr"]) for row in table if row["train/lr"]] == pytest.approx(
        [8e-5 * w for w in wanted]
    )


def test_answers_are_text(events):
    """Before the first step, at each validation and thus at the end; what looks like markup stays
    text.
    """
    assert "answers/text_summary" in events.Tags()["tensors"]
    texts = [
        event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("answers/text_summary")
    ]
    assert len(texts) == 3
    assert "| before |" in texts[0] and "after" not in texts[0].splitlines()[0]
    assert all("| before | after |" in text and len(text.splitlines()) == 4 for text in texts[1:])
    assert all("Calculate 1+1-1" in text and "a\\|b &lt;b&gt;" in text for text in texts)


def test_without_validation(tmp_path):
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(4))
    run("fit", arguments(model, rows, tmp_path / "runs", data__questions=["hi"]))
    events = EventAccumulator(str(version(tmp_path / "runs"))).Reload()
    assert set(events.Tags()["scalars"]) >= TRAIN and not VALIDATION & set(events.Tags()["scalars"])
    assert len(events.Tensors("answers/text_summary")) == 2  # before, and at the end


def logged(folder, name):
    """(step, epoch, value) of a scalar, the same in both."""
    with (folder / "metrics.csv").open() as file:
        rows = [
            (int(row["step"]), int(row["epoch"]), float(row[name]))
            for row in csv.DictReader(file)
            if row.get(name)
        ]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    in_events = [
        [(event.step, event.value) for event in events.Scalars(tag)] for tag in ("epoch", name)
    ]
    epochs = dict(in_events[0])
    assert [(step, epochs[step], value) for step, value in in_events[1]] == [
        pytest.approx(row) for row in rows
    ]
    return rows


def test_a_checkpoint_that_is_evaluated_is_logged_at_its_step(folder, tmp_path):
    """Beside what `fit` found there, and not at the beginning of its curve."""
    copy = shutil.copytree(folder, tmp_path / "lightning_logs" / "version_0", symlinks=True)
    first, last = logged(copy, "val/loss")
    assert (first[:2], last[:2]) == ((2, 0), (5, 1))
    run("validate", [f"--ckpt_path={copy}"])
    assert logged(copy, "val/loss") == [first, last, pytest.approx(last)]
    rows = write_rows(tmp_path / "test.jsonl", chat_rows(3))
    run("test", [f"--ckpt_path={copy}", f"--data.test={rows}"])
    ((*place, _),) = logged(copy, "test/loss")
    assert place == [5, 1] and not (tmp_path / "lightning_logs" / "version_1").exists()


def test_without_a_checkpoint_an_evaluation_is_logged_at_0(folder, tmp_path):
    model, rows = (
        folder.parent.parent.parent / "model",
        write_rows(tmp_path / "rows.jsonl", chat_rows(4)),
    )
    run("validate", arguments(str(model), "none.jsonl", tmp_path / "runs", data__validation=rows))
    ((*place, _),) = logged(version(tmp_path / "runs"), "val/loss")
    assert place == [0, 0]
