"""Exports load in transformers 4 and in transformers 5, with the same tokens and the same answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import arguments, chat_rows, environment, run, version, write_rows
from tiny import save_tiny, tiny_llama, tiny_qwen3

from lit_sft.demo import builtin as demo

PACKAGES = ("transformers==4.57.*", "tokenizers==0.22.*", "huggingface_hub<1.0", "peft==0.17.*")
TEXTS = ["Hello world", " two  spaces\n\n", "<|im_start|>user\nHi<|im_end|>", "你好", "a <tool> b"]

READ = """
import json, sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

def read(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "What is a thread?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = {
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "decoded": [
            tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) for text in TEXTS
        ],
        "chat": text,
        "eos": [tokenizer.eos_token, tokenizer.eos_token_id],
        "pad": tokenizer.pad_token,
    }
    if not any(Path(path).rglob("*.safetensors")):
        return found
    if (Path(path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM as factory
    else:
        factory = AutoModelForCausalLM
    model = factory.from_pretrained(path).eval()
    inputs = tokenizer(text, return_tensors="pt")
    settings = GenerationConfig.from_pretrained(path)
    with torch.no_grad():
        answer = model.generate(
            **inputs, max_new_tokens=12, generation_config=settings, do_sample=False
        )
        found["logits"] = model(inputs.input_ids).logits[0, -1].tolist()
    found["answer"] = answer[0].tolist()
    found["dtype"] = str(model.dtype)
    found["stops"] = settings.eos_token_id
    return found

TEXTS = json.loads(sys.argv[1])
print(json.dumps([transformers.__version__, [read(path) for path in sys.argv[2:]]]))
"""


@pytest.fixture(scope="module")
def packages(request):
    """A directory with transformers 4, which stands before our own packages on the path."""
    folder = Path(request.config.cache.mkdir("transformers4")) / "packages"
    if not folder.is_dir():
        parts = folder.with_name("parts")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", parts, *PACKAGES], check=True)
        parts.rename(folder)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One directory of each kind, by name."""
    folder = tmp_path_factory.mktemp("exports")
    rows = write_rows(folder / "rows.jsonl", chat_rows(8))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    qwen = save_tiny(folder / "qwen", tiny_qwen3(rope_parameters=rope))
    llama = save_tiny(folder / "llama", tiny_llama())
    steps = {"trainer__max_steps": 2, "model__optimizer__lr": 0.01}

    def fit(name, model, **settings):
        run("fit", arguments(model, rows, folder / name, **steps, **settings))
        return version(folder / name) / "hf"

    lora = {"r": 2, "init_lora_weights": "gaussian"}
    found = {
        "full": fit("full", qwen),
        "adapter": fit("adapter", llama, model__lora=lora),
        # Tied embeddings: peft 0.17 cannot train single tokens of a head of its own.
        "added tokens": fit("added", qwen, model__lora=lora, model__add_tokens=["<tool>"]),
        "demo": fit("built_in", "builtin:demo", model__init="random"),
        "files of demo": demo.model_dir("demo"),
    }
    checkpoint = version(folder / "adapter") / "checkpoints" / "last.ckpt"
    found["merged"] = folder / "merged"
    merge = ["--merge_lora=true", f"--output_dir={found['merged']}", f"--ckpt_path={checkpoint}"]
    run("export", merge)
    return found


def read(exports, path=()):
    """What a program without lit_sft reads from the directories, and its transformers' version."""
    search = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(TEXTS), *map(str, exports.values())],
        env=environment(PYTHONPATH=search),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used, found = json.loads(done.stdout.splitlines()[-1])
    return used, dict(zip(exports, found, strict=True))


@pytest.mark.slow
def test_transformers_4_and_5_read_the_same(packages, exports):
    old_version, old = read(exports, [packages])
    new_version, new = read(exports)
    assert old_version.startswith("4.57") and new_version.startswith("5.")
    for name in exports:
        before, after = old[name], new[name]
        assert before.pop("logits", []) == pytest.approx(after.pop("logits", []), abs=1e-5), name
        assert before == after, name
    assert new["added tokens"]["ids"][-1] != new["adapter"]["ids"][-1]
    trained = {name: found for name, found in new.items() if name != "files of demo"}
    for name, found in trained.items():
        assert found["eos"][0] == "<|im_end|>", name
        assert found["stops"][0] == found["eos"][1] and len(found["stops"]) == 2, name
