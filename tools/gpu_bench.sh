#!/usr/bin/env bash
# Measures the table's GPU rows on a bare machine: torch 2.11 or newer with CUDA is there, a network is not.
#
#   tools/gpu_bench.sh --fill WHEELS [--without numpy] on a machine with network, sdlora and peft installed
#   tools/gpu_bench.sh WHEELS [options of the bench]   on the GPU machine; ends within nine minutes
#
# JSON and table go into $OUT, or into benchmarks/speed. The machine's own packages are left as they are.
set -euo pipefail

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$self" >&2
    exit 2
}

self=$(realpath "$0")
python=${PYTHON:-python3}

[[ $# -ge 1 ]] || usage
if [[ $1 == --fill ]]; then
    shift
    [[ $# -ge 1 ]] || usage
    wheels=$(realpath -m "$1")
    shift
    cd "$(dirname "$self")/.."
    exec "$python" -m tools.bench.wheels "$wheels" "$@"
fi

wheels=$(realpath -m "$1")
out=$(realpath -m "${OUT:-$(dirname "$self")/../benchmarks/speed}")
shift
cd "$(dirname "$self")/.."
compgen -G "$wheels/*.whl" >/dev/null || {
    echo "no wheels in $wheels; fill it on a machine with network: $0 --fill $wheels" >&2
    exit 2
}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "$python has no torch that sees a GPU; name another with PYTHON=..." >&2
    exit 2
}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --find-links "$wheels" \
    --target "$site" "$wheels"/*.whl
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

"$python" -m tools.bench --rows gpu --seconds 480 --row-seconds 15 --out "$out/gpu.json" "$@"
