"""Whole runs with adapters: what moves, what a checkpoint and an export hold, and what is
refused.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import arguments, chat_rows, final_weights, run, scalars, version, write_rows
from safetensors.torch import load_file
from terminal import log_lines, refused
from tiny import save_tiny, tiny_llama, tiny_qwen3, tiny_tokenizer

from lit_sft.model.base_fingerprint import record_base
from lit_sft.model.load import load_tokenizer

LORA = {"r": 4, "lora_alpha": 8}
QLORA = {"model__lora": LORA, "model__quantization": "nf4", "trainer__precision": "bf16-mixed"}
NEW = ["<call>", "</call>"]
IDS = torch.arange(5, 29)[None]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = save_tiny(folder / "model", tiny_qwen3(len(tiny_tokenizer())))
    return folder, model, write_rows(folder / "train.jsonl", chat_rows(24))


def settings(place, root, **overrides):
    _, model, rows = place
    options = {"data__packing": False, "data__global_batch_size": 4, "trainer__max_steps": 3}
    options |= {"model__lr_schedule__type": "constant", "model__optimizer": "torch.optim.AdamW"}
    return arguments(model, rows, root, **{**options, "model__optimizer__lr": 1e-2, **overrides})


def fit(place, root, *more, **overrides):
    run("fit", [*settings(place, root, **overrides), *more])
    return final_weights(root)


@pytest.fixture(scope="module")
def finished(place):
    """Folders of runs of three steps, by name."""
    runs = {
        "lora": {"model__lora": LORA},
        "tokens": {"model__lora": LORA, "model__add_tokens": NEW},
        "qlora": QLORA,
        "qlora tokens": {**QLORA, "model__add_tokens": NEW},
    }

    def get(name):
        root = place[0] / name.replace(" ", "_")
        if not root.exists():
            fit(place, root, **runs[name])
        return root

    return get


def export(root, output, *more):
    run(
        "export",
        [f"--ckpt_path={version(root)}/checkpoints/last.ckpt", f"--output_dir={output}", *more],
    )
    return output


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def off(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ------------------------------------------------------------------ what moves


@pytest.mark.parametrize("base", ["bf16-mixed", "bf16-true", "nf4"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_adapter_moves_in_the_first_step_and_is_fp32(base, variant, place, tmp_path):
    weights = fit(
        place,
        tmp_path / "runs",
        model__lora={**LORA, "use_dora": variant == "dora"},
        model__quantization="nf4" if base == "nf4" else None,
        model__gradient_checkpointing=True,
        trainer__precision="bf16-true" if base == "bf16-true" else "bf16-mixed",
        trainer__max_steps=1,
    )
    moved = {name: bool(value.any()) for name, value in weights.items() if "lora_B" in name}
    assert len(moved) == 14 and all(moved.values())  # B starts at 0
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all("lora_" in name for name in weights)


def test_a_checkpoint_is_as_small_as_what_is_trained(finished):
    """Parameters, and two moments of each in fp32; the rest of a run's state is a few kB."""
    weights = final_weights(finished("lora"))
    numbers = sum(value.numel() for value in weights.values())
    size = (version(finished("lora")) / "checkpoints" / "last.ckpt").stat().st_size
    assert 12 * numbers < size < 12 * numbers + 60_000


@pytest.mark.parametrize("kind", ["lora", "qlora", "bf16-true"])
def test_a_resumed_run_is_the_same_run(kind, place, tmp_path):
    """With noise, dropout and new tokens. Only the whole run answers a question before, which must
    change nothing.
    """
    options = {
        "lora": {"model__lora": {**LORA, "lora_dropout": 0.1}},
        "qlora": {**QLORA, "model__gradient_checkpointing": True},
        "bf16-true": {"model__lora": LORA, "trainer__precision": "bf16-true"},
    }[kind]
    options |= {"model__neftune_noise_alpha": 5, "model__add_tokens": NEW}
    options |= {
        "trainer__max_steps": 4,
        "checkpoint__every_n_train_steps": 2,
        "data__questions": ["abc"],
    }
    whole = fit(place, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    checkpoints = version(tmp_path / "parts") / "checkpoints"
    (checkpoints / "step=000004.ckpt").unlink()
    parts = fit(place, tmp_path / "parts", f"--ckpt_path={checkpoints}/step=000002.ckpt", **options)
    assert whole.keys() == parts.keys() and any("trainable_tokens" in name for name in whole)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert scalars(tmp_path / "whole", "train/loss") == scalars(tmp_path / "parts", "train/loss")


def test_noise_is_in_training_only(place, tmp_path):
    """With a learning rate of 0 the validation loss stays that of the run without noise, to the
    last bit.
    """
    options = {
        "model__lora": LORA,
        "data__val_size": 6,
        "model__optimizer__lr": 0.0,
        "trainer__max_epochs": 1,
    }
    for name, alpha in (("plain", None), ("noisy", 50)):
        fit(
            place,
            tmp_path / name,
            model__neftune_noise_alpha=alpha,
            trainer__max_steps=-1,
            **options,
        )
    assert scalars(tmp_path / "plain", "val/loss") == scalars(tmp_path / "noisy", "val/loss")
    assert scalars(tmp_path / "plain", "train/loss") != scalars(tmp_path / "noisy", "train/loss")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("lora", "ddp"), ("qlora", "ddp"), ("adapter", "ddp"), ("adapter", "fsdp2")],
)
def test_two_ranks_make_the_run_of_one(kind, strategy, finished, place, tmp_path):
    options = {
        "lora": {"model__lora": LORA, "model__add_tokens": NEW},
        "qlora": {**QLORA, "trainer__precision": "32-true"},
        "adapter": {"model__adapter_name_or_path": version(finished("lora")) / "hf"},
    }[kind]
    # SGD without clipping shows a gradient that is wrong by a factor
    options |= {"model__optimizer": "torch.optim.SGD", "trainer__gradient_clip_val": None}
    one = fit(place, tmp_path / "one", **options)
    run(
        "fit",
        settings(
            place, tmp_path / "two", trainer__devices=2, trainer__strategy=strategy, **options
        ),
        True,
    )
    two = final_weights(tmp_path / "two")
    assert one.keys() == two.keys()
    if kind == "adapter":  # it went on from there, on every rank
        before = final_weights(finished("lora"))
        assert all(not torch.equal(value, before[name]) for name, value in two.items())
        exported = load_file(version(tmp_path / "two") / "hf" / "adapter_model.safetensors")
        for name, value in exported.items():
            name = name.replace("base_model.model.", "model.lm.").replace(
                ".weight", ".default.weight"
            )
            assert torch.equal(value, two[name])
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    losses = (torch.tensor(scalars(tmp_path / name, "train/loss")) for name in ("two", "one"))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


# ------------------------------------------------------------------ new tokens


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("build", [tiny_qwen3, tiny_llama], ids=["tied", "untied"])
def test_new_tokens_are_known_trained_and_exported(lora, build, place, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_tiny(tmp_path / "model", build(len(tiny_tokenizer())))
    rows = [
        {
            "messages": [
                {"role": "user", "content": "abc"},
                {"role": "assistant", "content": "<call>d</call>"},
            ]
        }
    ]
    data = write_rows(tmp_path / "new.jsonl", 12 * rows)
    root = tmp_path / "runs"
    fit(
        place,
        root,
        model__model_name_or_path=model,
        data__train=data,
        model__lora=lora,
        model__add_tokens=NEW,
    )
    folder = version(root) / "hf"
    assert AutoTokenizer.from_pretrained(folder)("<call></call>")["input_ids"] == [320, 321]
    load = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    found = load.from_pretrained(folder)
    base = found.get_base_model() if lora else found
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    before = build(len(tiny_tokenizer())).get_input_embeddings().weight
    assert (embedding.weight[320:322] - before.mean(0)).abs().amax(1).min() > 1e-3, (
        "a new row was not trained"
    )
    if lora:
        assert torch.equal(embedding.weight[:320], before), "the rows of other tokens are frozen"
    assert torch.equal(embedding.weight, head.weight) == (build is tiny_qwen3)
    merged = export(root, tmp_path / "merged", *(["--merge_lora=true"] if lora else []))
    assert off(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(found)) < 1e-5


def test_new_tokens_keep_the_adapter_small_and_the_base_is_saved_once(finished):
    folder = version(finished("tokens")) / "hf"
    adapter, base = folder / "adapter_model.safetensors", folder / "base" / "model.safetensors"
    assert adapter.stat().st_size < 0.6 * base.stat().st_size
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(folder / "base")


# ------------------------------------------------------------------ 4-bit base


@pytest.mark.parametrize("name", ["qlora", "qlora tokens"])
def test_an_adapter_of_a_4_bit_base_is_exported_and_merged_on_request(
    name, finished, tmp_path, capsys
):
    """`export` compares logits with those of the model in memory, with the base in 4 bits on both
    sides.
    """
    from transformers import AutoModelForCausalLM

    root = finished(name)
    export(root, tmp_path / "adapter")
    checkpoint = f"--ckpt_path={version(root)}/checkpoints/last.ckpt"
    merging = [checkpoint, f"--output_dir={tmp_path / 'merged'}", "--merge_lora=true"]
    assert refused(capsys, "export", merging).startswith(
        "--merge_lora true over a 4-bit base: say --dequantize true to write its rounded values"
    )
    assert not (tmp_path / "merged").exists()
    with log_lines() as lines:
        run("export", [*merging, "--dequantize=true"])
    assert any(line.startswith("merged in bfloat16: the logits differ by ") for line in lines)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert (
        len(
            json.loads((tmp_path / "merged" / "config.json").read_text()).get(
                "quantization_config", {}
            )
        )
        == 0
    )


def test_a_base_saved_in_4_bits_needs_the_setting(finished, place, tmp_path, capsys):
    hf = version(finished("qlora tokens")) / "hf"
    options = {"model__model_name_or_path": hf / "base", "model__adapter_name_or_path": hf}
    message = refused(capsys, "fit", settings(place, tmp_path / "runs", **options))
    assert "holds weights in 4 bits (bitsandbytes): set model.quantization to nf4" in message
    fit(
        place,
        tmp_path / "set",
        model__quantization="nf4",
        trainer__precision="bf16-mixed",
        **options,
    )


# ------------------------------------------------------------------------------------------------
# existing adapters


@pytest.mark.parametrize(
    ("name", "precision"), [("lora", "32-true"), ("lora", "bf16-true"), ("tokens", "32-true")]
)
def test_an_adapter_goes_on_where_it_was(name, precision, finished, place, tmp_path):
    """One step with a rate of 0 leaves it as it is; without the setting a new adapter starts
    elsewhere.
    """
    hf = version(finished(name)) / "hf"
    base = place[1] if name == "lora" else hf / "base"
    options = {
        "model__model_name_or_path": base,
        "model__adapter_name_or_path": hf,
        "trainer__max_steps": 1,
    }
    options["trainer__precision"] = precision
    same = fit(place, tmp_path / "same", model__optimizer__lr=0.0, **options)
    before = final_weights(finished(name))
    assert same.keys() == before.keys() and all(
        torch.equal(value, before[key]) for key, value in same.items()
    )
    moved = fit(place, tmp_path / "moved", **options)
    assert all(not torch.equal(value, before[key]) for key, value in moved.items())
    export(tmp_path / "moved", tmp_path / "exported")


def test_a_second_stage_keeps_the_tokens_and_the_template_of_the_first(place, tmp_path):
    """Also over the first stage's own base, whose embedding has rows to spare, and whose weights
    look the same.
    """
    spare = save_tiny(tmp_path / "spare", tiny_qwen3(len(tiny_tokenizer()) + 64))
    template = str(tmp_path / "template.jinja")
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role | upper }}\n{{ m.content }}<|im_end|>\n{%"
        " endfor %}{% if add_generation_prompt %}<|im_start|>ASSISTANT\n{% endif %}"
    )
    base = {"model__model_name_or_path": spare}
    first = {"model__lora": LORA, "model__add_tokens": NEW, "data__chat_template": template}
    fit(place, tmp_path / "first", **base, **first)
    adapter = version(tmp_path / "first") / "hf"
    record_base(adapter, Path(spare))  # samples of a large model miss the rows of new tokens
    with log_lines() as lines:
        fit(place, tmp_path / "second", **base, model__adapter_name_or_path=str(adapter))
    assert f"tokenizer and chat template: those of the adapter {adapter}" in lines
    hf = version(tmp_path / "second") / "hf"
    tokenizers = [load_tokenizer(str(folder)) for folder in (adapter, hf)]
    ids = [tokenizer(f"a{NEW[0]}b", add_special_tokens=False).input_ids for tokenizer in tokenizers]
    assert ids[0] == ids[1] and len(ids[0]) == 3
    assert (
        tokenizers[0].chat_template
        == tokenizers[1].chat_template
        == (tmp_path / "template.jinja").read_text()
    )


def test_an_adapter_of_another_base_is_refused(finished, place, tmp_path, capsys):
    """One of ours knows the weights of its base; one of peft's, its name and the shapes of its
    tensors.
    """
    hf = version(finished("lora")) / "hf"
    for name, model in (
        ("other", {"seed": 1}),
        ("seeds/model", {"seed": 1}),
        ("wider/model", {"hidden_size": 64}),
    ):
        save_tiny(tmp_path / name, tiny_qwen3(len(tiny_tokenizer()), **model))
    other, seeds, wider = (
        tmp_path / "other",
        tmp_path / "seeds" / "model",
        tmp_path / "wider" / "model",
    )
    shutil.copytree(hf, tmp_path / "of_peft")
    (tmp_path / "of_peft" / "base_fingerprint.json").unlink()
    of_peft = tmp_path / "of_peft"

    def message(base, adapter=hf):
        options = {"model__model_name_or_path": base, "model__adapter_name_or_path": adapter}
        return refused(capsys, "fit", settings(place, tmp_path / "runs", **options))

    for base in (other, seeds, wider):
        said = message(base)
        assert (
            said.startswith(f"the adapter {hf} was trained over another base (weights ")
            and f"than {base} (" in said
        )
        assert "set model.model_name_or_path to that base" in said
    renamed = (
        f"the adapter {of_peft} was trained over {place[1]}, not over {other}: set model.model"
    )
    assert message(other, of_peft).startswith(renamed)
    assert message(wider, of_peft).startswith(
        f"the adapter {of_peft} does not fit the base {wider}"
    )
    assert "model.adapter_name_or_path: there is no directory" in message(
        place[1], tmp_path / "absent"
    )
    assert "is no adapter directory" in message(place[1], place[1])
    shutil.copytree(hf, tmp_path / "prompts")
    config = json.loads((hf / "adapter_config.json").read_text())
    changed = {"peft_type": "IA3", "base_model_name_or_path": config["base_model_name_or_path"]}
    (tmp_path / "prompts" / "adapter_config.json").write_text(json.dumps(changed))
    assert "is IA3; only LoRA and its relatives are known" in message(
        place[1], tmp_path / "prompts"
    )


def test_an_adapter_is_no_model_to_train(finished, place, tmp_path, capsys):
    """Said before a row is read, or a folder made."""
    hf = version(finished("lora")) / "hf"
    options = {"model__model_name_or_path": hf, "data__train": "absent.jsonl"}
    words = f"model.model_name_or_path {hf} holds an adapter: set it to the base"
    assert refused(capsys, "fit", settings(place, tmp_path / "runs", **options)).startswith(words)
    assert not (tmp_path / "runs").exists()
    args = settings(place, tmp_path / "runs", **options)
    with pytest.raises(SystemExit):
        run("doctor", [*args, "--output=json"])
    assert json.loads(capsys.readouterr().out)["errors"][0].startswith(words)


def test_the_base_of_an_adapter_may_be_called_otherwise(finished, place, tmp_path):
    shutil.copytree(place[1], tmp_path / "renamed")
    options = {"model__model_name_or_path": tmp_path / "renamed", "trainer__max_steps": 1}
    fit(
        place,
        tmp_path / "runs",
        **options,
        model__adapter_name_or_path=version(finished("lora")) / "hf",
    )


def test_the_base_that_an_adapter_names_is_compared_too(finished, place, tmp_path, capsys):
    """`predict` over an adapter directory, whose base was replaced by another one of the same
    shapes.
    """
    adapter, base = tmp_path / "adapter", tmp_path / "model"
    shutil.copytree(version(finished("lora")) / "hf", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(base)})
    )
    args = settings(
        place, tmp_path / "runs", model__model_name_or_path=adapter, data__predict=["abc"]
    )
    shutil.copytree(place[1], base)
    run("predict", args)
    save_tiny(base, tiny_qwen3(len(tiny_tokenizer()), seed=1))
    assert f"the adapter {adapter} was trained over another base (weights " in refused(
        capsys, "predict", args
    )


@pytest.mark.parametrize(
    ("name", "kind", "was", "now"),
    [("lora", QLORA, "null", "nf4"), ("qlora", {"model__quantization": None}, "nf4", "null")],
)
def test_a_resume_over_other_bits_is_refused(
    name, kind, was, now, finished, place, tmp_path, capsys
):
    shutil.copytree(finished(name), tmp_path / "runs", symlinks=True)
    checkpoint = f"--ckpt_path={version(tmp_path / 'runs')}/checkpoints/last.ckpt"
    options = {"model__lora": LORA, **kind, "trainer__max_steps": 4}
    message = refused(capsys, "fit", [*settings(place, tmp_path / "runs", **options), checkpoint])
    assert message.startswith(
        f"the checkpoint was trained over its base with model.quantization {was}, now it is {now}"
    )
    assert len(scalars(tmp_path / "runs", "train/loss")) == 3
    fit(place, tmp_path / "runs", checkpoint, **options, resume__allow_other_data=True)
    assert len(scalars(tmp_path / "runs", "train/loss")) == 4


def test_a_checkpoint_of_another_adapter_or_base_is_refused(finished, place, tmp_path, capsys):
    checkpoint = f"--ckpt_path={version(finished('lora'))}/checkpoints/last.ckpt"
    other = save_tiny(tmp_path / "model", tiny_qwen3(len(tiny_tokenizer()), seed=1))
    for options, message in (
        (
            {"model__lora": {"r": 2}},
            "lora_A.default.weight is [4, 32] in the checkpoint and [2, 32] in the model",
        ),
        ({"model__lora": {**LORA, "target_modules": ["q_proj"]}}, "is in the checkpoint only"),
        (
            {"model__lora": LORA, "model__model_name_or_path": other},
            "was trained over another base",
        ),
    ):
        args = settings(place, tmp_path / "runs", trainer__max_steps=5, **options)
        assert message in refused(capsys, "fit", [*args, checkpoint])


# ------------------------------------------------------------------ wrong

WRONG = {
    "no quantized base without an adapter": (
        {"model__quantization": "nf4"},
        (
            "model.quantization nf4 freezes the weights, so nothing would be trained: set"
            " model.lora as well"
        ),
    ),
    "rank": ({"model__lora": {"r": 0}}, "model.lora.r is 0; set a rank of at least 1"),
    "target": (
        {"model__lora": {"target_modules": ["q_prj"]}},
        (
            "model.lora.target_modules: no module is named q_prj; linear modules: down_proj,"
            " gate_proj, k_proj"
        ),
    ),
    "regex": (
        {"model__lora": {"target_modules": "(q_proj"}},
        "'(q_proj' is no regular expression: missing )",
    ),
    "trainable": (
        {"model__trainable": ["layers["]},
        "model.trainable: 'layers[' is no regular expression",
    ),
    "known token": (
        {"model__add_tokens": ["<|im_end|>"]},
        "model.add_tokens: '<|im_end|>' is in the tokenizer",
    ),
    "untrained token": (
        {"model__add_tokens": ["<new>"], "model__trainable": ["norm"]},
        (
            "model.add_tokens: the new tokens would not be trained; model.trainable must match the"
            " embedding and the head"
        ),
    ),
    "noise": (
        {"model__neftune_noise_alpha": -1},
        "model.neftune_noise_alpha is -1.0; set a positive number",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line(options, message, place, tmp_path, capsys):
    line = refused(capsys, "fit", settings(place, tmp_path / "runs", **options))
    assert message in line


def test_rows_of_a_head_with_a_bias(place, tmp_path, capsys):
    """peft would leave the bias out, in training and when the adapter is loaded."""
    from transformers import PhiConfig, PhiForCausalLM

    tokenizer = tiny_tokenizer()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    phi = save_tiny(
        tmp_path / "phi", PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), **sizes)), tokenizer
    )
    args = settings(
        place,
        tmp_path / "runs",
        model__model_name_or_path=phi,
        model__lora=LORA,
        model__add_tokens=NEW,
    )
    assert refused(capsys, "fit", args).startswith(
        "the head of PhiForCausalLM has a bias, which peft drops"
    )


def test_4_bit_weights_are_not_sharded(place, tmp_path, capsys):
    args = settings(place, tmp_path / "runs", trainer__strategy="fsdp2", **QLORA)
    assert refused(capsys, "fit", args).startswith(
        "model.quantization: 4-bit weights are not sharded"
    )
