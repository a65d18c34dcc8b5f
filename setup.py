"""Packaging of lit_sft; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lit_sft" / "__init__.py").read_text()).group(
    1
)

QUANTIZATION = ["bitsandbytes>=0.50,<0.51"]
TEST = [
    *QUANTIZATION,
    "schedulefree>=1.4,<2",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.16,<0.18",  # its formatter decides how the code looks, and so whether a test passes
    "mypy>=2.4,<2.5",
    "codespell>=2.4,<3",
    "import-linter>=2.5,<3",
    "setuptools>=70.1",  # a test builds the wheel without an environment of its own
]

setup(
    name="lit-sft",
    version=VERSION,
    description=(
        "Supervised fine-tuning of Hugging Face causal language models with PyTorch Lightning"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["lit_sft", "lit_sft.*"]), "lit_sft.configs"],
    package_dir={"lit_sft.configs": "configs"},
    package_data={
        "lit_sft.data": ["README.md"],
        "lit_sft.demo": ["model/*"],
        "lit_sft.configs": ["*.yaml"],
    },
    # Bounds are those that were tried. lightning 2.6.2 and 2.6.3 were withdrawn (supply chain:
    # Lightning #21691).
    install_requires=[
        "torch>=2.11,<2.16",
        "lightning>=2.6.4,<2.7",
        "transformers>=5.17,<5.25",
        "datasets>=5.0,<6",
        "peft>=0.20,<0.22",
        "torchmetrics>=1.8,<2",
        "tensorboard>=2.19,<3",
        "jsonargparse[signatures]>=4.51,<5",
        "numpy>=2",
        "rich>=13",
        "psutil>=5.9",
        "gguf>=0.17",  # models in this format, as scripts/fetch_smollm2.py brings one
    ],
    extras_require={"quantization": QUANTIZATION, "test": TEST, "dev": [*TEST, "pre-commit>=4"]},
    entry_points={"console_scripts": ["lit-sft=lit_sft.__main__:main"]},
)
