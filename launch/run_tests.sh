#!/usr/bin/env bash
# Lint, types and tests, in the project's own environment, which is made if it is missing.
#
#   bash launch/run_tests.sh [--fast] [arguments for pytest]
#
#   --fast    leaves out the tests marked slow (more than about 4 s of processor time); without it all are run
#
#   APOLLO_TEST_JOBS=4             how many processes of pytest share the files, side by side; ranks wait for each other
#                                  half of the time, so more than there are cores. 0: one, as --pdb and -s need it
#   APOLLO_TEST_TIMEOUT_SCALE=3    multiplies every deadline of the tests, for machines that have more to do; a test that
#                                  passes does not wait for its deadline
#
# Ends with pytest's closing line; the exit status is that of the first step that failed.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
cd "$APOLLO_ROOT"

pytest_args=()
for argument in "$@"; do
    if [[ "$argument" == --fast ]]; then
        pytest_args+=(-m "not slow")
    else
        pytest_args+=("$argument")
    fi
done

# The ranks of a test share the cores: with more threads each they only wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Tests must not reach for a hub, nor wait for one.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MPLBACKEND=Agg

say "ruff check"
ruff check .
say "ruff format"
ruff format --check .
say "mypy"
mypy
say "shellcheck"
shellcheck -x launch/*.sh launch/*.sbatch launch/site.env.example benchmarks/*.sh tests/launch/*.sh
export APOLLO_TEST_TIMEOUT_SCALE="${APOLLO_TEST_TIMEOUT_SCALE:-3}"
say "pytest"
# The cases of a file run in one process; tests/conftest.py says which files share one, and which start first. A process
# that dies, or is ended because a case waits for ever, is not replaced: its file would begin anew, and wait again.
python -m pytest -n "${APOLLO_TEST_JOBS:-4}" --no-loadscope-reorder --max-worker-restart=0 \
    "${pytest_args[@]+"${pytest_args[@]}"}"
