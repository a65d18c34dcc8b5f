"""Tokens per second of answers: lit_sft's batches beside the usual loop of one prompt at a time.

    python scripts/fetch_smollm2.py
    python scripts/bench/generation.py --data alpaca_en_demo.json

Both sides run in one process with the same fp32 weights, the same prompts and greedy decoding. The
loop is `model.generate` as transformers documents it. The tokens of the texts are counted, and all
texts are compared. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from lit_sft.datamodule import SFTDataModule
from lit_sft.generation.answer import answer, records
from lit_sft.generation.prompts import make_batches
from lit_sft.model import load
from lit_sft.model.attention.packed import choose
from lit_sft.model.generate import GenerationOptions, stop_token_ids
from lit_sft.model.loss import CausalLMLoss


def main() -> None:
    """Times both sides and prints their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="rows to ask, as data.predict takes them")
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()
    data = SFTDataModule(
        model_name_or_path=str(args.model), predict=args.data, max_samples=args.num_prompts
    ).data
    lm = load.load_model(
        str(args.model),
        init="pretrained",
        dtype=torch.float32,
        attn_implementation=choose("auto"),
        seed=0,
    ).eval()
    stop_ids = stop_token_ids(data.tokenizer, lm.generation_config, data.stop_ids)
    # A first call initializes caches, and is not counted.
    usual(lm, data, stop_ids, args.max_new_tokens, 1)
    loop_texts, loop_seconds = usual(lm, data, stop_ids, args.max_new_tokens, args.num_prompts)
    texts, seconds = batched(lm, data, stop_ids, args.max_new_tokens)
    tokens = sum(len(data.tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    equal = sum(ours == theirs for ours, theirs in zip(texts, loop_texts, strict=True))
    result = {
        "prompts": len(texts),
        "tokens": tokens,
        "equal_texts": equal,
        "loop_tokens_per_second": round(tokens / loop_seconds, 1),
        "lit_sft_tokens_per_second": round(tokens / seconds, 1),
        "ratio": round(loop_seconds / seconds, 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


def batched(
    lm: Any, data: Any, stop_ids: list[int], max_new_tokens: int
) -> tuple[list[str], float]:
    """Answers with lit_sft; returns the texts in order, and the seconds from rows to texts."""
    started = time.perf_counter()
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    found = []
    for batch in make_batches(data.asked_by_predict(), options, data.tokenizer.pad_token_id):
        texts = answer(
            CausalLMLoss(lm), data.tokenizer, batch, options=options, stop_ids=stop_ids, seed=0
        )
        found += records(batch, texts)
    return [
        r["prediction"] for r in sorted(found, key=lambda r: r["index"])
    ], time.perf_counter() - started


def usual(
    lm: Any, data: Any, stop_ids: list[int], max_new_tokens: int, count: int
) -> tuple[list[str], float]:
    """Answers with a loop over prompts, and returns the same."""
    lm.eval()
    started = time.perf_counter()
    texts = []
    for prompt in data.asked_by_predict()[:count]:
        input_ids = torch.tensor([prompt.ids])
        output = lm.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_ids,
            pad_token_id=data.tokenizer.pad_token_id,
        )
        texts.append(
            data.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
        )
    return texts, time.perf_counter() - started


if __name__ == "__main__":
    main()
