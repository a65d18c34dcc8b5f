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
python="$VENV/bin/python"

make_environment() {
    if [ ! -x "$python" ]; then
        "${PYTHON:-$(command -v python3.11 || command -v python3)}" -m venv "$VENV"
    fi
}

install_torch() {
    # A torch that fits is respected. Where there is none, and no NVIDIA GPU, a CPU build is taken if there is one: the
    # default build brings gigabytes of CUDA. An index may offer it beside the other, as 2.13.0+cpu; else PyTorch's does.
    local fits="import torch; exit(not (2, 11) <= tuple(map(int, torch.__version__.split('.')[:2])) < (2, 16))"
    if "$python" -c "$fits" 2>/dev/null; then
        return
    fi
    local install=("$python" -m pip install --quiet --retries 1)
    if command -v nvidia-smi >/dev/null; then
        "${install[@]}" "torch>=2.11,<2.16"
    else
        "${install[@]}" "torch==2.13.0+cpu" 2>/dev/null ||
            "${install[@]}" "torch>=2.11,<2.16" --index-url https://download.pytorch.org/whl/cpu ||
            "${install[@]}" "torch>=2.11,<2.16"
    fi
}

case "${1:-}" in
demo)
    make_environment
    install_torch
    "$python" -m pip install --quiet --editable .
    "$python" -m lit_sft fit --config configs/demo.yaml
    "$python" -m lit_sft predict --ckpt_path last
    cat "$(ls -td lightning_logs/version_*/ | head -n 1)predictions.jsonl"
    ;;
test)
    shift
    make_environment
    install_torch
    "$python" -m pip install --quiet --editable ".[test]"
    exec "$python" -m pytest "$@"
    ;;
*)
    echo "usage: scripts/setup.sh demo | test [PYTEST ARGUMENTS]" >&2
    exit 2
    ;;
esac
