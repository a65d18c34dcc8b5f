"""`export`: any kind of checkpoint to a Hugging Face directory that has been compared, or no
directory.
"""

import pytest
import torch
from running import arguments, chat_rows, run, version, write_rows
from terminal import refused
from tiny import CHATML, save_tiny, tiny_llama

KINDS = {
    "a file": {},
    "an adapter": {"model__lora": {"r": 4}},
    "a part": {"model__trainable": ["lm_head"]},
    "parts": {"trainer__devices": 2, "trainer__strategy": "fsdp2"},
    "parts of an adapter": {
        "trainer__devices": 2,
        "trainer__strategy": "fsdp2",
        "model__lora": {"r": 4},
    },
}
PARAMETERS = [
    pytest.param(kind, marks=[pytest.mark.slow] if "parts" in kind else []) for kind in KINDS
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exporting")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(8))


def trained(place, root, **options):
    """The arguments that name the checkpoint of a short run."""
    fast = {"model__optimizer": "torch.optim.SGD", "model__optimizer__lr": 0.5}
    args = arguments(*place[1:], root, data__packing=False, **fast, **options)
    run("fit", args, subprocesses="trainer__devices" in options)
    return [f"--ckpt_path={version(root) / 'checkpoints' / 'last.ckpt'}"]


def logits(folder, base=None):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base or folder)
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model.eval()(torch.arange(5, 29).reshape(2, 12)).logits


@pytest.mark.parametrize("kind", PARAMETERS)
def test_export(kind, place, tmp_path):
    """Equal to what the run itself has written at its end."""
    ckpt = trained(place, tmp_path / "runs", **KINDS[kind])
    run("export", [*ckpt, f"--output_dir={tmp_path / 'out'}"])
    base = place[1] if "adapter" in kind else None
    ours = logits(tmp_path / "out", base)
    torch.testing.assert_close(
        ours, logits(version(tmp_path / "runs") / "hf", base), rtol=1e-6, atol=1e-6
    )
    assert not torch.allclose(ours, logits(place[1]), atol=1e-3), "it was trained"
    if "adapter" in kind:
        run("export", [*ckpt, f"--output_dir={tmp_path / 'merged'}", "--merge_lora=true"])
        torch.testing.assert_close(logits(tmp_path / "merged"), ours, rtol=1e-4, atol=1e-4)


def test_what_is_not_equal_is_not_exported(place, tmp_path, capsys, monkeypatch):
    """One line, no half-written directory, and an earlier export is back."""
    from lit_sft.model import verify_export

    ckpt, out = trained(place, tmp_path / "runs"), tmp_path / "exported" / "out"
    reload = verify_export._reload
    monkeypatch.setattr(verify_export, "_reload", lambda directory, model: tiny_llama(seed=3))
    line = refused(capsys, "export", [*ckpt, f"--output_dir={out}"])
    assert f"the logits of the export {out} are off" in line and "nothing was exported" in line
    assert list(out.parent.iterdir()) == []
    monkeypatch.setattr(verify_export, "_reload", reload)
    run("export", [*ckpt, f"--output_dir={out}"])
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(verify_export, "_greedy", lambda model, prompt, stops: [id(model)])
    assert "the answers of the export" in refused(capsys, "export", [*ckpt, f"--output_dir={out}"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_another_type(place, tmp_path, capsys):
    """Half as many bytes; an adapter is merged or stays as it is."""
    ckpt, half = trained(place, tmp_path / "runs"), "--dtype=bfloat16"
    sizes = []
    for more in ([], [half]):
        run("export", [*ckpt, f"--output_dir={tmp_path / 'out'}", *more])
        sizes.append((tmp_path / "out" / "model.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]  # the names of the tensors are in it, too
    whole = logits(version(tmp_path / "runs") / "hf")
    assert float((logits(tmp_path / "out") - whole).abs().max() / whole.abs().max()) < 0.05
    ckpt = trained(place, tmp_path / "adapted", model__lora={"r": 4})
    assert "add --merge_lora true" in refused(
        capsys, "export", [*ckpt, f"--output_dir={tmp_path / 'adapter'}", half]
    )
    assert not (tmp_path / "adapter").exists()


def test_a_template_that_asks_for_the_date_is_exported_as_it_is(place, tmp_path):
    template = "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML
    trained(place, tmp_path / "runs", data__chat_template=template)
    assert (version(tmp_path / "runs") / "hf" / "chat_template.jinja").read_text() == template
