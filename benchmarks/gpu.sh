#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests marked gpu and those of the kernels, which run on the GPU if
# there is one, then kernel_time.py and step_time.py on CUDA. Fetches and installs nothing: it needs a python3 with torch and pytest, and puts this repository on its path, and with it whatever wheels
# lie in .whl/ (DeepSpeed, for example, on a machine without a network). Tables go to $OUT if that is set, else to
# benchmarks/results/.
#
#   bash benchmarks/gpu.sh
#
# A run that was cut off goes on where it ended: parts that have succeeded at this revision are not run again. Remove
# .parts-GPU from the folder of results to begin anew.
#
#   PYTHON=python3     the interpreter
#   SHAPES="60M 350M 1B 7B"    DTYPES="fp32 bf16"    ROUNDS=15    KERNEL_SHAPES=7B
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
results="${OUT:-benchmarks/results}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$results"

if compgen -G ".whl/*.whl" >/dev/null; then
    site="$(mktemp -d)"
    trap 'rm -rf -- "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
fi

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "error: $python sees no CUDA device" >&2
    exit 1
}
name="$("$python" -c 'import re, torch; print(re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-").lower())')"

# A part that has succeeded leaves a mark with the revision, and is not run again for that revision.
marks="$results/.parts-$name"
mkdir -p "$marks"
revision="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
has_run() { [[ "$(cat "$marks/$1" 2>/dev/null)" == "$revision" ]] && echo "==> $1: has run before ($marks/$1)"; }
mark() { echo "$revision" >"$marks/$1"; }

status=0
if ! has_run tests; then
    echo "==> tests marked gpu"
    if "$python" -m pytest -p no:cacheprovider -m gpu tests; then mark tests; else status=$?; fi
fi
if ! has_run kernels; then
    echo "==> tests of the kernels, compiled"
    if "$python" -m pytest -p no:cacheprovider tests/kernels; then mark kernels; else status=$?; fi
fi
if ! has_run kernel_time; then
    echo "==> each kernel alone"
    if "$python" benchmarks/kernel_time.py --shapes "${KERNEL_SHAPES:-7B}" --write "$name-kernels" --results "$results"; then
        mark kernel_time
    else
        status=$?
    fi
fi

for shapes in ${SHAPES:-60M 350M 1B 7B}; do
    for dtype in ${DTYPES:-fp32 bf16}; do
        has_run "$shapes-$dtype" && continue
        echo "==> $shapes $dtype"
        # Weights, gradients and AdamW's state are four numbers an element, and a step may need as much again for the
        # largest matrices: a pair that does not fit is left out, not estimated.
        if ! "$python" - "$shapes" "$dtype" <<'EOF'
import sys
import torch
sys.path.insert(0, "benchmarks")
from candidates import matrix_shapes
need = 4.5 * sum(m * n for m, n in matrix_shapes(sys.argv[1])) * {"fp32": 4, "bf16": 2}[sys.argv[2]]
free, _ = torch.cuda.mem_get_info()
print(f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free")
sys.exit(need > 0.95 * free)
EOF
        then
            echo "left out: too large for this GPU"
            continue
        fi
        if "$python" benchmarks/step_time.py --device cuda --shapes "$shapes" --dtype "$dtype" \
            --rounds "${ROUNDS:-15}" --write "$name-$shapes-$dtype" --results "$results"; then
            mark "$shapes-$dtype"
        else
            status=$?
        fi
    done
done
exit "$status"
