"""`doctor`: what it reports about rows that are known, and what it fails on."""

import json
from types import SimpleNamespace

import psutil
import pytest
from running import arguments, run, write_rows
from terminal import log_lines, refused
from tiny import save_tiny

from lit_sft.memory_plan import Plan

KEYS = [
    "rows_read", "rows_kept", "dropped", "trained_token_share", "stop_tokens", "duplicates", "overlap", "pack_fill",
    "steps_per_epoch", "tokens_per_step", "memory", "warnings", "errors",
]  # fmt: skip


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


ROWS = [
    chat("Hello", "world"),
    chat("Hello", "world"),
    chat("Is it?", "fine"),
    chat("long", "What is it? " * 60),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("doctor") / "model")


def doctor(capsys, args):
    """(exit code, what it printed)"""
    capsys.readouterr()
    with log_lines(), pytest.raises(SystemExit) as caught:
        run("doctor", args)
    return caught.value.code, capsys.readouterr().out


def test_the_report_has_exactly_its_keys_and_counts_every_row(model, tmp_path, capsys):
    train, validation = (
        write_rows(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((ROWS, ROWS[1:3]))
    )
    args = arguments(model, train, tmp_path / "runs", data__validation=validation)
    code, out = doctor(capsys, [*args, "--output=json"])
    report = json.loads(out)
    assert code == 0 and list(report) == KEYS and report["errors"] == []
    assert (report["rows_read"], report["rows_kept"], sum(report["dropped"].values())) == (4, 3, 1)
    assert (report["duplicates"], report["overlap"], report["stop_tokens"]) == (
        1,
        2,
        ["<|im_end|>"],
    )
    assert (
        report["steps_per_epoch"] == 1
        and 0 < report["pack_fill"] < 1
        and 0 < report["trained_token_share"] < 1
    )
    assert {
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "total",
        "available",
    } == set(report["memory"])
    assert any("exact copies" in text for text in report["warnings"])
    assert any("in the training set too" in text for text in report["warnings"])
    assert any("pad and eos are one token" in text for text in report["warnings"])


def test_people_can_read_it(model, tmp_path, capsys):
    code, out = doctor(
        capsys, arguments(model, write_rows(tmp_path / "a.jsonl", ROWS), tmp_path / "runs")
    )
    assert code == 0 and "ready to run" in out
    for words in (
        "rows read",
        "longer than data.max_length 128",
        "GiB weights",
        "tokens \u2588",
        "two steps",
        "warning: ",
    ):
        assert words in out, words


def test_an_optimizer_of_eight_bits_is_expected_to_take_less(model, tmp_path, capsys):
    rows = write_rows(tmp_path / "a.jsonl", ROWS)
    settings = {"model__optimizer": "bitsandbytes.optim.AdamW8bit"}
    _, out = doctor(
        capsys, [*arguments(model, rows, tmp_path / "runs", **settings), "--output=json"]
    )
    expected = json.loads(out)["memory"]
    assert expected["optimizer"] / expected["gradients"] == pytest.approx(2 / 4, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"model__trainable": ["lm_head"]}, 320 * 32),
        ({"model__lora": {"r": 2, "target_modules": ["q_proj"]}}, 2 * 2 * (32 + 32)),
        (
            {"model__lora": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
            2 * 2 * (32 + 32) + 320 * 32,
        ),
    ],
    ids=str,
)
def test_what_is_trained_is_counted(settings, trained, model, tmp_path, capsys):
    rows = write_rows(tmp_path / "a.jsonl", ROWS)
    code, out = doctor(
        capsys, [*arguments(model, rows, tmp_path / "runs", **settings), "--output=json"]
    )
    expected = json.loads(out)["memory"]
    assert (
        code == 0 and expected["gradients"] == 4 * trained and expected["optimizer"] == 8 * trained
    )


@pytest.mark.parametrize("output", ["rich", "json"])
def test_an_error_is_exit_code_1_and_a_remedy(output, model, tmp_path, capsys):
    rows = write_rows(tmp_path / "a.jsonl", [ROWS[0], {"messages": []}])
    code, out = doctor(capsys, [*arguments(model, rows, tmp_path / "runs"), f"--output={output}"])
    assert (
        code == 1
        and "a.jsonl line 2" in out.replace("\n", "")
        and "remove the row" in out.replace("\n", " ")
    )
    assert "ready" not in out
    if output == "json":
        assert list(json.loads(out)) == KEYS and json.loads(out)["rows_read"] is None


def test_a_model_that_fits_in_shards_only(model, tmp_path, capsys, monkeypatch):
    """What is expected is that of each device of the run; a batch that would not come out even is
    found, too.
    """
    rows, runs = write_rows(tmp_path / "a.jsonl", ROWS), tmp_path / "runs"

    def report(**settings):
        code, out = doctor(capsys, [*arguments(model, rows, runs, **settings), "--output=json"])
        return code, json.loads(out)

    sharded = {"trainer__devices": 4, "trainer__strategy": "fsdp2"}
    (_, alone), (code, each) = report(), report(**sharded)
    assert code == 0 and each["warnings"] == alone["warnings"]
    assert each["memory"]["optimizer"] == alone["memory"]["optimizer"] // 4
    assert each["memory"]["total"] < alone["memory"]["total"]
    between = (alone["memory"]["total"] + each["memory"]["total"]) // 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=between))
    code, small = report()
    assert code == 1 and "trainer.strategy to fsdp2" in small["errors"][0]
    code, small = report(**sharded)
    assert code == 0 and "no step was tried" in small["warnings"][-1] and not small["errors"]
    code, uneven = report(trainer__devices=3, trainer__strategy="ddp")
    assert code == 1 and "x 3 devices" in uneven["errors"][0]


@pytest.mark.parametrize(
    ("devices", "per_node"),
    [(8, 8), ("8", 8), ("auto", 2), (-1, 2), ([0, 3], 2), ("0,1,2", 3), ("0,", 1)],
    ids=str,
)
def test_devices_of_a_plan(devices, per_node):
    assert Plan.of_settings(devices, 3, "ddp", present=2) == Plan(3 * per_node, sharded=False)
    assert Plan.of_settings(
        devices, 1, {"class_path": "lit_sft.distributed.fsdp2.FSDP2Strategy"}, 2
    ).sharded


def test_devices_that_are_no_number(model, tmp_path, capsys):
    args = arguments(
        model, write_rows(tmp_path / "a.jsonl", ROWS), tmp_path / "runs", trainer__devices="many"
    )
    assert refused(capsys, "doctor", args).startswith(
        "trainer.devices is many; set it to auto, a number"
    )


def test_two_bos_are_an_error(tmp_path, capsys):
    from tiny import CHATML, tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer(
        bos_token="<|bos|>", chat_template="{{ bos_token }}{{ bos_token }}" + CHATML
    )
    model = save_tiny(tmp_path / "model", tiny_llama(len(tokenizer)), tokenizer)
    code, out = doctor(
        capsys, arguments(model, write_rows(tmp_path / "a.jsonl", ROWS), tmp_path / "runs")
    )
    assert code == 1 and "two BOS" in out
