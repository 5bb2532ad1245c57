#!/usr/bin/env bash
# The core suites under other versions of torch, DeepSpeed and transformers, each in an environment of its own.
#
#   bash launch/test_versions.sh [--keep] [--output FILE] [TORCH:DEEPSPEED[:TRANSFORMERS[:ACCELERATE]][@PYTHON] ...]
#
#   --keep          leave the environments in place (some 5 GB each); a kept one is used again
#   --output FILE   where the table goes, as Markdown (default: $APOLLO_VERSIONS/versions.md)
#
# Without versions: those of docs/versions.md. One environment exists at a time. Lines of earlier runs in
# $APOLLO_VERSIONS/rows stay in the table until the same versions run again. The exit status is 0 if all tests pass.
#
#   APOLLO_VERSIONS=...   the folder for environments, logs and lines (default: versions in the repository's runs/)
#   PYTHON=...            the interpreter where no version names one, as `uv venv --python` takes it (default: 3.11)
#   RUN=...               a command that runs the tests, such as `nice`
set -euo pipefail
ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
WORK="${APOLLO_VERSIONS:-$ROOT/runs/versions}"
OUTPUT="$WORK/versions.md"
VERSIONS=()
KEEP=0
while (($#)); do
    case "$1" in
        --keep) KEEP=1 ;;
        --output) OUTPUT="${2:?--output needs a file}" && shift ;;
        -h | --help) sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        [0-9]*:[0-9]*) VERSIONS+=("$1") ;;
        *) echo "error: $1 is neither an option nor TORCH:DEEPSPEED, such as 2.8.0:0.18.5" >&2 && exit 2 ;;
    esac
    shift
done
((${#VERSIONS[@]})) || VERSIONS=(2.8.0:0.17.6:4.55 2.11.0:0.18.5:5.17 2.13.0:0.19.8:5.23 2.15.0:0.19.8:5.24)

# Every engine, named parameters by name, the optimizer's contract, state dicts and checkpoints.
QUICK=(exact_torch exact_sharded exact_zero exact_zero3 exact_bf16 layerwise in_backward optim_contract optim_contract_load
    optim_contract_state optim_contract_ranks state_local dcp checkpoint_fits checkpoint_ranks nonfinite traps unsupported
    lint without_engines internals)
# Real LLaMAs under the Trainer and Accelerate: slow, but what people run.
SLOW=(by_name hugging_face_fsdp)

mkdir -p "$WORK/rows"
export UV_CACHE_DIR="${UV_CACHE_DIR:-$WORK/cache}" # on the disk of the environments, which then share its files
export PYTHONPATH="$ROOT" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_BUILD_OPS=0
export TORCHINDUCTOR_COMPILE_THREADS=1 # CUDA builds of torch would start compiler processes at import
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

UV="$(command -v uv || true)"
if [[ -z "$UV" ]]; then
    UV="$WORK/uv/bin/uv"
    [[ -x "$UV" ]] || { python3 -m venv "$WORK/uv" && "$WORK/uv/bin/pip" install --quiet uv; }
fi

# install ENVIRONMENT PYTHON TORCH DEEPSPEED TRANSFORMERS ACCELERATE
install() {
    local packages=("torch==$3" "deepspeed==$4" accelerate transformers numpy pyyaml tqdm "datasets>=3.0" tokenizers psutil
        "pytest>=8" setuptools ninja)
    [[ -z "$5" ]] || packages+=("transformers==$5.*")
    [[ -z "$6" ]] || packages+=("accelerate==$6.*")
    "$UV" venv --quiet --python "$2" "$1"
    # Each of many processes would compile what it imports, where PYTHONDONTWRITEBYTECODE is set.
    "$UV" pip install --quiet --compile-bytecode --python "$1/bin/python" "${packages[@]}"
}

# suites NAMES: their files, those that this checkout has.
suites() {
    local name
    for name in "$@"; do
        (cd "$ROOT" && find tests -name "test_$name.py")
    done
}

# line ENVIRONMENT XML...: one line of the table.
line() {
    "$1/bin/python" - "${@:2}" <<'PYTHON'
import platform, sys, xml.etree.ElementTree as tree
from importlib.metadata import version
passed = failed = skipped = seconds = 0
names = []
for path in sys.argv[1:]:
    try:
        suite = tree.parse(path).getroot().find("testsuite")
    except (OSError, tree.ParseError):
        failed += 1
        names.append("the run did not end")
        continue
    count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    bad = count["failures"] + count["errors"]
    passed, failed, skipped = passed + count["tests"] - bad - count["skipped"], failed + bad, skipped + count["skipped"]
    seconds += float(suite.get("time"))
    names += [f"`{c.get('name')}`" for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
versions = [version(name) for name in ("torch", "deepspeed", "transformers", "accelerate")]
cells = [*versions, platform.python_version(), passed, failed, skipped, f"{seconds / 60:.0f} min", ", ".join(names)]
print("| " + " | ".join(map(str, cells)).rstrip() + " |")
sys.exit(failed > 0)
PYTHON
}

status=0
for entry in "${VERSIONS[@]}"; do
    python="${PYTHON:-3.11}"
    if [[ "$entry" == *@* ]]; then python="${entry#*@}"; fi
    IFS=: read -r torch deepspeed transformers accelerate <<<"${entry%@*}:::"
    accelerate="${accelerate%%:*}"
    name="${entry//[:\/]/-}"
    environment="$WORK/env-$name"
    echo "==> torch $torch, deepspeed $deepspeed${transformers:+, transformers $transformers}" >&2
    made=0
    if [[ ! -x "$environment/bin/python" ]]; then
        made=1
        if ! install "$environment" "$python" "$torch" "$deepspeed" "$transformers" "$accelerate"; then
            rm -rf -- "$environment"
            echo "error: $entry cannot be installed" >&2
            status=1
            continue
        fi
    fi
    mapfile -t quick < <(suites "${QUICK[@]}")
    mapfile -t slow < <(suites "${SLOW[@]}")
    rm -f "$WORK/$name"-*.xml
    (
        cd "$ROOT"
        export PATH="$environment/bin:$PATH"
        # shellcheck disable=SC2086 # RUN is a command with arguments
        ${RUN:-} "$environment/bin/python" -m pytest -q -p no:cacheprovider -m "not slow" --junitxml="$WORK/$name-quick.xml" "${quick[@]}" || true
        # shellcheck disable=SC2086
        ${RUN:-} "$environment/bin/python" -m pytest -q -p no:cacheprovider --junitxml="$WORK/$name-slow.xml" "${slow[@]}" || true
    ) >"$WORK/$name.log" 2>&1
    line "$environment" "$WORK/$name-quick.xml" "$WORK/$name-slow.xml" >"$WORK/rows/$name.md" || status=1
    cat "$WORK/rows/$name.md" >&2
    if ((made && !KEEP)); then rm -rf -- "$environment"; fi
done

{
    echo "| torch | DeepSpeed | transformers | accelerate | Python | passed | failed | skipped | time | failed tests |"
    echo "|---|---|---|---|---|---|---|---|---|---|"
    cat "$WORK"/rows/*.md | sort -t'|' -k2,2V -k3,3V
} >"$OUTPUT"
cat "$OUTPUT"
exit "$status"
