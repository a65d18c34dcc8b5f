#!/usr/bin/env bash
# Everything from nothing but Python 3.11 and pip.
#
#   scripts/setup.sh demo            environment, install, fit the built-in demo, answer questions before and after
#   scripts/setup.sh test [ARGS]     environment, install, pytest with ARGS
#
# VENV (default .venv) is the environment that is made or used again; PYTHON (default python3.11) makes it.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-$(command -v python3.11 || command -v python3)}" -m venv "$VENV"
fi
python="$VENV/bin/python"

install() {
    # An installed torch is respected. Where none is, and no NVIDIA GPU, the CPU build is taken: the default one would bring
    # gigabytes of CUDA. It is 2.13.0 where an index offers that as a CPU build, else PyTorch's own CPU index.
    if ! "$python" -c "import torch" 2>/dev/null; then
        if command -v nvidia-smi >/dev/null 2>&1; then
            "$python" -m pip install --quiet "torch>=2.11,<2.14"
        elif ! "$python" -m pip install --quiet "torch==2.13.0+cpu" 2>/dev/null; then
            "$python" -m pip install --quiet "torch>=2.11,<2.14" --index-url https://download.pytorch.org/whl/cpu
        fi
    fi
    "$python" -m pip install --quiet --editable "$1"
}

case "${1:-}" in
demo)
    install .
    "$python" -m lit_sft fit --config configs/demo.yaml
    "$python" -m lit_sft predict --config configs/demo.yaml --ckpt_path last
    cat "$(ls -td lightning_logs/version_*/ | head -n 1)predictions.jsonl"
    ;;
test)
    shift
    install ".[test]"
    exec "$python" -m pytest "$@"
    ;;
*)
    echo "usage: scripts/setup.sh demo | test [PYTEST ARGUMENTS]" >&2
    exit 2
    ;;
esac
