"""`predict`: every prompt answered once, in input order, on any number of ranks; an answer ends
where a turn does.
"""

import json

import lightning as L
import pytest
import torch
from running import arguments, chat_rows, run, version, write_rows
from terminal import log_lines, refused
from tiny import save_tiny, tiny_tokenizer

from lit_sft.datamodule import SFTDataModule
from lit_sft.generation import prompts
from lit_sft.model.generate import GenerationOptions
from lit_sft.module import SFTModule

ANSWERS = {  # of different lengths, so that batches are padded and answers end at different steps
    "say a": "a",
    "count": "one two three four five six",
    "hello, how are you today?": "fine",
    "x": "Hello world",
    "what is the difference between a thread and a process?": "memory",
    "你好": "你好",
    "Calculate 1+1-1": "1+1=2, 2-1=1",
}
ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in ANSWERS.items()
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that has learned seven rows by heart; its eos is not the end of a turn."""
    folder = tmp_path_factory.mktemp("predict")
    model, rows = save_tiny(folder / "model"), write_rows(folder / "rows.jsonl", ROWS)
    learn = {"model__optimizer__lr": 0.01, "trainer__max_epochs": 60, "data__packing": False}
    run(
        "fit",
        arguments(
            model,
            rows,
            folder / "runs",
            data__global_batch_size=7,
            data__micro_batch_size=7,
            **learn,
        ),
    )
    return folder


def predict(place, output, *args, subprocesses=False):
    """The records that a prediction with the learned model writes."""
    ckpt = version(place / "runs") / "checkpoints" / "last.ckpt"
    more = [
        f"--ckpt_path={ckpt}",
        f"--predict_output={output}",
        "--model.generation.max_new_tokens=40",
        *args,
    ]
    run("predict", more, subprocesses=subprocesses)
    return read(output)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_once_in_order_with_its_reference(place, tmp_path):
    """Answers equal what was learned, so they also end where a turn ends, and not at the base's
    eos.
    """
    records = predict(
        place, tmp_path / "new" / "out.jsonl", f"--data.predict={place / 'rows.jsonl'}"
    )
    assert records == [
        {
            "index": index,
            "prompt": prompt,
            "prediction": answer,
            "finish_reason": "stop",
            "reference": answer,
        }
        for index, (prompt, answer) in enumerate(ANSWERS.items())
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [
        "out.jsonl"
    ]  # no parts are left


def test_two_ranks_write_the_same_file(place, tmp_path):
    """Seven rows on two ranks."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    rows = f"--data.predict={place / 'rows.jsonl'}"
    predict(place, one, rows)
    predict(place, two, rows, "--trainer.devices=2", "--trainer.strategy=ddp", subprocesses=True)
    assert len(read(one)) == 7
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]


def test_batched_text_equals_text_one_by_one(tmp_path, monkeypatch):
    """Left padding changes nothing; a random model shows it better than a trained one."""
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", chat_rows(37))
    args = arguments(
        model,
        rows,
        tmp_path / "runs",
        data__predict=rows,
        model__generation__max_new_tokens=12,
        data__max_length=512,
    )
    run("predict", [*args, f"--predict_output={tmp_path / 'batched.jsonl'}"])
    monkeypatch.setattr(prompts, "PROMPTS_PER_BATCH", 1)
    run("predict", [*args, f"--predict_output={tmp_path / 'alone.jsonl'}"])
    records = read(tmp_path / "batched.jsonl")
    assert [record["index"] for record in records] == list(range(37))
    assert len({record["prediction"] for record in records}) > 30
    assert records == read(tmp_path / "alone.jsonl")


def test_a_list_of_questions(place, tmp_path):
    records = predict(place, tmp_path / "out.jsonl", '--data.predict=["x", "count"]')
    assert records == [
        {"index": 0, "prompt": "x", "prediction": ANSWERS["x"], "finish_reason": "stop"},
        {"index": 1, "prompt": "count", "prediction": ANSWERS["count"], "finish_reason": "stop"},
    ]


def test_an_answer_that_is_cut_says_so(place, tmp_path):
    """The cut text is a beginning of the whole one; an answer that just fits has ended."""
    asked = '--data.predict=["count", "x"]'
    whole = predict(place, tmp_path / "whole.jsonl", asked)
    cut = predict(place, tmp_path / "cut.jsonl", asked, "--model.generation.max_new_tokens=3")
    assert [record["finish_reason"] for record in whole] == ["stop", "stop"]
    assert [record["finish_reason"] for record in cut] == ["length", "length"]
    for short, long in zip(cut, whole, strict=True):
        assert long["prediction"].startswith(short["prediction"])


def test_a_plain_trainer_returns_rows_with_their_number(place):
    """They come in batches of similar length, with the index of the row."""
    module = SFTModule(str(place / "model"), generation=GenerationOptions(max_new_tokens=2))
    data = SFTDataModule(
        model_name_or_path=str(place / "model"),
        predict=str(place / "rows.jsonl"),
        cache_dir=str(place / "cache"),
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    batches = trainer.predict(module, data)
    records = [record for batch in batches for record in batch]
    assert [record["prompt"] for record in records] != list(ANSWERS)
    records.sort(key=lambda record: record["index"])
    assert [record["prompt"] for record in records] == list(ANSWERS)


def test_the_plain_chat_template_is_told(tmp_path, caplog):
    """Once, with the remedy; a template that is set is not."""
    model = save_tiny(tmp_path / "model", tokenizer=tiny_tokenizer(chat_template=None))
    caplog.set_level("INFO", logger="lit_sft")
    settings = {"model_name_or_path": model, "cache_dir": str(tmp_path), "predict": ["x"]}
    with log_lines() as lines:
        SFTDataModule(**settings).data.asked_by_predict()
        SFTDataModule(chat_template="raw", **settings).data.asked_by_predict()
    [line] = [line for line in lines if line.startswith("chat template: ")]
    assert "`Assistant:`, and <|endoftext|> ends an answer" in line
    assert "set data.chat_template to the path of a .jinja file" in line


def test_the_questions_where_nothing_else_is_asked(place, tmp_path):
    records = predict(place, tmp_path / "out.jsonl", '--data.questions=["say a"]')
    assert records == [{"index": 0, "prompt": "say a", "prediction": "a", "finish_reason": "stop"}]


@pytest.mark.parametrize("key", ["questions", "predict"])
def test_a_question_is_asked_as_rows_are_trained(key, place, tmp_path):
    """In the template, if it has one field; else it is said, once."""
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"question": "a {x}", "context": "b", "answer": "c"}]
    )
    settings = {
        "model_name_or_path": str(place / "model"),
        "cache_dir": str(tmp_path),
        "chat_template": "raw",
    }

    def ask(template):
        data = SFTDataModule(
            train=rows, prompt_template=template, **settings, **{key: ["a {x}"]}
        ).data
        data.prepare("fit")
        with log_lines() as lines:
            asked, again = [
                data.asked_by_predict() if key == "predict" else data.questions() for _ in range(2)
            ]
        ids = data.caches["train"][0][0].tolist()
        assert asked == again
        return (
            [ids[: len(prompt.ids)] == prompt.ids for prompt in asked],
            [prompt.text for prompt in asked],
            lines,
        )

    assert ask("Question: {question}\nAnswer: ") == ([True], ["Question: a {x}\nAnswer: "], [])
    _, texts, lines = ask("{context} {question}")
    assert texts == ["a {x}"]
    assert lines == [
        f"data.{key}: not asked as rows are trained: data.prompt_template has more fields than one"
    ]


def test_rows_without_answer_and_rows_of_several_turns(place, tmp_path):
    """The last user turn is asked; what stood before it is read."""
    user = [{"role": "user", "content": "x"}]
    rows = [{"messages": user}, {"messages": [*ROWS[0]["messages"], *ROWS[1]["messages"]]}]
    records = predict(
        place, tmp_path / "out.jsonl", f"--data.predict={write_rows(tmp_path / 'rows.jsonl', rows)}"
    )
    assert records[0] == {
        "index": 0,
        "prompt": "x",
        "prediction": ANSWERS["x"],
        "finish_reason": "stop",
    }
    assert records[1]["prompt"] == "count" and records[1]["reference"] == ANSWERS["count"]


def test_max_samples(place, tmp_path):
    """What it leaves out is said."""
    with log_lines() as lines:
        asked = f"--data.predict={place / 'rows.jsonl'}"
        records = predict(place, tmp_path / "out.jsonl", asked, "--data.max_samples=2")
    assert (
        sum(line.endswith("rows.jsonl: the first 2 of 7 rows (data.max_samples)") for line in lines)
        == 1
    )
    assert [record["index"] for record in records] == [0, 1]


def test_the_file_lies_in_the_folder_of_the_run(place):
    """Written anew by the next prediction; the run's metrics, config and checkpoints stay."""
    folder = version(place / "runs")
    metrics, config = (folder / "metrics.csv").read_bytes(), (folder / "config.yaml").read_bytes()
    for question in ("x", "count"):
        run(
            "predict",
            [
                f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}",
                f'--data.predict=["{question}"]',
            ],
        )
        assert [record["prompt"] for record in read(folder / "predictions.jsonl")] == [question]
    assert ((folder / "metrics.csv").read_bytes(), (folder / "config.yaml").read_bytes()) == (
        metrics,
        config,
    )
    assert not version(place / "runs", 1).exists()


def test_without_a_checkpoint_the_base_answers(place, tmp_path):
    run(
        "predict",
        arguments(str(place / "model"), "none.jsonl", tmp_path / "runs", data__predict=["x"]),
    )
    records = read(version(tmp_path / "runs") / "predictions.jsonl")
    assert len(records) == 1 and records[0]["prediction"] != ANSWERS["x"]


def test_nothing_to_predict(place, tmp_path, capsys):
    args = arguments(str(place / "model"), "none.jsonl", tmp_path / "runs")
    assert "data.predict" in refused(capsys, "predict", args)
    assert "gone.jsonl" in refused(capsys, "predict", [*args, "--data.predict=gone.jsonl"])


def test_plain_transformers_stops_at_the_same_place(place):
    """What was exported knows the template's end of turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = version(place / "runs") / "hf"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    base_eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for question, answer in ANSWERS.items():
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
        assert tokenizer.decode(output, skip_special_tokens=True) == answer
        assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") != base_eos
