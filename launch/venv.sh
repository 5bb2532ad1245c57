# shellcheck shell=bash
# Makes ready the project's own virtual environment and activates it. Sourced by the scripts beside it:
#
#     source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
#
# Needs a Python of 3.11 or later with venv (constraints.txt; as a library the package takes 3.10 as well), and a package
# index the first time. The installation is repeated only
# when setup.py, pyproject.toml or constraints.txt have changed, so later runs need no network.
#
#   PYTHON=...                 the interpreter to build with (default: the first suitable one on PATH)
#   APOLLO_VENV=...            where the environment lives (default: .venv in the repository)
#   PIP_EXTRA_INDEX_URL=...    read by pip itself; on a Linux machine without an NVIDIA GPU,
#                              https://download.pytorch.org/whl/cpu spares several GB of CUDA libraries

APOLLO_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
APOLLO_VENV="${APOLLO_VENV:-$APOLLO_ROOT/.venv}"

# say TEXT: one line of progress, apart from what the programs themselves print.
say() { printf '==> %s\n' "$*" >&2; }

# die TEXT: the reason, and the end.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# find_python: prints the first interpreter that is new enough and can make environments; 3.11 comes first, being what
# constraints.txt is tested with. Each candidate is really run, since a version manager's shim may lie on PATH without
# a version behind it.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        [[ -n "$candidate" ]] || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
        [[ "$candidate" != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is no Python of 3.11 or later with the venv module"
    done
    die "no Python of 3.11 or later with the venv module was found; install one" \
        "(Debian and Ubuntu: apt-get install python3 python3-venv) or name it: PYTHON=/path/to/python3 bash $0"
}

# digest FILES: one hash over their contents.
digest() { cat -- "$@" | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1; }

# show_progress: pip's lines come in; what is being fetched goes out, on one changing line if somebody watches.
show_progress() {
    local line
    while IFS= read -r line; do
        case "$line" in
            Collecting* | *Building\ wheel* | Installing\ collected*)
                if [[ -t 2 ]]; then
                    printf '\r\033[K    %.100s' "$line" >&2
                fi
                ;;
        esac
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

install_all() {
    local log="$APOLLO_VENV/install.log"
    if [[ "$(uname -s)" == Linux && -z "${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]] && ! command -v nvidia-smi >/dev/null; then
        say "no NVIDIA GPU seen: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu would fetch the small build of PyTorch"
    fi
    say "installing into $APOLLO_VENV (the first time takes some minutes; log: $log)"
    # DS_BUILD_OPS=0: DeepSpeed's compiled extras need a compiler or CUDA, and nothing here uses them.
    if ! (cd "$APOLLO_ROOT" && DS_BUILD_OPS=0 "$APOLLO_VENV/bin/python" -m pip install --disable-pip-version-check \
        --progress-bar off -c constraints.txt -e '.[pretrain,plot,dev,deepspeed]') 2>&1 | tee "$log" | show_progress; then
        tail -n 25 "$log" >&2
        die "the installation failed; the whole log is $log"
    fi
}

ensure_venv() {
    local python stamp wanted lock
    stamp="$APOLLO_VENV/apollo-installed"
    # Two scripts started at once on a fresh clone must not both install: the second waits for the first.
    if command -v flock >/dev/null; then
        mkdir -p -- "$(dirname -- "$APOLLO_VENV")"
        exec {lock}>"$APOLLO_VENV.lock"
        flock "$lock"
    fi
    if [[ ! -x "$APOLLO_VENV/bin/python" ]]; then
        python="$(find_python)" || exit 1
        say "making $APOLLO_VENV with $("$python" --version 2>&1)"
        "$python" -m venv "$APOLLO_VENV" || die "$python -m venv $APOLLO_VENV failed"
    fi
    # The path is part of the stamp: a moved repository must be installed again, since the installation points at it.
    wanted="$(digest "$APOLLO_ROOT/setup.py" "$APOLLO_ROOT/pyproject.toml" "$APOLLO_ROOT/constraints.txt") $APOLLO_ROOT"
    if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
        install_all
        printf '%s\n' "$wanted" >"$stamp"
    fi
    if [[ -n "${lock:-}" ]]; then exec {lock}>&-; fi # or whatever is started next would hold it to its end
    # What `activate` does, without its prompt: `deepspeed` and `python` are now those of the environment.
    export VIRTUAL_ENV="$APOLLO_VENV" PATH="$APOLLO_VENV/bin:$PATH"
    unset PYTHONHOME
}

ensure_venv
