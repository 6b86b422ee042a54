#!/usr/bin/env bash
# All that a GPU machine has to say, in one call; README.md beside this file tells more.
#
#   benchmarks/gpu/run.sh [--only PART ...] [--tiny]
#
# Parts, in this order: site (unpacks the packages carried), kernel-tests, kernel-benchmarks, equality,
# speeds. A part that fails or cannot run is recorded and the next one runs; the exit status is 1 if
# there was one. --tiny: one cell of the equality matrix and a few prompts, to see that it runs.
# Environment: OUT (results), PYTHON, WHEELS and SITE (folders), MODEL (of the speeds), EQUALITY and
# SPEEDS (further arguments of these two parts).
# shellcheck disable=SC2329 # the parts are called by their names
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

PARTS=(site kernel-tests kernel-benchmarks equality speeds)
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-benchmarks/gpu/wheels}
OUT=${OUT:-benchmarks/results/gpu}
SITE=${SITE:-$PWD/build/gpu-site} # what the packages are unpacked into
OURS='[ngram]:K=5:tree=dynamic:16'
export PYTHONPATH=$SITE:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1

chosen=()
tiny=no
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=yes ;;
        --only)
            while [ $# -gt 1 ] && [[ $2 != --* ]]; do
                chosen+=("$2")
                shift
            done
            ;;
        *)
            sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
            exit 2
            ;;
    esac
    shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${PARTS[@]}")
for part in "${chosen[@]}"; do
    if [[ " ${PARTS[*]} " != *" $part "* ]]; then
        echo "run.sh: there is no part '$part'; the parts are ${PARTS[*]}" >&2
        exit 2
    fi
done

has_vllm() {
    local said
    said=$("$PYTHON" -c 'import vllm, vllm.config, vllm.platforms
vllm.platforms.current_platform.device_type' 2>&1) && return 0
    echo "missing: $PYTHON cannot import vllm (${said##*$'\n'}); carry it, see README.md"
    return 1
}

site() {
    if [ -f "$WHEELS/site.tar.xz" ]; then
        rm -rf "$SITE"
        "$PYTHON" -m tarfile -e "$WHEELS/site.tar.xz" "$SITE" || return 1
    else
        echo "no $WHEELS/site.tar.xz: only what $PYTHON has can run"
    fi
    has_vllm || return 1
    # vLLM finds plugins by their metadata, which a copy of the work tree lacks.
    "$PYTHON" -c 'from importlib.metadata import version; version("vllm_specplus")' 2>/dev/null ||
        "$PYTHON" setup.py --quiet egg_info
}

kernel-tests() { make test-gpu GPU_PYTHON="$PYTHON"; }

kernel-benchmarks() {
    make bench-gpu GPU_PYTHON="$PYTHON" || return
    cat benchmarks/results/kernels_*.csv >"$OUT/kernels.csv"
}

equality() {
    has_vllm || return 1
    local arguments=()
    if [ "$tiny" = yes ]; then
        arguments=(--models llama --dtypes float32 --graphs off --temperatures 0)
        arguments+=(--batch-sizes 1 --prompts 2 --max-tokens 48)
    fi
    # shellcheck disable=SC2086 # EQUALITY holds several words
    "$PYTHON" -m benchmarks.gpu.equality --json "$OUT/equality.json" "${arguments[@]}" ${EQUALITY:-}
}

speeds() {
    has_vllm || return 1
    local native=native-ngram arguments=(--batch-sizes 1 8 64 --limit 64)
    [ "$tiny" = no ] || arguments=(--batch-sizes 1 --limit 1 --max-tokens 16 --enforce-eager)
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && native+=-gpu
    [ -z "${MODEL:-}" ] || arguments+=(--model "$MODEL")
    # Without MODEL, Gemma-3-270M is taken from the user's cache, or made from its wheels in WHEELS.
    # shellcheck disable=SC2086 # SPEEDS holds several words
    PIP_RETRIES=0 PIP_FIND_LINKS=$WHEELS "$PYTHON" -m benchmarks.e2e.generate --methods "$native" "$OURS" \
        "${arguments[@]}" --json "$OUT/speeds.json" ${SPEEDS:-}
}

mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
{
    echo "date: $(date --utc --iso-8601=seconds)"
    "$PYTHON" -c 'from benchmarks import provenance as p
print("device:", p.device_name(), "\nversions:", p.package_versions(), "\ncommit:", p.commit())'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} >"$OUT/summary.txt" 2>&1
: >"$OUT/log.txt"

failed=0
for part in "${chosen[@]}"; do
    echo "== $part" | tee -a "$OUT/log.txt"
    begin=$SECONDS
    if "$part" 2>&1 | tee -a "$OUT/log.txt"; then
        ended=ok
    else
        ended=FAILED
        failed=1
    fi
    echo "$part: $ended after $((SECONDS - begin)) s" | tee -a "$OUT/summary.txt"
done
exit "$failed"
