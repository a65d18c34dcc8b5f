"""The benchmark for GPUs runs, in tiny shapes on a CPU; its goals are for people with a GPU."""

import json
import subprocess
import sys

import pytest
import torch
from running import REPOSITORY, arguments, chat_rows, environment, write_rows
from tiny import save_tiny, tiny_llama

SCRIPTS = REPOSITORY / "scripts"
GPU = SCRIPTS / "bench" / "gpu.py"


def bench(*args, script=GPU):
    return subprocess.run(
        [sys.executable, script, *args], capture_output=True, text=True, env=environment()
    )


def report(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(
        tmp_path_factory.mktemp("bench") / "model", tiny_llama(max_position_embeddings=4096)
    )


@pytest.mark.slow
def test_a_step_taken_apart_and_tuned(model, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", chat_rows(40))
    settings = arguments(model, train, tmp_path / "run", data__global_batch_size=4)
    step = report(bench(*settings, script=SCRIPTS / "bench" / "step.py"))
    assert step["tokens_per_second"] > 0 and 0 < step["mfu"] < 1 and step["peak_gb"] > 0
    tuned = report(bench("--memory_gb=50", "--largest=2", *settings, script=SCRIPTS / "tune.py"))
    assert set(tuned["best"]) == {
        "data.micro_batch_size",
        "model.gradient_checkpointing",
        "model.compile",
    }
    assert tuned["candidates"] >= 3
    nothing = bench("--memory_gb=0.001", "--largest=1", *settings, script=SCRIPTS / "tune.py")
    assert nothing.returncode == 1 and "error: nothing fits in 0.001 GB" in nothing.stderr


@pytest.mark.slow
def test_growth(model):
    grown = report(
        bench(
            "--model",
            model,
            "--longest=512",
            "--most_rows=1000",
            script=SCRIPTS / "bench" / "scale.py",
        )
    )
    assert list(grown) == ["packs", "rows", "ranks"] and list(grown["packs"]) == ["512"]
    assert list(grown["ranks"]) == ["1 auto", "2 ddp", "2 fsdp2"]
    assert all(result["tokens_per_second"] > 0 for result in grown["ranks"].values())


@pytest.mark.slow
def test_start(model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(6))
    found = report(
        bench(
            "--model",
            model,
            "--data",
            rows,
            "--repetitions=1",
            script=SCRIPTS / "bench" / "start.py",
        )
    )
    assert 0 < found["load_seconds"] < 60 and 0 < found["first_step_seconds"] < 60
    assert 0.5 < found["help_ratio"] < 2 and 0.5 < found["print_config_ratio"] < 2


@pytest.mark.slow
def test_generation_beside_the_usual_loop(model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(6))
    args = ("--model", model, "--data", rows, "--num_prompts=6", "--max_new_tokens=8")
    found = report(bench(*args, script=SCRIPTS / "bench" / "generation.py"))
    assert found["prompts"] == found["equal_texts"] == 6 and found["ratio"] > 0


def test_smoke():
    found = report(bench("--smoke", "--only", "lit_sft", "--cases", "0.6b-full", "8b-lora"))
    assert set(found["goals"].values()) == {None}  # nothing of it is known from a CPU
    full, lora = (found["cases"][name] for name in ("0.6b-full", "8b-lora"))
    assert full["lit_sft_tokens"] == lora["lit_sft_tokens"] > 2 * 4 * 256 * 0.95
    assert full["lit_sft_targets"] / full["lit_sft_tokens"] == pytest.approx(0.6, abs=0.01)
    for case in (full, lora):
        assert case["lit_sft_steps"] == 2 and case["lit_sft_attention"] == "lit_sft_packed"
        assert (
            0 < case["lit_sft_mfu"] < 1
            and case["lit_sft_peak_gb"] > 0
            and case["lit_sft_expected_gb"] > 0
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = bench()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no CUDA device") and done.stderr.count("\n") == 1


def test_goals():
    sys.path.insert(0, str(GPU.parent))
    import gpu

    def side(speed, peak, **more):
        return {
            "tokens_per_second": speed,
            "peak_gb": peak,
            "device": "NVIDIA H100 80GB HBM3",
            "mfu": 0.5,
            **more,
        }

    found = gpu.report({
        "0.6b-full": {"lit_sft": side(130, 10, expected_gb=11), "trl": side(100, 10)},
        "8b-lora": {"lit_sft": side(13_000, 40, expected_gb=30), "trl": side(9_000, 39)},
        "8b-full": {"lit_sft": {"left_out": "too large"}},
    })  # fmt: skip
    assert list(found["goals"].values()) == [True, False, False, False, True]
    assert (
        found["cases"]["0.6b-full"]["memory_ratio"] == 1
        and found["cases"]["8b-lora"]["estimate_ratio"] == 0.75
    )
