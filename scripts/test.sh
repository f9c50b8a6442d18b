#!/usr/bin/env bash
# Set-up, then every test that needs no GPU. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --tests
export PATH="$PWD/.venv/bin:$PATH"
# One thread a worker: two cores are shared by two test processes.
export OMP_NUM_THREADS=1
# A file at a time to each worker, in the order of tests/conftest.py.
exec python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
