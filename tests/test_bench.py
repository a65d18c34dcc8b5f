"""The benchmark for GPUs runs, in tiny shapes on a CPU; its goals are for people with a GPU."""

import json
import subprocess
import sys

import pytest
import torch
from running import REPOSITORY, environment

GPU = REPOSITORY / "scripts" / "bench" / "gpu.py"


def bench(*args):
    return subprocess.run([sys.executable, GPU, *args], capture_output=True, text=True, env=environment())


def test_smoke():
    done = bench("--smoke", "--only", "lit_sft", "--cases", "0.6b-full", "8b-lora")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["goals"].values()) == {None}  # nothing of it is known from a CPU
    full, lora = (report["cases"][name] for name in ("0.6b-full", "8b-lora"))
    assert full["lit_sft_tokens"] == lora["lit_sft_tokens"] > 2 * 4 * 256 * 0.95
    assert full["lit_sft_targets"] / full["lit_sft_tokens"] == pytest.approx(0.6, abs=0.01)
    for case in (full, lora):
        assert case["lit_sft_steps"] == 2 and case["lit_sft_attention"] == "lit_sft_packed"
        assert 0 < case["lit_sft_mfu"] < 1 and case["lit_sft_peak_gb"] > 0 and case["lit_sft_expected_gb"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = bench()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no CUDA device") and done.stderr.count("\n") == 1


def test_goals():
    sys.path.insert(0, str(GPU.parent))
    import gpu

    def side(speed, peak, **more):
        return {"tokens_per_second": speed, "peak_gb": peak, "device": "NVIDIA H100 80GB HBM3", "mfu": 0.5, **more}

    report = gpu.report({
        "0.6b-full": {"lit_sft": side(130, 10, expected_gb=11), "trl": side(100, 10)},
        "8b-lora": {"lit_sft": side(13_000, 40, expected_gb=30), "trl": side(9_000, 39)},
        "8b-full": {"lit_sft": {"left_out": "too large"}},
    })  # fmt: skip
    assert list(report["goals"].values()) == [True, False, False, False, True]
    assert report["cases"]["0.6b-full"]["memory_ratio"] == 1 and report["cases"]["8b-lora"]["estimate_ratio"] == 0.75
