"""The built-in model and task: right answers, splits that share no prompt, and a run that learns
them.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from running import REPOSITORY, environment, scalars

from lit_sft.demo import builtin as demo
from lit_sft.errors import UserError
from lit_sft.generation.text_metrics import exact_match, extract_answer

RUNS = REPOSITORY / "lightning_logs"
SPLITS = ("train", "validation", "test")
CONFIG = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
ANSWER_REGEX = CONFIG["model"]["evaluation"]["answer_regex"]
CALCULATION = re.compile(r"Calculate (\d)([+-])(\d)([+-])(\d)")
COURSE = {
    "Give me an 1-sentence introduction of LLM.",
    "What's the difference between thread and process?",
}


@pytest.fixture(scope="module")
def splits():
    """Prompt and answer of every row, by split."""
    return {
        s: [tuple(m["content"] for m in row["messages"]) for row in demo.rows("arithmetic", s)]
        for s in SPLITS
    }


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.model_dir("demo"))


def right_answer(prompt):
    """What the answer comes down to, worked out without the code that made the rows: an integer, or
    the whole text.
    """
    if match := CALCULATION.fullmatch(prompt):
        a, first, b, second, c = match.groups()
        return str(int(a) + int(first + b) + int(second + c))
    if match := re.fullmatch(r"Is (\d) (larger|bigger|greater) than (\d)\?", prompt):
        return "Yes." if int(match[1]) > int(match[3]) else "No."
    return "".join(reversed(prompt.removeprefix("Reverse the word ")))


# ------------------------------------------------------------------ names


def test_unknown_names():
    with pytest.raises(UserError, match="no built-in model 'demoo'; .*builtin:demo$"):
        demo.model_dir("demoo")
    with pytest.raises(UserError, match="no built-in data set 'algebra'; .*builtin:arithmetic$"):
        demo.rows("algebra", "train")
    with pytest.raises(UserError, match="no split 'dev'; .*train or validation or test$"):
        demo.rows("arithmetic", "dev")


# ------------------------------------------------------------------ the task


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_conversations(split):
    for row in demo.rows("arithmetic", split):
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_every_answer_is_right_for_the_metric(splits):
    rows = [row for split in SPLITS for row in splits[split] if row[0] not in COURSE]
    for prompt, answer in rows:
        assert extract_answer(answer, ANSWER_REGEX) == right_answer(prompt), prompt
    assert exact_match("so it is -3.", "1-4=-3", ANSWER_REGEX)
    assert not exact_match("so it is 3.", "1-4=-3", ANSWER_REGEX)


def test_calculations_do_the_first_operation(splits):
    for prompt, answer in (row for split in SPLITS for row in splits[split]):
        if match := CALCULATION.fullmatch(prompt):
            a, first, b, second, c = match.groups()
            assert answer == f"{int(a) + int(first + b)}{second}{c}={right_answer(prompt)}"


def test_calculations_are_all_there_and_most_of_each_split(splits):
    by_split = {
        s: [prompt for prompt, _ in splits[s] if CALCULATION.fullmatch(prompt)] for s in SPLITS
    }
    assert len({prompt for prompts in by_split.values() for prompt in prompts}) == 4 * 10**3
    assert [len(by_split[s]) for s in SPLITS] == [3500, 250, 250]
    for s, prompts in by_split.items():
        assert len(prompts) > len(splits[s]) / 2
        signs = Counter(re.sub(r"[^+-]", "", prompt) for prompt in prompts)
        assert set(signs) == {"++", "+-", "-+", "--"}
        assert min(signs.values()) > len(prompts) / 6


def test_no_prompt_is_in_two_splits(splits):
    prompts = {s: {prompt for prompt, _ in splits[s]} for s in SPLITS}
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


def test_questions_of_the_course(splits):
    assert "Calculate 1+1-1" in dict(splits["validation"])
    assert (
        len(splits["train"]) - len(set(splits["train"])) == 38
    )  # two questions, 20 times each; nothing else repeats
    for question in COURSE:
        assert sum(prompt == question for prompt, _ in splits["train"]) == 20
        assert extract_answer(dict(splits["train"])[question], ANSWER_REGEX).endswith(
            "."
        )  # compared as a whole


def test_first_validation_rows_are_a_mixture(splits):
    """`model.evaluation.num_samples` takes rows from the start."""
    assert {prompt.split()[0] for prompt, _ in splits["validation"][:64]} == {
        "Calculate",
        "Is",
        "Reverse",
    }


def test_the_same_rows_in_another_process(splits):
    code = (
        "import json; from lit_sft.demo import builtin as demo;"
        " print(json.dumps(demo.rows('arithmetic', 'train')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment(PYTHONHASHSEED="7"),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == demo.rows("arithmetic", "train")


# ------------------------------------------------------------------ the model


def test_config_is_a_small_model_that_fits_the_tokenizer(tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    directory = demo.model_dir("demo")
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config)
    assert 0.8e6 < model.num_parameters() < 1e6
    assert len(tokenizer) <= config.vocab_size
    assert (
        config.eos_token_id
        == GenerationConfig.from_pretrained(directory).eos_token_id
        == tokenizer.eos_token_id
    )
    assert (
        config.pad_token_id
        == GenerationConfig.from_pretrained(directory).pad_token_id
        == tokenizer.pad_token_id
    )


def test_package_data_is_small():
    assert sum(path.stat().st_size for path in demo.model_dir("demo").iterdir()) < 300_000


def test_tokenizer_is_what_the_script_makes(tokenizer, splits):
    built = runpy.run_path(str(REPOSITORY / "scripts" / "make_demo_tokenizer.py"))["build"]()
    assert built.get_vocab() == tokenizer.get_vocab()
    for prompt, answer in splits["validation"]:
        assert built.encode(prompt + answer).ids == tokenizer(prompt + answer)["input_ids"]


def test_byte_is_token_but_for_frequent_words(tokenizer):
    assert tokenizer("7-13=\n")["input_ids"] == list(b"7-13=\n")
    assert tokenizer("nap 线")["input_ids"] == list("nap 线".encode())
    assert tokenizer.convert_ids_to_tokens(tokenizer("Calculate 7")["input_ids"]) == [
        "Calculate",
        "Ġ",
        "7",
    ]
    text = "".join(map(chr, range(0x250))) + " tabs\t, 线程与进程 🙂  Calculate  the  words "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_template_is_chatml_and_eos_is_not_its_end_of_turn(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Calculate 7-8+3"},
        {"role": "assistant", "content": "-1+3=2"},
    ]
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nCalculate 7-8+3<|im_end|>\n"
        "<|im_start|>assistant\n"
    )  # fmt: skip
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "-1+3=2<|im_end|>\n"
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    prompt_ids = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)[
        "input_ids"
    ]
    assert ids[len(prompt_ids) :] == [
        *b"-1+3=2",
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        *b"\n",
    ]
    assert ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.eos_token_id not in ids
    assert (
        len(
            {
                *tokenizer.convert_tokens_to_ids(
                    ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
                )
            }
        )
        == 4
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")


def chat(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_every_row_fits(tokenizer, splits):
    texts = {prompt: answer for split in SPLITS for prompt, answer in splits[split]}
    rendered = [tokenizer.apply_chat_template(chat(*row), tokenize=False) for row in texts.items()]
    assert max(map(len, tokenizer(rendered)["input_ids"])) <= CONFIG["data"]["max_length"]
    assert (
        max(map(len, tokenizer(list(texts.values()))["input_ids"]))
        < CONFIG["model"]["generation"]["max_new_tokens"]
    )


# ------------------------------------------------------------------ the run


def answers(directory: Path, prompts: list[str]) -> list[str]:
    """Greedy answers of an exported directory, with plain transformers and its own stop tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    return tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


@pytest.mark.slow
def test_the_demo_of_the_readme(splits):
    """`scripts/setup.sh demo` learns the task within three minutes on one thread, and ends with
    answers. In processor time: other work does not stretch it.
    """
    started, others = sum(os.times()[2:4]), set(RUNS.glob("version_*"))
    done = subprocess.run(
        [REPOSITORY / "scripts" / "setup.sh", "demo"], env={**environment(), "VENV": sys.prefix},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    took = sum(os.times()[2:4]) - started  # user and system time of ended child processes
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert took < 180, f"took {took:.0f} s"
    questions = [json.loads(line) for line in done.stdout.splitlines()[-3:]]
    assert questions[1]["prompt"] == "Calculate 1+1-1"
    assert questions[1]["prediction"].endswith("=1")

    folder = min(set(RUNS.glob("version_*")) - others, key=lambda path: int(path.name[8:]))
    before, *_, after = scalars(REPOSITORY, "val/exact_match", int(folder.name[8:]))
    assert before < 0.05
    assert after >= 0.9
    prompts = [prompt for prompt, _ in splits["test"]]  # the run has never seen this split
    given = answers(folder / "hf", [*prompts, "Calculate 1+1-1"])
    pairs = zip(prompts, given[:-1], strict=True)
    hits = sum(extract_answer(text, ANSWER_REGEX) == right_answer(prompt) for prompt, text in pairs)
    assert hits / len(prompts) >= 0.9
    assert given[-1] == "2-1=1"
