"""Answers that are scored: the same on any number of ranks, as a monitor, and the table of them."""

import csv
import json
import math
import re
import shutil

import pytest
from running import arguments, chat_rows, run, scalars, version, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from terminal import log_lines, refused
from tiny import save_tiny

from lit_sft.callbacks import generation_metrics
from lit_sft.errors import UserError
from lit_sft.generation.prompts import Prompt
from lit_sft.generation.scoring import EvaluationOptions, choose_prompts, too_long_to_match

ALL = ["exact_match", "rouge", "bleu", "chrf", "token_f1"]
SCORES = ["exact_match", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "token_f1"]
KNOWN = ["one two three four five six", "Hello world", "你好", "the answer is not short at all"]


def row(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that knows four of seven answers, and its evaluation after training."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = save_tiny(folder / "model")
    learned = [row(f"say {number}", answer) for number, answer in enumerate(KNOWN)]
    held_out = [
        *learned,
        row("say", "one two three"),
        row("what", "Hello you"),
        row("say 7", "four five six"),
    ]
    train, rows = (
        write_rows(folder / "train.jsonl", learned),
        write_rows(folder / "rows.jsonl", held_out),
    )
    options = {"data__validation": rows, "data__packing": False, "data__global_batch_size": 4}
    options |= {
        "data__micro_batch_size": 4,
        "model__generation__max_new_tokens": 40,
        "model__optimizer__lr": 0.01,
    }
    options |= {"model__evaluation": {"metrics": ALL, "num_samples": 7}, "trainer__max_epochs": 60}
    options |= {"trainer__check_val_every_n_epoch": 30}
    run("fit", arguments(model, train, folder / "runs", **options))
    return folder


def validate(place, root, *args, command="validate"):
    """The scalars and the table of an evaluation of the learned weights."""
    hf = version(place / "runs") / "hf"
    own = [f"--trainer.default_root_dir={root}", f"--model.model_name_or_path={hf}", *args]
    options = {
        "model__evaluation": {"metrics": ALL, "num_samples": 7},
        "model__generation__max_new_tokens": 40,
    }
    rows = place / "rows.jsonl"
    base = arguments(str(hf), "none.jsonl", root, data__validation=rows, data__test=rows, **options)
    run(command, [*base, *own], subprocesses=any("devices=2" in arg for arg in args))
    with (version(root) / "metrics.csv").open() as file:
        (values,) = [
            {k: float(v) for k, v in line.items() if k.startswith(("val", "test"))}
            for line in csv.DictReader(file)
        ]
    return values, table(root)


def table(root):
    return [
        json.loads(line) for line in (version(root) / "evaluation.jsonl").read_text().splitlines()
    ]


def test_scores_of_a_fit(place):
    """Before, half way and after; four of seven answers are known in the end."""
    for name in SCORES:
        values = scalars(place / "runs", f"val/{name}")
        assert len(values) == 3 and all(0 <= value <= 1 for value in values), name
        assert values[0] < values[2], name
    assert scalars(place / "runs", "val/exact_match")[2] == pytest.approx(4 / 7)
    rows = table(place / "runs")
    assert [(line["step"], line["stage"], line["index"]) for line in rows] == [
        (step, "val", index) for step in (0, 30, 60) for index in range(7)
    ]
    assert rows[14:18] == [
        {
            "step": 60,
            "stage": "val",
            "index": n,
            "prompt": f"say {n}",
            "prediction": answer,
            "finish_reason": "stop",
            "reference": answer,
        }
        for n, answer in enumerate(KNOWN)
    ]


def test_test_has_its_own_names(place, tmp_path):
    values, rows = validate(place, tmp_path / "one", command="test")
    assert {f"test/{name}" for name in (*SCORES, "loss", "perplexity", "token_accuracy")} <= set(
        values
    )
    assert values["test/exact_match"] == pytest.approx(4 / 7) and rows[0]["stage"] == "test"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_score_as_one(place, tmp_path, strategy):
    """Seven rows: one rank has one fewer, and answers end at different steps."""
    values, rows = validate(place, tmp_path / "one")
    more = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    others, other_rows = validate(place, tmp_path / "two", *more)
    assert other_rows == rows and len(rows) == 7
    for name in SCORES:
        assert others[f"val/{name}"] == values[f"val/{name}"], name
    assert 0.5 < values["val/exact_match"] < 1
    assert others["val/loss"] == pytest.approx(values["val/loss"], rel=1e-5)


def test_the_table_in_tensorboard_is_bounded(place):
    events = EventAccumulator(str(version(place / "runs")), size_guidance={"tensors": 0}).Reload()
    texts = [
        e.tensor_proto.string_val[0].decode() for e in events.Tensors("evaluation/val/text_summary")
    ]
    assert (
        len(texts) == 3 and texts[2].count("| 你好 |") == 1 and len(texts[2].splitlines()) == 2 + 7
    )
    text = generation_metrics.markdown(
        [{"prompt": "p" * 9999, "prediction": "a" * 9999, "reference": "<b>"}] * 999
    )
    assert len(text.splitlines()) == 2 + generation_metrics.SHOWN_ROWS
    assert "&lt;b&gt;" in text and len(text) < 3 * generation_metrics.SHOWN_ROWS * (
        generation_metrics.SHOWN_CHARACTERS + 50
    )


def test_a_resumed_run_writes_its_rows_once(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    kept = {"step": 1, "stage": "val", "index": 0, "prediction": "one\u2028line\x85in JSON"}
    late, other = {"step": 2, "stage": "val", "index": 0}, {"step": 9, "stage": "test", "index": 0}
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (kept, late, other)]
    path.write_text("".join(lines) + '{"step": 3, "st')
    generation_metrics.append(path, [late], ("val", (2, math.inf)))
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [kept, other, late]


def test_an_older_checkpoint_that_is_scored_again_leaves_later_rows(place, tmp_path):
    folder = shutil.copytree(
        version(place / "runs"), tmp_path / "runs" / "lightning_logs" / "version_0"
    )
    before = table(tmp_path / "runs")
    steps = sorted(folder.glob("checkpoints/step=*.ckpt"))
    assert len(steps) == 2
    run("validate", [f"--ckpt_path={steps[0]}"])
    after = table(tmp_path / "runs")
    assert [line for line in before if line not in after] == [] and {
        line["step"] for line in before
    } == {0, 30, 60}
    assert len(after) == len(before) + 7  # of step 59


@pytest.mark.parametrize("every", [1, 2])
def test_scores_choose_the_best_and_stop_early(place, tmp_path, every):
    """Without learning the first score stays the best; what was not measured is no validation
    without improvement.
    """
    options = {
        "data__validation": place / "rows.jsonl",
        "model__optimizer__lr": 0.0,
        "trainer__max_epochs": 20,
    }
    options |= {
        "model__evaluation": {"metrics": ["chrf"], "num_samples": 3, "every_n_validations": every}
    }
    options |= {
        "early_stopping": {"monitor": "val/chrf", "patience": 2, "mode": "max"},
        "data__packing": False,
    }
    options |= {
        "checkpoint__monitor": "val/chrf",
        "checkpoint__mode": "max",
        "data__global_batch_size": 4,
    }
    run(
        "fit",
        arguments(str(place / "model"), str(place / "train.jsonl"), tmp_path / "runs", **options),
    )
    assert len(scalars(tmp_path / "runs", "val/loss")) == 1 + 2 * every
    assert len(scalars(tmp_path / "runs", "val/chrf")) == 1 + 3  # and before
    best = version(tmp_path / "runs") / "checkpoints" / "best.ckpt"
    assert best.resolve().name == "step=000001.ckpt"


@pytest.mark.parametrize(
    ("epochs", "validated", "scored", "when"),
    [(4, 2, 1, "after"), (5, 2, 1, "at step 4 of 5"), (4, 1, 2, "at step 3 of 4")],
)
def test_the_last_line_says_when_the_answers_were_scored(
    place, tmp_path, epochs, validated, scored, when
):
    """An epoch is one step; the newest scores may be of an earlier one."""
    options = {
        "data__validation": place / "rows.jsonl",
        "data__packing": False,
        "data__global_batch_size": 4,
    }
    options |= {
        "model__evaluation": {"num_samples": 2, "every_n_validations": scored},
        "trainer__max_epochs": epochs,
    }
    args = arguments(str(place / "model"), str(place / "train.jsonl"), tmp_path / "runs", **options)
    with log_lines() as lines:
        run("fit", [*args, f"--trainer.check_val_every_n_epoch={validated}"])
    assert f"val/exact_match: 0.0 % before, 0.0 % {when}" in lines


def bad(place, root, **options):
    return arguments(
        str(place / "model"),
        str(place / "train.jsonl"),
        root,
        data__validation=place / "rows.jsonl",
        **options,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"early_stopping__monitor": "val/exact"},
            "early_stopping.monitor val/exact is not logged .* val/bleu",
        ),
        ({"checkpoint__monitor": "val/bleau"}, "checkpoint.monitor val/bleau is not logged"),
        (
            {"early_stopping__monitor": "val/bleu"},
            "early_stopping.mode is min, but larger is better for val/bleu",
        ),
        ({"checkpoint__mode": "max"}, "checkpoint.mode is max, but smaller is better for val/loss"),
    ],
)
def test_monitors_and_expressions_that_cannot_be(place, tmp_path, capsys, options, words):
    options = {"model__evaluation": {"metrics": ["bleu"]}, **options}
    message = refused(capsys, "fit", bad(place, tmp_path / "runs", **options))
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (
            {"metrics": ["blue"]},
            "model.evaluation.metrics: there is no blue, only exact_match, rouge",
        ),
        ({"answer_regex": "(a"}, "model.evaluation.answer_regex '(a' does not compile: missing )"),
    ],
)
def test_what_cannot_be_computed(place, tmp_path, capsys, evaluation, words):
    assert words in refused(
        capsys, "fit", bad(place, tmp_path / "runs", model__evaluation=evaluation)
    )


def test_rows_without_references(place, tmp_path, capsys):
    """Refused where a metric was asked for; else said, and the run goes on."""
    rows = write_rows(tmp_path / "text.jsonl", [{"text": "one two three"}] * 4)
    texts = {"data__validation": rows, "data__max_samples": 4}
    asked = {"model__evaluation": {"metrics": ["exact_match"]}}
    args = arguments(str(place / "model"), rows, tmp_path / "runs", **texts, **asked)
    assert "ends with an answer to compare with; set model.evaluation to null" in refused(
        capsys, "fit", args
    )
    with log_lines() as lines:
        run(
            "fit",
            arguments(str(place / "model"), rows, tmp_path / "runs", **texts, model__evaluation={}),
        )
    assert sum("no answers are scored" in line for line in lines) == 1
    follow = {
        "model__evaluation": {},
        "early_stopping": {"monitor": "val/exact_match", "mode": "max"},
    }
    line = refused(
        capsys, "fit", arguments(str(place / "model"), rows, tmp_path / "runs", **texts, **follow)
    )
    assert line.startswith(
        "val/exact_match is monitored, but none of the first 4 rows of data.validation"
    ), line


def test_prompts_without_room_are_not_scored():
    prompts = [
        Prompt([5] * length, "x", "y", f"rows.jsonl line {length}") for length in (3, 90, 95)
    ]
    kept, message = choose_prompts(prompts, EvaluationOptions(), "data.test", 10, 100)
    assert kept == prompts[:2] and "1 of 3 prompts" in message and "rows.jsonl line 95" in message
    assert choose_prompts(prompts, EvaluationOptions(), "data.test", 10, None) == (prompts, "")


def test_references_that_are_longer_than_answers_are_counted():
    prompts = [Prompt([5], "x", "y", "row", length) for length in (3, 10, 11, 12)] + [
        Prompt([5], "x", None, "row")
    ]
    assert too_long_to_match(prompts, "data.test", 12) == ""
    said = too_long_to_match(prompts, "data.test", 10)
    assert said.startswith(
        "data.test: answers are cut at 10 tokens, and 2 of 4 references are longer (the"
        " longest: 12)"
    )


def test_a_mixture_is_asked_in_proportion_and_long_references_are_told(place, tmp_path):
    """Untrained answers are no references; nothing says that rows were left out by
    data.max_samples.
    """
    held_out = [[row(f"{name} {n}", "one two three") for n in range(8)] for name in ("A", "B")]
    held_out[1][0]["messages"][-1]["weight"] = 0
    paths = [write_rows(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate(held_out)]
    options = {
        "data__test": paths,
        "model__evaluation": {"num_samples": 4},
        "model__generation__max_new_tokens": 2,
    }
    with log_lines() as lines:
        run("test", arguments(str(place / "model"), "none.jsonl", tmp_path / "runs", **options))
    rows = table(tmp_path / "runs")
    assert [(line["index"], line["prompt"]) for line in rows] == [
        (0, "A 0"),
        (1, "A 1"),
        (2, "B 0"),
        (3, "B 1"),
    ]
    assert [line.get("reference") for line in rows] == [
        "one two three",
        "one two three",
        None,
        "one two three",
    ]
    assert sum("cut at 2 tokens, and 3 of 3 references are longer" in line for line in lines) == 1
    assert not any("max_samples" in line for line in lines)


@pytest.mark.parametrize("wrong", [{"num_samples": 0}, {"every_n_validations": 0}, {"metrics": []}])
def test_wrong_options(wrong):
    with pytest.raises(UserError, match=f"model.evaluation.{next(iter(wrong))}"):
        EvaluationOptions(**wrong)


def test_training_goes_on_as_without_evaluation(tmp_path):
    """Answers leave weights, modes and random state as they were."""
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", chat_rows(12))
    losses = []
    for number, evaluation in enumerate((None, {"metrics": ["token_f1"], "num_samples": 3})):
        root = tmp_path / f"runs{number}"
        options = {
            "data__val_size": 4,
            "data__global_batch_size": 4,
            "trainer__max_epochs": 2,
            "data__packing": False,
        }
        options |= {
            "model__lora": {"r": 2, "lora_dropout": 0.5},
            "trainer__precision": "bf16-mixed",
        }
        run("fit", arguments(model, rows, root, model__evaluation=evaluation, **options))
        losses.append(scalars(root, "train/loss"))
    assert losses[0] == losses[1]


def test_a_table_that_was_torn_within_a_character_goes_on(tmp_path):
    """By a kill: only the last line is lost."""
    path = tmp_path / "evaluation.jsonl"
    generation_metrics.append(path, [{"step": 1, "stage": "val", "prompt": "什么"}], None)
    path.write_bytes(path.read_bytes() + '{"step": 2, "prompt": "什'.encode()[:-1])
    generation_metrics.append(path, [{"step": 2, "stage": "val", "prompt": "b"}], ("val", (2, 2)))
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [
        1,
        2,
    ]
