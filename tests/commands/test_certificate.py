"""`preview --certify`: which shapes of rows can be trained with a tokenizer and its chat template."""

import json

import pytest
from chat_templates import FAMILIES, byte_tokenizer
from rich.console import Console
from running import arguments, run, write_rows
from terminal import refused

from lit_sft import console
from lit_sft.cli.arguments import expand_arguments
from lit_sft.commands.certificate import certify
from lit_sft.commands.preview import preview
from lit_sft.data.row_shapes import ROW_SHAPES
from lit_sft.datamodule import SFTDataModule


@pytest.fixture
def model_of(tmp_path):
    """A directory with the tokenizer and the template of a family, and nothing else."""

    def make(family):
        folder = tmp_path / family
        byte_tokenizer(FAMILIES[family]).save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        return str(folder)

    return make


def data_of(model, **settings):
    return SFTDataModule(**{"train": "nowhere.jsonl", "model_name_or_path": model, **settings}).data


def certificate(capsys, model, **settings):
    """The one object on stdout, and its results by their shape."""
    capsys.readouterr()
    certify(data_of(model, **settings), "json")
    found = json.loads(capsys.readouterr().out)
    assert [result["shape"] for result in found["results"]] == list(ROW_SHAPES)
    return found, {result["shape"]: result for result in found["results"]}


def test_a_template_that_rewrites_history(model_of, capsys):
    found, results = certificate(capsys, model_of("qwen3"))
    assert found["stop_tokens"] == ["<|im_end|>"]
    assert found["before_answer"] == "<|im_end|>\n<|im_start|>assistant\n"
    assert "refused" not in {result["verdict"] for result in results.values()}
    assert results["single"]["verdict"] == "proved" and results["single"]["examples"] == 1
    expanded = results["reasoning, multi-turn"]
    assert expanded["verdict"] == "expanded" and expanded["examples"] == 2
    assert any("one example per assistant turn" in note for note in expanded["notes"])
    alike = ("call", "arguments as JSON text")
    assert len({results[shape]["trained_tokens"] for shape in alike}) == 1


def test_a_template_without_calls_and_reasoning(model_of, capsys):
    _, results = certificate(capsys, model_of("chatml"))
    calling = {shape for shape, row in ROW_SHAPES.items() if "tool_calls" in json.dumps(row)}
    refusals = {shape for shape, result in results.items() if result["verdict"] == "refused"}
    assert refusals == calling
    for shape in refusals:
        assert "does not write" in results[shape]["reason"]
        assert results[shape]["trained_tokens"] == 0
    assert any("not trained" in note for note in results["reasoning"]["notes"])


def test_stops_of_calls_and_answers(model_of, capsys):
    found, _ = certificate(capsys, model_of("gpt-oss"))
    assert set(found["stop_tokens"]) == {"<|return|>", "<|call|>"}


def test_settings_of_the_run(model_of, capsys):
    model = model_of("deepseek-r1")
    _, results = certificate(capsys, model)
    assert results["single"]["verdict"] == "refused"
    _, results = certificate(capsys, model, unproved="lenient")
    assert results["single"]["verdict"] == "lenient"
    _, plain = certificate(capsys, model, chat_template="raw")
    assert plain["single"]["verdict"] == "proved"
    _, longer = certificate(capsys, model, chat_template="raw", system_prompt="Be brief.")
    assert longer["single"]["tokens"] > plain["single"]["tokens"]
    _, last = certificate(capsys, model_of("qwen3"), train_on="last_completion")
    assert last["multi-turn"]["verdict"] == "proved"


@pytest.mark.parametrize("family", ["chatml", "qwen3", "gpt-oss", "deepseek-v3"])
def test_the_rows_themselves_come_out_as_certified(family, model_of, tmp_path, capsys):
    """The same rows as data: `preview` shows the same examples, or leaves them out."""
    model = model_of(family)
    _, results = certificate(capsys, model)
    rows = write_rows(tmp_path / "rows.jsonl", [result["row"] for result in results.values()])
    data = data_of(model, train=rows, on_bad_row="skip", max_length=10_000)
    preview(data, 99, "json")
    examples = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    for index, result in enumerate(results.values()):
        own = [example for example in examples if example["row"] == index]
        assert len(own) == result["examples"]
        assert sum(len(example["input_ids"]) for example in own) == result["tokens"]
        assert sum(sum(example["loss_mask"]) for example in own) == result["trained_tokens"]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("family", ["chatml", "qwen3", "deepseek-r1"])
def test_the_table_fits_the_terminal(width, family, model_of, capsys, monkeypatch):
    monkeypatch.setattr(console, "console", lambda: Console(width=width))
    certify(data_of(model_of(family)), "rich")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out
    words = " ".join(out.split())
    assert "stop tokens" in words and "before an answer" in words
    if width >= 80:
        for shape in ROW_SHAPES:
            assert any(shape in line for line in lines)


def test_reasons_stand_below_the_table_once(model_of, capsys):
    certify(data_of(model_of("chatml")), "rich")
    out = capsys.readouterr().out
    assert " ".join(out.split()).count("turn 2 (assistant) calls 'get_weather'") == 1
    assert out.rstrip().endswith("14 proved, 1 expanded, 10 refused")


def test_a_number_of_rows_is_refused(capsys):
    args = ["--config", "demo", "--certify", "--num_rows", "2"]
    assert refused(capsys, "preview", args).startswith("--num_rows chooses rows of the data")


def test_the_command_reads_no_data(model_of, tmp_path, capsys):
    args = arguments(model_of("chatml"), str(tmp_path / "nowhere.jsonl"), tmp_path / "runs")
    run("preview", [*args, "--certify", "--output", "json"])
    assert json.loads(capsys.readouterr().out)["results"]
    assert not (tmp_path / "runs").exists()
    wrong = [*args, "--certify", "--data.chat_template={% for %}"]
    assert "syntax error" in refused(capsys, "preview", wrong)


def test_the_flag_needs_no_value():
    flags = ["--certify", "--output", "json"]
    assert expand_arguments(["preview", *flags]) == ["preview", "--certify=true", *flags[1:]]
    assert expand_arguments(["preview", "--certify"]) == ["preview", "--certify=true"]
    for value in ("true", "false"):
        given = ["preview", "--certify", value]
        assert expand_arguments(given) == given
