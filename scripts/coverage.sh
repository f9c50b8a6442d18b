#!/usr/bin/env bash
# Every test that needs no GPU, and which lines of star_fast/ they run, in all processes that they start; about half an
# hour on two cores.
# Arguments go to pytest. With SAVE=1 the totals go into benchmarks/results/coverage.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --tests || exit
export PATH="$PWD/.venv/bin:$PATH"
# One place for all processes, whatever folder they run in
export OMP_NUM_THREADS=1 COVERAGE_FILE="$PWD/.coverage"
python -m coverage erase
python -m coverage run -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
failed=$?
python -m coverage combine -q && python scripts/covered_lines.py ${SAVE:+--save} || exit
exit "$failed"
