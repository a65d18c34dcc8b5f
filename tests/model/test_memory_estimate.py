"""What `doctor` expects of memory, beside what the process then took: real sizes, in a process of
its own each.
"""

import json
import re
import subprocess
import sys

import pytest
import torch
from running import REPOSITORY, arguments, chat_rows, environment, run, write_rows
from tiny import save_tiny, tiny_llama, tiny_qwen3_moe, tiny_tokenizer

from lit_sft.model import memory_estimate, quantization
from lit_sft.model.load import load_model

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "initializer_range": 0.02,
    "max_position_embeddings": 2048,
}  # fmt: skip
MIDDLE = {**SMOLLM2, "vocab_size": 8192, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
          "num_hidden_layers": 12}  # fmt: skip
BF16 = {"trainer__precision": "bf16-mixed"}
CASES = {
    "SmolLM2": (SMOLLM2, BF16),
    "SmolLM2, LoRA": (
        SMOLLM2,
        {**BF16, "model__lora__r": 16, "model__lora__target_modules": "all-linear"},
    ),
    "52 M parameters in fp32": (MIDDLE, {"trainer__precision": "32-true"}),
}


def config(**sizes):
    return tiny_llama(**{"vocab_size": 64, **sizes}).config


def expected(of=None, **changes):
    settings = dict(
        num_parameters=1000, num_trained=1000, tokens=10, stored_bytes=4, compute_bytes=2, optimizer_bytes=8,
        gradient_checkpointing=False,
    )  # fmt: skip
    return memory_estimate.estimate(
        of or config(), memory_estimate.StepShape(**{**settings, **changes})
    )


def test_parts():
    full = expected()
    assert full.weights == 6000 and full.gradients == 4000 and full.optimizer == 8000
    assert full.total == sum(
        (full.weights, full.gradients, full.optimizer, full.activations, full.logits)
    )
    assert expected(tokens=20).activations == 2 * full.activations
    assert expected(gradient_checkpointing=True).activations < full.activations
    deep = config(num_hidden_layers=8)
    kept = [
        expected(deep, gradient_checkpointing=how).activations
        for how in ("full", "selective", False)
    ]
    assert (
        kept == sorted(set(kept))
        and kept[0] == expected(deep, gradient_checkpointing=True).activations
    )
    assert full.checkpoint == 12_000
    once = expected(accumulates=False)  # these few gradients find room where activations were
    assert (
        once.gradients == 0
        and once.total == full.total - 4000
        and once.checkpoint == full.checkpoint
    )
    large = expected(accumulates=False, num_trained=10**9)
    assert large.gradients == 4 * 10**9 - large.activations - large.logits
    frozen = expected(num_trained=0, adapted=True, stored_bytes=2)
    assert frozen.activations < expected(adapted=True, input_copies=True).activations
    assert (
        frozen.gradients == frozen.optimizer == 0
        and frozen.weights == 2000
        and frozen.logits < full.logits
    )


TWO_LAYERS = {**MIDDLE, "num_hidden_layers": 2}
EXPERTS = {**TWO_LAYERS, "head_dim": 64, "num_experts": 4, "moe_intermediate_size": 256}


@pytest.mark.parametrize(
    ("lm", "num_linear"),
    [
        (lambda: tiny_llama(**TWO_LAYERS), 7),
        # Experts are kept in 16 bits.
        (lambda: tiny_qwen3_moe(**EXPERTS), 4),
    ],
    ids=["dense", "experts"],
)
def test_a_4_bit_base(lm, num_linear, tmp_path, capsys):
    """Half a byte and the scales for each weight of a linear layer: as much as bitsandbytes really
    takes.
    """
    path = save_tiny(tmp_path / "model", lm(), tiny_tokenizer())
    options = {
        "init": "pretrained",
        "dtype": torch.bfloat16,
        "attn_implementation": "sdpa",
        "seed": 0,
    }
    lm = load_model(path, **options, quantization_config=quantization.nf4(torch.bfloat16))
    in_4_bits = [p for p in lm.parameters() if p.dtype == torch.uint8]
    assert len(in_4_bits) == 2 * num_linear
    states = [p.quant_state for p in in_4_bits]
    scales = [scale for state in states for scale in (state.absmax, state.state2.absmax)]
    taken = num_bytes(in_4_bits) + num_bytes(scales)
    others = num_bytes([p for p in lm.parameters() if p.dtype == torch.bfloat16])
    train = write_rows(tmp_path / "train.jsonl", chat_rows(4))
    settings = {
        **BF16,
        "model__quantization": "nf4",
        "model__lora__r": 4,
        "data__global_batch_size": 2,
    }
    with pytest.raises(SystemExit) as end:
        run("doctor", [*arguments(path, train, tmp_path / "run", **settings), "--output", "json"])
    assert end.value.code == 0
    weights = json.loads(capsys.readouterr().out.splitlines()[-1])["memory"]["weights"]
    weights -= sum(4 * 4 * sum(state.shape) for state in states)  # adapters of rank 4 in fp32
    linear = sum(state.shape.numel() for state in states)
    assert 0.5 < taken / linear < (weights - others) / linear < 0.53
    assert weights == pytest.approx(taken + others, rel=0.01)


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_within_a_quarter(case, tmp_path):
    sizes, overrides = CASES[case]
    model = save_tiny(tmp_path / "model", tiny_llama(**sizes), tiny_tokenizer())
    text = "abc def " * 20
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    train = write_rows(tmp_path / "train.jsonl", [row] * 8)
    settings = {"data__max_length": 512, "data__global_batch_size": 2, **overrides}
    args = arguments(model, train, tmp_path / "run", **settings)
    done = subprocess.run(
        [sys.executable, "-m", "lit_sft", "doctor", *args, "--output", "json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (took,) = re.findall(r"memory of a real step on one device: ([\d.]+) GiB", done.stderr)
    expected = json.loads(done.stdout.splitlines()[-1])["memory"]
    assert expected["total"] / 2**30 == pytest.approx(float(took), rel=0.25), (took, expected)
