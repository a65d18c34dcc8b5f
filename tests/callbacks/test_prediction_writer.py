"""A predict that was killed goes on: the same file as if it never was, on any number of ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from running import REPOSITORY, arguments, chat_rows, environment, run, version, write_rows
from terminal import log_lines, refused
from tiny import save_tiny, tiny_llama

from lit_sft.generation import prompts
from lit_sft.model_builder import fingerprint
from lit_sft.module import SFTModule

ROWS = 400


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random model, its prompts, and the file of a predict that nothing disturbed."""
    folder = tmp_path_factory.mktemp("predictions")
    save_tiny(folder / "model"), write_rows(folder / "rows.jsonl", chat_rows(ROWS))
    predict(folder, folder / "whole.jsonl")
    return folder


def command(place, output, *args):
    rows = str(place / "rows.jsonl")
    base = arguments(
        str(place / "model"),
        rows,
        place / "runs",
        data__predict=rows,
        model__generation__max_new_tokens=40,
    )
    return [*base, f"--predict_output={output}", *args]


def predict(place, output, *args):
    with log_lines() as lines:
        run(
            "predict",
            command(place, output, *args),
            subprocesses=any("devices=2" in arg for arg in args),
        )
    return lines


def parts(output):
    return sorted(output.parent.glob(f".{output.name}.part*"))


def kill(place, output, *args):
    """Starts a predict, and kills all of its processes once some rows are written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_sft", "predict", *command(place, output, *args)],
        cwd=REPOSITORY,
        env=environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not any(path.read_bytes().count(b"\n") > 1 for path in parts(output)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()


def test_a_killed_predict_goes_on(place, tmp_path):
    """Also where the last line was torn."""
    output = tmp_path / "out.jsonl"
    kill(place, output)
    with parts(output)[0].open("a") as file:
        file.write('{"index": 5, "promp')
    lines = predict(place, output)
    assert any("predict goes on: " in line and f"of {ROWS} prompts" in line for line in lines)
    assert output.read_bytes() == (place / "whole.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_killed_ranks_go_on(place, tmp_path, ranks):
    """On two ranks, or on another number of them."""
    output, two = tmp_path / "out.jsonl", ("--trainer.devices=2", "--trainer.strategy=ddp")
    kill(place, output, *two)
    assert len(parts(output)) == 2
    predict(place, output, *(two if ranks == 2 else ()))
    assert output.read_bytes() == (place / "whole.jsonl").read_bytes()


def leave_parts(place, output, indices):
    """What a killed predict would leave: the head that it really writes, and some rows."""
    folder = output.parent
    folder.mkdir()
    kept = [json.loads(line) for line in (place / "whole.jsonl").read_text().splitlines()]
    head = heads(place, output)
    marked = [{**kept[index], "prediction": f"kept {index}"} for index in indices]
    half = len(marked) // 2
    for rank, rows in enumerate((marked[:half], marked[half:])):
        (folder / f".{output.name}.part{rank}").write_text(
            head + "".join(json.dumps(row) + "\n" for row in rows)
        )


def heads(place, output, *args):
    """The first line of the parts of a predict that fails before its first row."""
    from lit_sft.module import SFTModule

    def fail(*args):
        raise RuntimeError("stopped")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(SFTModule, "predict_step", fail)
        predict(place, output, *args)
    (part,) = parts(output)
    head = part.read_text()
    part.unlink()
    assert head.count("\n") == 1
    return head


def test_rows_that_are_there_are_not_answered_again(place, tmp_path):
    """They keep their text; whole batches are left out, and all is merged where nothing is left to
    do.
    """
    output = tmp_path / "new" / "out.jsonl"
    leave_parts(place, output, range(0, ROWS, 2))
    predict(place, output)
    whole = [json.loads(line) for line in (place / "whole.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["prediction"] for r in found[::2]] == [f"kept {index}" for index in range(0, ROWS, 2)]
    assert found[1::2] == whole[1::2]
    shutil.rmtree(output.parent)
    leave_parts(place, output, range(ROWS))
    predict(place, output)
    assert len(output.read_text().splitlines()) == ROWS and "kept 399" in output.read_text()


@pytest.mark.parametrize(
    "other",
    ["--model.generation.max_new_tokens=5", "--data.max_samples=399", "--seed_everything=3"],
)
def test_parts_of_other_settings_are_not_used(place, tmp_path, other):
    output = tmp_path / "new" / "out.jsonl"
    leave_parts(place, output, range(ROWS))
    lines = predict(place, output, other)
    assert sum("of other prompts or settings: started anew" in line for line in lines) == 1
    assert "kept" not in output.read_text() and parts(output) == []


def test_parts_of_another_checkpoint_are_not_used(place, tmp_path):
    """Of the same run and settings, for the same prompts and file."""
    args = arguments(
        str(place / "model"), str(place / "rows.jsonl"), tmp_path / "runs", trainer__max_steps=2
    )
    run("fit", [*args, "--checkpoint.every_n_train_steps=1", "--data.max_samples=40"])
    saved = sorted((version(tmp_path / "runs") / "checkpoints").glob("step=*.ckpt"))
    assert len(saved) == 2
    output, (first, second) = tmp_path / "out", (f"--ckpt_path={path}" for path in saved)
    assert (
        heads(place, output, first) == heads(place, output, first) != heads(place, output, second)
    )


def test_a_file_whose_name_is_a_pattern(place, tmp_path):
    predict(place, tmp_path / "out[1].jsonl")
    assert (tmp_path / "out[1].jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()


def test_several_answers(place, tmp_path):
    """One line per row; drawn anew they are the same."""
    more = (
        "--data.max_samples=9",
        "--model.generation.do_sample=true",
        "--model.generation.num_return_sequences=3",
    )
    for name in ("one.jsonl", "two.jsonl"):
        predict(place, tmp_path / name, *more)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(9))
    assert all(
        len(r["predictions"]) == 3 and r["predictions"][0] == r["prediction"] for r in records
    )
    assert any(len(set(r["predictions"])) == 3 for r in records)


def test_a_prompt_longer_than_the_context(place, tmp_path, capsys):
    """Known before the first answer, with its row."""
    long = {"messages": [{"role": "user", "content": "abc " * 300}]}
    rows = write_rows(tmp_path / "rows.jsonl", [*chat_rows(2), long])
    output = tmp_path / "out.jsonl"
    message = refused(capsys, "predict", command(place, output, f"--data.predict={rows}"))
    assert "rows.jsonl line 3: a prompt of " in message and "context of 256 tokens" in message
    assert not output.exists() and parts(output) == []


def test_an_adapter_directory_answers_as_its_run(place, tmp_path):
    """By the name of its directory; its base is found through it, and the tokenizer may be the
    base's.
    """
    questions = ["abc", "what is it"]
    lora = {
        "model__lora": {"r": 4},
        "model__optimizer__lr": 0.05,
        "trainer__max_epochs": 3,
        "data__max_samples": 40,
    }
    run(
        "fit", arguments(str(place / "model"), str(place / "rows.jsonl"), tmp_path / "runs", **lora)
    )
    folder = version(tmp_path / "runs")
    asked = f"--data.predict={json.dumps(questions)}"
    run(
        "predict",
        [
            f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}",
            asked,
            f"--predict_output={tmp_path / 'a'}",
        ],
    )
    (folder / "hf" / "tokenizer.json").unlink(), (folder / "hf" / "tokenizer_config.json").unlink()
    for name, model in (("b", folder / "hf"), ("c", place / "model")):
        args = arguments(str(model), "none", tmp_path / "other", data__predict=questions)
        run("predict", [*args, f"--predict_output={tmp_path / name}"])
    ours, by_name, base = ((tmp_path / name).read_text() for name in "abc")
    assert ours == by_name != base


def test_other_weights_of_an_adapters_base_are_other_answers(place, tmp_path):
    base = save_tiny(tmp_path / "base")
    lora = {"model__lora": {"r": 4}, "data__max_samples": 8}
    run("fit", arguments(base, str(place / "rows.jsonl"), tmp_path / "runs", **lora))
    options = SFTModule(str(version(tmp_path / "runs") / "hf")).options
    before = fingerprint(options, "32-true", None)
    assert before == fingerprint(options, "32-true", None)
    save_tiny(base, tiny_llama(seed=7))
    assert before != fingerprint(options, "32-true", None)


def test_an_adapter_whose_base_is_gone(place, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "./gone"}'
    )
    args = arguments(str(tmp_path / "adapter"), "none", tmp_path / "runs", data__predict=["x"])
    message = refused(capsys, "predict", args)
    assert "adapter: base_model_name_or_path: there is no directory ./gone" in message


def test_batches_are_full_and_spread_evenly(monkeypatch):
    """By tokens and by number; every prompt once, as many batches on each rank, the same whatever
    is done already.
    """
    from lit_sft.model.generate import GenerationOptions

    monkeypatch.setattr(prompts, "TOKENS_PER_BATCH", 300)
    asked = [prompts.Prompt([7] * (n % 13 + 1), str(n), None, "") for n in range(101)]
    options = GenerationOptions(max_new_tokens=7)
    for world_size in (1, 2, 3):
        of_ranks = [
            prompts.make_batches(asked, options, 0, rank, world_size) for rank in range(world_size)
        ]
        assert len({len(batches) for batches in of_ranks}) == 1
        batches = [batch for rank in of_ranks for batch in rank]
        assert sorted(i for batch in batches for i in batch["index"] if i >= 0) == list(range(101))
        assert all(len(b["texts"]) * (b["input_ids"].shape[1] + 7) <= 300 for b in batches)
        assert sum(len(b["texts"]) for b in batches) / len(batches) > 15
        again = []
        for rank in range(world_size):
            again += prompts.make_batches(asked, options, 0, rank, world_size, done={5, 50})
        assert sorted(i for batch in again for i in batch["index"] if i >= 0) == sorted(
            set(range(101)) - {5, 50}
        )
    spread = prompts.make_batches(
        asked[:4], options, 0, 0, 2
    )  # a small set is spread over the ranks
    assert len(spread[0]["texts"]) == 2
    assert prompts.make_batches([], options, 0) == []
