"""hub.py and model/load.py: resolving names, and loading what they stand for."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_llama, tiny_qwen3, tiny_tokenizer

from lit_sft.errors import UserError
from lit_sft.hub import resolve
from lit_sft.model.attention.implementation import attention_of
from lit_sft.model.generate import stop_token_ids
from lit_sft.model.load import load_config, load_model, load_tokenizer


def load(path, init="pretrained", dtype=torch.float32, attn_implementation="sdpa", seed=0):
    return load_model(
        str(path), init=init, dtype=dtype, attn_implementation=attn_implementation, seed=seed
    )


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Sends the hub's client to an address of the test's choice, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    return lambda endpoint: monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def cache_snapshot(cache: Path, repo_id: str, source: str) -> Path:
    """Lays a model out as the hub's cache would."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(source, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


# ------------------------------------------------------------------ resolve


def test_an_existing_model_directory_is_returned_as_it_is(tmp_path):
    assert resolve(save_tiny(tmp_path / "model")) == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "model.model_name_or_path is empty"),
        ("./absent", "there is no directory ./absent"),
        ("/absent/model", "there is no directory /absent/model"),
        ("models/a/b", "there is no directory models/a/b"),
    ],
)
def test_what_looks_like_a_path_and_does_not_exist_is_refused_at_once(name, message):
    with pytest.raises(UserError, match=message):
        resolve(name)


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"base_key: .* is no model directory \(no config.json\)"):
        resolve(str(tmp_path), key="base_key")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="weights.bin is a file"):
        resolve(str(tmp_path / "weights.bin"))


def test_an_adapter_directory_is_named_as_such(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), allow_adapter=True) == str(tmp_path)


def test_offline_the_error_is_one_sentence_that_comes_in_seconds(tmp_path):
    """In a process of its own, so that the client reads the environment and nothing is warm."""
    program = (
        "import time; from lit_sft.hub import resolve; start = time.monotonic()\n"
        "try: resolve('someone/some-model', key='the.key')\n"
        "finally: print(time.monotonic() - start)"
    )
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://hub.invalid"}):
        outcome = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )
        message = outcome.stderr.strip().splitlines()[-1]
        assert (
            "UserError: the.key: someone/some-model is neither a local directory nor complete in"
            " the local cache" in message
        )
        assert message.endswith("set the.key to a local model directory")
        # The libraries' own retries would take 46 s. The import of the package is not counted: a
        # busy machine takes longer for it.
        assert float(outcome.stdout) < 20


def test_a_hub_that_never_answers_costs_three_seconds(hub):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(
            UserError, match="the hub cannot be reached .*; set model.model_name_or_path to a local"
        ):
            resolve("someone/some-model")
        assert time.monotonic() - start < 6


def test_a_name_lookup_that_hangs_costs_three_seconds(hub, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: released.wait(60))
    hub("http://hub.invalid")
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer within 3 s"):
        resolve("someone/some-model")
    assert time.monotonic() - start < 6
    released.set()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", "the hub has no such model or shows it only to its members"),
        (404, "RepoNotFound", "the hub has no such model or shows it only to its members"),
        (404, "RevisionNotFound", "has no revision 'v9'; change model.revision"),
        (503, "", r"the hub cannot be reached \(it answered 503\)"),
    ],
)
def test_the_answer_of_the_hub_is_told_apart(hub, status, code, message):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match=message):
            resolve("someone/some-model", revision="v9")
        server.shutdown()


def test_without_a_hub_the_local_cache_serves(hub, tmp_path):
    hub("http://hub.invalid")
    snapshot = cache_snapshot(
        tmp_path / "cache", "someone/some-model", save_tiny(tmp_path / "model")
    )
    assert resolve("someone/some-model") == str(snapshot)


# -------------------------------------------------------------------------------------------------
# config, tokenizer


def test_config_and_tokenizer_come_from_the_directory(tmp_path):
    path = save_tiny(tmp_path)
    assert load_config(path).num_hidden_layers == 2
    assert (
        load_tokenizer(path)("Hello world").input_ids == tiny_tokenizer()("Hello world").input_ids
    )


def test_pad_falls_back_to_eos(tmp_path):
    path = save_tiny(tmp_path, tokenizer=tiny_tokenizer(pad_token=None))
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


def test_a_pad_token_of_its_own_is_kept(tmp_path):
    assert (
        load_tokenizer(
            save_tiny(tmp_path, tokenizer=tiny_tokenizer(pad_token="<|im_end|>"))
        ).pad_token_id
        == 2
    )


def test_a_tokenizer_without_eos_and_pad_is_refused(tmp_path):
    tokenizer = tiny_tokenizer(pad_token=None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a pad nor an eos token"):
        load_tokenizer(save_tiny(tmp_path, tokenizer=tokenizer))


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_stop_ids_are_the_union_of_all_sources():
    tokenizer = tiny_tokenizer()
    generation_config = tiny_llama().generation_config
    generation_config.eos_token_id = [7, 5]
    assert stop_token_ids(tokenizer, generation_config, (2, 5)) == [0, 2, 5, 7]
    generation_config.eos_token_id = 7
    assert stop_token_ids(tokenizer, generation_config) == [0, 7]
    assert stop_token_ids(tokenizer, None, [torch.tensor(2)]) == [0, 2]
    tokenizer.eos_token = None
    assert stop_token_ids(tokenizer, None) == []


# ------------------------------------------------------------------ model


def test_pretrained_weights_are_those_of_the_files_in_the_asked_dtype(tmp_path):
    source = tiny_qwen3()
    path = save_tiny(tmp_path, source)
    model = load(path)
    assert all(
        torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items()
    )
    assert model.training
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in load(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert attention_of(load(path, attn_implementation="eager")) == "eager"


def test_random_weights_depend_on_the_seed_alone(tmp_path):
    path = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(123)
    first = load(path, init="random", seed=1)
    drawn = torch.rand(3)
    torch.manual_seed(123)
    assert torch.equal(torch.rand(3), drawn), "the caller's random state was disturbed"
    torch.manual_seed(456)
    again, other = load(path, init="random", seed=1), load(path, init="random", seed=2)
    assert first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def pickled(folder, parts=1):
    """Saves the tiny model as old checkpoints are, in one file or in parts."""
    path = save_tiny(folder)
    weights = load(path).state_dict()
    (folder / "model.safetensors").unlink()
    names = list(weights)
    files = [f"pytorch_model-{n + 1:05}-of-{parts:05}.bin" for n in range(parts)]
    if parts == 1:
        files = ["pytorch_model.bin"]
    for number, file in enumerate(files):
        torch.save({name: weights[name] for name in names[number::parts]}, folder / file)
    if parts > 1:
        places = {name: files[number % parts] for number, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path, weights


@pytest.mark.parametrize("parts", [1, 2])
def test_pickled_weights_are_read(tmp_path, parts, caplog):
    caplog.set_level("INFO", "lit_sft")
    path, weights = pickled(tmp_path, parts)
    found = load(path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    [line] = [line for line in caplog.messages if "pytorch_model.bin" in line]
    assert "no code" in line


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_pickles_are_downloaded_without_safetensors_only(tmp_path, has_safetensors, monkeypatch):
    names = ["config.json", "pytorch_model.bin", *["model.safetensors"] * has_safetensors]
    asked = []

    def download(repo_id, *, allow_patterns, **options):
        asked.append(allow_patterns)
        for name in names:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("lit_sft.hub._why_unreachable", lambda *_: None)
    assert resolve("someone/model") == str(tmp_path)
    assert (tmp_path / "pytorch_model.bin").exists() != has_safetensors
    assert len(asked) == 2 - has_safetensors


class Harmful:
    """Runs code when it is read."""

    def __reduce__(self):
        return (os.makedirs, (os.environ["HARM"],))


@pytest.mark.parametrize("old_format", [False, True])
def test_pickles_that_need_code_are_refused(tmp_path, old_format, monkeypatch):
    path, weights = pickled(tmp_path)
    harm = tmp_path / "harm"
    monkeypatch.setenv("HARM", str(harm))
    file = tmp_path / "pytorch_model.bin"
    torch.save({**weights, "x": Harmful()}, file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError, match="need code to be read.*provide safetensors"):
        load(path)
    assert not harm.exists()


def test_other_pickles_are_refused_with_the_remedy(tmp_path):
    path = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.pth")
    with pytest.raises(
        UserError, match="only consolidated.pth, which is not loaded .* provide safetensors"
    ):
        load(path)
    (tmp_path / "consolidated.pth").unlink()
    with pytest.raises(
        UserError, match="has no weights; provide safetensors, or set model.init to random"
    ):
        load(path)


def test_damaged_weights_and_misfits_are_one_sentence(tmp_path):
    path = save_tiny(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:5000])
    with pytest.raises(UserError, match="do not fit the config or are damaged"):
        load(path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    edit_config(tmp_path, hidden_size=64)
    with pytest.raises(UserError, match="do not fit the config or are damaged"):
        load(path)


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_what_is_no_causal_language_model_is_refused(tmp_path, init):
    from transformers import BertConfig, BertForMaskedLM, LlamaForSequenceClassification, T5Config

    T5Config().save_pretrained(tmp_path / "t5")
    sizes = dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        vocab_size=32,
    )
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path / "classifier")
    for name, found in (
        ("t5", "t5 model"),
        ("bert", "BertForMaskedLM"),
        ("classifier", "LlamaForSequence"),
    ):
        with pytest.raises(UserError, match=f"{found}.*no causal language model"):
            load(tmp_path / name, init=init)


def test_weights_without_a_head_are_refused(tmp_path):
    """A classifier's weights under a causal LM's name: transformers would draw a random head and
    only warn.
    """
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match="lacks 1 weights .* such as lm_head.weight"):
        load(tmp_path)


def test_unknown_models_and_models_with_code_say_what_to_do(tmp_path):
    save_tiny(tmp_path)
    edit_config(tmp_path, model_type="unheard_of")
    with pytest.raises(UserError, match="config cannot be read.*unheard_of"):
        load(tmp_path)
    edit_config(
        tmp_path, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    )
    with pytest.raises(UserError, match="set model.trust_remote_code to true"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["sdap", "flash_attention_2"])
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_an_attention_that_is_not_there_names_its_key(tmp_path, name, init):
    if name == "flash_attention_2" and torch.cuda.is_available():
        pytest.skip("may be installed here")
    with pytest.raises(UserError, match=f"model.attn_implementation '{name}'"):
        load(save_tiny(tmp_path), init=init, attn_implementation=name)


# ------------------------------------------------------------------ GGUF


def write_gguf(path: Path, model, tokenizer) -> None:
    """The tiny Llama as GGUF, with the big matrices in Q8_0 blocks."""
    import gguf

    config = model.config
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        rows = value
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:  # GGUF interleaves the two halves of a rotated head
                rows = (
                    value.reshape(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
                )
        array = rows.contiguous().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_model_that_can_be_saved(tmp_path):
    pytest.importorskip("gguf")
    source, tokenizer = tiny_llama(), tiny_tokenizer()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", source, tokenizer)
    path = resolve(str(tmp_path / "gguf"))
    model = load(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    weight = source.model.layers[1].self_attn.q_proj.weight
    # Q8_0 rounds to 1/127 of the largest of 32 weights.
    assert (
        model.model.layers[1].self_attn.q_proj.weight - weight
    ).abs().max() < weight.abs().max() / 127
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(load(tmp_path / "saved").lm_head.weight, model.lm_head.weight)
    text = "Hello world\n"
    assert load_tokenizer(path)(text).input_ids == tokenizer(text).input_ids
    assert load_tokenizer(path).eos_token == "<|endoftext|>"


def test_two_gguf_files_in_one_directory_are_refused(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 .gguf files"):
        resolve(str(tmp_path))
